"""How much of a grid's cells a pattern and its tiles fill, from the tables that the kernels follow.

The tiles of one phase that meet a row are one run of columns, as a component's columns are. So pattern and tiles are
counted by the same closed form, in O(rows + cells), and no mask is formed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from splat.errors import PatternError
from splat.planning import Pass, Schedule
from splat.tiling import Phase

#: Told apart in grey and by colour-blind eyes (after Okabe and Ito): dark, middle and light.
FULL, PARTIAL, WASTED = "#0b5394", "#56b4e9", "#f5b455"

LABELS = {
    FULL: "pairs of full tiles (no mask)",
    PARTIAL: "pairs of partial tiles (masked)",
    WASTED: "computed for nothing",
}

#: Strided runs are counted on a sample of rows where there are more (row, cell edge) pairs than this.
MAX_COUNTS = 1 << 23


@dataclasses.dataclass(frozen=True, eq=False)
class Raster:
    """What the cells of a grid hold, each as a share of the cell's pairs; float64 [row cells, column cells].

    Attributes:
      row_edges, col_edges: cell (a, b) is rows `row_edges[a]:row_edges[a+1]`, columns `col_edges[b]:col_edges[b+1]`.
      pairs: the pattern's pairs.
      full, partial: what tiles compute; a pair that several passes compute counts several times. Every pair is kept
        by exactly one tile, so `full + partial - pairs` is computed for nothing.
    """

    row_edges: np.ndarray
    col_edges: np.ndarray
    pairs: np.ndarray
    full: np.ndarray
    partial: np.ndarray

    @property
    def wasted(self) -> np.ndarray:
        return self.full + self.partial - self.pairs

    @property
    def shares(self) -> np.ndarray:
        """[row cells, column cells, 3]: pairs of full tiles, pairs of partial tiles, computed for nothing."""
        return np.maximum(np.stack([self.full, self.pairs - self.full, self.wasted], axis=-1), 0)

    def colors(self) -> np.ndarray:
        """RGB on white paper, uint8 [row cells, column cells, 3].

        Ink is the cube root of the share of the cell that is filled: thin lines must show.
        """
        shares = self.shares
        if np.diff(self.row_edges).max(initial=1) == np.diff(self.col_edges).max(initial=1) == 1:
            shares[..., 2] *= self.pairs == 0  # single pairs: a pair that some tile keeps is no waste
        total = shares.sum(axis=-1, keepdims=True)
        palette = np.array([[int(color[n : n + 2], 16) for n in (1, 3, 5)] for color in (FULL, PARTIAL, WASTED)])
        hue = (shares / np.where(total > 0, total, 1)) @ palette
        ink = np.where(total > 1e-12, np.maximum(np.cbrt(np.minimum(total, 1)), 0.2), 0)
        return (255 + ink * (hue - 255)).round().astype(np.uint8)


def rasterize(
    schedule: Schedule,
    cells: tuple[int, int] = (400, 400),
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
) -> Raster:
    """The raster of a part of the matrix (all of it by default) in at most `cells` cells.

    Exact, except that runs of a stride above 1 are counted on a random sample of rows where rows x cells are more than
    `MAX_COUNTS`. Raises PatternError for a run-time pattern: its numbers are not known.
    """
    if not (schedule.is_static and schedule.acsr.is_static):
        raise PatternError("a pattern with run-time arrays cannot be drawn: its numbers are known when it runs")
    (first, last), (left, right) = rows or (0, schedule.acsr.shape[0]), cols or (0, schedule.acsr.shape[1])
    row_edges, col_edges = _edges(first, last, cells[0]), _edges(left, right, cells[1])
    area = np.outer(np.diff(row_edges), np.diff(col_edges))
    totals = np.zeros((3, *area.shape))
    for component in schedule.acsr.components:
        totals[0] += _count(component.stride, component.start, component.count, row_edges, col_edges)
    for one in schedule.passes:
        for phase, stride, start, count in _tile_runs(one, schedule.acsr.shape[0]):
            totals[1 if phase is Phase.FULL else 2] += _count(stride, start, count, row_edges, col_edges)
    return Raster(row_edges, col_edges, *(totals / np.maximum(area, 1)))


def _edges(start: int, stop: int, cells: int) -> np.ndarray:
    return np.linspace(start, stop, max(min(cells, stop - start), 1) + 1).round().astype(np.int64)


def _tile_runs(one: Pass, num_rows: int) -> Iterator[tuple[Phase, int, np.ndarray, np.ndarray]]:
    """(phase, stride, start, count) of what the tiles compute, row by row: tiles of one phase and row are one run."""
    slots = one.tiles.rows
    tile_of = np.full(num_rows + 1, -1)
    tile_of[slots.reshape(-1)] = np.repeat(np.arange(slots.shape[0]), slots.shape[1])
    tile_of = tile_of[:num_rows]
    for walk in one.walks:
        x = walk.begin.astype(np.int64)
        for phase in Phase:
            columns = getattr(walk, f"num_{phase.value}").astype(np.int64) * walk.block_kv
            if columns.any():
                start = (walk.residue + walk.stride * x)[tile_of]
                yield phase, walk.stride, start, np.where(tile_of >= 0, columns[tile_of], 0)
            x = x + columns


def _count(stride: int, start: np.ndarray, count: np.ndarray, row_edges: np.ndarray, col_edges: np.ndarray):
    """How many elements of the runs (one per row of the matrix) lie in each cell; float64 [row cells, column cells]."""
    sizes = np.diff(row_edges)
    if stride == 1:
        begin = start[row_edges[0] : row_edges[-1]].astype(np.int64)
        end = begin + np.maximum(count[row_edges[0] : row_edges[-1]], 0)
        cell_of = np.repeat(np.arange(sizes.size), sizes)
        return np.diff(_ramps(begin, cell_of, sizes.size, col_edges) - _ramps(end, cell_of, sizes.size, col_edges))
    samples = max(MAX_COUNTS // (sizes.size * col_edges.size), 1)
    if int(sizes.max(initial=0)) <= samples:
        picked, offsets, weight = np.arange(row_edges[0], row_edges[-1]), row_edges[:-1] - row_edges[0], 1.0
    else:  # stratified, so that no stride of the pattern meets one of ours
        jitter = np.random.default_rng(0).random((sizes.size, samples))
        within = (np.arange(samples) + jitter) / samples * sizes[:, None]
        picked = (row_edges[:-1, None] + within.astype(np.int64)).reshape(-1)
        offsets, weight = np.arange(sizes.size) * samples, sizes[:, None] / samples
    if not picked.size:
        return np.zeros((sizes.size, col_edges.size - 1))
    out = []
    step = max((1 << 22) // col_edges.size, 1)  # a few MB at a time
    at, number = start[picked].astype(np.int64), count[picked].astype(np.int64)
    for a in range(0, picked.size, step):
        here = slice(a, a + step)
        before = -((at[here, None] - col_edges) // stride)  # elements left of each edge
        out.append(np.clip(before, 0, np.maximum(number[here, None], 0)).astype(np.int32))
    return np.diff(np.add.reduceat(np.concatenate(out), offsets, axis=0, dtype=np.int64)) * weight


def _ramps(points: np.ndarray, cell_of: np.ndarray, cells: int, edges: np.ndarray) -> np.ndarray:
    """The sum of max(edge - point, 0) over a cell's points, for every edge; float64 [cells, edges], exact."""
    slot = cell_of * (edges.size + 1) + np.searchsorted(edges, points, side="left")
    shape = (cells, edges.size + 1)
    number = np.bincount(slot, minlength=shape[0] * shape[1]).reshape(shape).cumsum(axis=1)[:, :-1]
    total = np.bincount(slot, points, minlength=shape[0] * shape[1]).reshape(shape).cumsum(axis=1)[:, :-1]
    return number * edges - total
