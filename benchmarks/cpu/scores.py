"""Score modification: what it costs beside plain attention, and against FlexAttention with the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import splat
from benchmarks.cpu import gate, jax_side, torch_side
from benchmarks.cpu.clock import TURN_MS, Call, take_turns
from benchmarks.cpu.setting import CASE_COLUMNS, HEADS, THREADS, WINDOW, Case, Setting
from benchmarks.report import Report

#: Distances beyond which the table of `relative` says no more.
FAR = 256

#: (an array of either library, its tanh) -> score_mod.
MODS: dict[str, Callable[[Any, Any], Callable[..., Any]]] = {
    "soft cap": lambda array, tanh: lambda s, b, h, i, j: 20 * tanh(s / 20),
    "ALiBi": lambda array, tanh: lambda s, b, h, i, j: s + array[h, 0] * (j - i),
    "relative": lambda array, tanh: lambda s, b, h, i, j: s + array[h, (i - j).clip(-FAR, FAR) + FAR],
}


def closed_over() -> np.ndarray:
    """[N, distances], float32."""
    return np.random.default_rng(1).standard_normal((HEADS, 2 * FAR + 1), np.float32) / 4


def ready(case: Case, name: str | None, implementation: str = "cpp", *, gradients: bool = False) -> Call:
    """Compiled, with its inputs; None modifies nothing."""
    pattern = splat.parse(case.text)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, array: jax.Array) -> jax.Array:
        score_mod = None if name is None else MODS[name](array, jnp.tanh)
        return splat.attention(q, k, v, pattern, score_mod=score_mod, implementation=implementation)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array, array: jax.Array) -> Any:
        return jax_side.with_gradients(lambda q, k, v: attend(q, k, v, array))(q, k, v, cotangent)

    *arrays, cotangent = jax_side.inputs(case)
    arguments = [*arrays, *([cotangent] if gradients else []), jnp.asarray(closed_over())]
    compiled = jax.jit(both if gradients else attend)
    call = lambda: jax.block_until_ready(compiled(*arguments))  # noqa: E731
    call()
    return call


def scores(setting: Setting) -> Report:
    """Each modification beside none at all, forward and with gradients of query, key and value."""
    why = torch_side.why_not(setting)
    report = Report(
        "cpu-scores",
        f"score_mod, {HEADS} heads, {THREADS} threads; in turns of {TURN_MS:g} ms. Beside: over the time "
        "of attention without one. FlexAttention (forward) has the same function."
        + (f" PyTorch's peers are skipped: {why}." if why else ""),
        (*CASE_COLUMNS, "score_mod", "ours ms", "beside", "Flex ms", "over Flex", "gradients ms", "beside", "clean"),
    )
    for case in setting.cases((WINDOW,), (4096,), (64,)):
        for name in MODS:
            with setting.attempt(report, case):
                _one(setting, report, case, name, flex=not why)
    return report


def _one(setting: Setting, report: Report, case: Case, name: str, *, flex: bool) -> None:
    calls = {"ours": ready(case, name), "plain": ready(case, None)}
    off = gate.agree(case, calls["ours"](), ready(case, name, "xla")())
    if flex:
        array = torch_side.torch().from_numpy(closed_over())
        calls["flex"], _ = torch_side.flex(case, MODS[name](array, torch_side.torch().tanh))
        gate.agree(case, calls["ours"](), torch_side.as_numpy(calls["flex"]()))
    forward = take_turns(calls, setting.rounds, setting.budget_s)
    trained = {"ours": ready(case, name, gradients=True), "plain": ready(case, None, gradients=True)}
    gate.agree(case, trained["ours"](), ready(case, name, "xla", gradients=True)())
    backward = take_turns(trained, setting.rounds, setting.budget_s)
    setting.add(
        report, *case.cells, name, str(forward.samples["ours"]), f"{forward.ratio('ours', 'plain'):.2f}",
        f"{forward.samples['flex'].median_ms:.4g}" if flex else "",
        f"{forward.ratio('flex', 'ours'):.2f}" if flex else "",
        str(backward.samples["ours"]), f"{backward.ratio('ours', 'plain'):.2f}", forward.clean,
        case=str(case), score_mod=name, off=off, forward=forward.to_json(), backward=backward.to_json(),
    )  # fmt: skip
