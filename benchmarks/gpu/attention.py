"""The job of one pattern: ours is checked against dense float64 first, then timed in turns with its peers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import splat
import splat.torch
from benchmarks import report, timing
from benchmarks.gpu import check
from benchmarks.gpu.flex import BLOCKS, Attention, Dense, Flex, is_causal
from benchmarks.gpu.jobs import BOTH, DIRECTIONS, FORWARD, SHARE, Job, case_of
from benchmarks.gpu.worker import Bench
from splat.planning import Plan, Problem, make_plan
from splat.torch.programs import target_of

#: What the two directions of one length may take of a job's time, at most, and rounds, at least and at most.
SHARE_MS, ROUNDS = 1500.0, (5, 30)


class Ours:
    """The front end for PyTorch."""

    name = "splat"

    def __init__(self, pattern: splat.Pattern):
        self.pattern = pattern

    def build(self, q_len: int) -> Attention:
        return lambda query, key, value: splat.torch.attention(query, key, value, self.pattern)

    def other(self) -> None:
        return None


class AttentionBench(Bench):
    """See the module. What is prepared and not refused is in `built`: (name, length, direction) -> attention."""

    def __init__(self, job: Job, say: Callable[..., None]):
        super().__init__(job, say)
        (name,) = job.cases
        self.case = case_of(name)
        self.built: dict[tuple[str, int, str], Attention] = {}
        self.refused: set[tuple[str, str]] = set()

    def _text(self, q_len: int) -> str:
        return self.case.expression(q_len)

    # -- preparing -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        for q_len in self.job.lengths:
            self._facts(q_len)
            if self.within("splat", q_len):
                self._check(q_len)
        for head_dim in self.job.sizes.grouped:
            if self.within("splat, grouped", min(self.job.lengths)):
                self._check_grouped(min(self.job.lengths), head_dim)
        for q_len in self.job.lengths:
            self._compile(q_len, Flex(self._text(q_len), BLOCKS[0], self.job.device))
        for q_len in self.job.lengths:
            with self.guarded("dense", q_len):
                causal = is_causal(splat.parse(self._text(q_len)), q_len)
                self._compile(q_len, Dense(causal, self.job.device, "dense causal" if causal else "dense"))
        for block in BLOCKS[1:] if self.job.suite == "sas" else ():
            for q_len in self.job.lengths:
                self._compile(q_len, Flex(self._text(q_len), block, self.job.device))

    def _facts(self, q_len: int) -> None:
        plan = plan_of(self.job, self._text(q_len), q_len)
        self.say(
            "facts", q_len=q_len, expression=self._text(q_len)[:200], target=plan.target, nnz=plan.nnz,
            density=plan.density, waste=plan.waste, tiles=sum(p.num_tiles for p in plan.forward.passes),
            passes=str(plan.forward), waste_d_query=plan.d_query.waste, waste_d_key_value=plan.d_key_value.waste,
            flops=plan.flops, predicted_ms=plan.predicted_ms,
        )  # fmt: skip

    def _check(self, q_len: int) -> None:
        """The gate: only what passes is timed."""
        ours = Ours(splat.parse(self._text(q_len))).build(q_len)
        with self.guarded("splat", q_len):
            sizes = self.job.sizes
            arrays = check.inputs(q_len, sizes.heads, sizes.head_dim, sizes.dtype, self.job.device)
            heads = check.checked_heads(sizes.heads, sizes.num_checked)
            if not self._gate(q_len, "PyTorch", arrays, heads):
                self.built |= {("splat", q_len, direction): ours for direction in DIRECTIONS}

    def _check_grouped(self, q_len: int, head_dim: int) -> None:
        """Query heads that share key heads, where the kernel of dK and dV is another; of all head dims."""
        with self.guarded("splat, grouped", q_len):
            arrays = check.inputs(q_len, 2 * SHARE, head_dim, self.job.sizes.dtype, self.job.device, share=SHARE)
            self._gate(q_len, f"PyTorch, {SHARE} heads a key head, H {head_dim}", arrays, slice(None))

    def _gate(self, q_len: int, binding: str, arrays: list[Tensor], heads: list[int] | slice) -> list[str]:
        """Ours for the heads that are looked at, compared; compiles both directions. The faults."""
        begin = time.perf_counter()
        query, key, value, d_out = arrays
        for x in (query, key, value):
            x.requires_grad_()
        pattern = splat.parse(self._text(q_len))
        with poisoned():
            out, lse = splat.torch.attention(query, key, value, pattern, return_lse=True)
            gradients = torch.autograd.grad(out, (query, key, value), d_out)
        out, lse, d_query, d_key, d_value = (x.detach()[0, heads] for x in (out, lse, *gradients))
        results = check.Results(out, lse, d_query, d_key, d_value)
        seconds = time.perf_counter() - begin
        found, faults = check.gate(results, [x.detach()[0, heads] for x in arrays], self._text(q_len))
        self.say("gate", binding=binding, q_len=q_len, errors=found, faults=faults, first_call_s=seconds)
        return faults

    def _compile(self, q_len: int, peer: Any) -> None:
        """One call in each direction."""
        for direction in DIRECTIONS:
            key = (peer.name, direction)
            if key in self.refused or not self.within(peer.name, q_len, direction):
                continue
            with self.guarded(peer.name, q_len, direction, tried=functools.partial(self.refused.add, key)):
                begin = time.perf_counter()
                attention = self._first_call(peer, q_len, direction)
                self.say("compiled", name=peer.name, q_len=q_len, direction=direction, s=time.perf_counter() - begin)
                self.built[peer.name, q_len, direction] = attention

    def _first_call(self, peer: Any, q_len: int, direction: str) -> Attention:
        try:
            attention = peer.build(q_len)
            self._call(attention, q_len, direction)()
            return attention
        except Exception as error:
            other = peer.other()
            if other is None or check.is_fatal(error) or check.is_out_of_memory(error):
                raise
            self.say("note", name=peer.name, q_len=q_len, direction=direction, message=check.summary(error))
            return self._first_call(other, q_len, direction)

    # -- measuring -----------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        clock = self.clock()
        for q_len in self.job.lengths:
            for direction in DIRECTIONS:
                names = [name for name, length, way in self.built if (length, way) == (q_len, direction)]
                if "splat" not in names or not self.within("timing", q_len, direction):
                    continue
                with self.guarded("timing", q_len, direction):
                    self._time(names, q_len, direction, clock)

    def _time(self, names: list[str], q_len: int, direction: str, clock: timing.Clock) -> None:
        arrays = self._inputs(q_len, direction)
        calls = {name: self._call(self.built[name, q_len, direction], q_len, direction, arrays) for name in names}
        for name in list(calls):
            try:
                calls[name]()
                clock(calls[name])  # and the clock learns how long launching takes
            except Exception as error:
                if check.is_fatal(error):
                    raise
                self.say("error", name=name, q_len=q_len, direction=direction, message=check.summary(error))
                del calls[name]
                self.free()
        once = sum(clock(call) for call in calls.values())
        rounds = 2 if self.job.device == "cpu" else int(min(max(SHARE_MS / once, ROUNDS[0]), ROUNDS[1]))
        host: dict[str, float] = {}
        samples = timing.interleave(calls, rounds, clock=clock)
        peak = {name: self.peak_bytes(call) for name, call in calls.items()}
        if isinstance(clock, timing.CudaClock):
            for name, call in calls.items():
                clock(call)
                host[name] = clock.host_ms[-1]
        self.say(
            "time", q_len=q_len, direction=direction, ms={name: one.ms for name, one in samples.items()},
            peak_bytes=peak, host_ms=host, sm_clock_mhz=(report.ask_gpu("clocks.sm") or [None])[0],
        )  # fmt: skip

    def _inputs(self, q_len: int, direction: str) -> list[Tensor]:
        sizes = self.job.sizes
        arrays = check.inputs(q_len, sizes.heads, sizes.head_dim, sizes.dtype, self.job.device, seed=1)
        if direction == BOTH:
            for x in arrays[:3]:
                x.requires_grad_()
        return arrays

    def _call(
        self, attention: Attention, q_len: int, direction: str, arrays: list[Tensor] | None = None
    ) -> Callable[[], Any]:
        *given, d_out = arrays or self._inputs(q_len, direction)
        query, key, value = given

        def forward() -> Any:
            with torch.no_grad():
                return attention(query, key, value)

        def both() -> Any:
            return torch.autograd.grad(attention(query, key, value), given, d_out)

        return forward if direction == FORWARD else both


def plan_of(job: Job, text: str, q_len: int) -> Plan:
    """The plan that the front end makes, for all heads."""
    sizes = job.sizes
    problem = Problem(splat.parse(text), q_len, q_len, sizes.head_dim, sizes.heads, sizes.heads, 1, sizes.dtype)
    return make_plan(problem, implementation="triton", target=target_of(torch.device(job.device)))


class poisoned:
    """Within it, `torch.empty` is full of NaN: what is not written shows."""

    def __enter__(self) -> None:
        self.before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before[0], warn_only=self.before[1])


BENCH = AttentionBench
