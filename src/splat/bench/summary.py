"""Numbers of a run that several outputs state: speed-ups, geometric means, shares of the peak, slopes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from splat.bench.record import Record, Run

#: The name under which the best of several sparse formats stands in tables.
BEST_SPARSE = "best sparse"


def first_of(run: Run, task: str) -> str | None:
    """The contender of SPLAT that has numbers for an operation."""
    return next((name for name in run.ours if any(name in record.measured for record in run.of_task(task))), None)


def rivals(run: Run, task: str) -> list[str]:
    """Who SPLAT is compared with: its other implementations or variants, peers, and the best sparse format."""
    first = first_of(run, task)
    named = [name for name in run.contenders if name != first and any(name in r.measured for r in run.of_task(task))]
    sparse = [name for name in named if name in run.sparse]
    return [*named, BEST_SPARSE] if len(sparse) > 1 else named


def short(rival: str, first: str | None) -> str:
    """A rival's name; of a variant of the first what is off."""
    return rival.removeprefix(f"{first} ")


def faster(run: Run, record: Record, rival: str) -> float | None:
    """How many times SPLAT is faster than the rival; None where one has no number."""
    first = first_of(run, record.task)
    if first is None:
        return None
    if rival != BEST_SPARSE:
        return record.faster(first, rival)
    found = [value for name in run.sparse if (value := record.faster(first, name)) is not None]
    return min(found, default=None)


def geomean(run: Run, task: str, rival: str) -> tuple[float, int] | None:
    """(geometric mean of the speed-ups over all cases that both have, how many); None where there is none."""
    values = [value for record in run.of_task(task) if (value := faster(run, record, rival)) is not None]
    return (statistics.geometric_mean(values), len(values)) if values else None


def slope(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """Of log value over log length, least squares: 1 is linear, 2 quadratic. None for fewer than two lengths."""
    if len(set(lengths)) < 2 or min(values) <= 0:
        return None
    return statistics.linear_regression(list(map(math.log, lengths)), list(map(math.log, values))).slope


def curves(
    run: Run, task: str, value: Callable[[Record, str], float | None]
) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(contender, case) -> [(length, value)], for cases measured at several lengths."""
    out: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for record in run.of_task(task):
        for name in record.measured:
            found = value(record, name)
            if found is not None:
                out.setdefault((name, record.case), []).append((record.q_len, found))
    return {key: sorted(points) for key, points in out.items() if len({length for length, _ in points}) > 1}


def time_ms(record: Record, name: str) -> float | None:
    return record.measured[name].median_ms


def memory_bytes(record: Record, name: str) -> float | None:
    return record.measured[name].peak_bytes or None
