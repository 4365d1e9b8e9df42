"""Compile a generated kernel for any GPU on a machine without one, and tell what it became.

Triton's compiler fails in silence: it accepts kernels whose shared memory no device has, spills registers, serializes
wgmma, or leaves a stub without tensor-core instructions. `compile_launch` reads all of that off the compiled kernel and
`Compiled.problems` puts it into words. The compiler may also abort the process it runs in, so that `compile_all`
gives every kernel a process of its own, forked from one that has imported Triton.

Registers and spills come from the log of Triton's own call of ptxas: a second call would have to know the flags, which
differ between Triton's versions. (JAX assembles the PTX with its own copy of ptxas, which may allocate differently.)
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import dataclasses
import enum
import importlib
import io
import json
import math
import numbers
import os
import pickle
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from splat.codegen.triton.launch import Launch
from splat.codegen.triton.offline_model import ARCHITECTURES
from splat.errors import ArgumentError

#: That a multiprocessor of the Blackwell generation has: what is compiled for more is no kernel.
TENSOR_MEMORY_COLUMNS = 512

_TENSOR_CORE = {
    "wgmma": r"\bwgmma\.mma_async\b",
    "mma.sync": r"\bmma\.sync\b",
    "tcgen05.mma": r"\btcgen05\.mma\b",
    "mfma": r"\bv_s?mfma",
}
_COPIES = {
    "cp.async": r"\bcp\.async\.c[ag]\b",
    "tma": r"\bcp\.async\.bulk\.tensor\b",
    "buffer_load lds": r"\b(?:buffer|global)_load\S* .*\blds\b",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel as it came out of the compiler.

    Attributes:
      name: of the kernel.
      arch: a key of `ARCHITECTURES`.
      num_warps: of one program; with warp specialisation more than were asked for.
      registers: per thread; on AMD vector registers, accumulation registers included.
      spilled_bytes: per thread, written to memory because registers ran out.
      shared_bytes: of shared memory (LDS), per program.
      tensor_memory_columns: of Blackwell's tensor memory, per program.
      tensor_core: instructions in the assembly text by name: "wgmma", "mma.sync", "tcgen05.mma", "mfma".
      copies: asynchronous copies to shared memory in the assembly text: "cp.async", "tma", "buffer_load lds".
      serialized: why ptxas put a wait after every wgmma (its C7515), in its words; empty where it did not.
      seconds: that compiling took.
      assembly: PTX or AMDGCN text.
      binary: the cubin or hsaco.
    """

    name: str
    arch: str
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    tensor_core: dict[str, int]
    copies: dict[str, int]
    serialized: str
    seconds: float
    assembly: str = dataclasses.field(repr=False)
    binary: bytes = dataclasses.field(repr=False)

    def problems(self, allowed_spill_bytes: int = 0, *, needs_tensor_core: bool = True) -> list[str]:
        """Why this kernel should not be run, a sentence each.

        Args:
          allowed_spill_bytes: per thread, that are no problem.
          needs_tensor_core: false for products in full float32, which NVIDIA's tensor cores do not do.
        """
        found = []
        if needs_tensor_core and not self.tensor_core:
            found.append(f"{self.name} for {self.arch} has no tensor-core instruction.")
        if self.serialized:
            found.append(f"{self.name} for {self.arch}: ptxas serialized its wgmma, due to {self.serialized} (C7515).")
        limit = ARCHITECTURES[self.arch].shared_limit
        if self.shared_bytes > limit:
            found.append(
                f"{self.name} needs {self.shared_bytes:,} bytes of shared memory; {self.arch} has {limit:,}. "
                "Use smaller tiles or fewer stages."
            )
        if self.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
            found.append(
                f"{self.name} needs {self.tensor_memory_columns} columns of tensor memory; {self.arch} has "
                f"{TENSOR_MEMORY_COLUMNS}. Use smaller tiles."
            )
        if self.spilled_bytes > allowed_spill_bytes:
            found.append(
                f"{self.name} for {self.arch} spills {self.spilled_bytes} bytes a thread; "
                f"{allowed_spill_bytes} are allowed. Use smaller tiles, more warps or fewer stages."
            )
        return found


class Outcome(enum.Enum):
    """How a job failed."""

    ERROR = "the factory or the compiler raised an exception"
    CRASH = "the compiler ended its process"
    TIMEOUT = "the time was over"


@dataclasses.dataclass(frozen=True)
class Failure:
    """A job without a kernel.

    Attributes:
      name, arch: as in `Compiled`, the job's name for want of a kernel.
      message: the compiler's own words, shortened.
      seconds: until it failed.
    """

    name: str
    arch: str
    outcome: Outcome
    message: str
    seconds: float

    def problems(self, allowed_spill_bytes: int = 0, *, needs_tensor_core: bool = True) -> list[str]:
        """That there is no kernel, whatever is allowed."""
        return [f"{self.name} for {self.arch} did not compile: {self.outcome.value}. {self.message}"]


@dataclasses.dataclass(frozen=True)
class Job:
    """A kernel to be made and compiled in another process.

    Attributes:
      factory: "package.module:function", a function that returns the Launch.
      arguments: its keyword arguments, of kinds that JSON knows.
      arch: a key of `ARCHITECTURES`.
      options, jax: as for `compile_launch`.
      name: for messages.
    """

    factory: str
    arguments: dict[str, Any]
    arch: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    jax: bool = False
    name: str = "kernel"


# -- one launch, in this process ---------------------------------------------------------------------------------------

_TYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64",
    "float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5", "bool": "u1",
    "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64",
    "uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64",
}  # fmt: skip


def signature(launch: Launch, arch: str, *, jax: bool = False) -> tuple[dict[str, str], dict, dict]:
    """The specialisation that `triton.jit` would choose for a launch, every array lying at a multiple of 16 bytes.

    Or, with `jax`, that of jax-triton: a scalar's divisibility is forgotten, and how large an array is.

    Returns:
      Triton's type of every parameter, "constexpr" for what is compiled in; the values compiled in and the facts known
      of the others, both by the parameter's position.

    Raises:
      ArgumentError: the launch's arguments are not the kernel's parameters, or a dtype has no type in Triton.
    """
    parameters = launch.kernel.function.params
    values = [*launch.arrays, *launch.scalars, *launch.outputs]
    runtime = [parameter.name for parameter in parameters if not parameter.is_constexpr]
    if len(values) != len(runtime):
        raise ArgumentError(
            f"launch of {launch.kernel.name}: {len(values)} arrays, scalars and outputs for {len(runtime)} run-time "
            f"parameters ({', '.join(runtime)})"
        )
    names = {parameter.name for parameter in parameters if parameter.is_constexpr}
    if names != launch.constants.keys():
        raise ArgumentError(
            f"launch of {launch.kernel.name}: constants {sorted(launch.constants)} for the compile-time parameters "
            f"{sorted(names)}"
        )
    types, constants, facts = {}, {}, {}
    left = iter(values)
    for index, parameter in enumerate(parameters):
        if parameter.is_constexpr:
            value, kind, known = launch.constants[parameter.name], "constexpr", []
        else:
            value = next(left)
            kind, known = _specialise(value, parameter, arch, jax)
        types[parameter.name] = kind
        if kind == "constexpr":
            constants[index,] = value
        if known:
            facts[index,] = known
    return types, constants, facts


def _specialise(value: Any, parameter: Any, arch: str, jax: bool) -> tuple[str, list[list[Any]]]:
    """Type and facts of one run-time argument."""
    aligned = [] if parameter.do_not_specialize_on_alignment else [["tt.divisibility", 16]]
    if not isinstance(value, numbers.Number):
        name = getattr(value.dtype, "name", None) or str(value.dtype).removeprefix("torch.")
        if name not in _TYPES:
            raise ArgumentError(f"{parameter.name}: Triton has no type for dtype {name}; it has {', '.join(_TYPES)}")
        # AMD's loads from an array of less than 2 GiB take 32-bit offsets and check bounds for free.
        bits = math.prod(value.shape) * int((re.search(r"\d+", name) or "8")[0])
        within = arch.startswith("gfx") and bits < 8 << 31 and not jax
        facts = [*aligned, ["tt.pointer_range", 32]] if within else aligned
        return f"*{_TYPES[name]}", [] if parameter.do_not_specialize else facts
    if isinstance(value, bool):
        return parameter.annotation_type or "u1", []
    if not isinstance(value, numbers.Integral):
        return parameter.annotation_type or "fp32", []
    specialise = not parameter.do_not_specialize
    if specialise and value == 1 and not parameter.annotation_type:
        return "constexpr", []
    kind = parameter.annotation_type or ("i32" if -(1 << 31) <= int(value) < 1 << 31 else "i64")
    return kind, aligned if specialise and int(value) % 16 == 0 and not jax else []


def compile_launch(launch: Launch, arch: str, *, options: dict[str, Any] | None = None, jax: bool = False) -> Compiled:
    """Compiles the kernel of a launch for `arch`, in this process, past Triton's cache.

    Arrays need no data: anything with a `.dtype` (or its name) and a `.shape` serves.

    Args:
      options: compiler options besides warps and stages, such as {"maxnreg": 168} or {"waves_per_eu": 2}.
      jax: specialise as jax-triton does, not as Triton.

    Raises:
      ArgumentError: an unknown `arch`, an interpreted kernel, or arguments that do not fit the kernel's parameters.
      Exception: whatever Triton raises. It may also end the process: see `compile_all`.
    """
    if arch not in ARCHITECTURES:
        raise ArgumentError(f"arch: {arch!r} is unknown; expected one of {', '.join(ARCHITECTURES)}")
    if not hasattr(launch.kernel.function, "cache_key"):
        raise ArgumentError(
            f"{launch.kernel.name} was made for Triton's interpreter and cannot be compiled; "
            "unset TRITON_INTERPRET before triton is imported, or use compile_all"
        )
    triton: Any = importlib.import_module("triton")
    knobs = triton.knobs
    about = ARCHITECTURES[arch]
    source = triton.compiler.ASTSource(launch.kernel.function, *signature(launch, arch, jax=jax))
    target = triton.backends.compiler.GPUTarget(about.backend, about.capability, about.warp_size)
    settings = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **(options or {})}
    output = io.StringIO()
    # A cached kernel comes without ptxas' log, and Triton's key confuses tuples of functions that share a name.
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.cache.dir = folder
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        start = time.perf_counter()
        with contextlib.redirect_stdout(output):
            kernel = triton.compile(source, target=target, options=settings)
        seconds = time.perf_counter() - start
        log, read = output.getvalue(), _read_cuda if about.backend == "cuda" else _read_hip
        assembly, binary, registers, spilled = read(kernel.asm, log)
    return Compiled(
        name=launch.kernel.name,
        arch=arch,
        num_warps=kernel.metadata.num_warps,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=kernel.metadata.shared,
        tensor_memory_columns=getattr(kernel.metadata, "tmem_size", None) or 0,
        tensor_core=_counts(_TENSOR_CORE, assembly),
        copies=_counts(_COPIES, assembly),
        serialized=reason[1] if (reason := re.search(r"serialized due to (.*?)(?: in the function|$)", log)) else "",
        seconds=seconds,
        assembly=assembly,
        binary=binary,
    )


def _counts(expressions: Mapping[str, str], text: str) -> dict[str, int]:
    counts = {name: len(re.findall(expression, text)) for name, expression in expressions.items()}
    return {name: count for name, count in counts.items() if count}


def _read_cuda(asm: Mapping[str, Any], log: str) -> tuple[str, bytes, int, int]:
    registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
    spilled = max(map(int, re.findall(r"(\d+) bytes spill stores", log)), default=0)
    return asm["ptx"], asm["cubin"], registers, spilled


def _read_hip(asm: Mapping[str, Any], log: str) -> tuple[str, bytes, int, int]:
    text = asm["amdgcn"]
    registers, spills = (
        int(re.findall(rf"\.{field}:\s+(\d+)", text)[0]) for field in ("vgpr_count", "vgpr_spill_count")
    )
    return text, asm["hsaco"], registers, 4 * spills


# -- many launches, each in a process of its own -----------------------------------------------------------------------

#: Of a message; Triton's hold whole programs.
_MESSAGE_LENGTH = 1500


def compile_all(
    jobs: Sequence[Job],
    *,
    workers: int = 1,
    timeout_s: float = 120.0,
    progress: Callable[[Job, Compiled | Failure], None] | None = None,
) -> list[Compiled | Failure]:
    """Compiles every job in a process of its own, `workers` at a time; results in the jobs' order.

    A job whose factory or compiler raises, dies or takes longer than `timeout_s` is a `Failure`; the others go on.

    Args:
      progress: called here with every result as it comes.
    """
    results: dict[int, Compiled | Failure] = {}
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(_compile_apart, job, timeout_s): index for index, job in enumerate(jobs)}
        for future in concurrent.futures.as_completed(futures):
            index = futures[future]
            results[index] = future.result()
            if progress is not None:
                progress(jobs[index], results[index])
    finally:
        pool.shutdown(cancel_futures=True)
    return [results[index] for index in range(len(jobs))]


def _compile_apart(job: Job, timeout_s: float) -> Compiled | Failure:
    start = time.perf_counter()

    def failure(outcome: Outcome, message: str) -> Failure:
        return Failure(job.name, job.arch, outcome, message[:_MESSAGE_LENGTH], time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result"), Path(folder, "log")
        # A process that dies leaves its temporary files, which go with the folder.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        about = dict(path=sys.path, folder=os.getcwd(), environment=environment | {"TMPDIR": folder})
        request = dict(job=dataclasses.asdict(job), result=str(result), log=str(log), **about)
        log.touch()
        forge, code = _take_forge(), None
        try:
            code = forge.ask(request, timeout_s)
        finally:
            if code is None:
                forge.end()
            else:
                _idle.append(forge)
        if code is None:
            return failure(Outcome.TIMEOUT, f"No kernel after {timeout_s:g} s.")
        said = _complaints(log.read_text(encoding="utf-8", errors="replace"))
        if code != 0 or not result.exists():
            end = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
            return failure(Outcome.CRASH, f"{end}; {said}" if said else end)
        found = pickle.loads(result.read_bytes())
    if isinstance(found, Failure) and said:  # MLIR prints its diagnostics and raises an exception without them
        return failure(found.outcome, f"{found.message[: _MESSAGE_LENGTH // 2]}\n{said}")
    return found


class _Forge:
    """A process that has imported Triton, which takes a second, and forks for every job."""

    def __init__(self) -> None:
        program = "from splat.codegen.triton import offline; offline._serve()"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment.pop("TRITON_INTERPRET", None)
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # so that a compiler and its ptxas can be ended with it
        )

    @property
    def is_usable(self) -> bool:
        """Whether it is there, and of this process rather than of one that this was forked from."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, request: dict[str, Any], timeout_s: float) -> int | None:
        """The exit code of the job's process (or of this one), negative for a signal; None: the time was over."""
        given, answers = self._process.stdin, self._process.stdout
        assert given is not None
        assert answers is not None
        with contextlib.suppress(BrokenPipeError):
            given.write(json.dumps(request).encode() + b"\n")
            given.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(answers, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                return None
        answer = answers.readline()
        return int(answer) if answer else self._process.wait()

    def end(self) -> None:
        """Ends it and all that it has started; in a process that was forked from its owner, only leaves it alone."""
        if self._owner == os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.returncode = self._process.returncode or 0  # Python would complain of one that goes on
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


#: Those without a job.
_idle: list[_Forge] = []


def _take_forge() -> _Forge:
    while _idle:
        with contextlib.suppress(IndexError):  # another thread was faster
            forge = _idle.pop()
            if forge.is_usable:
                return forge
            forge.end()
    return _Forge()


@atexit.register
def _end_forges() -> None:
    while _idle:
        _idle.pop().end()


def _serve() -> None:
    """The other process: a request a line on stdin, answered by what its job's process ended with."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    with contextlib.suppress(Exception):  # jobs say what is wrong
        importlib.import_module("splat.codegen.triton.record")
        importlib.import_module("triton").runtime.cache.triton_key()  # reads all of Triton, and remembers
    for line in sys.stdin.buffer:
        pid = os.fork()
        if not pid:
            _forked(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def _forked(
    job: dict[str, Any], result: str, log: str, path: list[str], folder: str, environment: dict[str, str]
) -> NoReturn:
    """One job's process, as if it had been started for it."""
    try:
        for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)):
            os.dup2(os.open(name, flags), number)
        os.dup2(1, 2)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.path[:] = path
        tempfile.tempdir = None
        _work(Job(**job), result)
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def _work(job: Job, result: str) -> None:
    """One job, and its pickled result."""
    start = time.perf_counter()
    module, _, function = job.factory.partition(":")
    try:
        launch = getattr(importlib.import_module(module), function)(**job.arguments)
        found: Compiled | Failure = compile_launch(launch, job.arch, options=job.options, jax=job.jax)
    except Exception as error:  # of any kind: Triton's share no base class
        message = f"{type(error).__name__}: {error}"[:_MESSAGE_LENGTH]
        found = Failure(job.name, job.arch, Outcome.ERROR, message, time.perf_counter() - start)
    Path(result).write_bytes(pickle.dumps(found))


def _complaints(log: str) -> str:
    """The lines of a compiler's output that say what went wrong; its last ones where none does."""
    lines = [line.strip()[:300] for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\berror\b|assert|fatal", line, re.IGNORECASE)]
    return "\n".join(telling[:5] or lines[-5:])
