"""What a plan would launch, without a device: for printing, compiling offline and lowering."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from splat.codegen.base import Options
from splat.codegen.triton.launch import Launch, Output
from splat.codegen.triton.program import Binding, Program, Sizes, needs_guard, passes_of
from splat.planning import Plan, find
from splat.planning.kernels import KernelConfig

#: Name of a kernel on the command line -> what it is called in profiles.
NAMES = {
    "forward": "splat_forward",
    "d_query": "splat_d_query",
    "d_key_value": "splat_d_key_value",
    "delta": "splat_delta",
    "merge": "splat_merge",
    "sum": "splat_sum",
}


def sizes_of(plan: Plan) -> Sizes:
    p = plan.problem
    return Sizes(p.batch, p.q_len, p.kv_len, p.num_q_heads, p.num_kv_heads, p.head_dim, p.dtype)


def launches(
    plan: Plan,
    options: Options,
    *,
    lengths: bool = False,
    descriptors: bool = True,
    config: KernelConfig | None = None,
) -> list[Launch]:
    """Every launch of the forward, then of the backward, of a static plan. Arrays are stand-ins: `Output` values.

    Args:
      lengths: with run-time key lengths.
      descriptors: False: kernels read through pointers even where the configuration prefers descriptors.
      config: compiler options instead of the table's (its tile sizes are not used).
    """
    made: list[Launch] = []

    def launch(one: Launch) -> tuple[Output, ...]:
        if config is not None and "SOFT_CAP" in one.constants:
            one = dataclasses.replace(
                one, num_warps=config.num_warps, num_stages=config.num_stages,
                constants={**one.constants, "DESCRIPTORS": config.descriptors},
            )  # fmt: skip
        made.append(one)
        return one.outputs

    binding = Binding(
        launch, strides, lambda b, n, t, h: (b, t, n, h), lambda table: Output(np.shape(table), "int32"),
        lambda shape, dtype, value: Output(shape, dtype), descriptors=descriptors,
    )  # fmt: skip
    s = sizes_of(plan)
    program = Program(options, s, find(plan.target).arch, binding)
    q = Output((s.batch, s.q_len, s.num_q_heads, s.head_dim), s.dtype)
    k = Output((s.batch, s.kv_len, s.num_kv_heads, s.head_dim), s.dtype)
    length = Output((s.batch,), "int32") if lengths else None
    out, lse = program.forward(passes_of(plan, "forward"), q, k, k, length)
    passes, transposed = passes_of(plan, "d_query"), passes_of(plan, "d_key_value")
    program.backward(passes, transposed, needs_guard(plan), q, k, k, length, out, lse, q, lse)
    return made


def strides(array: Any) -> tuple[int, int, int]:
    """(batch, head, position) strides of a contiguous [B, T, N, H] array."""
    _, positions, heads, width = array.shape
    return positions * heads * width, width, heads * width
