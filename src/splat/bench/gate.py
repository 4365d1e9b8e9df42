"""Nothing is timed that is not right: all rows against float64 at a small size, some at the measured one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from splat.bench.peers.base import Contender, Layout, Ready
from splat.bench.problem import Problem
from splat.bench.truth import Part, Truth

#: The size at which all rows are checked.
GATE_LENGTH = 1024

#: Of a row's largest value. float32: sums of thousands of terms, each rounded to 2^-24. A GPU multiplies it in pieces
#: of lower precision, and cuDNN takes bfloat16. bfloat16: what everyone rounds to 2^-8 once, all four to the same side:
#: weights, outputs, the outputs that the gradients of scores start from, and these gradients themselves.
TOLERANCE = {
    ("float32", "cpu"): 2e-5,
    ("float32", "cuda"): 2e-2,
    ("bfloat16", "cpu"): 2**-6,
    ("bfloat16", "cuda"): 2**-6,
}


class WrongError(Exception):
    """A result that is not what it should be."""


def check_small(problem: Problem, contender: Contender) -> float:
    """The case at a small size, all rows, against its dense mask: `check`'s error. Raises WrongError."""
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
    return check(Truth.everywhere(small), ready, result)


def check(truth: Truth, ready: Ready, result: Any) -> float:
    """The largest error where the truth is known, as a share of its row's largest value; see `shares`.

    Raises WrongError where that is too much, also for NaN.
    """
    problem, array = truth.problem, ready.read(result)
    arrays = array if ready.layout is Layout.GRADIENTS else [array]
    compared = [
        _compared(_rows_of(problem, ready.layout, one, part), part.expected)
        for one, part in zip(arrays, truth.parts, strict=True)
    ]
    off, allowed = max(shares(compared)), TOLERANCE[problem.dtype, problem.device]
    if not off <= allowed:
        raise WrongError(f"off by {off:.2g} of a row's largest value; {allowed:g} is allowed")
    return off


class Compared(NamedTuple):
    """The rows of an array: largest error and largest value of each."""

    errors: np.ndarray
    sizes: np.ndarray

    @staticmethod
    def of(got: np.ndarray, right: np.ndarray) -> Compared:
        """[..., row]: rows lie along the last axis."""
        return Compared(*(np.abs(x).max(axis=-1, initial=0.0).ravel() for x in (got - right, right)))


def shares(compared: Sequence[Compared]) -> list[float]:
    """Each array's largest error as a share of its row's size: its largest value, or the median row's if larger.

    The arrays are those of a result, gradients of query, key and value after the output. Gradients of scores are
    differences, in a row with one key 0, of which rounding makes something: so a row of the query's gradient counts as
    no smaller than the output's, and one of the key's as no smaller than the value's, which are alike in scale.
    Infinity for NaN.
    """
    sizes = [one.sizes for one in compared]
    for difference, beside in ((1, 0), (2, 3)):
        if max(difference, beside) < len(sizes):
            sizes[difference] = np.maximum(sizes[difference], sizes[beside])
    return [_share(one.errors, size) for one, size in zip(compared, sizes, strict=True)]


def _share(errors: np.ndarray, sizes: np.ndarray) -> float:
    sizes = np.maximum(sizes, np.median(sizes))
    off = np.divide(errors, sizes, out=np.where(errors == 0, 0.0, np.inf), where=sizes > 0)
    worst = float(off.max(initial=0.0))
    return float("inf") if np.isnan(worst) else worst


def _compared(found: Iterable[np.ndarray], expected: Iterable[np.ndarray]) -> Compared:
    made = []
    for there, right in zip(found, expected, strict=True):
        if there.shape != right.shape:
            raise WrongError(f"a row has shape {list(there.shape)}, not {list(right.shape)}")
        made.append(Compared.of(there, right))
    return Compared(*(np.concatenate(x) for x in zip(*made, strict=True)))


def _rows_of(problem: Problem, layout: Layout, array: np.ndarray, part: Part) -> Iterator[np.ndarray]:
    for row in part.rows:
        match layout:
            case Layout.ACSR:
                yield array[:, row, problem.row(row)[1]]
            case Layout.DENSE:
                yield array[:, row, problem.row(row)[0]]
            case Layout.CSR:
                yield array[:, problem.pairs.indptr[row] : problem.pairs.indptr[row + 1]]
            case _:
                yield array[:, row]
