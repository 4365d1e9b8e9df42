"""Decoding: one token through some layers, each with a cache of its own, against what users of PyTorch and JAX have."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import splat
from benchmarks.cpu import gate, torch_side
from benchmarks.cpu.clock import TURN_MS, Call, take_turns
from benchmarks.cpu.setting import DTYPES, THREADS, Setting
from benchmarks.report import Report
from splat import reference

#: A model's layers share a pattern, and so what is planned for a token; caches of so many do not stay near.
LAYERS = 8

WINDOW, SINKS = 1024, 4
SLICE = f"causal() & window({WINDOW}, 0)"
PATTERN = f"{SLICE} | sink({SINKS})"

#: Everyone's threads go on for a while after a call, looking for work: nobody is timed meanwhile.
REST_S = 0.1

#: Query heads, key heads, head dim.
SHAPES = ((8, 8, 64), (32, 8, 128))


@dataclasses.dataclass(frozen=True)
class Layers:
    """query [1, N, 1, H], key and value [1, K, cache, H] of each layer, float32; the token is at `position`."""

    position: int
    query: list[np.ndarray]
    key: list[np.ndarray]
    value: list[np.ndarray]

    @staticmethod
    def of(cache: int, heads: int, kv_heads: int, head_dim: int) -> Layers:
        rng = np.random.default_rng(0)

        def layers(heads: int, positions: int) -> list[np.ndarray]:
            return [rng.standard_normal((1, heads, positions, head_dim), np.float32) for _ in range(LAYERS)]

        return Layers(cache * 3 // 4, layers(heads, 1), *(layers(kv_heads, cache) for _ in range(2)))

    def mask(self, pattern: str = PATTERN) -> np.ndarray:
        """bool [1, cache]: what the token attends to."""
        return splat.parse(pattern).to_dense(1, self.key[0].shape[2], query_offset=self.position)

    def truth(self, pattern: str, dtype: str) -> list[np.ndarray]:
        """[1, 1, N, H] of each layer, float32: the oracle's, of inputs of that type."""
        at = np.flatnonzero(self.mask(pattern)[0])
        made = []
        for query, key, value in zip(self.query, self.key, self.value, strict=True):
            some = (query, key[:, :, at], value[:, :, at])
            q, k, v = (np.asarray(x, jnp.dtype(dtype)).swapaxes(1, 2) for x in some)
            made.append(reference.attention(q, k, v, np.ones((1, at.size), bool))[0].astype(np.float32))
        return made


def torch_calls(layers: Layers, dtype: str) -> dict[str, Call]:
    """Ours, at new positions and at a known one; attention with a mask over all of the cache; and over a slice."""
    pt = torch_side.torch()
    from splat.torch import attention

    query, key, value = (
        [pt.from_numpy(x).to(getattr(pt, dtype)) for x in each] for each in (layers.query, layers.key, layers.value)
    )
    pattern, at, mask = splat.parse(PATTERN), layers.position, pt.from_numpy(layers.mask())
    grouped = query[0].shape[1] > key[0].shape[1]
    first = max(0, at - WINDOW)
    steps = itertools.count()

    def dense(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        return pt.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)

    def every(one: Any) -> Call:
        def call() -> Any:
            with pt.no_grad():
                return [one(*each) for each in zip(query, key, value, strict=True)]

        return call

    def ours(offset: int) -> Call:
        return every(lambda q, k, v: attention(q, k, v, pattern, query_offset=offset))

    def next_token() -> Any:  # the first one's position is the others'
        return ours(at - next(steps) % (at // 2))()

    return {
        "ours": next_token,
        "ours, planned": ours(at),
        "SDPA, mask": every(lambda q, k, v: dense(q, k, v, mask)),
        "SDPA, slice": every(lambda q, k, v: dense(q, k[:, :, first : at + 1], v[:, :, first : at + 1])),
    }


def jax_calls(layers: Layers, dtype: str) -> dict[str, Call]:
    """Ours with the position as a run-time value, and dense attention with a mask."""
    query, key, value = (
        [jnp.asarray(x.swapaxes(1, 2), dtype) for x in each] for each in (layers.query, layers.key, layers.value)
    )
    pattern, mask = splat.parse(PATTERN), jnp.asarray(layers.mask())[None, None]

    def every(one: Any, *more: Any) -> Call:
        run = jax.jit(lambda queries, keys, values, *more: [
            one(*each, *more) for each in zip(queries, keys, values, strict=True)
        ])  # fmt: skip
        return lambda: jax.block_until_ready(run(query, key, value, *more))

    return {
        "ours": every(
            lambda q, k, v, at: splat.attention(q, k, v, pattern, query_offset=at, implementation="cpp"),
            jnp.int32(layers.position),
        ),
        "dense": every(lambda q, k, v, mask: jax.nn.dot_product_attention(q, k, v, mask=mask), mask),
    }


def decode(setting: Setting) -> Report:
    """No bar: what a token costs."""
    report = Report(
        "cpu-decode",
        f"One token by {PATTERN}, batch 1, {THREADS} threads, {LAYERS} layers with caches of their own: microseconds a "
        f"layer; in turns of {TURN_MS:g} ms. From PyTorch each token is at a new position, whose keys are looked up "
        "once for all layers (planned: where they are known; this and all others stay at one position, whose keys are "
        "then nearer). SDPA: "
        "over the whole cache with a mask, and over a slice, the window without sinks. From JAX the position is a "
        "run-time value.",
        (
            "cache", "heads", "H", "type", "ours us", "planned", "SDPA mask", "slice", "JAX ours", "dense", "clean",
            "foreign",
        ),
    )  # fmt: skip
    lengths, shapes = ((64,), SHAPES[1:]) if setting.quick else ((4096, 16384), SHAPES)
    for cache, (heads, kv_heads, head_dim), dtype in itertools.product(lengths, shapes, DTYPES):
        width = 8 if setting.quick else head_dim
        cells = f"{cache:,}", f"{heads}/{kv_heads}", str(width), dtype
        with setting.attempt(report, " ".join(cells)):
            layers = Layers.of(cache, heads, kv_heads, width)
            calls = {f"JAX {name}": call for name, call in jax_calls(layers, dtype).items()}
            if not torch_side.why_not(setting):
                calls |= torch_calls(layers, dtype)
            off = _check(calls, layers, dtype)
            turns = take_turns(calls, setting.rounds, setting.budget_s, rest_s=dict.fromkeys(calls, REST_S))
            us = {name: 1e3 * samples.median_ms / LAYERS for name, samples in turns.samples.items()}
            order = ("ours", "ours, planned", "SDPA, mask", "SDPA, slice", "JAX ours", "JAX dense")
            setting.add(
                report, *cells, *(f"{us[name]:.0f}" if name in us else "" for name in order), turns.clean,
                f"{turns.foreign:.0%}", cache=cache, heads=heads, kv_heads=kv_heads, head_dim=width, dtype=dtype,
                layers=LAYERS, us=us, off=off, **turns.to_json(),
            )  # fmt: skip
    return report


def _check(calls: dict[str, Call], layers: Layers, dtype: str) -> dict[str, float]:
    """Everyone against the float64 oracle, the slice against that of the window alone; called for the first time."""
    found = {}
    for name, call in calls.items():
        expected = layers.truth(SLICE if name == "SDPA, slice" else PATTERN, dtype)
        found[name] = max(
            gate.compare(name, _rows(got), right, gate.TOLERANCE[dtype])
            for got, right in zip(call(), expected, strict=True)
        )
    return found


def _rows(x: Any) -> np.ndarray:
    """[1, 1, N, H] of JAX's layout or of PyTorch's."""
    return np.asarray(x, np.float32) if isinstance(x, jax.Array) else torch_side.as_numpy(x)
