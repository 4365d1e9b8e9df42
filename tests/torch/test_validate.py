"""What is refused, in which words; and what importing and calling `splat.torch` loads."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import numpy as np
import pytest

from tests.torch.cases import DEVICE, INTERPRETED, draw_inputs, in_subprocess, needs_device, torch

import splat  # isort: skip
import splat.torch  # isort: skip
from splat.codegen.cpp import compiler
from splat.errors import ArgumentError, UnsupportedError

X = torch.ones(2, 4, 8, 16, device=DEVICE)
FEW = X[:, :2]


@needs_device
@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((np.ones((2, 4, 8, 16)), X, X), {}, ArgumentError,
         "query must be a torch.Tensor, but ndarray was given. JAX and NumPy arrays are for splat.attention."),
        ((X[0], X, X), {}, ArgumentError,
         "query must have shape [B, N, T, H], but shape [4, 8, 16] was given. A missing batch axis needs [None]."),
        ((X.double(), X, X), {}, UnsupportedError,
         "query must be one of float32, bfloat16, float16, but float64 was given. Convert it first"),
        ((X, X.half(), X), {}, ArgumentError,
         "must have one dtype, but float32, float16 and float32 were given. Convert them, for example with key.to("),
        ((X, FEW, X), {}, ArgumentError, "key and value must have one shape, but [2, 2, 8, 16] and [2, 4, 8, 16]"),
        ((X, X[:1], X[:1]), {}, ArgumentError, "(axis 0) and head dim (axis 3). Keys that serve every"),
        ((X, X[:, :3], X[:, :3]), {}, ArgumentError,
         "the number of query heads must be a multiple of the key/value heads, but 4 and 3 were given"),
        ((X, X[:, :, :0], X[:, :, :0]), {}, ArgumentError, "kv_len is 0. Skip the call instead."),
        ((torch.ones(1, 1, 2, 300, device=DEVICE),) * 3, {}, UnsupportedError,
         "head dims up to 256 are supported, but 300 was given"),
        ((X.to("meta"),) * 3, {}, UnsupportedError, "serves CPUs, CUDA and ROCm GPUs, but the tensors are on 'meta'"),
        ((X, X, X.to("meta")), {}, ArgumentError, "must be on one device, but"),
        ((X, X, X), {"pattern": np.ones((8, 8), bool)}, ArgumentError,
         "pattern must be a splat pattern such as splat.causal() & splat.window(512), but ndarray was given"),
        ((X, X, X), {"pattern": splat.per_head([splat.causal()] * 3)}, ArgumentError,
         "pattern: per_head names 3 heads, but query has 4. Give one for each."),
        ((X, X, X), {"scale": "big"}, ArgumentError, "scale must be a number or None, but str was given"),
        ((X, X, X), {"scale": torch.ones(())}, ArgumentError, "Multiply query by a run-time scale instead."),
        ((X, X, X), {"scale": float("nan")}, ArgumentError, "scale must be in [-1e+37, 1e+37] or None, but nan"),
        ((X.to_sparse(), X, X), {}, UnsupportedError, "query must be a dense tensor, but a sparse one was given"),
        ((X, torch.nested.nested_tensor([*X], layout=torch.jagged), X), {}, UnsupportedError, "but a nested one was"),
        ((X, X, X), {"scale": -1e300}, ArgumentError, "scale must be in [-1e+37, 1e+37] or None, but -1e+300"),
        ((X, X, X), {"logits_soft_cap": 1e-300}, ArgumentError, "logits_soft_cap must be in [1e-37, 1e+37]"),
        ((X, X, X), {"logits_soft_cap": 0}, ArgumentError, "logits_soft_cap must be in [1e-37, 1e+37] or None"),
        ((X, X, X), {"sinks": splat.sink(4)}, ArgumentError,
         "sinks must be a floating-point tensor of shape [4], one number for each query head, but Sink was"),
        ((X, X, X), {"sinks": torch.ones(3, device=DEVICE)}, ArgumentError, "each query head, but float32[3] was"),
        ((X, X, X), {"sinks": torch.ones(4, device="meta")}, ArgumentError, "sinks must be on query's device"),
        ((X, X, X), {"query_offset": -1}, ArgumentError,
         "query_offset must be in [0, 2**30 - 8] for 8 queries, but -1 was given"),
        ((X, X, X), {"query_offset": "3"}, ArgumentError,
         "query_offset must be an int or integers of shape [2], but str was given"),
        ((X, X, X), {"query_offset": torch.tensor([3, 4, 5])}, ArgumentError,
         "query_offset must be an int, or integers of shape [2] or [], but int64[3] was given"),
        ((X, X, X), {"query_offset": torch.tensor(3.0)}, ArgumentError, "of shape [2] or [], but float32[]"),
        ((X, X, X), {"query_offset": torch.tensor([3, -4])}, ArgumentError,
         "query_offset must be in [0, 2**30 - 8] for 8 queries, but -4 was given"),
        ((X, X, X), {"query_offset": torch.tensor([3, 4], device="meta")}, ArgumentError,
         "query_offset must be an int or on the CPU, but it is on meta. Positions are planned on the host"),
        ((X, X, X), {"kv_lengths": [3, 4]}, ArgumentError,
         "kv_lengths must be an integer tensor of shape [2] or []"),
        ((X, X, X), {"kv_lengths": torch.ones(2, device=DEVICE)}, ArgumentError,
         "kv_lengths must be integers of shape [2] or [], but float32[2] was given"),
        ((X, X, X), {"kv_lengths": torch.ones(2, dtype=torch.int32, device="meta")}, ArgumentError,
         "kv_lengths must be on query's device"),
    ],
)  # fmt: skip
def test_refusals(arguments: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    options = {"pattern": splat.causal(), **options}
    with pytest.raises(kind) as caught:
        splat.torch.attention(*arguments, **options)
    assert message in str(caught.value)


@needs_device
def test_run_time_arrays_in_a_pattern_are_refused() -> None:
    jnp = pytest.importorskip("jax.numpy")
    with pytest.raises(ArgumentError, match=r"pattern holds run-time \(JAX\) arrays.*NumPy arrays or lists"):
        splat.torch.attention(X, X, X, splat.segments(jnp.zeros(8, int)))


@needs_device
def test_numpy_integers_are_taken(rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 8, 20)
    options: dict[str, Any] = dict(query_offset=np.int64(3), scale=np.float32(0.5))
    found = splat.torch.attention(q, k, v, splat.causal(), **options)
    assert torch.equal(found, splat.torch.attention(q, k, v, splat.causal(), query_offset=3, scale=0.5))


@pytest.mark.skipif(DEVICE == "cuda", reason="the examples are for tensors on a CPU")
@needs_device
@pytest.mark.parametrize("name", ["attention", "sdpa"])
def test_examples_in_docstrings(name: str) -> None:
    done = doctest.testmod(importlib.import_module(f"splat.torch.{name}"))
    assert done.attempted
    assert not done.failed


def test_no_jax() -> None:
    """Neither importing nor calling it, forward or backward, imports JAX; importing it loads no compiler either."""
    printed = in_subprocess(
        f"""
        import sys
        import splat, splat.torch, torch
        print("jax" in sys.modules, "triton" in sys.modules, "torch._dynamo" in sys.modules)
        if {INTERPRETED or DEVICE == "cuda"}:
            q = torch.ones(1, 2, 20, 8, device={DEVICE!r}, requires_grad=True)
            pattern = splat.causal() & splat.window(3) | splat.strided(4)
            splat.torch.attention(q, q, q, pattern).sum().backward()
            splat.torch.scaled_dot_product_attention(q, q, q, is_causal=True)
        print("jax" in sys.modules)
        """
    )
    assert printed.split() == ["False"] * 4


@pytest.mark.skipif(DEVICE != "cpu" or compiler.missing() is not None, reason="of C++ kernels")
def test_no_jax_beside_kernels_for_cpus() -> None:
    printed = in_subprocess(
        """
        import sys
        import splat, splat.torch, torch
        q = torch.ones(1, 2, 20, 8, requires_grad=True)
        splat.torch.attention(q, q, q, splat.causal() & splat.window(6) | splat.sink(2)).sum().backward()
        print(q.grad.isfinite().all().item(), *(name in sys.modules for name in ("jax", "triton", "torch._dynamo")))
        """,
        TRITON_INTERPRET="0",
    )
    assert printed.split() == ["True", "False", "False", "False"]


@pytest.mark.parametrize("absent", ["torch", "triton"])
def test_what_to_install_is_said(absent: str) -> None:
    printed = in_subprocess(
        f"""
        import importlib.util, sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == {absent!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Absent())
        original = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == {absent!r} else original(name, *rest)
        import splat
        try:
            import splat.torch, torch
            x = torch.ones(1, 1, 4, 8)
            splat.torch.attention(x, x, x, splat.causal())
        except (ImportError, splat.UnsupportedError) as error:
            print(error)
        """
    )
    name = {"torch": "PyTorch", "triton": "Triton"}[absent]
    assert printed.strip() == f"splat.torch needs {name}, which is not installed: `pip install splat-attention[torch]`."
