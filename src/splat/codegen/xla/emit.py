"""From a plan to a differentiable function of query, key and value."""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from splat.codegen.base import Options, Request
from splat.codegen.xla import kernels
from splat.codegen.xla.tables import PassSpec, Tables, lower
from splat.errors import SplatError, UnsupportedError
from splat.planning import Plan, Schedule

Array = Any

DTYPES = ("float32", "bfloat16", "float16", "float64")

#: Score tiles of one step, in bytes: small enough for the caches of a CPU, large enough for its matrix products.
STEP_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class _Program:
    """Everything static about one attention call; equal programs share one traced function.

    `plan` is set where the plan is static: then its tables are constants of the program. Otherwise they are arguments,
    and `backward_refusal` says why there is no backward, if there is none.
    """

    options: Options
    plan: Plan | None
    forward: tuple[PassSpec, ...] = ()
    backward: tuple[PassSpec, ...] = ()
    backward_refusal: str | None = None


class XlaImplementation:
    """See `splat.codegen.base.Implementation`."""

    name = "xla"

    def refusal(self, request: Request) -> str | None:
        if request.dtype not in DTYPES:
            return f"the xla implementation serves {', '.join(DTYPES)}, not {request.dtype}. Convert the inputs."
        return None

    def attention(self, plan: Plan, options: Options, query: Any, key: Any, value: Any, kv_lengths: Any) -> Any:
        query, key, value = (kernels.vary_like(x, query, key, value) for x in (query, key, value))
        tables: tuple[list[Tables], list[Tables]] | None = None
        if plan.is_static:
            program = _Program(options, plan)
        else:
            forward, forward_tables = _lower(plan, plan.forward)
            backward, backward_tables, refused = (), [], None
            try:
                backward, backward_tables = _lower(plan, plan.backward)
            except SplatError as error:
                refused = str(error)
            program = _Program(options, None, forward, backward, refused)
            tables = (forward_tables, backward_tables)
        return _function(program)(query, key, value, tables, kv_lengths)

    def emit(self, plan: Plan, options: Options) -> str:
        """StableHLO of the forward, as text."""
        p = plan.problem
        q = jax.ShapeDtypeStruct((p.batch, p.q_len, p.num_q_heads, p.head_dim), p.dtype)
        k = jax.ShapeDtypeStruct((p.batch, p.kv_len, p.num_kv_heads, p.head_dim), p.dtype)
        run = partial(self.attention, plan, options, kv_lengths=None)
        return jax.jit(run).lower(q, k, k).as_text()


IMPLEMENTATION = XlaImplementation()


#: Static facts and tables of every pass.
_Lowered = tuple[tuple[PassSpec, ...], list[Tables]]


def _lower(plan: Plan, schedule: Schedule) -> _Lowered:
    return lower(schedule, plan.problem.batch * plan.problem.num_q_heads, STEP_BYTES)


@lru_cache(maxsize=256)
def _function(program: _Program) -> Any:
    """(query, key, value, tables, kv_lengths) -> (output, log-sum-exp), jitted, with its reverse mode."""
    options = program.options

    def forward_tables(tables: Any) -> _Lowered:
        return _lower(program.plan, program.plan.forward) if program.plan else (program.forward, tables[0])

    def backward_tables(tables: Any) -> _Lowered:
        if program.plan:
            return _lower(program.plan, program.plan.backward)
        if program.backward_refusal:
            raise UnsupportedError(program.backward_refusal)
        return program.backward, tables[1]

    def attention(query, key, value, tables, kv_lengths):
        return _forward(options, *forward_tables(tables), query, key, value, kv_lengths)

    def fwd(query, key, value, tables, kv_lengths):
        out, lse = attention(query, key, value, tables, kv_lengths)
        return (out, lse), (query, key, value, tables, kv_lengths, out, lse)

    def bwd(saved, cotangents):
        query, key, value, tables, kv_lengths, out, lse = saved
        d_query, d_key, d_value = _backward(
            options,
            forward_tables(tables),
            backward_tables(tables),
            query,
            key,
            value,
            kv_lengths,
            out,
            lse,
            *cotangents,
        )
        return d_query, d_key, d_value, None, None

    differentiable = jax.custom_vjp(attention)
    differentiable.defvjp(fwd, bwd)
    return jax.jit(differentiable)


def _heads_first(values: Array, num_kv_heads: int) -> Array:
    """[B, T, N, H] -> [B, K, G, T, H]."""
    batch, length, heads, width = values.shape
    return jnp.transpose(values.reshape(batch, length, num_kv_heads, heads // num_kv_heads, width), (0, 2, 3, 1, 4))


def _heads_last(values: Array) -> Array:
    """[B, K, G, T, H] -> [B, T, N, H]."""
    batch, kv_heads, group, length, width = values.shape
    return jnp.transpose(values, (0, 3, 1, 2, 4)).reshape(batch, length, kv_heads * group, width)


def _keys_first(values: Array, kv_lengths: Array | None) -> Array:
    """[B, S, K, H] -> [B, K, S, H], zero past the lengths, whatever stood there."""
    if kv_lengths is not None:
        inside = jnp.arange(values.shape[1])[None, :] < kv_lengths[:, None]
        values = jnp.where(inside[:, :, None, None], values, jnp.zeros((), values.dtype))
    return jnp.swapaxes(values, 1, 2)


def _forward(options, specs, tables, query, key, value, kv_lengths):
    kv_heads = key.shape[2]
    q = _heads_first(query, kv_heads)
    k, v = _keys_first(key, kv_lengths), _keys_first(value, kv_lengths)
    limit = None if kv_lengths is None else kernels.Limit(kv_lengths, "cols")
    body = kernels.forward_body(options)
    parts = []
    for spec, table in zip(specs, tables, strict=True):
        out, lse = kernels.run_pass(spec, table, [q], [k, v], limit, body)
        parts.append((out, lse))
    if not parts:
        dtype = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
        lse = kernels.vary_like(jnp.full(query.shape[:-1], -jnp.inf, dtype), query)
        return kernels.vary_like(jnp.zeros_like(query), query), lse
    out, lse = kernels.merge(parts)
    return _heads_last(out).astype(query.dtype), _heads_last(lse)[..., 0]


def _backward(options, forward, backward, query, key, value, kv_lengths, out, lse, d_out, d_lse):
    kv_heads = key.shape[2]
    q, d_o = _heads_first(query, kv_heads), _heads_first(d_out, kv_heads)
    k, v = _keys_first(key, kv_lengths), _keys_first(value, kv_lengths)
    delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1) - d_lse
    # A row that attends to nothing has log-sum-exp -inf and no pair to use it for.
    safe_lse = jnp.where(jnp.isneginf(lse), 0, lse)
    rows = [q, d_o, *(_heads_first(x[..., None], kv_heads) for x in (safe_lse, delta))]

    def limit(side: str) -> kernels.Limit | None:
        return None if kv_lengths is None else kernels.Limit(kv_lengths, side)

    d_q = _summed(forward, rows, [k, v], limit("cols"), kernels.d_query_body(options), [q])[0]
    d_k, d_v = _summed(backward, [k, v], rows, limit("rows"), kernels.d_key_value_body(options), [k, v])
    d_k, d_v = jnp.swapaxes(d_k, 1, 2), jnp.swapaxes(d_v, 1, 2)
    return _heads_last(d_q).astype(query.dtype), d_k.astype(key.dtype), d_v.astype(value.dtype)


def _summed(lowered: _Lowered, rows, lattices, limit, body: kernels.PassBody, like: list[Array]) -> list[Array]:
    """The sum over passes of what `body` computes; zeros shaped like `like` where there is no pass."""
    dtype = jnp.float64 if like[0].dtype == jnp.float64 else jnp.float32
    totals = [kernels.vary_like(jnp.zeros(x.shape, dtype), x) for x in like]
    for spec, table in zip(*lowered, strict=True):
        results = kernels.run_pass(spec, table, rows, lattices, limit, body)
        totals = [total + result for total, result in zip(totals, results, strict=True)]
    return totals


__all__ = ["DTYPES", "IMPLEMENTATION", "XlaImplementation"]
