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
    computed, off = 0, dict.fromkeys(("alignment", "spans", "posets"), 0)
    for component in acsr.components:
        if not component.width:
            continue
        first, last, columns = _row_tiles(component, acsr.shape, block_q, aligned=True)
        area = block_q * block_kv
        computed += area * int((-(-(last - first) // block_kv)).sum())
        off["posets"] += area * int((-(-last // block_kv) - first // block_kv).sum())
        off["spans"] += area * len(first) * ceil_div(columns, block_kv)
        first, last, _ = _row_tiles(component, acsr.shape, block_q, aligned=False)
        off["alignment"] += area * int((-(-(last - first) // block_kv)).sum())
    ratios = {name: scores / computed if computed else 1.0 for name, scores in off.items()}
    return Savings(**ratios, rows_bytes=4 * acsr.shape[0] * acsr.width, tiles_bytes=4 * computed)


def _row_tiles(
    component: Component, shape: tuple[int, int], block_q: int, *, aligned: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """(first and end of the columns [tiles], int64, and how many there are); in lattice columns where `aligned`."""
    rows = np.flatnonzero(np.asarray(component.count) > 0)
    start, count = (np.asarray(x, np.int64)[rows] for x in (component.start, component.count))
    stride, group = component.stride, np.zeros_like(rows)
    if aligned and stride > 1:
        group = start % stride
        order = np.argsort(group, kind="stable")
        start, count, group = start[order] // stride, count[order], group[order]
        end = start + count
    else:
        end = start + (count - 1) * stride + 1
    opens = np.flatnonzero(np.diff(group, prepend=-1))
    number = np.arange(len(group)) - np.repeat(opens, np.diff(np.append(opens, len(group))))
    tiles = np.flatnonzero(number % block_q == 0)
    columns = ceil_div(shape[1], stride) if aligned else shape[1]
    return np.minimum.reduceat(start, tiles), np.maximum.reduceat(end, tiles), columns


def si(value: float) -> str:
    """With a prefix of three digits: "12.3 M"."""
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} P"


__all__ = ["Savings", "savings", "si"]
