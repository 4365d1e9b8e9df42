"""Where the cost model's numbers for this CPU come from: `python -m benchmarks.calibrate [--quick] [--out DIR]`.

Four tables: the machine's rates; forward times with fixed tile sizes beside what the model says, and the constants that
fit them best; the model's choice of tile sizes beside the best measured; and how much one step of the portable
implementation should hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

import splat
from benchmarks import timing
from benchmarks.cases import named
from benchmarks.report import Report, write_json
from benchmarks.timing import Samples
from splat.bench.peers.ours import with_gradients
from splat.codegen import Options, load
from splat.codegen.xla import emit
from splat.planning import Plan, Problem, find, make_plan

HEADS = 8

#: How long a turn of one function lasts at least: several calls, so that they are measured at work, not waking up.
TURN_MS = 200.0

#: Patterns that the model must tell apart: a band, lattices, whole blocks, two passes, everything.
_CASES = named("figures", "window 256", "strided 64", "blocked 128", "window and stride", "dense causal")
PATTERNS = tuple(case.expression(4096) for case in _CASES)

#: Positions, and the tile sizes to measure: with `--quick`, and without.
SMALL = (512, (64,), (64, 128))
USUAL = (4096, (32, 64, 128, 256), (64, 128, 256, 512))

#: (pattern, positions) whose time depends most on the size of a step.
STEP_CASES = (("window(256)", 4096), ("strided(64)", 4096), ("window(256)", 65536))
STEP_BYTES = tuple(n << 20 for n in (2, 4, 8, 16, 32))

#: What a forward pays for; `fit` finds the seconds that one of each costs.
FEATURES = ("score element", "tile row", "tile column", "tile", "output row of a pass")


class Point(NamedTuple):
    """One measured program."""

    text: str
    head_dim: int
    blocks: tuple[int | None, int | None]
    plan: Plan
    samples: Samples


def attention_call(
    plan: Plan, *, step_bytes: int | None = None, backward: bool = False, device_arrays: Any = None
) -> Callable[[], Any]:
    """The compiled attention of a plan as a call; `step_bytes` replaces the implementation's own limit for it."""
    p = plan.problem
    usual = emit.STEP_BYTES
    given = device_arrays or arrays(p.q_len, p.head_dim)
    arguments = given if backward else given[:3]

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return load("xla").attention(dataclasses.replace(plan), Options(p.head_dim**-0.5), q, k, v, None)[0]

    try:
        emit.STEP_BYTES = step_bytes or usual
        compiled = jax.jit(with_gradients(forward) if backward else forward).lower(*arguments).compile()
    finally:
        emit.STEP_BYTES = usual
    return lambda: jax.block_until_ready(compiled(*arguments))


def arrays(q_len: int, head_dim: int) -> tuple[jax.Array, ...]:
    """query, key, value and a cotangent of the output."""
    return tuple(jax.random.normal(jax.random.key(n), (1, q_len, HEADS, head_dim)) for n in range(4))


def plan_with(text: str, q_len: int, head_dim: int, blocks: tuple[int | None, int | None]) -> Plan:
    problem = Problem(splat.parse(text), q_len, q_len, head_dim, HEADS, HEADS)
    return make_plan(problem, implementation="xla", block_q=blocks[0], block_kv=blocks[1])


# -- rates -------------------------------------------------------------------------------------------------------------


def rates(repetitions: int) -> Report:
    """Matrix products, exponentials and memory of this CPU through XLA, per thread, beside the target table."""
    report = Report("rates", "Rates through XLA, per thread", ("what", "measured", "in the target table"))
    threads, target = os.cpu_count() or 1, find("cpu")
    small = jax.random.normal(jax.random.key(0), (24, 128, 64))
    wide = jax.random.normal(jax.random.key(0), (24, 512, 64))
    cube = jax.random.normal(jax.random.key(0), (2048, 2048))
    line, long = jnp.ones(1 << 21), jnp.ones(1 << 25)
    matmul = target.matmul_flops["float32"] / threads / 1e9
    tiles = jax.jit(lambda a, b: jnp.einsum("bmh,bnh->bmn", a, b))
    product, exponential, double = jax.jit(jnp.dot), jax.jit(lambda x: jnp.exp(x - 1)), jax.jit(lambda x: x * 2)
    work: list[tuple[str, Callable[[], Any], float, float]] = [
        ("matmul 2048^3, GFLOP/s", lambda: product(cube, cube), 2 * 2048**3, matmul),
        ("QK^T tiles 128 x 512 x 64, GFLOP/s", lambda: tiles(small, wide), 2 * 24 * 128 * 512 * 64, matmul),
        ("exp, in cache, G/s", lambda: exponential(line), line.size, target.exp_per_s / threads / 1e9),
        ("read and write memory, GB/s", lambda: double(long), 8 * long.size, target.bandwidth_bytes / threads / 1e9),
    ]
    calls = {name: (lambda run=run: jax.block_until_ready(run())) for name, run, _, _ in work}
    samples = timing.interleave(calls, repetitions)
    for name, _, amount, table in work:
        rate = amount / samples[name].best_ms / 1e6 / threads
        report.add(name, f"{rate:.3g}", f"{table:.3g}", name=name, ms=samples[name].ms, per_thread=rate, table=table)
    return report


# -- tile sizes --------------------------------------------------------------------------------------------------------


def measure(
    texts: Sequence[str], q_len: int, head_dim: int, block_q: Sequence[int], block_kv: Sequence[int], repetitions: int
) -> list[Point]:
    """Forward times of every pattern with every pair of tile sizes and (None, None): the model's own choice."""
    points, data = [], arrays(q_len, head_dim)
    for text in texts:
        every: list[tuple[int | None, int | None]] = [(None, None), *((bq, bk) for bq in block_q for bk in block_kv)]
        plans = {blocks: plan_with(text, q_len, head_dim, blocks) for blocks in every}
        # Tiles are clipped to what the pattern has: measure each schedule once, the chosen one always.
        seen = {plan.forward.decisions: blocks for blocks, plan in reversed(plans.items()) if blocks != (None, None)}
        kept = [(None, None), *seen.values()]
        calls = {str(blocks): attention_call(plans[blocks], device_arrays=data) for blocks in kept}
        samples = timing.interleave(calls, repetitions, turn_ms=TURN_MS)
        points += [Point(text, head_dim, b, plans[b], samples[str(b)]) for b in kept]
    return points


def features(plan: Plan) -> np.ndarray:
    """How often a plan's forward pays for each of `FEATURES`, all heads together."""
    counts = np.zeros(len(FEATURES))
    for one in plan.forward.passes:
        block_q, block_kv = one.decision.block_q, one.decision.block_kv
        counts += np.multiply(one.num_tiles, [block_q * block_kv, block_q, block_kv, 1, 0])
        counts[4] += one.order.shape[0] * block_q
    return counts * plan.problem.num_q_heads * plan.problem.batch


def fit(points: Sequence[Point]) -> np.ndarray:
    """Seconds per feature, none negative, with the least relative error (active sets: drop what comes out negative)."""
    seconds = np.array([point.samples.best_ms / 1e3 for point in points])
    rows = np.stack([features(point.plan) for point in points]) / seconds[:, None]
    active = list(range(len(FEATURES)))
    while True:
        solution = np.zeros(len(FEATURES))
        solution[active] = np.linalg.lstsq(rows[:, active], np.ones(len(points)), rcond=None)[0]
        worst = int(solution.argmin())
        if solution[worst] >= 0:
            return solution
        active.remove(worst)


def fitted(points: Sequence[Point], head_dim: int) -> tuple[Report, Report]:
    """(measured beside predicted and fitted times, the fitted constants)."""
    constants = fit(points)
    times = Report(
        f"blocks-{head_dim}",
        f"Forward with fixed tile sizes, head dim {head_dim}, {HEADS} heads: measured, predicted, fitted",
        ("pattern", "tiles", "waste", "median ms", "best ms", "predicted ms", "best/predicted", "fitted ms"),
    )
    for point in points:
        predicted, ours = point.plan.predicted_ms or float("nan"), 1e3 * float(features(point.plan) @ constants)
        sizes = ", ".join(f"{d.block_q}x{d.block_kv}" for d in point.plan.forward.decisions)
        chosen = " chosen" if point.blocks == (None, None) else ""
        times.add(
            point.text, sizes + chosen, f"{point.plan.waste:.2f}", str(point.samples), f"{point.samples.best_ms:.1f}",
            f"{predicted:.1f}",
            f"{point.samples.best_ms / predicted:.2f}", f"{ours:.1f}",
            text=point.text, head_dim=head_dim, blocks=point.blocks, tiles=sizes, ms=point.samples.ms,
            predicted_ms=predicted, fitted_ms=ours, features=features(point.plan).tolist(),
        )  # fmt: skip
    table = Report(f"constants-{head_dim}", f"Fitted constants, head dim {head_dim}", ("one", "seconds"))
    for name, value in zip(FEATURES, constants, strict=True):
        table.add(name, f"{value:.3g}", name=name, seconds=value)
    return times, table


def choices(points: Sequence[Point], head_dim: int) -> Report:
    """What the model's choice of tile sizes costs against the best that was measured."""
    report = Report(
        f"choices-{head_dim}",
        f"The model's tile sizes against the best measured, head dim {head_dim}",
        ("pattern", "chosen", "ms", "best", "best ms", "chosen/best"),
    )
    for text in dict.fromkeys(point.text for point in points):
        here = [point for point in points if point.text == text]
        chosen = next(point for point in here if point.blocks == (None, None))
        best = min(here, key=lambda point: point.samples.best_ms)
        names = [", ".join(f"{d.block_q}x{d.block_kv}" for d in p.plan.forward.decisions) for p in (chosen, best)]
        loss = timing.ratio(chosen.samples, best.samples)
        report.add(
            text, names[0], str(chosen.samples), names[1], str(best.samples), f"{loss:.2f}",
            text=text, head_dim=head_dim, chosen=names[0], best=names[1], loss=loss,
        )  # fmt: skip
    return report


# -- step size ---------------------------------------------------------------------------------------------------------


def steps(cases: Sequence[tuple[str, int]], repetitions: int) -> Report:
    """Forward and forward + backward with different amounts of scores a step."""
    report = Report(
        "steps",
        f"Scores of one step, ms by MB (now {emit.STEP_BYTES >> 20}), head dim 64, {HEADS} heads",
        ("pattern", "positions", "direction", *(f"{n >> 20}" for n in STEP_BYTES), "best"),
    )
    for text, q_len in cases:
        data, plan = arrays(q_len, 64), plan_with(text, q_len, 64, (None, None))
        for backward in (False, True):
            calls = {
                str(n): attention_call(plan, step_bytes=n, backward=backward, device_arrays=data) for n in STEP_BYTES
            }
            samples = timing.interleave(calls, repetitions, turn_ms=TURN_MS)
            best = min(samples, key=lambda name: samples[name].median_ms)
            direction = "forward + backward" if backward else "forward"
            report.add(
                text, f"{q_len:,}", direction, *(str(s) for s in samples.values()), f"{int(best) >> 20}",
                text=text, q_len=q_len, direction=direction, ms={name: s.ms for name, s in samples.items()},
            )  # fmt: skip
    return report


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibrate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("rates", "blocks", "steps"), default=["rates", "blocks", "steps"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the raw samples there, one JSON file a table")
    given = parser.parse_args(arguments)
    console = rich.console.Console(width=None if sys.stdout.isatty() else 140)

    def show(report: Report) -> None:
        console.print(report.table())
        if given.out:
            write_json(given.out / f"{report.name}.json", report.to_json())

    repetitions = 3 if given.quick else 5
    if "rates" in given.only:
        show(rates(repetitions))
    for head_dim in given.head_dims[: 1 if given.quick else None] if "blocks" in given.only else []:
        q_len, block_q, block_kv = (
            (512, (64,), (64, 128)) if given.quick else (4096, (32, 64, 128, 256), (64, 128, 256, 512))
        )
        points = measure(PATTERNS, q_len, head_dim, block_q, block_kv, repetitions)
        for report in (*fitted(points, head_dim), choices(points, head_dim)):
            show(report)
    if "steps" in given.only:
        show(steps([("window(256)", 1024)] if given.quick else STEP_CASES, repetitions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
