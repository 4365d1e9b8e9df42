"""A schedule in the form the kernels want: static facts, which the generated text depends on, and tables.

The facts leave out every length and count, so that one kernel serves all lengths of a pattern that have its phases.
The tables are NumPy arrays for static plans, traced arrays for run-time ones; `kernels.tiles` says what they hold.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from splat.pattern.core import Array, array_namespace, ceil_div
from splat.planning import Pass, Schedule
from splat.tiling import Test, Walk

#: Triton's matrix products want at least this many rows and columns.
SMALLEST_BLOCK = 16

#: Up to so many walks are written out one after the other; more are a loop over a table.
UNROLLED_WALKS = 3

#: A program makes two tensor memory descriptors for each walk, which takes about as long as a tile; fewer tiles a walk
#: are read through pointers. (By reasoning, not by measurement.)
LONG = 4


@dataclasses.dataclass(frozen=True)
class WalkFacts:
    """Static facts of a walk. Tests name rows of BOUNDS; an empty tuple: the phase does not exist."""

    stride: int
    left: tuple[Test, ...]
    full: bool
    right: tuple[Test, ...]


@dataclasses.dataclass(frozen=True)
class PassFacts:
    """Static facts of a pass.

    Attributes:
      step: rows of a tile are `first + step * n`; None: they are read from ROWS.
      walks: one after the other; empty where `looped` is set.
      looped: (stride or None where walks differ, tests a walk): the pass is a loop over its walks.
      covers_rows: whether every row is in exactly one tile, so that results can be written in place.
    """

    step: int | None
    walks: tuple[WalkFacts, ...]
    looped: tuple[int | None, int] | None
    covers_rows: bool

    @property
    def has_tests(self) -> bool:
        return bool(self.looped and self.looped[1]) or any(walk.left or walk.right for walk in self.walks)


@dataclasses.dataclass(frozen=True)
class PassSpec:
    """Everything static about a pass.

    Attributes:
      tile_rows, block_q, block_kv: rows of the plan's tiles, and the kernel's block sizes.
      num_slots, num_walks: row tiles that are run, and walks.
      is_long: whether a walk has `LONG` tiles on average (or how many is not known yet).
      longest: tiles of the longest row tile; at most, where it is not known yet.
      slot_rows: rows that a slot has in results that are to be merged.
      parts: so many slots share the tiles of a row tile; see `parts.in_parts`.
    """

    facts: PassFacts
    tile_rows: int
    block_q: int
    block_kv: int
    num_slots: int
    num_walks: int
    is_long: bool
    longest: int
    slot_rows: int
    parts: int = 1

    @property
    def result_rows(self) -> int:
        """Rows of results that are to be merged."""
        return self.num_slots * self.slot_rows


#: Tables by name, int32: those of `kernels.tiles` that the pass's kernels read, and, where its results will be merged,
#: SLOTS [num_rows]: the slot row of every row (slot * slot_rows + row of the tile), -1: it is in no tile.
Tables = dict[str, Any]


def lower(schedule: Schedule) -> tuple[tuple[PassSpec, ...], list[Tables]]:
    """Static facts and tables of every pass that has something to do.

    The last one has every row in a tile, if any has: it merges the others' results into its own. Among those it is the
    one with the largest step: the others' results are written by slot, and it would have most slots without a row.
    """
    passes = [one for one in schedule.passes if one.order.shape[0] and one.walks]
    passes.sort(key=lambda one: one.tiles.step if one.tiles.row_map is None else 0)  # 0: some rows are in no tile
    lowered = [_lower_pass(schedule, one) for one in passes]
    for spec, tables in lowered[: -1 if lowered and lowered[-1][0].facts.covers_rows else None]:
        tables["SLOTS"] = slots_of(spec, tables, schedule.acsr.shape[0], spec.slot_rows)
    return tuple(spec for spec, _ in lowered), [tables for _, tables in lowered]


def _lower_pass(schedule: Schedule, one: Pass) -> tuple[PassSpec, Tables]:
    num_rows = schedule.acsr.shape[0]
    tile_rows = one.tiles.block_q
    block_q = max(SMALLEST_BLOCK, one.decision.block_q)
    order = _complete(one)
    tested = sorted({test.component for walk in one.walks for test in walk.head_tests + walk.tail_tests})
    looped = len(one.walks) > UNROLLED_WALKS
    walks = tuple(_walk_facts(walk, tested) for walk in one.walks)
    tests = max((len(_all_tests(walk)) for walk in walks), default=0)
    strides = {walk.stride for walk in walks}
    # A row that is alone in its tile needs no step: there are as many as rows, where a stride is longer than these.
    step = one.tiles.step if tile_rows > 1 else 1
    facts = PassFacts(
        step=step if one.tiles.row_map is None else None,
        walks=() if looped else walks,
        looped=(strides.pop() if len(strides) == 1 else None, tests) if looped else None,
        covers_rows=one.tiles.row_map is None,
    )
    tables: Tables = {"TILES": _tiles(schedule, one, order)}
    if facts.step is None:
        tables["ROWS"] = _padded(one.tiles.rows[order], block_q, num_rows)
    if facts.has_tests:
        tables["BOUNDS"] = _bounds(schedule, tested)
    if looped:
        tables["WALKS"] = _walk_table(walks, tests)
    is_long = not one.is_static or one.num_tiles >= LONG * order.shape[0] * len(one.walks)
    spec = PassSpec(
        facts, tile_rows, block_q, one.decision.block_kv, int(order.shape[0]), len(one.walks), is_long,
        longest=_longest(schedule, one), slot_rows=block_q,
    )  # fmt: skip
    return spec, tables


def _longest(schedule: Schedule, one: Pass) -> int:
    """See `PassSpec`."""
    if one.is_static:
        return int(np.max(sum(walk.num_tiles for walk in one.walks), initial=0))
    return sum(ceil_div(ceil_div(schedule.acsr.shape[1], walk.stride), walk.block_kv) for walk in one.walks)


def slots_of(spec: PassSpec, tables: Tables, num_rows: int, slot_rows: int) -> Array:
    """SLOTS, see `Tables`."""
    tiles = tables["TILES"]
    xp = array_namespace(tiles)
    if spec.facts.step is None:
        rows = tables["ROWS"][:, :slot_rows]
    else:
        n = np.arange(slot_rows, dtype=np.int32)[None]
        rows = tiles[:, :1] + spec.facts.step * n
        rows = xp.where((n < spec.tile_rows) & (rows < num_rows), rows, num_rows)
    flat = rows.reshape(-1)
    position = np.arange(flat.shape[0], dtype=np.int32)
    if xp is np:
        out = np.full(num_rows + 1, -1, np.int32)
        out[flat] = position
    else:
        out = xp.full(num_rows + 1, -1, np.int32).at[flat].set(position)
    return out[:num_rows]


def _complete(one: Pass) -> Array:
    """The pass's order, with the tiles that have no work behind it where tiles are written in place."""
    if not isinstance(one.order, np.ndarray) or one.tiles.row_map is not None:
        return one.order
    idle = np.ones(one.tiles.num_tiles, bool)
    idle[one.order] = False
    if one.tiles.padding is not None:
        idle &= ~one.tiles.padding
    return np.concatenate([one.order, np.flatnonzero(idle).astype(np.int32)])


def _walk_facts(walk: Walk, tested: list[int]) -> WalkFacts:
    def named(tests: tuple[Test, ...]) -> tuple[Test, ...]:
        return tuple(Test(tested.index(test.component), test.lower, test.upper) for test in tests)

    full = not isinstance(walk.num_full, np.ndarray) or bool(walk.num_full.any())
    return WalkFacts(walk.stride, named(walk.head_tests), full, named(walk.tail_tests))


def _all_tests(walk: WalkFacts) -> list[int]:
    """The rows of BOUNDS that some phase of the walk looks at."""
    return sorted({test.component for test in walk.left + walk.right})


def _walk_table(walks: tuple[WalkFacts, ...], tests: int) -> np.ndarray:
    """int32 [walks, 1 + tests]: stride, and rows of BOUNDS; the first again where a walk has fewer tests.

    A walk without any test has full tiles only, and never looks.
    """
    table = []
    for walk in walks:
        which = _all_tests(walk)
        table.append([walk.stride, *(which + (which[:1] or [0]) * tests)[:tests]])
    return np.array(table, np.int32)


def _tiles(schedule: Schedule, one: Pass, order: Array) -> Array:
    """TILES: int32 [slots, 1 + 6 * walks]."""
    xp = array_namespace(order, one.walks[0].begin)
    if one.tiles.row_map is None:
        per_group = one.tiles.tiles_per_group
        first = order // per_group + order % per_group * (one.tiles.block_q * one.tiles.step)
    else:
        first = xp.zeros_like(order)
    columns = [first]
    for walk in one.walks:
        begin, head, full, tail, residue = (
            xp.asarray(values)[order]
            for values in (walk.begin, walk.num_head, walk.num_full, walk.num_tail, walk.residue)
        )
        x1 = begin + head * walk.block_kv
        x2 = x1 + full * walk.block_kv
        x3 = x2 + tail * walk.block_kv
        stop = xp.minimum(x3, xp.asarray(_last_column(schedule, one, walk))[order])
        columns += [begin, x1, x2, x3, stop, residue]
    return xp.stack([xp.asarray(column).astype(np.int32) for column in columns], axis=1)


def _last_column(schedule: Schedule, one: Pass, walk: Walk) -> Array:
    """int32 [tiles]: past the last lattice column that a tile of the walk attends to.

    A walk's tiles also serve later components of its chain, so the ends of all components it tests count.
    """
    every = {walk.component} | {test.component for test in walk.tests}
    ends = [one.tiles.largest(schedule.acsr.components[n].bounds[1]) for n in sorted(every)]
    xp = array_namespace(*ends)
    last = ends[0]
    for end in ends[1:]:
        last = xp.maximum(last, end)
    return xp.maximum(last, 0)


def _padded(rows: np.ndarray, block_q: int, num_rows: int) -> np.ndarray:
    missing = block_q - rows.shape[1]
    return np.pad(rows, ((0, 0), (0, missing)), constant_values=num_rows).astype(np.int32)


def _bounds(schedule: Schedule, tested: list[int]) -> Array:
    """BOUNDS: int32 [tests, 2, num_rows]."""
    pairs = [schedule.acsr.components[n].bounds for n in tested]
    xp = array_namespace(*(bound for pair in pairs for bound in pair))
    num_rows = schedule.acsr.shape[0]
    return xp.stack([xp.stack([xp.broadcast_to(xp.asarray(b), (num_rows,)) for b in pair]) for pair in pairs])
