"""PyTorch's peers on the CPU: FlexAttention, compiled, and scaled_dot_product_attention. Imports torch when called."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import splat
from benchmarks import peers
from benchmarks.cpu import gate, jax_side
from benchmarks.cpu.clock import Call
from benchmarks.cpu.setting import THREADS, Case, Setting, arrays


def why_not(setting: Setting) -> str | None:
    """Why these peers are left out; None where they are not."""
    if not peers.has_flex():
        return "torch is not installed"
    return None if setting.flex else "left out by --no-flex"


@functools.cache
def torch() -> Any:
    """The package, set up: two threads, which sleep between calls."""
    # Its threads spin after a call otherwise, and slow down what is measured next.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # compile times are those of the first time
        folder = tempfile.mkdtemp(prefix="splat-bench-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    import torch

    torch.set_num_threads(THREADS)
    return torch


def inputs(case: Case) -> list[Any]:
    """query, key, value and a cotangent [B, N, T, H], contiguous: its own layout."""
    pt = torch()
    made = [pt.from_numpy(np.ascontiguousarray(x.swapaxes(1, 2))) for x in arrays(case.q_len, case.head_dim)]
    return [x.to(getattr(pt, case.dtype)) for x in made]


def ours(case: Case) -> Call:
    """SPLAT's attention called from PyTorch: each head's positions lie one after the other."""
    from splat.torch import attention

    query, key, value, _ = inputs(case)
    pattern = splat.parse(case.text)
    call = lambda: attention(query, key, value, pattern)  # noqa: E731
    gate.agree(case, jax_side.ready(case)(), as_numpy(call()))
    return call


def as_numpy(result: Any) -> Any:
    """[B, T, N, H], float32; of a tuple, those in it."""
    if isinstance(result, tuple):
        return tuple(map(as_numpy, result))
    return result.detach().float().numpy().swapaxes(1, 2)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """(result, seconds)."""
    begin = time.perf_counter()
    result = function()
    return result, time.perf_counter() - begin


@functools.lru_cache(maxsize=1)
def block_mask(text: str, q_len: int) -> tuple[Any, float]:
    """(block mask, seconds to make it)."""
    torch()
    _load_masks()
    return timed(lambda: peers.block_mask(text, q_len))


@functools.cache
def _load_masks() -> None:
    peers.block_mask("causal()", 256)  # what the first call loads is not the mask's


def flex(case: Case, score_mod: Any = None) -> tuple[Call, dict[str, float]]:
    """FlexAttention, compiled for this case alone, and the seconds that preparing it took."""
    pt = torch()
    from torch.nn.attention.flex_attention import flex_attention

    mask, mask_s = block_mask(case.text, case.q_len)
    pt._dynamo.reset()
    compiled = pt.compile(flex_attention, dynamic=False, fullgraph=True)
    query, key, value, _ = inputs(case)

    def call() -> Any:
        with pt.no_grad():
            return compiled(query, key, value, score_mod=score_mod, block_mask=mask)

    _, first_s = timed(call)
    _, warm_s = timed(call)
    return call, {"create_block_mask_s": mask_s, "compile_s": first_s - warm_s}


def sdpa(case: Case, *, is_causal: bool = False, gradients: bool = False) -> Call:
    """scaled_dot_product_attention with a boolean mask, or its own causal one; with gradients: out and all three."""
    pt = torch()
    query, key, value, cotangent = inputs(case)
    mask = None if is_causal else pt.from_numpy(splat.parse(case.text).to_dense(case.q_len))
    function = functools.partial(
        pt.nn.functional.scaled_dot_product_attention, query, key, value, attn_mask=mask, is_causal=is_causal
    )

    def forward() -> Any:
        with pt.no_grad():
            return function()

    def both() -> Any:
        out = function()
        return out, pt.autograd.grad(out, (query, key, value), cotangent)

    if gradients:
        for x in (query, key, value):
            x.requires_grad_()
    call = both if gradients else forward
    call()
    return call
