"""Nothing is timed that is not right: every case against the float64 oracle, and peers against ours."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

import splat
from benchmarks.cpu import jax_side
from benchmarks.cpu.setting import Case
from splat import reference

#: Of the largest value.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}

#: Between two implementations: what each may be off.
BETWEEN = {"float32": 1e-4, "bfloat16": 4e-2}


class WrongError(Exception):
    """A result that is not what it should be."""


def check(case: Case, q_len: int, *, gradients: bool = False) -> dict[str, float]:
    """The case at `q_len` positions against the oracle: errors by array. Raises WrongError."""
    return dict(_check(dataclasses.replace(case, q_len=q_len), gradients))


@functools.cache
def _check(case: Case, gradients: bool) -> tuple[tuple[str, float], ...]:
    query, key, value, cotangent = (np.asarray(x, np.float64) for x in jax_side.inputs(case))
    mask = splat.parse(case.text).to_dense(case.q_len)
    result = jax_side.ready(case, gradients=gradients)()
    expected = {"out": reference.attention(query, key, value, mask)[0]}
    got = {"out": result}
    if gradients:
        wanted = reference.gradients(query, key, value, mask, cotangent)
        expected |= {"d_query": wanted.query, "d_key": wanted.key, "d_value": wanted.value}
        got = dict(zip(expected, (result[0], *result[1]), strict=True))
    return tuple((name, compare(name, got[name], expected[name], TOLERANCE[case.dtype])) for name in expected)


def agree(case: Case, ours: Any, theirs: Any) -> float:
    """How far a peer is from ours at full size, so that both are known to compute the same. Raises WrongError."""
    return compare("the peer's output", theirs, np.asarray(ours, np.float32), BETWEEN[case.dtype])


def compare(name: str, got: Any, expected: np.ndarray, tolerance: float) -> float:
    """The largest error as a share of the largest value. Raises WrongError above the tolerance, and for NaN."""
    error = float(np.max(np.abs(np.asarray(got, expected.dtype) - expected)) / np.max(np.abs(expected)))
    if not error <= tolerance:
        raise WrongError(f"{name} is off by {error:.2g} of the largest value; {tolerance:g} is allowed")
    return error
