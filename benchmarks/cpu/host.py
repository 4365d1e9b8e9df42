"""What the machine does for the process that measures: which processors it has, and whether it keeps its memory."""

from __future__ import annotations

from contextlib import AbstractContextManager

from benchmarks.cpu.setting import THREADS
from splat.bench import machine
from splat.bench.machine import processors
from splat.bench.memory import keep_memory


def confined() -> AbstractContextManager[None]:
    """No more processors than threads are measured with."""
    return machine.confined(THREADS)


__all__ = ["confined", "keep_memory", "processors"]
