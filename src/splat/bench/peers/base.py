"""What takes part in a comparison: SPLAT's implementations, their variants, and their peers."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from splat.bench.problem import Problem


class Layout(enum.Enum):
    """How a result lies in memory, as a NumPy array."""

    ACSR = "values [heads, positions, width]"
    CSR = "data [heads, non-zeros], columns ascending"
    DENSE = "scores [heads, positions, positions]"
    ROWS = "[heads, positions, head dim]"
    GRADIENTS = "output and gradients of query, key and value, [4, heads, positions, head dim]"
    PLAN = "a plan: nothing to compare"


class Kind(enum.Enum):
    """What a contender is, for tables: geometric means are over the best of the sparse ones too."""

    OURS = "SPLAT"
    VARIANT = "SPLAT, something off"
    DENSE = "computes all pairs"
    SPARSE = "sparse format"
    ATTENTION = "fused attention"


@dataclasses.dataclass(frozen=True)
class Ready:
    """A prepared problem.

    Attributes:
      call: computes, and returns when the result is there; on a GPU `timing.Enqueued`, but for planning.
      layout: of what `read` makes of the result.
      note: what was chosen while preparing, for the report.
    """

    call: Callable[[], Any]
    layout: Layout
    read: Callable[[Any], np.ndarray]
    note: str = ""


#: The threads of OpenBLAS, which NumPy and SciPy use, spin for about 0.1 s after a product.
BLAS_REST_S = 0.15

Make = Callable[[Problem], Ready]


def _no_memory(problem: Problem) -> float:
    return 0.0


def _anything(problem: Problem) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something that is timed.

    Attributes:
      name: as the command line spells it.
      title: what it is, for people.
      make: operation -> how it is prepared.
      packages: that must be installed.
      devices: it runs on.
      needs_bytes: about how much memory; it is left out where the machine has less.
      refuses: why it cannot do a problem; None where it can.
      rest_s: how long its threads go on after a call, looking for work: nobody is timed meanwhile.
      slow_to_prepare: left out of --quick unless named.
      under: what holds while it is prepared and first called; for variants of SPLAT.
    """

    name: str
    title: str
    kind: Kind
    make: Mapping[str, Make]
    packages: tuple[str, ...] = ("jax",)
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs_bytes: Callable[[Problem], float] = _no_memory
    refuses: Callable[[Problem], str | None] = _anything
    rest_s: float = 0.0
    slow_to_prepare: bool = False
    under: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    def missing(self, device: str) -> str | None:
        """Why it cannot be used here at all; None where it can."""
        if device not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        lacking = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"{', '.join(lacking)} not installed" if lacking else None


def as_numpy(result: Any) -> np.ndarray:
    return np.asarray(result)
