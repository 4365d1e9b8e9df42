"""How much memory a function needs, as Python sees it and as the system does."""

from __future__ import annotations

import contextlib
import ctypes
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Parameters of glibc's `mallopt`: how much free memory at the heap's end it keeps, how many blocks it maps, and how
#: many heaps it has.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_memory() -> bool:
    """Has `malloc` keep what is freed; whether it does. It cannot be undone.

    Otherwise a result of more than 32 MB lies in pages that are new in each call, in JAX as in PyTorch: at 16,384
    positions they take a sixth of the time of a window, and show as a step in the time per position.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, (1 << 31) - 1))


def one_heap() -> bool:
    """Has threads that begin from here on share one heap; whether they do. It cannot be undone.

    Of other heaps `malloc_trim` does not give back what is free at the end, so that `call_peak_bytes` misses it.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(ARENA_MAX, 1))
    except (OSError, AttributeError):  # not glibc
        return False


def traced_peak_bytes(function: Callable[[], Any]) -> int:
    """The most memory that Python and NumPy held at once for `function`, beyond what was there before."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        function()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def peak_rss_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not say.

    `getrusage` serves elsewhere, but on Linux it also counts what the parent held when it started this process.
    """
    peak = _kilobytes(Path("/proc/self/status"), "VmHWM:")
    if peak is not None:
        return peak
    try:
        import resource
        import sys
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_bytes() -> int | None:
    """What processes may still ask for; None where the system does not say."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def call_peak_bytes(function: Callable[[], Any]) -> int | None:
    """The most memory that this process held during one call, beyond what it held before; None where unknown.

    Linux only: the system's own mark of the most that was resident is set back before the call. Free pages of the heap
    are given back first, so that using them again counts.
    """
    status = Path("/proc/self/status")
    try:
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    before = _kilobytes(status, "VmRSS:")
    function()
    peak = _kilobytes(status, "VmHWM:")
    return None if before is None or peak is None else max(peak - before, 0)


def _kilobytes(path: Path, field: str) -> int | None:
    """A field of such a file, in bytes."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), None)
