"""SPLAT's attention and JAX's dense one, as calls that return when the result is there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import splat
from benchmarks.cpu.clock import Call
from benchmarks.cpu.setting import HEADS, Case, arrays


def inputs(case: Case, heads: int = HEADS) -> list[jax.Array]:
    """query, key, value and a cotangent [B, T, N, H]."""
    return [jnp.asarray(x, case.dtype) for x in arrays(case.q_len, case.head_dim, heads)]


def attention(case: Case, implementation: str) -> Any:
    """(query, key, value) -> output; `implementation` is one of SPLAT's, or "dense": JAX's own, with a mask."""
    pattern = splat.parse(case.text)
    if implementation == "dense":
        mask = jnp.asarray(pattern.to_dense(case.q_len))[None, None]
        return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=mask)
    return lambda q, k, v: splat.attention(q, k, v, pattern, implementation=implementation)


def with_gradients(function: Any) -> Any:
    """(query, key, value, cotangent) -> (output, gradients)."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> Any:
        out, backward = jax.vjp(function, q, k, v)
        return out, backward(cotangent)

    return both


def ready(case: Case, implementation: str = "cpp", *, gradients: bool = False, heads: int = HEADS) -> Call:
    """Compiled, with its inputs. The result is `out`, or (out, (d_query, d_key, d_value))."""
    function = attention(case, implementation)
    arguments = inputs(case, heads)
    if gradients:
        compiled = jax.jit(with_gradients(function))
    else:
        compiled, arguments = jax.jit(function), arguments[:3]
    call = lambda: jax.block_until_ready(compiled(*arguments))  # noqa: E731
    call()
    return call


def nnz(text: str, q_len: int) -> int:
    return splat.plan(text, q_len).nnz
