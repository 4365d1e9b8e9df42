"""JAX: our binding checked as PyTorch's is, and the attention that JAX users have, cuDNN's and XLA's, timed.

In a process of its own. JAX has no events: calls are enqueued in a row and waited for, without emptying caches.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import splat
from benchmarks import timing
from benchmarks.gpu import check
from benchmarks.gpu.jobs import BOTH, DIRECTIONS, FORWARD, Job, case_of
from benchmarks.gpu.worker import Bench

WINDOW = 1024

#: name -> (the case that it is a peer of, keyword arguments of `jax.nn.dot_product_attention`).
PEERS = {
    "cuDNN, window": ("sas/sliding window", dict(local_window_size=(WINDOW - 1, 0), implementation="cudnn")),
    "cuDNN, dense": ("figures/dense causal", dict(implementation="cudnn")),
    "XLA, dense": ("figures/dense causal", dict(implementation="xla")),
}

#: Calls in a row last this long, about.
ROW_MS, ROUNDS = 40.0, 10


def to_jax(tensor: Tensor) -> jax.Array:
    """[B, N, T, H] as [B, T, N, H]; exact, since float32 holds every bfloat16."""
    kind = str(tensor.dtype).removeprefix("torch.")
    return jnp.asarray(tensor.detach().float().cpu().numpy()).astype(kind).swapaxes(1, 2)


def to_torch(array: jax.Array, heads: list[int], device: str) -> Tensor:
    """[B, T, N, ...] as [heads, T, ...], float32."""
    picked = np.asarray(array[0][:, np.array(heads)].astype(jnp.float32))
    return torch.from_numpy(picked.swapaxes(0, 1).copy()).to(device)


class Gate(Bench):
    """Several patterns, checked only."""

    def prepare(self) -> None:
        if self.job.device == "cuda" and importlib.util.find_spec("jax_triton") is None:
            raise RuntimeError("jax-triton is not installed: the JAX binding is not checked")
        for name in self.job.cases:
            for q_len in self.job.lengths:
                if self.within(name, q_len):
                    with self.guarded(f"JAX binding, {name}", q_len):
                        self._check(name, q_len)

    def _check(self, name: str, q_len: int) -> None:
        sizes, text = self.job.sizes, case_of(name).expression(q_len)
        arrays = check.inputs(q_len, sizes.heads, sizes.head_dim, sizes.dtype, self.job.device)
        query, key, value, d_out = map(to_jax, arrays)
        attend = partial(
            splat.attention, pattern=splat.parse(text), return_lse=True, implementation="triton"
        )  # fmt: skip
        begin = time.perf_counter()
        (out, lse), backward = jax.vjp(attend, query, key, value)
        gradients = jax.block_until_ready(backward((d_out, jnp.zeros_like(lse))))
        seconds = time.perf_counter() - begin
        heads = check.checked_heads(sizes.heads, sizes.num_checked)
        ours = check.Results(*(to_torch(x, heads, self.job.device) for x in (out, lse, *gradients)))
        found, faults = check.gate(ours, [x[0, heads] for x in arrays], text)
        self.say("gate", case=name, binding="JAX", q_len=q_len, errors=found, faults=faults, first_call_s=seconds)

    def measure(self) -> None:
        pass


class Peers(Bench):
    """`jax.nn.dot_product_attention`."""

    def prepare(self) -> None:
        self.calls: dict[tuple[str, int, str], Callable[..., Any]] = {}
        for q_len in self.job.lengths:
            for name, (_, options) in PEERS.items():
                for direction in DIRECTIONS:
                    if self.within(name, q_len, direction):
                        with self.guarded(name, q_len, direction):
                            # Not run yet: dense scores take memory that those beside it need.
                            call = compiled(options, direction).lower(*self._inputs(q_len)).compile()
                            self.calls[name, q_len, direction] = call

    def _inputs(self, q_len: int) -> list[jax.Array]:
        shape = (1, q_len, self.job.sizes.heads, self.job.sizes.head_dim)
        keys = jax.random.split(jax.random.key(0), 4)
        return [jax.random.normal(key, shape, self.job.sizes.dtype) for key in keys]

    def measure(self) -> None:
        for (name, q_len, direction), call in self.calls.items():
            if self.within(f"timing {name}", q_len, direction):
                with self.guarded(name, q_len, direction):
                    samples = self._time(call, self._inputs(q_len))
                    self.say(
                        "time", case=PEERS[name][0], q_len=q_len, direction=direction, ms={name: samples.ms},
                        peak_bytes={}, host_ms={},
                    )  # fmt: skip

    def _time(self, call: Callable[..., Any], arrays: list[jax.Array]) -> timing.Samples:
        def row(count: int) -> None:
            jax.block_until_ready([call(*arrays) for _ in range(count)][-1])

        row(1)
        count = 1 if self.job.device == "cpu" else max(1, round(ROW_MS / timing.wall_ms(lambda: row(1))))
        rounds = 2 if self.job.device == "cpu" else ROUNDS
        turns = timing.interleave({"row": lambda: row(count)}, rounds)["row"].ms
        return timing.Samples(tuple(ms / count for ms in turns))


def compiled(options: dict[str, Any], direction: str) -> Any:
    """Causal attention, or its gradients, as a function of query, key, value and the output's gradient."""
    attend = partial(jax.nn.dot_product_attention, is_causal=True, **options)
    if direction == FORWARD:
        return jax.jit(lambda q, k, v, d_out: attend(q, k, v))
    assert direction == BOTH
    return jax.jit(lambda q, k, v, d_out: jax.vjp(attend, q, k, v)[1](d_out))


def BENCH(job: Job, say: Callable[..., None]) -> Bench:
    """The job's kind says which."""
    return {"jax-gate": Gate, "jax-peers": Peers}[job.kind](job, say)
