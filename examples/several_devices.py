"""A training step over a mesh of devices: batch entries over one axis, heads over the other; nothing is gathered.

    python examples/several_devices.py        # on all devices of the machine; on a single CPU, as if it were four

Only shardings are written here. Attention follows them, forward and backward, and what devices tell each other is
what tensor and data parallelism always need: sums of partial products, and of gradients.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

#: Before JAX is imported, and of no effect on GPUs.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import splat

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 8, 4, 32, 256

PATTERN = splat.causal() & splat.window(64) | splat.sink(4)

#: How weights are sharded: heads over "model".
SPECS = {
    "query": PartitionSpec(None, "model"),
    "key": PartitionSpec(None, "model"),
    "value": PartitionSpec(None, "model"),
    "out": PartitionSpec("model"),
}


def weights(key: Any) -> dict[str, Any]:
    shapes = {
        "query": (WIDTH, HEADS, HEAD_DIM),
        "key": (WIDTH, KV_HEADS, HEAD_DIM),
        "value": (WIDTH, KV_HEADS, HEAD_DIM),
        "out": (HEADS, HEAD_DIM, WIDTH),
    }
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, shape) / 16 for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def step(parameters: dict[str, Any], x: Any, wanted: Any) -> tuple[dict[str, Any], Any]:
    """One step of gradient descent on a layer; x and wanted: [B, T, WIDTH]."""

    def loss(parameters: dict[str, Any]) -> Any:
        query, key, value = (jnp.einsum("btw,wnh->btnh", x, parameters[name]) for name in ("query", "key", "value"))
        attended = splat.attention(query, key, value, PATTERN)
        return jnp.mean((x + jnp.einsum("btnh,nhw->btw", attended, parameters["out"]) - wanted) ** 2)

    value, gradients = jax.value_and_grad(loss)(parameters)
    return jax.tree.map(lambda weight, gradient: weight - 10 * gradient, parameters, gradients), value


def train(run: Callable[..., Any], parameters: dict[str, Any], arrays: tuple[Any, Any], steps: int) -> list[float]:
    """The loss before each step."""
    losses = []
    for _ in range(steps):
        parameters, value = run(parameters, *arrays)
        losses.append(float(value))
    return losses


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps")
    quick = parser.parse_args(argv).quick
    length, steps = (256, 3) if quick else (1024, 10)

    count = jax.device_count()
    over_heads = 2 if count % 2 == 0 else 1
    over_batch = count // over_heads
    mesh = jax.make_mesh((over_batch, over_heads), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    parameters = weights(jax.random.key(0))
    x, wanted = (jax.random.normal(key, (4 * over_batch, length, WIDTH)) for key in jax.random.split(jax.random.key(1)))

    losses_alone = train(jax.jit(step), parameters, (x, wanted), steps)

    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    placed = jax.device_put(parameters, shardings)
    arrays = jax.device_put((x, wanted), NamedSharding(mesh, PartitionSpec("data")))
    compiled = jax.jit(step, out_shardings=(shardings, None)).lower(placed, *arrays).compile()
    losses = train(compiled, placed, arrays, steps)

    calls = r"(all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\("
    said = Counter(re.findall(calls, compiled.as_text() or ""))
    print(f"{PATTERN}, {length} positions, {dict(mesh.shape)} of {jax.devices()[0].platform}")
    print("devices tell each other:", ", ".join(f"{n} x {name}" for name, n in said.items()) or "nothing")
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, on one device {losses_alone[0]:.4f} -> {losses_alone[-1]:.4f}")
    same = np.allclose(losses, losses_alone, rtol=1e-4)
    return 0 if same and losses[-1] < losses[0] and not set(said) - {"all-reduce"} else 1


if __name__ == "__main__":
    raise SystemExit(main())
