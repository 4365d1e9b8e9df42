"""Nothing is timed that is not right: all rows against float64 at a small size, some at the measured one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from splat.bench.peers.base import Contender, Layout, Ready
from splat.bench.problem import Problem, truth

#: The size at which all rows are checked, and the rows that are checked at larger ones.
GATE_LENGTH, SAMPLED_ROWS = 1024, 64

#: Of the largest value. A GPU multiplies float32 in pieces of lower precision, and cuDNN takes bfloat16.
TOLERANCE = {"cpu": 2e-5, "cuda": 2e-2}


class WrongError(Exception):
    """A result that is not what it should be."""


def check_small(problem: Problem, contender: Contender) -> float:
    """The case at a small size, all rows, against its dense mask: the largest error. Raises WrongError."""
    small = dataclasses.replace(problem, q_len=min(problem.q_len, GATE_LENGTH))
    mask = small.pattern.to_dense(small.q_len)
    with contender.under():
        ready = contender.make[small.op](small)
        result = ready.call()
    if ready.layout is Layout.PLAN:
        if not np.array_equal(small.acsr.to_dense(), mask):
            raise WrongError("the planned pairs are not those of the pattern")
        return 0.0
    for row in range(small.q_len):
        if not np.array_equal(small.row(row)[0], np.flatnonzero(mask[row])):
            raise WrongError(f"row {row} of the ACSR has other columns than the pattern")
    return check(small, ready, result, range(small.q_len))


def check(problem: Problem, ready: Ready, result: Any, rows: Iterable[int]) -> float:
    """The largest error in these rows, as a share of the largest value. Raises WrongError, also for NaN."""
    array = ready.read(result)
    errors, largest = [0.0], 0.0
    for row in rows:
        columns, places = problem.row(row)
        expected = truth(problem, row, columns, places)
        found = _row_of(problem, ready.layout, array, row, columns, places)
        if found.shape != expected.shape:
            raise WrongError(f"row {row} has shape {list(found.shape)}, not {list(expected.shape)}")
        errors.append(float(np.max(np.abs(found - expected), initial=0.0)))
        largest = max(largest, float(np.max(np.abs(expected), initial=0.0)))
    off = float(np.max(errors)) / (largest or 1.0)  # NaN stays NaN
    if not off <= TOLERANCE[problem.device]:
        raise WrongError(f"off by {off:.2g} of the largest value; {TOLERANCE[problem.device]:g} is allowed")
    return off


def sampled_rows(q_len: int) -> list[int]:
    """The first and the last four, and others at random, the same in every process."""
    if q_len <= SAMPLED_ROWS:
        return list(range(q_len))
    inner = np.random.default_rng(1).choice(np.arange(4, q_len - 4), SAMPLED_ROWS - 8, replace=False)
    return [*range(4), *sorted(inner.tolist()), *range(q_len - 4, q_len)]


def _row_of(
    problem: Problem, layout: Layout, array: np.ndarray, row: int, columns: np.ndarray, places: np.ndarray
) -> np.ndarray:
    match layout:
        case Layout.ACSR:
            return array[:, row, places]
        case Layout.DENSE:
            return array[:, row, columns]
        case Layout.CSR:
            return array[:, problem.csr.indptr[row] : problem.csr.indptr[row + 1]]
        case _:
            return array[:, row]
