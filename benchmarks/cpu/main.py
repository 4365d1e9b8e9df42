"""`python -m benchmarks.run --suite cpu`: the bars by name, in order."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

from benchmarks.cpu import NAMES, against, alone, decode, fresh, host, scores, torch_side
from benchmarks.cpu.setting import Setting
from benchmarks.report import Report

BARS: dict[str, Callable[[Setting], Report | Iterator[Report]]] = {
    "forward": against.forward,
    "share": alone.share,
    "causal": against.causal,
    "strided": against.strided,
    "backward": against.backward,
    "first": fresh.first,
    "overhead": alone.overhead,
    "threads": fresh.threads,
    "linear": alone.linear,
    "decode": decode.decode,
    "scores": scores.scores,
}
assert tuple(BARS) == NAMES


def run(given: argparse.Namespace) -> Iterator[Report]:
    """The tables asked for, as they are made."""
    setting = Setting.of(given)
    if not setting.quick:
        host.keep_memory()
    with host.confined():
        if not torch_side.why_not(setting):
            torch_side.torch()  # before JAX starts its threads, so that it is set up in every table alike
        for name in dict.fromkeys(given.only or NAMES):
            made = BARS[name](setting)
            yield from [made] if isinstance(made, Report) else made
