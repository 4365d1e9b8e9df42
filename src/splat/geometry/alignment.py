"""Transformation alignment (paper, section 5.3): which rows share a row tile.

A tile over columns of stride s is dense only if all its rows have their columns in one residue class modulo s. Rows
are therefore grouped before they are cut into row tiles:

    step 1                 step 4, block_q 2 (12 rows)
    tile 0: rows 0 1 2     tile 0: rows 0 4      tile 2: rows 1 5     ...
    tile 1: rows 3 4 5     tile 1: rows 8 .      tile 3: rows 9 .     (. is padding)
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np

from splat.acsr import Component
from splat.pattern.core import Array, array_namespace, ceil_div


@dataclasses.dataclass(frozen=True, eq=False)
class RowTiles:
    """The row tiles of one row grouping.

    Attributes:
      num_rows, block_q: rows in all, and rows a tile (the last of a group may be padded).
      step: rows `r, r + step, r + 2*step, ...` form a group. With `row_map` set, only its tiles count.
      row_map: int32 [tiles, block_q], where rows are grouped by number; `num_rows` marks padding.
    """

    num_rows: int
    block_q: int
    step: int = 1
    row_map: np.ndarray | None = None

    @property
    def tiles_per_group(self) -> int:
        return ceil_div(ceil_div(self.num_rows, self.step), self.block_q)

    @property
    def num_tiles(self) -> int:
        return self.step * self.tiles_per_group if self.row_map is None else self.row_map.shape[0]

    @cached_property
    def rows(self) -> np.ndarray:
        """int32 [num_tiles, block_q]: the row map; `num_rows` where a tile is padded."""
        if self.row_map is not None:
            return self.row_map
        in_group = np.arange(self.tiles_per_group * self.block_q, dtype=np.int32)
        rows = np.arange(self.step, dtype=np.int32)[:, None] + self.step * in_group
        return np.where(rows < self.num_rows, rows, self.num_rows).reshape(-1, self.block_q)

    @cached_property
    def padding(self) -> np.ndarray | None:
        """bool [num_tiles], the tiles that hold no row at all; None where every tile holds one."""
        if (
            self.row_map is not None
            or (self.tiles_per_group - 1) * self.block_q * self.step + self.step <= self.num_rows
        ):
            return None
        first = np.arange(self.tiles_per_group)[None, :] * self.block_q * self.step + np.arange(self.step)[:, None]
        return (first >= self.num_rows).reshape(-1)

    def smallest(self, values: Array) -> Array:
        """The minimum of per-row values over every tile's rows: [num_tiles]."""
        return self._reduce(values, "minimum")

    def largest(self, values: Array) -> Array:
        """The maximum of per-row values over every tile's rows: [num_tiles]."""
        return self._reduce(values, "maximum")

    def _reduce(self, values: Array, operation: str) -> Array:
        xp = array_namespace(values)
        if self.row_map is not None:  # a padded slot repeats the tile's first row
            values = values[np.where(self.row_map < self.num_rows, self.row_map, self.row_map[:, :1])]
            return xp.max(values, axis=1) if operation == "maximum" else xp.min(values, axis=1)
        tiles = self.tiles_per_group
        missing = tiles * self.block_q * self.step - self.num_rows
        if missing:  # padding repeats a row of the same group, which no minimum or maximum notices
            tail = values[self.num_rows - self.step :]
            values = xp.concatenate([values, xp.tile(tail, ceil_div(missing, self.step))[:missing]])
        if xp is np and self.step == 1:  # several times faster than reducing a short axis
            combine, size = getattr(np, operation), self.block_q
            while size % 2 == 0:
                values, size = combine(values[0::2], values[1::2]), size // 2
            return values if size == 1 else combine.reduceat(values, np.arange(0, values.shape[0], size))
        grid = values.reshape(tiles, self.block_q, self.step)
        reduced = xp.max(grid, axis=1) if operation == "maximum" else xp.min(grid, axis=1)
        return reduced.T.reshape(-1)

    def __str__(self) -> str:
        how = f"step {self.step}" if self.row_map is None else "row map"
        return f"{self.num_tiles} row tiles of {self.block_q} ({how})"


def align_by_step(num_rows: int, step: int, block_q: int) -> RowTiles:
    """Groups of rows equal modulo `step`; a block never exceeds what a group can fill."""
    step = max(min(step, num_rows), 1)
    longest = ceil_div(max(num_rows, 1), step)
    return RowTiles(num_rows, min(block_q, next_power_of_two(longest)), step)


def align_rows_of(component: Component, num_rows: int, block_q: int) -> RowTiles:
    """Only the rows that `component` has runs in, grouped by their residue: any regular pattern, through a row map."""
    here = np.flatnonzero(component.count > 0)
    residue = component.start[here] % component.stride
    if component.stride > 1:
        order = np.argsort(residue, kind="stable")
        here, residue = here[order], residue[order]
    sizes = np.bincount(residue)
    sizes = sizes[sizes > 0]
    block_q = min(block_q, next_power_of_two(int(sizes.max(initial=1))))
    tiles = -(-sizes // block_q)
    row_map = np.full((int(tiles.sum()), block_q), num_rows, np.int32)
    slot = np.arange(here.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    slot += np.repeat((np.cumsum(tiles) - tiles) * block_q, sizes)
    row_map.reshape(-1)[slot] = here
    return RowTiles(num_rows, block_q, 1, row_map)


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
