"""A schedule in the form the XLA program wants: static facts, and the tables it reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from splat.acsr import NOWHERE
from splat.pattern.core import Array, array_namespace, ceil_div
from splat.planning import Pass, Schedule
from splat.tiling import Test


@dataclasses.dataclass(frozen=True)
class WalkSpec:
    """Static facts of a walk."""

    stride: int
    tests: tuple[Test, ...]


@dataclasses.dataclass(frozen=True)
class PassSpec:
    """Static facts of a pass: sizes, and how its row tiles are spread over `steps` steps of `group` tiles each."""

    num_rows: int
    num_cols: int
    block_q: int
    block_kv: int
    walks: tuple[WalkSpec, ...]
    steps: int
    group: int


#: One pass's arrays, a pytree: see `lower`.
Tables = dict[str, Any]


def lower(schedule: Schedule, scores_per_tile: int, budget_bytes: int) -> tuple[tuple[PassSpec, ...], list[Tables]]:
    """Static facts and tables of every pass.

    Tables, per pass (NumPy for static plans, traced otherwise), row tiles in the plan's order, padded to steps*group:
      rows: int32 [steps, group, block_q], which row each tile row is; num_rows where padded.
      inverse: int32 [num_rows], where each row went; past the end where it is in no tile.
      begin, total, residue: per walk, int32 [steps, group].
      lower, upper: per component tested, int32 [steps, group, block_q].
    """
    lowered = [_lower_pass(schedule, one, scores_per_tile, budget_bytes) for one in schedule.passes]
    kept = [pair for pair in lowered if pair is not None]
    return tuple(spec for spec, _ in kept), [tables for _, tables in kept]


def _lower_pass(schedule: Schedule, one: Pass, heads: int, budget_bytes: int) -> tuple[PassSpec, Tables] | None:
    num_tiles = int(one.order.shape[0])
    if num_tiles == 0:
        return None
    num_rows, num_cols = schedule.acsr.shape
    block_q, block_kv = one.tiles.block_q, one.decision.block_kv
    group = max(1, min(num_tiles, budget_bytes // max(4 * heads * block_q * block_kv, 1)))
    steps = ceil_div(num_tiles, group)
    group = ceil_div(num_tiles, steps)
    xp = array_namespace(one.order)
    missing = steps * group - num_tiles

    def by_step(values: Array, fill: int) -> Array:
        """[tiles, ...] in the plan's order, padded, as [steps, group, ...]."""
        values = xp.asarray(values)[one.order]
        if missing:
            widths = ((0, missing),) + ((0, 0),) * (values.ndim - 1)
            values = xp.pad(values, widths, constant_values=fill)
        return values.reshape(steps, group, *values.shape[1:])

    rows = by_step(one.tiles.rows, num_rows)
    flat = rows.reshape(-1)
    slots = np.arange(flat.shape[0], dtype=np.int32)
    if xp is np:
        inverse = np.full(num_rows + 1, flat.shape[0], np.int32)
        inverse[flat] = slots
    else:
        inverse = xp.full(num_rows + 1, flat.shape[0], np.int32).at[flat].set(slots)
    components = sorted({test.component for walk in one.walks for test in walk.tests})
    bounds = {str(n): _bounds(schedule, n, rows) for n in components}
    tables: Tables = {
        "rows": rows,
        "inverse": inverse[:num_rows],
        "begin": [by_step(walk.begin, 0) for walk in one.walks],
        "total": [by_step(walk.num_tiles, 0) for walk in one.walks],
        "residue": [by_step(walk.residue, 0) for walk in one.walks],
        "bounds": bounds,
    }
    walks = tuple(WalkSpec(w.stride, w.tests) for w in one.walks)
    return PassSpec(num_rows, num_cols, block_q, block_kv, walks, steps, group), tables


def _bounds(schedule: Schedule, component: int, rows: Array) -> tuple[Array, Array]:
    """(lower, upper) of every tile row; padded rows have none."""
    lower, upper = schedule.acsr.components[component].bounds
    xp = array_namespace(lower, rows)
    inside = rows < lower.shape[0]
    at = xp.where(inside, rows, 0)
    return xp.where(inside, xp.asarray(lower)[at], NOWHERE), xp.where(inside, xp.asarray(upper)[at], -NOWHERE)
