"""What is made of a run: summaries, bars, tables, baselines, pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from splat.bench import bars, baseline, plots, record, report, summary, tables
from splat.bench.record import Measured, Record, Run
from splat.errors import ArgumentError


def measured(*ms: float, first_ms: float = 50.0) -> Measured:
    return Measured(ms, ms, tuple(0.0 for _ in ms), 1.0, first_ms, 4 << 20, 1e-7)


def one(
    case: str = "windowed, 10 %", q_len: int = 1024, op: str = "sddmm", dtype: str = "float32", **who: Measured
) -> Record:
    return Record(
        op=op, suite="paper", case=case, expression="window(3)", q_len=q_len, heads=1, head_dim=64, dtype=dtype,
        nnz=q_len * 64, density=64 / q_len, flops=2 * q_len * 64 * 64, metadata_bytes=8 * q_len, csr_bytes=260 * q_len,
        waste={"splat": 1.1, "blocks of 128": 2.2}, gate_off=1e-7, matmul_flops_per_s=2e11, measured=who, left_out={},
        clean="3/3", foreign=0.01,
    )  # fmt: skip


def run_of(*records: Record, **fields: Any) -> Run:
    facts = {"cpu": "some processor", "gpu": None, "date": "today", "system": "Linux", "python": "3.11",
             "packages": {"jax": "0.10"}}  # fmt: skip
    settings = {"quick": False, "threads": 2, "device": "cpu", "turn_ms": 50.0}
    names = {"ours": "SPLAT", "scipy": "SciPy", "bcoo": "BCOO"}
    made = Run("paper", "splat bench paper", settings, facts, names, ("ours",), ("scipy", "bcoo"), {"flex": "not here"})
    return dataclasses.replace(made, records=records, **fields)


# -- summaries ---------------------------------------------------------------------------------------------------------


def test_speedups_are_over_the_best_sparse_format_too() -> None:
    made = run_of(
        one("a", ours=measured(1.0), scipy=measured(2.0), bcoo=measured(8.0)),
        one("b", ours=measured(1.0), scipy=measured(8.0), bcoo=measured(4.0)),
        one("c", ours=measured(1.0)),
    )
    assert summary.rivals(made, "sddmm") == ["scipy", "bcoo", summary.BEST_SPARSE]
    assert summary.geomean(made, "sddmm", "scipy") == (pytest.approx(4.0), 2)
    assert summary.geomean(made, "sddmm", summary.BEST_SPARSE) == (pytest.approx(8**0.5), 2)
    assert summary.geomean(made, "sddmm", "nobody") is None


def test_slopes() -> None:
    lengths = [1024, 2048, 4096]
    assert summary.slope(lengths, [3.0 * n for n in lengths]) == pytest.approx(1.0)
    assert summary.slope(lengths, [1e-6 * n * n for n in lengths]) == pytest.approx(2.0)
    assert summary.slope([1024, 1024], [1.0, 2.0]) is None


def test_tables_state_what_was_found() -> None:
    records = [one(q_len=n, ours=measured(n / 1024, n / 1000), scipy=measured(n / 256)) for n in (1024, 2048)]
    made = run_of(*records, failed=("spmm, somewhere: WrongError: off",))
    table = tables.speedups(made, "sddmm")
    assert table.rows[0][:3] == ("windowed, 10 %", "1,024", "6.2%")
    assert table.rows[-1][0] == "geometric mean"
    assert len({len(row) for row in table.rows} | {len(table.columns)}) == 1
    slopes = tables.slopes(made, "sddmm")
    assert slopes is not None
    assert slopes.rows[0][3] == "1.00"
    assert tables.notes(made)[0] == "flex took no part: not here"
    assert tables.notes(made)[-1] == "FAILED: spmm, somewhere: WrongError: off"
    share = tables.structure(made).rows[0][-1]
    assert share == f"{8 / 260:.2%}"


def test_dtypes_have_tables_and_pictures_of_their_own() -> None:
    both = [one(op="attention", dtype=dtype, ours=measured(1.0), scipy=measured(ms))
            for dtype, ms in (("float32", 2.0), ("bfloat16", 8.0))]  # fmt: skip
    made = run_of(*both)
    assert made.tasks == ("attention", "attention, bfloat16")
    assert [summary.geomean(made, task, "scipy") for task in made.tasks] == [
        (pytest.approx(2.0), 1), (pytest.approx(8.0), 1),
    ]  # fmt: skip
    assert tables.speedups(made, made.tasks[1]).title == "attention: bfloat16, batch 1, 1 head of 64, 2 threads"
    names = [plot.name for plot in plots.plots(made)]
    assert names == ["speedup-attention-1024", "speedup-attention-bfloat16-1024", "waste"]
    page = report.report(made)
    assert page.count("<figure") == 3
    assert page.index('id="speedup-attention-1024"') < page.index("<h2>attention, bfloat16</h2>")


def test_shares_are_of_the_products_that_were_measured() -> None:
    """On a CPU all are of float32; on a GPU each is of its record's dtype."""
    records = [dataclasses.replace(one(op="attention", dtype=dtype, ours=measured(1.0)), matmul_flops_per_s=peak)
               for dtype, peak in (("float32", 5e13), ("bfloat16", 8e14))]  # fmt: skip
    here = run_of(*records)
    assert (here.peak_flops_per_s("float32"), here.peak_flops_per_s("bfloat16")) == (8e14, 8e14)
    there = run_of(*records, settings={**here.settings, "device": "cuda"})
    assert (there.peak_flops_per_s("float32"), there.peak_flops_per_s("bfloat16")) == (5e13, 8e14)
    assert "best matrix product 800000 GFLOP/s float32" in tables.notes(here)[-1]
    assert "best matrix product 50000 GFLOP/s float32, 800000 GFLOP/s bfloat16" in tables.notes(there)[-1]


def test_missed_bars_are_named() -> None:
    def attention(case: str, ms: float, dtype: str = "float32") -> Record:
        made = one(case, 4096, "attention", dtype, ours=measured(1.0), dense=measured(ms))
        return dataclasses.replace(made, suite="figures")

    made = run_of(
        attention("window 256", 7.0), attention("strided 64", 29.0), attention("dense causal", 0.5),
        attention("strided 64", 29.0, "bfloat16"),
        one("window", 16384, "planning", ours=measured(5.1)), one("window", 1 << 20, "planning", ours=measured(99.0)),
    )  # fmt: skip
    assert bars.missed(made) == [
        "attention, strided 64, 4,096: 29 times faster than dense, 30 are wanted",
        "planning, window, 16,384: 5.1 ms, 5 are allowed",
    ]
    assert f"BAR MISSED: {bars.missed(made)[0]}" in tables.notes(made)
    assert not bars.missed(dataclasses.replace(made, settings={**made.settings, "quick": True}))


# -- baselines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now", "slower", "faster"),
    [
        ((10.0, 10.1, 10.2), (13.0, 13.1, 13.2), True, False),
        ((10.0, 10.1, 10.2), (10.3, 10.35, 10.4), False, False),  # apart, but by 2 %
        ((8.0, 10.0, 14.0), (11.0, 12.0, 15.0), False, False),  # the quartiles overlap
        ((13.0, 13.1, 13.2), (10.0, 10.1, 10.2), False, True),
        ((0.010, 0.010, 0.010), (0.020, 0.020, 0.020), False, False),  # too short to tell
    ],
)
def test_regressions_are_beyond_the_noise(before: Any, now: Any, slower: bool, faster: bool) -> None:
    then, today = run_of(one(ours=measured(*before))), run_of(one(ours=measured(*now)), one("new", ours=measured(1.0)))
    found = baseline.compare(then, today)
    (change,) = found.changes
    assert (change.slower, change.faster) == (slower, faster)
    assert bool(found.regressions) == slower
    assert found.unmatched == 1
    assert found.other_machine is None
    verdict = "SLOWER" if slower else "faster" if faster else "same"
    assert str(change).startswith(verdict)


def test_dtypes_are_not_compared_with_each_other() -> None:
    then, today = (run_of(one(op="attention", dtype=dtype, ours=measured(1.0))) for dtype in ("bfloat16", "float32"))
    assert baseline.compare(then, today).unmatched == 1


def test_peers_never_regress() -> None:
    then = run_of(one(ours=measured(1.0, 1.0), scipy=measured(1.0, 1.0)))
    today = run_of(one(ours=measured(1.0, 1.0), scipy=measured(9.0, 9.0)))
    assert not baseline.compare(then, today).regressions


def test_runs_survive_json(tmp_path: Path) -> None:
    made = run_of(one(ours=measured(1.0, 2.0)))
    path = tmp_path / "run.json"
    path.write_text(json.dumps(made.to_json()), encoding="utf-8")
    assert record.read(path) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is no JSON"),
        ("[]", "holds no run of splat bench"),
        ("{}", "holds no run of splat bench"),
        ('{"format": 99}', "is of format 99, not 2. Measure it anew."),
    ],
)
def test_unreadable_baselines(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ArgumentError, match=message):
        record.read(path)


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_the_report_has_its_plots_and_needs_no_other_file() -> None:
    records = [
        one(f"{name}, {percent} %", n, ours=measured(1.0, 1.1), scipy=measured(2.0 + percent), bcoo=measured(5.0))
        for n in (1024, 2048)
        for name in ("windowed", "strided")
        for percent in (10, 50)
    ]
    made = run_of(*records)
    names = [plot.name for plot in plots.plots(made)]
    assert names == ["speedup-sddmm-1024", "speedup-sddmm-2048", "time-sddmm", "memory-sddmm", "waste"]
    page = report.report(made, baseline.compare(made, made))
    for name in names:
        assert f'<figure id="{name}"><img alt=' in page
    assert page.count("data:image/svg+xml;base64,") == len(names)
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "Against the baseline" in page
    assert "flex took no part: not here" in page
    assert plots.plots(made)[0].png().startswith(b"\x89PNG")


def test_the_report_of_published_patterns_has_bars() -> None:
    made = run_of(one("Longformer", ours=measured(1.0), scipy=measured(2.0)), one("<b>", ours=measured(1.0)))
    assert [plot.name for plot in plots.plots(made)] == ["speedup-sddmm-1024", "waste"]
    assert "&lt;b&gt;" in report.report(made)
