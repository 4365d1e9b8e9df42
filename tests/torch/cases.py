"""Inputs, truth and comparison for the tests of `splat.torch`, in PyTorch's layout."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch", reason="splat.torch needs torch: pip install splat-attention[torch]")
pytest.importorskip("triton", reason="splat.torch needs triton, which torch brings on Linux")

import splat  # noqa: E402
import splat.torch  # noqa: E402
from splat import reference  # noqa: E402
from splat.codegen.triton import interpret  # noqa: E402
from splat.pattern import Pattern  # noqa: E402

INTERPRETED = interpret.is_interpreted()
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"

needs_device = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="there is no GPU, and TRITON_INTERPRET=1 is not set"
)

#: Largest error relative to the largest value of the truth (but at least 1), by dtype of the inputs.
TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 1.5e-2, "float16": 2e-3}


class Inputs(NamedTuple):
    """query [B, N, T, H], key and value [B, K, S, H], and cotangents of output and log-sum-exp."""

    query: Any
    key: Any
    value: Any
    d_out: Any
    d_lse: Any

    @property
    def dtype(self) -> str:
        return str(self.query.dtype).removeprefix("torch.")


class Results(NamedTuple):
    """Output, log-sum-exp, and the gradients of query, key and value; None where not asked for."""

    out: Any
    lse: Any
    d_query: Any
    d_key: Any
    d_value: Any


def draw(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> Any:
    return torch.tensor(rng.standard_normal(shape), dtype=getattr(torch, dtype), device=DEVICE)


def draw_inputs(
    rng: np.random.Generator, q_len: int, kv_len: int, *, batch=1, heads=(2, 1), head_dim=8, dtype="float32"
) -> Inputs:
    q_shape, k_shape = (batch, heads[0], q_len, head_dim), (batch, heads[1], kv_len, head_dim)
    q, k, v, d_out = (draw(rng, *shape, dtype=dtype) for shape in (q_shape, k_shape, k_shape, q_shape))
    return Inputs(q, k, v, d_out, draw(rng, *q_shape[:-1]))


def run(pattern: Pattern, inputs: Inputs, attend: Any = None, needs: tuple[int, ...] = (0, 1, 2), **options) -> Results:
    """Forward, and backward for the inputs that `needs` names; `attend` as `splat.torch.attention`."""
    leaves = [x.detach().requires_grad_(n in needs) for n, x in enumerate(inputs[:3])]
    attend = attend or splat.torch.attention
    out, lse = attend(*leaves, pattern, return_lse=True, **options)
    if needs:
        torch.autograd.backward([out, lse], [inputs.d_out, inputs.d_lse])
    d_query, d_key, d_value = (x.grad for x in leaves)
    return Results(out.detach(), lse.detach(), d_query, d_key, d_value)


def as_numpy(x: Any) -> np.ndarray:
    """float64, in the oracle's layout: heads and positions swapped."""
    return np.swapaxes(x.detach().cpu().double().numpy(), 1, 2)


def truth(inputs: Inputs, mask: np.ndarray, **options: Any) -> Results:
    q, k, v, d_out, d_lse = map(as_numpy, inputs)
    out, lse = reference.attention(q, k, v, mask, **options)
    gradients = reference.gradients(q, k, v, mask, d_out, d_lse, **options)
    return Results(out, lse, gradients.query, gradients.key, gradients.value)


def compare(found: Results, expected: Results, dtype: str) -> None:
    """Dtypes, shapes, values; -inf exactly where a row attends to nothing, NaN nowhere. What is None is skipped."""
    for name, given, b in zip(Results._fields, found, expected, strict=True):
        if given is None:
            continue
        kind = dtype if name != "lse" or dtype == "float64" else "float32"
        assert str(given.dtype) == f"torch.{kind}", name
        a = as_numpy(given)
        assert a.shape == b.shape, name
        if name == "lse":
            np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b), err_msg="rows that attend to nothing")
            a, b = a[np.isfinite(b)], b[np.isfinite(b)]
        error = np.abs(a - b).max(initial=0)
        assert error <= TOLERANCE[kind] * max(1, np.abs(b).max(initial=0)), f"{name} is off by {error:.2g}"


def check(pattern: Pattern | str, inputs: Inputs, mask: np.ndarray | None = None, **options: Any) -> Results:
    """Values, log-sum-exp and gradients against the truth."""
    pattern = splat.parse(pattern) if isinstance(pattern, str) else pattern
    if mask is None:
        offset = options.get("query_offset", 0)
        mask = pattern.to_dense(inputs.query.shape[2], inputs.key.shape[2], query_offset=offset)
    found = run(pattern, inputs, **options)
    known = {name: value for name, value in options.items() if name != "query_offset"}
    if known.get("kv_lengths") is not None:
        known["kv_lengths"] = known["kv_lengths"].cpu().numpy()
    compare(found, truth(inputs, mask, **known), inputs.dtype)
    return found


def in_subprocess(source: str, **environment: str) -> str:
    """What a script prints, run by a fresh interpreter with warnings as errors."""
    env = dict(os.environ) | {"PYTHONPATH": str(Path(splat.__file__).parents[1])} | environment
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
        check=False,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
