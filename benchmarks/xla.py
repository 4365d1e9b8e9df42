"""Attention on this CPU against dense masked attention of JAX, interleaved; and long sequences that dense cannot do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import splat
from benchmarks import peers, timing
from benchmarks.cases import CASES, Case
from benchmarks.report import Report
from splat import Pattern

BATCH, HEADS, HEAD_DIM = 1, 8, 64

#: The long case: its pattern, and the most memory its process may hold.
LONG_PATTERN, LONG_BAR_GB = "window(256)", 1.5

#: How long a turn of one function lasts at least, so that short ones are measured at work, not waking up.
TURN_MS = 200.0

Function = Callable[..., Any]


def inputs(q_len: int) -> tuple[jax.Array, ...]:
    """query, key and value, float32."""
    shape = (BATCH, q_len, HEADS, HEAD_DIM)
    return tuple(jax.random.normal(jax.random.key(n), shape) for n in range(3))


def dense(pattern: Pattern, q_len: int) -> Function:
    """What a JAX user writes without SPLAT."""
    mask = jnp.asarray(pattern.to_dense(q_len))[None, None]
    return partial(jax.nn.dot_product_attention, mask=mask)


def sparse(pattern: Pattern) -> Function:
    return partial(splat.attention, pattern=pattern)


def with_backward(attention: Function) -> Function:
    """Forward and all three gradients of a loss that every output takes part in."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(attention(q, k, v)))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def ready(function: Function, arguments: tuple[jax.Array, ...]) -> Callable[[], Any]:
    """The compiled function as a call that returns when the result is there."""
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(*arguments))


def run(q_len: int, repetitions: int, directions: tuple[str, ...] = ("forward", "forward + backward")) -> Report:
    """Every timed case against dense attention, in turns."""
    report = Report(
        "xla",
        f"xla on this CPU, float32, batch {BATCH}, {HEADS} heads of {HEAD_DIM}, {q_len:,} positions, against "
        "jax.nn.dot_product_attention with mask. Bars: forward, at 4,096.",
        ("pattern", "direction", "splat ms", "dense ms", "times faster", "GFLOP/s non-zeros", "predicted ms", "bar"),
    )
    arguments = inputs(q_len)
    for case in CASES:
        if case.timed:
            for direction in directions:
                # The gradients of dense attention take seconds.
                rounds = repetitions if direction == "forward" else max(repetitions // 2, 3)
                _compare(report, case, direction, arguments, rounds)
    return report


def _compare(report: Report, case: Case, direction: str, arguments: tuple[jax.Array, ...], repetitions: int) -> None:
    q_len = arguments[0].shape[1]
    (pattern,) = case.patterns(q_len)
    plan = splat.plan(pattern, q_len, head_dim=HEAD_DIM, num_q_heads=HEADS, batch=BATCH)
    forward = direction == "forward"
    wrap = (lambda f: f) if forward else with_backward
    measured = timing.interleave(
        {"splat": ready(wrap(sparse(pattern)), arguments), "dense": ready(wrap(dense(pattern, q_len)), arguments)},
        repetitions,
        turn_ms=TURN_MS,
    )
    ours, theirs = measured["splat"], measured["dense"]
    faster = timing.ratio(theirs, ours)
    bar = case.bar("speedup", q_len) if forward else None
    # Two matrix products forward; the gradients need five more.
    flops = plan.flops * (1 if forward else 3.5)
    report.add(
        case.name, direction, str(ours), str(theirs), f"{faster:.1f}", f"{flops / ours.median_ms / 1e6:.1f}",
        f"{plan.predicted_ms:.1f}" if forward and plan.predicted_ms is not None else "",
        report.judge(case.name, faster, bar, at_least=True),
        case=case.name, expression=repr(pattern), direction=direction, q_len=q_len, splat_ms=ours.turns,
        dense_ms=theirs.turns, times_faster=faster, predicted_ms=plan.predicted_ms,
    )  # fmt: skip


def run_long(q_len: int, repetitions: int) -> Report:
    """A sequence too long for dense attention, in a process of its own: time and peak memory."""
    report = Report(
        "xla-long",
        f"{LONG_PATTERN} in a process of its own: peak memory of the whole process. Bar: {LONG_BAR_GB:g} GB at 65,536.",
        ("positions", "direction", "ms", "peak GB", "arrays GB", "bar"),
    )
    for direction in ("forward", "forward + backward"):
        result = peers.run_module("benchmarks.xla", LONG_PATTERN, str(q_len), direction, str(repetitions))
        samples, peak = timing.Samples(tuple(result["ms"])), result["peak_bytes"]
        # query, key, value and output; and the gradients.
        arrays = 4 * BATCH * q_len * HEADS * HEAD_DIM * (4 if direction == "forward" else 7)
        bar = LONG_BAR_GB if q_len == 65536 and direction == "forward" and peak is not None else None
        report.add(
            f"{q_len:,}", direction, str(samples), "unknown" if peak is None else f"{peak / 1e9:.2f}",
            f"{arrays / 1e9:.2f}", report.judge(f"memory at {q_len:,}", (peak or 0) / 1e9, bar),
            q_len=q_len, direction=direction, pattern=LONG_PATTERN, ms=samples.ms, peak_bytes=peak,
        )  # fmt: skip
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="measure one long case; used by the xla suite")
    parser.add_argument("text")
    parser.add_argument("q_len", type=int)
    parser.add_argument("direction", choices=("forward", "forward + backward"))
    parser.add_argument("repetitions", type=int)
    given = parser.parse_args()
    attention = sparse(splat.parse(given.text))
    function = attention if given.direction == "forward" else with_backward(attention)
    call = ready(function, inputs(given.q_len))

    def measure() -> None:
        call()  # the result is dropped before the next call

    samples = timing.interleave({"splat": measure}, given.repetitions)["splat"]
    print(json.dumps({"ms": samples.ms, "peak_bytes": timing.peak_rss_bytes()}))


if __name__ == "__main__":
    main()
