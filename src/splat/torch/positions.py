"""Rows of a pattern by their positions, looked up: each token that is decoded has new ones, and nothing is planned."""

from __future__ import annotations

import numpy as np

from splat.acsr import build
from splat.codegen.cpp.lower import runs_of
from splat.errors import PatternError
from splat.remembered import Remembered
from splat.torch.static import Static, pattern_in

#: Rows that are made together, and how many more are for queries that begin at the last of them.
ROWS, MORE = 1024, 16


def runs_at(static: Static, q_len: int, kv_len: int) -> np.ndarray:
    """RUNS (see `lower.runs_of`) of `q_len` queries from each offset on: int32 [offsets, q_len, 3 * components].

    Raises:
      what `splat.build` raises.
    """
    offsets = static[3] if isinstance(static[3], tuple) else (static[3],)
    found = [_runs(static, offset, q_len, kv_len) for offset in offsets]
    width = max(one.shape[1] for one in found)
    runs = np.tile(np.array([1, 0, 0], np.int32), (len(found), q_len, width // 3))  # components without a key
    for n, one in enumerate(found):
        runs[n, :, : one.shape[1]] = one
    return runs


def _runs(static: Static, offset: int, q_len: int, kv_len: int) -> np.ndarray:
    begin = offset // ROWS * ROWS
    if q_len <= MORE:
        try:
            made = _blocks((static[0], begin, kv_len), lambda: _table(static, begin, ROWS + MORE, kv_len))
            return made[offset - begin : offset - begin + q_len]
        except PatternError:
            pass  # the pattern is made of data, or of fewer positions than a block has
    return _table(static, offset, q_len, kv_len)


def _table(static: Static, offset: int, q_len: int, kv_len: int) -> np.ndarray:
    tables = runs_of(build(pattern_in(static), q_len, kv_len, offset))
    return tables[0][0] if tables else np.zeros((q_len, 0), np.int32)


_blocks = Remembered(entries=1024, nbytes=1 << 26)
