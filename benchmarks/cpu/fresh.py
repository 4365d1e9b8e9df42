"""Bars that need fresh processes: the first call, and two threads over one."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import peers
from benchmarks.cpu import gate, host
from benchmarks.cpu.clock import foreign, quartiles
from benchmarks.cpu.setting import CASE_COLUMNS, DTYPES, WINDOW, Case, Setting
from benchmarks.report import Report

FIRST_BAR_S = 3.0
THREADS_BAR = 1.8
REPEATS = 3


def _child(what: str, case: Case, *more: str) -> dict[str, Any]:
    sizes = (case.text, str(case.q_len), str(case.head_dim), case.dtype)
    return peers.run_module("benchmarks.cpu.child", what, *sizes, *more)


def first(setting: Setting) -> Report:
    """Fresh processes with an empty cache; JAX is imported and has computed something before."""
    report = Report(
        "cpu-first",
        f"First call in a fresh process, nothing compiled before, less a warm call; {WINDOW}. "
        f"Bar: <= {FIRST_BAR_S:g} s, forward.",
        (*CASE_COLUMNS, "call", "seconds", "p25-p75", "foreign", "bar"),
    )
    for case in _cases(setting):
        for direction in ("forward", "gradients"):
            with setting.attempt(report, case):
                with foreign() as others:
                    made = [
                        _child("first", case, "--direction", direction) for _ in range(1 if setting.quick else REPEATS)
                    ]
                seconds = tuple(one["first_s"] - one["warm_s"] for one in made)
                low, high = quartiles(seconds)
                bar = setting.bar(FIRST_BAR_S) if direction == "forward" else None
                setting.add(
                    report, *case.cells, direction, f"{statistics.median(seconds):.2f}", f"{low:.2f}-{high:.2f}",
                    f"{others.share:.0%}", report.judge(f"first call, {case}", statistics.median(seconds), bar),
                    case=str(case), direction=direction, children=made, foreign=others.share,
                )  # fmt: skip
    return report


def threads(setting: Setting) -> Report:
    """The same call in processes that may use one processor, and two, one after the other."""
    report = Report(
        "cpu-threads",
        f"From one thread to two; {WINDOW}; processes confined to one processor and to two. Bar: >= {THREADS_BAR:g}.",
        (*CASE_COLUMNS, "1 thread ms", "2 threads ms", "times faster", "rounds", "foreign", "bar"),
    )
    cores = host.processors()
    if len(cores) < 2:
        report.title += " Skipped: this process may use fewer than two processors."
        return report
    for case in _cases(setting):
        with setting.attempt(report, case):
            found = gate.check(case, setting.gate_length)
            one, two, children = [], [], []
            with foreign() as others:
                for n in range(1 if setting.quick else REPEATS):
                    for into, allowed in ((one, [cores[n % 2]]), (two, cores[:2])):
                        made = _child("threads", case, "--cores", *map(str, allowed), "--calls", str(setting.rounds))
                        into.append(made["median_ms"]["ours"])
                        children.append({"cores": allowed, **made})
            faster = statistics.median(one) / statistics.median(two)
            setting.add(
                report, *case.cells, f"{statistics.median(one):.4g}", f"{statistics.median(two):.4g}", f"{faster:.2f}",
                " ".join(f"{a / b:.2f}" for a, b in zip(one, two, strict=True)), f"{others.share:.0%}",
                report.judge(f"threads, {case}", faster, setting.bar(THREADS_BAR), at_least=True),
                case=str(case), gate=found, children=children, times_faster=faster, foreign=others.share,
            )  # fmt: skip
    return report


def _cases(setting: Setting) -> list[Case]:
    return [Case(WINDOW, setting.length(4096), 64, dtype) for dtype in (DTYPES[:1] if setting.quick else DTYPES)]
