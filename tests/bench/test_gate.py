"""What is measured, and the gate before it: inputs, truth, records, turns, memory."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import numpy as np
import pytest

import splat
from splat import reference
from splat.bench import clock, gate, measure, memory, peers, suites, timing
from splat.bench.cases import Case
from splat.bench.clock import take_turns
from splat.bench.peers import ours
from splat.bench.peers.base import Contender, Kind, Layout, Ready
from splat.bench.problem import OPERATIONS, Problem
from splat.bench.record import Record
from splat.bench.truth import Truth, sample

UNION = Case("union", "test", "causal() & (window(9) | strided(7))")


def problem(op: str = "sddmm", case: Case = UNION, q_len: int = 64, dtype: str = "float32") -> Problem:
    return Problem(op, case, q_len, heads=2, head_dim=8, dtype=dtype)


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
        with pytest.raises(gate.WrongError, match="of a row's largest value"):
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gate_stops_what_is_wrong_in_small_rows(dtype: str) -> None:
    """The last rows of causal attention are means over thousands of values: much smaller than the first ones."""
    truth = Truth.sampled(problem("attention", Case("causal", "test", "causal()"), 8000, dtype))
    right = np.zeros((2, 8000, 8))
    (part,) = truth.parts
    right[:, part.rows] = np.stack(part.expected, axis=1)
    ready = Ready(lambda: None, Layout.ROWS, np.asarray)
    assert gate.check(truth, ready, right) == 0
    zeros, swapped = right.copy(), right.copy()
    zeros[:, 7000:] = 0
    swapped[:, 7999] = right[::-1, 7999]
    for wrong in (zeros, swapped):
        with pytest.raises(gate.WrongError, match="of a row's largest value"):
            gate.check(truth, ready, wrong)


def test_rows_of_nothing_are_right_where_nothing_is_there() -> None:
    nothing, something = np.zeros((3, 4)), np.eye(3, 4)
    assert gate.shares([gate.Compared.of(nothing, nothing)]) == [0.0]
    assert gate.shares([gate.Compared.of(something, nothing)]) == [float("inf")]


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
        with pytest.raises(gate.WrongError, match="of a row's largest value"):
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


# -- on a GPU, without one ---------------------------------------------------------------------------------------------


class Device:
    """A call takes it 1 ms of work, and whoever waits for it 20 ms more. What happens is in `done`."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.free_s = 0.0
        self.done = ""

    def begin(self) -> None:
        self.free_s = max(self.free_s, self.now_s) + 1e-3
        self.done += "b"

    def wait(self, result: Any) -> Any:
        self.now_s = max(self.now_s, self.free_s) + 20e-3
        self.done += "w"
        return result


def test_a_turn_on_a_device_is_a_row_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launching and waiting count once, not with every call."""
    device = Device()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: device.now_s)
    one = clock.sample(timing.Enqueued(device.begin, device.wait), pause_s=0.0, turn_ms=2100.0)
    assert device.done == "bw" + 100 * "b" + "w"
    assert one.first_ms == pytest.approx(21.0)
    assert one.ms == pytest.approx(1.2)


def test_what_is_enqueued(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU what computes; nothing on a CPU."""
    import jax

    x = np.ones(3, np.float32)
    assert not isinstance(ours.jitted(lambda x: x + 1, x), timing.Enqueued)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    call = ours.jitted(lambda x: x + 1, x)
    assert isinstance(call, timing.Enqueued)
    np.testing.assert_array_equal(call(), x + 1)


def test_what_pytorch_enqueues(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from splat.bench.peers import torch_peers

    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("device"))
    given = problem("attention")
    assert not isinstance(torch_peers._call(given, lambda: 3), timing.Enqueued)
    call = torch_peers._call(dataclasses.replace(given, device="cuda"), lambda: 3)
    assert isinstance(call, timing.Enqueued)
    assert (call.begin(), waited) == (3, [])
    assert (call(), waited) == (3, ["device"])


def test_the_peak_of_a_device_is_a_large_product_of_the_problems_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(measure, "cuda_matmul_flops_per_s", lambda *given: asked.append(given) or 1e15)
    given = dataclasses.replace(problem("attention"), device="cuda", dtype="bfloat16")
    for quick in (False, True):
        assert measure.peak_flops_per_s(given, measure.thoroughness("cuda", quick).matmul) == 1e15
    assert asked == [(8192, "bfloat16")] * 2
    assert [measure.thoroughness("cpu", quick).matmul for quick in (False, True)] == [1536, 256]
    assert measure.peak_flops_per_s(problem(), 16) > 0
    assert len(asked) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_on_a_device(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "TURN_MS", 1.0)
    assert measure.cuda_matmul_flops_per_s(64, dtype) > 0


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


def test_operations_have_a_contender() -> None:
    everyone = [peers.ours.contender("xla"), peers.ours.planning()]
    assert {op for one in everyone for op in one.make} == set(OPERATIONS)
