"""What `splat bench SUITE` measures: which cases, which operations, at which sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from splat.bench import cases
from splat.bench.cases import Case
from splat.bench.problem import OPERATIONS, Problem
from splat.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Suite:
    """Cases and sizes.

    Attributes:
      name, title: for people.
      sources: the suites of the registry that its cases are of.
      without: names of cases of these that it leaves out.
      ops: what is measured unless the command line says otherwise.
      lengths, quick_lengths: positions.
      gpu_heads: on a GPU; None: the operation's, as on a CPU.
      head_dim: elements of a position.
      ablation: whether SPLAT's variants take part, and no peers.
    """

    name: str
    title: str
    sources: tuple[str, ...]
    ops: tuple[str, ...]
    lengths: tuple[int, ...]
    quick_lengths: tuple[int, ...]
    gpu_heads: int | None = None
    head_dim: int = 64
    ablation: bool = False
    without: tuple[str, ...] = ()

    @property
    def cases(self) -> tuple[Case, ...]:
        return tuple(case for case in cases.of(*self.sources) if case.name not in self.without)


OF_PAPER = ("sddmm", "spmm", "attention")

SUITES: dict[str, Suite] = {
    one.name: one
    for one in (
        Suite(
            "paper", "The paper's patterns, 10 to 50 % non-zeros", ("paper",), OF_PAPER, (4096,), (256,), gpu_heads=16
        ),
        Suite(
            "sas", "The six patterns of SAS", ("sas",), ("attention",), (2048, 8192, 16384), (1024,), gpu_heads=64,
            head_dim=128,
        ),
        Suite("models", "Patterns of published models", ("models",), ("attention",), (4096,), (1024,)),
        Suite(
            "figures", "What the project promises numbers for", ("figures",), ("attention", "training"), (4096,), (512,)
        ),
        Suite(
            "planning", "Planning, against create_block_mask", ("planning",), ("planning",),
            (4096, 16384, 65536, 262144, 1048576), (1024, 4096),
        ),
        Suite(
            "vocabulary", "Planning every constructor, and SAS", ("vocabulary", "sas"), ("planning",),
            (16384, 1048576), (1024,), without=("per_head",),  # several patterns, each of which is planned on its own
        ),
        Suite(
            "scaling", "Time and memory by length, for a window", ("scaling",), ("attention",),
            tuple(1 << n for n in range(10, 19)), (512, 1024, 2048),
        ),
        Suite(
            "ablation", "Each optimisation off, one at a time", ("paper",), ("sddmm", "spmm", "composed"), (4096,),
            (256,), ablation=True,
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Selection:
    """What the command line narrows a suite down to; empty and None: the suite's own, and float32."""

    ops: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    cases: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    heads: int | None = None
    head_dim: int | None = None
    device: str = "cpu"
    quick: bool = False


def find(name: str) -> Suite:
    """The suite of that name. Raises ArgumentError for an unknown one."""
    if name not in SUITES:
        raise ArgumentError(f"there is no suite named {name!r}; there are {', '.join(SUITES)}")
    return SUITES[name]


def problems(suite: Suite, chosen: Selection) -> list[Problem]:
    """Everything to measure, in order.

    Raises ArgumentError for operations, cases and dtypes that are none, and for an operation not measured in a dtype.
    """
    ops = _checked_ops(chosen.ops or suite.ops)
    dtypes = _checked_dtypes(chosen.dtypes or ("float32",), ops)
    lengths = chosen.lengths or (suite.quick_lengths if chosen.quick else suite.lengths)
    return [
        Problem(op, case, q_len, _heads(suite, op, chosen), chosen.head_dim or suite.head_dim, chosen.device, dtype)
        for op in ops
        for dtype in dtypes
        for q_len in lengths
        for case in _chosen_cases(suite, chosen)
        if case.serves(q_len)
    ]


def _heads(suite: Suite, op: str, chosen: Selection) -> int:
    if chosen.heads is not None:
        return chosen.heads
    if chosen.device == "cuda" and suite.gpu_heads is not None:
        return suite.gpu_heads
    return min(OPERATIONS[op].heads, 2) if chosen.quick else OPERATIONS[op].heads


def _checked_ops(ops: Sequence[str]) -> Sequence[str]:
    unknown = [op for op in ops if op not in OPERATIONS]
    if unknown:
        raise ArgumentError(f"--op must name some of {', '.join(OPERATIONS)}, but {', '.join(unknown)} was given")
    return ops


def _checked_dtypes(dtypes: Sequence[str], ops: Sequence[str]) -> Sequence[str]:
    for dtype in dtypes:
        serving = [op.name for op in OPERATIONS.values() if dtype in op.dtypes]
        if not serving:
            known = ", ".join(dict.fromkeys(one for op in OPERATIONS.values() for one in op.dtypes))
            raise ArgumentError(f"--dtype must name some of {known}, but {dtype} was given")
        others = [op for op in ops if op not in serving]
        if others:
            raise ArgumentError(
                f"--dtype {dtype} must go with operations that are measured in it, {', '.join(serving)}, but "
                f"{', '.join(others)} was given. Add {' '.join(f'--op {op}' for op in serving)}, or leave it out."
            )
    return dtypes


def _chosen_cases(suite: Suite, chosen: Selection) -> list[Case]:
    """Those named, or all; with --quick the first of each family ("windowed, 10 %" is of the family "windowed")."""
    by_name = {case.name: case for case in suite.cases}
    unknown = [name for name in chosen.cases if name not in by_name]
    if unknown:
        known = ", ".join(map(repr, by_name))
        raise ArgumentError(
            f"--case must name cases of the suite {suite.name}: {known}; but {', '.join(map(repr, unknown))} was given"
        )
    if chosen.cases:
        return [by_name[name] for name in chosen.cases]
    if not chosen.quick:
        return list(by_name.values())
    return list({family(case.name): case for case in reversed(by_name.values())}.values())[::-1]


def family(case: str) -> str:
    """What a name says before its comma."""
    return case.partition(",")[0]
