"""Planning time and memory, from a pattern's text to its printed plan, beside FlexAttention's `create_block_mask`."""

from __future__ import annotations

import splat
from benchmarks import cases, peers, timing
from benchmarks.cases import Case
from benchmarks.report import Report
from splat.planning import plan as planner

#: positions -> milliseconds that text to printed plan may take.
BARS_MS = {16384: 5.0, 1 << 20: 100.0}

#: What FlexAttention's block masks are made for: cheap and dear predicates, a union, and its worst case.
FLEX_PATTERNS = ("window(256)", "causal()", "strided(64)", "window(128) | strided(128)")


def plan_and_print(text: str, q_len: int) -> int:
    """Text -> pattern -> plan -> text, nothing remembered from an earlier call; the length of what was printed."""
    planner._remembered.cache_clear()
    pattern = splat.parse(text)
    groups = getattr(pattern, "groups", None)
    return sum(len(str(splat.plan(one, q_len))) for one in (groups() if groups else (pattern,)))


def run(lengths: tuple[int, ...], repetitions: int) -> Report:
    """Time and peak memory of planning every pattern of the vocabulary and of SAS."""
    bars = ", ".join(f"{limit:g} ms at {q_len:,}" for q_len, limit in BARS_MS.items())
    report = Report(
        "planning",
        f"Planning: expression to printed plan. Bars: {bars}.",
        ("pattern", "positions", "ms", "peak bytes/row", "metadata bytes/row", "bar"),
    )
    for q_len in lengths:
        for case in cases.of("vocabulary", "sas"):
            if case.serves(q_len):
                _measure(report, case, q_len, repetitions)
    return report


def _measure(report: Report, case: Case, q_len: int, repetitions: int) -> None:
    text = case.expression(q_len)
    samples = timing.interleave({"plan": lambda: plan_and_print(text, q_len)}, repetitions)["plan"]
    peak = timing.traced_peak_bytes(lambda: plan_and_print(text, q_len))
    metadata = sum(splat.plan(p, q_len).acsr.metadata_bytes for p in case.patterns(q_len))
    verdict = report.judge(f"{case.name} at {q_len:,}", samples.median_ms, BARS_MS.get(q_len))
    report.add(
        case.name, f"{q_len:,}", str(samples), f"{peak / q_len:.0f}", f"{metadata / q_len:.0f}", verdict,
        case=case.name, suite=case.suite, q_len=q_len, ms=samples.ms, peak_bytes=peak, metadata_bytes=metadata,
    )  # fmt: skip


def run_flex(lengths: tuple[int, ...], repetitions: int) -> Report:
    """`create_block_mask` beside planning: time, and the memory that each needs."""
    report = Report(
        "planning-flex",
        "Planning beside FlexAttention's create_block_mask on the same CPU (eager, its own process)",
        ("pattern", "positions", "create_block_mask ms", "plan ms", "times faster", "block mask MB", "plan MB"),
    )
    for q_len in lengths:
        for text in FLEX_PATTERNS:
            flex = peers.flex_planning(text, q_len, repetitions)
            theirs = timing.Samples(tuple(flex["ms"]))
            ours = timing.interleave({"plan": lambda t=text, n=q_len: plan_and_print(t, n)}, max(repetitions, 3))
            peak = timing.traced_peak_bytes(lambda t=text, n=q_len: plan_and_print(t, n))
            plan = ours["plan"]
            held = "unknown" if flex["peak_bytes"] is None else f"{flex['peak_bytes'] / 1e6:,.0f}"
            report.add(
                text, f"{q_len:,}", str(theirs), str(plan), f"{theirs.median_ms / plan.median_ms:,.0f}", held,
                f"{peak / 1e6:.2f}",
                text=text, q_len=q_len, flex_ms=theirs.ms, plan_ms=plan.ms, flex_peak_bytes=flex["peak_bytes"],
                plan_peak_bytes=peak,
            )  # fmt: skip
    return report
