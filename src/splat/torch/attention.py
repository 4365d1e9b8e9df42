"""Attention by a pattern, in PyTorch's layout: the public function, and heads with patterns of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from splat.errors import ArgumentError
from splat.pattern import Pattern, PerHead, causal, key_heads
from splat.pattern.core import check_is_pattern
from splat.remembered import Remembered
from splat.torch import validate
from splat.torch.operation import attend
from splat.torch.transforms import Attend, is_transformed

#: The number of heads that `per_head` names (None: the pattern serves any), and the distinct patterns as text, each
#: with its query heads.
Groups = tuple[int | None, tuple[tuple[str, tuple[int, ...]], ...]]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Tensor | None = None,
    query_offset: int | Tensor = 0,
    kv_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """`softmax(scale * Q K^T over the pattern's pairs) V`, without ever forming Q K^T.

    Args:
      query: [B, N, T, H], float32, bfloat16 or float16, on a CPU, CUDA or ROCm device; float64, too, on CPUs; H at most
        256 on GPUs. Any strides: a transposed view of [B, T, N, H] is read where it lies. Only a last axis that is not
        contiguous is copied.
      key, value: [B, K, S, H]; N a multiple of K (grouped-query attention: query head n uses key head n // (N/K)).
      pattern: which (query, key) pairs attend; `per_head([...])` gives each query head its own.
      scale: of the scores, 1/sqrt(H) where None.
      logits_soft_cap: scores become `cap * tanh(score / cap)`.
      sinks: [N] floating-point numbers on the same device, one for each query head: one more score in each of its rows,
        whose value is 0 (learned, as in gpt-oss; of zeros: softmax-off-by-one). Has a gradient; neither scaled nor
        capped.
      query_offset: row i is position `i + query_offset`; an int, or where sequences are at different positions
        integers [B], on the CPU (on GPUs such sequences are served one after the other, and so are more than a few
        queries on CPUs).
      kv_lengths: integers, [B] or [], on the same device: keys at or past it attend to nothing, whatever they hold. A
        run-time value: it is neither read by the host nor compiled in.
      return_lse: also return the log-sum-exp of each row's scores, its sink among them; it has a gradient, too.

    Returns:
      output [B, N, T, H] in the inputs' dtype; with `return_lse` also log-sum-exp [B, N, T] in float32 (float64 for
      float64). A row that attends to nothing has output 0, log-sum-exp -inf (or its sink) and gradient 0. The output
      lies in memory as [B, T, N, H], so that `out.transpose(1, 2).flatten(2)` copies nothing.

    Scores and softmax accumulate in float32; float32 products round to tf32 only where
    `torch.backends.cuda.matmul` allows it. Inside `torch.autocast` the inputs are cast as for PyTorch's own attention.
    First derivatives in reverse mode only. `torch.compile` takes it whole (`fullgraph=True`): build the pattern outside
    the compiled function and keep using that object, which is guarded by identity.

    Raises:
      ArgumentError, PatternError: a bad argument, said before anything is compiled.
      UnsupportedError: no C++ compiler (CPUs) or Triton (GPUs); a dtype, head dim or device that is not served; forward
        mode.

    >>> import torch, splat, splat.torch
    >>> q = k = v = torch.ones(1, 2, 40, 16)
    >>> splat.torch.attention(q, k, v, splat.causal() & splat.window(8)).shape
    torch.Size([1, 2, 40, 16])
    """
    groups = groups_of(pattern)
    out, lse = run(query, key, value, groups, scale, logits_soft_cap, sinks, query_offset, kv_lengths)
    return (out, lse) if return_lse else out


def run(
    query: Any,
    key: Any,
    value: Any,
    groups: Groups,
    scale: Any = None,
    logits_soft_cap: Any = None,
    sinks: Any = None,
    query_offset: Any = 0,
    kv_lengths: Any = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of `attention`, by patterns as text."""
    query, key, value = autocast(query, key, value)
    sizes = validate.check_arrays(query, key, value)
    validate.check_tangents(query, key, value)
    num_heads, patterns = groups
    if num_heads is not None and num_heads != sizes.num_q_heads:
        raise ArgumentError(
            f"pattern: per_head names {num_heads} heads, but query has {sizes.num_q_heads}. Give one for each."
        )
    scale, cap = validate.check_scale(scale), validate.check_soft_cap(logits_soft_cap)
    sinks = validate.check_sinks(sinks, sizes.num_q_heads, query.device)
    offset, offsets = validate.check_offset(query_offset, sizes.batch, sizes.q_len)
    lengths = validate.check_lengths(kv_lengths, sizes.batch, sizes.kv_len, query.device)

    operation = Attend.apply if is_transformed() else attend
    if len(patterns) == 1:
        out, lse = operation(query, key, value, lengths, offsets, patterns[0][0], scale, cap, offset)
    else:
        outs, lses = [], []
        for text, heads in patterns:
            kv_heads = key_heads(heads, sizes.num_q_heads // sizes.num_kv_heads)
            arrays = _take(query, heads), _take(key, kv_heads), _take(value, kv_heads)
            out, lse = operation(*arrays, lengths, offsets, text, scale, cap, offset)
            outs.append(out.transpose(1, 2))
            lses.append(lse)
        order = [heads for _, heads in patterns]
        out, lse = _put(outs, order, axis=2).transpose(1, 2), _put(lses, order, axis=1)
    return (out, lse) if sinks is None else _with_sinks(out, lse, sinks)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp with one more score in each row: the weights of the others become less.

    No gradient is NaN where a row attends to nothing, or a sink is infinite.
    """
    sinks = sinks.to(lse.dtype)[:, None]
    attends = lse > -torch.inf
    known = torch.where(attends, lse, 0)
    more = torch.logaddexp(sinks - known, lse.new_zeros(()))
    less = torch.where(attends, torch.exp(-more), 0)[..., None]
    return (out * less).to(out.dtype), torch.where(attends, known + more, sinks)


def autocast(*arrays: Any) -> tuple[Any, ...]:
    """The tensors as `torch.autocast` wants them for attention, where that is on."""
    if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
        return arrays
    return tuple(map(_cast, arrays))


def _cast(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.device.type not in ("cuda", "cpu") or x.dtype not in validate.DTYPES:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


# -- patterns by head --------------------------------------------------------------------------------------------------


@validate.known_when_traced
def groups_of(pattern: Any, *, is_causal: bool = False) -> Groups:
    """See `Groups`; `is_causal` intersects with `causal()`.

    Inside `torch.compile` it runs once for a pattern object, when the call is traced.
    """
    check_is_pattern(pattern)
    try:
        pattern = pattern & causal() if is_causal else pattern
        return _known(pattern, lambda: _texts(pattern)).groups
    except AttributeError as error:  # torch.compile hands over the object before it has its attributes
        raise ArgumentError(
            "pattern was made inside a function that torch.compile traces. Make it outside and use it inside."
        ) from error


class _Texts(NamedTuple):
    groups: Groups
    nbytes: int  # of the texts and of the pattern that they are found by


def _texts(pattern: Pattern) -> _Texts:
    if not pattern.is_static:
        raise ArgumentError(
            "pattern holds run-time (JAX) arrays, which splat.torch cannot read. Make it from NumPy arrays or lists."
        )
    if isinstance(pattern, PerHead):
        named = tuple((repr(one), tuple(heads)) for one, heads in pattern.groups().items())
        groups = len(pattern.patterns), named
    else:
        groups = None, ((repr(pattern), ()),)
    return _Texts(groups, pattern.nbytes + sum(len(text) for text, _ in groups[1]))


_known = Remembered(entries=256, nbytes=1 << 27)


def _take(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Heads of [B, heads, ...], in the order given: a view where they are evenly spaced, else a copy."""
    parts, first = [], 0
    while first < len(heads):
        step = heads[first + 1] - heads[first] if first + 1 < len(heads) else 1
        last = first
        while step > 0 and last + 1 < len(heads) and heads[last + 1] - heads[last] == step:
            last += 1
        parts.append(x[:, heads[first] : heads[last] + 1 : max(step, 1)])
        first = last + 1
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _put(parts: list[Tensor], heads: list[tuple[int, ...]], axis: int) -> Tensor:
    """The parts' heads along `axis`, each put where it belongs; one copy."""
    where = {head: (n, at) for n, part in enumerate(heads) for at, head in enumerate(part)}
    pieces, head = [], 0
    while head < len(where):
        n, at = where[head]
        count = 1
        while where.get(head + count) == (n, at + count):
            count += 1
        pieces.append(parts[n].narrow(axis, at, count))
        head += count
    return torch.cat(pieces, dim=axis)
