"""`splat.emit` of operations on values: the text that each generator makes of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from splat.acsr import ACSR, build
from splat.codegen import Request, choose, load
from splat.codegen.base import accumulator, operands
from splat.errors import ArgumentError, UnsupportedError
from splat.planning import Problem, check_problem, find


@dataclasses.dataclass(frozen=True)
class _Call:
    """One operation on values: heads are batch entries; `device` is a planning target."""

    operation: str
    problem: Problem
    query_offset: int
    acsr: ACSR
    device: str

    @property
    def sizes(self) -> dict[str, Any]:
        p = self.problem
        return dict(batch=p.batch * p.num_q_heads, head_dim=p.head_dim, dtype=p.dtype)


def emit_values(target: str, operation: str, problem: Problem, query_offset: Any, device: str) -> str:
    """The text of an operation on values; `target` as for `splat.emit`.

    Raises:
      ArgumentError: the pattern has no pair, for which there is no kernel; or a bad argument.
      UnsupportedError: the pattern is a run-time one; or the generator cannot serve the problem.
    """
    problem = check_problem(problem)
    acsr = build(problem.pattern, problem.q_len, problem.kv_len, query_offset)
    if not acsr.is_static:
        raise UnsupportedError(
            f"kernel {operation!r} is an operation on values, whose matrix is static, but this pattern has run-time "
            "arrays. Build it from NumPy arrays and Python numbers."
        )
    if not acsr.nnz:
        raise ArgumentError(f"this pattern has no pair, so that there is no kernel {operation!r}: results are zeros.")
    name = "triton" if target == "ptx" else target
    choose(Request(find(device).kind, problem.dtype, problem.head_dim, elsewhere=True), name)
    return _TEXTS[target](_Call(operation, problem, int(query_offset), acsr, device))


def _xla(call: _Call) -> str:
    import jax

    from splat.codegen.xla.emit import stablehlo

    p, (batch, head_dim, dtype) = call.problem, call.sizes.values()
    rows, columns = (jax.ShapeDtypeStruct((batch, n, head_dim), dtype) for n in (p.q_len, p.kv_len))
    values = jax.ShapeDtypeStruct((batch, p.q_len, call.acsr.width), accumulator(dtype))
    run = partial(getattr(load("xla"), call.operation), call.acsr)
    return stablehlo(run, *operands(call.operation, rows, columns, values))


def _cpp(call: _Call) -> str:
    from splat.codegen.cpp import values

    return values.source(call.operation, call.acsr, call.problem.dtype, call.problem.head_dim)


def _triton(call: _Call) -> str:
    from splat.codegen.triton import values

    return values.source(call.acsr, call.operation, arch=find(call.device).arch, **call.sizes)


def _ptx(call: _Call) -> str:
    from splat.codegen.triton import values

    p = call.problem
    return values.assembly(
        call.operation, repr(p.pattern), p.q_len, p.kv_len, call.query_offset, arch=find(call.device).arch, **call.sizes
    )


_TEXTS: dict[str, Callable[[_Call], str]] = {"xla": _xla, "cpp": _cpp, "triton": _triton, "ptx": _ptx}
