"""Pattern -> ACSR, by rows or (for dK and dV) by columns."""

from __future__ import annotations

from typing import Any

import numpy as np

from splat.acsr.format import ACSR, Component
from splat.pattern.core import Array, Axis, Pattern, Run, is_runtime_array


def build(pattern: Pattern, q_len: int, kv_len: int | None = None, query_offset: Any = 0) -> ACSR:
    """The matrix of `pattern`: row i is position `i + query_offset`, column j is position j.

    Args:
      q_len, kv_len: rows and columns; kv_len is q_len where None.
      query_offset: an int, or a traced scalar: then (or with run-time arrays in the pattern) so are start and count.

    Returns:
      its components' start and count, int32 [q_len] each.

    Raises:
      PatternError: the pattern was made from data for other positions; IrregularPatternError: its rows are not regular.

    >>> import splat
    >>> splat.build(splat.causal() & splat.window(2) | splat.sink(1), 4).to_dense().astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """
    kv_len = q_len if kv_len is None else kv_len
    runs = pattern.runs(Axis(query_offset, q_len), Axis(0, kv_len))
    return ACSR((q_len, kv_len), tuple(_component(run, 0) for run in runs))


def build_transposed(pattern: Pattern, q_len: int, kv_len: int, query_offset: Any = 0) -> ACSR:
    """The transposed matrix in closed form: row j is key position j, column i is query position `i + query_offset`."""
    runs = pattern.column_runs(Axis(0, kv_len), Axis(query_offset, q_len))
    return ACSR((kv_len, q_len), tuple(_component(run, query_offset) for run in runs))


def _component(run: Run, origin: Any) -> Component:
    def as_int32(values: Array) -> Array:
        return values if values.dtype == np.int32 else values.astype(np.int32)

    moved = run.start if not is_runtime_array(origin) and origin == 0 else run.start - origin
    return Component(run.stride, as_int32(moved), as_int32(run.count), run.line_step)
