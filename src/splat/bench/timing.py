"""Timing that survives a noisy machine: interleaved repetitions, medians, spreads, paired ratios."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

#: Calls a function once: how many milliseconds it took.
Clock = Callable[[Callable[[], Any]], float]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Milliseconds of one function: the median call of every turn, in order; `turns` holds all calls."""

    ms: tuple[float, ...]
    turns: tuple[tuple[float, ...], ...] = ()

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ms)

    @property
    def best_ms(self) -> float:
        """The least disturbed one: for constants, because other work on the machine only ever adds."""
        return min(self.ms)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.ms) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.ms, n=4, method="inclusive")
        return (high - low) / 2 / self.median_ms

    def __str__(self) -> str:
        return f"{self.median_ms:.3g} ±{self.spread:.0%}"


def wall_ms(function: Callable[[], Any]) -> float:
    """By the host's clock. The function must return when its work is done (JAX: block until ready)."""
    begin = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - begin)


class CudaClock:
    """By CUDA events, with a cold L2 cache and without the host's share.

        host    flush  sleep  begin  launch launch launch  end
        device  [flush][sleep......................][kernel][kernel][kernel]
                                                   begin                   end

    The device sleeps until the host has launched everything, so that a call of many short kernels is measured as it
    runs in a model that keeps the device busy. `host_ms` holds what launching took.
    """

    #: More than any L2 cache.
    FLUSH_BYTES = 256 << 20

    #: The longest that the device is made to wait, in milliseconds, and its cycles in one of them, at least.
    LONGEST_MS, CYCLES_PER_MS = 20.0, 2_000_000

    def __init__(self, device: str = "cuda") -> None:
        import torch

        self._torch = torch
        self._flushed = torch.empty(self.FLUSH_BYTES, dtype=torch.int8, device=device)
        self._wait_ms = 1.0
        self.host_ms: list[float] = []

    def __call__(self, function: Callable[[], Any]) -> float:
        cuda = self._torch.cuda
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        self._flushed.zero_()
        cuda._sleep(int(self._wait_ms * self.CYCLES_PER_MS))
        begin.record()
        launching = time.perf_counter()
        function()
        self.host_ms.append(1e3 * (time.perf_counter() - launching))
        end.record()
        end.synchronize()
        self._wait_ms = min(max(self._wait_ms, 1.5 * self.host_ms[-1]), self.LONGEST_MS)
        return begin.elapsed_time(end)


def interleave(
    functions: Mapping[str, Callable[[], Any]], repetitions: int, *, turn_ms: float = 0.0, clock: Clock = wall_ms
) -> dict[str, Samples]:
    """Every function `repetitions` turns, one after the other, so that what disturbs the machine disturbs all of them.

    A turn's calls last `turn_ms` together, at least. Where that takes several, the first does not count: the caches
    and the allocator are still as the function before has left them, and nobody runs attention once.
    """
    for function in functions.values():
        function()  # compiles
    turns: dict[str, list[tuple[float, ...]]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            calls = turn(function, turn_ms, clock)
            turns[name].append(calls[1:] or calls)
    return {name: Samples(tuple(map(statistics.median, made)), tuple(made)) for name, made in turns.items()}


def turn(function: Callable[[], Any], turn_ms: float, clock: Clock = wall_ms) -> tuple[float, ...]:
    """Calls that last `turn_ms` together, at least."""
    calls: list[float] = []
    left = turn_ms
    while not calls or left > 0:
        calls.append(clock(function))
        left -= calls[-1]
    return tuple(calls)


@dataclasses.dataclass(frozen=True)
class Enqueued:
    """A call in two, on a device that computes in order while the host goes on.

    Attributes:
      begin: enqueues the work.
      wait: what `begin` returned -> the same, when it is there.
    """

    begin: Callable[[], Any]
    wait: Callable[[Any], Any]

    def __call__(self) -> Any:
        return self.wait(self.begin())


def row(function: Enqueued, turn_ms: float) -> tuple[float, ...]:
    """A call alone, then as many in a row as last `turn_ms` together, about, each with the row's mean.

        host    begin begin begin ... wait
        device    [kernels][kernels] ... [kernels]

    So a call's time is not that of launching it and of waiting, unless launching takes longer than computing.
    """
    alone = wall_ms(function)
    count = max(1, round(turn_ms / alone))

    def calls() -> None:
        for _ in range(count - 1):
            function.begin()
        function()

    return (alone, *[wall_ms(calls) / count] * count)


def ratio(numerator: Samples, denominator: Samples) -> float:
    """The median over the rounds of one interleaved measurement: each round is compared with itself."""
    return statistics.median(a / b for a, b in zip(numerator.ms, denominator.ms, strict=True))
