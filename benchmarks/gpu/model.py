"""What to expect on an H200, without one: tiles counted, their cycles modelled. Nothing is timed.

A tile costs its matrix products and then the larger of its exponentials and its instructions, on one multiprocessor:

    cycles = products / 4096 + max(exponentials / 16, instructions * warps / 4)

Instructions of the inner loops for 128 x 128 scores with 8 warps, counted in machine code of our kernels: 480 where no
mask is needed, 613 with one edge, 771 with two. FlexAttention's are taken to be the same with a mask of two edges in
every block that is not full; so the model knows tiles, not the quality of code. Both are held against memory's time.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

import splat
from benchmarks import cases, peers
from benchmarks.gpu.jobs import BOTH, DIRECTIONS, FORWARD, USUAL, cases_of, name_of
from benchmarks.report import Report
from splat.planning import Plan, Problem, Schedule, Target, find, make_plan
from splat.tiling import Phase

TARGET = "h200"

#: Edges of a mask -> instructions of a loop over 128 x 128 scores, a warp of eight.
INSTRUCTIONS = {0: 480, 1: 613, 2: 771}

#: Matrix products of a tile, each 2 * head_dim operations a score.
PRODUCTS = {"forward": 2, "d_query": 3, "d_key_value": 4}

FLEX_BLOCK = peers.FLEX_BLOCK


def score_cycles(kernel: str, edges: int, head_dim: int) -> float:
    """Modelled cycles of one score on one multiprocessor."""
    issue = INSTRUCTIONS[edges] * 8 / 4 / 128**2 * PRODUCTS[kernel] / 2
    return PRODUCTS[kernel] * 2 * head_dim / 4096 + max(1 / 16, issue)


def schedule_cycles(schedule: Schedule, kernel: str, head_dim: int) -> float:
    """Of all tiles of one head."""
    cycles = 0.0
    for one in schedule.passes:
        area = one.decision.block_q * one.decision.block_kv
        for walk in one.walks:
            for phase, count in ((Phase.HEAD, walk.num_head), (Phase.FULL, walk.num_full), (Phase.TAIL, walk.num_tail)):
                tests = {Phase.HEAD: walk.head_tests, Phase.FULL: (), Phase.TAIL: walk.tail_tests}[phase]
                edges = min(sum(int(test.lower) + int(test.upper) for test in tests), 2)
                cycles += int(np.sum(count, dtype=np.int64)) * area * score_cycles(kernel, edges, head_dim)
    return cycles


@lru_cache(maxsize=64)
def flex_blocks(text: str, q_len: int) -> tuple[int, int]:
    """(partial, full) blocks of FlexAttention's mask."""
    counts = np.stack(peers.block_counts(peers.mask_formula(text, q_len), q_len, FLEX_BLOCK))
    full = int((counts == FLEX_BLOCK**2).sum())
    return int((counts > 0).sum()) - full, full


def flex_cycles(text: str, q_len: int, kernel: str, head_dim: int) -> float:
    partial, full = flex_blocks(text, q_len)
    edges = {0: full, 2: partial}
    return sum(n * FLEX_BLOCK**2 * score_cycles(kernel, edge, head_dim) for edge, n in edges.items())


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Milliseconds, of all heads."""

    splat_ms: float
    flex_ms: float

    @property
    def ratio(self) -> float:
        return self.flex_ms / self.splat_ms


def predict(text: str, q_len: int, direction: str) -> tuple[Plan, Prediction]:
    """What the model says of one pattern, forward or forward + backward."""
    target, s = find(TARGET), USUAL
    problem = Problem(splat.parse(text), q_len, q_len, s.head_dim, s.heads, s.heads, 1, s.dtype)
    plan = make_plan(problem, implementation="triton", target=TARGET)
    ours = theirs = 0.0
    for kernel in ("forward",) if direction == FORWARD else PRODUCTS:
        schedule: Schedule = getattr(plan, kernel)
        moved = _memory_ms(plan, kernel, target)
        ours += max(_ms(schedule_cycles(schedule, kernel, s.head_dim), target), moved) + _merge_ms(
            schedule, kernel, target
        )
        theirs += max(_ms(flex_cycles(text, q_len, kernel, s.head_dim), target), moved)
    return plan, Prediction(ours, theirs)


def _ms(cycles: float, target: Target) -> float:
    """Of one head's cycles: all heads, all multiprocessors, at the share of the model that kernels reach."""
    return 1e3 * cycles * USUAL.heads / (target.units * target.clock_hz * target.efficiency[USUAL.head_dim])


def _memory_ms(plan: Plan, kernel: str, target: Target) -> float:
    """Each array once: query, key, value, output; backward also the output's gradient and what is made."""
    arrays = {"forward": 4, "d_query": 5, "d_key_value": 6}[kernel]
    return 1e3 * arrays * 2 * plan.problem.q_len * USUAL.head_dim * USUAL.heads / target.bandwidth_bytes


def _merge_ms(schedule: Schedule, kernel: str, target: Target) -> float:
    """Float32 results of all passes but the last, which merges them: written and read again."""
    rows = sum(one.order.shape[0] * one.decision.block_q for one in schedule.passes[:-1])
    rows *= 2 if kernel == "d_key_value" else 1
    return 1e3 * 8 * rows * USUAL.head_dim * USUAL.heads / target.bandwidth_bytes


def run(suites: list[str], lengths: tuple[int, ...]) -> Iterator[Report]:
    """A table a suite."""
    for suite in suites:
        report = Report(
            f"{suite}-model",
            f"NOTHING WAS TIMED. {suite}: a model of {USUAL.heads} heads of {USUAL.head_dim}, bf16, on an {TARGET}; "
            f"flex: the same model on FlexAttention's {FLEX_BLOCK}-blocks. It ranks; it does not promise times.",
            ("pattern", "positions", "density", "tiles", "waste", "flex waste", *_headings("fwd"), *_headings("f+b")),
        )
        for q_len in lengths:
            ratios = {direction: [] for direction in DIRECTIONS}
            for case in cases_of(suite):
                found = {direction: predict(case.expression(q_len), q_len, direction) for direction in DIRECTIONS}
                plan = found[BOTH][0]
                flex_area = sum(flex_blocks(case.expression(q_len), q_len)) * FLEX_BLOCK**2
                cells = []
                for direction, (_, one) in found.items():
                    cells += [f"{one.splat_ms:.3g}", f"{one.flex_ms:.3g}", f"{one.ratio:.2f}"]
                    if case in cases.of(suite):
                        ratios[direction].append(one.ratio)
                report.add(
                    case.name, f"{q_len:,}", f"{plan.density:.2%}",
                    f"{sum(one.num_tiles for one in plan.forward.passes):,}", f"{plan.waste:.2f}",
                    f"{flex_area / plan.nnz:.2f}", *cells, case=name_of(case), q_len=q_len,
                    model={direction: dataclasses.asdict(one) for direction, (_, one) in found.items()},
                )  # fmt: skip
            means = [f"{statistics.geometric_mean(ratios[direction]):.2f}" for direction in DIRECTIONS]
            report.add("geomean of the suite", f"{q_len:,}", *[""] * 4, "", "", means[0], "", "", means[1], q_len=q_len)
        yield report


def _headings(direction: str) -> tuple[str, ...]:
    return f"{direction} splat ms", "flex ms", "x"
