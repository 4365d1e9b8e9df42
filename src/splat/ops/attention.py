"""Attention by a pattern: the public operation, and a drop-in for `jax.nn.dot_product_attention`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from splat.codegen import Options, Request, choose
from splat.codegen.base import accumulator
from splat.codegen.devices import platform_of
from splat.codegen.partitioning import Axes, explicit
from splat.codegen.registry import load
from splat.codegen.score_mod import Place, trace
from splat.errors import ArgumentError, PatternError, UnsupportedError
from splat.ops import validate
from splat.pattern import Pattern, PerHead, causal, from_mask, full, key_heads, window
from splat.pattern.core import with_arrays, without_arrays
from splat.planning import Problem, make_plan

#: Of query, key, value, key lengths, numbers of batch entries, offsets of sequences, numbers of query heads, and of
#: output and log-sum-exp: see `partitioning.Axes`.
AXES = Axes.parse("BTNH BSKH BSKH B B B N -> BTNH BTN")

#: Where heads differ, devices need all.
HEADS_WHOLE = Axes.parse("BTWH BSWH BSWH B B B W -> BTWH BTW")


def attention(
    query: Any,
    key: Any,
    value: Any,
    pattern: Pattern,
    *,
    scale: float | None = None,
    bias: Any = None,
    logits_soft_cap: float | None = None,
    score_mod: Callable[..., Any] | None = None,
    sinks: Any = None,
    query_offset: Any = 0,
    kv_lengths: Any = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """`softmax(scale * Q K^T over the pattern's pairs) V`, without ever forming Q K^T.

    Args:
      query: [B, T, N, H], float32, bfloat16, float16 or float64.
      key, value: [B, S, K, H]; N a multiple of K (grouped-query attention: query head n uses key head n // (N/K)).
      pattern: which (query, key) pairs attend; `per_head([...])` gives each query head its own.
      scale: of the scores, 1/sqrt(H) where None.
      bias: floating-point numbers, broadcastable to [B, N, T, S], added to the scaled scores. A run-time value, with a
        gradient. Only what the pattern has is read.
      logits_soft_cap: scores become `cap * tanh(score / cap)`, after `bias` and `score_mod`.
      score_mod: `(score, batch, head, q_idx, kv_idx) -> score`, as FlexAttention's, of JAX scalars: the scaled score
        becomes what it returns, before `bias` is added. `q_idx` is the query's position, `query_offset` counted in. It
        is traced in every call; arrays that it closes over are run-time values, with gradients.
      sinks: [N] numbers, one for each query head: one more score in each of its rows, whose value is 0 (learned, as in
        gpt-oss; of zeros: softmax-off-by-one). A run-time value, with a gradient; neither scaled nor capped.
      query_offset: row i is position `i + query_offset`. An int is planned for; a JAX scalar, or integers [B] where
        sequences are at different positions, are run-time values: no re-planning, no recompilation.
      kv_lengths: int [B], or [] for all alike; keys at or past it attend to nothing, whatever they hold. More than S
        means all keys. A run-time value.
      return_lse: also return the log-sum-exp of each row's scores, its sink among them.
      implementation: "triton" (GPUs), "cpp" (CPUs), "xla", or None for the best that can serve. An explicit choice is
        never replaced.

    Returns:
      output [B, T, N, H] in the inputs' dtype; with `return_lse` also log-sum-exp [B, T, N] in float32 (float64 for
      float64). A row that attends to nothing has output 0, log-sum-exp -inf (or its sink) and gradient 0.

    Scores and softmax accumulate in float32 (float64 for float64 inputs). Reverse mode never forms the score matrix
    either, nor does forward over reverse (Hessian-vector products; "xla" only). Forward mode alone and reverse over
    reverse are refused; where `jax.jit` or `jax.checkpoint` takes part, forward mode in JAX's own words: a TypeError,
    "can't apply forward-mode autodiff (jvp) to a custom_vjp function".

    Raises:
      ArgumentError, PatternError: a bad argument, said before anything is compiled.
      UnsupportedError: the implementation (or none) can serve this.

    >>> import jax, splat
    >>> q = k = v = jax.numpy.ones((1, 64, 2, 16))
    >>> splat.attention(q, k, v, splat.causal() & splat.window(8)).shape
    (1, 64, 2, 16)
    """
    query, key, value = map(validate.as_array, ("query", "key", "value"), (query, key, value))
    return_lse = validate.check_flag("return_lse", return_lse)
    sizes = validate.check_arrays(query, key, value)
    pattern = validate.check_pattern(pattern, sizes.num_q_heads)
    bias = validate.check_bias(bias, sizes)
    modified = query.size > 0 and (score_mod is not None or bias is not None)
    mod, closed_over = trace(score_mod, bias, accumulator(query.dtype)) if modified else (None, ())
    options = Options(validate.check_scale(scale, sizes.head_dim), validate.check_soft_cap(logits_soft_cap), mod)
    sinks = validate.check_sinks(sinks, sizes.num_q_heads)
    offset = validate.check_offset(query_offset, sizes.batch, sizes.q_len)
    lengths = validate.check_lengths("kv_lengths", kv_lengths, sizes.batch, sizes.kv_len)
    request = Request(platform_of(query), str(query.dtype), sizes.head_dim, score_mod=mod)
    chosen = choose(request, implementation)

    if query.size == 0:
        out, lse = query, jnp.zeros(query.shape[:-1], jnp.promote_types(query.dtype, jnp.float32))
    else:
        given = {"query": query, "key": key, "value": value, "kv_lengths": lengths}
        given |= dict.fromkeys(("batch", "query_offset", "heads"))
        if modified:
            given["batch"], given["heads"] = (jnp.arange(n, dtype=jnp.int32) for n in query.shape[::2])
        inside = list(pattern.run_time_arrays), [], closed_over
        known = None
        if isinstance(offset, int):
            known = offset
        elif offset.ndim:
            given["query_offset"] = offset
        else:
            inside[1].append(offset)
        arrays, tree = jax.tree.flatten((tuple(given.values()), inside))
        part = _Part(without_arrays(pattern), known, options, chosen.name, chosen.target(), tree)
        axes = (HEADS_WHOLE if isinstance(pattern, PerHead) else AXES).of(list(given.values()))
        run = _jitted(part) if known is None or inside[0] else part
        try:
            names = [name for name, x in given.items() if x is not None]
            out, lse = explicit(run, axes, *arrays, names=names, keep=True)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise UnsupportedError(
                "splat.attention does not support forward mode (jax.jvp, jax.jacfwd) alone. Reverse mode works, and so "
                "does forward over reverse with implementation='xla': jax.jvp(jax.grad(f), ...), jax.hessian. For a "
                "plain jvp use "
                "jax.nn.dot_product_attention with mask=pattern.to_dense(...)."
            ) from error
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def _with_sinks(out: Any, lse: Any, sinks: Any) -> tuple[Any, Any]:
    """Output and log-sum-exp with one more score in each row: the weights of the others become less.

    No gradient is NaN where a row attends to nothing, or a sink is infinite.
    """
    sinks = sinks.astype(lse.dtype)
    attends = lse > -jnp.inf
    known = jnp.where(attends, lse, 0)
    more = jnp.logaddexp(sinks - known, jnp.zeros((), lse.dtype))
    less = jnp.where(attends, jnp.exp(-more), 0)[..., None]
    return (out.astype(lse.dtype) * less).astype(out.dtype), jnp.where(attends, known + more, sinks)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Attention of what one device has, with run-time arrays as arguments.

    Attributes:
      pattern: `without_arrays`.
      offset: None where it is a run-time value.
      target: of the implementation.
      tree: of the arguments: ((query, key, value, lengths, numbers of batch entries, offsets of sequences, numbers of
        heads), (arrays of the pattern, run-time offset of all, what the score modification closes over)).
    """

    pattern: Pattern
    offset: int | None
    options: Options
    implementation: str
    target: str
    tree: Any

    def __call__(self, *arrays: Any) -> tuple[Any, Any]:
        (*given, offsets, heads), (inside, offset_of_all, closed_over) = self.tree.unflatten(arrays)
        pattern = with_arrays(self.pattern, inside) if inside else self.pattern
        run = self._by_head if isinstance(pattern, PerHead) else self._run
        run = partial(run, pattern, heads, closed_over)
        if offsets is not None:
            return jax.vmap(partial(self._of_sequence, run))(offsets, *given)
        offset = validate.saturated(offset_of_all[0], given[0].shape[1]) if offset_of_all else self.offset
        return run(offset, *given)

    @staticmethod
    def _of_sequence(run: Callable[..., Any], offset: Any, *given: Any) -> tuple[Any, Any]:
        offset = validate.saturated(offset, given[0].shape[0])
        out, lse = run(offset, *(None if x is None else x[None] for x in given))
        return out[0], lse[0]

    def _run(
        self, pattern: Pattern, heads: Any, closed_over: Any,
        offset: Any, query: Any, key: Any, value: Any, lengths: Any, batch: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        grouped = self.implementation == "triton" and query.shape[2] > key.shape[2]
        _, q_len, _, head_dim = query.shape
        problem = Problem.of_any_heads(pattern, q_len, key.shape[1], head_dim, str(query.dtype), grouped=grouped)
        plan = make_plan(problem, implementation=self.implementation, target=self.target, query_offset=offset)
        place = None
        if self.options.score_mod is not None:
            place = Place(batch, heads, jnp.asarray(offset, jnp.int32), closed_over)
        return load(self.implementation).attention(plan, self.options, query, key, value, lengths, place)

    def _by_head(
        self, pattern: PerHead, heads: Any, closed_over: Any,
        offset: Any, query: Any, key: Any, value: Any, lengths: Any, batch: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Heads with equal patterns together; the results put back in the heads' order."""
        share = query.shape[2] // key.shape[2]
        parts, order = [], []
        for one, own in pattern.groups().items():
            at, kv_at = np.array(own), np.array(key_heads(own, share))
            arrays = query[:, :, at], key[:, :, kv_at], value[:, :, kv_at]
            parts.append(
                self._run(one, heads if heads is None else heads[at], closed_over, offset, *arrays, lengths, batch)
            )
            order += own
        back = np.argsort(order)
        out, lse = (jnp.concatenate([part[n] for part in parts], axis=2)[:, :, back] for n in range(2))
        return out, lse


@lru_cache(maxsize=64)
def _jitted(part: _Part) -> Any:
    """The part as one program: outside `jax.jit` its tables would be computed operation by operation, in each call."""
    return jax.jit(part)


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    pattern: Pattern | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention` with a pattern: the same signature and shapes, plus `pattern=`.

    `is_causal` (row i sees j <= i), `local_window_size` (int or (left, right)), a concrete `mask` and `pattern` are
    intersected. Differences: a row that may attend to nothing (also one past `query_seq_lengths`) gives 0, not the mean
    of the values; traced masks are refused; `implementation` takes SPLAT's names.

    Args:
      query: [B, T, N, H] or [T, N, H]; key, value: [B, S, K, H] or [S, K, H]; dtypes as in `attention`.
      bias: floating-point numbers, broadcastable to [B, N, T, S], added to the scaled scores.
      mask: NumPy or concrete JAX bool, broadcastable to [B, N, T, S] with the same values for every B: its regular
        structure is recovered, once per distinct head.
      scale: of the scores, 1/sqrt(H) where None.
      query_seq_lengths, key_value_seq_lengths: int [B]; positions at or past them take no part.
      return_residual: also return the log-sum-exp, [B, T, N] or [T, N].

    Returns:
      output in query's shape and dtype; with `return_residual` also the log-sum-exp in float32 (float64 for float64).

    Raises:
      ArgumentError, PatternError, UnsupportedError: as `attention`, and for traced masks.
      IrregularPatternError: the mask is not regular.

    >>> import jax, splat
    >>> q = k = v = jax.numpy.ones((1, 64, 2, 16))
    >>> splat.dot_product_attention(q, k, v, is_causal=True, pattern=splat.strided(4) | splat.window(8)).shape
    (1, 64, 2, 16)
    """
    for name, given in (("bias", bias), ("mask", mask)):
        if isinstance(given, Pattern):
            raise ArgumentError(f"{name} was given a pattern. Pass it by name: pattern=...")
    query, key, value = map(validate.as_array, ("query", "key", "value"), (query, key, value))
    return_residual = validate.check_flag("return_residual", return_residual)
    single = query.ndim == key.ndim == value.ndim == 3
    if single:
        query, key, value = query[None], key[None], value[None]
    sizes = validate.check_arrays(query, key, value)
    pattern = full() if pattern is None else validate.check_pattern(pattern, sizes.num_q_heads)
    if validate.check_flag("is_causal", is_causal):
        pattern = pattern & causal()
    if local_window_size is not None:
        given: Any = local_window_size
        sides = (given, given) if hasattr(given, "__index__") else given
        if not isinstance(sides, Sequence) or len(sides) != 2:
            raise ArgumentError(f"local_window_size must be an int or (left, right), but {given!r} was given")
        try:
            pattern = pattern & window(*sides)
        except PatternError as error:
            raise ArgumentError(f"local_window_size must be an int or (left, right), as sides of a {error}") from None
    if mask is not None:
        pattern = pattern & _pattern_of_mask(mask, sizes)
    query_lengths = validate.check_lengths("query_seq_lengths", query_seq_lengths, sizes.batch, sizes.q_len)
    key_lengths = validate.check_lengths("key_value_seq_lengths", key_value_seq_lengths, sizes.batch, sizes.kv_len)
    past = None
    if query_lengths is not None:
        past = (jnp.arange(sizes.q_len, dtype=jnp.int32)[None, :] >= query_lengths[:, None])[:, :, None]
        query = jnp.where(past[..., None], jnp.zeros((), query.dtype), query)
    out, lse = attention(
        query, key, value, pattern, scale=scale, bias=bias, kv_lengths=key_lengths, return_lse=True,
        implementation=implementation,
    )  # fmt: skip
    if past is not None:
        out = jnp.where(past[..., None], jnp.zeros((), out.dtype), out)
        lse = jnp.where(past, -jnp.inf, lse)
    if single:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


def _pattern_of_mask(mask: Any, sizes: validate.Sizes) -> Pattern:
    if isinstance(mask, Tracer):
        raise UnsupportedError(
            "mask is traced, so its structure cannot be recovered. Pass a NumPy mask, or describe it: pattern=, "
            "is_causal=, local_window_size=, or segments(ids) for packed documents."
        )
    array = np.asarray(validate.as_array("mask", mask, np))
    if array.dtype != bool or array.ndim > 4:
        raise ArgumentError(
            f"mask must be bool, broadcastable to [B, N, T, S], but {array.dtype}{list(array.shape)} was given"
        )
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    wanted = (sizes.batch, sizes.num_q_heads, sizes.q_len, sizes.kv_len)
    if any(given not in (1, want) for given, want in zip(array.shape, wanted, strict=True)):
        raise ArgumentError(
            f"mask must be broadcastable to [B, N, T, S] = {list(wanted)}, but {list(np.shape(mask))} was given"
        )
    if 0 in array.shape:
        return full()
    if array.shape[0] > 1 and (array != array[:1]).any():
        raise UnsupportedError(
            "mask differs between batch entries. Use key_value_seq_lengths for padding, segments(ids) with jax.vmap "
            "for packed documents."
        )
    heads = [np.broadcast_to(head, wanted[2:]) for head in array[0]]
    if len(heads) == 1:
        return from_mask(heads[0])
    texts = [np.packbits(head).tobytes() for head in heads]
    known = {text: from_mask(head) for text, head in dict(zip(texts, heads, strict=True)).items()}
    return PerHead(tuple(known[text] for text in texts))
