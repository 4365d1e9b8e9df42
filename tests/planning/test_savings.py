"""What the paper's specialisations save: against tiles that are counted one by one."""

from __future__ import annotations

import numpy as np
import pytest

import splat
from splat.planning import savings

PATTERNS = ["window(9)", "strided(4)", "dilated_window(3, 2, 4)", "blocked(8, 1)", "window(3) | strided(8)", "sink(3)"]


def counted(mask: np.ndarray, block_q: int, block_kv: int, begin: str) -> int:
    """Scores of the tiles of a mask's row tiles that hold any; tiles begin at the span, on a grid, or are all."""
    total = 0
    for at in range(0, len(mask), block_q):
        columns = np.flatnonzero(mask[at : at + block_q].any(axis=0))
        if not columns.size:
            continue
        if begin == "span":
            total += -(-(columns[-1] + 1 - columns[0]) // block_kv)
        elif begin == "grid":
            total += columns[-1] // block_kv - columns[0] // block_kv + 1
        else:
            total += -(-mask.shape[1] // block_kv)
    return total * block_q * block_kv


def lattices(component: splat.acsr.Component, columns: int) -> list[np.ndarray]:
    """For every residue, the mask of its rows on the columns of its lattice."""
    whole = splat.ACSR((len(component.count), columns), (component,)).to_dense()
    step = component.line_step or 1
    groups = [np.arange(r, len(whole), step) for r in range(step)]
    return [whole[rows][:, component.residue[rows].max() :: component.stride] for rows in groups]


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("blocks", [(4, 4), (8, 1), (3, 5)])
def test_counted(text: str, blocks: tuple[int, int]) -> None:
    acsr = splat.build(splat.parse(text), 64)
    made = savings(acsr, *blocks)
    parts = [part for c in acsr.components for part in lattices(c, 64) if part.any()]
    whole = sum(counted(part, *blocks, "span") for part in parts)
    assert made.tiles_bytes == 4 * whole
    assert made.rows_bytes == 4 * 64 * acsr.width
    assert made.posets == pytest.approx(sum(counted(part, *blocks, "grid") for part in parts) / whole)
    assert made.spans == pytest.approx(sum(counted(part, *blocks, "all") for part in parts) / whole, rel=0.15)
    dense = [splat.ACSR(acsr.shape, (c,)).to_dense() for c in acsr.components]
    assert made.alignment == pytest.approx(sum(counted(mask, *blocks, "span") for mask in dense) / whole)


def test_what_each_is_for() -> None:
    """A stride is dense on its lattice; a window leaves out what is far; a grid cuts what begins anywhere."""
    stride, window, shifted = (
        savings(splat.build(splat.parse(text), 1024), 16, 16)
        for text in ("strided(16)", "window(64)", "segments(lengths=[8, 64, 952])")
    )
    assert stride.alignment > 10 > 1.01 > stride.spans
    assert window.spans > 5 > 1.01 > window.alignment
    assert shifted.posets > 1
    nothing = savings(splat.build(splat.segments([-1] * 8), 8), 16, 16)
    assert (nothing.alignment, nothing.spans, nothing.posets) == (1, 1, 1)
