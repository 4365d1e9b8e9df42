"""Kernels with score modifications, for compiling them in another process."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import splat
from splat.codegen.base import Options
from splat.codegen.score_mod import trace
from splat.codegen.triton import record
from splat.codegen.triton.launch import Launch, Output
from splat.codegen.triton.source import load
from splat.planning import TARGETS, Problem, make_plan
from tests.score_mod_suite import MODS


def options(name: str) -> Options:
    """With one of `MODS`."""
    mod = MODS[name].options(jnp.ones(MODS[name].shape))
    bias = None if mod["bias"] is None else mod["bias"].reshape(1, *MODS[name].shape)
    traced, _ = trace(mod["score_mod"], bias, "float32")
    return Options(0.125, mod["logits_soft_cap"], traced)


def sample(*, name: str, kernel: str, arch: str) -> Launch:
    """The first launch of a kernel."""
    jax.config.update("jax_platforms", "cpu")
    target = next(target for target, one in TARGETS.items() if one.arch == arch)
    problem = Problem(splat.parse("causal() & window(1024, 0)"), 4096, 4096, 64, 4, 2, 2, "bfloat16")
    plan = make_plan(problem, implementation="triton", target=target)
    return record.select(record.launches(plan, options(name)), kernel)[0]


def of_elements(functions: list[str], arrays: int) -> str:
    """A kernel: functions of the library, of each element of one or two arrays."""
    given = [f"X{n}" for n in range(arrays)]
    lines = ["@triton.jit", f"def one({', '.join(given)}, OUT, SIZE: tl.constexpr):", "    at = tl.arange(0, SIZE)"]
    loads = ", ".join(f"tl.load({name} + at)" for name in given)
    lines += [f"    tl.store(OUT + SIZE * {n} + at, {name}({loads}))" for n, name in enumerate(functions)]
    return "\n".join(lines) + "\n"


def library(*, functions: list[str], arrays: int) -> Launch:
    given, out = Output((128,), "float32"), Output((len(functions), 128), "float32")
    return Launch(load("one", of_elements(functions, arrays)), 1, (given,) * arrays, (), (out,), {"SIZE": 128}, 4, 1)
