"""Passes: which components share a row grouping, with which tile sizes, in which order.

A window wants neighbouring rows in a tile, a stride wants rows of one residue. Components that agree share a pass;
passes are merged exactly through their log-sum-exp. `choose` decides with the cost model, `build_schedule` spells the
decisions out; the numbers that generators need are all in its result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np

from splat.acsr import ACSR
from splat.errors import PatternError
from splat.geometry import RowTiles, Spans, align_by_step, align_rows_of, analyze, is_aligned
from splat.pattern.core import Array, array_namespace
from splat.planning.cost import CostModel
from splat.tiling import Phase, Walk, chains, cover

#: Spans are first taken at this many rows a tile (fewer where a model has smaller tiles only); larger tiles are merged
#: from them, which costs next to nothing.
BASE_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class PassDecision:
    """One pass: its components, row grouping and tile sizes. Row tiles may hold fewer than `block_q` rows.

    `step` groups all rows modulo a number; None: only the rows that component `rows_of` has runs in, by residue.
    """

    components: tuple[int, ...]
    step: int | None
    block_q: int
    block_kv: int
    rows_of: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """Row tiles and the walks of its components.

    Attributes:
      decision: what was decided; static facts.
      tiles: the row tiles.
      walks: one per component of the pass.
      order: int32, row tiles in the order to run them: longest first; tiles without work are left out where known.
    """

    decision: PassDecision
    tiles: RowTiles
    walks: tuple[Walk, ...]
    order: Array

    @property
    def is_static(self) -> bool:
        return isinstance(self.order, np.ndarray)

    def count(self, phase: Phase) -> int:
        return sum(int(getattr(w, f"num_{phase.value}").sum(dtype=np.int64)) for w in self.walks)

    @property
    def num_tiles(self) -> int:
        return sum(self.count(phase) for phase in Phase)

    @property
    def area(self) -> int:
        """Scores computed: tiles times their area."""
        return self.num_tiles * self.decision.block_q * self.decision.block_kv

    def __str__(self) -> str:
        d = self.decision
        what = ", ".join(str(c) for c in d.components)
        size = f"{d.block_q} x {d.block_kv} tiles"
        counts = (
            ""
            if not self.is_static
            else (
                f", {self.num_tiles} tiles: {self.count(Phase.FULL)} full, "
                f"{self.num_tiles - self.count(Phase.FULL)} partial"
            )
        )
        return f"components {what}: {self.tiles}, {size}{counts}"


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A matrix and the passes that cover it: each non-zero is kept by exactly one tile."""

    acsr: ACSR
    passes: tuple[Pass, ...]

    @property
    def decisions(self) -> tuple[PassDecision, ...]:
        return tuple(p.decision for p in self.passes)

    @property
    def is_static(self) -> bool:
        return all(p.is_static for p in self.passes)

    @cached_property
    def area(self) -> int:
        return sum(p.area for p in self.passes)

    @property
    def waste(self) -> float:
        """Scores computed / non-zeros; 1.0 is perfect (and what a matrix without non-zeros has)."""
        return self.area / self.acsr.nnz if self.acsr.nnz else 1.0

    def coverage(self) -> np.ndarray:
        """How often each pair is kept, int32 [rows, cols]: what the kernels would do, tile by tile. For tests."""
        counts = np.zeros(self.acsr.shape, np.int32)
        for row, col, _, keep in self.each_tile():
            np.add.at(counts, (np.broadcast_to(row, keep.shape)[keep], np.broadcast_to(col, keep.shape)[keep]), 1)
        return counts

    def to_dense(self) -> np.ndarray:
        """The mask, bool [rows, cols]. Raises PatternError where a pair is kept twice."""
        counts = self.coverage()
        if (counts > 1).any():
            raise PatternError("this schedule keeps a pair more than once")
        return counts.astype(bool)

    def each_tile(self):
        """Yields (rows [block_q, 1], cols [1, block_kv], phase, keep [block_q, block_kv]) for every tile, in order."""
        bounds = [c.bounds for c in self.acsr.components]
        for one in self.passes:
            for tile, walk in itertools.product(one.order, one.walks):
                row = one.tiles.rows[tile]
                missing = one.decision.block_q - row.size
                row = np.pad(row, (0, missing), constant_values=self.acsr.shape[0])[:, None]
                valid = row < self.acsr.shape[0]
                at = np.where(valid, row, 0)
                phases = [Phase.HEAD] * int(walk.num_head[tile]) + [Phase.FULL] * int(walk.num_full[tile])
                phases += [Phase.TAIL] * int(walk.num_tail[tile])
                for t, phase in enumerate(phases):
                    x = (int(walk.begin[tile]) + t * walk.block_kv + np.arange(walk.block_kv))[None, :]
                    col = int(walk.residue[tile]) + walk.stride * x
                    tests = walk.head_tests if phase is Phase.HEAD else walk.tail_tests
                    keep = np.full((row.shape[0], x.shape[1]), phase is Phase.FULL)
                    for test in tests if phase is not Phase.FULL else ():
                        lower, upper = bounds[test.component]
                        keep |= (not test.lower or x >= lower[at]) & (not test.upper or x < upper[at])
                    yield row, col, phase, keep & valid

    def __str__(self) -> str:
        return "\n".join(f"pass {n}: {one}" for n, one in enumerate(self.passes))


def build_schedule(acsr: ACSR, decisions: tuple[PassDecision, ...]) -> Schedule:
    """The schedule that the decisions describe. Raises PatternError where they do not fit the matrix."""
    for decision in decisions:
        grouped = decision.step is None and decision.rows_of in range(len(acsr.components))
        stepped = decision.step is not None and decision.step >= 1
        sizes = decision.block_q >= 1 and decision.block_kv >= 1
        if not ((grouped or stepped) and sizes and all(n in range(len(acsr.components)) for n in decision.components)):
            raise PatternError(f"there is no such pass over {len(acsr.components)} components: {decision}")
    return Schedule(acsr, tuple(_build_pass(acsr, decision) for decision in decisions))


def _build_pass(acsr: ACSR, decision: PassDecision, spans: dict[int, Spans] | None = None) -> Pass:
    components = acsr.components
    tiles = _align(acsr, decision)
    if spans is None:
        spans = {n: analyze(components[n], tiles) for n in decision.components}
    members = list(decision.components)
    walks = cover(members, [components[n].stride for n in members], [spans[n] for n in members], decision.block_kv)
    total = sum(walk.num_tiles for walk in walks)
    xp = array_namespace(total)
    if isinstance(total, np.ndarray):
        order = np.argsort(-total, kind="stable").astype(np.int32)
        order = order[: int(np.count_nonzero(total))]
    else:
        order = xp.argsort(-total).astype(np.int32)
    return Pass(decision, tiles, tuple(walks), order)


def _align(acsr: ACSR, decision: PassDecision) -> RowTiles:
    if decision.step is None:
        assert decision.rows_of is not None
        return align_rows_of(acsr.components[decision.rows_of], acsr.shape[0], decision.block_q)
    return align_by_step(acsr.shape[0], decision.step, decision.block_q)


def schedule(acsr: ACSR, model: CostModel, *, block_q: int | None = None, block_kv: int | None = None) -> Schedule:
    """The schedule that `model` finds cheapest; `block_q` and `block_kv` fix the tile sizes."""
    if not acsr.is_static:
        return build_schedule(acsr, _choose_unseen(acsr, model, block_q, block_kv))
    most = min(BASE_BLOCK, max(model.block_q))
    base = min(block_q or most, most)
    if block_q and block_q % base:
        base = block_q
    mapped = most if most < BASE_BLOCK else 2 * BASE_BLOCK
    groupings = _candidates(acsr, base, block_q or min(model.kernel_block_q(mapped), max(model.block_q)))
    spans = {key: _spans_of(acsr, tiles) for key, tiles in groupings.items()}
    passes = []
    for key, members in _assign(acsr, groupings, spans, model, block_q, block_kv):
        tiles, those = groupings[key], [spans[key][n] for n in members]
        together = [[those[k] for k in chain] for chain in chains([acsr.components[n].stride for n in members], those)]
        _, bq, bk = _best_blocks(together, tiles, model, block_q, block_kv)
        factor = max(min(bq, tiles.tiles_per_group * tiles.block_q) // tiles.block_q, 1) if key.rows_of is None else 1
        coarse = {n: spans[key][n].coarsen(factor, tiles) for n in members}
        passes.append(_build_pass(acsr, PassDecision(members, key.step, bq, bk, key.rows_of), coarse))
    return Schedule(acsr, tuple(passes))


class Grouping(NamedTuple):
    """How rows are grouped: all of them modulo `step`, or only those of component `rows_of`, by residue."""

    step: int | None
    rows_of: int | None = None


def _candidates(acsr: ACSR, base: int, mapped: int) -> dict[Grouping, RowTiles]:
    """The row groupings to try: by every line step, and the rows of a component without a step or with few rows.

    Tiles of `base` rows, which larger ones are merged from; row maps are not merged, and get `mapped` rows a tile.
    """
    out: dict[Grouping, RowTiles] = {}
    rows = acsr.shape[0]
    for step in sorted({c.line_step for c in acsr.components if c.line_step is not None} | {1}):
        out[Grouping(min(step, max(rows, 1)))] = align_by_step(rows, step, base)
    same: set[tuple[int, bytes]] = set()  # of components with the same rows in the same tiles, one serves
    for n, component in enumerate(acsr.components):
        sparse = component.has_empty_rows and 4 * int(np.count_nonzero(component.count > 0)) <= rows
        if sparse or (component.line_step is None and component.stride > 1):
            tiles = align_rows_of(component, rows, mapped)
            digest = tiles.block_q, hashlib.blake2b(tiles.rows.tobytes(), digest_size=16).digest()
            if digest not in same:
                out[Grouping(None, n)] = tiles
            same.add(digest)
    return out


def _spans_of(acsr: ACSR, tiles: RowTiles) -> dict[int, Spans]:
    """The spans of the components that are dense lattices under this grouping."""
    return {n: analyze(c, tiles) for n, c in enumerate(acsr.components) if is_aligned(c, tiles)}


def _best_blocks(
    together: list[list[Spans]], tiles: RowTiles, model: CostModel, block_q: int | None, block_kv: int | None
) -> tuple[float, int, int]:
    """(seconds, block_q, block_kv) for chains of components that share a pass."""
    longest = tiles.tiles_per_group * tiles.block_q if tiles.row_map is None else tiles.block_q
    options = [block_q] if block_q else [b for b in model.block_q if b % tiles.block_q == 0]
    options = sorted({max(min(b, longest), tiles.block_q) // tiles.block_q * tiles.block_q for b in options})
    if tiles.row_map is not None or not options:
        options = [tiles.block_q]
    best = (float("inf"), 0, 0)
    for bq in options:
        factor = bq // tiles.block_q if tiles.row_map is None else 1
        coarse = [[span.coarsen(factor, tiles) for span in chain] for chain in together]
        rows = bq if block_q else model.kernel_block_q(bq)
        seconds, bk = model.best_block_kv(coarse, rows, block_kv)
        best = min(best, (seconds, rows, bk))
    return best


def _assign(acsr, groupings, spans, model, block_q, block_kv) -> list[tuple[Grouping, tuple[int, ...]]]:
    """Components to groupings, each further pass paying for its merge.

    Groupings are added and left out one at a time while that is cheaper: once from the best that serves all components,
    and once from every component's own best.
    """
    keys, every = list(groupings), range(len(acsr.components))
    if not acsr.components:
        return []
    if len(keys) == 1:
        return [(keys[0], tuple(every))]
    cost = np.full((len(keys), len(every)), np.inf)
    for g, key in enumerate(keys):
        for n, one in spans[key].items():
            cost[g, n] = _best_blocks([[one]], groupings[key], model, block_q, block_kv)[0]
    merge = np.array([groupings[key].num_tiles * groupings[key].block_q for key in keys]) * model.pass_row_s

    def total(chosen: list[int]) -> float:
        return float(cost[chosen].min(axis=0).sum() + (merge[chosen].sum() - merge[chosen].max()))

    serving_all = [[g] for g in range(len(keys)) if np.isfinite(cost[g]).all()]
    starts = [min(serving_all, key=total)] if serving_all else []
    starts.append(np.unique(cost.argmin(axis=0)).tolist())
    _, chosen = min(_improved(start, len(keys), total) for start in starts)
    member_of = cost[chosen].argmin(axis=0)
    members = [(keys[g], tuple(np.flatnonzero(member_of == k).tolist())) for k, g in enumerate(chosen)]
    return [(key, those) for key, those in members if those]


def _improved(chosen: list[int], count: int, total: Callable[[list[int]], float]) -> tuple[float, list[int]]:
    """(the total, numbers below `count`): from `chosen` on, one is added or left out while that is less."""
    now = total(chosen)
    while True:
        moves = [sorted([*chosen, g]) for g in range(count) if g not in chosen]
        if len(chosen) > 1:
            moves += [[g for g in chosen if g != out] for out in chosen]
        least, move = min(((total(move), move) for move in moves), default=(now, chosen))
        if least >= now:
            return now, chosen
        now, chosen = least, move


def _choose_unseen(acsr: ACSR, model: CostModel, block_q, block_kv) -> tuple[PassDecision, ...]:
    """Run-time numbers: one pass per line step, tile sizes by rule."""
    groups: dict[int, list[int]] = {}
    for n, component in enumerate(acsr.components):
        if component.line_step is None:
            raise PatternError(
                f"component {n} has irregular residues modulo its stride {component.stride}, and cannot be combined "
                "with run-time arrays. Make the whole pattern static (NumPy arrays, an int query_offset)."
            )
        step = component.line_step if component.stride > 1 else 1
        groups.setdefault(min(step, acsr.shape[0]), []).append(n)
    out = []
    for step, members in groups.items():
        usual_q, usual_kv, _ = (*model.shapes, (min(128, max(model.block_q)), min(128, max(model.block_kv)), 0.0))[0]
        tiles = align_by_step(acsr.shape[0], step, block_q or usual_q)
        rows = tiles.block_q if block_q else model.kernel_block_q(tiles.block_q)
        out.append(PassDecision(tuple(members), step, rows, block_kv or usual_kv))
    return tuple(out)
