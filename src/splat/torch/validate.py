"""Checks of the arguments of `splat.torch`, before anything is planned or compiled.

Every message names the argument, what is expected, what was given and what to do. `torch.compile` traces these
functions, so they look at shapes, dtypes and devices, never at values.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from splat.codegen import base
from splat.codegen.cpp import compiler
from splat.codegen.triton import interpret
from splat.errors import ArgumentError, UnsupportedError
from splat.planning import kernels
from splat.remembered import Remembered

#: That GPU kernels serve, and C++ kernels.
DTYPES = tuple(getattr(torch, name) for name in kernels.DTYPES)
NATIVE_DTYPES = (*DTYPES, torch.float64)

#: The oldest NVIDIA generation that the kernels are made for: Ampere, the first with bfloat16.
OLDEST_CAPABILITY = (8, 0)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def known_when_traced(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`: torch.compile runs the function when it traces a call, and not again.

    The mark is set by hand, because the decorator imports the whole compiler: 1.5 s for who may never compile.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Sizes(NamedTuple):
    """batch, q_len, kv_len, num_q_heads, num_kv_heads, head_dim."""

    batch: int
    q_len: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


def check_arrays(query: Any, key: Any, value: Any) -> Sizes:
    """The sizes of query [B, N, T, H], key and value [B, K, S, H], after checking them."""
    if torch.compiler.is_compiling():
        return _check_arrays(query, key, value)
    try:  # the same as in an earlier call: looking it up takes a fifth of the time
        about = (
            query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype,
            query.device, key.device, value.device, query.layout, key.layout, value.layout,
            is_native(query.device.type),
        )  # fmt: skip
    except (AttributeError, RuntimeError):  # no tensors, or nested ones
        return _check_arrays(query, key, value)
    return _sizes(about, lambda: _check_arrays(query, key, value))


_sizes = Remembered(entries=256)


def _check_arrays(query: Any, key: Any, value: Any) -> Sizes:
    for name, array, letters in (("query", query, "[B, N, T, H]"), ("key", key, "[B, K, S, H]"),
                                 ("value", value, "[B, K, S, H]")):  # fmt: skip
        if not isinstance(array, Tensor):
            raise ArgumentError(
                f"{name} must be a torch.Tensor, but {type(array).__name__} was given. JAX and NumPy arrays are for "
                "splat.attention."
            )
        if array.is_nested or array.layout is not torch.strided:
            raise UnsupportedError(
                f"{name} must be a dense tensor, but a {'nested' if array.is_nested else 'sparse'} one was given. For "
                "sequences of different lengths use kv_lengths, or one long sequence and splat.segments."
            )
        if array.ndim != 4:
            raise ArgumentError(
                f"{name} must have shape {letters}, but shape {list(array.shape)} was given. A missing batch axis "
                "needs [None]."
            )
        served = NATIVE_DTYPES if is_native(array.device.type) else DTYPES
        if array.dtype not in served:
            raise UnsupportedError(
                f"{name} must be one of {', '.join(map(name_of, served))}, but {name_of(array.dtype)} was given. "
                f"Convert it first, for example with {name}.bfloat16()."
            )
    if query.dtype != key.dtype or key.dtype != value.dtype:
        raise ArgumentError(
            f"query, key and value must have one dtype, but {name_of(query.dtype)}, {name_of(key.dtype)} and "
            f"{name_of(value.dtype)} were given. Convert them, for example with key.to(query.dtype)."
        )
    if query.device != key.device or key.device != value.device:
        raise ArgumentError(
            f"query, key and value must be on one device, but {query.device}, {key.device} and {value.device} were "
            "given. Move them with .to(query.device)."
        )
    _check_device(query.device)
    batch, num_q_heads, q_len, head_dim = query.shape
    if key.shape != value.shape:
        raise ArgumentError(
            f"key and value must have one shape, but {list(key.shape)} and {list(value.shape)} were given. Where only "
            f"head dims differ, fill the smaller with zeros (torch.nn.functional.pad; query as key), give "
            f"scale={key.shape[3]}**-0.5 and cut the output."
        )
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ArgumentError(
            f"query {list(query.shape)} and key {list(key.shape)} must agree in batch (axis 0) and head dim (axis 3). "
            "Keys that serve every batch entry need expand."
        )
    num_kv_heads, kv_len = key.shape[1], key.shape[2]
    if kv_len == 0:
        raise ArgumentError("key and value must have at least one position, but kv_len is 0. Skip the call instead.")
    if num_kv_heads == 0 or head_dim == 0 or num_q_heads == 0:
        raise ArgumentError(
            f"heads and head dim must not be 0, but query {list(query.shape)}, key {list(key.shape)} were given"
        )
    if num_q_heads % num_kv_heads:
        raise ArgumentError(
            f"the number of query heads must be a multiple of the key/value heads, but {num_q_heads} and "
            f"{num_kv_heads} were given (grouped-query attention shares one key head among equally many query heads). "
            "In PyTorch's layout heads are axis 1: [B, T, N, H] needs transpose(1, 2)."
        )
    if head_dim > kernels.MAX_HEAD_DIM and not is_native(query.device.type):
        raise UnsupportedError(
            f"head dims up to {kernels.MAX_HEAD_DIM} are supported, but {head_dim} was given. Use "
            "torch.nn.functional.scaled_dot_product_attention for it."
        )
    return Sizes(batch, q_len, kv_len, num_q_heads, num_kv_heads, head_dim)


def name_of(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _check_device(device: torch.device) -> None:
    refusal = _device_refusal(device.type, device.index)
    if refusal is not None:
        raise UnsupportedError(refusal)


@known_when_traced
def _device_refusal(kind: str, index: int | None) -> str | None:
    """Why kernels cannot run there, as a sentence with the remedy; None if they can."""
    if is_native(kind):
        missing = compiler.missing()
        return None if missing is None else f"splat.torch compiles kernels for CPUs, but {missing}"
    if kind not in ("cuda", "cpu"):
        return (
            f"splat.torch serves CPUs, CUDA and ROCm GPUs, but the tensors are on {kind!r}. Use "
            "torch.nn.functional.scaled_dot_product_attention there."
        )
    if importlib.util.find_spec("triton") is None:
        return "splat.torch needs Triton, which is not installed: `pip install splat-attention[torch]`."
    if kind == "cpu":
        return None
    return _gpu_refusal(index)


@known_when_traced
def is_native(kind: str) -> bool:
    """Whether tensors on such a device go to C++ kernels. With TRITON_INTERPRET=1 those on CPUs do not, for tests."""
    return kind == "cpu" and not _interprets()


@cache
def _interprets() -> bool:
    return interpret.is_interpreted()


@lru_cache(maxsize=64)
def _gpu_refusal(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        return (
            "splat.torch needs compute capability 8.0 (A100, RTX 30) or later, but "
            f"{torch.cuda.get_device_name(index)} has {capability[0]}.{capability[1]}. Use "
            "torch.nn.functional.scaled_dot_product_attention there."
        )
    return None


def check_tangents(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuses forward mode, in which PyTorch takes an operation without a rule for a constant."""
    if forward_ad._current_level >= 0 and _has_tangent(query, key, value):
        refuse_tangents()


def refuse_tangents() -> NoReturn:
    """Raises UnsupportedError: there is no forward mode."""
    raise UnsupportedError(
        "splat.torch.attention has no forward mode, but query, key or value has a tangent (torch.func.jvp, jacfwd "
        "or linearize, or torch.autograd.forward_ad). Use backward(), or torch's own attention with "
        "attn_mask=torch.from_numpy(pattern.to_dense(...)) inside "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
    )


def _has_tangent(*arrays: Tensor) -> bool:
    try:
        return any(forward_ad.unpack_dual(x).tangent is not None for x in arrays)
    except RuntimeError:  # inside of torch.func.vmap there is no telling
        return True


def check_scale(scale: Any) -> float | None:
    """`scale` as a float, or None."""
    return None if scale is None else base.check_scale(_number("scale", scale))


def check_soft_cap(cap: Any) -> float | None:
    """`logits_soft_cap` as a positive float, or None."""
    if cap is None:
        return None
    return base.check_soft_cap(_number("logits_soft_cap", cap))


def check_sinks(sinks: Any, num_q_heads: int, device: torch.device) -> Tensor | None:
    """`sinks` as a tensor [num_q_heads] of numbers on the device, or None."""
    if sinks is None:
        return None
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point() or tuple(sinks.shape) != (num_q_heads,):
        is_tensor = isinstance(sinks, Tensor)
        given = f"{name_of(sinks.dtype)}{list(sinks.shape)}" if is_tensor else type(sinks).__name__
        raise ArgumentError(
            f"sinks must be a floating-point tensor of shape [{num_q_heads}], one number for each query head, but "
            f"{given} was given. (Positions that all attend to are a pattern: splat.sink.)"
        )
    if sinks.device != device:
        raise ArgumentError(f"sinks must be on query's device {device}, but it is on {sinks.device}. Move it there.")
    return sinks


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        raise ArgumentError(
            f"{name} must be a Python number, because kernels take it as one, but a tensor was given. Multiply query "
            "by a run-time scale instead."
        )
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise ArgumentError(f"{name} must be a number or None, but {type(value).__name__} was given")
    return float(value)


def check_offset(query_offset: Any, batch: int, q_len: int) -> tuple[int, Tensor | None]:
    """`query_offset` as an int, or (beside a 0) as int64 [batch], on the CPU, whose values `check_offsets` checks."""
    if isinstance(query_offset, Tensor):
        if query_offset.dtype not in _INTEGERS or tuple(query_offset.shape) not in ((), (batch,)):
            raise ArgumentError(
                f"query_offset must be an int, or integers of shape [{batch}] or [], but "
                f"{name_of(query_offset.dtype)}{list(query_offset.shape)} was given"
            )
        if query_offset.device.type != "cpu":
            raise ArgumentError(
                f"query_offset must be an int or on the CPU, but it is on {query_offset.device}. Positions are planned "
                "on the host: keep a copy of them there, and pass run-time lengths as kv_lengths."
            )
        return 0, query_offset.to(torch.int64).expand(batch).clone()  # callers count theirs up in place
    if isinstance(query_offset, bool) or not isinstance(query_offset, (int, np.integer, torch.SymInt)):
        raise ArgumentError(
            f"query_offset must be an int or integers of shape [{batch}], but {type(query_offset).__name__} was given"
        )
    offset = int(query_offset) if isinstance(query_offset, np.integer) else query_offset  # symbolic ones stay symbolic
    _check_position(offset, q_len)
    return offset, None


def check_offsets(query_offset: int, query_offsets: Tensor | None, q_len: int) -> int | tuple[int, ...]:
    """Where the queries begin: for all sequences, or where they differ for each."""
    if query_offsets is None:
        return query_offset
    offsets = tuple(query_offsets.tolist())
    for offset in offsets:
        _check_position(offset, q_len)
    return offsets if len(set(offsets)) > 1 else offsets[0]


def _check_position(offset: int, q_len: int) -> None:
    if not 0 <= offset <= 2**30 - q_len:
        raise ArgumentError(f"query_offset must be in [0, 2**30 - {q_len}] for {q_len} queries, but {offset} was given")


def check_lengths(lengths: Any, batch: int, kv_len: int, device: torch.device) -> Tensor | None:
    """`kv_lengths` as int32 [B] in [0, kv_len] on the device, or None. One length serves every sequence."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        raise ArgumentError(
            f"kv_lengths must be an integer tensor of shape [{batch}] or [] on {device}, but {type(lengths).__name__} "
            "was given. Make it once, with torch.tensor(lengths, device=query.device)."
        )
    if lengths.dtype not in _INTEGERS or tuple(lengths.shape) not in ((), (batch,)):
        raise ArgumentError(
            f"kv_lengths must be integers of shape [{batch}] or [], but {name_of(lengths.dtype)}{list(lengths.shape)} "
            "was given"
        )
    if lengths.device != device:
        raise ArgumentError(
            f"kv_lengths must be on query's device {device}, but it is on {lengths.device}. Move it once, with "
            ".to(query.device), outside the model's inner loop."
        )
    wide = lengths.dtype in (torch.int64, torch.uint32)  # clamped at 64 bits: one past 2^31 means all keys, not none
    signed = lengths.to(torch.int64 if wide else torch.int32)
    return signed.clamp(0, kv_len).to(torch.int32).expand(batch).contiguous()


_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)
