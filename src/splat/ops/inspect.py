"""`splat.plan` and `splat.emit`: look at what would run, without running it."""

from __future__ import annotations

import dataclasses
from typing import Any

from splat.codegen import NAMES, Options, Request, choose, load, refusals
from splat.errors import ArgumentError
from splat.pattern import Pattern, parse
from splat.planning import Candidate, Plan, Problem, cost_model, find, make_plan, predict_ms, schedule


def plan(
    pattern: Pattern | str,
    q_len: int,
    kv_len: int | None = None,
    *,
    head_dim: int = 64,
    num_q_heads: int = 1,
    num_kv_heads: int | None = None,
    batch: int = 1,
    dtype: Any = "float32",
    query_offset: Any = 0,
    target: str = "cpu",
    implementation: str | None = None,
    block_q: int | None = None,
    block_kv: int | None = None,
) -> Plan:
    """The plan of attention by `pattern`: print it, compare it, write it as JSON.

    Args:
      pattern: a pattern, or its text.
      q_len, kv_len: positions; kv_len is q_len where not given.
      head_dim, num_q_heads, num_kv_heads, batch, dtype: of the call; num_kv_heads is num_q_heads where not given.
      query_offset: row i is position i + query_offset.
      target: the device to predict for: "cpu", "a100", "h100", "h200", "b200" or "mi300x". No device is touched.
      implementation: None picks the best that can serve.
      block_q, block_kv: fix the tile sizes instead of letting the cost model choose.

    Raises:
      ArgumentError, PatternError: a bad argument; UnsupportedError: nothing can serve it.

    >>> import splat
    >>> p = splat.plan(splat.causal() & splat.window(512), 16384)
    >>> p.nnz, p.empty_rows, p.waste < 1.4
    (8273664, 0, True)
    """
    if isinstance(pattern, str):
        pattern = parse(pattern)
    kv_len = q_len if kv_len is None else kv_len
    heads = num_q_heads if num_kv_heads is None else num_kv_heads
    name = _dtype_name(dtype)
    problem = Problem(pattern, q_len, kv_len, head_dim, num_q_heads, heads, batch, name)
    device = find(target)
    request = Request(device.kind, name, head_dim, elsewhere=device.kind != "cpu")
    chosen = choose(request, implementation).name
    made = make_plan(
        problem, implementation=chosen, target=target, query_offset=query_offset, block_q=block_q, block_kv=block_kv
    )
    candidates = []
    for other, reason in refusals(request).items():
        model, predicted = cost_model(other, device, head_dim, name), None
        if model.predicts:
            one = made.forward if other == chosen else schedule(made.acsr, model, block_q=block_q, block_kv=block_kv)
            predicted = predict_ms(one, model, problem)
        candidates.append(Candidate(other, predicted, reason))
    return dataclasses.replace(made, candidates=tuple(candidates))


def emit(
    pattern: Pattern | str, q_len: int, kv_len: int | None = None, *, target: str = "xla", device: str = "cpu",
    scale: float | None = None, logits_soft_cap: float | None = None, **kwargs: Any,
) -> str:  # fmt: skip
    """The generated program's text for `pattern`.

    `target` is a generator: "xla" gives StableHLO. `device` is what it is planned for (`plan`'s `target`), and other
    arguments are those of `plan`.
    """
    if target not in NAMES:
        raise ArgumentError(f"target must be one of {', '.join(map(repr, NAMES))}, but {target!r} was given")
    implementation = load(target)
    made = plan(pattern, q_len, kv_len, implementation=target, target=device, **kwargs)
    default = made.problem.head_dim**-0.5
    return implementation.emit(made, Options(default if scale is None else scale, logits_soft_cap))


def _dtype_name(dtype: Any) -> str:
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", str(dtype))
    aliases = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "f64": "float64"}
    return aliases.get(name, name)
