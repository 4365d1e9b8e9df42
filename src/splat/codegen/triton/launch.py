"""One kernel launch as a value: what every binding (JAX, PyTorch, NumPy) carries out, and what is compiled offline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A generated kernel.

    Attributes:
      name: of the function, as profilers show it.
      source: its text.
      function: the `triton.jit` function. Its parameters are arrays, scalars, outputs and constants, in this order.
    """

    name: str
    source: str
    function: Any = dataclasses.field(compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Output:
    """An array that a kernel writes: every element of it, or those that its reader knows."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """One launch of `programs` programs along the grid's first axis.

    Attributes:
      arrays: input arrays of the binding's framework, in the order of the kernel's parameters.
      scalars: Python ints (int32, or int64 where they do not fit) and floats (float32), after the arrays.
      outputs: arrays to be made, contiguous, after the scalars.
      constants: compile-time parameters by name.
    """

    kernel: Kernel
    programs: int
    arrays: tuple[Any, ...]
    scalars: tuple[int | float, ...]
    outputs: tuple[Output, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


#: Carries out a launch: the kernel's outputs, as arrays of the framework.
Launcher = Callable[[Launch], Sequence[Any]]
