"""What is remembered between calls: bounded, on the device once, and nothing of the user's changed."""

from __future__ import annotations

import contextlib
import contextvars
from typing import Any

import numpy as np
import pytest

from tests.torch.cases import DEVICE, compare, draw_inputs, in_subprocess, needs_device, run, torch, truth

import triton  # isort: skip

import splat  # isort: skip
import splat.torch  # isort: skip
from splat.codegen.triton import program
from splat.remembered import Remembered
from splat.torch import programs, recording

pytestmark = needs_device

PATTERN = splat.causal() & splat.window(6) | splat.sink(2)


class Launches:
    """Counts kernels, by text and constants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, carry_out: bool = True):
        self.kernels: set[Any] = set()
        self.launches: list[Any] = []
        original = recording.Recording._launch

        def launch(one: Any, step: Any, launch: Any, arrays: Any) -> None:
            constants = tuple(sorted(launch.constants.items()))
            self.kernels.add((launch.kernel.source, constants, launch.num_warps, launch.num_stages))
            self.launches.append(launch)
            if carry_out:
                original(one, step, launch, arrays)

        monkeypatch.setattr(recording.Recording, "_launch", launch)


@pytest.mark.parametrize("target", ["interpreter", "h100"])
def test_decoding_compiles_few_kernels_and_remembers_a_bounded_number_of_calls(
    target: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """64 steps: as many offsets, tables and recordings, but a handful of kernels."""
    launches = Launches(monkeypatch, carry_out=False)
    monkeypatch.setattr(programs, "target_of", lambda device: target)
    remembered = Remembered(entries=20, nbytes=1 << 20)
    monkeypatch.setattr(programs, "_forwards", remembered)
    q, k, v, *_ = draw_inputs(rng, 1, 64, head_dim=64, dtype="bfloat16")
    for offset in range(64):
        splat.torch.attention(q, k, v, PATTERN, query_offset=offset)
    assert len(launches.kernels) <= 6
    assert len(remembered) == 20


@pytest.mark.skipif(DEVICE != "cpu", reason="what decides is replaced, and GPUs have their own")
@pytest.mark.parametrize("text", ["causal() & window(40) | sink(2)", "window(3) | strided(4)", "global_rows(62)"])
def test_passes_in_parts(text: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """What GPUs do where there are few programs: values, log-sum-exp and gradients, with key lengths."""
    monkeypatch.setattr(programs, "_forwards", Remembered(entries=4))
    monkeypatch.setattr(program, "parts_of", lambda *of: 3)
    launches = Launches(monkeypatch)
    inputs = draw_inputs(rng, 3, 70, heads=(4, 2), batch=2)
    pattern, lengths = splat.parse(text), torch.tensor([64, 20])
    found = run(pattern, inputs, query_offset=60, kv_lengths=lengths)
    assert [one.kernel.name for one in launches.launches].count("splat_merge") == 1
    compare(found, truth(inputs, pattern.to_dense(3, 70, query_offset=60), kv_lengths=lengths.numpy()), "float32")


def test_decoding_keeps_its_kernels_while_the_cache_fills(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """More parts as there are more keys: a number that is passed, not compiled."""
    launches = Launches(monkeypatch, carry_out=False)
    monkeypatch.setattr(programs, "target_of", lambda device: "h100")
    monkeypatch.setattr(programs, "_forwards", Remembered(entries=20))
    q, k, v, *_ = draw_inputs(rng, 1, 16384, heads=(8, 2), head_dim=16, dtype="bfloat16")
    for offset in range(2100, 16384, 1000):
        splat.torch.attention(q, k, v, splat.causal(), query_offset=offset)
    forward = [one for one in launches.launches if one.kernel.name == "splat_forward"]
    assert len({one.programs for one in forward}) > 5
    assert len({kernel for kernel in launches.kernels if "def splat_forward(" in kernel[0]}) == 1
    assert len(launches.kernels) == 2


def test_kernels_are_not_compiled_for_single_lengths() -> None:
    """Triton looks at the addresses of arrays, but not at whether integers are 1 or multiples of 16."""
    printed = in_subprocess(
        """
        import torch, triton
        from splat.torch import programs
        programs.target_of = lambda device: "h100"
        q = torch.ones(1, 2, 64, 64)
        call = programs._call([q, q, q], None, ("window(3) | strided(5)", None, None, 0))
        for step in programs._record_forward(call).steps:
            first, count = len(step.launch.arrays), len(step.launch.scalars)
            params = step.launch.kernel.function.params
            assert all(param.do_not_specialize for param in params[first : first + count])
            assert not any(param.do_not_specialize for param in params[:first])
            print(step.launch.kernel.name)
        """,
        TRITON_INTERPRET="0",
    )
    assert set(printed.split()) == {"splat_forward"}


def test_tables_outlive_what_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another stream than they were made on, and in a captured graph: what is asked of PyTorch, without a GPU."""
    held: list[Any] = []

    class OnDevice:
        def record_stream(self, stream: Any) -> None:
            held.append((self, stream))

    table = recording.Table(np.zeros(1, np.int32), OnDevice(), "first")  # type: ignore[arg-type]
    recorded = recording.Recording(torch.device("cuda"), (), 0, (), (table,), interpreted=False)
    state = {"stream": "first", "captures": False}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["captures"])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(recording, "_CAPTURED", {})
    recorded.run([])
    assert held == []
    state["stream"] = "second"
    recorded.run([])
    assert held == [(table.tensor, "second")]
    assert recording._CAPTURED == {}
    state["captures"] = True
    recorded.run([])
    assert list(recording._CAPTURED.values()) == [table]


def test_tables_know_the_stream_that_they_were_made_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "this")
    monkeypatch.setattr(torch, "tensor", lambda array, dtype, device: (array, device))
    assert recording._on_device(np.zeros(3, np.int32), torch.device("cuda")).stream == "this"


@pytest.mark.parametrize(("kv_heads", "sizes"), [(1, (32, 64)), (2, (64, 32))])
def test_grouped_heads_have_kernels_of_their_own(
    kv_heads: int, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """On a B200 at head dim 256, whose tensor memory is too small for a loop over heads as well."""
    launches = Launches(monkeypatch, carry_out=False)
    monkeypatch.setattr(programs, "target_of", lambda device: "b200")
    q = torch.ones(1, 2, 64, 256, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    k, v = (torch.ones(1, kv_heads, 64, 256, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) for _ in range(2))
    splat.torch.attention(q, k, v, splat.causal()).sum().backward()
    (one,) = (x for x in launches.launches if x.kernel.name == "splat_d_key_value")
    assert (one.constants["BLOCK_Q"], one.constants["BLOCK_KV"]) == sizes


def test_calls_share_their_tables(rng: np.random.Generator) -> None:
    """Other strides, another batch, other heads: other recordings, the same tables."""
    recordings = []
    for batch, heads in ((1, (2, 1)), (3, (2, 1)), (1, (4, 2))):
        q, k, v, *_ = draw_inputs(rng, 40, 40, batch=batch, heads=heads)
        call = programs._call([q, k, v], None, (repr(PATTERN), None, None, 0))
        recordings.append(programs._record_forward(call))
    assert recordings[0].tables
    for other in recordings[1:]:
        assert [id(table) for table in other.tables] == [id(table) for table in recordings[0].tables]


def test_tables_go_when_they_are_too_large(rng: np.random.Generator) -> None:
    remembered = Remembered(entries=100, nbytes=1)
    for length in (20, 21, 22):
        q, k, v, *_ = draw_inputs(rng, length, length)
        call = programs._call([q, k, v], None, (repr(PATTERN), None, None, 0))
        remembered(call, lambda call=call: programs._record_forward(call))
        assert len(remembered) == 1


@pytest.mark.parametrize("needs", [(0,), (1,)])
def test_only_what_is_wanted_is_launched(
    needs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    launches = Launches(monkeypatch)
    run(PATTERN, draw_inputs(rng, 20, 20), needs=needs)
    names = [launch.kernel.name for launch in launches.launches]
    assert names == ["splat_forward", "splat_delta", "splat_d_query" if needs == (0,) else "splat_d_key_value"]


def test_intermediate_results_are_dropped(rng: np.random.Generator) -> None:
    """Partial results of passes live until they are merged."""
    q, k, v, *_ = draw_inputs(rng, 40, 40)
    text = repr(splat.window(3) | splat.strided(5))
    made = programs._record_forward(programs._call([q, k, v], None, (text, None, None, 0)))
    *parts, last = made.steps
    assert parts
    assert set(last.dropped) == {number for step in parts for number in step.writes}
    assert set(made.results) == last.writes


def test_tf32_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    launches = Launches(monkeypatch, carry_out=False)
    q, k, v, *_ = draw_inputs(rng, 20, 20)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            splat.torch.attention(q, k, v, PATTERN)
    finally:
        torch.set_float32_matmul_precision(before)
    assert [launch.constants["PRECISION"] for launch in launches.launches] == ["ieee", "tf32"]


def test_descriptors_want_aligned_arrays(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    launches = Launches(monkeypatch, carry_out=False)
    monkeypatch.setattr(programs, "target_of", lambda device: "h100")
    q, k, v, *_ = draw_inputs(rng, 2048, 2048, head_dim=64, dtype="bfloat16")
    odd = torch.cat([k.flatten(), k.flatten()])[4 : 4 + k.numel()].view(k.shape)
    expanded = k[:, :, :1].expand(-1, -1, 2048, -1)
    for key in (k, odd, expanded):
        splat.torch.attention(q, key, v, splat.causal())
    forward = [launch for launch in launches.launches if launch.kernel.name == "splat_forward"]
    assert [launch.constants["DESCRIPTORS"] for launch in forward] == [True, False, False]


@pytest.mark.skipif(DEVICE == "cuda", reason="looks at what would be launched")
def test_the_users_allocator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors get scratch memory, from an allocator that is set for that launch alone."""
    from triton.runtime import _allocation

    def mine(size: int, alignment: int, stream: int | None) -> Any:
        raise AssertionError

    seen = []

    def kernel(*_: Any, **__: Any) -> None:
        seen.append(_allocation._allocator.get()(48, 128, None))

    before = _allocation._allocator.get()
    triton.set_allocator(mine)
    try:
        contextvars.copy_context().run(recording._with_scratch, torch.device("cpu"), kernel, (), {})
        assert _allocation._allocator.get() is mine
    finally:
        triton.set_allocator(before)
    assert seen[0].nbytes == 48
