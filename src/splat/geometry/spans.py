"""Spans: what the rows of a tile touch along one component, in lattice coordinates.

With lower/upper the bounds of each row (`Component.bounds`), a span is four numbers and a residue:

                x0        x1                x2        x3
    row 0       [###################################)
    row 1           [###################################)
    row 2              [#############################)
                 left edge |       full         | right edge
    x0 = min lower, x1 = max lower, x2 = min upper, x3 = max upper

Between x1 and x2 every row has every column: no mask. Rows without a run push x1 to infinity: no column is full.
"""

from __future__ import annotations

import dataclasses
import weakref
from functools import reduce

import numpy as np

from splat.acsr import NOWHERE, Component
from splat.geometry.alignment import RowTiles
from splat.pattern.core import Array, array_namespace, ceil_div


@dataclasses.dataclass(frozen=True, eq=False)
class Spans:
    """Per row tile, int32 [tiles]: the bounds x0 <= x1, x2 <= x3 and the columns' residue modulo the stride.

    A column of the span is `residue + stride * x`. A tile without any column has x0 > x3.
    """

    x0: Array
    x1: Array
    x2: Array
    x3: Array
    residue: Array

    @property
    def width(self) -> Array:
        """Lattice columns from first to last, int32 [tiles]; 0 where there are none."""
        xp = array_namespace(self.x0)
        return xp.maximum(self.x3 - self.x0, 0)

    def coarsen(self, factor: int, tiles: RowTiles) -> Spans:
        """The spans of tiles of `factor` times as many rows; `tiles` is what these spans were made for."""
        if factor == 1:
            return self
        groups, per_group = tiles.step, tiles.tiles_per_group
        missing = ceil_div(per_group, factor) * factor - per_group

        def merge(values: Array, combine, neutral: int) -> Array:
            grid = values.reshape(groups, per_group)
            if missing:
                grid = xp.pad(grid, ((0, 0), (0, missing)), constant_values=neutral)
            grid = grid.reshape(-1, factor)
            return reduce(combine, (grid[:, n] for n in range(factor)))  # much quicker than reducing a short axis

        xp, far = array_namespace(self.x0), int(NOWHERE)
        return Spans(
            merge(self.x0, xp.minimum, far),
            merge(self.x1, xp.maximum, -far),
            merge(self.x2, xp.minimum, far),
            merge(self.x3, xp.maximum, -far),
            merge(self.residue, xp.maximum, 0),
        )


#: Spans of static components by (step, block_q): planning asks for several targets, and for what is saved.
_known: weakref.WeakKeyDictionary[Component, dict[tuple[int, int], Spans]] = weakref.WeakKeyDictionary()


def analyze(component: Component, tiles: RowTiles) -> Spans:
    """The spans of `component` for every row tile; one pass over the rows, or over those of smaller tiles."""
    if tiles.row_map is not None or not component.is_static:
        return _analyze(component, tiles)
    known = _known.setdefault(component, {})
    wanted = tiles.step, tiles.block_q
    if wanted not in known:
        finer = [size for step, size in list(known) if step == tiles.step and tiles.block_q % size == 0]
        if finer:
            smaller = dataclasses.replace(tiles, block_q=max(finer))
            known[wanted] = known[tiles.step, smaller.block_q].coarsen(tiles.block_q // smaller.block_q, smaller)
        else:
            known[wanted] = _analyze(component, tiles)
    return known[wanted]


def _analyze(component: Component, tiles: RowTiles) -> Spans:
    lower, upper = component.bounds
    x0, x1 = tiles.smallest(lower), tiles.largest(lower)
    x2, x3 = tiles.smallest(upper), tiles.largest(upper)
    if tiles.padding is not None:  # neutral for any minimum and maximum: such a tile has no column
        xp = array_namespace(x0)
        x0, x1 = xp.where(tiles.padding, NOWHERE, x0), xp.where(tiles.padding, -NOWHERE, x1)
        x2, x3 = xp.where(tiles.padding, NOWHERE, x2), xp.where(tiles.padding, -NOWHERE, x3)
    if component.stride == 1:
        return Spans(x0, x1, x2, x3, array_namespace(x0).zeros_like(x0))
    residue = tiles.largest(component.residue)
    return Spans(x0, x1, x2, x3, residue)


def is_aligned(component: Component, tiles: RowTiles) -> bool:
    """Whether the component's tiles are dense lattices under this grouping: every tile's rows share its residue.

    A row map must also name every row that the component has a run in.
    """
    if tiles.row_map is None and (component.stride == 1 or component.line_step is not None):
        step = component.line_step or 1
        return component.stride == 1 or tiles.step % step == 0 or tiles.step >= tiles.num_rows
    if not component.is_static:
        return False
    if tiles.row_map is not None:
        named = np.zeros(tiles.num_rows + 1, bool)
        named[tiles.row_map.reshape(-1)] = True
        if (component.count > 0)[~named[:-1]].any():
            return False
    low = tiles.smallest(np.where(component.count > 0, component.residue, NOWHERE))
    high = tiles.largest(np.where(component.count > 0, component.residue, -1))
    if tiles.row_map is None:  # in whole groups, because tiles may be merged to larger ones
        low = low.reshape(tiles.step, -1).min(axis=1)
        high = high.reshape(tiles.step, -1).max(axis=1)
    return bool(((low == high) | (high < 0)).all())
