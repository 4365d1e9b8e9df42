"""The system's C++ compiler: found, asked what it is, and run on generated source, once for each.

`load(name, source)` gives a library's functions; `build` the file. What has been compiled is kept by
`splat.codegen.cache` under a key made of the source, the headers, the compiler, its flags and the processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from splat import config
from splat.codegen import cache
from splat.codegen.cpp.progress import Progress
from splat.codegen.files import temporary_folder
from splat.errors import CompileError, SplatError, UnsupportedError
from splat.locks import in_forked

#: Raised when libraries of an earlier version must not be found: when what surrounds the source has changed.
FORMAT = 1
TIMEOUT_S = 600.0
TRIAL_S = 10.0
CANDIDATES = ("c++", "g++", "clang++")
OLDEST_GCC = 10
INCLUDE = Path(__file__).parent / "include"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden",
         "-pthread")  # fmt: skip
#: Written to the log ahead of the compiler, so that it can say there that the disk is full.
LOG_BYTES = 16 << 10
TRIAL = """#include <cmath>

extern "C" double trial(double x) { return std::exp(x); }
"""

INSTALL = (
    "Install a compiler (Debian, Ubuntu: apt install g++; conda: conda install -c conda-forge cxx-compiler; macOS: "
    "xcode-select --install), or set CXX to one."
)


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
      command: the program's path, then arguments that CXX has.
      version: the first line that it prints when asked for its version.
      identity: differs between compilers, and after an upgrade.
    """

    command: tuple[str, ...]
    version: str
    identity: str

    @property
    def name(self) -> str:
        return Path(self.command[0]).name


# -- the compiler ------------------------------------------------------------------------------------------------------


def missing() -> str | None:
    """Why nothing can be compiled here, with the remedy, as one sentence; None where a compiler is found."""
    try:
        _check_age(_command())
    except SplatError as error:
        return str(error)
    return None


def settings() -> tuple[str | None, ...]:
    """The environment's say in what is built: a library that was made for others is another one."""
    return tuple(os.environ.get(name) for name in ("CXX", "PATH", "SPLAT_CXXFLAGS", "SPLAT_CACHE_DIR"))


def find() -> Compiler:
    """The compiler that CXX names, else the first of c++, g++ and clang++.

    Raises UnsupportedError if there is none, or it is too old.
    """
    command = _command()
    _check_age(command)
    return _found(command)


@functools.lru_cache(maxsize=16)
def _check_age(command: tuple[str, ...]) -> None:
    version = _found(command).version
    gcc = re.match(r"\S*(?:g\+\+|gcc|c\+\+)\S* \(.*\) (\d+)\.\d", version)
    if gcc and int(gcc[1]) < OLDEST_GCC:
        raise UnsupportedError(f"the C++ compiler is {version}, but gcc {OLDEST_GCC} or newer is needed. {INSTALL}")


def _found(command: tuple[str, ...]) -> Compiler:
    try:
        path = os.path.realpath(command[0])
        status = os.stat(path)
    except OSError as error:
        raise UnsupportedError(f"the C++ compiler {command[0]} cannot be used: {error.strerror}. {INSTALL}") from None
    return _identify(command, path, status.st_mtime_ns, status.st_size)


def _command() -> tuple[str, ...]:
    if os.name != "posix":
        raise UnsupportedError("C++ kernels are compiled on Linux and macOS only.")
    asked = os.environ.get("CXX", ""), os.environ.get("PATH")
    found = _search(*asked)
    if os.access(found[0], os.X_OK):
        return found
    _search.cache_clear()  # it has been removed
    return _search(*asked)


@functools.lru_cache(maxsize=16)  # every call asks; what is not found is looked for again
def _search(cxx: str, path: str | None) -> tuple[str, ...]:
    words = config.split("CXX", cxx)
    if words:
        program = shutil.which(words[0], path=path)
        if program is None:
            raise UnsupportedError(f"CXX is {cxx!r}, but there is no program {words[0]!r}. {INSTALL}")
        return (os.path.abspath(program), *words[1:])
    for name in CANDIDATES:
        program = shutil.which(name, path=path)
        if program is not None and not _is_stub(program):
            return (os.path.abspath(program),)
    raise UnsupportedError(f"no C++ compiler (c++, g++ or clang++) is on the PATH. {INSTALL}")


def _is_stub(path: str) -> bool:
    """Whether it is what macOS has in the place of a compiler that is not installed: it opens a window."""
    if sys.platform != "darwin" or not path.startswith("/usr/bin/"):
        return False
    tools = (
        "/Library/Developer/CommandLineTools/usr/bin/clang++",
        "/var/db/xcode_select_link",
        "/Applications/Xcode.app",
    )
    return not any(map(os.path.exists, tools))


@functools.lru_cache(maxsize=16)
def _identify(command: tuple[str, ...], path: str, mtime_ns: int, size: int) -> Compiler:
    version = "unknown version"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [*command, "--version"], capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False,
            env=_environment(),
        )  # fmt: skip
        version = next(iter(done.stdout.decode(errors="replace").strip().splitlines()), version)
    # An upgrade may keep the path's name, its version or, in a container image, its time: all of them count.
    return Compiler(command, version, "\n".join([*command, path, str(mtime_ns), str(size), version]))


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", **more}


def trial(compiler: Compiler) -> str | None:
    """Why the compiler makes no library of three lines, with the remedy; None where it does. Nothing is kept.

    Raises OSError where it cannot be tried, as no temporary files can be written.
    """
    job = _Job("trial", TRIAL, compiler, (*FLAGS, *config.cxxflags()), key="")
    with temporary_folder() as folder:
        _, failure, said = _attempt(job, folder, TRIAL_S)
    if failure is None:
        return None
    return (
        f"three lines of C++ cannot be compiled ({failure}): {_telling(said)[0].strip()}. Set CXX to a C++ compiler, "
        "and check SPLAT_CXXFLAGS."
    )


# -- flags and key -----------------------------------------------------------------------------------------------------

_refused: set[tuple[str, str]] = set()  # (compiler's identity, flag)


def flags(compiler: Compiler) -> list[str]:
    """What the compiler is called with, without include folders: ours, the processor's, those of SPLAT_CXXFLAGS."""
    given = config.cxxflags()
    return [*FLAGS, *_native(compiler, given), *given]


def _native(compiler: Compiler, given: list[str]) -> list[str]:
    """The flag that asks for this processor's instructions; none where SPLAT_CXXFLAGS says which to use."""
    return [flag for flag in _native_flags(given) if (compiler.identity, flag) not in _refused][:1]


def _native_flags(given: list[str]) -> tuple[str, ...]:
    """What compilers call it, the likelier one first."""
    if any(flag.startswith(("-march=", "-mcpu=")) for flag in given):
        return ()
    arm = platform.machine().lower() in {"arm64", "aarch64"}
    return ("-mcpu=native", "-march=native") if arm else ("-march=native", "-mcpu=native")


def bfloat16_by(compiler: Compiler) -> str:
    """What makes bfloat16 products with `flags`: "matrix tiles", "pairs" or "float32"; "" where it cannot be told."""
    command = [*compiler.command, *flags(compiler), f"-I{INCLUDE}", "-x", "c++", "-E", "-dM", "-"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        text = b'#include "splat/vector.hpp"\n'
        done = subprocess.run(command, input=text, capture_output=True, timeout=60, check=True, env=_environment())
        macros = {line.split()[1] for line in done.stdout.splitlines() if line.startswith(b"#define SPLAT_")}
        return "matrix tiles" if b"SPLAT_AMX" in macros else "pairs" if b"SPLAT_PAIRS" in macros else "float32"
    return ""


def include_folders() -> list[Path]:
    """Ours, and that of XLA's FFI where jaxlib is installed; jaxlib is not imported."""
    folders = [INCLUDE]
    jaxlib = importlib.util.find_spec("jaxlib")
    for place in (jaxlib and jaxlib.submodule_search_locations) or ():
        if (Path(place) / "include").is_dir():
            folders.append(Path(place) / "include")
    return folders


@functools.lru_cache(maxsize=1)
def processor() -> str:
    """Differs between processors that need not run each other's code: a home folder may be shared by machines."""
    said: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                break  # the first processor is like the others
            name, _, value = line.partition(":")
            said[name.strip().lower()] = value.strip()
    names = ("model name", "cpu implementer", "cpu variant", "cpu part", "isa")
    model = [said[name] for name in names if name in said] or [platform.processor()]
    features = sorted((said.get("flags") or said.get("features") or "").split())
    return "\n".join([platform.machine(), *model, *features])


@functools.lru_cache(maxsize=8)
def _headers_of(stamps: tuple[tuple[str, str, int, int], ...]) -> str:
    return _digest(*(part for path, name, _, _ in stamps for part in (name.encode(), Path(path).read_bytes())))


def _headers() -> str:
    """A digest of the headers: all of ours, and XLA's C interface. Where they lie does not count."""
    ours, *others = include_folders()
    found = [(path, ours) for path in sorted(ours.rglob("*")) if path.is_file()]
    found += [(path, other) for other in others for path in other.glob("xla/ffi/api/c_api.h")]
    stamps = []
    for path, folder in found:
        status = path.stat()
        stamps.append((str(path), path.relative_to(folder).as_posix(), status.st_mtime_ns, status.st_size))
    return _headers_of(tuple(stamps))


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}\n".encode() + part)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Job:
    """One compilation: what for, with what, and the key that it is kept under."""

    name: str
    source: str
    compiler: Compiler
    flags: tuple[str, ...]
    key: str

    @property
    def library(self) -> str:
        return f"{self.name}.so"


def _job(name: str, source: str) -> _Job:
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", name).strip(".-")[:80] or "kernel"
    compiler = find()
    chosen = tuple(flags(compiler))
    # With an instruction set of the user's choice a library is for every machine that has it.
    native = any(flag in {"-march=native", "-mcpu=native", "-mtune=native"} for flag in chosen)
    parts = (
        str(FORMAT), name, source, _headers(), compiler.identity, shlex.join(chosen),
        processor() if native else platform.machine(),
    )  # fmt: skip
    return _Job(name, source, compiler, chosen, _digest(*(part.encode() for part in parts)))


# -- build and load ----------------------------------------------------------------------------------------------------

_one_key: dict[str, threading.Lock] = {}
_loaded: dict[str, ctypes.CDLL] = {}
in_forked(_one_key.clear)  # the threads that hold locks are the parent's


def build(name: str, source: str) -> Path:
    """The shared library of this source, compiled where no earlier call or process has done so.

    Args:
      name: what it is, for people: "forward_float32_h64". Names the files, and the line that says what is compiled.
      source: a C++17 translation unit. It may include the headers in `include/`, and XLA's where jaxlib is installed.

    Raises:
      UnsupportedError: there is no compiler.
      CompileError: the compiler did not accept the source.
      SplatError: the library can be written nowhere.
    """
    return _build(_job(name, source))


def load(name: str, source: str) -> ctypes.CDLL:
    """`build`, and the library loaded; the same object whenever a process asks for it again. Thread-safe."""
    job = _job(name, source)
    with _one_key.setdefault(job.key, threading.Lock()):
        if job.key not in _loaded:
            _loaded[job.key] = _open(job)
        return _loaded[job.key]


def _open(job: _Job) -> ctypes.CDLL:
    for last in (False, True):
        path = _build(job)
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            if last or path.exists():  # the cache may have been cleared in between
                raise SplatError(
                    f"the compiled library {path} cannot be loaded: {error}. If its file system forbids that, set "
                    "SPLAT_CACHE_DIR to another folder; else run `splat cache clear`, and check SPLAT_CXXFLAGS."
                ) from error
    raise AssertionError


def _build(job: _Job) -> Path:
    while True:
        try:
            entry = cache.load_or_build(job.key, job.name, functools.partial(_compile, job))
            return entry.folder / job.library
        except CompileError as error:
            # Which flag asks for the processor's own instructions differs between compilers and their versions.
            native = [flag for flag in _native_flags(config.cxxflags()) if flag in job.flags]
            if not native or "native" not in error.log or _accepts(job.compiler, native):
                raise
            _refused.add((job.compiler.identity, native[0]))
            job = _job(job.name, job.source)


def _accepts(compiler: Compiler, some: list[str]) -> bool:
    command = [*compiler.command, *some, "-x", "c++", "-fsyntax-only", "-"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, input=b"int one;\n", capture_output=True, timeout=60, check=False, env=_environment()
        )
        return done.returncode == 0
    return False


def _compile(job: _Job, folder: Path) -> dict[str, str]:
    """Compiles into `folder`, as `cache.load_or_build` asks for it."""
    began = time.monotonic()
    with Progress(job.name, job.compiler.name) as progress:
        command, failure, said = _attempt(job, folder, TIMEOUT_S, progress.tick)
    if failure is not None:
        raise _error(job, command, failure, said)
    seconds = time.monotonic() - began
    return {"compiler": job.compiler.version, "command": command, "seconds": f"{seconds:.2f}"}


def _attempt(
    job: _Job, folder: Path, timeout_s: float, tick: Callable[[], None] = lambda: None
) -> tuple[str, str | None, str]:
    """Compiles into `folder`: the command, why it failed (or None), and what the compiler has said.

    Raises OSError where the folder cannot be written, or its disk is full.
    """
    source = folder / f"{job.name}.cpp"
    source.write_text(job.source, encoding="utf-8")
    temporary = folder / "temporary"
    temporary.mkdir()
    includes = [f"-I{path}" for path in include_folders()]
    command = [*job.compiler.command, source.name, "-o", job.library, *includes, *job.flags]
    with open(temporary / "log", "wb") as log:
        log.write(bytes(LOG_BYTES))
        log.seek(0)
        failure = _run(command, folder, temporary, log, timeout_s, tick)
        end = os.lseek(log.fileno(), 0, os.SEEK_CUR)  # the compiler's place in the file is ours
    said = (temporary / "log").read_bytes()[:end].decode(errors="replace")
    if failure is None and not (folder / job.library).is_file():
        failure = "it wrote no library"
    for full in (errno.ENOSPC, errno.EDQUOT):
        if failure is not None and os.strerror(full) in said:
            raise OSError(full, os.strerror(full), str(folder))
    return shlex.join(command), failure, said


def _run(
    command: list[str], folder: Path, temporary: Path, log: IO[bytes], timeout_s: float, tick: Callable[[], None]
) -> str | None:
    """Runs the compiler; why it failed, or None.

    An exception, as Ctrl-C, ends it; one in the moment of its start leaves it to end by itself, its files removed.
    """
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=_environment(TMPDIR=str(temporary)), start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return f"it cannot be run: {error.strerror}"
    try:
        while True:
            try:
                code = process.wait(0.2)
                break
            except subprocess.TimeoutExpired:
                tick()
                if time.monotonic() - began > timeout_s:
                    return f"it took longer than {timeout_s:.0f} s"
    finally:
        # The compiler proper is a child of what was started; both are in a session of their own.
        if process.returncode is None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code < 0:
        return f"ended by signal {-code}"
    return f"exit code {code}" if code else None


def _telling(log: str) -> list[str]:
    """The lines of the log from the first error on; the last 12 where there is none."""
    lines = log.strip().splitlines() or ["(it said nothing)"]
    return lines[next((at for at, line in enumerate(lines) if "error" in line.lower()), max(0, len(lines) - 12)) :]


def _error(job: _Job, command: str, failure: str, log: str) -> CompileError:
    folder = cache.keep_failed(job.key, {f"{job.name}.cpp": job.source, f"{job.name}.log": f"{command}\n\n{log}"})
    lines = _telling(log)
    shown = lines[:12]
    rest = len(lines) - len(shown)
    told = "\n".join(f"  {line}" for line in shown) + (f"\n  ({rest} more lines in the log)" if rest else "")
    kept = f"source and log: {folder}" if folder else "source and log could be written nowhere"
    return CompileError(
        f"the C++ compiler failed on {job.name} ({failure}):\n{told}\ncompiler: {job.compiler.version}\n"
        f"command: {command}\n{kept}\n"
        "If SPLAT_CXXFLAGS and CXX are as they should be, please report it with source and log; "
        "implementation='xla' needs no compiler.",
        command=command, log=log, folder=folder,
    )  # fmt: skip
