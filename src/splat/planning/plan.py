"""The plan: everything decided about one pattern at one size, to run it and to look at.

`plan.forward` and `plan.d_query`: row tiles over query positions. `plan.d_key_value`: the same construction on the
transposed matrix, so that its row tiles run over key positions and its walks over query positions; no atomics.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import cached_property
from typing import Any

import numpy as np

from splat.acsr import ACSR, build, build_transposed
from splat.errors import ArgumentError, PatternError, SplatError
from splat.pattern import Pattern, PerHead, parse
from splat.pattern.core import MAX_LENGTH, brief, check_int, check_is_pattern, is_runtime_array
from splat.planning.cost import CPP_TILE, CostModel, cost_model
from splat.planning.savings import Savings, savings, si
from splat.planning.schedule import PassDecision, Schedule, build_schedule, schedule
from splat.planning.target import Target, find
from splat.remembered import Remembered
from splat.tiling import Phase

FORMAT = 1

#: How much a plan remembers: tables of its schedules, and functions of a few scales and soft caps.
MOST_MADE = 64

#: How many plans are remembered at least and at most, and about how large those beyond the least may be together.
LEAST_PLANS, MOST_PLANS, NBYTES = 16, 128, 1 << 28

#: The schedules of a plan, by their attributes: one for each kernel.
SCHEDULES = ("forward", "d_query", "d_key_value")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An implementation considered: its predicted time, or why it cannot serve."""

    implementation: str
    predicted_ms: float | None
    refusal: str | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be computed. Everything static about a call of attention."""

    pattern: Pattern
    q_len: int
    kv_len: int
    head_dim: int = 64
    num_q_heads: int = 1
    num_kv_heads: int = 1
    batch: int = 1
    dtype: str = "float32"

    @property
    def is_grouped(self) -> bool:
        """Whether query heads share key heads."""
        return self.num_q_heads > self.num_kv_heads

    @staticmethod
    def of_any_heads(
        pattern: Pattern, q_len: int, kv_len: int, head_dim: int, dtype: str, *, grouped: bool = False
    ) -> Problem:
        """One sequence and one key head: the plan is the same for any number of them.

        Where kernels may differ for query heads that share key heads (`grouped`), two of them stand for any number.
        """
        return Problem(pattern, q_len, kv_len, head_dim, 2 if grouped else 1, dtype=dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Passes, tile sizes and order for a problem, an implementation and a target; see `splat.plan`."""

    problem: Problem
    query_offset: Any
    implementation: str
    target: str
    acsr: ACSR
    candidates: tuple[Candidate, ...] = ()
    blocks: tuple[int | None, int | None] = (None, None)

    @cached_property
    def remembered(self) -> Remembered:
        """What generators make of the plan, kept for as long as the plan is."""
        return Remembered(entries=MOST_MADE)

    def forget(self) -> None:
        """Drops what generators made of it: functions that lead back to it, so that JAX would keep all for good."""
        self.__dict__.pop("remembered", None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "remembered"}

    @property
    def nbytes(self) -> int:
        """About how much memory it holds in the end: starts, counts, bounds and tables, of rows and of columns."""
        return 24 * len(self.acsr.components) * sum(self.acsr.shape)

    @property
    def is_static(self) -> bool:
        """Whether all of it is known: of a run-time pattern or offset only the forward's matrix may be."""
        return self.acsr.is_static and self.problem.pattern.is_static and not is_runtime_array(self.query_offset)

    @cached_property
    def forward(self) -> Schedule:
        """The schedule of the forward; made on first use."""
        return schedule(self.acsr, self._model("forward"), block_q=self.blocks[0], block_kv=self.blocks[1])

    def with_forward(self, forward: Schedule, **changes: Any) -> Plan:
        """The plan with a schedule that has been made already, and perhaps other fields."""
        plan = dataclasses.replace(self, **changes)
        plan.__dict__["forward"] = forward  # where the cached property keeps it
        return plan

    @cached_property
    def d_query(self) -> Schedule:
        """The schedule of dQ: the forward's, unless its kernel wants other tiles; made on first use."""
        model = self._model("d_query")
        if model.tiles == self._model("forward").tiles:
            return self.forward
        return schedule(self.acsr, model, block_q=self.blocks[0], block_kv=self.blocks[1])

    @cached_property
    def transposed(self) -> ACSR:
        """The matrix with keys as rows; made on first use."""
        p = self.problem
        return build_transposed(p.pattern, p.q_len, p.kv_len, self.query_offset)

    @cached_property
    def d_key_value(self) -> Schedule:
        """The schedule of dK and dV (rows are key positions); made on first use."""
        return schedule(self.transposed, self._model("d_key_value"), block_q=self.blocks[0], block_kv=self.blocks[1])

    def _model(self, kernel: str) -> CostModel:
        return model_of(self.problem, self.implementation, self.target, kernel)

    # -- numbers ---------------------------------------------------------------------------------------------------

    @property
    def nnz(self) -> int:
        return self.acsr.nnz

    @property
    def density(self) -> float:
        return self.acsr.density

    @cached_property
    def empty_rows(self) -> int:
        return int(np.count_nonzero(self.acsr.row_nnz == 0))

    @property
    def waste(self) -> float:
        """Scores computed in the forward pass / non-zeros."""
        return self.forward.waste

    @property
    def flops(self) -> int:
        """Floating-point operations of the forward over non-zeros only: 4 * nnz * head_dim per head."""
        p = self.problem
        return 4 * self.nnz * p.head_dim * p.num_q_heads * p.batch

    @property
    def bytes(self) -> int:
        """Bytes that must move in the forward at least: q, k, v read, output and float32 log-sum-exp written."""
        p = self.problem
        size = {"float64": 8, "float32": 4}.get(p.dtype, 2)
        q_rows, kv_rows = p.batch * p.q_len * p.num_q_heads, p.batch * p.kv_len * p.num_kv_heads
        return size * p.head_dim * 2 * (q_rows + kv_rows) + 4 * q_rows

    @cached_property
    def savings(self) -> Savings:
        """What each of the paper's specialisations saves, with the first pass's tile sizes."""
        decision = self.forward.decisions[0] if self.forward.decisions else None
        return savings(self.acsr, decision.block_q if decision else 1, decision.block_kv if decision else 1)

    @property
    def predicted_ms(self) -> float | None:
        """The cost model's forward time on the target; None where it has no numbers."""
        return predict_ms(self.forward, self._model("forward"), self.problem)

    # -- text ------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as JSON: the problem, the decisions and a digest of the tables they lead to."""
        if not self.is_static:
            raise PatternError("a plan with run-time arrays cannot be written as JSON: its numbers are not known yet")
        problem = dataclasses.asdict(dataclasses.replace(self.problem, pattern=None))  # type: ignore[arg-type]
        problem["pattern"] = repr(self.problem.pattern)
        return json.dumps(
            {
                "format": FORMAT,
                "problem": problem,
                "query_offset": int(self.query_offset),
                "implementation": self.implementation,
                "target": self.target,
                "blocks": self.blocks,
                "candidates": [dataclasses.asdict(c) for c in self.candidates],
                "passes": [dataclasses.asdict(d) for d in self.forward.decisions],
                "digest": self.digest,
            },
            indent=1,
        )

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that `to_json` wrote; PatternError where it is not one, or no longer leads to the same tables."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise PatternError(f"this plan has format {data['format']}, but format {FORMAT} is read. Plan again.")
            problem = Problem(**{**data["problem"], "pattern": parse(data["problem"]["pattern"])})
            problem = check_problem(problem)
            model_of(problem, data["implementation"], data["target"])
            decisions = tuple(PassDecision(**{**d, "components": tuple(d["components"])}) for d in data["passes"])
            candidates = tuple(Candidate(**c) for c in data["candidates"])
            offset, blocks, digest = data["query_offset"], _check_sizes(data["blocks"]), data["digest"]
            acsr = build(problem.pattern, problem.q_len, problem.kv_len, offset)
            plan = Plan(problem, offset, data["implementation"], data["target"], acsr, candidates, blocks)
            plan = plan.with_forward(build_schedule(acsr, decisions))
        except SplatError:
            raise
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise PatternError(f"this is not the JSON of a plan: {error!r}") from None
        if plan.digest != digest:
            raise PatternError(
                "this plan leads to other tables than when it was written (another version?). Plan again."
            )
        return plan

    @cached_property
    def digest(self) -> str:
        """A hash of every number that generators read, and of what later schedules are made for."""
        problem = dataclasses.replace(self.problem, pattern=None)  # type: ignore[arg-type]
        asked = problem, int(self.query_offset), self.implementation, self.target, self.blocks
        state = hashlib.sha256(repr(asked).encode())
        for component in self.acsr.components:
            for bound in component.bounds:
                state.update(np.asarray(bound).tobytes())
        for one in self.forward.passes:
            state.update(repr(one.decision).encode())
            state.update(np.asarray(one.order).tobytes())
            for walk in one.walks:
                state.update(repr((walk.component, walk.head_tests, walk.tail_tests)).encode())
                for table in (walk.begin, walk.num_head, walk.num_full, walk.num_tail, walk.residue):
                    state.update(np.asarray(table).tobytes())
        return state.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Plan) or (self.problem, self.implementation, self.target) != (
            other.problem,
            other.implementation,
            other.target,
        ):
            return False
        if not (self.is_static and other.is_static):
            return self is other
        return self.candidates == other.candidates and self.digest == other.digest

    def __hash__(self) -> int:
        offset = None if is_runtime_array(self.query_offset) else self.query_offset
        return hash((self.problem, self.implementation, self.target, offset))

    def __str__(self) -> str:
        p = self.problem
        lines = [
            f"plan of {_shorten(brief(p.pattern))}",
            f"  q_len {p.q_len}, kv_len {p.kv_len}, batch {p.batch}, heads {p.num_q_heads}/{p.num_kv_heads}, "
            f"head dim {p.head_dim}, {p.dtype}, on {self.target}",
        ]
        if not self.is_static:
            lines.append("  run-time pattern: its numbers are known when it runs; no re-planning, no recompilation")
        else:
            lines.append(
                f"  {self.nnz:,} non-zeros, density {self.density:.4%}, {self.empty_rows} empty rows, "
                f"{len(self.acsr.components)} components, {si(self.acsr.metadata_bytes)}B of metadata"
            )
        lines += [f"  pass {n}: {one}" for n, one in enumerate(self.forward.passes)]
        if self.is_static:
            tiles = sum(one.num_tiles for one in self.forward.passes)
            full = sum(one.count(Phase.FULL) for one in self.forward.passes)
            lines.append(
                f"  {tiles:,} tiles ({full:,} full, {tiles - full:,} partial), waste {self.waste:.3f}, "
                f"{si(self.flops)}FLOP over non-zeros, {si(self.bytes)}B at least"
            )
            lines.append(f"  {self.savings}")
        for c in self.candidates:
            mark = "*" if c.implementation == self.implementation else " "
            time = "no prediction" if c.predicted_ms is None else f"{c.predicted_ms:.3g} ms predicted"
            lines.append(f"  {mark} {c.implementation}: {time}" + (f"; cannot serve: {c.refusal}" if c.refusal else ""))
        return "\n".join(lines)


def _shorten(text: str, width: int = 200) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def model_of(problem: Problem, implementation: str, target: str, kernel: str = "forward") -> CostModel:
    """The cost model of a problem's kernels. Raises ArgumentError for an unknown implementation or target."""
    return cost_model(implementation, find(target), problem.head_dim, problem.dtype, kernel, problem.is_grouped)


def predict_ms(schedule: Schedule, model: CostModel, problem: Problem) -> float | None:
    """Forward milliseconds that the model gives a schedule; None for run-time patterns and models that only rank."""
    if not (schedule.is_static and model.predicts):
        return None
    seconds = sum(model.tiles_s(p.num_tiles, p.decision.block_q, p.decision.block_kv) for p in schedule.passes)
    seconds += max(len(schedule.passes) - 1, 0) * problem.q_len * model.pass_row_s
    return 1e3 * seconds * problem.num_q_heads * problem.batch


def check_problem(problem: Problem) -> Problem:
    """The problem, its numbers as ints. Raises ArgumentError or PatternError where it cannot be planned."""
    if isinstance(check_is_pattern(problem.pattern), PerHead):
        raise ArgumentError("a plan is for one pattern: plan each of per_head([...]).patterns, or call splat.attention")
    numbers = {
        name: check_int("plan", name, getattr(problem, name), 0 if name in ("q_len", "batch") else 1)
        for name in ("q_len", "kv_len", "head_dim", "num_q_heads", "num_kv_heads", "batch")
    }
    if problem.num_q_heads % problem.num_kv_heads:
        raise ArgumentError(
            f"plan: num_q_heads must be a multiple of num_kv_heads, but {problem.num_q_heads} and "
            f"{problem.num_kv_heads} were given (grouped-query attention shares one key head among equally many)"
        )
    same = all(getattr(problem, name) is number for name, number in numbers.items())
    return problem if same else dataclasses.replace(problem, **numbers)


def check_blocks(implementation: str, block_q: int | None, block_kv: int | None) -> None:
    """Raises ArgumentError where an implementation has no kernels for the given tile sizes."""
    if implementation == "triton":
        for name, given in (("block_q", block_q), ("block_kv", block_kv)):
            if given is not None and (given < 16 or given & (given - 1)):
                raise ArgumentError(
                    f"{name} must be a power of two, 16 or more, or None for implementation 'triton', whose tiles are "
                    f"operands of tensor cores, but {given} was given. Leave it out, or use 16, 32, 64 or 128."
                )
    if implementation == "cpp":
        for name, given, wanted in zip(("block_q", "block_kv"), (block_q, block_kv), CPP_TILE, strict=True):
            if given not in (None, wanted):
                raise ArgumentError(
                    f"{name} must be {wanted} or None for implementation 'cpp', whose plans say what 16 rows attend to "
                    f"column by column (its kernels choose their own tiles), but {given} was given. Leave it out."
                )


def make_plan(
    problem: Problem,
    *,
    implementation: str,
    target: str = "cpu",
    query_offset: Any = 0,
    block_q: int | None = None,
    block_kv: int | None = None,
) -> Plan:
    """The plan of a problem for one implementation; static ones are remembered."""
    problem = check_problem(problem)
    block_q, block_kv = _check_sizes((block_q, block_kv))
    check_blocks(implementation, block_q, block_kv)
    is_static = problem.pattern.is_static and not is_runtime_array(query_offset)
    if not is_runtime_array(query_offset):
        query_offset = check_int("plan", "query_offset", query_offset, -MAX_LENGTH, MAX_LENGTH - problem.q_len)
    asked = problem, implementation, target, query_offset, block_q, block_kv
    return _remembered(asked, lambda: _make(*asked)) if is_static else _make(*asked)


def _check_sizes(blocks: Any) -> tuple[int | None, int | None]:
    """Tile sizes as ints, or None."""
    block_q, block_kv = (
        None if block is None else check_int("plan", name, block, 1, 1 << 16)
        for name, block in zip(("block_q", "block_kv"), blocks, strict=True)
    )
    return block_q, block_kv


def _make(problem, implementation, target, query_offset, block_q, block_kv) -> Plan:
    model_of(problem, implementation, target)  # which are refused where there are none
    acsr = build(problem.pattern, problem.q_len, problem.kv_len, query_offset)
    return Plan(problem, query_offset, implementation, target, acsr, blocks=(block_q, block_kv))


_remembered = Remembered(least=LEAST_PLANS, entries=MOST_PLANS, nbytes=NBYTES)

__all__ = [
    "SCHEDULES",
    "Candidate",
    "Plan",
    "Problem",
    "Target",
    "check_blocks",
    "check_problem",
    "make_plan",
    "model_of",
    "predict_ms",
]
