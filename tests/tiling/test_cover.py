"""Walks: the tiles of every phase cover the spans, each column once, and full tiles need no mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import splat
from splat.acsr import ACSR, Component, build, build_transposed
from splat.geometry import align_by_step, analyze, is_aligned
from splat.pattern.core import ceil_div
from splat.tiling import Phase, Walk, chains, count_tiles, cover
from splat.tiling import Test as Comparison
from tests.strategies import Case, cases, more


def cover_all(acsr: ACSR, step: int, block_q: int, block_kv: int) -> tuple[list[int], list[Walk], np.ndarray]:
    """The components that are lattices under the grouping, their walks, and the grouping's rows."""
    tiles = align_by_step(acsr.shape[0], step, block_q)
    members = [n for n, one in enumerate(acsr.components) if is_aligned(one, tiles)]
    components = [acsr.components[n] for n in members]
    spans = [analyze(one, tiles) for one in components]
    return members, cover(members, [one.stride for one in components], spans, block_kv), tiles.rows


def tiles_of(walk: Walk, tile: int) -> list[tuple[Phase, np.ndarray]]:
    """The phase and the columns of each tile that a walk places for a row tile, left to right."""
    phases = [phase for phase in Phase for _ in range(int(getattr(walk, f"num_{phase.value}")[tile]))]
    first = int(walk.begin[tile]) + walk.block_kv * np.arange(len(phases))
    return [
        (phase, int(walk.residue[tile]) + walk.stride * (x + np.arange(walk.block_kv)))
        for phase, x in zip(phases, first, strict=True)
    ]


def allows(tests: tuple[Comparison, ...], acsr: ACSR, row: int, x: int) -> bool:
    """What a masked tile keeps at lattice column x."""
    for test in tests:
        lower, upper = acsr.components[test.component].bounds
        if (not test.lower or lower[row] <= x) and (not test.upper or x < upper[row]):
            return True
    return False


@more(6)
@given(
    cases(max_len=40, depth=2),
    st.booleans(),
    st.integers(1, 8),
    st.sampled_from([1, 2, 4, 8, 32]),
    st.sampled_from([1, 2, 3, 4, 8, 32, 64]),
)
def test_walks_cover_every_pair_once(case: Case, by_column: bool, step: int, block_q: int, block_kv: int) -> None:
    """By each phase's own tests, and by `Walk.tests`, which are right in all of them."""
    acsr = (build_transposed if by_column else build)(case.pattern, case.q_len, case.kv_len, case.query_offset)
    check_cover(acsr, step, block_q, block_kv)


@st.composite
def neighbours(draw: Any) -> ACSR:
    """Two to four runs a row, side by side in one residue, in any order: components that share tiles where they can."""
    rows, runs = draw(st.integers(1, 10)), draw(st.integers(2, 4))
    stride, reach = draw(st.sampled_from([1, 1, 3])), draw(st.sampled_from([6, 10, 16, 40]))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    edges = np.sort(rng.integers(0, reach, (rows, 2 * runs)), axis=1)
    edges[rng.random(edges.shape) < 0.3] = reach // 2  # several rows begin or end at the same place, and runs touch
    edges = np.sort(edges, axis=1).astype(np.int32)
    start, count = edges[:, ::2], np.diff(edges)[:, ::2]
    count = np.where(rng.random(count.shape) < draw(st.sampled_from([0, 0.4])), 0, count)
    if draw(st.booleans()):  # each row has its own order of components
        order = rng.permuted(np.tile(np.arange(runs), (rows, 1)), axis=1)
        start, count = np.take_along_axis(start, order, 1), np.take_along_axis(count, order, 1)
    components = [Component(stride, stride * start[:, n], count[:, n].astype(np.int32)) for n in range(runs)]
    return ACSR((rows, stride * reach), tuple(components))


@more(12)
@given(neighbours(), st.sampled_from([1, 2, 4, 8, 32]), st.sampled_from([1, 2, 3, 4, 5, 8, 32]))
def test_neighbours_cover_every_pair_once(acsr: ACSR, block_q: int, block_kv: int) -> None:
    acsr.validate()
    check_cover(acsr, 1, block_q, block_kv)


def runs_of(*rows: dict[int, tuple[int, int]], length: int) -> ACSR:
    """Rows as {component: (start, stop)}, of stride 1."""
    ends = np.array([[row.get(n, (0, 0)) for n in range(max(map(max, rows)) + 1)] for row in rows], np.int32)
    components = [Component(1, ends[:, n, 0], ends[:, n, 1] - ends[:, n, 0]) for n in range(ends.shape[1])]
    return ACSR((len(rows), length), tuple(components))


def test_a_component_before_one_phase_and_not_in_the_next() -> None:
    """Component 1 ends where the second tile begins: without its upper bound a single loop would keep what follows."""
    acsr = runs_of({0: (0, 2), 1: (2, 4)}, {0: (4, 6), 1: (3, 4)}, length=8)
    _, walks, _ = cover_all(acsr, 1, 2, 4)
    assert [walk.num_tiles.tolist() for walk in walks] == [[2], [0]]
    check_cover(acsr, 1, 2, 4)


def test_a_component_that_fills_a_phase_in_one_row_tile_only() -> None:
    """Where component 2 is, it needs no comparison; the other row tile does not have it."""
    acsr = runs_of(
        {0: (0, 6), 1: (10, 12), 2: (6, 10)},
        {0: (0, 3), 1: (3, 5), 2: (6, 10)},
        {1: (0, 3)},
        {1: (7, 9)},
        length=12,
    )
    check_cover(acsr, 1, 2, 2)


@given(neighbours(), st.sampled_from([1, 2, 4, 8]))
def test_tiles_are_counted_as_they_are_placed(acsr: ACSR, block_q: int) -> None:
    tiles, widths = align_by_step(acsr.shape[0], 1, block_q), [1, 2, 3, 5, 8, 32]
    strides, spans = [one.stride for one in acsr.components], [analyze(one, tiles) for one in acsr.components]
    counted = np.sum([count_tiles([spans[n] for n in one], np.array(widths)) for one in chains(strides, spans)], axis=0)
    for width, count in zip(widths, counted, strict=True):
        assert count == sum(int(walk.num_tiles.sum()) for walk in cover(range(len(spans)), strides, spans, width))


def check_cover(acsr: ACSR, step: int, block_q: int, block_kv: int) -> None:
    members, walks, rows = cover_all(acsr, step, block_q, block_kv)
    assert [walk.component for walk in walks] == members
    expected = ACSR(acsr.shape, tuple(acsr.components[n] for n in members)).to_dense()
    for one_loop in (False, True):
        kept = np.zeros(acsr.shape, int)
        for walk in walks:
            assert walk.block_kv == block_kv
            assert walk.stride == acsr.components[walk.component].stride
            for n, tile in enumerate(rows):
                for phase, columns in tiles_of(walk, n):
                    tests = {Phase.HEAD: walk.head_tests, Phase.FULL: (), Phase.TAIL: walk.tail_tests}[phase]
                    tests = walk.tests if one_loop else tests
                    assert tests or phase is Phase.FULL or one_loop
                    for row in tile[tile < acsr.shape[0]]:
                        for column in columns:
                            if not tests or allows(tests, acsr, row, (column - walk.residue[n]) // walk.stride):
                                kept[row, column] += 1
        np.testing.assert_array_equal(kept, expected)


@more(2)
@given(cases(max_len=40, depth=2), st.sampled_from([4, 8, 16]), st.sampled_from([4, 8, 16]))
def test_few_tiles_are_placed(case: Case, block_q: int, block_kv: int) -> None:
    """Never more than the spans need one by one, and no two tiles of one walk overlap."""
    acsr = build(case.pattern, case.q_len, case.kv_len, case.query_offset)
    members, walks, _ = cover_all(acsr, 1, block_q, block_kv)
    tiles = align_by_step(acsr.shape[0], 1, block_q)
    for walk, n in zip(walks, members, strict=True):
        width = analyze(acsr.components[n], tiles).width
        assert (walk.num_tiles <= ceil_div(width, block_kv)).all()
        assert (walk.num_head >= 0).all()
        assert (walk.num_full >= 0).all()
        assert (walk.num_tail >= 0).all()


def test_tiles_start_where_the_span_does() -> None:
    """Not on a fixed grid: a window of 17 columns in row tiles of 8 has spans of 24, three tiles and not four."""
    _, (walk,), _ = cover_all(build(splat.window(8), 64, 64), 1, 8, 8)
    assert walk.begin.tolist() == [0, 0, 8, 16, 24, 32, 40, 48]
    assert walk.num_tiles.tolist() == [2, 3, 3, 3, 3, 3, 3, 2]
    _, (walk,), _ = cover_all(build(splat.window(5), 64, 64), 1, 8, 9)
    assert walk.begin.tolist() == [0, 3, 11, 19, 27, 35, 43, 51]
    assert walk.num_tiles.max() == 2


def test_a_tile_serves_all_components_that_it_meets() -> None:
    """The sink's tile holds the window's first columns too: the window's own tiles begin behind it."""
    _, (window, sink), _ = cover_all(build(splat.causal() & splat.window(20) | splat.sink(2), 64, 64), 1, 16, 16)
    assert sink.num_tiles.tolist() == [0, 1, 1, 1]  # the first row tile's window has the sink's columns
    assert sink.begin.tolist() == [0, 0, 0, 0]
    assert window.begin.tolist() == [0, 16, 16, 28]
    assert window.num_tiles.tolist() == [1, 1, 2, 3]
    assert {test.component for test in sink.tests} == {0, 1}
    assert {test.component for test in window.tests} == {0}


@pytest.mark.parametrize(
    ("text", "step", "phases"),
    [
        ("full()", 1, (0, 16, 0)),
        ("strided(4)", 4, (0, 4, 0)),
        ("blocked(16)", 1, (0, 4, 0)),
        ("causal()", 1, (0, 6, 4)),
        ("~causal()", 1, (4, 3, 3)),
        ("window(16)", 1, (3, 4, 3)),
        ("sink(0)", 1, (0, 0, 0)),
    ],
)
def test_phases(text: str, step: int, phases: tuple[int, int, int]) -> None:
    """Full tiles are known to be full: they need no comparison."""
    _, walks, _ = cover_all(build(splat.parse(text), 64, 64), step, 16, 16)
    found = [sum(int(getattr(walk, f"num_{phase.value}").sum()) for walk in walks) for phase in Phase]
    assert tuple(found) == phases
    for walk in walks:
        assert bool(walk.head_tests) == bool(walk.num_head.any())
        assert bool(walk.tail_tests) == bool(walk.num_tail.any())


def test_only_the_edges_that_can_fail_are_compared() -> None:
    _, (walk,), _ = cover_all(build(splat.causal(), 64, 64), 1, 16, 16)
    assert walk.tail_tests == (Comparison(0, lower=False, upper=True),)
    _, (walk,), _ = cover_all(build(~splat.causal(), 64, 65), 1, 16, 16)
    assert walk.head_tests == (Comparison(0, lower=True, upper=False),)
    assert walk.tail_tests == ()
    assert walk.tests == walk.head_tests
