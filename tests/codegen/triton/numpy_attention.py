"""Attention through the generated kernels on NumPy arrays: no JAX in between, any layout, every launch looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import splat
from splat.codegen.base import Options
from splat.codegen.triton import interpret
from splat.codegen.triton.launch import Launch
from splat.codegen.triton.program import Binding, Program, Sizes, guards_of, passes_of
from splat.pattern import Pattern
from splat.planning import Plan, Problem, find, make_plan
from tests.attention_suite import Inputs, Results, compare, truth

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays [B, T, N, H] lie in memory.

    Attributes:
      axes: from the slowest to the quickest; "H" is the last.
      padding: elements behind each row that belong to nobody: NaN in inputs, left alone in outputs.
    """

    axes: str = "BTNH"
    padding: int = 0

    def shape(self, batch: int, heads: int, length: int, width: int) -> tuple[int, ...]:
        sizes = dict(B=batch, N=heads, T=length, H=width + self.padding)
        return tuple(sizes[axis] for axis in self.axes)

    def strides(self, array: Any) -> tuple[int, int, int]:
        """Elements from one batch entry, head and position to the next."""
        steps = np.cumprod([1, *array.shape[:0:-1]])[::-1]
        b, n, t = (int(steps[self.axes.index(axis)]) for axis in "BNT")
        return b, n, t

    def put(self, x: Any) -> Array:
        x = np.transpose(np.asarray(x), ["BTNH".index(axis) for axis in self.axes])
        return np.pad(x, [(0, 0)] * 3 + [(0, self.padding)], constant_values=np.nan)

    def take(self, x: Array) -> Array:
        """[B, T, N, H]. Fails where padding was written to."""
        width = x.shape[-1] - self.padding
        assert np.isnan(x[..., width:].astype(np.float32)).all(), "a kernel wrote between rows"
        return np.transpose(x[..., :width], [self.axes.index(axis) for axis in "BTNH"])


def plan_of(pattern: Pattern | str, inputs: Inputs, *, target: str = "interpreter", **settings: Any) -> Plan:
    """The plan for arrays of these sizes; `settings` are `make_plan`'s."""
    pattern = splat.parse(pattern) if isinstance(pattern, str) else pattern
    batch, q_len, heads, head_dim = inputs.query.shape
    _, kv_len, kv_heads, _ = inputs.key.shape
    problem = Problem(pattern, q_len, kv_len, head_dim, heads, kv_heads, batch, str(inputs.query.dtype))
    return make_plan(problem, implementation="triton", target=target, **settings)


def carry_out(launch: Launch) -> list[Array]:
    """On guarded arrays (see `interpret.launch`). Fails where the kernel leaves an element of an output unwritten."""
    results = interpret.launch(launch)
    for n, result in enumerate(results):
        row = min(result.shape[-1], launch.constants["HEAD_DIM"]) if result.ndim == 4 else None
        missing = np.isnan(result[..., :row].astype(np.float32))
        assert not missing.any(), f"output {n} of {launch.kernel.name}: {missing.sum()} elements are NaN or not written"
    return results


def attend(
    plan: Plan,
    inputs: Inputs,
    *,
    lengths: Sequence[int] | None = None,
    layout: Layout = Layout(),
    descriptors: bool = True,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    launch: Callable[[Launch], Sequence[Array]] = carry_out,
    **constants: Any,
) -> Results:
    """Output, log-sum-exp and gradients. `constants` replace those of every launch that has them."""
    batch, q_len, heads, head_dim = inputs.query.shape
    _, kv_len, kv_heads, _ = inputs.key.shape

    def changed(one: Launch) -> Sequence[Array]:
        known = {name: value for name, value in constants.items() if name in one.constants}
        return launch(dataclasses.replace(one, constants=one.constants | known))

    def full(shape: tuple[int, ...], dtype: str, value: float) -> Array:
        made = np.full(shape, value, dtype)
        if len(shape) == 4:
            made[..., shape[-1] - layout.padding :] = np.nan
        return made

    binding = Binding(changed, layout.strides, layout.shape, np.asarray, full, descriptors=descriptors)
    sizes = Sizes(batch, q_len, kv_len, heads, kv_heads, head_dim, str(inputs.query.dtype))
    options = Options(head_dim**-0.5 if scale is None else scale, logits_soft_cap)
    program = Program(options, sizes, find(plan.target), guards_of(plan), binding)
    q, k, v, d_out = (layout.put(x) for x in inputs[:4])
    d_lse = np.swapaxes(np.asarray(inputs.d_lse), 1, 2)
    kept = None if lengths is None else np.asarray(lengths, np.int32)
    out, lse = program.forward(passes_of(plan, "forward"), q, k, v, kept)
    passes, transposed = passes_of(plan, "d_query"), passes_of(plan, "d_key_value")
    gradients = program.backward(passes, transposed, q, k, v, kept, out, lse, d_out, d_lse)
    return Results(layout.take(out), np.swapaxes(lse, 1, 2), *map(layout.take, gradients))


def check(
    pattern: Pattern | str,
    inputs: Inputs,
    *,
    mask: Array | None = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """Values, log-sum-exp and gradients against dense attention in float64. Returns the plan.

    Args:
      settings: `make_plan`'s: block sizes, query_offset.
      options: `attend`'s.
    """
    plan = plan_of(pattern, inputs, **(settings or {}))
    if mask is None:
        mask = plan.problem.pattern.to_dense(*plan.acsr.shape, query_offset=plan.query_offset)
    known = {name: options[name] for name in ("scale", "logits_soft_cap") if name in options}
    lengths = None if options.get("lengths") is None else np.asarray(options["lengths"])
    expected = truth(inputs, mask, kv_lengths=lengths, **known)
    compare(attend(plan, inputs, **options), expected, plan.problem.dtype)
    return plan
