"""What implementations share: schedules of run-time plans, and, where kernels are called, attention's reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from splat.errors import SplatError, UnsupportedError
from splat.planning import SCHEDULES, Plan


def lower_all(
    plan: Plan, lower: Callable[[Any], tuple[Any, Any]], schedules: Sequence[str] = SCHEDULES
) -> tuple[tuple[Any, ...], list[Any], str | None]:
    """(static facts, tables) of each of `schedules`, as `lower` makes them; why there is no backward, if there is none.

    For run-time plans: tables become JAX arrays.
    """
    facts, tables, refusal = [], [], None
    for which in schedules:
        try:
            found, made = lower(getattr(plan, which))
        except SplatError as error:
            if which == "forward":
                raise
            found, made, refusal = (), [], str(error)
        facts.append(found)
        tables.append(jax.tree.map(jnp.asarray, made))
    return tuple(facts), tables, refusal


def differentiable(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    refusal: str | None = None,
    outside: Callable[[Any], Any] = lambda lse: lse,
    prepare: Callable[..., None] = lambda *_: None,
    of_shared: Callable[[Any, Any], Any] = lambda *_: None,
) -> Any:
    """(query, key, value, shared, *more) -> (output, log-sum-exp [B, T, N]), jitted, with its reverse mode.

    Args:
      name: of the implementation.
      forward: ((query, key, value, *more), shared) -> (output, log-sum-exp).
      backward: ((query, key, value, *more, output, log-sum-exp, their gradients), shared) -> gradients.
      refusal: why there is no backward.
      outside: from the functions' log-sum-exp to [B, T, N], and back.
      prepare: called with (query, key, shared, *more) where both will be needed.
      of_shared: of the backward's arguments, the gradients of what is in `shared`; None: nothing there has any.
    """
    forward, backward = _first_order(name, forward), _first_order(name, backward)

    def attention(query, key, value, shared, *more):
        out, lse = forward((query, key, value, *more), shared)
        return out, outside(lse)

    def fwd(query, key, value, shared, *more):
        prepare(query, key, shared, *more)
        out, lse = forward((query, key, value, *more), shared)
        return (out, outside(lse)), (shared, (query, key, value, *more, out, lse))

    def bwd(saved, cotangents):
        shared, operands = saved
        if refusal:
            raise UnsupportedError(refusal)
        out, lse = operands[-2:]
        d_out, d_lse = cotangents[0].astype(out.dtype), outside(cotangents[1]).astype(lse.dtype)
        operands = (*operands, d_out, d_lse)
        more = len(operands) - 7
        return (*backward(operands, shared), of_shared(operands, shared), *(None,) * more)

    whole = jax.custom_vjp(attention)
    whole.defvjp(fwd, bwd)
    return jax.jit(whole)


def _first_order(name: str, function: Callable[..., Any]) -> Any:
    """The function, with a sentence for who differentiates it: that is what happens in second derivatives."""
    once = jax.custom_jvp(function)

    @once.defjvp
    def again(primals: Any, tangents: Any) -> Any:
        raise UnsupportedError(
            f"the {name} implementation has first derivatives only, neither forward over reverse (jax.hessian) nor "
            "reverse over reverse. Use implementation='xla' for Hessian-vector products."
        )

    return once
