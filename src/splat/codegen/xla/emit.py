"""From a plan to a differentiable function of query, key and value."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from splat.codegen.base import OPERATIONS, Options, Request, kept_with_plan
from splat.codegen.devices import device_target
from splat.codegen.partitioning import vary_like
from splat.codegen.reverse import lower_all
from splat.codegen.score_mod import Place
from splat.codegen.xla import kernels, values
from splat.codegen.xla.tables import PassSpec, Tables, lower
from splat.errors import ArgumentError, UnsupportedError
from splat.planning import Plan, Schedule, make_plan

Array = Any

DTYPES = ("float32", "bfloat16", "float16", "float64")

#: Score tiles of one step, in bytes: small enough for the caches of a CPU, large enough for its matrix products.
STEP_BYTES = 4 << 20


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
    opaque = False

    def refusal(self, request: Request) -> str | None:
        if request.dtype not in DTYPES:
            return f"the xla implementation serves {', '.join(DTYPES)}, not {request.dtype}. Convert the inputs."
        return None

    def target(self) -> str:
        return device_target()

    def attention(
        self, plan: Plan, options: Options, query: Any, key: Any, value: Any, kv_lengths: Any,
        place: Place | None = None,
    ) -> Any:  # fmt: skip
        tables: list[list[Tables]] | None = None
        if plan.is_static:
            program = _Program(options, plan)
        else:
            schedules = ("forward", "d_key_value")
            (forward, backward), tables, refusal = lower_all(plan, lambda one: _lower(one, query), schedules)
            program = _Program(options, None, forward, backward, refusal)
        every = jax.tree.leaves((query, key, value, tables, kv_lengths, place))
        query, key, value = (vary_like(x, *every) for x in (query, key, value))
        place = jax.tree.map(lambda x: vary_like(x, *every), place)
        return _function(program)(query, key, value, tables, kv_lengths, place)

    num_values = staticmethod(values.num_values)
    sddmm = staticmethod(values.sddmm)
    softmax = staticmethod(values.softmax)
    spmm = staticmethod(values.spmm)
    spmm_transposed = staticmethod(values.spmm_transposed)

    def emit(self, plan: Plan, options: Options, kernel: str | None = None) -> str:
        """StableHLO of the forward, as text."""
        if kernel not in (None, "forward"):
            wanted = ", ".join(OPERATIONS)
            raise ArgumentError(
                f"kernel must be 'forward' for target 'xla', or one of {wanted} (on values), but {kernel!r} was given"
            )
        p = plan.problem
        q = jax.ShapeDtypeStruct((p.batch, p.q_len, p.num_q_heads, p.head_dim), p.dtype)
        k = jax.ShapeDtypeStruct((p.batch, p.kv_len, p.num_kv_heads, p.head_dim), p.dtype)
        run = partial(self.attention, plan, options, kv_lengths=None)
        return stablehlo(run, q, k, k)

    def assembly(self, plan: Plan, options: Options, kernel: str | None = None) -> str:
        raise UnsupportedError("the xla implementation's programs are compiled when they run. Look at target='xla'.")


IMPLEMENTATION = XlaImplementation()


def stablehlo(function: Callable[..., Any], *arguments: jax.ShapeDtypeStruct) -> str:
    """What JAX makes of the function, as text; float64 stays float64 whatever JAX is configured for."""
    wide = jax.enable_x64(True) if any(x.dtype == "float64" for x in arguments) else contextlib.nullcontext()
    with wide:
        return jax.jit(function).lower(*arguments).as_text()


#: Static facts and tables of every pass.
_Lowered = tuple[tuple[PassSpec, ...], list[Tables]]


def _lower(schedule: Schedule, query: Array) -> _Lowered:
    batch, _, heads, _ = query.shape
    return lower(schedule, (batch if isinstance(batch, int) else 1) * heads, STEP_BYTES)  # exported for any batch


@kept_with_plan
def _function(program: _Program) -> Any:
    """(query, key, value, tables, kv_lengths, place) -> (output, log-sum-exp), jitted, with its reverse mode."""
    options = program.options

    def forward_tables(query: Array, tables: Any) -> _Lowered:
        return _lower(program.plan.forward, query) if program.plan else (program.forward, tables[0])

    def backward_tables(query: Array, tables: Any) -> _Lowered:
        if program.plan:
            return _lower(program.plan.d_key_value, query)
        if program.backward_refusal:
            raise UnsupportedError(program.backward_refusal)
        return program.backward, tables[1]

    def attention(query, key, value, tables, kv_lengths, place):
        return _forward(options, *forward_tables(query, tables), query, key, value, kv_lengths, place)

    def fwd(query, key, value, tables, kv_lengths, place):
        out, lse = attention(query, key, value, tables, kv_lengths, place)
        return (out, lse), (query, key, value, tables, kv_lengths, place, out, lse)

    def bwd(saved, cotangents):
        query, key, value, tables, kv_lengths, place, out, lse = saved
        d_query, d_key, d_value, d_arrays = _backward(
            options,
            forward_tables(query, tables),
            backward_tables(query, tables),
            query,
            key,
            value,
            kv_lengths,
            place,
            out,
            lse,
            *cotangents,
        )
        d_place = None if place is None else Place(None, None, None, d_arrays)
        return d_query, d_key, d_value, None, None, d_place

    differentiable = jax.custom_vjp(attention)
    differentiable.defvjp(fwd, bwd)
    return jax.jit(differentiable)


@dataclasses.dataclass(frozen=True)
class Learned:
    """The gradients of what a score modification closes over, for an implementation whose kernels do not make them.

    (tables, query, key, value, kv_lengths, place, output, log-sum-exp, and their gradients) -> one for each array of
    the place, None for those of integers.
    """

    options: Options
    plan: Plan | None
    forward: tuple[PassSpec, ...] = ()

    def __call__(self, tables, query, key, value, kv_lengths, place, out, lse, d_out, d_lse) -> tuple[Any, ...]:
        lowered = _lower(self.plan.forward, query) if self.plan else (self.forward, tables)
        return _d_query(self.options, lowered, query, key, value, kv_lengths, place, out, lse, d_out, d_lse)[1]


def learned(plan: Plan, options: Options) -> tuple[Learned, list[Tables] | None]:
    """What makes the gradients for a plan of another implementation, and the tables that it takes, if any."""
    own = make_plan(plan.problem, implementation="xla", target=plan.target, query_offset=plan.query_offset)
    if own.is_static:
        return Learned(options, own), None
    query = jax.ShapeDtypeStruct((1, own.problem.q_len, own.problem.num_q_heads, own.problem.head_dim), "float32")
    (forward,), (tables,), _ = lower_all(own, lambda one: _lower(one, query), ("forward",))
    return Learned(options, None, forward), tables


def _grouped(values: Array, num_kv_heads: int) -> Array:
    """[B, T, N, H] -> [B, T, K, G, H]."""
    batch, length, heads, width = values.shape
    return values.reshape(batch, length, num_kv_heads, heads // num_kv_heads, width)


def _forward(options, specs, tables, query, key, value, kv_lengths, place):
    limit = _limit(kv_lengths, "cols")
    body = kernels.forward_body(kernels.Scores.of(options, place, key.shape[2]))
    parts = []
    for spec, table in zip(specs, tables, strict=True):
        _, (out, lse) = kernels.run_pass(spec, table, [_grouped(query, key.shape[2])], [key, value], limit, body)
        parts.append((out, lse))
    if not parts:
        dtype = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
        lse = vary_like(jnp.full(query.shape[:-1], -jnp.inf, dtype), query)
        return vary_like(jnp.zeros_like(query), query), lse
    out, lse = kernels.merge(parts)
    return out.reshape(query.shape).astype(query.dtype), lse.reshape(query.shape[:-1])


def _backward(options, forward, backward, query, key, value, kv_lengths, place, out, lse, d_out, d_lse):
    d_query, d_arrays = _d_query(options, forward, query, key, value, kv_lengths, place, out, lse, d_out, d_lse)
    rows = _rows(query, key, out, lse, d_out, d_lse)
    body = kernels.d_key_value_body(kernels.Scores.of(options, place, key.shape[2]))
    _, (d_k, d_v) = _summed(backward, [key, value], rows, _limit(kv_lengths, "rows"), body, [key, value])
    return d_query, d_k.astype(key.dtype), d_v.astype(value.dtype), d_arrays


def _d_query(options, lowered, query, key, value, kv_lengths, place, out, lse, d_out, d_lse):
    """The gradients of the query and of what the score modification closes over."""
    rows = _rows(query, key, out, lse, d_out, d_lse)
    scores = kernels.Scores.of(options, place, key.shape[2])
    limit = _limit(kv_lengths, "cols")
    shared, (d_query,) = _summed(
        lowered, rows, [key, value], limit, kernels.d_query_body(scores), rows[:1], scores.learned()
    )
    return d_query.reshape(query.shape).astype(query.dtype), scores.gradients(shared)


def _rows(query, key, out, lse, d_out, d_lse) -> list[Array]:
    """query, d_out, log-sum-exp and delta, grouped."""
    delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1) - d_lse
    # A row that attends to nothing has log-sum-exp -inf and no pair to use it for.
    safe_lse = jnp.where(jnp.isneginf(lse), 0, lse)
    return [_grouped(x, key.shape[2]) for x in (query, d_out, safe_lse[..., None], delta[..., None])]


def _limit(kv_lengths: Array | None, side: str) -> kernels.Limit | None:
    return None if kv_lengths is None else kernels.Limit(kv_lengths, side)


def _summed(
    lowered: _Lowered, rows, lattices, limit, body: kernels.PassBody, like: list[Array], shared: Sequence[Array] = ()
) -> tuple[list[Array], list[Array]]:
    """The sums over passes of what `body` computes, shaped like `shared` and, by row, `like`."""
    dtype = jnp.float64 if like[0].dtype == jnp.float64 else jnp.float32
    sums, totals = ([vary_like(jnp.zeros(x.shape, dtype), x) for x in arrays] for arrays in (shared, like))
    for spec, table in zip(*lowered, strict=True):
        sums, results = kernels.run_pass(spec, table, rows, lattices, limit, body, sums)
        totals = [total + result for total, result in zip(totals, results, strict=True)]
    return sums, totals


__all__ = ["DTYPES", "IMPLEMENTATION", "XlaImplementation"]
