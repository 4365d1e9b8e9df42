"""Score modification for implementations made of kernels: its operands, and gradients of what it closes over.

Kernels make the gradients of query, key and value. Those of arrays are the xla implementation's, beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from splat.codegen.base import Options
from splat.codegen.partitioning import vary_like
from splat.codegen.score_mod import Place
from splat.codegen.xla import emit as xla
from splat.planning import Plan

Array = Any


class Shared(NamedTuple):
    """What all batch entries have in common, and no kernel splits.

    Attributes:
      tables: of plans that are not static.
      arrays: what the score modification closes over.
      learned: the tables of `learns`.
    """

    tables: Any = None
    arrays: tuple[Array, ...] = ()
    learned: Any = None


def learns(plan: Plan, options: Options) -> tuple[xla.Learned | None, Any]:
    """What makes the gradients of the arrays, where they may have any, and its tables."""
    if options.score_mod is None or not options.score_mod.learns:
        return None, None
    return xla.learned(plan, options)


def operands(
    shared: Shared, place: Place | None, query: Array, key: Array, value: Array, kv_lengths: Array | None
) -> tuple[Any, ...]:
    """(query, key, value, shared, kv_lengths, where), varying alike inside shard_map.

    `where`: int32 [B, N, 3], batch entry, head and the position of row 0; None where scores are not modified.
    """
    where = None
    if place is not None:
        shared = shared._replace(arrays=place.arrays)
        numbers = place.batch[:, None], place.heads[None, :], place.offset[None, None]
        where = jnp.stack(jnp.broadcast_arrays(*numbers), axis=-1)
    every = jax.tree.leaves((query, key, value, shared, kv_lengths, where))
    query, key, value, kv_lengths, where, arrays = jax.tree.map(
        lambda x: vary_like(x, *every), (query, key, value, kv_lengths, where, shared.arrays)
    )
    return query, key, value, shared._replace(arrays=arrays), kv_lengths, where


def gradients(
    learns: xla.Learned | None, outside: Callable[[Array], Array] = lambda lse: lse
) -> Callable[[Sequence[Any], Shared], Shared | None]:
    """For `reverse.differentiable`, of `operands`: the gradients of what is shared. `outside` as there."""

    def of_shared(operands: Sequence[Any], shared: Shared) -> Shared | None:
        if learns is None:
            return None
        query, key, value, lengths, where, out, lse, d_out, d_lse = operands
        place = Place(where[:, 0, 0], where[0, :, 1], where[0, 0, 2], shared.arrays)
        results = out, outside(lse), d_out, outside(d_lse)
        return Shared(None, learns(shared.learned, query, key, value, lengths, place, *results), None)

    return of_shared


__all__ = ["Shared", "gradients", "learns", "operands"]
