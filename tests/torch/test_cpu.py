"""CPU tensors go to the generated C++ kernels: every test of values, gradients and layouts once more, and their own."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from tests.torch.cases import DEVICE, check, draw_inputs, in_subprocess, run, torch
from tests.torch.test_attention import *  # noqa: F403

import splat  # isort: skip
import splat.torch  # isort: skip
from splat.codegen.cpp import compiler
from splat.torch import native, validate

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="tests use the GPU that is here"),
    pytest.mark.skipif(compiler.missing() is not None, reason="there is no C++ compiler"),
]

MIXED = "causal() & window(9) | sink(2)"


@pytest.fixture(autouse=True)
def without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "_interprets", lambda: False)
    native._prepared.clear()


@pytest.mark.parametrize("heads", [(2, 1), (4, 4)])
def test_float64(heads: tuple[int, int], rng: np.random.Generator) -> None:
    """One kernel for all gradients, and two."""
    inputs = draw_inputs(rng, 33, 47, heads=heads, head_dim=8, dtype="float64")
    for text in (MIXED, "window(3) | strided(5)"):
        check(text, inputs._replace(d_lse=inputs.d_lse.double()))


def test_gradcheck(rng: np.random.Generator) -> None:
    inputs = draw_inputs(rng, 7, 9, head_dim=3, dtype="float64")
    leaves = [x.requires_grad_() for x in inputs[:3]]
    pattern = splat.parse(MIXED)
    assert torch.autograd.gradcheck(lambda q, k, v: splat.torch.attention(q, k, v, pattern, return_lse=True), leaves)


def test_wide_heads(rng: np.random.Generator) -> None:
    """No limit on the head dim, other than on GPUs."""
    check(MIXED, draw_inputs(rng, 20, 20, head_dim=300))


def test_results_are_written_whole(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into memory that holds anything."""
    inputs, empty = draw_inputs(rng, 40, 40), torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    for text in ("window(3)", "global_rows(3)", "sink(0)", "window(2) | strided(8)"):
        check(text, inputs)


@pytest.mark.parametrize("whose", ["pytorch's", "own"])
def test_any_number_of_threads_gives_the_same(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:  # fmt: skip
    if whose == "own":
        monkeypatch.setattr(native, "_team", lambda: None)
    elif native._team() is None:
        assert sys.platform != "linux" or not torch.backends.openmp.is_available()
        pytest.skip("PyTorch has no OpenMP runtime here")
    inputs, before = draw_inputs(rng, 700, 700, heads=(2, 1), head_dim=16), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(splat.parse("causal() & window(90)"), inputs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0].out, other.out)
        assert torch.equal(found[0].lse, other.lse)


def test_as_in_jax(rng: np.random.Generator) -> None:
    jax = pytest.importorskip("jax")
    q, k, v, *_ = draw_inputs(rng, 100, 100, heads=(4, 2), head_dim=8)
    out = splat.torch.attention(q, k, v, splat.parse(MIXED))
    query, key, value = (jax.numpy.asarray(x.transpose(1, 2).numpy()) for x in (q, k, v))
    other = splat.attention(query, key, value, splat.parse(MIXED), implementation="cpp")
    np.testing.assert_array_equal(out.transpose(1, 2).numpy(), other)


def test_compiled_by_torch(rng: np.random.Generator) -> None:
    pattern = splat.parse(MIXED)
    compiled: Any = torch.compile(
        lambda q, k, v: 2 * splat.torch.attention(q, k, v, pattern), fullgraph=True, backend="aot_eager"
    )
    q, k, v, *_ = draw_inputs(rng, 20, 20)
    torch.testing.assert_close(compiled(q, k, v), 2 * splat.torch.attention(q, k, v, pattern))


def test_without_a_compiler_it_says_what_to_install() -> None:
    printed = in_subprocess(
        """
        import os, splat, splat.torch, torch
        os.environ["PATH"] = ""
        os.environ.pop("CXX", None)
        x = torch.ones(1, 1, 4, 8)
        try:
            splat.torch.attention(x, x, x, splat.causal())
        except splat.UnsupportedError as error:
            print(error)
        """,
        TRITON_INTERPRET="0",
    )
    assert printed.startswith("splat.torch compiles kernels for CPUs, but")
    assert "apt install g++" in printed
