"""Poset tiling (paper, section 5.2): the fewest tiles that cover the spans of a row tile.

Tiles are anchored at the first column that no tile covers yet, not on a fixed grid, and go from left to right:

    component 0      [######)                     chain: components of one stride and residue, by their first column
    component 1           [##)      [#####)
    tiles            |---------|   |---------|    a tile that meets several components serves them all

A tile of a later component whose columns are all covered by an earlier tile is never placed. Along one component the
tiles of a row tile are three contiguous phases: HEAD (the left edge, masked), FULL (no mask), TAIL (the right edge,
masked). Which comparisons a masked phase needs is known when the plan is made; it is a short tuple of `Test`s.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import numpy as np

from splat.acsr import NOWHERE
from splat.geometry import Spans
from splat.pattern.core import Array, array_namespace


class Phase(enum.Enum):
    """Where along a component a tile lies."""

    HEAD = "head"
    FULL = "full"
    TAIL = "tail"


@dataclasses.dataclass(frozen=True)
class Test:
    """A masked tile keeps pairs with `lower <= x` and/or `x < upper` of this component. Several tests: any holds."""

    component: int
    lower: bool
    upper: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """The tiles along one component: per row tile (int32 [tiles]) where they begin and how many each phase has.

    Tile t of a row tile covers lattice columns `begin + t*block_kv + [0, block_kv)`, columns `residue + stride * x`.

    Attributes:
      component, stride, block_kv: static.
      begin, num_head, num_full, num_tail, residue: int32 [row tiles].
      head_tests, tail_tests: what the masked phases compare, the same for all row tiles; empty: there is no such phase.
    """

    component: int
    stride: int
    block_kv: int
    begin: Array
    num_head: Array
    num_full: Array
    num_tail: Array
    residue: Array
    head_tests: tuple[Test, ...]
    tail_tests: tuple[Test, ...]

    @property
    def num_tiles(self) -> Array:
        return self.num_head + self.num_full + self.num_tail

    @property
    def tests(self) -> tuple[Test, ...]:
        """What is right in every phase: for generators that emit one masked loop instead of three.

        A component other than the walk's own is compared on both sides: it may lie before one phase and after another.
        """
        merged: dict[int, Test] = {}
        for test in self.head_tests + self.tail_tests:
            known = merged.get(test.component, test)
            both = test.component != self.component
            merged[test.component] = Test(
                test.component, known.lower or test.lower or both, known.upper or test.upper or both
            )
        return tuple(merged[c] for c in sorted(merged))


def cover(components: Sequence[int], strides: Sequence[int], spans: Sequence[Spans], block_kv: int) -> list[Walk]:
    """Walks that cover the spans of all `components` (indices; strides and spans in the same order)."""
    walks: list[Walk] = []
    for chain in chains(strides, spans):
        walks += _cover_chain([components[n] for n in chain], strides[chain[0]], [spans[n] for n in chain], block_kv)
    return sorted(walks, key=lambda walk: walk.component)


def chains(strides: Sequence[int], spans: Sequence[Spans]) -> list[list[int]]:
    """Components that can share tiles, by number: one stride, one residue in a row tile, first columns in one order."""

    def first(n: int) -> float:
        here = spans[n].x0[spans[n].x0 < NOWHERE]
        return float(here.mean()) if here.size else 0.0

    if not all(isinstance(s.x0, np.ndarray) for s in spans):
        return [[n] for n in range(len(spans))]
    found: list[tuple[list[int], np.ndarray, np.ndarray]] = []  # members, last x0, residue (-1: any) per row tile
    for n in sorted(range(len(spans)), key=lambda n: (strides[n], first(n))):
        x0, here = spans[n].x0, spans[n].x3 > spans[n].x0
        residue = np.where(here, spans[n].residue, -1)
        for k, (members, last, common) in enumerate(found):
            agree = (common == residue) | (common < 0) | (residue < 0)
            if strides[members[0]] == strides[n] and bool(((x0 >= last) & agree)[here].all()):
                found[k] = ([*members, n], np.where(here, x0, last), np.maximum(common, residue))
                break
        else:
            found.append(([n], np.where(here, x0, -NOWHERE), residue))
    return [members for members, *_ in found]


def count_tiles(chain: Sequence[Spans], block_kv: np.ndarray) -> np.ndarray:
    """How many tiles cover a chain's spans, for each of several widths; static numbers only."""
    if len(chain) == 1:
        return np.array([(-(-chain[0].width // width)).sum() for width in block_kv])
    widths = block_kv[:, None]
    covered, count = np.full((widths.size, chain[0].x0.size), -NOWHERE, np.int64), np.zeros(widths.size, np.int64)
    for span in chain:
        begin, total = _place(span, covered, widths)
        covered = np.where(total > 0, begin + total * widths, covered)
        count += total.sum(axis=1)
    return count


def _place(span: Spans, covered: Array, block_kv: Any) -> tuple[Array, Array]:
    """Where a component's tiles begin, and how many there are: what lies before `covered` has some already."""
    xp = array_namespace(span.x0)
    here = span.x3 > span.x0
    begin = xp.where(here, xp.maximum(covered, span.x0), 0)
    return begin, xp.where(here, xp.maximum(-((begin - span.x3) // block_kv), 0), 0)


def _cover_chain(members: list[int], stride: int, spans: list[Spans], block_kv: int) -> list[Walk]:
    xp = array_namespace(spans[0].x0)
    covered = xp.full_like(spans[0].x0, -NOWHERE)
    walks = []
    for n, span in enumerate(spans):
        begin, total = _place(span, covered, block_kv)
        head = xp.clip(-((begin - span.x1) // block_kv), 0, total)
        full_begin = begin + head * block_kv
        full = xp.clip((span.x2 - full_begin) // block_kv, 0, total - head)
        tail = total - head - full
        end = begin + total * block_kv
        covered = xp.where(total > 0, xp.maximum(covered, end), covered)
        tail_begin = full_begin + full * block_kv
        head_tests = _tests(members[n:], spans[n:], begin, full_begin, head > 0)
        tail_tests = _tests(members[n:], spans[n:], tail_begin, end, tail > 0)
        walks.append(Walk(members[n], stride, block_kv, begin, head, full, tail, span.residue, head_tests, tail_tests))
    return walks


def _tests(members: list[int], spans: list[Spans], begin: Array, end: Array, some: Array) -> tuple[Test, ...]:
    """The comparisons that a phase over [begin, end) needs in `some` row tiles; its own component is the first."""
    if not isinstance(some, np.ndarray):
        return tuple(Test(member, True, True) for member in members)
    if not some.any():
        return ()
    tests = []
    for member, span in zip(members, spans, strict=True):
        here = some & (span.x3 > span.x0)
        if member != members[0] and not (here & (end > span.x0) & (begin < span.x3)).any():
            continue
        # Not only where they meet: a lower bound alone also holds right of the component, an upper bound alone left.
        lower, upper = bool((here & (begin < span.x1)).any()), bool((here & (end > span.x2)).any())
        tests.append(Test(member, lower or not upper, upper))
    return tuple(tests)
