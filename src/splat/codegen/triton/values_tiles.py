"""Row tiles of the operations on values: which rows are grouped, what each tile spans, and what that costs.

Each component gets the row tiles that cost it least: neighbours, rows of one residue in steps (transformation
alignment), or the same through a row map. Its span is covered from its first column on, in three phases. `How` switches
each of these off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np

from splat.acsr import ACSR, NOWHERE, Component
from splat.codegen.base import USUAL, How
from splat.geometry import RowTiles, Spans, align_by_step, align_rows_of, analyze, is_aligned
from splat.planning.kernels import KernelConfig
from splat.tiling import Test, Walk, cover

#: The cost of a tile is its pairs and as many for each row and column that is loaded; of a program, beside its tiles',
#: as much as so many pairs. They rank tilings of one pattern. (By reasoning, not by measurement.)
_LINE, _PROGRAM = 16, 4096


class Line(NamedTuple):
    """What is run along: a component of the output's rows, whose values those of component `number` are.

    A row has every `hop`-th of its lattice columns: all of them, but without transformation alignment.
    """

    number: int
    component: Component
    hop: int = 1


class Phases(NamedTuple):
    """Which phases a launch has, and what the masked ones compare: see `kernels.values`."""

    left: str
    full: bool
    right: str

    def merge(self, other: Phases) -> Phases:
        return Phases(_both(self.left, other.left), self.full or other.full, _both(self.right, other.right))


def _both(a: str, b: str) -> str:
    if "absent" in (a, b) or a == b:
        return b if a == "absent" else a
    return "both"


@dataclasses.dataclass(frozen=True, eq=False)
class Tiled:
    """A component under one row grouping and one block size.

    Attributes:
      component: its lines may be rows or, transposed, columns.
      stop: int32 [tiles], past the last lattice column that some row of the tile has.
      block_q: rows of the kernel's tile; those of `tiles` may be fewer.
    """

    component: Component
    tiles: RowTiles
    walk: Walk
    stop: np.ndarray
    block_q: int

    @property
    def cost(self) -> float:
        tiles = float(work_of(self).sum(dtype=np.int64))
        return tiles * area(self.block_q, self.walk.block_kv) + self.tiles.num_tiles * _PROGRAM

    @property
    def phases(self) -> Phases:
        full = bool(self.walk.num_full.any())
        return Phases(_test(self.walk.head_tests), full, _test(self.walk.tail_tests))

    @property
    def spans(self) -> np.ndarray:
        """x0, x1, x2, x3, stop, residue of every tile: int32 [tiles, 6]."""
        walk, block = self.walk, self.walk.block_kv
        x1 = walk.begin + walk.num_head * block
        x2 = x1 + walk.num_full * block
        columns = (walk.begin, x1, x2, x2 + walk.num_tail * block, self.stop, walk.residue)
        return np.stack([np.broadcast_to(column, self.stop.shape) for column in columns], axis=1).astype(np.int32)


def area(block_q: int, block_kv: int) -> float:
    """The cost of one tile."""
    return block_q * block_kv + _LINE * (block_q + block_kv)


def _test(tests: Sequence[Test]) -> str:
    if not tests:
        return "absent"
    return "both" if tests[0].lower and tests[0].upper else "lower" if tests[0].lower else "upper"


def line_of(acsr: ACSR, number: int, how: How = USUAL) -> Line:
    """A component seen from its rows; without alignment, on all columns from a row's first to its last."""
    component = acsr.components[number]
    if how.alignment or component.stride == 1:
        return Line(number, component)
    return Line(number, component.hull, component.stride)


def tile(line: Line, tiles: RowTiles, num_cols: int, config: KernelConfig, how: How = USUAL) -> Tiled:
    component, span = line.component, analyze(line.component, tiles)
    length = -((span.residue - num_cols) // component.stride)
    stop = np.maximum(tiles.largest(component.bounds[1]), 0) if how.spans and how.posets else length
    visited = _visited(span, length, line.hop, config.block_kv, how)
    (walk,) = cover([0], [component.stride], [visited], config.block_kv)
    return Tiled(component, tiles, walk, stop, config.block_q)


def _visited(span: Spans, length: np.ndarray, hop: int, block_kv: int, how: How) -> Spans:
    """The span, or what is visited instead of it; `length`: how many lattice columns there are."""
    x0, x1, x3 = span.x0, span.x1, span.x3
    here = x3 > x0
    if not how.posets:
        x0 = np.where(here, x0 // block_kv * block_kv, x0)
    if not how.posets or hop > 1:
        x1 = np.full_like(x1, NOWHERE)  # no column is taken for one that all rows have
    if not how.spans:
        x0, x3 = np.where(here, x0 % block_kv, x0), np.where(here, length, x3)
    return Spans(x0, x1, span.x2, x3, span.residue)


def groupings(
    component: Component, num_rows: int, block_q: int, unit: int = 1, *, alignment: bool = True
) -> list[RowTiles]:
    """The row tiles to choose from; all have every row. In steps, these are multiples of `unit`. A row map is last."""
    if not alignment:
        return [align_by_step(num_rows, 1, block_q)]
    steps = {math.lcm(component.line_step or 1, unit)} | ({unit} if component.stride == 1 else set())
    found = [align_by_step(num_rows, step, block_q) for step in sorted(steps)]
    if component.stride > 1 or component.has_empty_rows:
        some = align_rows_of(component, num_rows, block_q)
        empty = np.flatnonzero(component.count <= 0).astype(np.int32)
        rest = np.pad(empty, (0, -empty.size % some.block_q), constant_values=num_rows)
        row_map = np.concatenate([some.rows, rest.reshape(-1, some.block_q)])
        found.append(RowTiles(num_rows, some.block_q, 1, row_map))
    return [one for one in found if is_aligned(component, one)]


def best_tiling(line: Line, shape: tuple[int, int], config: KernelConfig, unit: int = 1, how: How = USUAL) -> Tiled:
    """The cheapest; row maps are avoided where they gain little. `shape`: of the matrix whose rows the line's are."""
    found = groupings(line.component, shape[0], config.block_q, unit, alignment=how.alignment)
    options = [tile(line, one, shape[1], config, how) for one in found]
    return min(options, key=lambda one: one.cost * (1.1 if one.tiles.row_map is not None else 1.0))


def narrowed(config: KernelConfig, tiles: RowTiles) -> KernelConfig:
    """The configuration with no more rows than tiles have (Triton's matrix products want 16)."""
    return dataclasses.replace(config, block_q=max(16, tiles.block_q))


# -- tables ------------------------------------------------------------------------------------------------------------


def bounds_of(components: Sequence[Component], num_rows: int) -> np.ndarray:
    """BOUNDS: int32 [components, 2, num_rows]."""
    pairs = [[np.broadcast_to(bound, (num_rows,)) for bound in one.bounds] for one in components]
    return np.stack([np.stack(pair) for pair in pairs]).astype(np.int32)


def shifts_of(acsr: ACSR, numbers: Sequence[int], how: How = USUAL) -> np.ndarray:
    """SHIFTS: int32 [components, rows]; rows without values: whatever."""
    first: Sequence[int] | np.ndarray = acsr.offsets
    if how.layout == "tiles":
        counts = np.stack([np.broadcast_to(one.count, acsr.shape[:1]) for one in acsr.components])
        first = row_begins(acsr) + counts.cumsum(axis=0, dtype=np.int64) - counts
    rows = [np.broadcast_to(first[n] - acsr.components[n].bounds[0], acsr.shape[:1]) for n in numbers]
    return np.stack(rows).astype(np.int32)


def row_begins(acsr: ACSR) -> np.ndarray:
    """Where each row's values begin in layout "tiles", whose tiles are single rows: int64 [rows]."""
    return np.cumsum(acsr.row_nnz, dtype=np.int64) - acsr.row_nnz


def phases_of(tiled: Sequence[Tiled]) -> Phases:
    """The phases of a launch that runs all of these."""
    return reduce(Phases.merge, (one.phases for one in tiled))


def padded_rows(tiles: RowTiles, block_q: int) -> np.ndarray:
    """ROWS: int32 [tiles, block_q]."""
    missing = block_q - tiles.rows.shape[1]
    return np.pad(tiles.rows, ((0, 0), (0, missing)), constant_values=tiles.num_rows).astype(np.int32)


def work_of(one: Tiled) -> np.ndarray:
    """How many lattice tiles each row tile has."""
    return np.broadcast_to(one.walk.num_tiles, one.stop.shape)


def longest_first(work: np.ndarray) -> np.ndarray:
    """The order in which row tiles are run: the last programs of a launch are short ones."""
    return np.argsort(-work, kind="stable")
