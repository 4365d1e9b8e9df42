"""The suite `cpu`: how it counts samples, what stops a wrong case, and a rehearsal of every bar."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import splat
from benchmarks import run
from benchmarks.cpu import NAMES, against, clock, gate, host, jax_side, native, torch_side
from benchmarks.cpu.clock import Sample, Turns
from benchmarks.cpu.setting import PATTERNS, THREADS, Case, Setting
from benchmarks.report import Report
from splat.codegen.cpp import compiler

needs_compiler = pytest.mark.skipif(compiler.missing() is not None, reason=compiler.missing() or "")

TINY = Case("window(16)", 64, 64, "float32")


def test_rounds_take_turns_and_pause() -> None:
    calls: list[str] = []
    turns = clock.take_turns({"ours": lambda: calls.append("o"), "peer": lambda: calls.append("p")}, 4, 10.0, turn_ms=0)
    assert "".join(calls[:8]) == "op" * 4
    assert len(turns.made["ours"]) == len(turns.made["peer"]) == len(calls) // 2 <= 12
    kept = json.loads(json.dumps(turns.to_json()))
    assert kept["ms"]["ours"] == [one.ms for one in turns.made["ours"]]


def test_the_first_call_of_a_turn_does_not_count() -> None:
    sleeps = iter([0.03, 0.002, 0.004, 0.003, 1e9])
    one = clock.sample(lambda: time.sleep(next(sleeps)), turn_ms=38.0)
    assert one.first_ms >= 30
    assert 3 <= one.ms < 30
    assert clock.sample(lambda: time.sleep(0.01), turn_ms=5.0).ms >= 10


def test_a_spent_budget_leaves_three_rounds() -> None:
    assert len(clock.take_turns({"ours": lambda: None}, 21, 0.0, 0.0).made["ours"]) == clock.LEAST_ROUNDS
    assert len(clock.take_turns({"ours": lambda: None}, 1, 0.0, 0.0).made["ours"]) <= 3


def test_disturbed_rounds_do_not_count_where_enough_are_clean() -> None:
    clean, disturbed = (lambda ms: Sample(ms, 0.0)), (lambda ms: Sample(ms, ms))
    enough = Turns({"ours": [clean(1.0)] * 3 + [disturbed(9.0)] * 4, "peer": [clean(3.0)] * 7}, 0.0)
    assert enough.clean == "3/7"
    assert (enough.samples["ours"].median_ms, enough.ratio("peer", "ours")) == (1.0, 3.0)
    assert enough.spread("peer", "ours") == (3.0, 3.0)
    few = Turns({"ours": [clean(1.0)] * 2 + [disturbed(9.0)] * 3, "peer": [clean(3.0)] * 5}, 0.0)
    assert few.samples["ours"].ms == (1.0, 1.0, 9.0), "the three that waited least"
    assert (few.clean_of("ours"), few.clean_of("peer")) == ("2/5", "5/5")


def test_every_combination_is_a_case_and_a_rehearsal_has_one() -> None:
    cases = Setting().cases(PATTERNS, (4096, 16384), (64, 128))
    assert len(set(cases)) == len(cases) == 40
    assert [case.q_len for case in Setting(quick=True).cases(PATTERNS, (4096, 16384), (64, 128))] == [256, 256]
    narrowed = Setting(only_texts=("causal()",), only_lengths=(4096,)).cases(PATTERNS, (4096, 16384), (64,))
    assert {(case.text, case.q_len) for case in narrowed} == {("causal()", 4096)}


def test_a_failure_is_a_row_and_a_missed_bar() -> None:
    report = Report("test", "title", ("pattern", "positions", "H", "type", "ms", "bar"))
    with Setting().attempt(report, TINY):
        raise gate.WrongError("off by 1")
    assert report.rows == [(*TINY.cells, "FAIL: WrongError: off by 1", "")]
    assert report.verdict.startswith("0 of 1 bars met")


@pytest.mark.parametrize("text", PATTERNS[:-1])
def test_the_gate_is_long_enough_to_see_the_pattern(text: str) -> None:
    length = Setting().gate_length
    dense = splat.parse(text).to_dense(length)
    for other in (splat.full(), splat.causal()):
        assert (dense != other.to_dense(length)).mean() > 0.1


def test_second_threads_of_a_core_stand_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, text in enumerate(("0-1", "0-1", "2,4", "3", "2,4")):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n", encoding="ascii")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 7}, raising=False)
    assert host.processors(tmp_path) == [0, 2, 3, 7, 1, 4]
    set_to: list[list[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: set_to.append(list(cores)), raising=False)
    with host.confined():
        assert len(set_to[-1]) == THREADS
    assert sorted(set_to[-1]) == [0, 1, 2, 3, 4, 7]


@needs_compiler
def test_the_gate_passes_what_is_right_and_stops_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(gate.check(TINY, 64, gradients=True)) == {"out", "d_query", "d_key", "d_value"}
    gate._check.cache_clear()
    monkeypatch.setattr(jax_side, "ready", lambda case, **_: lambda: np.full((1, 64, 8, 64), np.nan))
    with pytest.raises(gate.WrongError, match="out is off by inf"):
        gate.check(TINY, 64)


def no_last_rows(x: np.ndarray) -> None:
    x[:, -x.shape[1] // 4 :] = 0


def heads_swapped(x: np.ndarray) -> None:
    x[:, :, [0, 1]] = x[:, :, [1, 0]]


def one_nan(x: np.ndarray) -> None:
    x[:, -1, -1, 0] = np.nan


@functools.cache
def trained(case: Case) -> Any:
    """(output, gradients)."""
    return jax_side.ready(case, "xla", gradients=True)()


@pytest.mark.parametrize("part", range(4), ids=gate.NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spoil", [no_last_rows, heads_swapped, one_nan])
def test_what_is_wrong_in_small_rows_is_stopped(spoil: Callable[[np.ndarray], None], dtype: str, part: int) -> None:
    """Late rows of causal attention are means over many values: much smaller than the first ones."""
    case = Case("causal()", 1000, 8, dtype)
    right = trained(case)
    assert set(gate.check_rows(case, right)) == {"out", "d_query"}
    assert gate.agree(case, right, right) == 0
    wrong = gate.arrays(right)
    spoil(array := wrong[part].copy())
    wrong[part] = array
    result = (wrong[0], tuple(wrong[1:]))
    with pytest.raises(gate.WrongError, match=f"the peer's {gate.NAMES[part]} is off by .* of a row's largest value"):
        gate.agree(case, right, result)
    if part < 2:
        with pytest.raises(gate.WrongError, match=f"^{gate.NAMES[part]} is off by"):
            gate.check_rows(case, result)


@needs_compiler
@pytest.mark.parametrize(
    ("bar", "timed"),
    [
        (against.forward, ["flex", "sdpa", "xla", "dense"]),
        (against.causal, ["sdpa"]),
        (against.backward, ["sdpa", "xla"]),
    ],
)
def test_every_peer_is_checked(
    bar: Callable[[Setting], Report | Iterator[Report]], timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in turn gives zeros."""

    def zeros(result: Any) -> Any:
        return tuple(map(zeros, result)) if isinstance(result, tuple) else np.zeros(result.shape)

    right = functools.cache(jax_side.ready)
    monkeypatch.setattr(torch_side, "why_not", lambda setting: None)
    monkeypatch.setattr(torch_side, "as_numpy", lambda result: result)
    for broken in timed:

        def of(name: str, case: Case, *, gradients: bool = False, broken: str = broken) -> Any:
            call = right(case, "xla", gradients=gradients)
            return (lambda: zeros(call())) if name == broken else call

        def ready(case: Case, name: str = "cpp", *, gradients: bool = False, of: Any = of) -> Any:
            return right(case, gradients=gradients) if name == "cpp" else of(name, case, gradients=gradients)

        monkeypatch.setattr(jax_side, "ready", ready)
        monkeypatch.setattr(torch_side, "sdpa", lambda case, is_causal=False, of=of, **how: of("sdpa", case, **how))
        monkeypatch.setattr(torch_side, "flex", lambda case, of=of: (of("flex", case), dict.fromkeys("mc", 0.0)))
        reports = bar(Setting(quick=True))
        first = reports if isinstance(reports, Report) else next(iter(reports))
        assert len(first.failed) >= 2, broken
        assert all("WrongError: the peer's out is off by 1 of a row's" in one for one in first.failed), broken


@needs_compiler
def test_the_rate_is_measured() -> None:
    assert native.rate_gflops(1) > 0.1


def test_only_is_for_this_suite(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parse_arguments(["--suite", "waste", "--only", "linear"])
    assert "--only names bars of the suite cpu: add --suite cpu" in capsys.readouterr().err


@pytest.mark.sampled(1 / 2)
@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_rehearsal(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PyTorch's peers only where they are all that there is to measure, and torch is installed."""
    flex = [] if name == "causal" else ["--no-flex"]
    assert run.main(["--suite", "cpu", "--quick", *flex, "--only", name, "--out", str(tmp_path), "--strict"]) == 0
    printed = capsys.readouterr().out
    assert "no bar applies here" in printed
    if "skipped" not in printed or name in {"forward", "backward"}:
        kept: dict[str, Any] = json.loads((tmp_path / f"cpu-{name}.json").read_text(encoding="utf-8"))
        assert kept["samples"]
        assert kept["machine"]["date"]
        assert not any("error" in sample for sample in kept["samples"])
