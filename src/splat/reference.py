"""The truth: dense attention in float64 NumPy. Slow, simple, and what every implementation is tested against."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Gradients(NamedTuple):
    """Cotangents of query, key and value, in their shapes."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray


def _allowed(mask: Any, batch: int, heads: int, kv_lengths: Any) -> np.ndarray:
    """bool [B, N, T, S] from a mask [T, S] or [N, T, S] and the key lengths [B]."""
    mask = np.asarray(mask, bool)
    mask = np.broadcast_to(mask if mask.ndim == 3 else mask[None], (heads, *mask.shape[-2:]))
    mask = np.broadcast_to(mask[None], (batch, *mask.shape))
    if kv_lengths is not None:
        mask = mask & (np.arange(mask.shape[-1]) < np.asarray(kv_lengths)[:, None, None, None])
    return mask


def _forward(query, key, value, mask, scale, logits_soft_cap, kv_lengths, sinks):
    """(weights, value per query head, scores' soft-cap derivative, lse), all float64, head axis second."""
    q, k, v = (np.moveaxis(np.asarray(x, np.float64), 2, 1) for x in (query, key, value))
    group = q.shape[1] // k.shape[1]
    allowed = _allowed(mask, q.shape[0], q.shape[1], kv_lengths)
    if kv_lengths is not None:  # nothing past the lengths may reach a result, whatever it holds
        inside = (np.arange(k.shape[2]) < np.asarray(kv_lengths)[:, None])[:, None, :, None]
        k, v = np.where(inside, k, 0), np.where(inside, v, 0)
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scale = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
    scores = scale * (q @ np.swapaxes(k, -1, -2))
    slope = np.ones_like(scores)
    if logits_soft_cap is not None:
        capped = np.tanh(scores / logits_soft_cap)
        scores, slope = logits_soft_cap * capped, 1 - capped**2
    scores = np.where(allowed, scores, -np.inf)
    sink = np.full((q.shape[1], 1, 1), -np.inf) if sinks is None else np.asarray(sinks, np.float64)[:, None, None]
    top = np.maximum(scores.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    weights = np.where(allowed, np.exp(scores - np.where(np.isfinite(top), top, 0)), 0)
    total = weights.sum(axis=-1, keepdims=True) + np.exp(sink - np.where(np.isfinite(top), top, 0))
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + np.where(np.isfinite(top), top, 0))[..., 0]
    return weights / np.where(total > 0, total, 1), q, k, v, slope, scale, lse


def attention(query, key, value, mask, *, scale=None, logits_soft_cap=None, kv_lengths=None, sinks=None):
    """`softmax(scale * Q K^T over allowed pairs) V` and its log-sum-exp.

    Args:
      query: [B, T, N, H]; key, value: [B, S, K, H], N a multiple of K.
      mask: bool [T, S] or [N, T, S], True = attend.
      scale: of the scores; 1/sqrt(H) where None. logits_soft_cap: scores become `cap * tanh(score / cap)`.
      kv_lengths: int [B]; keys past it attend to nothing.
      sinks: [N], one more score in every row of a head, whose value is 0.

    Returns:
      (output float64 [B, T, N, H], log-sum-exp float64 [B, T, N]); 0 and -inf (or the sink) in rows that attend to
      nothing.
    """
    weights, _, _, v, _, _, lse = _forward(query, key, value, mask, scale, logits_soft_cap, kv_lengths, sinks)
    return np.moveaxis(weights @ v, 1, 2), np.moveaxis(lse, 1, 2)


def gradients(
    query, key, value, mask, d_out, d_lse=None, *, scale=None, logits_soft_cap=None, kv_lengths=None, sinks=None
):
    """Cotangents of `attention` for output cotangent `d_out` [B, T, N, H] and `d_lse` [B, T, N]; see `attention`."""
    weights, q, k, v, slope, scale, _ = _forward(query, key, value, mask, scale, logits_soft_cap, kv_lengths, sinks)
    d_out = np.moveaxis(np.asarray(d_out, np.float64), 2, 1)
    d_weights = d_out @ np.swapaxes(v, -1, -2)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))
    if d_lse is not None:
        d_scores = d_scores + weights * np.moveaxis(np.asarray(d_lse, np.float64), 2, 1)[..., None]
    d_scores = scale * slope * d_scores
    batch, heads, kv_heads = q.shape[0], q.shape[1], np.shape(key)[2]

    def of_keys(per_head: np.ndarray) -> np.ndarray:
        return per_head.reshape(batch, kv_heads, heads // kv_heads, *per_head.shape[2:]).sum(axis=2)

    d_key = of_keys(np.swapaxes(d_scores, -1, -2) @ q)
    d_value = of_keys(np.swapaxes(weights, -1, -2) @ d_out)
    return Gradients(*(np.moveaxis(x, 1, 2) for x in (d_scores @ k, d_key, d_value)))
