"""`splat.bench`: everything that needs no measurement: gates, turns, memory, summaries, baselines, pictures."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import splat
from splat import reference
from splat.bench import bars, baseline, gate, measure, memory, peers, plots, record, report, suites, summary, tables
from splat.bench.cases import Case
from splat.bench.clock import take_turns
from splat.bench.peers.base import Contender, Kind, Layout, Ready
from splat.bench.problem import OPERATIONS, Problem
from splat.bench.record import Measured, Record, Run
from splat.bench.truth import Truth, sample
from splat.errors import ArgumentError

UNION = Case("union", "test", "causal() & (window(9) | strided(7))")


def problem(op: str = "sddmm", case: Case = UNION, q_len: int = 64, dtype: str = "float32") -> Problem:
    return Problem(op, case, q_len, heads=2, head_dim=8, dtype=dtype)


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


# -- what is measured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", suites.SUITES.values(), ids=lambda suite: suite.name)
def test_suites_make_problems(suite: suites.Suite) -> None:
    quick = suites.problems(suite, suites.Selection(quick=True))
    assert quick
    assert len(quick) <= len(suites.problems(suite, suites.Selection()))
    for one in quick:
        assert one.case in suite.cases
        assert one.nnz > 0


def test_quick_takes_one_of_each_family() -> None:
    chosen = suites.problems(suites.find("paper"), suites.Selection(ops=("spmm",), quick=True))
    assert [one.case.name for one in chosen] == ["windowed, 10 %", "blocked, 10 %", "strided, 10 %"]


def test_flops_are_of_non_zeros() -> None:
    counts = {op: problem(op).flops / problem(op).nnz for op in ("sddmm", "spmm", "attention", "composed", "training")}
    assert counts == {
        "training": 14 * 8 * 2,
        "sddmm": 2 * 8 * 2,
        "spmm": 2 * 8 * 2,
        "attention": 4 * 8 * 2,
        "composed": 4 * 8 * 2,
    }


def test_inputs_are_numbers_that_the_dtype_has() -> None:
    given, usual = (problem("attention", dtype=dtype).inputs.query for dtype in ("bfloat16", "float32"))
    assert given.dtype == np.float32
    bits = given.view(np.uint32)
    assert not (bits & 0xFFFF).any()
    assert 0 < np.abs(given - usual).max() <= 2**-8 * np.abs(usual).max()


@pytest.mark.parametrize("op", ["spmm", "softmax"])
def test_csr_holds_the_values(op: str) -> None:
    import scipy.sparse

    given = problem(op)
    pairs, data = given.pairs, given.data
    for n in range(2):
        matrix = scipy.sparse.csr_array((data[n], pairs.column, pairs.indptr), shape=(64, 64))
        assert matrix.has_sorted_indices
        dense = np.zeros((64, 64), np.float32)
        columns, row = given.acsr.columns(), np.arange(64)[:, None]
        keep = given.acsr.has_value()
        dense[np.broadcast_to(row, keep.shape)[keep], columns[keep]] = given.inputs.values[n][keep]
        np.testing.assert_array_equal(matrix.toarray(), dense)


def test_what_is_large_goes_and_is_made_again() -> None:
    given = problem("spmm")
    before = given.data
    given.release()
    assert not {"inputs", "pairs", "data"} & set(vars(given))
    assert "pairs" not in vars(given.acsr)
    np.testing.assert_array_equal(given.data, before)


def test_block_areas_are_of_blocks_with_a_non_zero() -> None:
    for text in ("window(40)", "strided(7)", "strided(100)", "causal() & (window(9) | strided(200))", "sink(3)"):
        acsr = splat.build(splat.parse(text), 500)
        mask = np.pad(acsr.to_dense(), (0, 12)).reshape(16, 32, 16, 32)
        assert measure.block_area(acsr, 32) == mask.any(axis=(1, 3)).sum() * 32 * 32


# -- the gate ----------------------------------------------------------------------------------------------------------


def contender(call: Any, layout: Layout = Layout.DENSE, kind: Kind = Kind.DENSE, name: str = "peer") -> Contender:
    return Contender(name, name, kind, {"sddmm": lambda given: Ready(lambda: call(given), layout, np.asarray)})


def product(given: Problem) -> np.ndarray:
    return given.inputs.query @ given.inputs.key.swapaxes(1, 2)


def test_the_gate_passes_what_is_right_and_stops_what_is_wrong() -> None:
    assert gate.check_small(problem(), contender(product)) < 1e-6
    for wrong in (lambda given: product(given) + 1e-3, lambda given: product(given) * np.nan):
        with pytest.raises(gate.WrongError, match="of the largest value"):
            gate.check_small(problem(), contender(wrong))


def test_a_sample_has_both_ends_and_is_the_same_every_time() -> None:
    for count in (8, 64):
        rows = sample(4096, count)
        assert len(set(rows)) == count
        assert rows == sorted(rows) == sample(4096, count)
        assert (rows[0], rows[-1]) == (0, 4095)
    assert sample(5, 8) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("op", ["sddmm", "softmax", "spmm", "attention", "training"])
@pytest.mark.parametrize("peer", [name for name, peer in peers.PEERS.items() if "cpu" in peer.devices])
def test_peers_compute_the_same(peer: str, op: str) -> None:
    found = peers.PEERS[peer]
    if op not in found.make or found.slow_to_prepare or found.missing("cpu"):
        pytest.skip("not this operation, not here, or slow to prepare")
    given = problem(op)
    ready = found.make[op](given)
    assert gate.check(Truth.everywhere(given), ready, ready.call()) < 2e-6


@pytest.mark.parametrize("op", ["attention", "training"])
@pytest.mark.parametrize("who", ["splat-xla", "dense", "sdpa"])
def test_bfloat16_is_rounded_to_and_has_its_own_tolerance(who: str, op: str) -> None:
    found = peers.ours.contender("xla") if who == "splat-xla" else peers.PEERS[who]
    if found.missing("cpu"):
        pytest.skip("not here")
    truth = Truth.everywhere(problem(op, dtype="bfloat16"))
    ready = found.make[op](truth.problem)
    result = ready.call()
    assert 1e-4 < gate.check(truth, ready, result) < 2**-6
    usual = Truth.everywhere(problem(op))
    with pytest.raises(gate.WrongError, match="2e-05 is allowed"):
        gate.check(usual, ready, result)


EMPTY_ROWS = Case("empty rows", "test", "causal() & (window(9) | strided(7)) - global_tokens(3)")


@pytest.mark.parametrize("case", [UNION, EMPTY_ROWS, Case("global", "test", "window(2) | global_tokens(2)")], ids=str)
def test_the_truth_of_training_is_the_dense_oracles(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splat.bench.truth.BLOCK_SCORES", 2 * 150 * 40)  # the last block is not a whole one
    given = problem("training", case, q_len=150)
    query, key, value, d_out = (np.moveaxis(x, 0, 1)[None] for x in given.inputs[:4])
    mask = given.pattern.to_dense(150)
    out, _ = reference.attention(query, key, value, mask)
    dense = [out, *reference.gradients(query, key, value, mask, d_out)]  # each [1, positions, heads, head dim]
    for truth, counts in ((Truth.everywhere(given), [150] * 4), (Truth.sampled(given), [64, 64, 8, 8])):
        assert [len(part.rows) for part in truth.parts] == counts
        for part, right in zip(truth.parts, dense, strict=True):
            np.testing.assert_allclose(np.stack(part.expected), right[0, list(part.rows)], rtol=0, atol=1e-13)


@pytest.mark.parametrize("part", range(4), ids=["output", "d_query", "d_key", "d_value"])
def test_the_gate_stops_every_wrong_gradient(part: int) -> None:
    truth = Truth.sampled(problem("training", q_len=100))
    ready = peers.ours.contender("xla").make["training"](truth.problem)
    arrays = ready.read(ready.call())
    assert arrays.shape == (4, 2, 100, 8)
    right = dataclasses.replace(ready, read=lambda result: result)
    assert gate.check(truth, right, arrays) < 2e-6
    for wrong in (1e-3, np.nan):
        changed = arrays.copy()
        changed[part, 1, 99, 3] += wrong
        with pytest.raises(gate.WrongError, match="of the largest value"):
            gate.check(truth, right, changed)


def test_flex_attention_has_no_backward_here() -> None:
    assert peers.PEERS["flex"].refuses(problem("training")) == "FlexAttention has no backward on CPUs"
    assert peers.PEERS["flex"].refuses(problem("attention")) is None
    assert peers.PEERS["flex"].refuses(dataclasses.replace(problem("training"), device="cuda")) is None


def test_a_record_has_everyones_numbers_and_why_others_have_none() -> None:
    def broken(given: Problem) -> Any:
        raise RuntimeError("no such kernel")

    everyone = [
        contender(product, kind=Kind.OURS, name="ours"),
        contender(product, name="peer"),
        contender(broken, name="broken"),
        contender(lambda given: 2 * product(given), name="wrong"),
        dataclasses.replace(contender(product, name="huge"), needs_bytes=lambda _: 1e18),
        dataclasses.replace(contender(product, name="picky"), refuses=lambda _: "the pattern is no window"),
    ]
    made = measure.measure(problem(), everyone, measure.QUICK, lambda text: None)
    assert list(made.measured) == ["ours", "peer"]
    assert made.measured["ours"].off is not None
    assert made.gate_off is not None
    assert made.left_out["broken"] == "RuntimeError: no such kernel"
    assert made.left_out["wrong"].startswith("WrongError: off by")
    assert made.left_out["huge"].startswith("needs about 1000000000.0 GB")
    assert made.left_out["picky"] == "the pattern is no window"
    assert made.faster("ours", "peer") == pytest.approx(
        made.measured["peer"].median_ms / made.measured["ours"].median_ms
    )
    assert Record.of(json.loads(json.dumps(dataclasses.asdict(made)))) == made


def test_slow_ones_leave_early() -> None:
    calls: list[str] = []
    functions = {"fast": lambda: calls.append("f"), "slow": lambda: calls.append("s")}
    turns = take_turns(functions, 4, 10.0, turn_ms=0, at_most={"slow": 1})
    assert calls.count("s") == 1
    assert len(turns.made["slow"]) == 1
    assert len(turns.made["fast"]) >= 4
    assert turns.ratio("slow", "fast") > 0
    assert turns.spread("slow", "fast")[0] > 0


def test_everyone_rests_after_a_turn_whose_threads_go_on() -> None:
    ended: list[float] = []
    begun: list[float] = []
    functions = {
        "spins": lambda: ended.append(time.perf_counter()),
        "next": lambda: begun.append(time.perf_counter()),
    }
    take_turns(functions, 2, 10.0, turn_ms=0, rest_s={"spins": 0.05})
    assert min(after - before for before, after in zip(ended, begun, strict=True)) >= 0.05


def test_memory_of_a_call() -> None:
    peak = memory.call_peak_bytes(lambda: np.ones(1 << 22).sum())
    assert peak is None or 30e6 < peak < 80e6


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


def test_operations_have_a_contender() -> None:
    everyone = [peers.ours.contender("xla"), peers.ours.planning()]
    assert {op for one in everyone for op in one.make} == set(OPERATIONS)
