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

import jax
import jax.numpy as jnp
from jax import lax

from splat.codegen.base import Options
from splat.codegen.partitioning import vary_like
from splat.codegen.score_mod import Place
from splat.codegen.xla.tables import PassSpec, Tables, WalkSpec

Array = Any


class Limit(NamedTuple):
    """Run-time key lengths: int32 [B]; `side` says whether keys are the lattice's "cols" or the "rows"."""

    lengths: Array
    side: str


class Tile(NamedTuple):
    """What a body sees: the lattice slices, in the order given, which pairs the tile keeps, and where it lies."""

    slices: list[Array]  # each [R, B, K, (G,) X, width]
    keep: Array  # bool [R, B or 1, 1, 1, Q, X]
    rows: Array  # int32 [R, Q]
    cols: Array  # int32 [R, X]
    num_rows: int  # rows past them are none


def run_pass(
    spec: PassSpec,
    tables: Tables,
    rows: Sequence[Array],
    lattices: Sequence[Array],
    limit: Limit | None,
    body: PassBody,
    shared: Any = (),
) -> tuple[Any, list[Array]]:
    """Runs one pass.

    Args:
      rows: arrays [B, num_rows, K, (G,) width], read by row tile.
      lattices: arrays [B, num_cols, K, (G,) width], read by lattice tile.
      body: what to do with a tile.
      shared: what all tiles add to, if anything.

    Returns:
      `shared`, and `body.finish`'s results by row, [B, num_rows, K, (G,) width]; `body.fills` in rows that no tile
      holds.
    """
    names = ("rows", "begin", "total", "residue", "bounds")

    def step(shared: Any, table: Tables) -> tuple[Any, list[Array]]:
        tiles = [_take(x, table["rows"]) for x in rows]
        carry: tuple[Any, Any] = shared, body.init(tiles)
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
                # What no row of the tile attends to may hold anything, NaN included.
                if walk.tests or limit is not None:
                    slices = [_where_seen(keep, array) for array in slices]
                return body.visit(carry[0], carry[1], tiles, Tile(slices, keep, table["rows"], col, spec.num_rows))

            carry = lax.fori_loop(0, jnp.max(total), visit, carry)
        shared, own = carry
        return shared, [jnp.moveaxis(x, -2, 2) for x in body.finish(own)]

    shared, results = lax.scan(step, shared, {name: tables[name] for name in names})
    return shared, [_by_row(x, tables["inverse"], fill) for x, fill in zip(results, body.fills, strict=True)]


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
    """What a pass computes.

    init(row tiles), visit(shared, carry, row tiles, tile) -> (shared, carry), finish(carry), and absent rows' values.
    """

    init: Callable[[Any], Any]
    visit: Callable[[Any, Any, Any, Tile], tuple[Any, Any]]
    finish: Callable[[Any], list[Array]]
    fills: tuple[float, ...]


def _accumulator(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


class Scores(NamedTuple):
    """How scores are made of products: scaled, modified by where they lie, and capped.

    Attributes:
      place: the operands of `options.score_mod`, and `heads` its query heads [K, G]; None where there is none.
    """

    options: Options
    place: Place | None = None
    heads: Array | None = None

    @classmethod
    def of(cls, options: Options, place: Place | None, num_kv_heads: int) -> Scores:
        return cls(options, place, None if place is None else place.heads.reshape(num_kv_heads, -1))

    def of_tile(self, products: Array, tile: Tile, *, keys: bool = False) -> Array:
        """[R, B, K, G, Q, X], before masking; `keys`: whether the tile's rows are keys."""
        return self._capped(self._modified(products * self.options.scale, self.place, tile, keys, False))

    def with_gradient(
        self, products: Array, tile: Tile, *, keys: bool = False, learn: bool = False
    ) -> tuple[Array, Callable[[Array], tuple[Array, list[Array]]]]:
        """The same, and from their gradients to those of the products and, if asked for, of `learned`."""
        learned, rest = self._learned()

        def scores(products: Array, learned: list[Array]) -> Array:
            place = rest(learned) if learn else self.place
            return self._capped(self._modified(products * self.options.scale, place, tile, keys, bool(learned)))

        return jax.vjp(scores, products, learned if learn else [])

    def learned(self) -> list[Array]:
        """The operands that have gradients."""
        return self._learned()[0]

    def _learned(self) -> tuple[list[Array], Callable[[list[Array]], Place | None]]:
        """... and from other values of theirs to the place that has these."""
        if self.place is None:
            return [], lambda _: None
        place, arrays = self.place, self.place.arrays
        there = [jnp.issubdtype(x.dtype, jnp.floating) for x in arrays]

        def with_others(learned: list[Array]) -> Place:
            new = iter(learned)
            return place._replace(arrays=tuple(next(new) if own else x for own, x in zip(there, arrays, strict=True)))

        return [x for own, x in zip(there, arrays, strict=True) if own], with_others

    def gradients(self, learned: list[Array]) -> tuple[Array | None, ...]:
        """Of all operands: `learned`, and None for others."""
        arrays = () if self.place is None else self.place.arrays
        new = iter(learned)
        return tuple(next(new).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else None for x in arrays)

    def _modified(self, scores: Array, place: Place | None, tile: Tile, keys: bool, only_kept: bool) -> Array:
        """`only_kept`: pairs that are not kept count as one that is, since theirs might not be numbers."""
        if place is None or self.heads is None or self.options.score_mod is None:
            return scores
        rows, cols = tile.rows[:, None, None, None, :, None], tile.cols[:, None, None, None, None, :]
        queries, columns = (cols, rows) if keys else (rows, cols)
        batch, heads = place.batch.reshape(1, -1, 1, 1, 1, 1), self.heads.reshape(1, 1, *self.heads.shape, 1, 1)
        given = scores, batch, heads, queries, columns
        if only_kept:
            keep = jnp.broadcast_to(tile.keep & (rows < tile.num_rows), (*scores.shape[:2], 1, 1, *scores.shape[-2:]))
            at = jnp.unravel_index(keep.argmax(), keep.shape)

            def of_kept(x: Array) -> Array:
                """Where one is not kept, that of the first that is."""
                one = x[tuple(slice(None) if axis in (2, 3) else at[axis] % x.shape[axis] for axis in range(6))]
                return jnp.where(keep, x, one.reshape(1, 1, *x.shape[2:4], 1, 1))

            given = tuple(x if x is heads else of_kept(x) for x in given)
        return self.options.score_mod.of_tile(place, *given)

    def _capped(self, scores: Array) -> Array:
        cap = self.options.logits_soft_cap
        if cap is None:
            return scores
        capped = cap * jnp.tanh(scores / cap)
        return capped if self.options.score_mod is None else jnp.where(jnp.isneginf(scores), scores, capped)


def _product(spec: str, left: Array, right: Array, dtype: Any) -> Array:
    return jnp.einsum(spec, left, right, preferred_element_type=dtype)


def forward_body(scores_of: Scores) -> PassBody:
    """Online softmax (Milakov & Gimelshein, arXiv 1805.02867): rows (q,), lattices (k, v) -> output, log-sum-exp."""

    def init(tiles):
        (q,) = tiles
        dtype = _accumulator(q.dtype)
        floor = jnp.full(q.shape[:-1], jnp.finfo(dtype).min / 2, dtype)  # finite: exp(-inf - floor) is 0, not NaN
        return tuple(vary_like(x, q) for x in (floor, jnp.zeros_like(floor), jnp.zeros(q.shape, dtype)))

    def visit(shared, carry, tiles, tile):
        (q,), (k, v), (top, total, acc) = tiles, tile.slices, carry
        scores = scores_of.of_tile(_product("rbkgqh,rbkxh->rbkgqx", q, k, acc.dtype), tile)
        scores = jnp.where(tile.keep, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        p = jnp.exp(scores - new_top[..., None])
        decay = jnp.exp(top - new_top)
        add = _product("rbkgqx,rbkxh->rbkgqh", p.astype(v.dtype), v, acc.dtype)
        return shared, (new_top, total * decay + p.sum(axis=-1), acc * decay[..., None] + add)

    def finish(carry):
        top, total, acc = carry
        safe = jnp.where(total == 0, 1, total)
        lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))
        return [acc / safe[..., None], lse[..., None]]

    return PassBody(init, visit, finish, (0.0, float("-inf")))


def _weights(exponent: Array, keep: Array) -> Array:
    """Softmax weights from scores less log-sum-exps: at most 1, though scores in the millions are rounded by more."""
    return jnp.where(keep, jnp.exp(jnp.where(exponent > 0, 0, exponent)), 0)


def d_query_body(scores_of: Scores) -> PassBody:
    """Rows (q, d_out, lse, delta), lattices (k, v) -> dQ; shared: the gradients of what modifies scores.

    `delta` is rowsum(d_out * out) - d_lse.
    """

    def init(tiles):
        q = tiles[0]
        return vary_like(jnp.zeros(q.shape, _accumulator(q.dtype)), q)

    def visit(shared, carry, tiles, tile):
        (q, d_out, lse, delta), (k, v) = tiles, tile.slices
        products = _product("rbkgqh,rbkxh->rbkgqx", q, k, carry.dtype)
        scores, backward = scores_of.with_gradient(products, tile, learn=True)
        p = _weights(scores - lse, tile.keep)
        d_p = _product("rbkgqh,rbkxh->rbkgqx", d_out, v, carry.dtype)
        d_s, more = backward(jnp.where(tile.keep, p * (d_p - delta), 0))
        if shared:  # in a tile without any pair none of them is a number, perhaps
            some = tile.keep.any()
            shared = [known + jnp.where(some, x, 0).astype(known.dtype) for known, x in zip(shared, more, strict=True)]
        d_s = jnp.where(tile.keep, d_s, 0)
        return shared, carry + _product("rbkgqx,rbkxh->rbkgqh", d_s.astype(k.dtype), k, carry.dtype)

    return PassBody(init, visit, lambda carry: [carry], (0.0,))


def d_key_value_body(scores_of: Scores) -> PassBody:
    """Rows (k, v), lattices (q, d_out, lse, delta) -> dK, dV, on the transposed schedule."""

    def init(tiles):
        k, v = tiles
        return tuple(vary_like(jnp.zeros(x.shape, _accumulator(x.dtype)), x) for x in (k, v))

    def visit(shared, carry, tiles, tile):
        (k, v), (q, d_out, lse, delta), (d_k, d_v) = tiles, tile.slices, carry
        products = _product("rbkqh,rbkgxh->rbkgqx", k, q, d_v.dtype)
        scores, backward = scores_of.with_gradient(products, tile, keys=True)
        lse, delta = jnp.swapaxes(lse, -1, -2), jnp.swapaxes(delta, -1, -2)
        p = _weights(scores - lse, tile.keep)
        d_p = _product("rbkqh,rbkgxh->rbkgqx", v, d_out, d_v.dtype)
        d_s, _ = backward(jnp.where(tile.keep, p * (d_p - delta), 0))
        d_s = jnp.where(tile.keep, d_s, 0)
        to_keys = "rbkgqx,rbkgxh->rbkqh"
        d_v = d_v + _product(to_keys, p.astype(d_out.dtype), d_out, d_v.dtype)
        d_k = d_k + _product(to_keys, d_s.astype(q.dtype), q, d_k.dtype)
        return shared, (d_k, d_v)

    return PassBody(init, visit, list, (0.0, 0.0))


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
