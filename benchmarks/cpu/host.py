"""What the machine does for the process that measures: which processors it has, and whether it keeps its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.cpu.setting import THREADS

#: Parameters of glibc's `mallopt`: how much free memory at the heap's end it keeps, and how many blocks it maps.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


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


def processors(siblings: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """Those that this process may use, cores first: the second threads of cores stand behind all first ones."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0))
    return sorted(allowed, key=lambda n: (_earlier_threads(n, allowed, siblings), n))


def _earlier_threads(number: int, allowed: Sequence[int], siblings: Path) -> int:
    """How many allowed processors with a lower number are on the same core; 0 where the system does not say."""
    try:
        text = (siblings / f"cpu{number}/topology/thread_siblings_list").read_text(encoding="ascii")
        bounds = [part.split("-") for part in text.strip().split(",")]
        together = {n for ends in bounds for n in range(int(ends[0]), int(ends[-1]) + 1)}
    except (OSError, ValueError):
        return 0
    return sum(n < number for n in together.intersection(allowed))


@contextlib.contextmanager
def confined() -> Iterator[None]:
    """No more processors than threads are measured with: JAX starts a thread for each that it may use.

    What JAX has started before is not changed.
    """
    before = processors()
    if len(before) > THREADS:
        os.sched_setaffinity(0, before[:THREADS])
    try:
        yield
    finally:
        if len(before) > THREADS:
            os.sched_setaffinity(0, before)
