"""Two functions timed in turns on a machine that others use too."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from splat.bench import timing
from splat.bench.timing import Enqueued, Samples

Call = Callable[[], Any]

#: Between samples, so that threads of the last one that still wait for work have gone to sleep.
PAUSE_S = 0.003

LEAST_ROUNDS = 3

#: What the calls of a turn last together, at least. Where that takes several, the first does not count: the caches are
#: still as the function before has left them, threads sleep, and nobody runs attention once.
TURN_MS = 50.0


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The 25th and the 75th percentile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


@dataclasses.dataclass
class Foreign:
    """Share of the processors that other processes and other machines on the same host took meanwhile."""

    share: float = 0.0


@contextlib.contextmanager
def foreign() -> Iterator[Foreign]:
    """Measures it for the block; 0 where the system does not say."""
    result = Foreign()
    before, own, begin = _busy_s(), sum(os.times()[:4]), time.perf_counter()
    yield result
    wall = (time.perf_counter() - begin) * (os.cpu_count() or 1)
    taken = _busy_s() - before - (sum(os.times()[:4]) - own)
    result.share = max(taken / wall, 0.0)


def _busy_s() -> float:
    """Seconds of all processors that were not idle, those stolen by the host among them."""
    try:
        ticks = [int(n) for n in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]]
    except OSError:
        return 0.0
    idle = ticks[3] + ticks[4]
    return (sum(ticks[:8]) - idle) / os.sysconf("SC_CLK_TCK")


def waited_ms() -> float:
    """Milliseconds that this process's threads were ready to run, but had no processor; only grows, mostly.

    0 where the system does not say.
    """
    total = 0
    for path in glob.iglob("/proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            total += int(Path(path).read_text(encoding="ascii").split()[1])
    return total / 1e6


@dataclasses.dataclass(frozen=True)
class Sample:
    """Of a turn: the median call, how long its threads waited for a processor that others had, and the first call."""

    ms: float
    waited_ms: float
    first_ms: float = float("nan")

    @property
    def clean(self) -> bool:
        return self.waited_ms <= 0.04 * self.ms + 0.03


def sample(function: Call, pause_s: float = PAUSE_S, turn_ms: float = TURN_MS) -> Sample:
    """One turn, after a pause; of an enqueued function a row of calls."""
    time.sleep(pause_s)
    before = waited_ms()
    calls = timing.row(function, turn_ms) if isinstance(function, Enqueued) else timing.turn(function, turn_ms)
    waited = (waited_ms() - before) / len(calls)
    return Sample(statistics.median(calls[1:] or calls), waited, calls[0])


@dataclasses.dataclass(frozen=True)
class Turns:
    """Samples of several functions that took turns: sample n of each belongs to round n; some left early.

    What counts are clean samples of rounds in which all are clean, if there are `LEAST_ROUNDS`; else the clean ones of
    each function, if there are as many; else as many that waited least.
    """

    made: dict[str, list[Sample]]
    foreign: float

    @property
    def clean_rounds(self) -> list[int]:
        longest = max(map(len, self.made.values()))
        return [n for n in range(longest) if all(made[n].clean for made in self.made.values() if n < len(made))]

    @property
    def clean(self) -> str:
        """How many rounds were, of how many."""
        return f"{len(self.clean_rounds)}/{max(map(len, self.made.values()))}"

    def clean_of(self, name: str) -> str:
        """How many of one function's samples were, of how many."""
        return f"{sum(one.clean for one in self.made[name])}/{len(self.made[name])}"

    @functools.cached_property
    def samples(self) -> dict[str, Samples]:
        return {name: Samples(tuple(one.ms for one in self._counting(made))) for name, made in self.made.items()}

    def _counting(self, made: list[Sample]) -> list[Sample]:
        rounds = [n for n in self.clean_rounds if n < len(made)]
        clean = [made[n] for n in rounds] if len(rounds) >= LEAST_ROUNDS else [one for one in made if one.clean]
        return clean if len(clean) >= LEAST_ROUNDS else sorted(made, key=lambda one: one.waited_ms)[:LEAST_ROUNDS]

    def ratio(self, numerator: str, denominator: str) -> float:
        """Of the medians."""
        return self.samples[numerator].median_ms / self.samples[denominator].median_ms

    def spread(self, numerator: str, denominator: str) -> tuple[float, float]:
        """The quartiles of each round's ratio, over the rounds that count, or over all."""
        count = min(len(self.made[numerator]), len(self.made[denominator]))
        rounds = [n for n in self.clean_rounds if n < count]
        rounds = rounds if len(rounds) >= LEAST_ROUNDS else list(range(count))
        return quartiles(tuple(self.made[numerator][n].ms / self.made[denominator][n].ms for n in rounds))

    def to_json(self) -> dict[str, Any]:
        """All samples, those that do not count among them."""
        return {
            "ms": {name: [one.ms for one in made] for name, made in self.made.items()},
            "waited_ms": {name: [one.waited_ms for one in made] for name, made in self.made.items()},
            "first_ms": {name: [one.first_ms for one in made] for name, made in self.made.items()},
            "median_ms": {name: samples.median_ms for name, samples in self.samples.items()},
            "clean_rounds": self.clean_rounds,
            "foreign": self.foreign,
        }


def take_turns(
    functions: Mapping[str, Call],
    rounds: int,
    budget_s: float,
    turn_ms: float = TURN_MS,
    at_most: Mapping[str, int] = MappingProxyType({}),
    rest_s: Mapping[str, float] = MappingProxyType({}),
) -> Turns:
    """One turn of each function a round, until `rounds` of them are clean or the budget is spent.

    The functions have been called before. At least `LEAST_ROUNDS` are made, or `rounds` if that is less, and at most
    three times as many as are wanted. Functions in `at_most` leave after so many rounds: slow ones.
    After a turn of one in `rest_s` everyone waits: its threads go on for so long, looking for work.
    """
    made: dict[str, list[Sample]] = {name: [] for name in functions}
    clean = done = 0
    begin = time.perf_counter()
    with foreign() as others:
        while clean < rounds and done < 3 * rounds:
            if done >= min(LEAST_ROUNDS, rounds) and time.perf_counter() - begin > budget_s:
                break
            staying = {name: function for name, function in functions.items() if done < at_most.get(name, done + 1)}
            samples = {}
            for name, function in staying.items():
                samples[name] = sample(function, turn_ms=turn_ms)
                made[name].append(samples[name])
                time.sleep(rest_s.get(name, 0.0))
            clean += all(one.clean for one in samples.values())
            done += 1
    return Turns(made, others.share)
