"""Bars without a peer, in this process: share of the processor's rate, overhead of a call, time by length."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.cpu import gate, jax_side, native, torch_side
from benchmarks.cpu.clock import LEAST_ROUNDS, Call, Sample, foreign, quartiles, sample, take_turns
from benchmarks.cpu.setting import CASE_COLUMNS, HEADS, THREADS, WINDOW, Case, Setting
from benchmarks.report import Report
from benchmarks.timing import wall_ms

SHARE_BAR = 0.80
OVERHEAD_BAR_US = 20.0
LINEAR_BAR = 0.15
SHARE_SAMPLES = 60
LENGTHS = (4096, 8192, 16384, 32768, 65536)

#: Calls of one turn of the overhead's measurement.
CALLS = 200


def share(setting: Setting) -> Report:
    """Each sample over the rate of a micro-kernel measured just before and just after it."""
    report = Report(
        "cpu-share",
        f"{WINDOW}: FLOP of non-zeros over time, as a share of an L1-fed float32 micro-kernel on {THREADS} threads "
        f"at once, measured before and after each sample. Bar: >= {SHARE_BAR:.0%}, float32.",
        (
            *CASE_COLUMNS, "called from", "ours ms", "GFLOP/s", "micro-kernel", "share", "p25-p75", "clean", "foreign",
            "bar",
        ),
    )  # fmt: skip
    sides: dict[str, Callable[[Case], Call]] = {"JAX [B, T, N, H]": jax_side.ready}
    if not torch_side.why_not(setting):
        sides["PyTorch [B, N, T, H]"] = torch_side.ours
    cases = setting.cases((WINDOW,), (4096,), (64, 128))
    for case, (side, ready) in itertools.product(cases, sides.items()):
        with setting.attempt(report, f"{case}, {side}"):
            found = gate.check(case, setting.gate_length)
            ours = ready(case)
            rows = gate.check_rows(case, jax_side.ready(case)())  # with which PyTorch's results have been compared
            gflop = 4 * jax_side.nnz(case.text, case.q_len) * case.head_dim * HEADS / 1e9
            with foreign() as others:
                made = [_share_sample(ours) for _ in range(setting.rounds if setting.quick else SHARE_SAMPLES)]
            clean = [one for one in made if one[0].clean]
            counting = clean if len(clean) >= LEAST_ROUNDS else made
            shares = tuple(gflop / one.ms * 1e3 / rate for one, rate in counting)
            ms, rate = (statistics.median(column) for column in zip(*((s.ms, r) for s, r in counting), strict=True))
            median, (low, high) = statistics.median(shares), quartiles(shares)
            bar = setting.bar(SHARE_BAR) if case.dtype == "float32" else None
            setting.add(
                report, *case.cells, side, f"{ms:.4g}", f"{gflop / ms * 1e3:.0f}", f"{rate:.0f}", f"{median:.3f}",
                f"{low:.3f}-{high:.3f}", f"{len(clean)}/{len(made)}", f"{others.share:.0%}",
                report.judge(f"share, {case}, {side}", median, bar, at_least=True),
                case=str(case), side=side, gate=found, gate_rows=rows, gflop=gflop, ms=[one.ms for one, _ in made],
                waited_ms=[one.waited_ms for one, _ in made], micro_kernel_gflops=[rate for _, rate in made],
                share=median, foreign=others.share,
            )  # fmt: skip
    return report


def _share_sample(ours: Call) -> tuple[Sample, float]:
    """A turn, and the rate around it; waiting counts whichever of the three did."""
    rates: list[float] = []
    rate = lambda: rates.append(native.rate_gflops(THREADS))  # noqa: E731
    made = [sample(rate, turn_ms=0), sample(ours, 0), sample(rate, 0, 0)]
    return Sample(made[1].ms, sum(one.waited_ms for one in made)), sum(rates) / 2


def overhead(setting: Setting) -> Report:
    """A call so short that what surrounds the work shows."""
    report = Report(
        "cpu-overhead",
        f"A jitted call of 64 positions, {WINDOW}, less one of an empty FFI handler with the same operands and result. "
        f"Bar: <= {OVERHEAD_BAR_US:g} us with one head.",
        ("heads", "ours us", "p25-p75", "empty us", "p25-p75", "difference us", "clean", "foreign", "bar"),
    )
    for heads in (1, 8):
        with setting.attempt(report, f"{heads} heads"):
            case = Case(WINDOW, 64, 64, "float32")
            found = gate.check(case, 64)
            calls = {"ours": jax_side.ready(case, heads=heads), "empty": _empty(case, heads)}
            turns = {name: Batches(call, 5 if setting.quick else CALLS) for name, call in calls.items()}
            taken = take_turns({name: turn.run for name, turn in turns.items()}, setting.rounds, setting.budget_s, 0)
            medians = {name: statistics.median(turn.us) for name, turn in turns.items()}
            difference = medians["ours"] - medians["empty"]
            bar = setting.bar(OVERHEAD_BAR_US) if heads == 1 else None
            cells = []
            for name, turn in turns.items():
                low, high = quartiles(tuple(turn.us))
                cells += [f"{medians[name]:.1f}", f"{low:.1f}-{high:.1f}"]
            setting.add(
                report, str(heads), *cells, f"{difference:.1f}", taken.clean, f"{taken.foreign:.0%}",
                report.judge(f"overhead, {heads} heads", difference, bar),
                heads=heads, gate=found, difference_us=difference, foreign=taken.foreign,
                us={name: turn.us for name, turn in turns.items()},
            )  # fmt: skip
    return report


class Batches:
    """So many calls a turn; `us` gathers the median of each turn."""

    def __init__(self, call: Call, calls: int):
        self.call, self.calls = call, calls
        self.us: list[float] = []

    def run(self) -> None:
        self.us.append(1e3 * statistics.median(wall_ms(self.call) for _ in range(self.calls)))


def _empty(case: Case, heads: int) -> Call:
    query, key, value, _ = jax_side.inputs(case, heads)
    result = jax.ShapeDtypeStruct(query.shape, query.dtype)
    run = jax.jit(jax.ffi.ffi_call(native.empty_target(), result))
    call = lambda: jax.block_until_ready(run(query, key, value))  # noqa: E731
    call()
    return call


def linear(setting: Setting) -> Report:
    """All lengths in turns."""
    report = Report(
        "cpu-linear",
        f"{WINDOW}, float32, H 64: time per position. Bar: the slowest length within {LINEAR_BAR:.0%} of the fastest.",
        ("positions", "ms", "us per position", "p25-p75", "clean", "foreign", "bar"),
    )
    lengths = tuple(dict.fromkeys((256, 512) if setting.quick else LENGTHS))
    cases = {str(q_len): Case(WINDOW, q_len, 64, "float32") for q_len in lengths}
    with setting.attempt(report, "time by length"):
        found: Any = gate.check(next(iter(cases.values())), setting.gate_length)
        calls = {name: jax_side.ready(case) for name, case in cases.items()}
        rows = {name: gate.check_rows(case, calls[name]()) for name, case in cases.items()}
        turns = take_turns(calls, setting.rounds, 60.0)
        per = {name: 1e3 * turns.samples[name].median_ms / case.q_len for name, case in cases.items()}
        excess = max(per.values()) / min(per.values()) - 1
        judged = report.judge("time per position, slowest over fastest - 1", excess, setting.bar(LINEAR_BAR))
        for name, case in cases.items():
            samples = turns.samples[name]
            low, high = (1e3 * np.array(quartiles(samples.ms)) / case.q_len).tolist()
            setting.add(
                report, f"{case.q_len:,}", str(samples), f"{per[name]:.3f}", f"{low:.3f}-{high:.3f}",
                turns.clean_of(name), f"{turns.foreign:.0%}", judged if case.q_len == lengths[-1] else "",
                q_len=case.q_len, ms=[one.ms for one in turns.made[name]], gate=found, gate_rows=rows[name],
                foreign=turns.foreign, waited_ms=[one.waited_ms for one in turns.made[name]], excess=excess,
            )  # fmt: skip
    return report
