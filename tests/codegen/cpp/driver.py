"""Generated kernels called without JAX, on arrays whose borders are watched, here or in another process.

    case = Case("window(3)", ...)                 what is computed
    results = run(Job(case.build("forward"), case, "forward", arrays))

`run_elsewhere` does the same in a process of its own, which may be one that a sanitizer watches, and may crash. A job
with an emulator is done by that, in a process of a processor of another kind.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

import splat
from splat.codegen.cpp import amx, compiler
from splat.codegen.cpp.call import Array as PlacedArray
from splat.codegen.cpp.call import Call, kernel_facts
from splat.codegen.cpp.generate import KernelFacts, library_name, source
from splat.codegen.cpp.lower import PassFacts, Tables, counts_of, holes_of, passes_of
from splat.planning import Plan, Problem, make_plan

Array = np.ndarray[Any, Any]

#: What a kernel writes, and after which operand each result is shaped.
RESULTS = {
    "forward": {"out": "query", "lse": "lse"},
    "decode": {"out": "query", "lse": "lse"},
    "d_query": {"d_query": "query"},
    "d_key_value": {"d_key": "key", "d_value": "value"},
    "backward": {"d_query": "query", "d_key": "key", "d_value": "value"},
}
ROOT = Path(__file__).parents[3]


@dataclasses.dataclass(frozen=True)
class Case:
    """An attention problem.

    Attributes:
      lengths: (q_len, kv_len). heads: of queries and of keys.
      kv_lengths: of each sequence; None: all keys.
      layout: of arrays in memory: [batch, position, head, head dim] ("rows"), [batch, head, position, head dim]
        ("heads"), or as the first with numbers between that belong to nobody ("gaps").
    """

    pattern: str
    lengths: tuple[int, int]
    head_dim: int
    dtype: str
    heads: tuple[int, int] = (2, 1)
    batch: int = 2
    soft_cap: float | None = None
    kv_lengths: tuple[int, ...] | None = None
    layout: Literal["rows", "heads", "gaps"] = "rows"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def compute(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def plan(self) -> Plan:
        problem = Problem(splat.parse(self.pattern), *self.lengths, self.head_dim, *self.heads, self.batch, self.dtype)
        return make_plan(problem, implementation="cpp", target="cpu")

    @property
    def mask(self) -> Array:
        return splat.parse(self.pattern).to_dense(*self.lengths)

    def lowered(self, kernel: str) -> tuple[tuple[PassFacts, ...], list[Tables]]:
        return passes_of(self.plan, kernel)

    def facts(self, kernel: str) -> KernelFacts:
        return kernel_facts(
            kernel, self.lowered(kernel)[0], holes_of(self.plan), dtype=self.dtype, head_dim=self.head_dim,
            soft_cap=self.soft_cap is not None, lengths=self.kv_lengths is not None,
        )  # fmt: skip

    def build(self, kernel: str) -> Path:
        """The kernel's library, compiled with SPLAT_CXXFLAGS as they are now."""
        facts = self.facts(kernel)
        return compiler.build(library_name(facts), source(facts))

    def draw(self, rng: np.random.Generator) -> dict[str, Array]:
        """query, key, value, d_out and d_lse, standard normal."""
        q_shape = (self.batch, self.lengths[0], self.heads[0], self.head_dim)
        k_shape = (self.batch, self.lengths[1], self.heads[1], self.head_dim)
        shapes = {"query": q_shape, "key": k_shape, "value": k_shape, "d_out": q_shape}
        made = {name: rng.standard_normal(shape).astype(type_of(self.dtype)) for name, shape in shapes.items()}
        return made | {"d_lse": rng.standard_normal(q_shape[:-1]).astype(self.compute)}


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of a kernel.

    Attributes:
      arrays: by their names in `splat::Call`: all that a backward reads, whatever the kernel is.
      border: where memory ends that may be touched: at the last element of each array, or before its first ("after",
        "before": other accesses end the process); None: arrays are plain memory, and a sanitizer watches.
      emulator: the command that makes the call, `elsewhere.cpp` included; empty: this process makes it.
    """

    library: Path
    case: Case
    kernel: str
    arrays: dict[str, Array]
    num_threads: int = 1
    border: Literal["after", "before"] | None = None
    emulator: tuple[str, ...] = ()


def type_of(dtype: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


# -- arrays in memory --------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_GAP = 3  # elements


def allocate(shape: tuple[int, ...], dtype: np.dtype[Any], border: str | None) -> Array:
    """An array of exactly its size."""
    if border is None:
        return np.empty(shape, dtype)
    page, size = mmap.PAGESIZE, int(np.prod(shape)) * dtype.itemsize
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for closed in (start, start + (pages + 1) * page):
        if _libc.mprotect(ctypes.c_void_p(closed), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page if border == "before" else (pages + 1) * page - size
    return np.frombuffer(memory, dtype, int(np.prod(shape)), offset).reshape(shape)


def place(array: Array, layout: str, border: str | None) -> Array:
    """The same numbers, laid out as asked; what lies in gaps is NaN."""
    if layout == "gaps":
        room = allocate((*array.shape[:-1], array.shape[-1] + _GAP), array.dtype, border)
        room[...] = np.nan
        made = room[..., : array.shape[-1]]
    elif layout == "heads":
        batch, positions, heads, *rest = array.shape
        made = allocate((batch, heads, positions, *rest), array.dtype, border).swapaxes(1, 2)
    else:
        made = allocate(array.shape, array.dtype, border)
    made[...] = array
    return made


def gap_of(array: Array) -> Array:
    """What lies between the rows of an array that `place` made with gaps."""
    shape = (*array.shape[:-1], 1 + _GAP)
    return np.lib.stride_tricks.as_strided(array[..., -1:], shape, array.strides)[..., 1:]


# -- one call ----------------------------------------------------------------------------------------------------------


def run(job: Job) -> dict[str, Array]:
    """The kernel's results, by their names in `splat::Call`. What it must not write is as before."""
    case, results = job.case, RESULTS[job.kernel]
    unwritten = {name: np.full_like(job.arrays[like], np.nan) for name, like in results.items()}
    placed = {name: place(x, case.layout, job.border) for name, x in (job.arrays | unwritten).items()}
    call = Call(case.batch, *case.lengths, *case.heads, case.scale, case.soft_cap or 0.0)
    for name, x in placed.items():
        setattr(call, name, PlacedArray(x.ctypes.data, *(stride // x.itemsize for stride in x.strides[:3])))
    memory = [*placed.values()]
    if case.kv_lengths is not None:
        memory.append(place(np.array(case.kv_lengths, np.int32), "rows", job.border))
        call.kv_lengths = memory[-1].ctypes.data
    _, tables = case.lowered(job.kernel)
    flat = [place(table, "rows", job.border) for one in tables for table in one]
    pointers = (ctypes.c_void_p * len(flat))(*(table.ctypes.data for table in flat))
    numbers = counts_of(job.kernel, tables)
    counts = (ctypes.c_int64 * len(numbers))(*numbers)
    call.tables, call.num_groups = ctypes.addressof(pointers), ctypes.addressof(counts)
    if job.emulator:
        emulate(job, call, pointers, [*memory, *flat, np.ctypeslib.as_array(counts)])
    else:
        assert ctypes.CDLL(str(job.library)).splat_run(ctypes.byref(call), job.num_threads, None) == 0
    for name, x in placed.items():
        assert case.layout != "gaps" or np.isnan(gap_of(x)).all(), f"{job.kernel} writes between the rows of {name}"
        assert name in results or x.tobytes() == job.arrays[name].tobytes(), f"{job.kernel} writes to {name}"
    return {name: np.array(placed[name]) for name in results}


def emulate(job: Job, call: Call, pointers: ctypes.Array[Any], arrays: list[Array]) -> None:
    """Has the emulator make the call, on copies of all that it points to, which then replace the originals."""
    regions = [(ctypes.addressof(x), ctypes.sizeof(x)) for x in (call, pointers)]
    regions += [(low, high - low) for low, high in map(np.lib.array_utils.byte_bounds, arrays)]
    given = np.array([job.num_threads, len(regions), *np.ravel(regions)], np.int64).tobytes()
    contents = [ctypes.string_at(*region) for region in regions]
    done = subprocess.run(
        [*job.emulator, str(job.library)], input=given + b"".join(contents), capture_output=True, check=False,
        timeout=300,
    )  # fmt: skip
    if done.returncode:
        raise Ended(f"exit code {done.returncode}\n{done.stderr.decode(errors='replace')}")
    at = sum(size for _, size in regions[:2])  # the call and its pointers stay as they are
    assert len(done.stdout) == sum(size for _, size in regions)
    for address, size in regions[2:]:
        ctypes.memmove(address, done.stdout[at : at + size], size)
        at += size


# -- another process ---------------------------------------------------------------------------------------------------


class Ended(Exception):
    """The process did not end well; its exit code and what it said."""


def run_elsewhere(jobs: list[Job], environment: dict[str, str] | None = None) -> list[dict[str, Array]]:
    """The results of each job, run by a process of their own with these variables."""
    folders = os.pathsep.join([str(Path(splat.__file__).parents[1]), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", "from tests.codegen.cpp import driver; driver.main()"],
        input=pickle.dumps(jobs), capture_output=True, check=False, timeout=300,
        env=os.environ | {"PYTHONPATH": folders, "PYTHONDONTWRITEBYTECODE": "1"} | (environment or {}),
    )  # fmt: skip
    if done.returncode:
        raise Ended(f"exit code {done.returncode}\n{done.stderr.decode(errors='replace')}")
    return pickle.loads(done.stdout)


def main() -> None:
    jobs: list[Job] = pickle.load(sys.stdin.buffer)
    amx.is_granted()  # asks for them
    results = []
    for job in jobs:
        print(job.kernel, job.case, job.num_threads, "threads, border", job.border, file=sys.stderr, flush=True)
        results.append(run(job))
    assert "jax" not in sys.modules
    sys.stdout.buffer.write(pickle.dumps(results))
