"""`jax.vmap` for functions made of kernels that have a batch axis of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

Array = Any


def vmappable(function: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Lets a function made of calls of kernels be mapped by `jax.vmap`, any number of times.

    Args:
      function: (static, batched, shared) -> results. `static` is hashable. `batched` and `shared` are pytrees of arrays
        (None is an empty one); each array of `batched` and each result has a leading axis B, the same for all. The
        function takes B from the arrays, and uses no traced array but its arguments.

    Returns:
      the function, to be called as `function` is. Mapped over batched arrays, it folds the mapped axis into B: one
      call for all; arrays of `batched` that are not mapped are repeated. Mapped over arrays of `shared` too, it
      runs one after another.

    Differentiation goes outside: use it in the forward and the backward function of a `jax.custom_vjp`.
    """

    @functools.lru_cache(maxsize=256)
    def bound(static: Hashable) -> Any:
        def run(batched: Any, shared: Any) -> Any:
            return function(static, batched, shared)

        call: Any = custom_vmap(run)

        @call.def_vmap
        def rule(size: int, mapped: Any, batched: Any, shared: Any) -> tuple[Any, Any]:
            batched_mapped, shared_mapped = mapped
            if any(jax.tree.leaves(shared_mapped)):
                results = _one_by_one(call, (batched, shared), (batched_mapped, shared_mapped))
            else:
                folded = jax.tree.map(functools.partial(fold, size), batched, batched_mapped)
                results = jax.tree.map(functools.partial(unfold, size), call(folded, shared))
            return results, jax.tree.map(lambda _: True, results)

        return call

    @functools.wraps(function)
    def wrapper(static: Any, batched: Any, shared: Any) -> Any:
        return bound(static)(batched, shared)

    return wrapper


def fold(size: int, array: Array, mapped: bool) -> Array:
    """[size, B, ...], or [B, ...] where not mapped, as [size * B, ...]."""
    if not mapped:
        array = jnp.broadcast_to(array, (size, *array.shape))
    return array.reshape(size * array.shape[1], *array.shape[2:])


def unfold(size: int, array: Array) -> Array:
    """[size * B, ...] as [size, B, ...]."""
    return array.reshape(size, array.shape[0] // size, *array.shape[1:])


def _one_by_one(call: Callable[..., Any], arguments: Any, mapped: Any) -> Any:
    """`call(*arguments)` for each index of the mapped arrays' leading axis."""
    leaves, tree = jax.tree.flatten(arguments)
    flags = tree.flatten_up_to(mapped)

    def step(slices: list[Array]) -> Any:
        rest = iter(slices)
        return call(*tree.unflatten([next(rest) if flag else x for x, flag in zip(leaves, flags, strict=True)]))

    return lax.map(step, [x for x, flag in zip(leaves, flags, strict=True) if flag])


__all__ = ["fold", "unfold", "vmappable"]
