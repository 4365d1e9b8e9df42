"""Operations on values in the form the kernels want: launches' static facts and tables, from an ACSR alone.

Components that agree in row tiles and stride share a launch of R-SpMM; R-SDDMM takes all of them in one, since each
writes values of its own. Matrices are static, so that all of this is NumPy, and remembered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from splat.acsr import ACSR, Component
from splat.codegen.base import USUAL, How, kept_with_matrix
from splat.codegen.triton.values_tiles import (
    Line,
    Phases,
    Tiled,
    area,
    best_tiling,
    bounds_of,
    groupings,
    line_of,
    longest_first,
    narrowed,
    padded_rows,
    phases_of,
    shifts_of,
    tile,
    work_of,
)
from splat.errors import IrregularPatternError
from splat.geometry import RowTiles, align_by_step
from splat.planning.kernels import KernelConfig

#: Up to so many walks are written out one after the other; more are a loop.
UNROLLED_WALKS = 3

#: What a tile costs more where each row's bounds are looked at.
_MASKED = 1.5


# -- R-SDDMM -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Sddmm:
    """One launch of `splat_sddmm`.

    Attributes:
      stride: of all components, or 0.
      hops: whether rows are not aligned, so that their columns lie `stride` apart among all that are visited.
      padded: whether some row has less values than its component is wide.
      ragged: whether some tile has less rows than the kernel's.
      tables: TASKS, ROWS, BOUNDS.
    """

    config: KernelConfig
    num_slots: int
    stride: int
    hops: bool
    phases: Phases
    padded: bool
    ragged: bool
    tables: tuple[np.ndarray, ...]


@kept_with_matrix
def lower_sddmm(acsr: ACSR, configs: tuple[KernelConfig, ...], how: How = USUAL) -> Sddmm:
    lines = [line_of(acsr, n, how) for n, component in enumerate(acsr.components) if component.width]
    choices = [(config, [best_tiling(line, acsr.shape, config, how=how) for line in lines]) for config in configs]
    config, tiled = min(choices, key=lambda choice: sum(one.cost for one in choice[1]))
    tasks = [_tasks(acsr, line.number, one, how) for line, one in zip(lines, tiled, strict=True)]
    rows = [padded_rows(one.tiles, config.block_q) for one in tiled]
    order = longest_first(np.concatenate([work_of(one) for one in tiled]))
    table, row_table = np.concatenate(tasks)[order], np.concatenate(rows)[order]
    here = np.any(row_table < acsr.shape[0], axis=1)
    table, row_table = table[here], row_table[here]
    strides = {acsr.components[line.number].stride for line in lines}
    packed = how.layout == "tiles"
    padded = not packed and bool((table[:, 9] < table[:, 10]).any())
    numbers = range(len(acsr.components))
    bounds = bounds_of([line_of(acsr, n, how).component for n in numbers], acsr.shape[0])
    if packed:
        bounds = np.concatenate([bounds.reshape(-1, acsr.shape[0]), shifts_of(acsr, numbers, how)])
    hops = any(line.hop > 1 for line in lines)
    stride = strides.pop() if len(strides) == 1 else 0
    ragged = bool((row_table == acsr.shape[0]).any())
    return Sddmm(config, len(table), stride, hops, phases_of(tiled), padded, ragged, (table, row_table, bounds))


def _tasks(acsr: ACSR, number: int, one: Tiled, how: How) -> np.ndarray:
    """TASKS of a component: int32 [tiles, 11]."""
    component, tiles, spans = acsr.components[number], one.tiles, one.spans
    place = 2 * len(acsr.components) + number if how.layout == "tiles" else acsr.offsets[number]
    fixed = np.array([number, component.stride, place], np.int32)
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
      value_stride: the stride of the component whose values these are; `stride` where not transposed, but without
        alignment.
      ragged: whether some tile has less rows than the kernel's.
      tables: TILES, ROWS, BOUNDS, SHIFTS, SOURCES.
    """

    config: KernelConfig
    step: int
    tile_rows: int
    stride: int
    value_stride: int
    num_slots: int
    num_walks: int
    ragged: bool
    phases: Phases
    tables: tuple[np.ndarray, ...]

    @property
    def is_unrolled(self) -> bool:
        return self.num_walks <= UNROLLED_WALKS


@kept_with_matrix
def lower_spmm(acsr: ACSR, configs: tuple[KernelConfig, ...], transposed: bool, how: How = USUAL) -> tuple[Spmm, ...]:
    """The launches, in order; each has every row of the output."""
    lines: list[Line] = []
    by_row: dict[int, list[int]] = {}
    for n, component in enumerate(acsr.components):
        if not component.width:
            continue
        seen = _transposed(acsr, n, configs, how) if transposed else [line_of(acsr, n, how)]
        if seen is None:
            by_row.setdefault(component.stride, []).append(n)
        else:
            lines += seen
    shape = _shape(acsr, transposed)
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        value_stride = acsr.components[line.number].stride
        unit = value_stride if transposed else 1
        best = min((best_tiling(line, shape, config, unit, how) for config in configs), key=lambda one: one.cost)
        own = best.tiles.step if best.tiles.row_map is None else ("map", line)
        groups.setdefault((own, line.component.stride, value_stride), []).append(line)
    regular = [
        _spmm(acsr, group, own if isinstance(own, int) else None, configs, transposed, how)
        for (own, _, _), group in groups.items()
    ]
    return (*regular, *(_spmm_by_row(acsr, numbers, configs[0], how) for numbers in by_row.values()))


def _shape(acsr: ACSR, transposed: bool) -> tuple[int, int]:
    return (acsr.shape[1], acsr.shape[0]) if transposed else acsr.shape


def _transposed(acsr: ACSR, number: int, configs: Sequence[KernelConfig], how: How) -> list[Line] | None:
    """The component seen from its columns; None where it is quicker to look at each row's bounds, or the only way."""
    component, num_cols = acsr.components[number], acsr.shape[1]
    try:
        seen = [Line(number, one) for one in ACSR(acsr.shape, (component,)).transpose().components]
    except IrregularPatternError:
        return None
    if not how.alignment and max(component.stride, *(line.component.stride for line in seen)) > 1:
        return None  # neighbouring columns are not in the same rows
    if len(seen) <= UNROLLED_WALKS:
        return seen
    config, tiles = configs[0], align_by_step(num_cols, component.stride, configs[0].block_q)
    first, last = _rows_met(component, tiles, acsr.shape[0])
    met = -(-(last - first) // config.block_kv)
    limit = _MASKED * float(met.sum(dtype=np.int64)) * area(narrowed(config, tiles).block_q, config.block_kv)
    cost = sum(best_tiling(line, _shape(acsr, True), config, component.stride, how).cost for line in seen)
    return seen if cost < limit else None


def _spmm(
    acsr: ACSR, lines: list[Line], step: int | None, configs: tuple[KernelConfig, ...], transposed: bool, how: How
) -> Spmm:
    num_out, num_in = _shape(acsr, transposed)
    value_stride = acsr.components[lines[0].number].stride

    def tiled_by(config: KernelConfig) -> tuple[KernelConfig, list[Tiled]]:
        if step is None:
            tiles = groupings(lines[0].component, num_out, config.block_q, value_stride if transposed else 1)[-1]
        else:
            tiles = align_by_step(num_out, step, config.block_q)
        config = narrowed(config, tiles)
        return config, [tile(line, tiles, num_in, config, how) for line in lines]

    config, tiled = min(map(tiled_by, configs), key=lambda choice: sum(one.cost for one in choice[1]))
    tiles = tiled[0].tiles
    order = longest_first(np.sum([work_of(one) for one in tiled], axis=0))
    rows = padded_rows(tiles, config.block_q)
    order = order[np.any(rows < num_out, axis=1)[order]]
    first = rows[:, :1] if tiles.row_map is None else np.zeros_like(rows[:, :1])
    table = np.concatenate([first, *(one.spans for one in tiled)], axis=1)[order]
    numbers = sorted({line.number for line in lines})
    sources = np.array([numbers.index(line.number) for line in lines], np.int32)
    tables = (
        table, rows[order] if tiles.row_map is not None else np.zeros((1, 1), np.int32),
        bounds_of([line.component for line in lines], num_out), shifts_of(acsr, numbers, how), sources,
    )  # fmt: skip
    return Spmm(
        config, tiles.step if tiles.row_map is None else 0, tiles.block_q, tiled[0].component.stride, value_stride,
        len(order), len(lines), bool((rows[order] == num_out).any()), phases_of(tiled), tables,
    )  # fmt: skip


def _spmm_by_row(acsr: ACSR, numbers: list[int], config: KernelConfig, how: How) -> Spmm:
    """Transposed, of components of one stride whose columns are not regular: all rows from the first that a tile meets
    to the last."""
    num_rows, num_cols = acsr.shape
    components = [acsr.components[n] for n in numbers]
    stride = components[0].stride
    lines = [line_of(acsr, n, how) for n in numbers]
    tiles = align_by_step(num_cols, lines[0].component.stride, config.block_q)
    config = narrowed(config, tiles)
    spans, work = [tiles.rows[:, :1]], np.zeros(tiles.num_tiles, np.int32)
    for line in lines:
        first, last = _rows_met(line.component, tiles, num_rows)
        if not how.spans:
            first, last = np.zeros_like(first), np.where(last > first, num_rows, 0).astype(np.int32)
        elif not how.posets:
            first = first // config.block_kv * config.block_kv
        spans.append(np.stack([first, last, last, last, last, np.zeros_like(first)], axis=1))
        work += last - first
    order = longest_first(work)
    order = order[np.any(tiles.rows < num_cols, axis=1)[order]]
    residues = [np.broadcast_to(one.residue, (1, 1, num_rows)).astype(np.int32) for one in components]
    bounds = np.concatenate([bounds_of(components, num_rows), np.concatenate(residues)], axis=1)
    # The kernel takes steps for multiples of the values' stride.
    by_map = tiles.step % stride != 0
    return Spmm(
        config, 0 if by_map else tiles.step, tiles.block_q, 1, stride, len(order), len(numbers), True,
        Phases("rows", False, "absent"),
        (np.concatenate(spans, axis=1).astype(np.int32)[order],
         padded_rows(tiles, config.block_q)[order] if by_map else np.zeros((1, 1), np.int32), bounds,
         shifts_of(acsr, numbers, how), np.arange(len(numbers), dtype=np.int32)),
    )  # fmt: skip


def _rows_met(component: Component, tiles: RowTiles, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The first row that meets each tile of columns, in steps of the component's stride, and past the last: [tiles]."""
    here = np.flatnonzero(component.count > 0)
    lower, upper = (np.broadcast_to(bound, (num_rows,))[here] for bound in component.bounds)
    base = np.broadcast_to(component.residue, (num_rows,))[here] * tiles.tiles_per_group
    begin, end = base + lower // tiles.block_q, base + (upper - 1) // tiles.block_q + 1
    first, last = np.zeros(tiles.num_tiles, np.int32), np.zeros(tiles.num_tiles, np.int32)
    met = list(zip(here.tolist(), begin.tolist(), end.tolist(), strict=True))
    for row, a, b in reversed(met):
        first[a:b] = row
    for row, a, b in met:
        last[a:b] = row + 1
    return first, last


def has_holes(acsr: ACSR, transposed: bool, how: How = USUAL) -> bool:
    """Whether a row (transposed) or column that is visited is in no pair: one between the first and the last that are,
    or any, where more than spans is visited."""
    used = acsr.row_nnz > 0 if transposed else _used_columns(acsr)
    if not (how.spans and how.posets):
        return not used.all()
    seen = np.flatnonzero(used)
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


__all__ = ["Sddmm", "Spmm", "has_holes", "lower_sddmm", "lower_spmm"]
