"""The gate: outputs and gradients of a few heads against a dense float64 computation, in pieces of a few hundred MB."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks import peers

#: Rows of scores that are held at once.
ROWS = 512

#: name -> (relative error in the Frobenius norm, the worst row's error relative to that row), for 2-byte inputs.
#: A gradient's row is compared with the average row, if that is larger, and d_query and d_key also with d_value's: a
#: row that attends to one key has gradient 0, of which rounding makes something. For "lse" both are absolute.
LIMITS = {
    "out": (1e-2, 4e-2),
    "lse": (2e-3, 1e-2),
    "d_query": (2e-2, 0.25),
    "d_key": (2e-2, 0.25),
    "d_value": (2e-2, 0.25),
}

TOLERANCE = (
    "gate: relative error to dense float64 (Frobenius) at most 1e-2 for the output, 2e-2 for gradients, 2e-3 absolute "
    "(root mean square) for the log-sum-exp, and no row far off"
)


@dataclasses.dataclass(frozen=True)
class Results:
    """[N, T, H] each, log-sum-exp [N, T]; d_key and d_value with the heads of keys."""

    out: Tensor
    lse: Tensor
    d_query: Tensor
    d_key: Tensor
    d_value: Tensor


def inputs(
    q_len: int, heads: int, head_dim: int, dtype: str, device: str, seed: int = 0, share: int = 1
) -> list[Tensor]:
    """query, key, value and the output's gradient, [1, N, T, H], normal; `share` query heads have one of the keys."""
    generator = torch.Generator(device).manual_seed(seed)
    kind = getattr(torch, dtype)
    shapes = [(1, number, q_len, head_dim) for number in (heads, heads // share, heads // share, heads)]
    return [torch.randn(x, generator=generator, device=device, dtype=torch.float32).to(kind) for x in shapes]


def checked_heads(heads: int, count: int) -> list[int]:
    """The last head first: offsets are largest there."""
    return sorted({heads - 1, *range(count - 1)})


def reference(arrays: Sequence[Tensor], text: str) -> Results:
    """Dense attention and its gradients in float64; arrays are [N, T, H], key and value perhaps of fewer heads."""
    query, key, value, d_out = (x.double() for x in arrays)
    share = query.shape[0] // key.shape[0]
    heads = zip(query, key.repeat_interleave(share, 0), value.repeat_interleave(share, 0), d_out, strict=True)
    parts = [_one_head(*head, text=text) for head in heads]
    out, lse, d_query, d_key, d_value = (torch.stack(list(each)) for each in zip(*parts, strict=True))
    d_key, d_value = (x.unflatten(0, (-1, share)).sum(1) for x in (d_key, d_value))
    return Results(out, lse, d_query, d_key, d_value)


def _one_head(query: Tensor, key: Tensor, value: Tensor, d_out: Tensor, *, text: str) -> list[Tensor]:
    q_len, width = query.shape
    scale, position = 1 / math.sqrt(width), torch.arange(q_len, device=query.device)

    def table(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(query.device)

    keep = peers.mask_formula(text, q_len, table)
    out, d_query, d_key, d_value = (torch.zeros_like(x) for x in (query, query, key, value))
    lse = query.new_empty(q_len)
    for at in range(0, q_len, ROWS):
        rows = slice(at, at + ROWS)
        scores = (scale * query[rows] @ key.T).masked_fill(~keep(position[rows, None], position[None, :]), -math.inf)
        lse[rows] = torch.logsumexp(scores, 1)
        shares = torch.exp(scores - lse[rows, None]).nan_to_num(0.0)  # a row without keys: 0, not NaN
        out[rows] = shares @ value
        d_scores = shares * (d_out[rows] @ value.T - (d_out[rows] * out[rows]).sum(1, keepdim=True))
        d_query[rows] = scale * d_scores @ key
        d_key += scale * d_scores.T @ query[rows]
        d_value += shares.T @ d_out[rows]
    return [out, lse, d_query, d_key, d_value]


def errors(given: Results, wanted: Results) -> dict[str, tuple[float, float]]:
    """name -> (error of the whole, of the worst row); NaN where something is NaN."""
    found = {}
    floor = float(wanted.d_value.square().sum(-1).mean().sqrt())
    for field in dataclasses.fields(Results):
        ours, truth = getattr(given, field.name).double(), getattr(wanted, field.name)
        if field.name == "lse":
            both_empty = torch.isneginf(ours) & torch.isneginf(truth)
            off = torch.where(both_empty, 0.0, ours - truth).abs()
            found["lse"] = (float(off.square().mean().sqrt()), float(off.max()))
            continue
        off, rows = (ours - truth).norm(dim=-1), truth.norm(dim=-1)
        usual = max(float(rows.square().mean().sqrt()), floor if field.name.startswith("d_") else 0.0, 1e-30)
        against = rows.clamp(min=1e-30) if field.name == "out" else rows.clamp(min=usual)
        worst = torch.where((off == 0) & (rows == 0), 0.0, off / against)
        # mean() and max() of a tensor keep NaN.
        found[field.name] = (float(off.square().mean().sqrt()) / usual, float(worst.max()))
    return found


def faults(found: dict[str, tuple[float, float]]) -> list[str]:
    """One sentence for each limit that is not met; NaN meets none."""
    out = []
    for name, values in found.items():
        for what, value, limit in zip(("", " of the worst row"), values, LIMITS[name], strict=True):
            if not value <= limit:
                out.append(f"{name}: error{what} {value:.2g}, limit {limit:g}")
    return out


def gate(given: Results, arrays: Sequence[Tensor], text: str) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """(errors, faults) of results for the heads of `arrays`, [N, T, H] each."""
    found = errors(given, reference(arrays, text))
    return found, faults(found)


def summary(failure: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(failure).split())
    kind = "out of memory" if is_out_of_memory(failure) else type(failure).__name__
    return f"{kind}: {text}"[:300]


def is_out_of_memory(failure: BaseException) -> bool:
    return isinstance(failure, (torch.OutOfMemoryError, MemoryError)) or "RESOURCE_EXHAUSTED" in str(failure)


def is_fatal(failure: BaseException) -> bool:
    """Whether the GPU's context is lost, so that nothing works in this process any more."""
    text = str(failure)
    return not is_out_of_memory(failure) and any(sign in text for sign in _LOST)


_LOST = ("CUDA error", "illegal memory access", "unspecified launch failure", "misaligned address", "CUDA_ERROR")
