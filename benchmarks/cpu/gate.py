"""Nothing is timed that is not right: every case against the float64 oracle, in all rows at a small size and in some at
the measured one, and every peer against ours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

import splat
from benchmarks import peers
from benchmarks.cpu import jax_side
from benchmarks.cpu.setting import Case
from splat import reference
from splat.bench.gate import Compared, WrongError, shares
from splat.bench.truth import sample

#: Of a row's largest value; see `splat.bench.gate.shares`.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}

#: Between two implementations: what each may be off.
BETWEEN = {"float32": 1e-4, "bfloat16": 4e-2}

#: How many rows are checked at full size.
SAMPLED_ROWS = 32

#: What a result has.
NAMES = ("out", "d_query", "d_key", "d_value")


def check(case: Case, q_len: int, *, gradients: bool = False) -> dict[str, float]:
    """The case at `q_len` positions against the oracle: errors by array. Raises WrongError."""
    return dict(_check(dataclasses.replace(case, q_len=q_len), gradients))


@functools.cache
def _check(case: Case, gradients: bool) -> tuple[tuple[str, float], ...]:
    query, key, value, cotangent = _inputs(case)
    mask = splat.parse(case.text).to_dense(case.q_len)
    result = jax_side.ready(case, gradients=gradients)()
    expected = [reference.attention(query, key, value, mask)[0]]
    if gradients:
        expected += reference.gradients(query, key, value, mask, cotangent)
    return tuple(_compare(NAMES, arrays(result), expected, TOLERANCE[case.dtype]).items())


def check_rows(case: Case, result: Any) -> dict[str, float]:
    """A result in some rows against the oracle: the output, and the query's gradient. Raises WrongError."""
    rows = np.array(sample(case.q_len, SAMPLED_ROWS))
    mask = peers.mask_formula(case.text, case.q_len)(rows[:, None], np.arange(case.q_len))
    columns = np.flatnonzero(mask.any(axis=0))
    query, key, value, cotangent = _inputs(case)
    query, cotangent = (x[:, rows] for x in (query, cotangent))
    key, value, mask = key[:, columns], value[:, columns], mask[:, columns]
    got = [array[:, rows] for array in arrays(result)[:2]]
    expected = [reference.attention(query, key, value, mask)[0]]
    if len(got) > 1:
        expected += [reference.gradients(query, key, value, mask, cotangent).query]
    return _compare(NAMES, got, expected, TOLERANCE[case.dtype])


def agree(case: Case, ours: Any, theirs: Any) -> float:
    """How far a peer is from ours at full size, so that both are known to compute the same. Raises WrongError.

    Both are an output, or (output, gradients of query, key and value).
    """
    names = [f"the peer's {name}" for name in NAMES]
    return max(_compare(names, arrays(theirs), arrays(ours), BETWEEN[case.dtype]).values())


def arrays(result: Any) -> list[np.ndarray]:
    """The output, and the gradients where there are some, float32."""
    out, gradients = result if isinstance(result, tuple) else (result, ())
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def compare(name: str, got: Any, expected: np.ndarray, tolerance: float) -> float:
    """The largest error as a share of its row's largest value. Raises WrongError above the tolerance, and for NaN."""
    return _compare([name], [np.asarray(got, expected.dtype)], [expected], tolerance)[name]


def _compare(
    names: Sequence[str], got: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float
) -> dict[str, float]:
    compared = []
    for name, array, right in zip(names, got, expected, strict=False):
        if array.shape != right.shape:
            raise WrongError(f"{name} has shape {list(array.shape)}, not {list(right.shape)}")
        compared.append(Compared.of(array, right))
    found = dict(zip(names, shares(compared), strict=False))
    for name, error in found.items():
        if not error <= tolerance:
            raise WrongError(f"{name} is off by {error:.2g} of a row's largest value; {tolerance:g} is allowed")
    return found


def _inputs(case: Case) -> list[np.ndarray]:
    """The numbers of the case's type, float32."""
    return [np.asarray(x, np.float32) for x in jax_side.inputs(case)]
