"""SciPy's CSR, on one thread: SciPy has no others. It has no sampled product either; NumPy makes that of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from splat.bench.peers.base import BLAS_REST_S, Contender, Kind, Layout, Ready, as_numpy
from splat.bench.problem import Problem
from splat.bench.timing import wall_ms

#: Floats that are gathered, or scores that are made, at a time: they stay in the second-level cache or near it.
GATHERED, SCORES = 1 << 18, 1 << 20


def _spmm(problem: Problem) -> Ready:
    import scipy.sparse

    pairs, shape = problem.pairs, (problem.q_len, problem.q_len)
    matrices = [scipy.sparse.csr_array((one, pairs.column, pairs.indptr), shape=shape) for one in problem.data]
    value = problem.inputs.value
    return Ready(lambda: np.stack([a @ v for a, v in zip(matrices, value, strict=True)]), Layout.ROWS, as_numpy)


def _softmax(problem: Problem) -> Ready:
    indptr, data = problem.pairs.indptr, problem.data
    counts = np.diff(indptr)
    if not counts.all():
        raise ValueError("reduceat needs a non-zero in every row")

    def call() -> np.ndarray:
        top = np.maximum.reduceat(data, indptr[:-1], axis=1)
        weights = np.exp(data - np.repeat(top, counts, axis=1))
        total = np.add.reduceat(weights, indptr[:-1], axis=1)
        return weights / np.repeat(total, counts, axis=1)

    return Ready(call, Layout.CSR, as_numpy)


def _sddmm(problem: Problem) -> Ready:
    """Whichever is faster here: gathering both operands for every pair, or dense products of row blocks, then gathered.

    The second computes all pairs, of which few are kept; it wins where there are many non-zeros.
    """
    ways = {"gathered einsum": _gathered(problem), "dense row blocks, then gathered": _dense_blocks(problem)}
    times = {name: wall_ms(call) for name, call in ways.items()}
    chosen = min(times, key=lambda name: times[name])
    return Ready(ways[chosen], Layout.CSR, as_numpy, note=f"sddmm by {chosen}")


def _gathered(problem: Problem) -> Any:
    rows, columns = problem.pairs.row, problem.pairs.column
    query, key, *_ = problem.inputs
    step = max(GATHERED // problem.head_dim, 1)

    def call() -> np.ndarray:
        out = np.empty((problem.heads, problem.nnz), np.float32)
        for n in range(problem.heads):
            for at in range(0, problem.nnz, step):
                part = slice(at, at + step)
                np.einsum("ch,ch->c", query[n, rows[part]], key[n, columns[part]], out=out[n, part])
        return out

    return call


def _dense_blocks(problem: Problem) -> Any:
    pairs, (query, key, *_) = problem.pairs, problem.inputs
    block = max(SCORES // problem.q_len, 1)
    starts = range(0, problem.q_len, block)
    local = pairs.row.astype(np.int64) % block * problem.q_len + pairs.column

    def call() -> np.ndarray:
        out = np.empty((problem.heads, problem.nnz), np.float32)
        for n in range(problem.heads):
            transposed = key[n].T
            for at in starts:
                part = slice(pairs.indptr[at], pairs.indptr[min(at + block, problem.q_len)])
                np.take((query[n, at : at + block] @ transposed).ravel(), local[part], out=out[n, part], mode="clip")
        return out

    return call


SCIPY = Contender(
    "scipy",
    "SciPy CSR (single-threaded); sddmm and softmax by NumPy on its arrays",
    Kind.SPARSE,
    {"spmm": _spmm, "softmax": _softmax, "sddmm": _sddmm},
    packages=("scipy",),
    devices=("cpu",),
    rest_s=BLAS_REST_S,
    needs_bytes=lambda problem: problem.nnz * (24 + 8 * problem.heads),
)
