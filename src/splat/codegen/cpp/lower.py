"""A schedule in the form the C++ kernels want: static facts, which the generated text depends on, and tables.

The facts leave out every length and count, so that one kernel serves all lengths of a pattern that have its phases.
The tables are NumPy arrays for static plans, traced arrays for run-time ones; `include/splat/call.hpp` says what they
hold.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from splat.acsr import ACSR
from splat.errors import ArgumentError
from splat.geometry import analyze
from splat.geometry.alignment import next_power_of_two
from splat.pattern.core import Array, array_namespace
from splat.planning import Pass, Plan, Schedule
from splat.planning.cost import CPP_TILE
from splat.tiling import Test, Walk, cover

#: Rows of a group: one to a lane of the kernels' vectors.
GROUP, COLUMN = CPP_TILE

#: The step of rows that are alone in their groups, where a stride is longer than there are rows: one text for all.
ALONE = 1 << 30

#: Up to so many walks are written out one after the other; more are a loop, where they are alike.
UNROLLED_WALKS = 8


@dataclasses.dataclass(frozen=True)
class WalkFacts:
    """Static facts of a walk.

    Attributes:
      stride: of its columns.
      full: whether some group may have columns that all its rows attend to.
      edges: whether some group may have columns that only some of its rows attend to, which `tests` tell.
      tests: name rows of BOUNDS; a pair is kept where any of them holds.
    """

    stride: int
    full: bool
    edges: bool
    tests: tuple[Test, ...]


@dataclasses.dataclass(frozen=True)
class PassFacts:
    """Static facts of a pass.

    Attributes:
      step: group n holds rows at distances of `step`, or one row where it is `ALONE`; None: they are read from ROWS.
      num_tests: rows of BOUNDS; 0: there is no such table.
      walks: one after the other; the only one where `loop` is set.
      loop: so many walks are alike, and walk w compares with row w of BOUNDS (`walks[0].tests` says how); the last of
        them may have no work.
    """

    step: int | None
    num_tests: int
    walks: tuple[WalkFacts, ...]
    loop: int | None = None

    @property
    def num_walks(self) -> int:
        return self.loop or len(self.walks)

    @property
    def covers_rows(self) -> bool:
        """Whether every row is in exactly one group."""
        return self.step is not None

    @property
    def table_names(self) -> tuple[str, ...]:
        """What the kernels read of this pass, in the order of their operands."""
        return ("GROUPS", *(("BOUNDS",) if self.num_tests else ()), *(("ROWS",) if self.step is None else ()))


#: One pass's tables in the order of `PassFacts.table_names`, int32.
Tables = list[Any]

#: Static facts and tables of every pass that has something to do.
Lowered = tuple[tuple[PassFacts, ...], list[Tables]]


def lower(schedule: Schedule) -> Lowered:
    """Static facts and tables of every pass that has something to do.

    A pass that covers every row comes first, if there is one: later ones merge their results into what is there.
    """
    passes = [one for one in schedule.passes if one.order.shape[0] and one.walks]
    lowered = [_lower_pass(schedule, one) for one in passes]
    lowered.sort(key=lambda pair: not pair[0].covers_rows)
    return tuple(facts for facts, _ in lowered), [tables for _, tables in lowered]


def _lower_pass(schedule: Schedule, one: Pass) -> tuple[PassFacts, Tables]:
    if one.tiles.block_q > GROUP or one.decision.block_kv != COLUMN:
        raise ArgumentError(
            f"the C++ kernels work on {GROUP} rows by {COLUMN} column, but this plan has tiles of "
            f"{one.tiles.block_q} x {one.decision.block_kv}. Plan with implementation='cpp'."
        )
    walks, loop = one.walks, None
    if len(walks) > UNROLLED_WALKS and len({walk.stride for walk in walks}) == 1:
        # There may be more of them in longer sequences: up to the next power of two, they share one text.
        walks = _alike(schedule.acsr, one)
        loop = next_power_of_two(len(walks))
    tested = _tested(walks, loop)
    facts = tuple(_walk_facts(walk, tested) for walk in walks)
    if loop:
        full, edges = any(walk.full for walk in facts), any(walk.edges for walk in facts)
        facts = (WalkFacts(facts[0].stride, full, edges, (Test(0, True, True),) if edges else ()),)
        tested = tested if edges else []
    num_rows = schedule.acsr.shape[0]
    step = one.tiles.step if one.tiles.row_map is None else None
    if step is not None and step >= num_rows > 1:
        step = ALONE
    tables = [_groups(one, walks, loop or len(walks))]
    if tested:
        tables.append(_bounds(schedule.acsr, tested))
    if step is None:
        tables.append(_padded(one.tiles.rows, num_rows))
    return PassFacts(step, len(tested), facts, loop), tables


def _alike(acsr: ACSR, one: Pass) -> tuple[Walk, ...]:
    """One walk for each component of the pass, each on its own: columns that two of them meet are visited twice."""
    walks = []
    for n in sorted(one.decision.components):
        component = acsr.components[n]
        walks += cover([n], [component.stride], [analyze(component, one.tiles)], COLUMN)
    return tuple(walks)


def _tested(walks: tuple[Walk, ...], loop: int | None) -> list[int]:
    """The components that are compared with, in the order of BOUNDS."""
    if loop:  # a row for each, those without work too
        return [walk.component for walk in walks] + [walks[-1].component] * (loop - len(walks))
    return sorted({test.component for walk in walks for test in walk.tests})


def _walk_facts(walk: Walk, tested: list[int]) -> WalkFacts:
    tests = tuple(Test(tested.index(test.component), test.lower, test.upper) for test in walk.tests)
    full = not isinstance(walk.num_full, np.ndarray) or bool(walk.num_full.any())
    return WalkFacts(walk.stride, full, bool(tests), tests)


def _groups(one: Pass, walks: tuple[Walk, ...], num_walks: int) -> Array:
    """GROUPS: int32 [groups, walks, 5], in the order of rows; all 0 where a group has nothing to do in a walk."""
    xp = array_namespace(*(walk.begin for walk in walks))
    columns = []
    for walk in walks:
        x0, x1 = walk.begin, walk.begin + walk.num_head
        x2 = x1 + walk.num_full
        numbers = xp.stack([x0, x1, x2, x2 + walk.num_tail, xp.asarray(walk.residue)], axis=1)
        columns.append(xp.where(xp.asarray(walk.num_tiles > 0)[:, None], numbers, 0))
    columns += [xp.zeros_like(columns[0])] * (num_walks - len(columns))
    return xp.stack(columns, axis=1).astype(np.int32)


def _bounds(acsr: ACSR, tested: list[int]) -> Array:
    """BOUNDS: int32 [tests, 2, num_rows]."""
    pairs = [acsr.components[n].bounds for n in tested]
    xp = array_namespace(*(bound for pair in pairs for bound in pair))
    num_rows = acsr.shape[0]
    rows = [xp.stack([xp.broadcast_to(xp.asarray(b), (num_rows,)) for b in pair]) for pair in pairs]
    return xp.stack(rows).astype(np.int32)


def _padded(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """ROWS: int32 [groups, 16]; `num_rows` where a group has fewer rows."""
    return np.pad(rows, ((0, 0), (0, GROUP - rows.shape[1])), constant_values=num_rows).astype(np.int32)


# -- what lies between -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Holes:
    """Whether some position between the first and the last that are in a pair is in none.

    NaN and infinity there must reach no result, so the kernels look whether any row of a group keeps a column.
    """

    queries: bool
    keys: bool


#: Of plans whose numbers are not known yet.
UNKNOWN = Holes(True, True)


def holes_of(plan: Plan) -> Holes:
    """Of a static plan."""
    rows = np.flatnonzero(plan.acsr.row_nnz)
    first, stop, count = plan.acsr.seen_columns
    return Holes(rows.size > 0 and int(rows[-1] - rows[0]) + 1 > rows.size, stop - first > count)


#: kernel -> the plan's schedule that it follows, where that is not its own name.
SCHEDULE_OF = {"decode": "forward", "backward": "d_query"}


def passes_of(plan: Plan, kernel: str) -> Lowered:
    """What a kernel of a static plan is called with; remembered."""
    if kernel == "decode":
        return (), runs_of(plan.acsr)
    schedule = SCHEDULE_OF.get(kernel, kernel)
    return plan.remembered(("cpp", schedule), lambda: lower(getattr(plan, schedule)))


def runs_of(acsr: ACSR) -> list[Tables]:
    """RUNS, int32 [rows, 3 * components], the only table of "decode"; none where there is no component."""
    if not acsr.components:
        return []
    columns = [x for c in acsr.components for x in (np.full(acsr.shape[0], c.stride, np.int32), c.start, c.count)]
    return [[array_namespace(*columns).stack(columns, axis=1)]]


def counts_of(kernel: str, tables: list[Tables]) -> list[int]:
    """`num_groups` of a call whose batch entries have the same tables."""
    return [tables[0][0].shape[1] // 3, 0] if kernel == "decode" else [len(one[0]) for one in tables]
