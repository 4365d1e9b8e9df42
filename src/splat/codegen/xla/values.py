"""Operations on values as portable XLA programs: dense products of row tiles with the lattice columns that they span.

A row tile holds rows whose columns lie on one lattice. Its span, cut to the longest of all tiles, is gathered, and what
a row has of it is taken from the dense tile, or put into it:

    lattice column x    span of the tile: x0 ... x0 + X
    row i               lower[i] <= x < upper[i], and its value number t belongs to x = lower[i] + t
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from splat.acsr import ACSR
from splat.acsr.format import Component
from splat.codegen.base import USUAL, How, accumulator, kept_with_matrix
from splat.codegen.partitioning import vary_like
from splat.errors import UnsupportedError

Array = Any

#: Rows of a tile.
BLOCK = 64


class Tiles(NamedTuple):
    """Row tiles of a component, NumPy: rows [tiles, BLOCK] (`num_rows`: none), lower and counts there, x0 and residue
    [tiles], the longest span, and the position of each row in the tiles."""

    rows: np.ndarray
    lower: np.ndarray
    counts: np.ndarray
    x0: np.ndarray
    residue: np.ndarray
    span: int
    position: np.ndarray


@kept_with_matrix
def _tiles(acsr: ACSR, number: int) -> Tiles:
    component, num_rows = acsr.components[number], acsr.shape[0]
    parts = []
    for rows in rows_by_residue(component):
        parts.append(np.pad(rows, (0, -len(rows) % BLOCK), constant_values=num_rows).reshape(-1, BLOCK))
    rows = np.concatenate(parts)

    def at(values: Array, fill: int) -> np.ndarray:
        return np.append(np.broadcast_to(values, (num_rows,)), np.int32(fill))[rows].astype(np.int32)

    lower, upper = component.bounds
    residue = at(component.residue, 0).max(axis=1)
    x0, x1 = at(lower, 2**30).min(axis=1), at(upper, -(2**30)).max(axis=1)
    span = int((x1 - x0).max())
    position = np.zeros(num_rows + 1, np.int32)
    position[rows.reshape(-1)] = np.arange(rows.size, dtype=np.int32)
    x0 = np.where(x1 > x0, x0, 0)
    return Tiles(rows, at(lower, 0), at(component.count, 0), x0, residue, span, position[:-1])


def rows_by_residue(component: Component) -> list[np.ndarray]:
    """All rows, those together whose columns share a residue modulo the stride, in order."""
    num_rows = component.count.shape[0]
    if component.stride == 1:
        return [np.arange(num_rows, dtype=np.int32)]
    residue = np.broadcast_to(np.asarray(component.residue), (num_rows,))
    order = np.argsort(residue, kind="stable").astype(np.int32)
    return np.split(order, np.flatnonzero(np.diff(residue[order])) + 1)


class _Tile(NamedTuple):
    """Row tiles in a loop, or all at once: [...] is empty, or [tiles]."""

    index: Array
    rows: Array  # [..., BLOCK]
    columns: Array  # of the span, [..., X]
    number: Array  # of the value, [..., BLOCK, X]
    keep: Array  # what rows have of the span, [1, ..., BLOCK, X]
    first: Array  # of a row's values, where it lies in the span, [..., BLOCK]
    counts: Array


def _arrays(acsr: ACSR, number: int) -> tuple[Array, ...]:
    tiles = _tiles(acsr, number)
    return (jnp.arange(len(tiles.x0)), *map(jnp.asarray, tiles[:5]))


def _tile(acsr: ACSR, number: int, arrays: tuple[Array, ...]) -> _Tile:
    index, rows, lower, counts, x0, residue = arrays
    x = x0[..., None] + lax.broadcasted_iota(jnp.int32, (*x0.shape, _tiles(acsr, number).span), x0.ndim)
    numbers = x[..., None, :] - lower[..., None]
    keep = (numbers >= 0) & (numbers < counts[..., None])
    columns = residue[..., None] + acsr.components[number].stride * x
    return _Tile(index, rows, columns, numbers, keep[None], lower - x0[..., None], counts)


def _over_tiles(acsr: ACSR, number: int, body: Any, carry: Any = None) -> Any:
    """`body(carry, tile) -> (carry, result)` for every tile, one after the other."""
    return lax.scan(lambda carry, one: body(carry, _tile(acsr, number, one)), carry, _arrays(acsr, number))


def _components(acsr: ACSR) -> list[int]:
    return [n for n, component in enumerate(acsr.components) if component.width]


def _by_row(acsr: ACSR, number: int, results: Array) -> Array:
    """[tiles, B, BLOCK, width] -> [B, rows, width]."""
    flat = jnp.moveaxis(results, 1, 0).reshape(results.shape[1], -1, results.shape[-1])
    return jnp.take(flat, jnp.asarray(_tiles(acsr, number).position), axis=1)


def _rows(array: Array, index: Array) -> Array:
    return jnp.take(array, index, axis=1, mode="fill", fill_value=0)


def _dot(spec: str, left: Array, right: Array) -> Array:
    return jnp.einsum(spec, left, right, preferred_element_type=accumulator(right.dtype))


# -- values in one of two layouts --------------------------------------------------------------------------------------


def num_values(acsr: ACSR, how: How) -> int:
    """See `Implementation.num_values`."""
    if not how.specialised:
        raise UnsupportedError(
            "the xla implementation has nothing to switch off. Compare with implementation='cpp' or 'triton'."
        )
    if how.layout == "rows":
        return acsr.shape[0] * acsr.width
    return sum(_tiles(acsr, n).rows.size * _tiles(acsr, n).span for n in _components(acsr))


def _in_tiles(acsr: ACSR, values: Array) -> dict[int, Array]:
    """component -> its values [B, tiles, BLOCK, X]."""
    out, begin = {}, 0
    for n in _components(acsr):
        shape = (*_tiles(acsr, n).rows.shape, _tiles(acsr, n).span)
        out[n] = values[:, begin : begin + math.prod(shape)].reshape(values.shape[0], *shape)
        begin += math.prod(shape)
    return out


def _from_tiles(parts: list[Array]) -> Array:
    """Inverse of `_in_tiles`."""
    return jnp.concatenate([part.reshape(part.shape[0], -1) for part in parts], axis=-1)


def _reader(acsr: ACSR, number: int, values: Array, how: How) -> Callable[[_Tile], Array]:
    """Makes the dense tile [B, BLOCK, X] of a component's values."""
    if how.layout == "tiles":
        tiles = _in_tiles(acsr, values)[number]
        return lambda tile: jnp.where(tile.keep, jnp.take(tiles, tile.index, axis=1), 0)
    begin, width = acsr.offsets[number], acsr.components[number].width
    own = values[..., begin : begin + width]

    def read(tile: _Tile) -> Array:
        index = jnp.clip(tile.number, 0, width - 1)[None]
        return jnp.where(tile.keep, jnp.take_along_axis(_rows(own, tile.rows), index, axis=-1), 0)

    return read


# -- operations --------------------------------------------------------------------------------------------------------


def sddmm(acsr: ACSR, rows: Array, columns: Array, how: How = USUAL) -> Array:
    """See `Implementation.sddmm`."""
    parts = []
    for number in _components(acsr):
        width = acsr.components[number].width

        def body(carry: None, tile: _Tile, width=width) -> Any:
            scores = _dot("brh,bxh->brx", _rows(rows, tile.rows), _rows(columns, tile.columns))
            if how.layout == "tiles":
                return carry, jnp.where(tile.keep, scores, 0)
            t = jnp.arange(width, dtype=jnp.int32)[None]
            index = jnp.clip(tile.first[:, None] + t, 0, scores.shape[-1] - 1)
            taken = jnp.take_along_axis(scores, index[None], axis=-1)
            return carry, jnp.where((t < tile.counts[:, None])[None], taken, 0)

        made = _over_tiles(acsr, number, body)[1]
        parts.append(jnp.moveaxis(made, 1, 0) if how.layout == "tiles" else _by_row(acsr, number, made))
    return _from_tiles(parts) if how.layout == "tiles" else jnp.concatenate(parts, axis=-1)


def spmm(acsr: ACSR, values: Array, dense: Array, how: How = USUAL) -> Array:
    """See `Implementation.spmm`."""
    total = jnp.zeros((values.shape[0], acsr.shape[0], dense.shape[-1]), values.dtype)
    for number in _components(acsr):
        read = _reader(acsr, number, values, how)

        def body(carry: None, tile: _Tile, read=read) -> Any:
            seen = tile.keep.any(axis=1)[..., None]  # what no row has may hold anything, NaN included
            lattice = jnp.where(seen, _rows(dense, tile.columns), 0).astype(values.dtype)
            return carry, _dot("brx,bxh->brh", read(tile), lattice)

        total += _by_row(acsr, number, _over_tiles(acsr, number, body)[1])
    return total.astype(dense.dtype)


def spmm_transposed(acsr: ACSR, values: Array, dense: Array, how: How = USUAL) -> Array:
    """See `Implementation.spmm_transposed`."""
    total = vary_like(jnp.zeros((values.shape[0], acsr.shape[1], dense.shape[-1]), values.dtype), values, dense)
    for number in _components(acsr):
        read = _reader(acsr, number, values, how)

        def body(total: Array, tile: _Tile, read=read) -> Any:
            taken = jnp.where((tile.counts > 0)[None, :, None], _rows(dense, tile.rows), 0).astype(values.dtype)
            made = _dot("brx,brh->bxh", read(tile), taken)
            return total.at[:, tile.columns].add(made, mode="drop", unique_indices=True), None

        total = _over_tiles(acsr, number, body, total)[0]
    return total.astype(dense.dtype)


def softmax(acsr: ACSR, values: Array, how: How = USUAL) -> Array:
    """See `Implementation.softmax`."""
    if how.layout == "tiles":
        return _softmax_in_tiles(acsr, values)
    parts = [
        jnp.arange(acsr.components[n].width, dtype=jnp.int32)[None] < jnp.asarray(acsr.components[n].count)[:, None]
        for n in _components(acsr)
    ]
    here = jnp.concatenate(parts, axis=-1)[None]
    top = _finite(jnp.max(values, axis=-1, keepdims=True, where=here, initial=-jnp.inf))
    weights = jnp.where(here, jnp.exp(values - top), 0)
    return weights / _not_zero(weights.sum(axis=-1, keepdims=True))


def _softmax_in_tiles(acsr: ACSR, values: Array) -> Array:
    tiles = {n: _tile(acsr, n, _arrays(acsr, n)) for n in _components(acsr)}
    parts = _in_tiles(acsr, values)

    def of_rows(n: int, numbers: Array) -> Array:
        """[B, tiles, BLOCK] -> [B, rows]."""
        return jnp.take(numbers.reshape(numbers.shape[0], -1), jnp.asarray(_tiles(acsr, n).position), axis=1)

    def of_tiles(n: int, numbers: Array) -> Array:
        """[B, rows] -> [B, tiles, BLOCK, 1]."""
        return jnp.take(numbers, tiles[n].rows, axis=1, mode="fill", fill_value=1)[..., None]

    tops = [of_rows(n, jnp.max(x, axis=-1, where=tiles[n].keep, initial=-jnp.inf)) for n, x in parts.items()]
    top = _finite(functools.reduce(jnp.maximum, tops))
    weights = {n: jnp.where(tiles[n].keep, jnp.exp(x - of_tiles(n, top)), 0) for n, x in parts.items()}
    total = _not_zero(sum(of_rows(n, x.sum(axis=-1)) for n, x in weights.items()))
    return _from_tiles([x / of_tiles(n, total) for n, x in weights.items()])


def _finite(top: Array) -> Array:
    return jnp.where(jnp.isfinite(top), top, 0)


def _not_zero(total: Array) -> Array:
    return jnp.where(total == 0, 1, total)


__all__ = ["num_values", "rows_by_residue", "sddmm", "softmax", "spmm", "spmm_transposed"]
