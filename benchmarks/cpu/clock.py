"""Functions timed in turns on a machine that others use too, which is `splat.bench.clock`."""

from __future__ import annotations

from splat.bench.clock import (
    LEAST_ROUNDS,
    TURN_MS,
    Call,
    Sample,
    Turns,
    foreign,
    quartiles,
    sample,
    take_turns,
)

__all__ = ["LEAST_ROUNDS", "TURN_MS", "Call", "Sample", "Turns", "foreign", "quartiles", "sample", "take_turns"]
