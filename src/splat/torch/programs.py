"""From tensors to recorded launches: what a call depends on, its plan, and the two directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from splat.codegen.base import Options
from splat.codegen.devices import nearest_target
from splat.codegen.triton import interpret
from splat.codegen.triton.program import Binding, Program, Sizes, guards_of, passes_of
from splat.planning import TARGETS, Plan, Problem, find, make_plan
from splat.planning.kernels import INTERPRETER
from splat.remembered import Remembered
from splat.torch.recording import Recording, Tape
from splat.torch.static import Static, pattern_in
from splat.torch.validate import name_of

#: How many recordings of each direction are remembered, and how large their tables on the devices may be together.
ENTRIES, NBYTES = 256, 1 << 28


class Call(NamedTuple):
    """Everything that a recording depends on.

    Attributes:
      strides: of query, key, value (backward: and output and its gradient), (B, N, T) each.
      lengths, d_lse: whether there are key lengths, and a gradient of the log-sum-exp.
      wanted: whether the gradients of query, and of key and value, are.
      aligned: whether every array begins at a multiple of 16 bytes, as tensor descriptors want.
    """

    static: Static
    sizes: Sizes
    strides: tuple[tuple[int, int, int], ...]
    device: torch.device
    lengths: bool
    d_lse: bool
    wanted: tuple[bool, bool]
    aligned: bool
    allow_tf32: bool


def forward(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, static: Static
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output [B, N, T, H], log-sum-exp float32 [B, N, T])."""
    arrays = [_rows(x) for x in (query, key, value)]
    call = _call(arrays, lengths, static)
    out, lse = _forwards(call, lambda: _record_forward(call)).run([*arrays, lengths])
    return out.transpose(1, 2), lse


def takes_offsets(_: Tensor) -> bool:
    """Whether `forward` takes sequences at different positions: each has tables of its own."""
    return False


def backward(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, out: Tensor, lse: Tensor,
    d_out: Tensor | None, d_lse: Tensor | None, static: Static, wanted: tuple[bool, bool],
) -> list[Tensor]:  # fmt: skip
    """The wanted gradients: of query [B, N, T, H]; of key and value [B, K, S, H]."""
    d_out = torch.zeros_like(out) if d_out is None else d_out.to(out.dtype)
    arrays = [_rows(x) for x in (query, key, value, out, d_out)]
    lses = [lse.contiguous(), None if d_lse is None else d_lse.float().contiguous()]
    call = _call(arrays, lengths, static, d_lse is not None, wanted)
    recording = _backwards(call, lambda: _record_backward(call))
    return [x.transpose(1, 2) for x in recording.run([*arrays, lengths, *lses])]


def _rows(x: Tensor) -> Tensor:
    """The tensor, with a contiguous last axis."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _call(
    arrays: Sequence[Tensor],
    lengths: Tensor | None,
    static: Static,
    d_lse: bool = False,
    wanted: tuple[bool, bool] = (False, False),
) -> Call:
    query, key = arrays[:2]
    batch, num_q_heads, q_len, head_dim = query.shape
    dtype = name_of(query.dtype)
    sizes = Sizes(batch, q_len, key.shape[2], num_q_heads, key.shape[1], head_dim, dtype)
    strides = tuple((x.stride(0), x.stride(1), x.stride(2)) for x in arrays)
    aligned = all(x.data_ptr() % 16 == 0 for x in arrays)
    has_lengths = lengths is not None
    return Call(static, sizes, strides, query.device, has_lengths, d_lse, wanted, aligned, _allows_tf32(query.device))


def _allows_tf32(device: torch.device) -> bool:
    """PyTorch's own setting for float32 matrix products, in its new spelling or its old one, where the GPU has tf32."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", "none")
    allowed = bool(matmul.allow_tf32) if precision == "none" else precision == "tf32"
    if allowed and device.type == "cuda" and torch.version.hip is not None:
        return "gfx942" in torch.cuda.get_device_properties(device).gcnArchName
    return allowed


# -- recording ---------------------------------------------------------------------------------------------------------


def _record_forward(call: Call) -> Recording:
    tape = Tape(call.device)
    query, key, value = (tape.input(strides) for strides in call.strides)
    lengths = tape.optional(call.lengths)
    plan = _plan(call)
    results = _program(call, plan, tape).forward(passes_of(plan, "forward"), query, key, value, lengths)
    return tape.ending(results)


def _record_backward(call: Call) -> Recording:
    tape = Tape(call.device)
    query, key, value, out, d_out = (tape.input(strides) for strides in call.strides)
    lengths, lse, d_lse = tape.optional(call.lengths), tape.input(), tape.optional(call.d_lse)
    plan = _plan(call)
    passes, transposed = passes_of(plan, "d_query"), passes_of(plan, "d_key_value")
    d_query, d_key, d_value = _program(call, plan, tape).backward(
        passes, transposed, query, key, value, lengths, out, lse, d_out, d_lse
    )
    of_query, of_key_value = call.wanted
    return tape.ending([*([d_query] if of_query else []), *([d_key, d_value] if of_key_value else [])])


_forwards, _backwards = (Remembered(entries=ENTRIES, nbytes=NBYTES) for _ in range(2))


def _program(call: Call, plan: Plan, tape: Tape) -> Program:
    _, scale, cap, _ = call.static
    scale = 1 / math.sqrt(call.sizes.head_dim) if scale is None else scale
    binding = Binding(
        tape.launch, tape.strides, lambda b, n, t, h: (b, t, n, h), tape.table, tape.full,
        allow_tf32=call.allow_tf32, descriptors=call.aligned and _has_descriptors(call.strides),
    )  # fmt: skip
    return Program(Options(scale, cap), call.sizes, find(plan.target), guards_of(plan), binding)


def _has_descriptors(strides: Sequence[tuple[int, int, int]]) -> bool:
    """Whether kernels may describe the arrays: no row of an expanded tensor lies where the next one does."""
    return hasattr(triton.language, "make_tensor_descriptor") and all(position > 0 for *_, position in strides)


# -- planning ----------------------------------------------------------------------------------------------------------


def _plan(call: Call) -> Plan:
    s = call.sizes
    pattern = pattern_in(call.static)
    problem = Problem.of_any_heads(pattern, s.q_len, s.kv_len, s.head_dim, s.dtype, grouped=s.group > 1)
    return make_plan(problem, implementation="triton", target=target_of(call.device), query_offset=call.static[3])


@lru_cache(maxsize=64)
def target_of(device: torch.device) -> str:
    """The planning target that is closest to a device: by name, else by what its kernels are compiled for."""
    if interpret.is_interpreted():
        return INTERPRETER
    name = torch.cuda.get_device_name(device).lower()
    known = next((one for one in TARGETS if one in name), None)
    if known is not None:
        return known
    if torch.version.hip is not None:
        return nearest_target(torch.cuda.get_device_properties(device).gcnArchName)
    return nearest_target(".".join(map(str, torch.cuda.get_device_capability(device))))
