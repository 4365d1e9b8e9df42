"""Checks of attention's arguments, before anything is planned or compiled.

Every message names the argument, what is expected, what was given and what to do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from splat.acsr import ACSR
from splat.codegen import base
from splat.codegen.partitioning import whole
from splat.errors import ArgumentError, UnsupportedError
from splat.pattern import Pattern, PerHead
from splat.pattern.core import check_is_pattern

DTYPES = ("float32", "bfloat16", "float16", "float64")


class Sizes(NamedTuple):
    """batch, q_len, kv_len, num_q_heads, num_kv_heads, head_dim."""

    batch: int
    q_len: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


def as_array(name: str, given: Any, xp: Any = jnp, expected: str = "an array of numbers") -> Any:
    """`given` as an array: JAX's as they are, others as `xp` makes them."""
    if isinstance(given, jax.Array):
        return given
    try:
        if isinstance(given, str):
            raise TypeError
        return xp.asarray(given)
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(f"{name} must be {expected}, but {type(given).__name__} was given") from None


def check_flag(name: str, value: Any) -> bool:
    """`value` as a bool: it decides what is compiled, so that no run-time value can be one."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{name} must be True or False, but {type(value).__name__} was given")
    return bool(value)


def check_arrays(query: Any, key: Any, value: Any) -> Sizes:
    """The sizes of query [B, T, N, H], key and value [B, S, K, H], after checking them."""
    for name, array, letters in (("query", query, "[B, T, N, H]"), ("key", key, "[B, S, K, H]"),
                                 ("value", value, "[B, S, K, H]")):  # fmt: skip
        if getattr(array, "ndim", None) != 4:
            given = f"shape {list(array.shape)}" if hasattr(array, "shape") else type(array).__name__
            raise ArgumentError(
                f"{name} must have shape {letters}, but {given} was given. PyTorch's [B, N, T, H] needs "
                "swapaxes(1, 2); a missing batch axis needs [None]."
            )
        check_dtype(name, array)
    if not query.dtype == key.dtype == value.dtype:
        raise ArgumentError(
            f"query, key and value must have one dtype, but {query.dtype}, {key.dtype} and {value.dtype} were "
            "given. Convert them, for example with key.astype(query.dtype)."
        )
    batch, q_len, num_q_heads, head_dim = query.shape
    if key.shape != value.shape:
        raise ArgumentError(
            f"key and value must have one shape, but {list(key.shape)} and {list(value.shape)} were given. Where only "
            f"head dims differ, fill the smaller with zeros (jnp.pad; query as key), give scale={key.shape[3]}**-0.5 "
            "and cut the output."
        )
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ArgumentError(
            f"query {list(query.shape)} and key {list(key.shape)} must agree in batch (axis 0) and head dim "
            "(axis 3). Keys that serve every batch entry need jnp.broadcast_to."
        )
    kv_len, num_kv_heads = key.shape[1], key.shape[2]
    if not all(isinstance(size, int) for size in (q_len, num_q_heads, head_dim, kv_len, num_kv_heads)):
        raise UnsupportedError(
            f"positions, heads and head dim must be known, but query {query.shape} and key {key.shape} were given. "
            "Only the batch may be symbolic."
        )
    if kv_len == 0:
        raise ArgumentError("key and value must have at least one position, but kv_len is 0. Skip the call instead.")
    if num_kv_heads == 0 or head_dim == 0 or num_q_heads == 0:
        raise ArgumentError(
            f"heads and head dim must not be 0, but query {list(query.shape)}, key {list(key.shape)} were given"
        )
    if num_q_heads % num_kv_heads:
        raise ArgumentError(
            f"the number of query heads must be a multiple of the key/value heads, but {num_q_heads} and "
            f"{num_kv_heads} were given (grouped-query attention shares one key head among equally many query heads)"
        )
    return Sizes(batch, q_len, kv_len, num_q_heads, num_kv_heads, head_dim)


def check_dtype(name: str, array: Any) -> None:
    """Raises UnsupportedError where there is nothing for the array's dtype."""
    if str(array.dtype) not in DTYPES:
        raise UnsupportedError(
            f"{name} must be one of {', '.join(DTYPES)}, but {array.dtype} was given. Convert it first, for "
            f"example with {name}.astype(jnp.bfloat16)."
        )


def check_acsr(acsr: Any) -> ACSR:
    """The matrix, after checking that it is one, and one whose numbers are known: kernels go where they say."""
    if not isinstance(acsr, ACSR):
        raise ArgumentError(
            f"acsr must be a splat.ACSR, such as splat.build(pattern, q_len, kv_len) makes, but {type(acsr).__name__} "
            "was given"
        )
    if not acsr.is_static:
        raise ArgumentError(
            "acsr must have known numbers, but its start and count are run-time arrays. Build it outside of jit, from "
            "NumPy arrays and Python numbers; splat.attention takes run-time patterns."
        )
    acsr.validate_once()
    return acsr


def check_pattern(pattern: Any, num_q_heads: int) -> Pattern:
    """The pattern, after checking that it is one (and has one per query head, if per_head)."""
    if isinstance(check_is_pattern(pattern), PerHead) and len(pattern.patterns) != num_q_heads:
        raise ArgumentError(
            f"pattern: per_head names {len(pattern.patterns)} heads, but query has {num_q_heads}. Give one for each."
        )
    return pattern


def check_scale(scale: Any, head_dim: int) -> float:
    """`scale` as a float; 1/sqrt(head_dim) where None."""
    if scale is None:
        return float(1 / np.sqrt(head_dim))
    return base.check_scale(_static_float("scale", scale))


def check_soft_cap(cap: Any) -> float | None:
    """`logits_soft_cap` as a positive float, or None."""
    if cap is None:
        return None
    return base.check_soft_cap(_static_float("logits_soft_cap", cap))


def check_bias(bias: Any, sizes: Sizes) -> Any:
    """`bias` as an array of four axes, of which each has its whole length or 1; None where None."""
    if bias is None:
        return None
    array = as_array("bias", bias)
    wanted = sizes.batch, sizes.num_q_heads, sizes.q_len, sizes.kv_len
    shape = (1,) * (4 - array.ndim) + array.shape
    fits = len(shape) == 4 and all(given in (1, want) for given, want in zip(shape, wanted, strict=True))
    if not fits or not jnp.issubdtype(array.dtype, jnp.floating):
        hint = " A bool mask is a pattern: from_mask(mask)." if array.dtype == bool else ""
        raise ArgumentError(
            f"bias must be floating-point numbers, broadcastable to [B, N, T, S] = {list(wanted)}, but "
            f"{array.dtype}{list(array.shape)} was given.{hint}"
        )
    return whole(array).reshape(shape)  # read by elements


def check_sinks(sinks: Any, num_q_heads: int) -> Any:
    """`sinks` as an array [num_q_heads] of numbers, or None."""
    if sinks is None:
        return None
    array = as_array("sinks", sinks)
    if array.shape != (num_q_heads,) or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ArgumentError(
            f"sinks must be floating-point numbers of shape [{num_q_heads}], one for each query head, but "
            f"{array.dtype}{list(array.shape)} was given. (Positions that all attend to are a pattern: splat.sink.)"
        )
    return array


def _static_float(name: str, value: Any) -> float:
    if isinstance(value, Tracer):
        raise ArgumentError(
            f"{name} must be a Python number, because it is compiled in, but a traced array was given. Multiply query "
            "by a run-time scale instead."
        )
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(f"{name} must be a number or None, but {type(value).__name__} was given") from None


def check_lengths(name: str, lengths: Any, batch: int, limit: int) -> Any:
    """Per-sequence lengths as int32 [B] in [0, limit], or None. A scalar serves every sequence.

    One past `limit` means all positions, a sentinel say. A negative one is refused where it is known without waiting
    for a device, and means none in a JAX array.
    """
    if lengths is None:
        return None
    # Before any conversion to int32: a length past 2^31 means all positions, not none.
    array = as_array(name, lengths, np)
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.shape not in ((), (batch,)):
        raise ArgumentError(
            f"{name} must be integers of shape [{batch}] or [] ({batch} is the batch size), but "
            f"{array.dtype}{list(array.shape)} was given. Give one length per sequence, or one for all."
        )
    if isinstance(array, np.ndarray) and (array < 0).any():
        raise ArgumentError(
            f"{name} must not be negative, but {array.min()} was given. 0 is no position at all; None is all of them."
        )
    wide = array if array.dtype.itemsize >= 4 else array.astype(np.int32)
    return jnp.broadcast_to(jnp.asarray(wide.clip(0, limit), jnp.int32), (batch,))


def check_offset(query_offset: Any, batch: int, q_len: int) -> Any:
    """`query_offset` as an int, or as run-time integers, [] or [batch], each of which `saturated` takes."""
    if isinstance(query_offset, np.ndarray) and query_offset.ndim == 0:
        query_offset = query_offset[()]
    if isinstance(query_offset, (int, np.integer)) and not isinstance(query_offset, bool):
        if not 0 <= query_offset <= 2**30 - q_len:
            raise ArgumentError(
                f"query_offset must be in [0, 2**30 - {q_len}] for {q_len} queries, but {query_offset} was given"
            )
        return int(query_offset)
    array = as_array("query_offset", query_offset, expected="an int or integers")
    if array.shape not in ((), (batch,)) or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ArgumentError(
            f"query_offset must be an int, or integers of shape [] or [{batch}] (one for each sequence), but "
            f"{array.dtype}{list(array.shape)} was given"
        )
    return array


def saturated(query_offset: Any, q_len: int) -> Any:
    """A run-time offset as int32: one past all positions stays there, and one far before them stays before."""
    least, most = -(2**30), 2**30 - q_len
    wide = query_offset if query_offset.dtype.itemsize >= 4 else query_offset.astype(jnp.int32)
    return jnp.clip(wide, max(least, int(jnp.iinfo(wide.dtype).min)), most).astype(jnp.int32)
