"""What the numbers depend on: processor, versions, date."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from splat.files import replacing

PACKAGES = ("splat-attention", "jax", "jaxlib", "jax-triton", "numpy", "scipy", "torch", "triton", "cupy")


def machine() -> dict[str, Any]:
    """What the numbers depend on, and the date; nothing that names the host or its folders."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": _cpu_name(),
        "gpu": _gpu_facts(),
        "threads": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


#: What nvidia-smi is asked: name in the facts -> its field.
_GPU_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "sm_clock_mhz": "clocks.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
}


def _gpu_facts() -> dict[str, str] | None:
    """Of the first NVIDIA GPU, as its driver tells them; None where there is none."""
    answer = ask_gpu(*_GPU_FIELDS.values())
    return None if answer is None else dict(zip(_GPU_FIELDS, answer, strict=True))


def ask_gpu(*fields: str) -> list[str] | None:
    """What nvidia-smi answers for the first GPU; None where there is neither."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    answer = [value.strip() for value in (done.stdout.splitlines() or [""])[0].split(",")]
    return answer if len(answer) == len(fields) else None


def write_json(path: Path, data: Any) -> None:
    """Writes atomically: a reader sees the whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as written, written.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.write("\n")


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
def confined(threads: int) -> Iterator[None]:
    """No more processors than threads are measured with: JAX starts a thread for each that it may use.

    What JAX has started before is not changed.
    """
    before = processors()
    if len(before) > threads:
        os.sched_setaffinity(0, before[:threads])
    try:
        yield
    finally:
        if len(before) > threads:
            os.sched_setaffinity(0, before)
