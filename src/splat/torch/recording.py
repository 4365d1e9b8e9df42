"""Launches for tensors: recorded once, replayed on every call.

`splat.codegen.triton.program` says which kernels run, with which arguments. A `Tape` is what it is bound to: instead of
launching, it writes the launches down as steps over numbered arrays. The `Recording` carries them out on tensors.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from splat.codegen.triton import interpret, record
from splat.codegen.triton.launch import Launch, Output
from splat.errors import UnsupportedError


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """An array of a recording: its number, and where it is 4-D its (B, N, T) strides."""

    number: int
    strides: tuple[int, int, int] = (0, 0, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A table on a device, the array that it was made from, and the stream that it was made on (of a GPU)."""

    array: np.ndarray
    tensor: Tensor
    stream: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """Arrays to be made, and the launch that writes them; or, without one, the value that they are filled with.

    Attributes:
      outputs: number, shape and dtype of each array.
      dropped: the arrays that no later step needs.
    """

    launch: Launch | None
    outputs: tuple[tuple[int, tuple[int, ...], torch.dtype], ...]
    fill: float | None = None
    dropped: tuple[int, ...] = ()

    @property
    def reads(self) -> set[int]:
        return {x.number for x in (self.launch.arrays if self.launch else ()) if isinstance(x, Slot)}

    @property
    def writes(self) -> set[int]:
        return {number for number, *_ in self.outputs}


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """The steps of a call.

    Attributes:
      count: how many arrays there are; the inputs come first.
      results: the numbers of the arrays that are returned.
      tables: what the launches hold besides, O(rows) each.
    """

    device: torch.device
    steps: tuple[Step, ...]
    count: int
    results: tuple[int, ...]
    tables: tuple[Table, ...]
    interpreted: bool

    @property
    def nbytes(self) -> int:
        return sum(table.array.nbytes for table in self.tables)

    def run(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """Carries out the steps on the current stream; the results."""
        arrays: list[Any] = [*inputs, *(None,) * (self.count - len(inputs))]
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            if self.device.type == "cuda":
                self._hold()
            for step in self.steps:
                for number, shape, dtype in step.outputs:
                    arrays[number] = self._new(shape, dtype, step.fill)
                if step.launch is not None and step.launch.programs:
                    self._launch(step, step.launch, arrays)
                for number in step.dropped:
                    arrays[number] = None
        return [arrays[number] for number in self.results]

    def _hold(self) -> None:
        """Sees to it that the tables outlive what is about to read them, though they may be forgotten before that.

        Their memory goes back to the stream that they were made on: others have to be named. What a CUDA graph reads is
        kept for good.
        """
        if torch.cuda.is_current_stream_capturing():
            _CAPTURED.update({id(table): table for table in self.tables})
            return
        stream = torch.cuda.current_stream(self.device)
        for table in self.tables:
            if table.stream not in (None, stream):
                table.tensor.record_stream(stream)

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype, fill: float | None) -> Tensor:
        if fill is None and not self.interpreted:
            return torch.empty(shape, dtype=dtype, device=self.device)
        # What an interpreted kernel forgets to write shows.
        return torch.full(shape, float("nan") if fill is None else fill, dtype=dtype, device=self.device)

    def _launch(self, step: Step, launch: Launch, arrays: list[Any]) -> None:
        given = [arrays[x.number] if isinstance(x, Slot) else x for x in launch.arrays]
        arguments = (*given, *launch.scalars, *(arrays[number] for number, *_ in step.outputs))
        function: Any = launch.kernel.function[(launch.programs,)]
        options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages, **launch.constants)
        if self.interpreted:
            interpret.repair()
            with np.errstate(all="ignore"):  # infinities and NaN are a kernel's business; NumPy would warn of them
                function(*arguments, **options)
        elif launch.constants.get("DESCRIPTORS"):
            # Descriptors lie in scratch memory that Triton asks an allocator for. The copied context keeps the user's.
            contextvars.copy_context().run(_with_scratch, self.device, function, arguments, options)
        else:
            function(*arguments, **options)


def _with_scratch(device: torch.device, function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)
    function(*arguments, **options)


class Tape:
    """Records what a `splat.codegen.triton.program.Program` launches: its binding's methods, over slots."""

    def __init__(self, device: torch.device):
        self.device = device
        self._steps: list[Step] = []
        self._tables: list[Table] = []
        self._count = self._inputs = 0

    def input(self, strides: tuple[int, int, int] = (0, 0, 0)) -> Slot:
        """The next input. All of them come before the first step."""
        self._inputs += 1
        return self._slot(strides)

    def optional(self, here: bool) -> Slot | None:
        """The next input, which may be None."""
        slot = self.input()
        return slot if here else None

    def _slot(self, strides: tuple[int, int, int]) -> Slot:
        self._count += 1
        return Slot(self._count - 1, strides)

    def strides(self, array: Slot | Output) -> tuple[int, int, int]:
        return array.strides if isinstance(array, Slot) else record.strides(array)

    def table(self, array: np.ndarray) -> Tensor:
        table = _on_device(array, self.device)
        self._tables.append(table)
        return table.tensor

    def full(self, shape: tuple[int, ...], dtype: str, value: float) -> Slot:
        return self._step(None, (Output(shape, dtype),), value)[0]

    def launch(self, launch: Launch) -> tuple[Slot, ...]:
        if not interpret.is_interpreted():
            function: Any = launch.kernel.function
            first = len(launch.arrays)
            names = tuple(function.arg_names[first : first + len(launch.scalars)])
            kernel = dataclasses.replace(launch.kernel, function=_for_all_sizes(function, names))
            launch = dataclasses.replace(launch, kernel=kernel)
        return self._step(launch, launch.outputs, None)

    def _step(self, launch: Launch | None, outputs: tuple[Output, ...], fill: float | None) -> tuple[Slot, ...]:
        made = tuple(self._slot(record.strides(x) if len(x.shape) == 4 else (0, 0, 0)) for x in outputs)
        described = tuple((s.number, x.shape, getattr(torch, x.dtype)) for s, x in zip(made, outputs, strict=True))
        self._steps.append(Step(launch, described, fill))
        return made

    def ending(self, results: Sequence[Slot]) -> Recording:
        """The recording of what `results` need. Arrays are dropped after their last use; inputs and results are not."""
        numbers = tuple(slot.number for slot in results)
        kept, steps = set(numbers), []
        for step in reversed(self._steps):
            if not step.writes & kept:
                continue
            last = {number for number in (step.reads | step.writes) - kept if number >= self._inputs}
            kept |= step.reads | step.writes
            steps.append(dataclasses.replace(step, dropped=tuple(sorted(last))))
        tables = tuple({id(table): table for table in self._tables}.values())
        return Recording(
            self.device, tuple(reversed(steps)), self._count, numbers, tables, interpret.is_interpreted()
        )  # fmt: skip


@lru_cache(maxsize=512)
def _for_all_sizes(function: Any, scalars: tuple[str, ...]) -> Any:
    """The kernel, not compiled again where a length or stride is 1 or a multiple of 16: addresses say what they need.

    Otherwise training on sequences of many lengths compiles each kernel up to eight times.
    """
    jit: Any = triton.jit  # its overloads want a function's type, which text has not
    return jit(function.fn, do_not_specialize=list(scalars))


#: What captured CUDA graphs read, by identity.
_CAPTURED: dict[int, Table] = {}

_UPLOADED: weakref.WeakValueDictionary[tuple[int, torch.device], Table] = weakref.WeakValueDictionary()


def _on_device(array: np.ndarray, device: torch.device) -> Table:
    """The table on the device; recordings that differ in strides only, say, share it."""
    table = _UPLOADED.get((id(array), device))  # which keeps the array, so that no other can have its id
    if table is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                "a CUDA graph is being captured, and this call's tables are not on the device yet. Call "
                "splat.torch.attention once with the same pattern, shapes and offset before the capture."
            )
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        table = Table(array, torch.tensor(array, dtype=torch.int32, device=device), stream)
        _UPLOADED[id(array), device] = table
    return table
