"""Attention as JAX would send it to a GPU: cases for `lowering.report`, run by a process that is not interpreted.

python -m tests.codegen.triton.attention_lowering [CASE...]
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp

import splat
from splat.codegen.triton import bind_jax
from tests.codegen.triton.lowering import CASES as OTHERS
from tests.codegen.triton.lowering import KernelCall, lower, main

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 4096, 8, 2, 128

PATTERNS = {
    "window": "causal() & window(1024, 0)",
    "strided": "strided(64)",
    "merged": "window(128) | strided(128)",
    "many": "blocked(64, 1, 1) | global_columns(64) | random_blocks(64, 9, 0)",
}

CASES: dict[str, Any] = {}


def case(function: Any) -> Any:
    CASES[function.__name__] = function
    return function


def arrays(*, head_dim: int = HEAD_DIM, dtype: Any = jnp.bfloat16, leading: tuple[int, ...] = ()) -> list[Any]:
    """Shapes of query, key and value."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [jax.ShapeDtypeStruct((*leading, BATCH, LENGTH, n, head_dim), dtype) for n in heads]


def attend(q: Any, k: Any, v: Any, pattern: Any = None, **options: Any) -> Any:
    pattern = splat.parse(PATTERNS["window"]) if pattern is None else pattern
    return splat.attention(q, k, v, pattern, implementation="triton", **options)


def loss(q: Any, k: Any, v: Any, pattern: Any = None, **options: Any) -> Any:
    return (attend(q, k, v, pattern, **options).astype(jnp.float32) ** 2).sum()


gradients = jax.grad(loss, argnums=(0, 1, 2))

for name, text in PATTERNS.items():
    CASES[f"forward_{name}"] = lambda p=text: lower(functools.partial(attend, pattern=splat.parse(p)), *arrays())
    CASES[f"gradients_{name}"] = lambda p=text: lower(functools.partial(gradients, pattern=splat.parse(p)), *arrays())


@case
def ampere() -> list[KernelCall]:
    return lower(gradients, *arrays(), compute_capability=80)


@case
def float16() -> list[KernelCall]:
    return lower(gradients, *arrays(head_dim=64, dtype=jnp.float16))


@case
def float32() -> list[KernelCall]:
    return lower(gradients, *arrays(head_dim=64, dtype=jnp.float32))


@case
def tf32() -> list[KernelCall]:
    with jax.default_matmul_precision("tensorfloat32"):
        return lower(gradients, *arrays(head_dim=64, dtype=jnp.float32))


@case
def padded_head_dim() -> list[KernelCall]:
    return lower(gradients, *arrays(head_dim=80))


@case
def lengths() -> list[KernelCall]:
    def run(q: Any, k: Any, v: Any, kv_lengths: Any) -> Any:
        return gradients(q, k, v, kv_lengths=kv_lengths)

    return lower(run, *arrays(), jax.ShapeDtypeStruct((BATCH,), jnp.int32))


@case
def score_mod() -> list[KernelCall]:
    """With gradients of slopes, and a bias (float32: read score by score) at a position that is not known yet."""

    def run(q: Any, k: Any, v: Any, slopes: Any, bias: Any, offset: Any) -> Any:
        def modified(q: Any, k: Any, v: Any, slopes: Any) -> Any:
            def alibi(score: Any, batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Any:
                return score + slopes[head] * (kv_idx - q_idx)

            return loss(q, k, v, score_mod=alibi, bias=bias, query_offset=offset, logits_soft_cap=30.0)

        return jax.grad(modified, (0, 1, 2, 3))(q, k, v, slopes)

    slopes, bias = (
        jax.ShapeDtypeStruct((HEADS,), jnp.float32),
        jax.ShapeDtypeStruct((1, HEADS, 1, LENGTH), jnp.float32),
    )
    return lower(run, *arrays(), slopes, bias, jax.ShapeDtypeStruct((), jnp.int32))


@case
def runtime_offset() -> list[KernelCall]:
    def run(q: Any, k: Any, v: Any, offset: Any) -> Any:
        return gradients(q, k, v, query_offset=offset)

    return lower(run, *arrays(), jax.ShapeDtypeStruct((), jnp.int32))


@case
def decoding() -> list[KernelCall]:
    """One query of every sequence, at a position that is not known yet."""
    query, key, value = arrays()
    query = jax.ShapeDtypeStruct((BATCH, 1, *query.shape[2:]), query.dtype)

    def run(q: Any, k: Any, v: Any, offset: Any, kv_lengths: Any) -> Any:
        return gradients(q, k, v, query_offset=offset, kv_lengths=kv_lengths)

    numbers = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    return lower(run, query, key, value, *numbers)


@case
def runtime_segments() -> list[KernelCall]:
    def run(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return gradients(q, k, v, splat.causal() & splat.segments(ids))

    return lower(run, *arrays(), jax.ShapeDtypeStruct((LENGTH,), jnp.int32))


@case
def vmap_of_gradients() -> list[KernelCall]:
    return lower(jax.vmap(gradients), *arrays(leading=(3,)))


@case
def scan_and_remat() -> list[KernelCall]:
    def model(q: Any, k: Any, v: Any) -> Any:
        layer = jax.checkpoint(lambda x, _: (attend(x, k, v), None))
        return (jax.lax.scan(layer, q, None, length=3)[0].astype(jnp.float32) ** 2).sum()

    return lower(jax.grad(model), *arrays())


@case
def shard_map() -> list[KernelCall]:
    """Over the batch and over heads."""
    made = []
    for spec in (jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec(None, None, "x")):
        mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        made += lower(jax.shard_map(gradients, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 3), *arrays())
    return made


@case
def export() -> list[KernelCall]:
    import jax.export

    with bind_jax.lowering_for(90):
        made = jax.export.export(
            jax.jit(attend), platforms=("cuda",), disabled_checks=bind_jax.export_checks()
        )(*arrays())  # fmt: skip
    assert made.serialize(vjp_order=0)
    return lower(made.call, *arrays())


if __name__ == "__main__":
    assert OTHERS, "the cases of `lowering` are not these"
    main(CASES, sys.argv[1:])
