"""What a problem's results must be, from the definition, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from splat.bench.problem import Problem

#: How many rows are known where not all are: of results, and of the gradients of keys and values, whose every row
#: needs the weights of all queries that attend to it.
SAMPLED_ROWS, SAMPLED_KEYS = 64, 8

#: Scores of all heads that are held at a time, float64.
BLOCK_SCORES = 1 << 23


class Part(NamedTuple):
    """One array of a result: `rows` of it, and what each must be, float64 [heads, ...]."""

    rows: Sequence[int]
    expected: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Truth:
    """The result of a problem in some rows, made when first needed.

    Attributes:
      problem: what is computed.
      rows: those that are known; of training: of the output and of the query's gradient.
      keys: of training: those of the key's and the value's gradients.
    """

    problem: Problem
    rows: Sequence[int]
    keys: Sequence[int]

    @staticmethod
    def everywhere(problem: Problem) -> Truth:
        return Truth(problem, range(problem.q_len), range(problem.q_len))

    @staticmethod
    def sampled(problem: Problem) -> Truth:
        """In 64 rows and for 8 keys, where there are as many."""
        return Truth(problem, sample(problem.q_len, SAMPLED_ROWS), sample(problem.q_len, SAMPLED_KEYS))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """One for each array of the result; of training output, and gradients of query, key and value."""
        if self.problem.op == "training":
            return (*_of_queries(self.problem, self.rows), *_of_keys(self.problem, self.keys))
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
    query, key, value, _, values = problem.inputs
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
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1.0)  # 0 where a row attends to nothing


def _weighted(weights: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.einsum("nc,nch->nh", weights.astype(np.float64), value.astype(np.float64))


# -- training ----------------------------------------------------------------------------------------------------------


def _of_queries(problem: Problem, rows: Sequence[int]) -> tuple[Part, Part]:
    """Output and gradient of the query in these rows."""
    _, key, value, *_ = problem.inputs
    out, d_query = [], []
    for block in _blocks(problem, rows):
        columns, weights, d_scores = _weights(problem, block)
        out += list((weights @ value[:, columns].astype(np.float64)).swapaxes(0, 1))
        d_query += list((d_scores @ key[:, columns].astype(np.float64)).swapaxes(0, 1))
    return Part(rows, out), Part(rows, d_query)


def _of_keys(problem: Problem, keys: Sequence[int]) -> tuple[Part, Part]:
    """Gradients of key and value in these rows, over all queries that attend to any of them."""
    query, _, _, d_out, _ = problem.inputs
    d_key, d_value = np.zeros((2, problem.heads, len(keys), problem.head_dim))
    attending = np.unique(np.concatenate([problem.queries(key) for key in keys]))
    for block in _blocks(problem, attending):
        columns, weights, d_scores = _weights(problem, block)
        _, here, there = np.intersect1d(keys, columns, assume_unique=True, return_indices=True)
        d_key[:, here] += d_scores[:, :, there].swapaxes(1, 2) @ query[:, block].astype(np.float64)
        d_value[:, here] += weights[:, :, there].swapaxes(1, 2) @ d_out[:, block].astype(np.float64)
    return Part(keys, list(d_key.swapaxes(0, 1))), Part(keys, list(d_value.swapaxes(0, 1)))


def _blocks(problem: Problem, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """The rows in pieces whose scores can be held."""
    step = max(BLOCK_SCORES // (problem.heads * problem.q_len), 1)
    return [np.asarray(rows[at : at + step]) for at in range(0, len(rows), step)]


def _weights(problem: Problem, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(columns that any of these rows attends to; weights and scaled gradients of scores, [heads, rows, columns]).

    Of the row i, with weights W and the loss sum(d_out * W V): dS = scale * W * (dW - sum(W * dW)), dW = d_out V^T.
    """
    mask = np.zeros((len(rows), problem.q_len), bool)
    for n, row in enumerate(rows):
        mask[n, problem.row(row)[0]] = True
    columns = np.flatnonzero(mask.any(axis=0))
    query, key, value, d_out, _ = problem.inputs
    q, d = (x[:, rows].astype(np.float64) for x in (query, d_out))
    k, v = (x[:, columns].astype(np.float64).swapaxes(1, 2) for x in (key, value))
    scale = 1 / np.sqrt(problem.head_dim)
    weights = _softmax(np.where(mask[:, columns], scale * (q @ k), -np.inf))
    d_weights = d @ v
    inner = np.einsum("nrc,nrc->nr", weights, d_weights)
    return columns, weights, scale * weights * (d_weights - inner[:, :, None])
