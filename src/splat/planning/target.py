"""Facts about devices: the one table of numbers that the cost model uses, each with its source."""

from __future__ import annotations

import dataclasses
import os

from splat.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Target:
    """A device.

    Attributes:
      name, kind: `kind` is "gpu" or "cpu".
      units: streaming multiprocessors, or threads.
      clock_hz: boost clock (0: not used).
      matmul_flops: dtype name -> peak dense FLOP/s of the whole device.
      exp_per_s: exponentials per second of the whole device.
      bandwidth_bytes: main memory, bytes per second.
      efficiency: head dim -> measured time of the best Triton attention kernels' model (see `cost`), inverted.
      source: where the numbers are from.
      arch: what kernels are compiled for: "sm_80", "sm_90", "sm_100", "gfx942"; empty for CPUs.
      attention_flops: dtype name -> FLOP/s of the C++ kernels in full tiles, exponentials included; CPUs only.
    """

    name: str
    kind: str
    units: int
    clock_hz: float
    matmul_flops: dict[str, float]
    exp_per_s: float
    bandwidth_bytes: float
    efficiency: dict[int, float]
    source: str
    arch: str = ""
    attention_flops: dict[str, float] = dataclasses.field(default_factory=dict)


def _gpu(name, arch, units, clock, half, single, bandwidth, source, efficiency=None) -> Target:
    flops = {"bfloat16": half, "float16": half, "float32": single, "float64": single / 2}
    # 16 special-function results per multiprocessor and cycle: CUDA C++ programming guide, arithmetic throughput.
    return Target(name, "gpu", units, clock, flops, 16 * units * clock, bandwidth, efficiency or {}, source, arch)


#: Triton forward attention on H100 reaches 403 / 395 TFLOP/s at head dim 64 / 128 (published figures), which is this
#: share of what `cost` makes of tensor cores and exponentials one after the other.
_HOPPER = {64: 0.83, 128: 0.61}

TARGETS: dict[str, Target] = {
    "a100": _gpu("a100", "sm_80", 108, 1.41e9, 312e12, 19.5e12, 2.039e12, "NVIDIA A100 80GB SXM data sheet, 2021"),
    "h100": _gpu("h100", "sm_90", 132, 1.83e9, 989e12, 67e12, 3.35e12, "NVIDIA H100 SXM data sheet, 2023", _HOPPER),
    "h200": _gpu("h200", "sm_90", 132, 1.83e9, 989e12, 67e12, 4.8e12, "NVIDIA H200 SXM data sheet, 2024", _HOPPER),
    "b200": _gpu("b200", "sm_100", 148, 1.85e9, 2250e12, 75e12, 7.7e12, "NVIDIA DGX B200 data sheet, 2024, by 8"),
    "mi300x": _gpu("mi300x", "gfx942", 304, 2.1e9, 1307e12, 163e12, 5.3e12, "AMD Instinct MI300X data sheet, 2023"),
}


#: Not a device: Triton's interpreter, for tests. Its tiles are small, so that small problems have many.
_INTERPRETER = _gpu("interpreter", "interpreter", 1, 1e9, 1e9, 1e9, 1e9, "none: nothing is timed on it")


def _cpu() -> Target:
    threads = os.cpu_count() or 1
    return Target(
        name="cpu",
        kind="cpu",
        units=threads,
        clock_hz=0.0,
        matmul_flops={"float32": 100e9 * threads, "float64": 50e9 * threads, "bfloat16": 60e9 * threads,
                      "float16": 60e9 * threads},
        exp_per_s=1.0e9 * threads,
        bandwidth_bytes=13e9 * threads,
        efficiency={},
        source="per thread, measured by benchmarks/calibrate.py on a 2-core Emerald Rapids Xeon, November 2026",
        # window(256) at 4,096 positions, head dim 64, on the same machine, which has AMX for bfloat16.
        attention_flops={"float32": 165e9 * threads, "float64": 62e9 * threads, "bfloat16": 600e9 * threads,
                         "float16": 165e9 * threads},
    )  # fmt: skip


def find(name: str) -> Target:
    """The target of that name ("cpu", "a100", "h100", "h200", "b200", "mi300x"). Raises ArgumentError for another."""
    if name == "cpu":
        return _cpu()
    if name == "interpreter":
        return _INTERPRETER
    if name not in TARGETS:
        raise ArgumentError(
            f"target must be one of 'cpu', {', '.join(map(repr, TARGETS))}, but {name!r} was given. A device that is "
            "not in the table can still run; name the closest one to see predictions."
        )
    return TARGETS[name]
