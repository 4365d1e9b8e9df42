"""What a plan would launch, without a device: for printing, compiling offline and lowering."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from splat import __version__
from splat.codegen.base import OPERATIONS, Options
from splat.codegen.scalars import Modification
from splat.codegen.triton.launch import Launch, Output
from splat.codegen.triton.offline import Failure, Job, compile_all
from splat.codegen.triton.program import Binding, Program, Sizes, guards_of, passes_of
from splat.codegen.triton.score_mod import STORED
from splat.errors import ArgumentError, UnsupportedError
from splat.pattern import parse
from splat.planning import TARGETS, Plan, Problem, find, make_plan

#: Name of a kernel on the command line -> what it is called in profiles.
NAMES = {
    "forward": "splat_forward",
    "d_query": "splat_d_query",
    "d_key_value": "splat_d_key_value",
    "delta": "splat_delta",
    "merge": "splat_merge",
    "sum": "splat_sum",
}

#: What the same kernels are also called.
SHORT = {"fwd": "forward", "dq": "d_query", "dkdv": "d_key_value"}


def select(made: list[Launch], kernel: str | None) -> list[Launch]:
    """The launches of one kernel (a key of `NAMES` or `SHORT`), or all of them."""
    if kernel is None:
        return made
    name = SHORT.get(kernel, kernel)
    if name not in NAMES:
        raise ArgumentError(
            f"kernel must be one of {', '.join([*NAMES, *SHORT, *OPERATIONS])}, but {kernel!r} was given"
        )
    found = [launch for launch in made if launch.kernel.name == NAMES[name]]
    if not found:
        raise ArgumentError(f"this plan launches no kernel {kernel!r}. Leave kernel out to see what it launches.")
    return found


def sizes_of(plan: Plan) -> Sizes:
    p = plan.problem
    return Sizes(p.batch, p.q_len, p.kv_len, p.num_q_heads, p.num_kv_heads, p.head_dim, p.dtype)


def launches(
    plan: Plan,
    options: Options,
    *,
    lengths: bool = False,
    descriptors: bool = True,
) -> list[Launch]:
    """Every launch of the forward, then of the backward, of a static plan. Arrays are stand-ins: `Output` values.

    Args:
      lengths: with run-time key lengths.
      descriptors: False: kernels read through pointers even where the configuration prefers descriptors.
    """
    made: list[Launch] = []

    def launch(one: Launch) -> tuple[Output, ...]:
        made.append(one)
        return one.outputs

    binding = Binding(
        launch, strides, lambda b, n, t, h: (b, t, n, h), lambda table: Output(np.shape(table), "int32"),
        lambda shape, dtype, value: Output(shape, dtype), descriptors=descriptors,
    )  # fmt: skip
    s = sizes_of(plan)
    modified, place = _modification(options, s)
    program = Program(options, s, find(plan.target), guards_of(plan), binding, modified)
    q = Output((s.batch, s.q_len, s.num_q_heads, s.head_dim), s.dtype)
    k = Output((s.batch, s.kv_len, s.num_kv_heads, s.head_dim), s.dtype)
    length = Output((s.batch,), "int32") if lengths else None
    out, lse = program.forward(passes_of(plan, "forward"), q, k, k, length, place)
    passes, transposed = passes_of(plan, "d_query"), passes_of(plan, "d_key_value")
    program.backward(passes, transposed, q, k, k, length, out, lse, q, lse, place)
    return made


def _modification(options: Options, sizes: Sizes) -> tuple[Modification | None, list[Output]]:
    """The score modification, and its operands."""
    mod = options.score_mod
    if mod is None:
        return None, []
    from splat.codegen.jaxprs import modification  # it imports jax, which other kernels do without

    arrays = (Output(x.shape, STORED.get(str(x.dtype), str(x.dtype))) for x in mod.arrays)
    return modification(mod, sizes.dtype), [Output((sizes.batch, sizes.num_q_heads, 3), "int32"), *arrays]


def planned(*, plan: str, kernel: str, scale: float, logits_soft_cap: float | None, descriptors: bool) -> Launch:
    """The first launch of a kernel by a plan written as JSON: for compiling it in another process."""
    options = Options(scale, logits_soft_cap)
    return select(launches(Plan.from_json(plan), options, descriptors=descriptors), kernel)[0]


def assembly(job: Job, about: str, *, needs_tensor_core: bool = True) -> str:
    """PTX (AMDGCN for AMD) of a kernel, headed by what it needs to run, its problems, and `about`.

    Compiled in a process of its own, without a GPU. Raises UnsupportedError with the compiler's message.
    """
    (made,) = compile_all([job])
    if isinstance(made, Failure):
        raise UnsupportedError(f"{made.name} does not compile for {made.arch}: {made.message}")
    counts = [f"{count} {name}" for name, count in (made.tensor_core | made.copies).items() if count]
    facts = [
        f"{made.name} for {made.arch}: {made.registers} registers, {made.spilled_bytes} bytes spilled, "
        + ", ".join([f"{made.shared_bytes:,} bytes of shared memory", f"{made.num_warps} warps", *counts]),
        *made.problems(needs_tensor_core=needs_tensor_core),
    ]
    mark = ";" if made.arch.startswith("gfx") else "//"
    lines = [f"{mark} splat {__version__}", *(f"{mark} {line}" for line in [*facts, *about.splitlines()])]
    return "\n".join([*lines, "", made.assembly])


def strides(array: Any) -> tuple[int, int, int]:
    """(batch, head, position) strides of a contiguous [B, T, N, H] array."""
    _, positions, heads, width = array.shape
    return positions * heads * width, width, heads * width


def sample(
    *, kernel: str = "forward", arch: str = "sm_90", head_dim: int = 128, dtype: str = "bfloat16",
    block_q: int | None = None, block_kv: int | None = None, num_warps: int | None = None,
    num_stages: int | None = None, descriptors: bool | None = None, pattern: str = "causal() & window(1024, 0)",
    q_len: int = 8192, num_q_heads: int = 16, num_kv_heads: int | None = None, lengths: bool = False,
) -> Launch:  # fmt: skip
    """The first launch of a kernel, as a real call makes it; what is given replaces the table's choice.

    For surveys of configurations: `benchmarks/sweep.py`. `kernel` is a key of `NAMES`.
    """
    target = next(name for name, one in TARGETS.items() if one.arch == arch)
    problem = Problem(
        parse(pattern), q_len, q_len, head_dim, num_q_heads, num_kv_heads or num_q_heads, 1, dtype
    )  # fmt: skip
    plan = make_plan(problem, implementation="triton", target=target, block_q=block_q, block_kv=block_kv)
    made = launches(plan, Options(head_dim**-0.5), lengths=lengths)
    one = select(made, kernel)[0]
    changed: dict[str, Any] = {}
    if descriptors is not None:
        changed["constants"] = {**one.constants, "DESCRIPTORS": descriptors}
    given = {"num_warps": num_warps, "num_stages": num_stages}
    return dataclasses.replace(one, **changed, **{name: value for name, value in given.items() if value is not None})
