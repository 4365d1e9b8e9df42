"""The Triton implementation for JAX: from a plan to a differentiable function of query, key and value."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from splat import __version__
from splat.acsr import ACSR
from splat.codegen import modified
from splat.codegen.base import USUAL, How, Missing, Options, Request, kept_with_plan, refused_blocks
from splat.codegen.devices import compute_capability, device_target, nearest_target
from splat.codegen.jaxprs import modification, refusal
from splat.codegen.modified import Shared
from splat.codegen.reverse import differentiable, lower_all
from splat.codegen.score_mod import Place
from splat.codegen.triton import bind_jax, interpret, record, values
from splat.codegen.triton.lower import PassSpec, lower
from splat.codegen.triton.offline import Job
from splat.codegen.triton.offline_model import ARCHITECTURES
from splat.codegen.triton.program import UNKNOWN, Binding, Passes, Program, Sizes, guards_of, passes_of
from splat.codegen.triton.score_mod import STORED
from splat.codegen.xla.emit import Learned
from splat.errors import ArgumentError
from splat.planning import SCHEDULES, Plan, find
from splat.planning.kernels import DTYPES, INTERPRETER, MAX_HEAD_DIM, OLDEST_CAPABILITY

Array = Any


class TritonImplementation:
    """See `splat.codegen.base.Implementation`."""

    name = "triton"
    opaque = True

    def refusal(self, request: Request) -> str | None:
        if request.platform not in ("gpu", "cuda", "rocm") and not self._without_a_gpu(request):
            return (
                f"the triton implementation needs a GPU, and this is for a {request.platform}. Use "
                "implementation='xla', or None for the best that can serve."
            )
        if request.dtype not in DTYPES:
            return (
                f"the triton implementation serves {', '.join(DTYPES)}, not {request.dtype}. Convert the inputs, or "
                "use implementation='xla'."
            )
        if reason := refused_blocks(self.name, request):
            return reason
        if request.score_mod is not None and (reason := refusal(self.name, request.score_mod, request.dtype)):
            return reason
        if request.head_dim > MAX_HEAD_DIM:
            return (
                f"the triton implementation serves head dims up to {MAX_HEAD_DIM}, not {request.head_dim}. Use "
                "implementation='xla'."
            )
        if request.elsewhere:
            return None
        found = compute_capability() if request.platform != "cpu" else None
        if found and not found.startswith("gfx") and float(found) < OLDEST_CAPABILITY:
            return (
                f"the triton implementation needs compute capability {OLDEST_CAPABILITY:.1f} (A100, RTX 30) or later, "
                f"but this GPU has {found}. Use implementation='xla'."
            )
        missing = bind_jax.missing()
        return None if missing is None else Missing(missing)

    @staticmethod
    def _without_a_gpu(request: Request) -> bool:
        """Asked for by name: interpreted kernels run on the CPU (TRITON_INTERPRET=1), others are only lowered."""
        if request.elsewhere or request.platform != "cpu" or not request.named:
            return False
        return bind_jax.lowering_capability() is not None or (interpret.is_interpreted() and not bind_jax.missing())

    def target(self) -> str:
        if (capability := bind_jax.lowering_capability()) is not None:
            return nearest_target(f"{capability // 10}.{capability % 10}")
        return INTERPRETER if interpret.is_interpreted() else device_target()

    def attention(
        self, plan: Plan, options: Options, query: Any, key: Any, value: Any, kv_lengths: Any,
        place: Place | None = None,
    ) -> Any:  # fmt: skip
        call, shared = _static(plan, options)
        return _function(call)(*modified.operands(shared, place, query, key, value, kv_lengths))

    def num_values(self, acsr: ACSR, how: How) -> int:
        return values.num_values(acsr, how)

    def sddmm(self, acsr: ACSR, rows: Any, columns: Any, how: How = USUAL) -> Any:
        return self._operations(how).sddmm(acsr, rows, columns)

    def softmax(self, acsr: ACSR, values: Any, how: How = USUAL) -> Any:
        return self._operations(how).softmax(acsr, values)

    def spmm(self, acsr: ACSR, values: Any, dense: Any, how: How = USUAL) -> Any:
        return self._operations(how).spmm(acsr, values, dense)

    def spmm_transposed(self, acsr: ACSR, values: Any, dense: Any, how: How = USUAL) -> Any:
        return self._operations(how).spmm_transposed(acsr, values, dense)

    def _operations(self, how: How) -> values.Operations:
        return values.Operations(find(self.target()).arch, bind_jax.launch, jnp.asarray, _allows_tf32(), how=how)

    def emit(self, plan: Plan, options: Options, kernel: str | None = None) -> str:
        """The generated kernels' source, in the order of their launches: all, or one of `record.NAMES`."""
        found = record.select(record.launches(plan, options), kernel)
        lines = [f"# splat {__version__}: Triton kernels", *(f"# {line}" for line in str(plan).splitlines())]
        texts: dict[str, str] = {}
        for one in found:
            used = [f"{name}={value}" for name, value in one.constants.items()]
            facts = f"# {one.programs} programs, {one.num_warps} warps, {one.num_stages} stages: {', '.join(used)}"
            texts[one.kernel.source] = texts.get(one.kernel.source, "") + facts + "\n"
        return "\n\n".join(["\n".join(lines), *(facts + source for source, facts in texts.items())])

    def assembly(self, plan: Plan, options: Options, kernel: str | None = None) -> str:
        """See `record.assembly`: of one kernel, the forward where none is named."""
        arch = find(plan.target).arch
        if arch not in ARCHITECTURES:
            raise ArgumentError(
                f"PTX is made for GPUs ({', '.join(ARCHITECTURES)}), but the plan is for {plan.target!r}."
            )
        arguments = {
            "plan": plan.to_json(), "kernel": kernel or "forward", "scale": options.scale,
            "logits_soft_cap": options.logits_soft_cap, "descriptors": True,
        }  # fmt: skip
        record.planned(**arguments)  # a wrong name is said here
        return record.assembly(Job("splat.codegen.triton.record:planned", arguments, arch), str(plan))


IMPLEMENTATION = TritonImplementation()


@dataclasses.dataclass(frozen=True)
class _Call:
    """Everything static about one attention call; equal calls share one traced function.

    `plan` is set where the plan is static: then its tables are constants of the program. Otherwise they are arguments,
    and `backward_refusal` says why there is no backward, if there is none. `learns` makes the gradients of what the
    score modification closes over, where that can have any.
    """

    options: Options
    target: str
    allow_tf32: bool
    plan: Plan | None
    specs: tuple[tuple[PassSpec, ...], ...] = ()
    backward_refusal: str | None = None
    learns: Learned | None = None


def _static(plan: Plan, options: Options) -> tuple[_Call, Shared]:
    """What is static about the call, and what is not."""
    tf32 = _allows_tf32()
    learns, learned = modified.learns(plan, options)
    if plan.is_static:
        return _Call(options, plan.target, tf32, plan, learns=learns), Shared()
    specs, tables, refusal = lower_all(plan, lower)
    return _Call(options, plan.target, tf32, None, specs, refusal, learns), Shared(tables, learned=learned)


def _allows_tf32() -> bool:
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return str(precision).lower() in ("tensorfloat32", "tf32_tf32_f32")


def _passes(call: _Call, tables: Any, which: str) -> Passes:
    if call.plan is not None:
        return passes_of(call.plan, which)
    n = SCHEDULES.index(which)
    return tuple(zip(call.specs[n], tables[n], strict=True))


@kept_with_plan
def _function(call: _Call) -> Any:
    """(query, key, value, shared, kv_lengths, where) -> (output, log-sum-exp [B, T, N]), with its reverse mode."""

    def outside(lse: Array) -> Array:
        return jnp.swapaxes(lse, 1, 2)

    return differentiable(
        "triton", _forward(call), _backward(call), refusal=call.backward_refusal, outside=outside,
        of_shared=modified.gradients(call.learns, outside),
    )  # fmt: skip


@bind_jax.vmappable("BTNH BSKH BSKH B BNW -> BTNH BNT")
def _forward(call: _Call, batched: Any, shared: Shared) -> Any:
    query, key, value, lengths, where = batched
    passes, place = _passes(call, shared.tables, "forward"), _place(where, shared)
    return _program(call, query, key).forward(passes, query, key, value, lengths, place)


@bind_jax.vmappable("BTNH BSKH BSKH B BNW BTNH BNT BTNH BNT -> BTNH BSKH BSKH")
def _backward(call: _Call, batched: Any, shared: Shared) -> Any:
    query, key, value, lengths, where, *rest = batched
    passes, transposed = (_passes(call, shared.tables, which) for which in SCHEDULES[1:])
    place = _place(where, shared)
    return _program(call, query, key).backward(passes, transposed, query, key, value, lengths, *rest, place=place)


def _place(where: Any, shared: Shared) -> list[Array]:
    """The operands of the score modification, as kernels take them."""
    if where is None:
        return []
    return [where, *(x.reshape(-1).astype(STORED.get(str(x.dtype), x.dtype)) for x in shared.arrays)]


def _program(call: _Call, query: Array, key: Array) -> Program:
    batch, q_len, num_q_heads, head_dim = query.shape
    sizes = Sizes(batch, q_len, key.shape[1], num_q_heads, key.shape[2], head_dim, str(query.dtype))
    binding = Binding(
        bind_jax.launch, record.strides, lambda b, n, t, h: (b, t, n, h), jnp.asarray,
        lambda shape, dtype, value: bind_jax.vary_like(jnp.full(shape, value, dtype), query),
        allow_tf32=call.allow_tf32, descriptors=bind_jax.supports_descriptors(),
    )  # fmt: skip
    guards = UNKNOWN if call.plan is None else guards_of(call.plan)
    mod = call.options.score_mod
    modified = None if mod is None else modification(mod, sizes.dtype)
    return Program(call.options, sizes, find(call.target), guards, binding, modified)


__all__ = ["IMPLEMENTATION", "TritonImplementation"]
