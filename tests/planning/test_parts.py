"""Into how many parts a launch is divided: from numbers that are known before it runs."""

from __future__ import annotations

import itertools

import pytest

from splat.planning import TARGETS, parts_of
from splat.planning.parts import LEAST_TILES, MOST_PARTS, PER_UNIT


@pytest.mark.parametrize("units", sorted({target.units for target in TARGETS.values()}))
def test_parts_fill_the_device_and_no_more(units: int) -> None:
    """Results of parts take memory: that of two row tiles a multiprocessor at most."""
    for programs, tiles in itertools.product((1, 2, 8, 31, 32, 64, units - 1), (16, 100, 2048, 1 << 20)):
        parts = parts_of(programs, tiles, units, 2)
        assert 1 < parts <= min(tiles // LEAST_TILES, MOST_PARTS)
        assert programs * parts <= PER_UNIT * units
        assert programs * parts >= units or parts in (tiles // LEAST_TILES, MOST_PARTS)


def test_what_is_not_divided() -> None:
    """Enough programs, none at all, few tiles; the interpreter, which has one unit."""
    assert parts_of(132, 2048, 132, 2) == 1
    assert parts_of(0, 2048, 132, 2) == 1
    assert parts_of(32, 2 * LEAST_TILES - 1, 132, 2) == 1
    assert parts_of(32, 0, 132, 2) == 1
    assert parts_of(1, 2048, 1, 2) == 1


def test_parts_that_wait_for_each_other_are_not_made() -> None:
    """Where a multiprocessor runs one program at a time, two halves that fill it twice take as long as the whole."""
    assert [parts_of(programs, 2048, 132, 1) for programs in (66, 88, 89, 128)] == [4, 3, 1, 1]
    assert [parts_of(programs, 2048, 132, 2) for programs in (66, 88, 89, 128)] == [4, 3, 2, 2]
    assert parts_of(100, 2 * LEAST_TILES, 132, 1) == 1
