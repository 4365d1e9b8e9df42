"""Bars against peers: forward, causal, strided, backward."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.cpu import gate, jax_side, torch_side
from benchmarks.cpu.clock import TURN_MS, Call, Turns, take_turns
from benchmarks.cpu.setting import BATCH, CASE_COLUMNS, DTYPES, HEADS, PATTERNS, THREADS, WINDOW, Case, Setting
from benchmarks.report import Report

#: Up to here dense scores are made for comparison.
DENSE_LONGEST = 4096

CONDITIONS = (
    f"batch {BATCH}, {HEADS} heads, {THREADS} threads; in turns of {TURN_MS:g} ms whose first call does not count; "
    "malloc keeps memory; times faster = ratio of medians"
)

FORWARD_BARS = {"float32": 3.5, "bfloat16": 3.0}
CAUSAL_BARS = {"float32": 1.1, "bfloat16": 1.3}
STRIDED_BARS = {"float32": 100.0, "bfloat16": 100.0}
BACKWARD_BARS = {"SDPA mask": 10.0, "xla": 4.0}


def duel(setting: Setting, ours: Call, peer: Call) -> Turns:
    """Both have been called before."""
    return take_turns({"ours": ours, "peer": peer}, setting.rounds, setting.budget_s)


def faster(turns: Turns) -> float:
    return turns.ratio("peer", "ours")


def cell(turns: Turns) -> str:
    """Times faster, its quartiles."""
    low, high = turns.spread("peer", "ours")
    return f"{faster(turns):.2f} ({low:.2f}-{high:.2f})"


def checked(setting: Setting, case: Case, *, gradients: bool = False) -> tuple[Call, dict[str, Any]]:
    """(SPLAT's call, how far it is off: in every row at a small size, in some at this one)."""
    small = gate.check(case, setting.gate_length, gradients=gradients)
    ours = jax_side.ready(case, gradients=gradients)
    return ours, {"gate": small, "gate_rows": gate.check_rows(case, ours())}


def against_flex(setting: Setting, case: Case, ours: Call, sample: dict[str, Any]) -> Turns:
    """Measured, with what it took to prepare written to the sample."""
    call, prepared = torch_side.flex(case)
    sample["flex_prepared"] = prepared
    sample["flex_off"] = gate.agree(case, ours(), torch_side.as_numpy(call()))
    return duel(setting, ours, call)


def _missing(setting: Setting) -> str:
    why = torch_side.why_not(setting)
    return f" PyTorch's peers are skipped: {why}." if why else ""


def forward(setting: Setting) -> Iterator[Report]:
    """Every pattern, size and type against FlexAttention; the shorter ones against dense attention too."""
    report = Report(
        "cpu-forward",
        f"Forward, {CONDITIONS}. Bars: geomean over FlexAttention >= {FORWARD_BARS['float32']:g} float32, "
        f">= {FORWARD_BARS['bfloat16']:g} bfloat16. Also times over PyTorch's "
        f"SDPA with a mask, xla and JAX's dense masked attention, at {DENSE_LONGEST:,} only.{_missing(setting)}",
        (*CASE_COLUMNS, "ours ms", "Flex ms", "over Flex", "SDPA", "xla", "dense", "clean", "foreign", "bar"),
    )
    prepared = Report(
        "cpu-forward-prepared",
        "What FlexAttention needs before its first call, in seconds.",
        (*CASE_COLUMNS, "create_block_mask", "compile"),
    )
    over_flex: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for case in setting.cases(PATTERNS, (4096, 16384), (64, 128)):
        with setting.attempt(report, case):
            _forward_case(setting, report, prepared, case, over_flex[case.dtype])
    for dtype, ratios in over_flex.items():
        if ratios:
            mean = statistics.geometric_mean(ratios)
            # Of some, it is no measure of all.
            whole = len(ratios) == len(PATTERNS) * 4
            bar = setting.bar(FORWARD_BARS[dtype]) if whole else None
            judged = report.judge(f"geomean, {dtype}", mean, bar, at_least=True)
            setting.add(
                report, f"geomean of {len(ratios)}", "", "", dtype, "", "", f"{mean:.2f}", *[""] * 5, judged,
                geomean=mean, dtype=dtype, cases=len(ratios),
            )  # fmt: skip
    yield report
    if prepared.rows:
        yield prepared


def _forward_case(setting: Setting, report: Report, prepared: Report, case: Case, over_flex: list[float]) -> None:
    ours, sample = checked(setting, case)
    duels: dict[str, Turns] = {}
    if not torch_side.why_not(setting):
        duels["flex"] = against_flex(setting, case, ours, sample)
        over_flex.append(faster(duels["flex"]))
        needed = sample["flex_prepared"]
        setting.add(prepared, *case.cells, *(f"{s:.2f}" for s in needed.values()), case=str(case), **needed)
        if case.q_len <= DENSE_LONGEST:
            sdpa = torch_side.sdpa(case)
            sample["sdpa_off"] = gate.agree(case, ours(), torch_side.as_numpy(sdpa()))
            duels["sdpa"] = duel(setting, ours, sdpa)
    if case.q_len <= DENSE_LONGEST:
        for name in ("xla", "dense"):
            peer = jax_side.ready(case, name)
            sample[f"{name}_off"] = gate.agree(case, ours(), peer())
            duels[name] = duel(setting, ours, peer)
    duels = duels or {"itself": duel(setting, ours, ours)}
    ms = statistics.median(turns.samples["ours"].median_ms for turns in duels.values())
    gflops = 4 * jax_side.nnz(case.text, case.q_len) * case.head_dim * HEADS / ms / 1e6
    setting.add(
        report, *case.cells, f"{ms:.4g}", f"{duels['flex'].samples['peer'].median_ms:.4g}" if "flex" in duels else "",
        cell(duels["flex"]) if "flex" in duels else "",
        *(f"{faster(duels[name]):.2f}" if name in duels else "" for name in ("sdpa", "xla", "dense")),
        next(iter(duels.values())).clean, f"{max(turns.foreign for turns in duels.values()):.0%}", "",
        case=str(case), ours_ms=ms, gflops=gflops,
        duels={name: turns.to_json() for name, turns in duels.items()}, **sample,
    )  # fmt: skip


# -- one peer each -----------------------------------------------------------------------------------------------------


def _one_peer(
    setting: Setting, report: Report, cases: list[Case], measure: Callable[[Case, Call, dict[str, Any]], Turns],
    bars: dict[str, float],
) -> Report:  # fmt: skip
    for case in cases:
        if torch_side.why_not(setting):
            break
        with setting.attempt(report, case):
            ours, sample = checked(setting, case)
            turns = measure(case, ours, sample)
            setting.add(
                report, *case.cells, *(str(turns.samples[name]) for name in ("ours", "peer")), cell(turns),
                turns.clean, f"{turns.foreign:.0%}",
                report.judge(str(case), faster(turns), setting.bar(bars[case.dtype]), at_least=True),
                case=str(case), times_faster=faster(turns), **turns.to_json(), **sample,
            )  # fmt: skip
    return report


PAIR_COLUMNS = (*CASE_COLUMNS, "ours ms", "peer ms", "times faster", "clean", "foreign", "bar")


def causal(setting: Setting) -> Report:
    """Dense causal attention against the peer that is made for it."""
    report = Report(
        "cpu-causal",
        f"Dense causal against PyTorch's SDPA, is_causal=True; {CONDITIONS}.{_missing(setting)}",
        PAIR_COLUMNS,
    )

    def measure(case: Case, ours: Call, sample: dict[str, Any]) -> Turns:
        call = torch_side.sdpa(case, is_causal=True)
        sample["sdpa_off"] = gate.agree(case, ours(), torch_side.as_numpy(call()))
        return duel(setting, ours, call)

    return _one_peer(setting, report, setting.cases(("causal()",), (4096, 16384), (64, 128)), measure, CAUSAL_BARS)


def strided(setting: Setting) -> Report:
    """A pattern whose every block of FlexAttention is visited."""
    report = Report("cpu-strided", f"strided(64) against FlexAttention; {CONDITIONS}.{_missing(setting)}", PAIR_COLUMNS)

    def measure(case: Case, ours: Call, sample: dict[str, Any]) -> Turns:
        return against_flex(setting, case, ours, sample)

    return _one_peer(setting, report, setting.cases(("strided(64)",), (4096,), (64,)), measure, STRIDED_BARS)


def backward(setting: Setting) -> Report:
    """Output and three gradients of a given cotangent."""
    report = Report(
        "cpu-backward",
        f"Forward and backward; {CONDITIONS}. Bars: float32.{_missing(setting)}",
        (*CASE_COLUMNS, "peer", "ours ms", "peer ms", "times faster", "clean", "foreign", "bar"),
    )
    for case in setting.cases((WINDOW,), (4096,), (64,)):
        with setting.attempt(report, case):
            ours, sample = checked(setting, case, gradients=True)
            for name, bar in BACKWARD_BARS.items():
                if name == "xla":
                    peer = jax_side.ready(case, "xla", gradients=True)
                    off = gate.agree(case, ours(), peer())
                elif torch_side.why_not(setting):
                    continue
                else:
                    peer = torch_side.sdpa(case, gradients=True)
                    off = gate.agree(case, ours(), torch_side.as_numpy(peer()))
                turns = duel(setting, ours, peer)
                limit = setting.bar(bar) if case.dtype == "float32" else None
                setting.add(
                    report, *case.cells, name, *(str(turns.samples[one]) for one in ("ours", "peer")), cell(turns),
                    turns.clean, f"{turns.foreign:.0%}",
                    report.judge(f"{case} over {name}", faster(turns), limit, at_least=True),
                    case=str(case), peer=name, peer_off=off, times_faster=faster(turns), **turns.to_json(), **sample,
                )  # fmt: skip
    return report
