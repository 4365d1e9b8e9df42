"""Timing and memory, which are `splat.bench.timing` and `splat.bench.memory`."""

from __future__ import annotations

from splat.bench.memory import peak_rss_bytes, traced_peak_bytes
from splat.bench.timing import Clock, CudaClock, Samples, interleave, ratio, turn, wall_ms

__all__ = [
    "Clock",
    "CudaClock",
    "Samples",
    "interleave",
    "peak_rss_bytes",
    "ratio",
    "traced_peak_bytes",
    "turn",
    "wall_ms",
]
