"""What a problem's results must be, from the definition, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from splat.bench.problem import Problem

#: How many rows are known where not all are.
SAMPLED_ROWS = 64


class Part(NamedTuple):
    """One array of a result: `rows` of it, and what each must be, float64 [heads, ...]."""

    rows: Sequence[int]
    expected: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Truth:
    """The result of a problem in some rows, made when first needed.

    Attributes:
      problem: what is computed.
      rows: those that are known.
    """

    problem: Problem
    rows: Sequence[int]

    @staticmethod
    def everywhere(problem: Problem) -> Truth:
        return Truth(problem, range(problem.q_len))

    @staticmethod
    def sampled(problem: Problem) -> Truth:
        """In 64 rows, where there are as many."""
        return Truth(problem, sample(problem.q_len, SAMPLED_ROWS))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """One for each array of the result."""
        return (Part(self.rows, [_row(self.problem, row) for row in self.rows]),)


def sample(length: int, count: int) -> list[int]:
    """The first and the last sixteenth of so many rows, and others at random, the same in every process."""
    if length <= count:
        return list(range(length))
    ends = max(count // 16, 1)
    inner = np.random.default_rng(1).choice(np.arange(ends, length - ends), count - 2 * ends, replace=False)
    return [*range(ends), *sorted(inner.tolist()), *range(length - ends, length)]


def _row(problem: Problem, row: int) -> np.ndarray:
    """A row of the result: [heads, columns] of sddmm and softmax, [heads, head dim] of others."""
    columns, places = problem.row(row)
    query, key, value, values = problem.inputs
    if problem.op == "spmm":
        return _weighted(values[:, row, places], value[:, columns])
    if problem.op == "softmax":
        return _softmax(values[:, row, places])
    scores = np.einsum("nh,nch->nc", query[:, row].astype(np.float64), key[:, columns].astype(np.float64))
    if problem.op == "sddmm":
        return scores
    return _weighted(_softmax(scores / np.sqrt(problem.head_dim)), value[:, columns])


def _softmax(scores: Any) -> np.ndarray:
    scores = scores.astype(np.float64)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
    return weights / weights.sum(axis=-1, keepdims=True)


def _weighted(weights: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.einsum("nc,nch->nh", weights.astype(np.float64), value.astype(np.float64))
