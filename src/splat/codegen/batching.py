"""`jax.vmap` for functions made of kernels that have a batch axis of their own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from splat.codegen.partitioning import Axes, explicit, partitioned

Array = Any
Function = Callable[[Any, Any, Any], Any]


def vmappable(
    axes: str, *, of_rows: int | None = None, large: tuple[int, ...] = ()
) -> Callable[[Function], Callable[[Any], Callable[[Any, Any], Any]]]:
    """Lets a function made of calls of kernels be mapped by `jax.vmap`, any number of times, and split over devices.

    The function: (static, batched, shared) -> results. `batched` is a tuple of arrays and None, whose first axis is B;
    `shared` is a pytree of arrays. It uses no traced array but its arguments. What is made of it takes `static`, and
    gives a function of the others, to be kept by whoever calls it: JAX knows it again only if it is the same. Mapped
    over batched arrays, that makes one call for all; arrays of `batched` that are not mapped are repeated. Mapped over
    arrays of `shared` too, it runs one after another.

    Differentiation goes outside: use it in the forward and the backward function of a `jax.custom_vjp`.

    Args:
      axes: of the arrays of `batched` and of the results, as in "BTNH BSKH BSKH -> BTNH BTN": see `partitioning.Axes`.
      of_rows, large: where that one of `batched` is mapped and one of these is not, it runs one after another as well,
        so that these are not repeated.
    """
    return partial(_vmappable, Axes.parse(axes), of_rows, large)


def _vmappable(
    axes: Axes, of_rows: int | None, large: tuple[int, ...], function: Function
) -> Callable[[Any], Callable[[Any, Any], Any]]:
    @functools.wraps(function)
    def bound(static: Any) -> Any:
        def run(batched: Any, shared: Any) -> Any:
            return spread(partial(function, static), axes, batched, shared)

        call: Any = custom_vmap(run)

        @call.def_vmap
        def rule(size: int, mapped: Any, batched: Any, shared: Any) -> tuple[Any, Any]:
            batched_mapped, shared_mapped = mapped
            repeats = of_rows is not None and batched_mapped[of_rows] and not all(batched_mapped[n] for n in large)
            if repeats or any(jax.tree.leaves(shared_mapped)):
                results = _one_by_one(call, (batched, shared), (batched_mapped, shared_mapped))
            else:
                results = call(jax.tree.map(partial(repeat, size), batched, batched_mapped), shared)
            return results, jax.tree.map(lambda _: True, results)

        return call

    return bound


def spread(
    function: Callable[[Any, Any], Any], axes: Axes, batched: Sequence[Any], shared: Any = None, *, opaque: bool = True
) -> tuple[Array, ...]:
    """`function(batched, shared)`, over devices, where arrays have any number of axes in place of B.

    Args:
      function: takes and gives arrays with B; uses no traced array but its arguments.
      axes: of `batched` and of the results.
      batched: arrays, and None for those that are not there.
      shared: a pytree of arrays, whole on every device.
      opaque: whether the function calls kernels, so that XLA cannot see how to split it.
    """
    count, axes = axes.count(batched[0]), axes.of(batched)
    given, tree = jax.tree.flatten((tuple(batched), shared))

    def part(*given: Array) -> tuple[Array, ...]:
        batched, shared = tree.unflatten(given)
        sizes = given[0].shape[:count]
        folded = tuple(None if x is None else x.reshape(math.prod(sizes), *x.shape[count:]) for x in batched)
        return tuple(x.reshape(*sizes, *x.shape[1:]) for x in function(folded, shared))

    return explicit(partial(partitioned, part, axes) if opaque else part, axes, *given)


def repeat(size: int, array: Array, mapped: bool) -> Array:
    """[size, ...]; [...] where not mapped."""
    return array if mapped else jnp.broadcast_to(array, (size, *array.shape))


def _one_by_one(call: Callable[..., Any], arguments: Any, mapped: Any) -> Any:
    """`call(*arguments)` for each index of the mapped arrays' leading axis."""
    leaves, tree = jax.tree.flatten(arguments)
    flags = tree.flatten_up_to(mapped)

    def step(slices: list[Array]) -> Any:
        rest = iter(slices)
        return call(*tree.unflatten([next(rest) if flag else x for x, flag in zip(leaves, flags, strict=True)]))

    return lax.map(step, [x for x, flag in zip(leaves, flags, strict=True) if flag])


__all__ = ["repeat", "spread", "vmappable"]
