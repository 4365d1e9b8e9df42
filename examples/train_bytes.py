"""Train a small byte-level language model whose heads look at the text through different patterns.

    python examples/train_bytes.py            # some minutes; --quick: half a minute

Text: the source files of Python's standard library, as bytes. Model: a plain transformer in plain JAX, with AdamW in a
few lines. Each layer has local, strided and global heads, written as one `splat.per_head([...])`. For the first
`--check` steps the same training also runs with dense masked attention: the losses must agree to 1e-4.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import splat

Tree = Any  # a pytree of arrays
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

#: How far the sparse and the dense training may be apart, in nats.
TOLERANCE = 1e-4

LOCAL = splat.causal() & splat.window(64)
STRIDED = splat.causal() & (splat.window(16) | splat.strided(16))
GLOBAL = splat.causal() & (splat.window(32) | splat.lattice_columns(32, 31) | splat.sink(4))
HEADS = (LOCAL, LOCAL, STRIDED, STRIDED, GLOBAL, GLOBAL)


class Config(NamedTuple):
    """Sizes of the model and of the training."""

    seq_len: int
    batch: int
    layers: int
    head_dim: int
    steps: int
    learning_rate: float = 3e-3
    weight_decay: float = 0.01

    @property
    def width(self) -> int:
        return len(HEADS) * self.head_dim


# -- data --------------------------------------------------------------------------------------------------------------


def read_text() -> np.ndarray:
    """The standard library's source files, one after the other: uint8 [bytes]."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8)


def batches(text: np.ndarray, config: Config, seed: int) -> Iterator[np.ndarray]:
    """Random excerpts, int32 [batch, seq_len + 1], for ever; the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    while True:
        start = rng.integers(0, text.size - config.seq_len - 1, (config.batch, 1))
        yield text[start + np.arange(config.seq_len + 1)].astype(np.int32)


# -- attention, sparse and dense ---------------------------------------------------------------------------------------


def sparse_attention() -> Attention:
    """All heads in one call, each by its own pattern; nothing of size seq_len x seq_len is formed."""
    return partial(splat.attention, pattern=splat.per_head(HEADS))


def dense_attention(seq_len: int) -> Attention:
    """The same by definition: a float32 softmax over masked scores [batch, heads, seq_len, seq_len]."""
    mask = jnp.asarray(splat.per_head(HEADS).to_dense(seq_len))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)

    return attend


# -- model -------------------------------------------------------------------------------------------------------------


def initialise(config: Config, seed: int) -> Tree:
    """Parameters; those of the layers are stacked, so that one compiled layer serves all."""
    keys = iter(jax.random.split(jax.random.key(seed), 7))
    width, layers = config.width, config.layers

    def matrix(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[-2] ** -0.5

    return {
        "bytes": matrix(256, width) * 0.5,
        "places": matrix(config.seq_len, width) * 0.5,
        "layers": {
            "norm": jnp.ones((layers, 2, width)),
            "qkv": matrix(layers, width, 3 * width),
            "out": matrix(layers, width, width) * 0.3,
            "up": matrix(layers, width, 4 * width),
            "down": matrix(layers, 4 * width, width) * 0.3,
        },
        "norm": jnp.ones(width),
        "logits": matrix(width, 256) * 0.3,
    }


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * gain


def loss_of(params: Tree, batch: jax.Array, config: Config, attention: Attention) -> jax.Array:
    """Mean cross-entropy of the next byte, in nats."""
    inputs, targets = batch[:, :-1], batch[:, 1:]

    def layer(x: jax.Array, p: Tree) -> tuple[jax.Array, None]:
        qkv = rms_norm(x, p["norm"][0]) @ p["qkv"]
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, len(HEADS), config.head_dim), 2, 0)
        x = x + attention(q, k, v).reshape(x.shape) @ p["out"]
        return x + jax.nn.gelu(rms_norm(x, p["norm"][1]) @ p["up"]) @ p["down"], None

    x, _ = jax.lax.scan(layer, params["bytes"][inputs] + params["places"], params["layers"])
    log_p = jax.nn.log_softmax(rms_norm(x, params["norm"]) @ params["logits"])
    return -jnp.mean(jnp.take_along_axis(log_p, targets[..., None], axis=-1))


# -- training ----------------------------------------------------------------------------------------------------------


def adamw(params: Tree, grads: Tree, moments: tuple[Tree, Tree], step: jax.Array, config: Config) -> tuple[Tree, Any]:
    """One step of AdamW (Loshchilov & Hutter, arXiv 1711.05101), with a short warm-up; (params, moments)."""
    rate = config.learning_rate * jnp.minimum(1.0, step / 10)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads)
    second = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g * g, moments[1], grads)

    def update(p: jax.Array, m: jax.Array, s: jax.Array) -> jax.Array:
        direction = m / (1 - 0.9**step) / (jnp.sqrt(s / (1 - 0.99**step)) + 1e-6)
        return p - rate * (direction + config.weight_decay * p)

    return jax.tree.map(update, params, first, second), (first, second)


def train(
    config: Config, attention: Attention, text: np.ndarray, seed: int, report: Callable[[int, float, float], None]
) -> list[float]:
    """The losses of `config.steps` steps; `report(step, loss, bytes_per_s)` is called after each."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def one_step(params: Tree, moments: Any, step: jax.Array, batch: jax.Array) -> tuple[Tree, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(params, batch, config, attention)
        return *adamw(params, grads, moments, step, config), loss

    params = initialise(config, seed)
    moments = tuple(jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    losses: list[float] = []
    for step, batch in zip(range(1, config.steps + 1), batches(text, config, seed), strict=False):
        begin = time.perf_counter()
        params, moments, loss = one_step(params, moments, jnp.float32(step), jnp.asarray(batch))
        losses.append(float(loss))
        report(step, losses[-1], config.batch * config.seq_len / (time.perf_counter() - begin))
    return losses


def check(losses: list[float], config: Config, text: np.ndarray, seed: int) -> float:
    """The largest difference to the same training with dense masked attention, over `config.steps` steps."""
    dense = train(config, dense_attention(config.seq_len), text, seed, lambda *_: None)
    return max(abs(a - b) for a, b in zip(losses, dense, strict=False))


def save_plot(losses: list[float], path: Path) -> None:
    """The loss over the steps, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses)
    axes.set(xlabel="step", ylabel="loss, nats per byte", title="bytes of the standard library")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short training of a small model")
    parser.add_argument("--steps", type=int, help="default 200, quick: 30")
    parser.add_argument("--seq-len", type=int, help="default 512, quick: 128")
    parser.add_argument("--batch", type=int, help="default 8, quick: 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=int, default=20, metavar="N", help="compare the first N steps (default 20)")
    parser.add_argument("--save-plot", type=Path, metavar="PNG", help="draw the loss")
    given = parser.parse_args(arguments)
    for name, quick, usual in (("steps", 30, 200), ("seq_len", 128, 512), ("batch", 4, 8)):
        if getattr(given, name) is None:
            setattr(given, name, quick if given.quick else usual)
        elif getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, but {getattr(given, name)} was given")
    return given


def main(arguments: list[str] | None = None) -> int:
    """Trains, checks and prints; the process's exit code."""
    given = parse_arguments(arguments)
    layers, head_dim = (2, 16) if given.quick else (3, 32)
    config = Config(given.seq_len, given.batch, layers, head_dim, given.steps)
    text = read_text()
    print(f"text: {text.size:,} bytes of Python's standard library; {config}")
    for pattern in dict.fromkeys(HEADS):
        density = splat.plan(pattern, config.seq_len, head_dim=head_dim).density
        print(f"  {HEADS.count(pattern)} heads of {pattern}: {density:.1%} of the pairs")

    rates: list[float] = []

    def report(step: int, loss: float, bytes_per_s: float) -> None:
        rates.append(bytes_per_s)
        if step <= 5 or step % max(config.steps // 20, 1) == 0:
            note = "   with compilation" if step == 1 else ""
            print(f"step {step:5d}   loss {loss:.4f}   {bytes_per_s:10,.0f} bytes/s{note}", flush=True)

    losses = train(config, sparse_attention(), text, given.seed, report)
    if given.save_plot:
        save_plot(losses, given.save_plot)
        print(f"loss drawn in {given.save_plot}")

    first, last = losses[0], float(np.mean(losses[-5:]))
    print(f"loss {first:.4f} -> {last:.4f} in {config.steps} steps, median {np.median(rates):,.0f} bytes/s")
    steps = min(given.check, config.steps)
    if steps > 0:
        difference = check(losses, config._replace(steps=steps), text, given.seed)
        agrees = difference <= TOLERANCE  # False for NaN, too
        print(
            f"{'ok' if agrees else 'FAILED'}: the first {steps} losses and those of dense masked attention differ by "
            f"{difference:.1e} at most ({TOLERANCE:.0e} allowed)"
        )
        if not agrees:
            return 1
    if config.steps >= 20:
        assert last < 0.85 * first, f"the loss did not fall: {first:.4f} -> {last:.4f}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
