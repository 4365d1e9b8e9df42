"""The registered operations `splat::attention` and `splat::attention_backward`, and what tracing needs to know of them.

Everything static about a call travels as text and numbers: the pattern is its expression, `repr(pattern)`. So a traced
graph can be printed, written and read by another process, and holds no table: the real implementation looks up plan,
kernels and tables, which it remembers. `query_offset` may be a symbolic integer in a traced graph, and shapes too;
where there are `query_offsets`, int64 [B] on the CPU, these count.

PyTorch's cache of compiled graphs on the disk goes by the forward's arguments only: whoever changes the backward's
schema has to change the forward's too, or old caches call the new backward in the old way.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from splat.errors import UnsupportedError
from splat.torch import validate
from splat.torch.static import Static

_SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? kv_lengths, Tensor? query_offsets, str pattern, "
    "float? scale, float? logits_soft_cap, SymInt query_offset) -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "attention_backward(Tensor query, Tensor key, Tensor value, Tensor? kv_lengths, Tensor? query_offsets, Tensor out, "
    "Tensor lse, Tensor? d_out, Tensor? d_lse, str pattern, float? scale, float? logits_soft_cap, SymInt query_offset, "
    "bool of_query, bool of_key_value) -> (Tensor, Tensor, Tensor)"
)

LIBRARY = torch.library.Library("splat", "FRAGMENT")


def _define(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function the operation of that schema, for tensors on any device.

    `torch.library.custom_op` would take 25 microseconds more in each call, and more than a second for the first.
    """

    def define(run: Callable[..., Any]) -> Any:
        tags = [torch.Tag.pt2_compliant_tag]
        if hasattr(torch.Tag, "cudagraph_unsafe"):  # a first call puts tables on the device, and keeps them
            tags.append(torch.Tag.cudagraph_unsafe)
        name = LIBRARY.define(schema, tags=tags)
        LIBRARY.impl(name, _untraced(run), "CompositeExplicitAutograd")
        return getattr(torch.ops.splat, name).default

    return define


def _untraced(run: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable`, which imports the whole compiler: not where nobody else has."""
    disabled = []

    def call(*arguments: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return run(*arguments)
        if not disabled:
            disabled.append(torch.compiler.disable(run))
        return disabled[0](*arguments)

    return call


@_define(_SCHEMA)
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_lengths: Tensor | None,
    query_offsets: Tensor | None,
    pattern: str,
    scale: float | None,
    logits_soft_cap: float | None,
    query_offset: int,
) -> tuple[Tensor, Tensor]:
    """(output [B, N, T, H] lying in memory as [B, T, N, H], log-sum-exp [B, N, T]); see `attention`."""
    if query.numel() == 0:
        out, lse = _like(query, query, kv_lengths)
        return out.zero_(), lse.zero_()
    kernels = _kernels(validate.is_native(query.device.type))
    offset = validate.check_offsets(query_offset, query_offsets, query.shape[2])
    static, arrays = (pattern, scale, logits_soft_cap, offset), (query, key, value, kv_lengths)
    together = isinstance(offset, int) or kernels.takes_offsets(query)
    out, lse = kernels.forward(*arrays, static) if together else _by_sequence(kernels.forward, static, arrays)
    return out.data, lse  # no view, of which PyTorch would say the wrong thing to who changes the output in place


@_define(_BACKWARD_SCHEMA)
def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_lengths: Tensor | None,
    query_offsets: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    pattern: str,
    scale: float | None,
    logits_soft_cap: float | None,
    query_offset: int,
    of_query: bool,
    of_key_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, laid out in memory as the output is; [0] where one is not wanted."""
    if query.numel() == 0 or (d_out is None and d_lse is None):
        made = _gradients_like(query, key, value, of_query, of_key_value)
        return made[0].zero_(), made[1].zero_(), made[2].zero_()
    backward = _kernels(validate.is_native(query.device.type)).backward
    offset, wanted = validate.check_offsets(query_offset, query_offsets, query.shape[2]), (of_query, of_key_value)
    static, arrays = (pattern, scale, logits_soft_cap, offset), (query, key, value, kv_lengths, out, lse, d_out, d_lse)
    if isinstance(offset, int):
        found = backward(*arrays, static, wanted)
    else:
        found = _by_sequence(partial(backward, wanted=wanted), static, arrays)
    if of_query and of_key_value:
        return found[0], found[1], found[2]
    if of_query:
        return found[0], key.new_empty(0), value.new_empty(0)
    return query.new_empty(0), found[0], found[1]


@cache
def _kernels(native: bool) -> Any:
    """What has `forward`, `backward` and `takes_offsets`: generated C++, or Triton's."""
    return importlib.import_module("splat.torch.native" if native else "splat.torch.programs")


def _by_sequence(run: Callable[..., Any], static: Static, arrays: Sequence[Tensor | None]) -> list[Tensor]:
    """Results of one sequence after the other, which are at different positions."""
    offsets, parts = static[3], []
    assert isinstance(offsets, tuple)
    for n, offset in enumerate(offsets):
        own = (None if x is None else x[n : n + 1] for x in arrays)
        parts.append(run(*own, (*static[:3], offset)))
    return [_joined(results) for results in zip(*parts, strict=True)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The sequences' results as one, laid out in memory as each is."""
    if parts[0].ndim < 4:
        return torch.cat(tuple(parts))
    return torch.cat([x.transpose(1, 2) for x in parts]).transpose(1, 2)


# -- for tracing: shapes, dtypes and layouts ---------------------------------------------------------------------------


def _heads_inside(x: Tensor) -> Tensor:
    """An empty [B, N, T, H] that lies in memory as [B, T, N, H]."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


@torch.library.register_fake("splat::attention", lib=LIBRARY)
def _like(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _heads_inside(query), query.new_empty(
        query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32)
    )


@torch.library.register_fake("splat::attention_backward", lib=LIBRARY)
def _gradients_like(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, of_query, of_key_value = rest
    d_query = _heads_inside(query) if of_query else query.new_empty(0)
    if of_key_value:
        return d_query, _heads_inside(key), _heads_inside(value)
    return d_query, key.new_empty(0), value.new_empty(0)


# -- derivatives -------------------------------------------------------------------------------------------------------


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps what `differentiate` needs."""
    query, key, value, kv_lengths, query_offsets, *ctx.static = inputs
    ctx.save_for_backward(query, key, value, kv_lengths, query_offsets, *output)
    ctx.set_materialize_grads(False)


def differentiate(
    ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, backward: Callable[..., Any] = attend_backward
) -> tuple[Any, ...]:
    """The gradients of all arguments of `attend`; `backward`: what calls `attend_backward`."""
    needed = ctx.needs_input_grad[:3]
    of_key_value = needed[1] or needed[2]  # one kernel makes both
    gradients = backward(*ctx.saved_tensors, d_out, d_lse, *ctx.static, needed[0], of_key_value)
    return *(x if here else None for x, here in zip(gradients, needed, strict=True)), *(None,) * 6


def refuse(ctx: Any, *_: Any) -> tuple[Any, ...]:
    """Of second derivatives."""
    raise UnsupportedError(
        "splat.torch.attention has first derivatives only: a gradient of its gradient was asked for. Use "
        "splat.attention (JAX, implementation='xla') for Hessian-vector products, or torch's own attention with "
        "attn_mask=torch.from_numpy(pattern.to_dense(...))."
    )


torch.library.register_autograd("splat::attention", differentiate, setup_context=save, lib=LIBRARY)
torch.library.register_autograd("splat::attention_backward", refuse, lib=LIBRARY)
