"""Tables and bars from what the jobs said. Pure functions of messages: also of those that a file kept."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import timing
from benchmarks.gpu import jobs
from benchmarks.gpu.jobs import BOTH, DIRECTIONS, FORWARD
from benchmarks.report import Report
from splat.planning import find

Message = dict[str, Any]

#: FlexAttention's time over ours, over the SAS suite, by the geometric mean; at these lengths.
GEOMEAN_BARS = {FORWARD: 2.05, BOTH: 1.8}
BAR_LENGTHS = (8192, 16384)

#: The same of single patterns, forward.
CASE_BARS = {
    "sas/sliding window": (1.15, BAR_LENGTHS),
    "sas/OpenAI strided": (3.0, BAR_LENGTHS),
    "sas/OpenAI fixed": (3.0, BAR_LENGTHS),
    "sas/LongNet": (3.0, BAR_LENGTHS),
    "figures/strided 64": (10.0, BAR_LENGTHS),
    "figures/dense causal": (0.9, (16384,)),
}

#: `create_block_mask`'s time over that of preparing a pattern.
PLANNING_BAR, PLANNING_LENGTH = 20.0, 131072

#: The matrix products of forward and backward, in those of the forward.
FLOPS = {FORWARD: 1.0, BOTH: 3.5}


def every_report(messages: Sequence[Message], *, rehearsal: bool) -> list[Report]:
    """The tables of every suite that said something, in order of importance."""
    made: list[Report] = []
    peak = peak_flops(messages)
    for suite in (*jobs.SUITES, "tune"):
        here = [m for m in messages if m["suite"] == suite]
        if not here:
            continue
        if suite == "gpu-planning":
            made.append(planning(here))
        elif suite == "tune":
            made.append(tuning(here))
        else:
            made += [speed(suite, here, peak), gates(suite, here)]
            made.append(jax_peers(suite, here))
    if any(m["what"] in ("error", "dropped", "note") for m in messages):
        made.append(troubles(messages))
    made = [report for report in made if report.rows]
    for report in made:
        if rehearsal:
            report.title = f"REHEARSAL on a CPU, interpreted; the numbers mean nothing. {report.title}"
    return made


def peak_flops(messages: Sequence[Message]) -> tuple[float | None, str]:
    """(FLOP/s, where from): measured on this machine, else its data sheet's."""
    measured = [m["matmul_flops_per_s"] for m in messages if m["what"] == "machine"]
    if measured:
        return measured[-1], f"{measured[-1] / 1e12:.0f} TFLOP/s, measured with a matrix product"
    known = [m["target"] for m in messages if m["what"] == "facts" and m["target"] != "interpreter"]
    if known:
        sheet = find(known[-1]).matmul_flops["bfloat16"]
        return sheet, f"{sheet / 1e12:.0f} TFLOP/s, from the data sheet"
    return None, "unknown"


# -- speed -------------------------------------------------------------------------------------------------------------


def best(ms: dict[str, list[float]], prefix: str) -> tuple[str, timing.Samples] | None:
    """The fastest of those whose name begins so."""
    found = {name: timing.Samples(tuple(values)) for name, values in ms.items() if name.startswith(prefix)}
    return min(found.items(), key=lambda item: item[1].median_ms) if found else None


def speed(suite: str, messages: Sequence[Message], peak: tuple[float | None, str]) -> Report:
    """One row for a pattern at a length: both directions, FlexAttention and dense attention beside ours."""
    clocks = sorted({int(m["sm_clock_mhz"]) for m in messages if str(m.get("sm_clock_mhz")).isdigit()})
    clock = f" SM clock {clocks[0]} to {clocks[-1]} MHz, read after each." if clocks else ""
    report = Report(
        suite,
        f"{suite}: bf16, batch 1, medians in ms ± half the quartiles' distance; x: FlexAttention's time / ours (its "
        f"best block size); TFLOP/s and % over non-zeros only, of {peak[1]}; MB: memory of forward + backward beyond "
        f"inputs.{clock}",
        ("pattern", "positions", "waste", "tiles", *_headings("fwd"), *_headings("f+b"), "MB", "bar"),
    )
    times = {(m["case"], m["q_len"], m["direction"]): m for m in messages if m["what"] == "time" and "splat" in m["ms"]}
    facts = {(m["case"], m["q_len"]): m for m in messages if m["what"] == "facts"}
    ratios: dict[tuple[str, int, str], float] = {}
    for case, q_len in _pairs(messages, "facts"):
        fact = facts.get((case, q_len), {"flops": math.nan})
        shown = [f"{fact['waste']:.2f}", f"{fact['tiles']:,}"] if "tiles" in fact else ["", ""]
        cells, sample = [], {}
        for direction in DIRECTIONS:
            message = times.get((case, q_len, direction))
            cells += _cells(message, fact["flops"] * FLOPS[direction], peak[0])
            if message and (flex := best(message["ms"], "flex")):
                ratios[case, q_len, direction] = timing.ratio(flex[1], timing.Samples(tuple(message["ms"]["splat"])))
            sample[direction] = message
        bar, lengths = CASE_BARS.get(case, (None, ()))
        verdict = judge(
            report, f"{case} at {q_len}", ratios.get((case, q_len, FORWARD)), bar if q_len in lengths else None
        )
        memory = (times.get((case, q_len, BOTH)) or {"peak_bytes": {}})["peak_bytes"].get("splat")
        report.add(
            case.partition("/")[2], f"{q_len:,}", *shown, *cells,
            "" if memory is None else f"{memory / 1e6:,.0f}", verdict, facts=fact, times=sample,
        )  # fmt: skip
    if suite == "sas":
        for q_len in sorted({q_len for _, q_len in _pairs(messages, "facts")}):
            _geomean_row(report, {key: value for key, value in ratios.items() if key[1] == q_len}, q_len)
    return report


def _pairs(messages: Sequence[Message], what: str) -> list[tuple[str, int]]:
    """(case, length) of what was asked for and of what something is known of, in the registry's order."""
    asked = {(case, q_len) for m in messages if m["what"] == "asked" for case in m["cases"] for q_len in m["lengths"]}
    known = {(m["case"], m["q_len"]) for m in messages if m["what"] == what}
    return sorted(asked | known, key=lambda pair: (_rank(pair[0]), pair[1]))


def _rank(case: str) -> int:
    """Of a case in the registry; those of SAS first."""
    names = [jobs.name_of(one) for one in jobs.cases_of("sas") + jobs.cases.CASES]
    return names.index(case)


def _headings(direction: str) -> tuple[str, ...]:
    return f"{direction} splat", "flex", "x", "dense", "TFLOP/s", "%"


def _cells(message: Message | None, flops: float, peak: float | None) -> list[str]:
    if message is None:
        return ["-", *[""] * 5]
    ms = message["ms"]
    ours = timing.Samples(tuple(ms["splat"]))
    flex, dense = best(ms, "flex"), best(ms, "dense")
    rate = flops / ours.median_ms * 1e3
    return [
        str(ours),
        f"{flex[1].median_ms:.3g} ({flex[0].split()[1]})" if flex else "-",
        f"{timing.ratio(flex[1], ours):.2f}" if flex else "",
        f"{dense[1].median_ms:.3g}" if dense else "-",
        f"{rate / 1e12:.3g}",
        f"{100 * rate / peak:.0f}" if peak else "",
    ]


def judge(report: Report, what: str, measured: float | None, bar: float | None) -> str:
    """The verdict; a bar that nothing was measured for is missed."""
    if bar is not None and (measured is None or not math.isfinite(measured)):
        report.bars += 1
        report.failed.append(f"{what}: not measured, bar {bar:g}")
        return f"≥ {bar:g} FAIL"
    return report.judge(what, measured or 0.0, bar, at_least=True)


def _geomean_row(report: Report, ratios: dict[tuple[str, int, str], float], q_len: int) -> None:
    wanted = [jobs.name_of(case) for case in jobs.cases.of("sas")]
    cells, verdicts, sample = [], [], {}
    for direction in DIRECTIONS:
        found = [ratios[name, q_len, direction] for name in wanted if (name, q_len, direction) in ratios]
        mean = statistics.geometric_mean(found) if found else None
        bar = GEOMEAN_BARS[direction] if q_len in BAR_LENGTHS else None
        complete = len(found) == len(wanted)
        what = f"geomean, {direction}, at {q_len}" + ("" if complete else f" ({len(found)} of {len(wanted)} patterns)")
        verdicts.append(judge(report, what, mean if complete else None, bar))
        cells += ["", "", "" if mean is None else f"{mean:.2f}", *[""] * 3]
        sample[direction] = dict(geomean=mean, patterns=len(found))
    name = f"geomean of {min(one['patterns'] for one in sample.values())} of {len(wanted)}"
    report.add(name, f"{q_len:,}", "", "", *cells, "", " ".join(filter(None, verdicts)), q_len=q_len, **sample)


def jax_peers(suite: str, messages: Sequence[Message]) -> Report:
    """What JAX's users have, beside ours (measured through PyTorch, in another process)."""
    report = Report(
        f"{suite}-jax",
        "jax.nn.dot_product_attention in a process of its own, after the others, without emptying caches",
        ("peer", "pattern", "positions", "direction", "ms", "splat ms", "x"),
    )
    ours = {(m["case"], m["q_len"], m["direction"]): m["ms"]["splat"] for m in messages
            if m["what"] == "time" and "splat" in m["ms"]}  # fmt: skip
    for m in messages:
        if m["kind"] != "jax-peers" or m["what"] != "time":
            continue
        for name, values in m["ms"].items():
            theirs, mine = timing.Samples(tuple(values)), ours.get((m["case"], m["q_len"], m["direction"]))
            same = timing.Samples(tuple(mine)) if mine else None
            report.add(
                name, m["case"].partition("/")[2], f"{m['q_len']:,}", m["direction"], str(theirs), str(same or "-"),
                f"{theirs.median_ms / same.median_ms:.2f}" if same else "", **m,
            )  # fmt: skip
    return report


# -- correctness, compilation and what went wrong ----------------------------------------------------------------------


def gates(suite: str, messages: Sequence[Message]) -> Report:
    """The worst error of each pattern over its lengths, and what compiling took."""
    names = ("out", "lse", "d_query", "d_key", "d_value")
    report = Report(
        f"{suite}-gate",
        "gate: relative error to dense float64 for some heads, the worst length; limits 1e-2 for the output, 2e-2 for "
        "gradients, 2e-3 absolute for lse, and no row far off; first calls, which compile, in seconds (all lengths)",
        ("pattern", "binding", "lengths", *names, "splat s", "flex s", "verdict"),
    )
    pairs = {(m["case"], m["binding"]) for m in messages if m["what"] == "gate"}
    for case, binding in sorted(pairs, key=lambda pair: (_rank(pair[0]), pair[1] == "JAX")):
        here = [m for m in messages if m["what"] == "gate" and (m["case"], m["binding"]) == (case, binding)]
        flex = [m["s"] for m in messages if m["what"] == "compiled" and m["case"] == case and "flex" in m["name"]]
        # NaN is the worst.
        worst = {n: max((m["errors"][n][0] for m in here), key=lambda e: (math.isnan(e), e)) for n in names}
        bad = [fault for m in here for fault in m["faults"]]
        report.bars += 1
        report.failed += [f"{case} ({binding}): {bad[0]}"] if bad else []
        report.add(
            case.partition("/")[2], binding, " ".join(f"{m['q_len']:,}" for m in here),
            *(f"{worst[name]:.1e}" for name in names), f"{sum(m['first_call_s'] for m in here):.0f}",
            f"{sum(flex):.0f}" if flex and binding == "PyTorch" else "", "FAIL" if bad else "pass", gates=here,
        )  # fmt: skip
    return report


def troubles(messages: Sequence[Message]) -> Report:
    """What failed, was refused or had to be left out: one row for what went wrong in the same way."""
    report = Report("troubles", "What failed or was left out", ("what and why", "patterns and positions"))
    found: dict[tuple[str, str], list[Message]] = {}
    for m in messages:
        if m["what"] in ("error", "note", "dropped"):
            what = " ".join(filter(None, [m.get("name", ""), m.get("direction", ""), m.get("doing", "")]))
            why = {"error": "", "note": "with its own tiles: ", "dropped": "left out, no time"}[m["what"]]
            found.setdefault((what, why + m.get("message", "")[:200]), []).append(m)
    for (what, why), every in found.items():
        where = dict.fromkeys(_where(m) for m in every)
        few = [*list(where)[:3], *([f"{len(where) - 3} more"] if len(where) > 3 else [])]
        report.add(f"{what}: {why}", "; ".join(few), messages=every)
    return report


def _where(message: Message) -> str:
    case = (message["case"] or "").partition("/")[2] or message["suite"]
    return f"{case} {message.get('q_len') or ''}".strip()


# -- planning and tuning -----------------------------------------------------------------------------------------------


def planning(messages: Sequence[Message]) -> Report:
    """Preparing patterns."""
    report = Report(
        "gpu-planning",
        "Preparing a pattern, cold: plans, schedules and tables on the device, forward and backward, beside "
        f"create_block_mask, compiled (its first call apart). Bar: at {PLANNING_LENGTH:,} positions.",
        ("pattern", "positions", "splat ms", "create_block_mask ms", "x", "first call s", "splat MB", "its MB", "bar"),
    )
    found = {(m["case"], m["q_len"]): m for m in messages if m["what"] == "masks"}
    for case, q_len in _pairs(messages, "masks"):
        m = found.get((case, q_len))
        bar = PLANNING_BAR if q_len == PLANNING_LENGTH else None
        if m is None:
            verdict = judge(report, f"preparing {case} at {q_len}", None, bar)
            report.add(
                case.partition("/")[2], f"{q_len:,}", *["-", "", "", "", "", ""], verdict, case=case, q_len=q_len
            )
            continue
        ours, theirs = timing.Samples(tuple(m["ms"]["splat"])), m["ms"].get("create_block_mask")
        other = timing.Samples(tuple(theirs)) if theirs else None
        faster = other.median_ms / ours.median_ms if other else None
        memory = [m["peak_bytes"].get(name) for name in ("splat", "create_block_mask")]
        report.add(
            m["case"].partition("/")[2], f"{m['q_len']:,}", str(ours), str(other or "-"),
            "" if faster is None else f"{faster:.1f}", "" if m["first_call_s"] is None else f"{m['first_call_s']:.0f}",
            *("" if n is None else f"{n / 1e6:,.1f}" for n in memory),
            judge(report, f"preparing {m['case']} at {m['q_len']}", faster, bar), **m,
        )  # fmt: skip
    return report


def tuning(messages: Sequence[Message]) -> Report:
    """Times over the best of each pattern; the row of a configuration says what it would cost all patterns."""
    tuned = [m for m in messages if m["what"] == "tuned"]
    columns = list(dict.fromkeys(m["case"] for m in tuned))
    report = Report(
        "tune",
        "ms of a kernel's launches by configuration (* best of the pattern); mean: over the best of each pattern, "
        "geometric",
        ("kernel", "configuration", *(name.partition("/")[2] for name in columns), "mean"),
    )
    for kernel in dict.fromkeys(m["kernel"] for m in tuned):
        ms = {
            m["case"]: {name: statistics.median(v) for name, v in m["ms"].items()}
            for m in tuned
            if m["kernel"] == kernel
        }
        least = {case: min(values.values()) for case, values in ms.items()}
        rows = []
        for name in dict.fromkeys(name for values in ms.values() for name in values):
            loss = {case: values[name] / least[case] for case, values in ms.items() if name in values}
            mean = statistics.geometric_mean(loss.values()) if len(loss) == len(ms) else None
            rows.append((mean is None, mean or 0.0, name, loss))
        for _, mean, name, loss in sorted(rows, key=lambda row: row[:3]):
            cells = [f"{ms[c][name]:.3g}{'*' if loss[c] == 1 else ''}" if c in loss else "-" for c in columns]
            report.add(
                kernel, name, *cells, f"{mean:.3f}" if mean else "-", kernel=kernel, configuration=name, loss=loss,
                ms={case: values.get(name) for case, values in ms.items()}, mean=mean or None,
            )  # fmt: skip
    return report
