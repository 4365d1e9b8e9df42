"""Planning holds O(rows), for every pattern there is."""

from __future__ import annotations

import pytest

import splat
from splat.bench import cases
from splat.bench.cases import Case
from splat.bench.memory import traced_peak_bytes
from splat.planning import plan as planner

Q_LEN = 16384

#: A row's start and count of one component are 8. A mask would be 2,048 in bits, and column indices of a window 2,052.
MOST_BYTES_PER_ROW = 160


@pytest.mark.parametrize("case", cases.of("vocabulary", "sas"), ids=lambda case: case.name)
def test_peak_bytes_per_row(case: Case) -> None:
    for pattern in case.patterns(Q_LEN):
        text = repr(pattern)
        planner._remembered.clear()  # nothing made by an earlier test
        peak = traced_peak_bytes(lambda text=text: str(splat.plan(text, Q_LEN)))
        assert peak < MOST_BYTES_PER_ROW * Q_LEN
