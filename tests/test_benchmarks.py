"""The benchmarks' registry holds what it says, and the suites that need no long measurement run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import splat
from benchmarks import cases, peers, report, run, timing, waste
from benchmarks.cases import Case
from splat.pattern.parse import CONSTRUCTORS

SMALL = 1024

each_case = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: f"{case.suite}-{case.name}")


def test_names_are_unique() -> None:
    names = [(case.suite, case.name) for case in cases.CASES]
    assert len(set(names)) == len(names)


def test_vocabulary_is_complete() -> None:
    used = " ".join(case.expression(SMALL) for case in cases.of("vocabulary"))
    assert [name for name in CONSTRUCTORS if f"{name}(" not in used] == []


@each_case
def test_case_plans(case: Case) -> None:
    for pattern in case.patterns(SMALL):
        assert splat.parse(repr(pattern)) == pattern
        plan = splat.plan(pattern, SMALL)
        assert plan.nnz > 0
        assert "non-zeros" in str(plan)


@each_case
def test_peers_are_asked_for_the_same_pairs(case: Case) -> None:
    length = 1024 if "dilated" in case.name else 256
    position = np.arange(length)
    for pattern in case.patterns(length):
        formula = peers.mask_formula(repr(pattern), length)
        asked = np.broadcast_to(formula(position[:, None], position[None, :]), (length, length))
        np.testing.assert_array_equal(asked, pattern.to_dense(length))


def test_waste_is_what_the_schedule_covers() -> None:
    case = Case("test", "test", "causal() & window(40)")
    plan = splat.plan("causal() & window(40)", 256, block_q=32, block_kv=32)
    area = sum(keep.size for *_, keep in plan.forward.each_tile())
    assert waste.waste_of(case, 256, 32) == area / np.count_nonzero(splat.parse(case.expression(256)).to_dense(256))


def test_interleaving_takes_turns() -> None:
    calls: list[str] = []
    samples = timing.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "ab" * 4  # the first call compiles
    assert [len(s.ms) for s in samples.values()] == [3, 3]


def test_the_first_of_several_calls_of_a_turn_does_not_count() -> None:
    calls: list[int] = []
    samples = timing.interleave({"a": lambda: calls.append(1)}, 2, turn_ms=1.0)["a"]
    assert sum(map(len, samples.turns)) == len(calls) - 3  # one compiles, one of each turn
    assert all(len(turn) > 1 for turn in samples.turns)
    assert samples.ms == tuple(float(np.median(turn)) for turn in samples.turns)


def test_ratios_are_of_each_round() -> None:
    ours, theirs = timing.Samples((1.0, 10.0, 2.0)), timing.Samples((3.0, 30.0, 2.0))
    assert timing.ratio(theirs, ours) == 3.0
    assert timing.Samples((4.0, 5.0, 6.0)).spread == 0.1
    assert timing.Samples((4.0,)).spread == 0.0


def test_bars_are_judged_where_they_apply() -> None:
    case = Case("test", "test", "full()", (cases.Bar("waste", 64, 1.5),))
    table = report.Report("test", "title", ("pattern", "bar"))
    table.add("met", table.judge("met", 1.5, case.bar("waste", 64)))
    table.add("missed", table.judge("missed", 1.6, case.bar("waste", 64)))
    table.add("elsewhere", table.judge("elsewhere", 9.0, case.bar("waste", 128)))
    table.add("at least", table.judge("at least", 7.0, 7.0, at_least=True))
    assert [row[1] for row in table.rows] == ["≤ 1.5 pass", "≤ 1.5 FAIL", "", "≥ 7 pass"]
    assert table.verdict.splitlines()[0] == "2 of 3 bars met"
    assert table.failed == ["missed: 1.6, bar 1.5"]


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "samples.json"
    report.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        report.write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["samples.json"]


def test_run_prints_and_keeps_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--no-flex", "--suite", "waste", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Waste at 1,024 positions" in printed
    kept = json.loads((tmp_path / "waste.json").read_text(encoding="utf-8"))
    assert kept["samples"]
    assert kept["machine"]["packages"]["numpy"] == np.__version__


def test_planning_is_measured_on_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--suite", "planning"])
    assert "planning: add --device cuda" in capsys.readouterr().err
    assert run.parse_arguments(["--suite", "planning", "--device", "cuda"]).suite == ["gpu-planning"]
