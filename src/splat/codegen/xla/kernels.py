"""Attention as a portable XLA program that follows the plan.

One loop runs over steps of row tiles; inside, one loop per walk runs over its tiles, `group` row tiles at once, so that
the matrix products are large. Rows and lattice columns are gathered where they lie. Nothing of size q_len x kv_len is
formed; memory is inputs, outputs and one step's tiles.

Axis letters: B batch, K key/value heads, G query heads per key head, H head dim (JAX's), and inside a step
R row tiles of the step, Q rows of a tile, X lattice columns of a tile. In dK and dV the rows are key positions and the
lattice runs over query positions: the same loops on the transposed schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from splat.codegen.base import Options
from splat.codegen.partitioning import vary_like
from splat.codegen.xla.tables import PassSpec, Tables, WalkSpec

Array = Any


class Limit(NamedTuple):
    """Run-time key lengths: int32 [B]; `side` says whether keys are the lattice's "cols" or the "rows"."""

    lengths: Array
    side: str


class Tile(NamedTuple):
    """What a body sees: the lattice slices, in the order given, and which pairs the tile keeps."""

    slices: list[Array]  # each [R, B, K, (G,) X, width]
    keep: Array  # bool [R, B or 1, 1, 1, Q, X]


def run_pass(
    spec: PassSpec,
    tables: Tables,
    rows: Sequence[Array],
    lattices: Sequence[Array],
    limit: Limit | None,
    body: PassBody,
) -> list[Array]:
    """Runs one pass.

    Args:
      rows: arrays [B, num_rows, K, (G,) width], read by row tile.
      lattices: arrays [B, num_cols, K, (G,) width], read by lattice tile.
      body: what to do with a tile.

    Returns:
      `body.finish`'s results by row, [B, num_rows, K, (G,) width]; `body.fills` in rows that no tile holds.
    """
    names = ("rows", "begin", "total", "residue", "bounds")

    def step(table: Tables) -> list[Array]:
        tiles = [_take(x, table["rows"]) for x in rows]
        carry = body.init(tiles)
        for n, walk in enumerate(spec.walks):
            begin, total, residue = (table[name][n] for name in ("begin", "total", "residue"))

            def visit(t: Array, carry: Any, walk=walk, begin=begin, total=total, residue=residue) -> Any:
                active = t < total
                x = (begin + t * spec.block_kv)[:, None] + jnp.arange(spec.block_kv, dtype=begin.dtype)[None]
                # Past its last tile a row tile reads behind the end: zeros, never another position's values.
                col = jnp.where(active[:, None], residue[:, None] + walk.stride * x, spec.num_cols)
                keep = _keep(spec, walk, table["bounds"], x, active)[:, None, None, None]
                if limit is not None:
                    keep = keep & _within(limit, col, table["rows"])
                slices = [_take(source, col) for source in lattices]
                if (
                    walk.tests or limit is not None
                ):  # what no row of the tile attends to may hold anything, NaN included
                    slices = [_where_seen(keep, array) for array in slices]
                return body.visit(carry, tiles, Tile(slices, keep))

            carry = lax.fori_loop(0, jnp.max(total), visit, carry)
        return [jnp.moveaxis(x, -2, 2) for x in body.finish(carry)]

    results = lax.map(step, {name: tables[name] for name in names})
    return [_by_row(x, tables["inverse"], fill) for x, fill in zip(results, body.fills, strict=True)]


def _take(values: Array, index: Array) -> Array:
    """[B, positions, K, (G,) width] at index [R, n]: [R, B, K, (G,) n, width]; zeros past the end."""
    taken = jnp.take(values, index, axis=1, mode="fill", fill_value=0)
    return jnp.moveaxis(taken, (1, 2), (0, -2))


def _by_row(tiles: Array, inverse: Array, fill: float) -> Array:
    """[steps, R, B, Q, K, (G,) width] -> [B, num_rows, K, (G,) width]."""
    joined = jnp.moveaxis(tiles, 2, 0)
    joined = joined.reshape(joined.shape[0], -1, *joined.shape[4:])
    return jnp.take(joined, inverse, axis=1, mode="fill", fill_value=fill)


def _keep(spec: PassSpec, walk: WalkSpec, bounds: dict[str, Any], x: Array, active: Array) -> Array:
    """bool [R, Q, X]: the pairs that the pattern has at lattice columns x [R, X]. Tests of a walk are alternatives."""
    if not walk.tests:
        return jnp.broadcast_to(active[:, None, None], (spec.group, spec.block_q, spec.block_kv))
    at = x[:, None, :]
    keep = None
    for test in walk.tests:
        lower, upper = bounds[str(test.component)]
        one = None
        if test.lower:
            one = at >= lower[..., None]
        if test.upper:
            below = at < upper[..., None]
            one = below if one is None else one & below
        keep = one if keep is None else keep | one
    return keep & active[:, None, None]


def _where_seen(keep: Array, values: Array) -> Array:
    """Lattice columns that some row of the tile keeps; zeros elsewhere. `keep` [R, B or 1, 1, 1, Q, X]."""
    seen = keep.any(axis=-2)[:, :, 0, 0, :, None]
    seen = seen.reshape(*seen.shape[:2], *(1,) * (values.ndim - 4), *seen.shape[-2:])
    return jnp.where(seen, values, jnp.zeros((), values.dtype))


def _within(limit: Limit, col: Array, row: Array) -> Array:
    """bool [R, B, 1, 1, 1, X] or [R, B, 1, 1, Q, 1]: keys before the lengths."""
    lengths = limit.lengths[None, :, None]
    if limit.side == "rows":
        return (row[:, None, :] < lengths)[:, :, None, None, :, None]
    return (col[:, None, :] < lengths)[:, :, None, None, None, :]


# -- bodies ------------------------------------------------------------------------------------------------------------


class PassBody(NamedTuple):
    """What a pass computes: init(row tiles), visit(carry, row tiles, tile), finish(carry), and absent rows' values."""

    init: Callable[[Any], Any]
    visit: Callable[[Any, Any, Tile], Any]
    finish: Callable[[Any], list[Array]]
    fills: tuple[float, ...]


def _accumulator(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _scores(options: Options, rows: Array, lattice: Array, spec: str) -> tuple[Array, Array | None]:
    """(scores, d score / d uncapped score) of a tile, before masking."""
    scores = jnp.einsum(spec, rows, lattice, preferred_element_type=_accumulator(rows.dtype)) * options.scale
    if options.logits_soft_cap is None:
        return scores, None
    capped = jnp.tanh(scores / options.logits_soft_cap)
    return options.logits_soft_cap * capped, 1 - capped * capped


def forward_body(options: Options) -> PassBody:
    """Online softmax (Milakov & Gimelshein, arXiv 1805.02867): rows (q,), lattices (k, v) -> output, log-sum-exp."""

    def init(tiles):
        (q,) = tiles
        dtype = _accumulator(q.dtype)
        floor = jnp.full(q.shape[:-1], jnp.finfo(dtype).min / 2, dtype)  # finite: exp(-inf - floor) is 0, not NaN
        return tuple(vary_like(x, q) for x in (floor, jnp.zeros_like(floor), jnp.zeros(q.shape, dtype)))

    def visit(carry, tiles, tile):
        (q,), (k, v), (top, total, acc) = tiles, tile.slices, carry
        scores, _ = _scores(options, q, k, "rbkgqh,rbkxh->rbkgqx")
        scores = jnp.where(tile.keep, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        p = jnp.exp(scores - new_top[..., None])
        decay = jnp.exp(top - new_top)
        add = jnp.einsum("rbkgqx,rbkxh->rbkgqh", p.astype(v.dtype), v, preferred_element_type=acc.dtype)
        return new_top, total * decay + p.sum(axis=-1), acc * decay[..., None] + add

    def finish(carry):
        top, total, acc = carry
        safe = jnp.where(total == 0, 1, total)
        lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))
        return [acc / safe[..., None], lse[..., None]]

    return PassBody(init, visit, finish, (0.0, float("-inf")))


def _weights(exponent: Array, keep: Array) -> Array:
    """Softmax weights from scores less log-sum-exps: at most 1, though scores in the millions are rounded by more."""
    return jnp.where(keep, jnp.exp(jnp.where(exponent > 0, 0, exponent)), 0)


def d_query_body(options: Options) -> PassBody:
    """Rows (q, d_out, lse, delta), lattices (k, v) -> dQ. `delta` is rowsum(d_out * out) - d_lse."""

    def init(tiles):
        q = tiles[0]
        return vary_like(jnp.zeros(q.shape, _accumulator(q.dtype)), q)

    def visit(carry, tiles, tile):
        (q, d_out, lse, delta), (k, v) = tiles, tile.slices
        scores, slope = _scores(options, q, k, "rbkgqh,rbkxh->rbkgqx")
        p = _weights(scores - lse, tile.keep)
        d_p = jnp.einsum("rbkgqh,rbkxh->rbkgqx", d_out, v, preferred_element_type=carry.dtype)
        d_s = _d_scores(p, d_p - delta, slope, tile.keep)
        return carry + jnp.einsum("rbkgqx,rbkxh->rbkgqh", d_s.astype(k.dtype), k, preferred_element_type=carry.dtype)

    return PassBody(init, visit, lambda carry: [carry * options.scale], (0.0,))


def d_key_value_body(options: Options) -> PassBody:
    """Rows (k, v), lattices (q, d_out, lse, delta) -> dK, dV, on the transposed schedule."""

    def init(tiles):
        k, v = tiles
        return tuple(vary_like(jnp.zeros(x.shape, _accumulator(x.dtype)), x) for x in (k, v))

    def visit(carry, tiles, tile):
        (k, v), (q, d_out, lse, delta), (d_k, d_v) = tiles, tile.slices, carry
        scores, slope = _scores(options, k, q, "rbkqh,rbkgxh->rbkgqx")
        lse, delta = jnp.swapaxes(lse, -1, -2), jnp.swapaxes(delta, -1, -2)
        p = _weights(scores - lse, tile.keep)
        d_p = jnp.einsum("rbkqh,rbkgxh->rbkgqx", v, d_out, preferred_element_type=d_v.dtype)
        d_s = _d_scores(p, d_p - delta, slope, tile.keep)
        to_keys = "rbkgqx,rbkgxh->rbkqh"
        d_v = d_v + jnp.einsum(to_keys, p.astype(d_out.dtype), d_out, preferred_element_type=d_v.dtype)
        d_k = d_k + jnp.einsum(to_keys, d_s.astype(q.dtype), q, preferred_element_type=d_k.dtype)
        return d_k, d_v

    return PassBody(init, visit, lambda carry: [carry[0] * options.scale, carry[1]], (0.0, 0.0))


def _d_scores(p: Array, d_p: Array, slope: Array | None, keep: Array) -> Array:
    d_s = p * d_p if slope is None else p * d_p * slope
    return jnp.where(keep, d_s, 0)


def merge(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Partial attentions over disjoint pairs to the whole, exactly: [(output, log-sum-exp [..., 1])]."""
    if len(parts) == 1:
        return parts[0]
    top = parts[0][1]
    for _, lse in parts[1:]:
        top = jnp.maximum(top, lse)
    safe_top = jnp.where(jnp.isfinite(top), top, 0)
    weights = [jnp.exp(lse - safe_top) for _, lse in parts]
    total = sum(weights)
    safe = jnp.where(total == 0, 1, total)
    out = sum(weight * part for weight, (part, _) in zip(weights, parts, strict=True)) / safe
    return out, jnp.where(total == 0, -jnp.inf, safe_top + jnp.log(safe))
