"""A drop-in for `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splat.errors import ArgumentError, UnsupportedError
from splat.pattern import Pattern, PerHead, from_mask, full
from splat.pattern.core import check_is_pattern
from splat.remembered import Remembered
from splat.torch import validate
from splat.torch.attention import autocast, groups_of, run

_FULL = full()


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    pattern: Pattern | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with a pattern: the same signature, plus `pattern=`.

    `is_causal` (row i sees j <= i, also where lengths differ), `attn_mask` and `pattern` are intersected. Differences:
    a row that may attend to nothing gives 0, not NaN; dropout and additive masks are refused; see `attention` for
    dtypes and devices.

    Args:
      query: [B, N, T, H] or [N, T, H]; key, value: [B, K, S, H] or [K, S, H].
      attn_mask: bool, True = attend, broadcastable to [B, N, T, S] with the same values for every B. Its regular
        structure is recovered: a device mask is copied to the host in every call, so that `pattern=` is faster.
      enable_gqa: whether K may be smaller than N, and divide it.

    Returns:
      output, in query's shape and dtype.

    Raises:
      IrregularPatternError: the mask is not regular.
      ArgumentError, UnsupportedError: as `attention`, and for dropout and masks of numbers.

    >>> import torch, splat, splat.torch
    >>> q = k = v = torch.ones(1, 2, 40, 16)
    >>> splat.torch.scaled_dot_product_attention(q, k, v, is_causal=True, pattern=splat.window(8)).shape
    torch.Size([1, 2, 40, 16])
    """
    if dropout_p != 0:
        raise UnsupportedError(
            f"dropout_p must be 0, but {dropout_p} was given: attention dropout is not supported. Set it to 0, or use "
            "torch.nn.functional.scaled_dot_product_attention."
        )
    single = isinstance(query, Tensor) and query.ndim == 3
    if single:
        query, key, value = (x[None] if isinstance(x, Tensor) else x for x in (query, key, value))
    query, key, value = autocast(query, key, value)
    sizes = validate.check_arrays(query, key, value)
    if sizes.num_q_heads != sizes.num_kv_heads and not enable_gqa:
        raise ArgumentError(
            f"query has {sizes.num_q_heads} heads, key and value have {sizes.num_kv_heads}. Pass enable_gqa=True for "
            "grouped-query attention."
        )
    if pattern is None:
        pattern = _FULL
    check_is_pattern(pattern)
    if attn_mask is not None:
        pattern = pattern & _of_mask(attn_mask, sizes)
    out, _ = run(query, key, value, groups_of(pattern, is_causal=is_causal), scale)
    return out[0] if single else out


def _of_mask(mask: Any, sizes: validate.Sizes) -> Pattern:
    if torch.compiler.is_compiling():
        raise UnsupportedError(
            "attn_mask is not known while torch.compile traces, so its structure cannot be recovered. Describe it with "
            "pattern= or is_causal=, or make pattern=splat.from_mask(mask) outside the compiled function."
        )
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = validate.name_of(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"attn_mask must be a bool tensor, but {given} was given: numbers added to the scores are not supported. "
            "For a mask of 0 and -inf pass `attn_mask == 0`."
        )
    wanted = (sizes.batch, sizes.num_q_heads, sizes.q_len, sizes.kv_len)
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(shape) != 4 or any(given not in (1, want) for given, want in zip(shape, wanted, strict=True)):
        raise ArgumentError(
            f"attn_mask must be broadcastable to [B, N, T, S] = {list(wanted)}, but {list(mask.shape)} was given"
        )
    if 0 in shape:
        return _FULL
    array = mask.detach().cpu().numpy().reshape(shape)
    if shape[0] > 1 and (array != array[:1]).any():
        raise UnsupportedError(
            "attn_mask differs between batch entries. Use splat.torch.attention with kv_lengths for padding, and one "
            "call per entry, or one long sequence and splat.segments(ids), for packed documents."
        )
    heads = [np.broadcast_to(head, wanted[2:]) for head in array[0]]
    patterns = [_recovered(head) for head in heads]
    return patterns[0] if len(heads) == 1 else PerHead(tuple(patterns))


#: What masks of heads were recovered as, by their shapes and digests: models give the same ones in every call, and may
#: have one for each of many heads.
_known = Remembered(entries=1024, nbytes=1 << 28)


def _recovered(mask: np.ndarray) -> Pattern:
    key = mask.shape, hashlib.blake2b(np.packbits(mask).tobytes(), digest_size=16).digest()
    return _known(key, lambda: from_mask(mask))
