"""SPLAT itself, one contender an implementation, and planning."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import splat
from splat.bench.peers.base import Contender, Kind, Layout, Ready, as_numpy
from splat.bench.problem import Problem
from splat.bench.timing import Enqueued

#: The planning contender: no implementation takes part in it.
PLANNING = "splat"

#: How values lie between the operations of `composed`; see `laid_out`.
_layout = "tiles"


@contextlib.contextmanager
def laid_out(layout: str) -> Iterator[None]:
    """`composed`, where it is prepared meanwhile, hands over its values in this layout."""
    global _layout  # noqa: PLW0603
    before, _layout = _layout, layout
    try:
        yield
    finally:
        _layout = before


def jitted(function: Callable[..., Any], *arrays: np.ndarray) -> Callable[[], Any]:
    """The compiled function as a call that returns when the result is there; enqueued on a GPU."""
    import jax

    compiled, on_device = jax.jit(function), [jax.numpy.asarray(x) for x in arrays]
    if jax.default_backend() == "gpu":
        return Enqueued(lambda: compiled(*on_device), jax.block_until_ready)
    return lambda: jax.block_until_ready(compiled(*on_device))


def contender(implementation: str) -> Contender:
    """An implementation by its name."""

    def attention(problem: Problem) -> Ready:
        return attending(
            problem, lambda q, k, v: splat.attention(q, k, v, problem.pattern, implementation=implementation)
        )

    def sddmm(problem: Problem) -> Ready:
        query, key, *_ = problem.inputs
        call = jitted(lambda q, k: splat.sddmm(q, k, problem.acsr, implementation=implementation), query, key)
        return Ready(call, Layout.ACSR, as_numpy)

    def softmax(problem: Problem) -> Ready:
        call = jitted(lambda x: splat.softmax(x, problem.acsr, implementation=implementation), problem.inputs.values)
        return Ready(call, Layout.ACSR, as_numpy)

    def spmm(problem: Problem) -> Ready:
        call = jitted(
            lambda x, v: splat.spmm(x, problem.acsr, v, implementation=implementation),
            problem.inputs.values,
            problem.inputs.value,
        )
        return Ready(call, Layout.ROWS, as_numpy)

    def composed(problem: Problem) -> Ready:
        how, scale = {"layout": _layout, "implementation": implementation}, 1 / np.sqrt(problem.head_dim)

        def attention(q: Any, k: Any, v: Any) -> Any:
            scores = splat.sddmm(q * np.float32(scale), k, problem.acsr, **how)
            return splat.spmm(splat.softmax(scores, problem.acsr, **how), problem.acsr, v, **how)

        return Ready(jitted(attention, *problem.inputs[:3]), Layout.ROWS, as_numpy, note=f"values in {_layout}")

    return Contender(
        f"splat-{implementation}",
        f"SPLAT, {implementation}",
        Kind.OURS,
        {
            "attention": attention,
            "training": attention,
            "sddmm": sddmm,
            "softmax": softmax,
            "spmm": spmm,
            "composed": composed,
        },
    )


def batched(problem: Problem) -> tuple[np.ndarray, ...]:
    """query, key, value, and of training d_out, [1, positions, heads, head dim] in the problem's dtype."""
    query, key, value, d_out, _ = problem.inputs
    given = (query, key, value, d_out) if problem.op == "training" else (query, key, value)
    return tuple(np.ascontiguousarray(x.swapaxes(0, 1), problem.numpy_dtype)[None] for x in given)


def heads_first(result: Any) -> np.ndarray:
    """[1, positions, heads, head dim] -> float32 [heads, positions, head dim]."""
    return np.asarray(result)[0].swapaxes(0, 1).astype(np.float32)


def with_gradients(attention: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """`attention(query, key, value, *others)` -> (query, key, value, d_out, *others) -> output and three gradients."""
    import jax

    def both(query: Any, key: Any, value: Any, d_out: Any, *others: Any) -> tuple[Any, ...]:
        out, pull_back = jax.vjp(lambda *given: attention(*given, *others), query, key, value)
        return out, *pull_back(d_out)

    return both


def attending(problem: Problem, attention: Callable[..., Any], *others: np.ndarray) -> Ready:
    """Of `attention(query, key, value, *others)` in JAX's layout; of training with its gradients."""
    if problem.op != "training":
        return Ready(jitted(attention, *batched(problem), *others), Layout.ROWS, heads_first)
    call = jitted(with_gradients(attention), *batched(problem), *others)
    return Ready(call, Layout.GRADIENTS, lambda results: np.stack([heads_first(one) for one in results]))


def served_by(name: str | None, device: str, dtype: str, head_dim: int) -> str:
    """The implementation of that name, or the best that can serve. Raises ArgumentError, UnsupportedError."""
    from splat.codegen import Request, choose

    return choose(Request(device, dtype, head_dim), name).name


def _plan(problem: Problem) -> Ready:
    """Text -> pattern -> plan -> text, nothing remembered from an earlier call."""
    from splat.planning import plan as planner

    def call() -> str:
        planner._remembered.clear()
        return str(splat.plan(splat.parse(problem.text), problem.q_len))

    return Ready(call, Layout.PLAN, as_numpy)


def planning() -> Contender:
    return Contender(PLANNING, "SPLAT: expression to printed plan", Kind.OURS, {"planning": _plan}, packages=())
