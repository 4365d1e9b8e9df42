"""Two runs compared: what has become slower beyond the noise of both."""

from __future__ import annotations

import dataclasses

from splat.bench.record import Measured, Run

#: What is slower by less than this share, or by less than so many milliseconds, is never called a regression.
LEAST_SHARE, LEAST_MS = 0.05, 0.02


@dataclasses.dataclass(frozen=True)
class Change:
    """One contender of SPLAT on one problem, then and now."""

    what: str
    contender: str
    before_ms: float
    now_ms: float
    noise: float
    apart: bool

    @property
    def ratio(self) -> float:
        """Above 1: slower than before."""
        return self.now_ms / self.before_ms

    @property
    def slower(self) -> bool:
        far = self.now_ms - self.before_ms > LEAST_MS
        return self.apart and far and self.ratio > 1 + max(LEAST_SHARE, self.noise)

    @property
    def faster(self) -> bool:
        far = self.before_ms - self.now_ms > LEAST_MS
        return self.apart and far and 1 / self.ratio > 1 + max(LEAST_SHARE, self.noise)

    def __str__(self) -> str:
        verdict = "SLOWER" if self.slower else "faster" if self.faster else "same"
        return (
            f"{verdict}: {self.what}, {self.contender}: {self.before_ms:.4g} -> {self.now_ms:.4g} ms "
            f"({self.ratio:.2f}x, noise {self.noise:.0%})"
        )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All changes; `unmatched` counts the records of this run that the baseline does not have."""

    changes: tuple[Change, ...]
    unmatched: int
    other_machine: str | None

    @property
    def regressions(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.slower)


def compare(before: Run, now: Run) -> Comparison:
    """SPLAT's contenders on every problem that both runs have.

    The noise is half the distance between the quartiles as a share of the median, of both runs added. Slower is what
    is slower by more than that and whose quartiles do not overlap with the earlier ones.
    """
    known = {record.key: record for record in before.records}
    changes, unmatched = [], 0
    for record in now.records:
        old = known.get(record.key)
        unmatched += old is None
        if old is None:
            continue
        what = f"{record.task}, {record.case}, {record.q_len:,}"
        changes += [
            _change(what, name, old.measured[name], record.measured[name])
            for name in now.ours
            if name in record.measured and name in old.measured
        ]
    then, today = before.machine.get("cpu"), now.machine.get("cpu")
    return Comparison(tuple(changes), unmatched, None if then == today else str(then))


def _change(what: str, name: str, before: Measured, now: Measured) -> Change:
    (low_before, high_before), (low_now, high_now) = before.quartiles_ms, now.quartiles_ms
    noise = (high_before - low_before) / 2 / before.median_ms + (high_now - low_now) / 2 / now.median_ms
    apart = low_now > high_before or high_now < low_before
    return Change(what, name, before.median_ms, now.median_ms, noise, apart)
