"""Operations on values in the form the kernels want: row groupings, block sizes and tables, from an ACSR alone.

Each component gets the row tiles that cost it least: neighbours, rows of one residue in steps (transformation
alignment), or the same through a row map. Its span is covered from its first column on, in three phases. Components
that agree in row tiles and stride share a launch of R-SpMM; R-SDDMM takes all of them in one, since each writes values
of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from splat.acsr import ACSR, Component
from splat.geometry import RowTiles, align_by_step, align_rows_of, analyze, is_aligned
from splat.planning.kernels import KernelConfig
from splat.tiling import Test, Walk, cover

#: What the cost of a program is, beside its tiles': about as many scores. (By reasoning, not by measurement.)
_PROGRAM = 4096

#: Up to so many walks are written out one after the other; more are a loop.
UNROLLED_WALKS = 3


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
    """

    component: Component
    tiles: RowTiles
    walk: Walk
    stop: np.ndarray

    @property
    def cost(self) -> float:
        area = max(self.tiles.block_q, 16) * self.walk.block_kv
        return float(self.walk.num_tiles.sum(dtype=np.int64)) * area + self.tiles.num_tiles * _PROGRAM

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


def _test(tests: Sequence[Test]) -> str:
    if not tests:
        return "absent"
    return "both" if tests[0].lower and tests[0].upper else "lower" if tests[0].lower else "upper"


def tile(component: Component, tiles: RowTiles, block_kv: int) -> Tiled:
    span = analyze(component, tiles)
    (walk,) = cover([0], [component.stride], [span], block_kv)
    return Tiled(component, tiles, walk, np.maximum(tiles.largest(component.bounds[1]), 0))


def groupings(component: Component, num_rows: int, block_q: int, unit: int = 1) -> list[RowTiles]:
    """The row tiles to choose from; all have every row. In steps, these are multiples of `unit`."""
    steps = {math.lcm(component.line_step or 1, unit)} | ({unit} if component.stride == 1 else set())
    found = [align_by_step(num_rows, step, block_q) for step in sorted(steps)]
    if component.stride > 1 or component.has_empty_rows:
        some = align_rows_of(component, num_rows, block_q)
        empty = np.flatnonzero(component.count <= 0).astype(np.int32)
        rest = np.pad(empty, (0, -empty.size % some.block_q), constant_values=num_rows)
        row_map = np.concatenate([some.rows, rest.reshape(-1, some.block_q)])
        found.append(RowTiles(num_rows, some.block_q, 1, row_map))
    return [one for one in found if is_aligned(component, one)]


def _best(component: Component, num_rows: int, config: KernelConfig, unit: int = 1) -> Tiled:
    options = [tile(component, one, config.block_kv) for one in groupings(component, num_rows, config.block_q, unit)]
    return min(options, key=lambda one: one.cost * (1.1 if one.tiles.row_map is not None else 1.0))


# -- R-SDDMM -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Sddmm:
    """One launch of `splat_sddmm`.

    Attributes:
      stride: of all components, or 0.
      padded: whether some row has less values than its component is wide.
      tables: TASKS, ROWS, BOUNDS.
    """

    config: KernelConfig
    num_slots: int
    stride: int
    phases: Phases
    padded: bool
    tables: tuple[np.ndarray, ...]


@lru_cache(maxsize=64)
def lower_sddmm(acsr: ACSR, configs: tuple[KernelConfig, ...]) -> Sddmm:
    numbers = [n for n, component in enumerate(acsr.components) if component.width]
    choices = [(config, [_best(acsr.components[n], acsr.shape[0], config) for n in numbers]) for config in configs]
    config, tiled = min(choices, key=lambda choice: sum(one.cost for one in choice[1]))
    tasks = [_tasks(acsr, n, one) for n, one in zip(numbers, tiled, strict=True)]
    rows = [_padded_rows(one.tiles, config.block_q) for one in tiled]
    order = _longest_first([_work(one) for one in tiled])
    table, row_table = np.concatenate(tasks)[order], np.concatenate(rows)[order]
    here = (row_table < acsr.shape[0]).any(axis=1)
    table, row_table = table[here], row_table[here]
    strides = {acsr.components[n].stride for n in numbers}
    phases = tiled[0].phases
    for one in tiled[1:]:
        phases = phases.merge(one.phases)
    padded = bool((table[:, 9] < table[:, 10]).any())
    bounds = bounds_of(acsr.components, acsr.shape[0])
    return Sddmm(
        config, len(table), strides.pop() if len(strides) == 1 else 0, phases, padded, (table, row_table, bounds)
    )


def _tasks(acsr: ACSR, number: int, one: Tiled) -> np.ndarray:
    """TASKS of a component: int32 [tiles, 11]."""
    component, tiles = one.component, one.tiles
    spans = one.spans
    fixed = np.array([number, component.stride, acsr.offsets[number]], np.int32)
    least = tiles.smallest(np.asarray(component.count))
    if tiles.padding is not None:
        least = np.where(tiles.padding, component.width, least)
    ends = np.stack([least, np.full_like(least, component.width)], axis=1)
    return np.concatenate([np.broadcast_to(fixed, (len(spans), 3)), spans, ends], axis=1).astype(np.int32)


# -- R-SpMM ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Spmm:
    """One launch of `splat_spmm`: components that share row tiles and stride.

    Attributes:
      step: rows of a tile are `first + step * n`; 0: they are read from ROWS.
      tile_rows: rows of a tile, not more than config.block_q.
      value_stride: the stride of the component whose values these are; `stride` where not transposed.
      tables: TILES, ROWS, BOUNDS, SHIFTS, SOURCES.
    """

    config: KernelConfig
    step: int
    tile_rows: int
    stride: int
    value_stride: int
    num_slots: int
    num_walks: int
    phases: Phases
    tables: tuple[np.ndarray, ...]

    @property
    def is_unrolled(self) -> bool:
        return self.num_walks <= UNROLLED_WALKS


class _Line(NamedTuple):
    """What is multiplied: a component of the output's rows, whose values those of component `number` are."""

    number: int
    component: Component


@lru_cache(maxsize=128)
def lower_spmm(acsr: ACSR, configs: tuple[KernelConfig, ...], transposed: bool) -> tuple[Spmm, ...]:
    """The launches, in order; each has every row of the output."""
    lines = []
    for n, component in enumerate(acsr.components):
        if component.width:
            seen = ACSR(acsr.shape, (component,)).transpose().components if transposed else (component,)
            lines += [_Line(n, one) for one in seen]
    num_out = acsr.shape[1 if transposed else 0]
    groups: dict[Any, list[_Line]] = {}
    for line in lines:
        value_stride = acsr.components[line.number].stride
        unit = value_stride if transposed else 1
        best = min((_best(line.component, num_out, config, unit) for config in configs), key=lambda one: one.cost)
        own = best.tiles.step if best.tiles.row_map is None else ("map", line)
        groups.setdefault((own, line.component.stride, value_stride), []).append(line)
    return tuple(
        _spmm(acsr, group, own if isinstance(own, int) else None, configs, transposed)
        for (own, _, _), group in groups.items()
    )


def _spmm(
    acsr: ACSR, lines: list[_Line], step: int | None, configs: tuple[KernelConfig, ...], transposed: bool
) -> Spmm:
    num_out = acsr.shape[1 if transposed else 0]
    value_stride = acsr.components[lines[0].number].stride

    def tiled_by(config: KernelConfig) -> list[Tiled]:
        if step is None:
            options = groupings(lines[0].component, num_out, config.block_q, value_stride if transposed else 1)
            return [tile(lines[0].component, options[-1], config.block_kv)]
        tiles = align_by_step(num_out, step, config.block_q)
        return [tile(line.component, tiles, config.block_kv) for line in lines]

    choices = [(config, tiled_by(config)) for config in configs]
    config, tiled = min(choices, key=lambda choice: sum(one.cost for one in choice[1]))
    tiles = tiled[0].tiles
    order = _longest_first([sum((_work(one) for one in tiled[1:]), _work(tiled[0]))])
    rows = _padded_rows(tiles, config.block_q)
    order = order[(rows < num_out).any(axis=1)[order]]
    first = rows[:, :1] if tiles.row_map is None else np.zeros_like(rows[:, :1])
    table = np.concatenate([first, *(one.spans for one in tiled)], axis=1)[order]
    phases = tiled[0].phases
    for one in tiled[1:]:
        phases = phases.merge(one.phases)
    numbers = sorted({line.number for line in lines})
    sources = np.array([numbers.index(line.number) for line in lines], np.int32)
    tables = (
        table, rows[order] if tiles.row_map is not None else np.zeros((1, 1), np.int32),
        bounds_of([line.component for line in lines], num_out), _shifts(acsr, numbers), sources,
    )  # fmt: skip
    return Spmm(
        config, tiles.step if tiles.row_map is None else 0, tiles.block_q, tiled[0].component.stride, value_stride,
        len(order), len(lines), phases, tables,
    )  # fmt: skip


def has_holes(acsr: ACSR, transposed: bool) -> bool:
    """Whether, between the first and the last of those in some pair, a row (transposed) or column is in none."""
    if transposed:
        seen = np.flatnonzero(acsr.row_nnz)
    else:
        seen = np.flatnonzero(_used_columns(acsr))
    return bool(seen.size) and int(seen[-1] - seen[0]) + 1 > seen.size


def _used_columns(acsr: ACSR) -> np.ndarray:
    used = np.zeros(acsr.shape[1], bool)
    for component in acsr.components:
        s, here = component.stride, np.asarray(component.count) > 0
        start, count = np.asarray(component.start)[here], np.asarray(component.count)[here]
        length = -(-acsr.shape[1] // s) * s + s
        change = np.bincount(start, minlength=length) - np.bincount(start + s * count, minlength=length)
        runs = change.reshape(-1, s).cumsum(axis=0).reshape(-1)
        used |= runs[: acsr.shape[1]] > 0
    return used


# -- tables ------------------------------------------------------------------------------------------------------------


def bounds_of(components: Sequence[Component], num_rows: int) -> np.ndarray:
    """BOUNDS: int32 [components, 2, num_rows]."""
    pairs = [[np.broadcast_to(bound, (num_rows,)) for bound in one.bounds] for one in components]
    return np.stack([np.stack(pair) for pair in pairs]).astype(np.int32)


def _shifts(acsr: ACSR, numbers: Sequence[int]) -> np.ndarray:
    """SHIFTS: int32 [components, rows]; rows without values: whatever."""
    rows = [np.broadcast_to(acsr.offsets[n] - acsr.components[n].bounds[0], acsr.shape[:1]) for n in numbers]
    return np.stack(rows).astype(np.int32)


def _padded_rows(tiles: RowTiles, block_q: int) -> np.ndarray:
    missing = block_q - tiles.rows.shape[1]
    return np.pad(tiles.rows, ((0, 0), (0, missing)), constant_values=tiles.num_rows).astype(np.int32)


def _work(one: Tiled) -> np.ndarray:
    return np.broadcast_to(one.walk.num_tiles, one.stop.shape)


def _longest_first(work: Sequence[np.ndarray]) -> np.ndarray:
    return np.argsort(-np.concatenate(work), kind="stable")


__all__ = ["Sddmm", "Spmm", "has_holes", "lower_sddmm", "lower_spmm"]
