"""The GPU suites without a GPU: what they are made of, processes that misbehave, and a rehearsal of everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import splat
from benchmarks import cases, peers, run, timing
from benchmarks.gpu import jobs, main, pool, tables
from benchmarks.gpu.jobs import BOTH, FORWARD, Job
from benchmarks.gpu.worker import MARK

needs_torch = pytest.mark.skipif(not peers.has_flex(), reason="torch is not installed")

ROOT = Path(__file__).parents[1]


# -- what is asked for -------------------------------------------------------------------------------------------------


def test_jobs_survive_json() -> None:
    for suite in (*jobs.SUITES, "tune"):
        for job in jobs.jobs(suite, "cuda"):
            assert Job.of(json.loads(json.dumps(main.dataclasses.asdict(job)))) == job


def test_every_bar_names_a_case_that_is_measured() -> None:
    measured = {jobs.name_of(case) for case in jobs.cases_of("sas")}
    assert set(tables.CASE_BARS) <= measured
    assert set(tables.BAR_LENGTHS) <= set(jobs.LENGTHS["sas"])
    assert tables.PLANNING_LENGTH in jobs.LENGTHS["gpu-planning"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "sas"], "sas: add --device cuda, or --device model for predictions"),
        (["--device", "cuda", "--suite", "waste"], "waste: this is measured on the host; leave --device out"),
        (
            ["--device", "cpu"],
            "--device cpu is a rehearsal with an interpreter, whose numbers mean nothing: add --quick",
        ),
        (["--device", "model", "--suite", "tune"], "the model knows attention only: --suite sas models paper"),
    ],
)
def test_refusals(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parse_arguments(arguments)
    assert said in capsys.readouterr().err


def test_rehearsals_are_not_results(tmp_path: Path) -> None:
    assert main.result_path(tmp_path, "cpu") == tmp_path / "rehearsal.json"
    with pytest.raises(SystemExit, match="not written to benchmarks/results"):
        main.result_path(main.RESULTS / "x", "cpu")


def test_results_are_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "machine", lambda: {"gpu": {"name": "NVIDIA H200"}})
    first = main.result_path(tmp_path, "cuda")
    assert first is not None
    assert first.name.startswith("h200-20")
    first.touch()
    assert main.result_path(tmp_path, "cuda") == first.with_stem(f"{first.stem}-2")


# -- what is compared --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", jobs.cases_of("sas"), ids=lambda case: case.name)
def test_block_counts_are_of_the_mask(case: cases.Case) -> None:
    length, block = 300, 64  # the last block is cut
    (pattern,) = case.patterns(length)
    mask = np.zeros((320, 320), bool)
    mask[:length, :length] = pattern.to_dense(length)
    counts = peers.block_counts(peers.mask_formula(case.expression(length), length), length, block)
    np.testing.assert_array_equal(np.stack(counts), mask.reshape(5, block, 5, block).sum((1, 3)))


@needs_torch
@pytest.mark.parametrize("block", [64, 128])
def test_block_masks_are_those_of_create_block_mask(block: int) -> None:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    from benchmarks.gpu import flex

    text, length = "sliding_window(100) | causal() & strided(40)", 512
    ours = flex.block_mask(text, length, block, "cpu")
    mod = flex.mask_mod(text, length, "cpu")
    theirs = create_block_mask(mod, None, None, length, length, device="cpu", BLOCK_SIZE=block)
    assert ours.seq_lengths == theirs.seq_lengths
    names = [
        f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")
    ]
    for name in names:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), msg=name)


@needs_torch
def test_gate_passes_the_truth_and_nothing_else() -> None:
    import torch

    from benchmarks.gpu import check

    text = "sliding_window(40) - sink(1)"  # the first row attends to nothing
    arrays = [x[0] for x in check.inputs(96, 2, 16, "bfloat16", "cpu")]
    truth = check.reference(arrays, text)
    mask = torch.from_numpy(splat.parse(text).to_dense(96))
    query, key, value = (x.double().requires_grad_() for x in arrays[:3])
    scores = (query @ key.mT / 4).masked_fill(~mask, -torch.inf)
    out = torch.softmax(scores, -1).nan_to_num(0.0) @ value
    torch.testing.assert_close(truth.out, out)
    torch.testing.assert_close(truth.lse, torch.logsumexp(scores, -1))
    made = torch.autograd.grad(torch.where(mask.any(1)[:, None], out, 0.0), (query, key, value), arrays[3].double())
    for ours, theirs in zip((truth.d_query, truth.d_key, truth.d_value), made, strict=True):
        torch.testing.assert_close(ours, theirs.nan_to_num(0.0))
    assert check.gate(truth, arrays, text)[1] == []
    shared = check.reference([arrays[0], arrays[1][:1], arrays[2][:1], arrays[3]], text)
    apart = check.reference([arrays[0], *(x[[0, 0]] for x in arrays[1:3]), arrays[3]], text)
    torch.testing.assert_close(shared.d_query, apart.d_query)
    torch.testing.assert_close(shared.d_key, apart.d_key.sum(0, keepdim=True))
    torch.testing.assert_close(shared.d_value, apart.d_value.sum(0, keepdim=True))
    for field in main.dataclasses.fields(check.Results):
        for wrong in (torch.nan, 9.0):
            bad = getattr(truth, field.name).clone()
            bad[1, 70] = wrong
            assert check.faults(check.errors(main.dataclasses.replace(truth, **{field.name: bad}), truth))


@needs_torch
def test_cuda_clock_waits_until_everything_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    done: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", done.append)
    monkeypatch.setattr(timing.CudaClock, "FLUSH_BYTES", 64)
    clock = timing.CudaClock("cpu")
    assert clock(lambda: (time.sleep(0.01), done.append("call"))) == 3.0
    assert done == [timing.CudaClock.CYCLES_PER_MS, "event", "call", "event"]
    clock(lambda: None)
    assert done[4] >= 10 * timing.CudaClock.CYCLES_PER_MS


# -- processes that misbehave ------------------------------------------------------------------------------------------


def stub(script: str) -> Any:
    """Processes that run `script` instead; it has the job as `job` and says things with `say`."""
    head = f"""
import json, os, sys, time
job = json.loads(sys.argv[1])
def say(what, **facts):
    print({MARK!r} + json.dumps(dict(what=what, suite=job["suite"], case=job["cases"][0], **facts)), flush=True)
"""
    return lambda job: [sys.executable, "-c", head + script, json.dumps(main.dataclasses.asdict(job))]


def run_stub(monkeypatch: pytest.MonkeyPatch, script: str, names: list[str], **limits: float) -> list[dict[str, Any]]:
    monkeypatch.setattr(pool, "command", stub(script))
    said: list[dict[str, Any]] = []
    every = [Job("attention", "sas", (name,), "cpu", jobs.TINY, (64,)) for name in names]
    budget = pool.Budget(limits.get("budget", 30))
    pool.run_stage(every, said.append, budget, parallel=2, prepare_s=limits.get("prepare_s", 20))
    return said


def test_one_measures_at_a_time_the_important_first(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
print("noise of a library")
time.sleep(0.3 if job["cases"] == ["a"] else 0)
say("ready")
sys.stdin.readline()
say("begin"); time.sleep(0.1); say("time"); say("done")
"""
    said = run_stub(monkeypatch, script, ["a", "b", "c"])
    measured = [(m["what"], m["case"]) for m in said if m["what"] != "prepared"]
    assert measured == [(what, case) for case in "abc" for what in ("begin", "time")]


def test_a_process_that_dies_is_begun_again_without_what_it_died_of(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
for step in ("fine", "deadly"):
    if step not in job["skip"]:
        say("trying", name=step)
        if step == "deadly":
            sys.exit("the compiler gave up")
say("ready"); sys.stdin.readline(); say("time"); say("done")
"""
    said = run_stub(monkeypatch, script, ["a"])
    assert [m["what"] for m in said] == ["error", "prepared", "time"]
    assert said[0]["name"] == "deadly"
    assert "the compiler gave up" in said[0]["message"]


def test_slow_processes_and_late_ones_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
say("trying", name="forever")
time.sleep(60 if job["cases"] == ["slow"] else 0)
say("ready"); sys.stdin.readline(); say("time"); say("done")
"""
    begin = time.monotonic()
    said = run_stub(monkeypatch, script, ["slow", "fast"], prepare_s=2.0)
    assert time.monotonic() - begin < 15
    assert [(m["what"], m["case"]) for m in said] == [("prepared", "fast"), ("dropped", "slow"), ("time", "fast")]
    assert "forever" in said[1]["doing"]
    said = run_stub(monkeypatch, script, ["fast"], budget=2.0)
    assert [(m["what"], m.get("doing")) for m in said] == [("prepared", None), ("dropped", "waiting to be timed")]


def test_a_death_while_measuring_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
say("ready"); sys.stdin.readline(); say("time")
if job["cases"] == ["a"]:
    sys.exit("illegal memory access")
say("done")
"""
    said = run_stub(monkeypatch, script, ["a", "b"])
    assert [(m["what"], m["case"]) for m in said if m["what"] != "prepared"] == [
        ("time", "a"), ("error", "a"), ("time", "b"),
    ]  # fmt: skip


# -- tables ------------------------------------------------------------------------------------------------------------


def told(times_faster: float, *, without: str = "") -> Iterator[dict[str, Any]]:
    """What jobs would say if every pattern were so much faster than FlexAttention."""
    for case in jobs.cases_of("sas"):
        name = jobs.name_of(case)
        for q_len in tables.BAR_LENGTHS:
            common = dict(suite="sas", kind="attention", case=name, q_len=q_len)
            yield dict(what="facts", target="h200", waste=1.0, tiles=9, flops=10**12, **common)
            for direction in (FORWARD, BOTH) if name != without else ():
                ms = {"splat": [1.0, 1.1, 0.9], "flex 64": [9e9] * 3, "dense": [7.0] * 3,
                      "flex 128": [times_faster * x for x in (1.0, 1.1, 0.9)]}  # fmt: skip
                yield dict(what="time", direction=direction, ms=ms, peak_bytes={"splat": 10**6}, host_ms={}, **common)
    for q_len in jobs.LENGTHS["gpu-planning"]:
        ms = {"splat": [1.0], "create_block_mask": [times_faster]}
        yield dict(what="masks", suite="gpu-planning", kind="masks", case="sas/LongNet", q_len=q_len, ms=ms,
                   peak_bytes={}, first_call_s=1.0)  # fmt: skip


def test_bars_are_judged_at_their_lengths() -> None:
    number = 2 * 2 + sum(len(lengths) for _, lengths in tables.CASE_BARS.values())
    speed, planning = tables.every_report(list(told(25.0)), rehearsal=False)
    assert (speed.bars, speed.failed, planning.bars, planning.failed) == (number, [], 1, [])
    assert "25.00" in speed.rows[0]
    assert "25 (128)" in speed.rows[0]
    speed, *_ = tables.every_report(list(told(2.0)), rehearsal=False)
    missed = "\n".join(speed.failed)
    assert "geomean, forward, at 8192: 2, bar 2.05" in missed
    assert "geomean, forward + backward" not in missed
    assert "sas/LongNet at 16384: 2, bar 3" in missed


def test_what_was_not_measured_meets_no_bar() -> None:
    speed, *_ = tables.every_report(list(told(25.0, without="sas/LongNet")), rehearsal=False)
    assert "sas/LongNet at 8192: not measured, bar 3" in speed.failed
    assert "geomean, forward, at 16384 (5 of 6 patterns): not measured, bar 2.05" in speed.failed


def test_a_suite_that_said_nothing_missed_its_bars() -> None:
    asked = [main.asked(suite, jobs.jobs(suite, "cuda")) for suite in ("sas", "gpu-planning")]
    speed, planning = tables.every_report(asked, rehearsal=False)
    assert speed.bars == len(speed.failed) == 2 * 2 + sum(len(lengths) for _, lengths in tables.CASE_BARS.values())
    assert planning.bars == len(planning.failed) == 8


def test_shares_are_of_the_measured_peak() -> None:
    machine = dict(what="machine", kind="machine", suite="machine", case=None, matmul_flops_per_s=2e15)
    speed, *_ = tables.every_report([machine, *told(2.0)], rehearsal=False)
    assert "of 2000 TFLOP/s, measured" in speed.title
    row = dict(zip(speed.columns, speed.rows[0], strict=True))
    assert row["TFLOP/s"] == "3.5e+03"  # 3.5 * 1e12 in 1 ms; of two columns of that name, the last
    assert "50" in speed.rows[0]  # forward: 1e12 in 1 ms


# -- the model, and a rehearsal ----------------------------------------------------------------------------------------


def test_model_says_that_nothing_was_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--suite", "sas", "--device", "model", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "NOTHING WAS TIMED" in printed
    assert "geomean of the suite" in printed


@needs_torch
def test_rehearsal(tmp_path: Path) -> None:
    """What happens on a GPU, but interpreted: both bindings, peers, and planning."""
    pytest.importorskip("triton")
    arguments = ["--device", "cpu", "--quick", "--suite", "sas", "planning", "--cases", "LongNet"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *arguments, "--out", str(tmp_path)],
        check=False, capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "REHEARSAL on a CPU" in done.stdout
    kept = json.loads((tmp_path / "rehearsal.json").read_text(encoding="utf-8"))
    said = kept["messages"]
    assert kept["rehearsal"]
    assert [m["faults"] for m in said if m["what"] == "gate"] == [[], [], []]
    bindings = {"PyTorch", "PyTorch, 4 heads a key head, H 16", "JAX"}
    assert {m["binding"] for m in said if m["what"] == "gate"} == bindings
    timed = {(m["kind"], m["direction"]): set(m["ms"]) for m in said if m["what"] == "time"}
    assert timed["attention", FORWARD] == {"splat", "flex 128", "flex 64", "dense causal"}
    assert timed["attention", BOTH] == {"splat", "dense causal"}  # FlexAttention has no gradients on a CPU
    assert timed["jax-peers", BOTH] == {"XLA, dense"}
    (masks,) = (m for m in said if m["what"] == "masks")
    assert set(masks["ms"]) == {"splat", "create_block_mask"}
    unexpected = [m for m in said if m["what"] in ("error", "dropped") and "flex" not in m["name"]]
    assert all("cuDNN" in m["name"] for m in unexpected), unexpected
    assert [report.rows for report in main.kept(tmp_path / "rehearsal.json")]


#: A job's process where JAX is not installed. Broken, dense attention cannot be made and FlexAttention called but once.
WITHOUT_JAX = """
import sys
sys.modules["jax"] = None
from benchmarks.gpu import attention, worker
if {broken}:
    attention.is_causal = None
    attention.Flex.build = lambda *_: lambda *_, left=[None]: left.pop()
worker.main()
"""


@pytest.mark.sampled(1 / 2)
@needs_torch
@pytest.mark.parametrize("broken", [False, True])
def test_attention_needs_neither_jax_nor_every_peer(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    script = WITHOUT_JAX.format(broken=broken)
    monkeypatch.setattr(
        pool, "command", lambda job: [sys.executable, "-c", script, json.dumps(main.dataclasses.asdict(job))]
    )
    (job,) = jobs.jobs("sas", "cpu", only=["LongNet"], jax=False)
    said: list[dict[str, Any]] = []
    pool.run_stage([job], said.append, pool.Budget(120), parallel=1, prepare_s=100)
    timed = {m["direction"]: set(m["ms"]) for m in said if m["what"] == "time"}
    assert timed[FORWARD] == ({"splat"} if broken else {"splat", "flex 128", "flex 64", "dense causal"})
    assert [m["name"] for m in said if m["what"] == "error" and "flex" not in m["name"]] == ["dense"] * broken


@needs_torch
def test_tuning_is_rehearsed() -> None:
    """Every configuration of the kernel that takes most: compared with the first, and timed."""
    pytest.importorskip("triton")
    (job,) = (one for one in jobs.jobs("tune", "cpu", only=["LongNet"]) if one.kernel == "d_key_value")
    said: list[dict[str, Any]] = []
    pool.run_stage([job], said.append, pool.Budget(120), parallel=1, prepare_s=100)
    assert [m["what"] for m in said] == ["config", "config", "prepared", "tuned"]
    assert all(m["off"] < 1e-2 for m in said[:2])
    (report,) = tables.every_report(said, rehearsal=True)
    assert len(report.rows) == 2
    assert report.rows[0][-1] == "1.000"
