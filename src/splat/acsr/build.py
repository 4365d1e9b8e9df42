"""Pattern -> ACSR, by rows or (for dK and dV) by columns."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np

from splat.acsr.format import ACSR, Component
from splat.errors import PatternError
from splat.pattern.core import Array, Pattern, Run, check_axes, is_runtime_array
from splat.pattern.parse import pattern_of

#: Bytes that planning takes for a row at least (measured: 40 for a window, 115 for four components).
ROW_BYTES = 40


def build(pattern: Pattern | str, q_len: int, kv_len: int | None = None, query_offset: Any = 0) -> ACSR:
    """The matrix of `pattern`: row i is position `i + query_offset`, column j is position j.

    Args:
      pattern: a pattern, or its text.
      q_len, kv_len: rows and columns; kv_len is q_len where None.
      query_offset: an int, or a traced scalar: then (or with run-time arrays in the pattern) so are start and count.

    Returns:
      its components' start and count, int32 [q_len] each.

    Raises:
      ArgumentError: no pattern. PatternError: lengths or an offset that are no positions, more rows than memory holds,
        or the pattern was made from data for other lengths; IrregularPatternError: its rows are not regular.

    >>> import splat
    >>> splat.build(splat.causal() & splat.window(2) | splat.sink(1), 4).to_dense().astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """
    pattern = pattern_of(pattern)
    rows, cols = check_axes("build", q_len, q_len if kv_len is None else kv_len, query_offset)
    _check_memory("q_len", rows.length)
    return ACSR((rows.length, cols.length), tuple(_component(run, 0) for run in pattern.runs(rows, cols)))


def build_transposed(pattern: Pattern, q_len: int, kv_len: int, query_offset: Any = 0) -> ACSR:
    """The transposed matrix in closed form: row j is key position j, column i is query position `i + query_offset`."""
    rows, cols = check_axes("build_transposed", q_len, kv_len, query_offset)
    _check_memory("kv_len", cols.length)
    runs = pattern.column_runs(cols, rows)
    return ACSR((cols.length, rows.length), tuple(_component(run, rows.start) for run in runs))


@cache
def _memory_bytes() -> int | None:
    """The machine's memory, where the system says."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _check_memory(argument: str, lines: int) -> None:
    """Raises PatternError where so many rows would end the process: systems kill it without a word."""
    memory = _memory_bytes()
    if memory is not None and lines * ROW_BYTES > memory:
        raise PatternError(
            f"{argument} {lines:,} takes at least {lines * ROW_BYTES / 2**30:,.0f} GiB to plan, and this machine has "
            f"{memory / 2**30:,.0f}. Plan a part of the sequence at a time, with query_offset."
        )


def _component(run: Run, origin: Any) -> Component:
    def as_int32(values: Array) -> Array:
        return values if values.dtype == np.int32 else values.astype(np.int32)

    moved = run.start if not is_runtime_array(origin) and origin == 0 else run.start - origin
    return Component(run.stride, as_int32(moved), as_int32(run.count), run.line_step)
