"""How many threads a kernel gets."""

from __future__ import annotations

import os


def usable() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count() -> int:
    """Threads of XLA's pool, as XLA counts them when it makes it."""
    said = next((os.environ[name] for name in ("PJRT_NPROC", "NPROC") if os.environ.get(name, "").isdigit()), None)
    return max(int(said) if said else usable(), 1)
