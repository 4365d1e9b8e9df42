"""Waste: scores computed / non-zeros. Deterministic; needs no accelerator. FlexAttention's beside it."""

from __future__ import annotations

import splat
from benchmarks import peers
from benchmarks.cases import CASES, Case
from benchmarks.report import Report

TILES = (32, 64, 128)

#: The tile that the bars are stated for.
BAR_TILE = 64


def waste_of(case: Case, q_len: int, block: int) -> float:
    """Tile area over non-zeros with square tiles, all distinct heads together."""
    plans = [splat.plan(pattern, q_len, block_q=block, block_kv=block) for pattern in case.patterns(q_len)]
    return sum(plan.forward.area for plan in plans) / sum(plan.nnz for plan in plans)


def flex_waste(case: Case, q_len: int) -> float:
    """FlexAttention's tile area over non-zeros, from its own block mask."""
    patterns = case.patterns(q_len)
    area = sum(peers.flex_area(repr(pattern), q_len) for pattern in patterns)
    return area / sum(splat.plan(pattern, q_len).nnz for pattern in patterns)


def run(q_len: int, flex_len: int | None) -> Report:
    """Waste of every case at `q_len`; FlexAttention's at `flex_len` positions, which takes it O(flex_len^2)."""
    flex = "FlexAttention 128" if flex_len is None else f"FlexAttention 128 at {flex_len:,}"
    report = Report(
        "waste",
        f"Waste at {q_len:,} positions: tile area / non-zeros. Bars: {BAR_TILE} x {BAR_TILE} tiles at 16,384.",
        ("pattern", "suite", "density", *(f"{b} x {b}" for b in TILES), flex, "bar"),
    )
    for case in CASES:
        if not case.serves(q_len):
            continue
        measured = {block: waste_of(case, q_len, block) for block in TILES}
        density = sum(splat.plan(p, q_len).density for p in case.patterns(q_len)) / len(case.patterns(q_len))
        theirs = None if flex_len is None else flex_waste(case, flex_len)
        verdict = report.judge(f"{case.name} ({case.suite})", measured[BAR_TILE], case.bar("waste", q_len))
        report.add(
            case.name, case.suite, f"{density:.2%}", *(f"{value:.3f}" for value in measured.values()),
            "" if theirs is None else f"{theirs:.2f}", verdict,
            case=case.name, suite=case.suite, expression=case.expression(q_len)[:200], q_len=q_len, density=density,
            waste={str(block): value for block, value in measured.items()}, flex_q_len=flex_len, flex_waste=theirs,
        )  # fmt: skip
    return report
