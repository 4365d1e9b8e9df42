"""The C++ implementation for CPUs: from a plan to a differentiable function of query, key and value."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from splat import __version__
from splat.codegen import modified
from splat.codegen.base import OPERATIONS, Missing, Options, Request, kept_with_plan, refused_blocks
from splat.codegen.batching import vmappable
from splat.codegen.cpp import bind_jax, compiler, generate, threads, values
from splat.codegen.cpp.call import kernel_facts
from splat.codegen.cpp.generate import KernelFacts
from splat.codegen.cpp.lower import (
    SCHEDULE_OF,
    UNKNOWN,
    Holes,
    Lowered,
    PassFacts,
    holes_of,
    lower,
    passes_of,
    runs_of,
)
from splat.codegen.jaxprs import modification, refusal
from splat.codegen.modified import Shared
from splat.codegen.partitioning import vary_like
from splat.codegen.reverse import differentiable, lower_all
from splat.codegen.score_mod import Place
from splat.codegen.xla.emit import Learned
from splat.errors import ArgumentError, SplatError, UnsupportedError
from splat.planning import SCHEDULES, Plan

Array = Any

#: What kernels are also called.
SHORT = {"fwd": "forward", "dq": "d_query", "dkdv": "d_key_value"}


class CppImplementation:
    """See `splat.codegen.base.Implementation`."""

    name = "cpp"
    opaque = True

    def refusal(self, request: Request) -> str | None:
        if request.platform != "cpu":
            return (
                f"the cpp implementation is for CPUs, and this is for a {request.platform}. Use implementation='xla', "
                "or None for the best that can serve. (Inside jax.jit it is for JAX's default device: for CPU arrays "
                "beside a GPU, trace it under `jax.default_device(jax.devices('cpu')[0])`.)"
            )
        if request.dtype not in generate.SCALARS:
            return (
                f"the cpp implementation serves {', '.join(generate.SCALARS)}, not {request.dtype}. Convert the inputs."
            )
        if reason := refused_blocks(self.name, request):
            return reason
        if request.score_mod is not None and (reason := refusal(self.name, request.score_mod, request.dtype)):
            return reason
        if request.elsewhere:
            return None
        missing = compiler.missing()
        return None if missing is None else Missing(missing)

    def target(self) -> str:
        return "cpu"

    def attention(
        self, plan: Plan, options: Options, query: Any, key: Any, value: Any, kv_lengths: Any,
        place: Place | None = None,
    ) -> Any:  # fmt: skip
        call, shared = _static(plan, options)
        return _function(call)(*modified.operands(shared, place, query, key, value, kv_lengths))

    num_values = staticmethod(values.num_values)
    sddmm = staticmethod(values.sddmm)
    softmax = staticmethod(values.softmax)
    spmm = staticmethod(values.spmm)
    spmm_transposed = staticmethod(values.spmm_transposed)

    def emit(self, plan: Plan, options: Options, kernel: str | None = None) -> str:
        """The generated translation units, all or one of them."""
        head = [f"// splat {__version__}: C++ for CPUs", *(f"// {line}" for line in str(plan).splitlines())]
        return "\n\n".join(["\n".join(head), *(generate.source(facts) for facts in kernels_of(plan, options, kernel))])

    def assembly(self, plan: Plan, options: Options, kernel: str | None = None) -> str:
        raise UnsupportedError("the cpp implementation shows its source only. Look at target='cpp'.")


IMPLEMENTATION = CppImplementation()


def kernels_of(plan: Plan, options: Options, kernel: str | None = None) -> list[KernelFacts]:
    """The facts of the kernels that a plan calls, or of the one named."""
    name = SHORT.get(kernel or "", kernel)
    if name not in (None, *generate.KERNELS):
        every = ", ".join([*generate.KERNELS, *SHORT, *OPERATIONS])
        raise ArgumentError(f"kernel must be one of {every}, but {kernel!r} was given")
    p = plan.problem
    query = jax.ShapeDtypeStruct((p.batch, p.q_len, p.num_q_heads, p.head_dim), p.dtype)
    call, shared = _static(plan, options)
    key = jax.ShapeDtypeStruct((p.batch, p.kv_len, p.num_kv_heads, p.head_dim), p.dtype)
    wanted = ("forward", *_gradient_kernels(call, query, key)) if name is None else (name,)
    wanted = tuple(_forward_kernel_of(options, p.q_len, p.dtype) if one == "forward" else one for one in wanted)
    found = _every_kernel(call, shared.tables, query, None, wanted)
    if name is not None and not found:
        raise ArgumentError(f"this plan calls no kernel {kernel!r}. Leave kernel out to see what it calls.")
    return found


# -- one call ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Call:
    """Everything static about one attention call; equal calls share one traced function.

    `plan` is set where the plan is static: then its tables are constants of the program. Otherwise they are arguments,
    and `backward_refusal` says why there is no backward, if there is none. `threads` is how many a kernel gets.
    `learns` makes the gradients of what the score modification closes over, where that can have any.
    """

    options: Options
    threads: int
    plan: Plan | None
    passes: tuple[tuple[PassFacts, ...], ...] = ()
    backward_refusal: str | None = None
    learns: Learned | None = None

    @property
    def holes(self) -> Holes:
        return UNKNOWN if self.plan is None else holes_of(self.plan)


def _static(plan: Plan, options: Options) -> tuple[_Call, Shared]:
    """What is static about the call, and what is not."""
    learns, learned = modified.learns(plan, options)
    if plan.is_static:
        return _Call(options, threads.count(), plan, learns=learns), Shared()
    p = plan.problem
    if _forward_kernel_of(options, p.q_len, p.dtype) == "forward":
        passes, tables, refusal = lower_all(plan, lower)
    else:  # which reads no schedule
        passes, tables, refusal = lower_all(plan, lower, SCHEDULES[1:])
        passes, tables = ((), *passes), [runs_of(plan.acsr), *tables]
    return _Call(options, threads.count(), None, passes, refusal, learns), Shared(tables, learned=learned)


def _forward_kernel_of(options: Options, q_len: int, dtype: Any) -> str:
    return generate.forward_kernel(q_len, str(dtype), modified=options.score_mod is not None)


def _lowered(call: _Call, tables: Any, kernel: str) -> Lowered:
    if call.plan is not None:
        return passes_of(call.plan, kernel)
    n = SCHEDULES.index(SCHEDULE_OF.get(kernel, kernel))
    return call.passes[n], tables[n]


def _gradient_kernels(call: _Call, query: Array, key: Array) -> tuple[str, ...]:
    return generate.gradient_kernels(str(query.dtype), query.shape[0] * key.shape[2], call.threads)


def _facts(call: _Call, kernel: str, passes: tuple[PassFacts, ...], query: Array, lengths: Any) -> KernelFacts:
    mod, soft_cap = call.options.score_mod, call.options.logits_soft_cap is not None
    return kernel_facts(
        kernel, passes, call.holes, dtype=str(query.dtype), head_dim=query.shape[-1], soft_cap=soft_cap,
        lengths=lengths is not None, score_mod=None if mod is None else modification(mod, str(query.dtype)),
    )  # fmt: skip


def _every_kernel(call: _Call, tables: Any, query: Array, lengths: Any, kernels: tuple[str, ...]) -> list[KernelFacts]:
    """Those of the kernels that there are for the call: the forward and, where the plan has one, the backward."""
    every = []
    for kernel in kernels:
        try:
            passes, found = _lowered(call, tables, kernel)
        except SplatError:
            if SCHEDULE_OF.get(kernel, kernel) == "forward":
                raise
            continue
        if found:
            every.append(_facts(call, kernel, passes, query, lengths))
    return every


@kept_with_plan
def _function(call: _Call) -> Any:
    """(query, key, value, shared, kv_lengths, where) -> (output, log-sum-exp [B, T, N]), with its reverse mode."""

    def prepare(query, key, shared, kv_lengths, where):
        if jax.device_count("cpu") > 1:  # parts may want others, and programs that JAX has kept do not ask again
            kernels = generate.every_gradient_kernel(str(query.dtype))
        else:
            kernels = _gradient_kernels(call, query, key)
        forward = _forward_kernel_of(call.options, query.shape[1], query.dtype)
        bind_jax.prepare_all(_every_kernel(call, shared.tables, query, kv_lengths, (forward, *kernels)))

    of_shared = modified.gradients(call.learns)
    functions = _forward(call), _backward(call)
    return differentiable("cpp", *functions, refusal=call.backward_refusal, prepare=prepare, of_shared=of_shared)


def _forward(call: _Call) -> Any:
    """((query, key, value, kv_lengths, where), shared) -> (output, log-sum-exp)."""
    kernel = _forward_kernel(call)

    def forward(batched: Any, shared: Shared) -> Any:
        query = batched[0]
        if _forward_kernel_of(call.options, query.shape[1], query.dtype) == "forward":
            return kernel((*batched, None), shared)
        _, tables = _lowered(call, shared.tables, "decode")
        if not tables:
            return _nothing(query)
        runs = jnp.asarray(tables[0][0])  # of each batch entry: mapped over offsets and keys it is still one call
        return kernel((*batched, jnp.broadcast_to(runs, (query.shape[0], *runs.shape))), Shared())

    return forward


@vmappable("BTNH BSKH BSKH B BNW BTW -> BTNH BTN", of_rows=5, large=(1, 2))
def _forward_kernel(call: _Call, batched: Any, shared: Shared) -> Any:
    query, key, value, lengths, where, runs = batched
    out = jax.ShapeDtypeStruct(query.shape, query.dtype)
    lse = jax.ShapeDtypeStruct(query.shape[:-1], jnp.promote_types(query.dtype, jnp.float32))
    if runs is None:
        results = _run(call, "forward", shared, [query, key, value], lengths, where, [out, lse])
    else:
        facts = _facts(call, "decode", (), query, lengths)
        results = _call(facts, call, [query, key, value], lengths, (), [runs], [out, lse])
    return _nothing(query) if results is None else tuple(results)


def _nothing(query: Array) -> tuple[Array, Array]:
    """The results where no query attends to anything."""
    lse = jnp.full(query.shape[:-1], -jnp.inf, jnp.promote_types(query.dtype, jnp.float32))
    return vary_like(jnp.zeros_like(query), query), vary_like(lse, query)


@vmappable("BTNH BSKH BSKH B BNW BTNH BTN BTNH BTN -> BTNH BSKH BSKH")
def _backward(call: _Call, batched: Any, shared: Shared) -> Any:
    query, key, value, lengths, where, *rest = batched
    operands, made = [query, key, value, *rest], []
    for kernel in _gradient_kernels(call, query, key):
        wanted = {"d_query": [query], "d_key_value": [key, value], "backward": [query, key, value]}[kernel]
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in wanted]
        results = _run(call, kernel, shared, operands, lengths, where, shapes)
        made += [vary_like(jnp.zeros_like(x), query) for x in wanted] if results is None else results
    return tuple(made)


def _run(
    call: _Call, kernel: str, shared: Shared, operands: list[Array], lengths: Any, where: Any,
    results: list[jax.ShapeDtypeStruct],
) -> list[Array] | None:  # fmt: skip
    """The kernel's results; None where the plan has nothing to do."""
    passes, found = _lowered(call, shared.tables, kernel)
    if not found:
        return None
    facts = _facts(call, kernel, passes, operands[0], lengths)
    modification = () if where is None else (where, *shared.arrays)
    tables = [jnp.asarray(table) for one in found for table in one]
    return _call(facts, call, operands, lengths, modification, tables, results)


def _call(
    facts: KernelFacts, call: _Call, operands: list[Array], lengths: Any, modification: Sequence[Array],
    tables: list[Array], results: list[jax.ShapeDtypeStruct],
) -> list[Array]:  # fmt: skip
    extra = [] if lengths is None else [lengths]
    return bind_jax.call(facts, call.options, [*operands, *extra, *modification, *tables], results)


__all__ = ["IMPLEMENTATION", "CppImplementation", "kernels_of"]
