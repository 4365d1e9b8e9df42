"""What is measured on a GPU, as values: one job is one process, and jobs and lengths come most important first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks import cases
from benchmarks.cases import Case
from splat.planning.kernels import KERNELS

FORWARD, BOTH = "forward", "forward + backward"
DIRECTIONS = (FORWARD, BOTH)

#: The suites, most important first.
SUITES = ("sas", "gpu-planning", "models", "paper")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the arrays; batch is 1.

    Attributes:
      num_checked: heads that are compared with a dense computation: the last, the first, ...
      grouped: head dims at which `SHARE` query heads to a key head are checked, which are not timed.
    """

    heads: int
    head_dim: int
    num_checked: int = 2
    dtype: str = "bfloat16"
    grouped: tuple[int, ...] = ()


SHARE = 4
USUAL, TINY = Sizes(64, 128, grouped=(64, 128, 256)), Sizes(2, 16, num_checked=1, grouped=(16,))


@dataclasses.dataclass(frozen=True)
class Job:
    """A process's work.

    Attributes:
      kind: what it does, a key of `worker.KINDS`.
      suite: the table that it belongs to.
      case: "suite/name" of a case; several with `kind` "jax-gate".
      device: "cuda", or "cpu": a rehearsal.
      lengths: positions, the most important first.
      prepare_s: how long it may prepare; what is not compiled by then is left out, and named.
      skip: what an earlier process of this job died of.
      kernel: the one to tune.
    """

    kind: str
    suite: str
    cases: tuple[str, ...]
    device: str
    sizes: Sizes
    lengths: tuple[int, ...]
    prepare_s: float = 300.0
    skip: tuple[str, ...] = ()
    kernel: str = ""
    configs: tuple[tuple[int, int, int, int, bool], ...] = ()

    @property
    def name(self) -> str:
        return " ".join([self.kind, *self.cases, *([self.kernel] if self.kernel else [])])

    @staticmethod
    def of(data: dict) -> Job:
        """From `dataclasses.asdict`, by way of JSON."""
        tuples = {key: tuple(data[key]) for key in ("cases", "lengths", "skip")}
        configs = tuple(tuple(config) for config in data["configs"])
        sizes = Sizes(**{**data["sizes"], "grouped": tuple(data["sizes"]["grouped"])})
        return Job(**{**data, **tuples, "sizes": sizes, "configs": configs})


def name_of(case: Case) -> str:
    return f"{case.suite}/{case.name}"


def case_of(name: str) -> Case:
    return next(case for case in cases.CASES if name_of(case) == name)


def cases_of(suite: str) -> tuple[Case, ...]:
    """The cases of a table. Two that bars are stated for are measured with those of SAS."""
    if suite not in ("sas", "gpu-planning", "tune"):
        return cases.of(suite)
    extra = ["dense causal"] if suite == "tune" else ["dense causal", "strided 64"]
    return cases.of("sas") + tuple(case for case in cases.of("figures") if case.name in extra)


#: suite -> positions on a GPU. What is measured last is what is dropped first where time is short.
LENGTHS = {"sas": (8192, 16384, 2048), "gpu-planning": (131072, 16384), "models": (8192,), "paper": (4096,),
           "tune": (8192,)}  # fmt: skip
REHEARSED = {"gpu-planning": (512,)}


def jobs(
    suite: str, device: str, *, only: Sequence[str] = (), lengths: Sequence[int] = (), jax: bool = True
) -> list[Job]:
    """The jobs of a suite; `only` and `lengths` narrow it down."""
    sizes, usual = (USUAL, LENGTHS[suite]) if device == "cuda" else (TINY, REHEARSED.get(suite, (64,)))
    chosen = [case for case in cases_of(suite) if not only or case.name in only]
    common: dict[str, Any] = dict(suite=suite, device=device, sizes=sizes, lengths=tuple(lengths) or usual)
    if suite == "tune":
        return [Job("tune", cases=(name_of(case),), kernel=kernel, **common) for case in chosen for kernel in KERNELS]
    kind = "masks" if suite == "gpu-planning" else "attention"
    made = [Job(kind, cases=(name_of(case),), **common) for case in chosen]
    if suite == "sas" and jax and chosen:
        common["lengths"] = common["lengths"][:2]  # the shortest is for launch overheads, and is PyTorch's only
        made.append(Job("jax-peers", cases=(), **common))
        common["lengths"] = (min(*usual, 2048),) if device == "cuda" else usual
        names = [name_of(case) for case in chosen]
        made += [Job("jax-gate", cases=tuple(names[n::4]), **common) for n in range(min(4, len(names)))]
    return made


def machine_job(device: str) -> Job:
    """Rates of the machine: what shares of the peak are stated of."""
    return Job("machine", "machine", (), device, USUAL if device == "cuda" else TINY, ())
