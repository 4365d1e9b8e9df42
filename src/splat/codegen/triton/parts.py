"""Passes in parts: row tiles that several programs share, because a GPU has room for more of them.

    tiles of a row tile, walk after walk    walk 0 [ 0 1 2 3 4 5 6 )   walk 1 [ 7 8 9 )
    its slots, in 3 parts                          [ 0 1 2 )[ 3 4 5 )[ 6 )    [ 7 8 9 )

Every part is a slot with the same rows and cut spans, so kernels need not know. Some phases, walks or whole parts are
empty. Static or traced, the number of parts is the same: where they are cut is in the tables.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from splat.codegen.triton.lower import LONG, PassSpec, Tables, slots_of
from splat.pattern.core import Array, array_namespace


def in_parts(spec: PassSpec, tables: Tables, parts: int, num_rows: int) -> tuple[PassSpec, Tables]:
    """The pass with each row tile in `parts` slots; those of part p lie together, behind those of part p - 1.

    Its results are to be merged: SLOTS says where those of the first part are, and there is no padding between them.
    """
    tiles = tables["TILES"]
    xp = array_namespace(tiles)
    divided = {**tables, "TILES": _cut(tiles, spec.block_kv, parts)}
    if "ROWS" in tables:
        divided["ROWS"] = xp.tile(tables["ROWS"], (parts, 1))
    divided["SLOTS"] = slots_of(spec, tables, num_rows, spec.tile_rows)
    is_long = spec.is_long and spec.longest >= LONG * spec.num_walks * parts
    num_slots = spec.num_slots * parts
    spec = dataclasses.replace(spec, num_slots=num_slots, slot_rows=spec.tile_rows, is_long=is_long, parts=parts)
    return spec, divided


def _cut(tiles: Array, block_kv: int, parts: int) -> Array:
    """TILES [parts * slots, 1 + 6 * walks] of TILES [slots, 1 + 6 * walks]."""
    xp = array_namespace(tiles)
    slots = tiles.shape[0]
    walks = tiles[:, 1:].reshape(slots, -1, 6)  # x0, x1, x2, x3, stop, residue
    begin, count = walks[..., 0], (walks[..., 3] - walks[..., 0]) // block_kv  # [slots, walks]
    ends = xp.cumsum(count, axis=1, dtype=np.int32)
    before, total = ends - count, ends[:, -1:]
    pieces = []
    for part in range(parts):
        # A product of `part` and `total` may not fit; this is the same.
        low, high = (total // parts * n + total % parts * n // parts for n in (part, part + 1))
        low, high = (begin + xp.clip(at - before, 0, count) * block_kv for at in (low, high))
        bounds = xp.clip(walks[..., :4], low[..., None], high[..., None])
        whole = xp.concatenate([bounds, walks[..., 4:]], axis=2).reshape(slots, -1)
        pieces.append(xp.concatenate([tiles[:, :1], whole], axis=1))
    return xp.concatenate(pieces, axis=0).astype(np.int32)


def undivided(spec: PassSpec) -> PassSpec:
    """Of a pass whose parts have been merged, slot by slot."""
    return dataclasses.replace(spec, num_slots=spec.num_slots // spec.parts, parts=1)
