"""Operations on values as portable XLA programs: dense products of row tiles with the lattice columns that they span.

A row tile holds rows whose columns lie on one lattice. Its span, cut to the longest of all tiles, is gathered, and what
a row has of it is taken from the dense tile, or put into it:

    lattice column x    span of the tile: x0 ... x0 + X
    row i               lower[i] <= x < upper[i], and its value number t belongs to x = lower[i] + t
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from splat.acsr import ACSR
from splat.acsr.format import Component
from splat.codegen.base import accumulator

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


@lru_cache(maxsize=64)
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
    """One tile in a loop: its rows [BLOCK], the columns of its span [X], and what of it each row has [BLOCK, X]."""

    rows: Array
    columns: Array
    number: Array  # of the value, [BLOCK, X]
    keep: Array
    first: Array  # of the values, where it lies in the span, [BLOCK]
    counts: Array


def _over_tiles(acsr: ACSR, number: int, body: Any, carry: Any = None) -> Any:
    """`body(carry, tile) -> (carry, result)` for every tile, one after the other."""
    tiles, component = _tiles(acsr, number), acsr.components[number]

    def step(carry: Any, one: Any) -> Any:
        rows, lower, count, x0, residue = one
        x = jnp.arange(tiles.span, dtype=jnp.int32)
        numbers = x0 + x - lower[:, None]
        keep = (numbers >= 0) & (numbers < count[:, None])
        columns = residue + component.stride * (x0 + x)
        return body(carry, _Tile(rows, columns, numbers, keep, lower - x0, count))

    return lax.scan(step, carry, tuple(map(jnp.asarray, tiles[:5])))


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


def sddmm(acsr: ACSR, rows: Array, columns: Array) -> Array:
    """See `Implementation.sddmm`."""
    parts = []
    for number in _components(acsr):
        width = acsr.components[number].width

        def body(carry: None, tile: _Tile, width=width) -> Any:
            scores = _dot("brh,bxh->brx", _rows(rows, tile.rows), _rows(columns, tile.columns))
            t = jnp.arange(width, dtype=jnp.int32)
            index = jnp.clip(tile.first[:, None] + t, 0, scores.shape[-1] - 1)
            taken = jnp.take_along_axis(scores, index[None], axis=-1)
            return carry, jnp.where(t < tile.counts[:, None], taken, 0)

        parts.append(_by_row(acsr, number, _over_tiles(acsr, number, body)[1]))
    return jnp.concatenate(parts, axis=-1)


def _matrix(values: Array, tile: _Tile) -> Array:
    """The dense tile [B, BLOCK, X] of values [B, rows, width]."""
    taken = jnp.take_along_axis(_rows(values, tile.rows), jnp.clip(tile.number, 0, values.shape[-1] - 1)[None], axis=-1)
    return jnp.where(tile.keep, taken, 0)


def _part(acsr: ACSR, number: int, values: Array) -> Array:
    offset = acsr.offsets[number]
    return values[..., offset : offset + acsr.components[number].width]


def spmm(acsr: ACSR, values: Array, dense: Array) -> Array:
    """See `Implementation.spmm`."""
    total = jnp.zeros((values.shape[0], acsr.shape[0], dense.shape[-1]), values.dtype)
    for number in _components(acsr):
        own = _part(acsr, number, values)

        def body(carry: None, tile: _Tile, own=own) -> Any:
            seen = tile.keep.any(axis=0)[:, None]  # what no row has may hold anything, NaN included
            lattice = jnp.where(seen, _rows(dense, tile.columns), 0).astype(values.dtype)
            return carry, _dot("brx,bxh->brh", _matrix(own, tile), lattice)

        total += _by_row(acsr, number, _over_tiles(acsr, number, body)[1])
    return total.astype(dense.dtype)


def spmm_transposed(acsr: ACSR, values: Array, dense: Array) -> Array:
    """See `Implementation.spmm_transposed`."""
    total = jnp.zeros((values.shape[0], acsr.shape[1], dense.shape[-1]), values.dtype)
    for number in _components(acsr):
        own = _part(acsr, number, values)

        def body(total: Array, tile: _Tile, own=own) -> Any:
            taken = jnp.where((tile.counts > 0)[:, None], _rows(dense, tile.rows), 0).astype(values.dtype)
            made = _dot("brx,brh->bxh", _matrix(own, tile), taken)
            return total.at[:, tile.columns].add(made, mode="drop", unique_indices=True), None

        total = _over_tiles(acsr, number, body, total)[0]
    return total.astype(dense.dtype)


def softmax(acsr: ACSR, values: Array) -> Array:
    """See `Implementation.softmax`."""
    parts = [
        jnp.arange(acsr.components[n].width, dtype=jnp.int32) < jnp.asarray(acsr.components[n].count)[:, None]
        for n in _components(acsr)
    ]
    here = jnp.concatenate(parts, axis=-1)
    top = jnp.max(values, axis=-1, keepdims=True, where=here, initial=-jnp.inf)
    weights = jnp.where(here, jnp.exp(values - jnp.where(jnp.isfinite(top), top, 0)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


__all__ = ["rows_by_residue", "sddmm", "softmax", "spmm", "spmm_transposed"]
