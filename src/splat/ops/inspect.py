"""`splat.plan` and `splat.emit`: look at what would run, without running it."""

from __future__ import annotations

from typing import Any

from splat.codegen import NAMES, Options, Request, choose, load, refusals
from splat.codegen.base import OPERATIONS
from splat.errors import ArgumentError
from splat.ops import validate
from splat.ops.emit_values import emit_values
from splat.pattern import Pattern
from splat.pattern.parse import pattern_of
from splat.planning import TARGETS, Candidate, Plan, Problem, find, make_plan, model_of, predict_ms, schedule


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
    kv_len = q_len if kv_len is None else kv_len
    heads = num_q_heads if num_kv_heads is None else num_kv_heads
    name = _dtype_name(dtype)
    problem = Problem(pattern_of(pattern), q_len, kv_len, head_dim, num_q_heads, heads, batch, name)
    device = find(target)
    request = Request(device.kind, name, head_dim, elsewhere=True, blocks=(block_q, block_kv))
    chosen = choose(request, implementation).name
    made = make_plan(
        problem, implementation=chosen, target=target, query_offset=query_offset, block_q=block_q, block_kv=block_kv
    )
    candidates = []
    for other, reason in refusals(request).items():
        model, predicted = model_of(problem, other, target), None
        if model.predicts and (other == chosen or reason is None):
            one = made.forward if other == chosen else schedule(made.acsr, model, block_q=block_q, block_kv=block_kv)
            predicted = predict_ms(one, model, problem)
        candidates.append(Candidate(other, predicted, reason))
    return made.with_forward(made.forward, candidates=tuple(candidates))


def emit(
    pattern: Pattern | str, q_len: int, kv_len: int | None = None, *, target: str = "xla", device: str | None = None,
    arch: str | None = None, kernel: str | None = None, scale: float | None = None,
    logits_soft_cap: float | None = None, **kwargs: Any,
) -> str:  # fmt: skip
    """The generated program's text for `pattern`. No device is touched.

    Args:
      target: "xla" gives StableHLO, "triton" and "cpp" the kernels' source, "ptx" a compiled kernel with its registers,
        spills, shared memory and tensor-core instructions (AMDGCN for AMD devices).
      device: what it is planned for (`plan`'s `target`); "cpu" for xla and "h100" for GPU kernels where not given.
      arch: the same by architecture: "sm_80", "sm_90", "sm_100" or "gfx942".
      kernel: one kernel of it: "forward" ("fwd"), "d_query" ("dq"), "d_key_value" ("dkdv"); for "cpp" also "backward",
        all gradients in one, and "decode", the forward of few queries; for GPUs "delta", "merge" or "sum"; all where
        not given, for "ptx" the forward. Or an operation on values of the pattern's matrix, of all heads of the batch:
        "sddmm", "softmax", "spmm" or "spmm_transposed".
      scale, logits_soft_cap: as for `splat.attention`.

    Other arguments are those of `plan`.

    Raises:
      ArgumentError, PatternError: a bad argument; UnsupportedError: the target cannot serve it.
    """
    if target not in (*NAMES, PTX):
        raise ArgumentError(f"target must be one of {', '.join(map(repr, (*NAMES, PTX)))}, but {target!r} was given")
    name = "triton" if target == PTX else target
    if kernel in OPERATIONS:
        problem, offset = _values_problem(
            pattern, q_len, kv_len, kernel=kernel, scale=scale, logits_soft_cap=logits_soft_cap, **kwargs
        )
        return emit_values(target, kernel, problem, offset, _device(name, device, arch))
    implementation = load(name)
    made = plan(pattern, q_len, kv_len, implementation=name, target=_device(name, device, arch), **kwargs)
    options = Options(
        validate.check_scale(scale, made.problem.head_dim), validate.check_soft_cap(logits_soft_cap)
    )  # fmt: skip
    return (
        implementation.assembly(made, options, kernel) if target == PTX else implementation.emit(made, options, kernel)
    )


def _values_problem(
    pattern: Pattern | str, q_len: int, kv_len: int | None, *, kernel: str, head_dim: int = 64, num_q_heads: int = 1,
    batch: int = 1, dtype: Any = "float32", query_offset: Any = 0, **others: Any,
) -> tuple[Problem, Any]:  # fmt: skip
    """What an operation on values is emitted for, and its query offset."""
    if given := [name for name, value in others.items() if value is not None]:
        raise ArgumentError(f"kernel {kernel!r} is an operation on values, which has no {', '.join(given)}.")
    pattern, kv_len = pattern_of(pattern), q_len if kv_len is None else kv_len
    return Problem(pattern, q_len, kv_len, head_dim, num_q_heads, num_q_heads, batch, _dtype_name(dtype)), query_offset


#: The target that is no generator's name.
PTX = "ptx"


def _device(implementation: str, device: str | None, arch: str | None) -> str:
    """The planning target that `device` or `arch` names."""
    if arch is None:
        return device or ("h100" if implementation == "triton" else "cpu")
    if implementation == "cpp":
        raise ArgumentError(
            f"arch is for GPU kernels, but the target is 'cpp', which is for CPUs, and {arch!r} was given. Leave arch "
            "out, or take the target triton or ptx."
        )
    if device is not None:
        raise ArgumentError(f"device and arch name the same thing, but {device!r} and {arch!r} were given. Give one.")
    named = {one.arch: name for name, one in reversed(TARGETS.items())}
    if arch not in named:
        raise ArgumentError(f"arch must be one of {', '.join(map(repr, sorted(named)))}, but {arch!r} was given")
    return named[arch]


def _dtype_name(dtype: Any) -> str:
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", str(dtype))
    aliases = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "f64": "float64"}
    return aliases.get(name, name)
