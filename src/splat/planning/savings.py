"""What each of the paper's specialisations saves (sections 4 and 5): scores computed without it over scores computed.

Row tiles of a component, and the columns that a tile is computed for:

    fixed grid           |XXXX|XXXX|XXXX|    tiles at multiples of block_kv
    poset tiling           |xxxx|xxxx|       tiles that begin where the rows' first column is
    no span              |XXXX|XXXX|XXXX|XXXX|XXXX|XXXX|   every tile of the row

Deterministic, O(rows). Components are counted one by one, each with its own rows.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from splat.acsr import ACSR, Component
from splat.geometry import RowTiles, align_by_step, align_rows_of, analyze
from splat.pattern.core import ceil_div


@dataclasses.dataclass(frozen=True)
class Savings:
    """Scores computed without each, over those computed with all; 1: it does not apply, or saves nothing.

    Attributes:
      alignment: rows of one residue together, on a lattice that is dense; else neighbours, on all columns between.
      spans: only columns between a row tile's first and last.
      posets: tiles that begin at a row tile's first column; else those of a fixed grid.
      rows_bytes, tiles_bytes: float32 values of one matrix, row-compressed with padding and in the order of tiles.
    """

    alignment: float
    spans: float
    posets: float
    rows_bytes: int
    tiles_bytes: int

    def __str__(self) -> str:
        return (
            f"saved by alignment {self.alignment:.3g}x, spans {self.spans:.3g}x, poset tiling {self.posets:.3g}x; "
            f"values {si(self.rows_bytes)}B in rows, {si(self.tiles_bytes)}B in tiles"
        )


def savings(acsr: ACSR, block_q: int, block_kv: int) -> Savings:
    """Of a static matrix that is computed in row tiles of `block_q` rows and tiles of `block_kv` lattice columns."""
    num_rows, computed, off = acsr.shape[0], 0, dict.fromkeys(("alignment", "spans", "posets"), 0)
    neighbours = align_by_step(num_rows, 1, block_q)
    for component in acsr.components:
        if not component.width:
            continue
        step, stride = component.line_step, component.stride
        tiles = align_rows_of(component, num_rows, block_q) if step is None else align_by_step(num_rows, step, block_q)
        first, width = _spans(component, tiles)
        area = tiles.block_q * block_kv
        scores = area * _tiles_of(width, block_kv)
        computed += scores
        off["posets"] += area * _tiles_of(first % block_kv + width, block_kv)
        off["spans"] += area * len(first) * ceil_div(ceil_div(acsr.shape[1], stride), block_kv)
        if (step, stride) != (1, 1):
            _, width = _spans(component.hull, neighbours)
            scores = neighbours.block_q * block_kv * _tiles_of(width, block_kv)
        off["alignment"] += scores
    ratios = {name: scores / computed if computed else 1.0 for name, scores in off.items()}
    return Savings(**ratios, rows_bytes=4 * num_rows * acsr.width, tiles_bytes=4 * computed)


def _spans(component: Component, tiles: RowTiles) -> tuple[np.ndarray, np.ndarray]:
    """(first lattice column, how many to the last) of every row tile that has any, int32."""
    spans = analyze(component, tiles)
    first, width = spans.x0, spans.width
    here = width > 0
    return (first, width) if here.all() else (first[here], width[here])


def _tiles_of(width: np.ndarray, block_kv: int) -> int:
    return int((-(-width // np.int32(block_kv))).sum(dtype=np.int64))


def si(value: float) -> str:
    """With a prefix of three digits: "12.3 M"."""
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} P"


__all__ = ["Savings", "savings", "si"]
