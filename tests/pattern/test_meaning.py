"""Every pattern is exactly the pairs of its definition, seen by rows and by columns, at any size and offset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import splat
from splat.acsr import build_transposed
from splat.errors import PatternError
from splat.pattern import Axis, Pattern, Run
from tests import strategies as meaning
from tests.strategies import PRIMITIVES, Case, Predicate, cases, more

SIZES = [(1, 1, 0), (7, 7, 0), (24, 24, 0), (9, 31, 0), (31, 9, 0), (6, 20, 14), (13, 13, 29)]


def pairs(runs: Sequence[Run], lines: int, cross: int, origin: int) -> np.ndarray[Any, Any]:
    """How often runs name each (line, cross position - origin), int [lines, cross]; IndexError outside."""
    times = np.zeros((lines, cross), int)
    for run in runs:
        for line in range(lines):
            for t in range(int(run.count[line])):
                at = int(run.start[line]) + run.stride * t - origin
                assert 0 <= at < cross, f"line {line} of {run} leaves [0, {cross})"
                times[line, at] += 1
    return times


def check(case: Case) -> None:
    """By rows and by columns: the meaning, each pair once, well-formed runs."""
    mask = case.mask
    np.testing.assert_array_equal(case.pattern.to_dense(case.q_len, case.kv_len, query_offset=case.query_offset), mask)
    by_row = case.pattern.runs(case.rows, case.cols)
    np.testing.assert_array_equal(pairs(by_row, case.q_len, case.kv_len, 0), mask)
    by_column = case.pattern.column_runs(case.cols, case.rows)
    np.testing.assert_array_equal(pairs(by_column, case.kv_len, case.q_len, case.query_offset), mask.T)
    for runs, lines in ((by_row, case.rows), (by_column, case.cols)):
        for run in runs:
            assert run.stride >= 1
            assert run.start.dtype == run.count.dtype == np.int32
            assert run.start.shape == run.count.shape == (lines.length,)
            assert run.count.min() >= 0
            assert_line_step(run, lines.length)


def assert_line_step(run: Run, lines: int) -> None:
    """Lines with elements that are equal modulo `line_step` share `start mod stride`."""
    if run.line_step is None or run.stride == 1:
        return
    residues: dict[int, set[int]] = {}
    for line in np.flatnonzero(run.count > 0):
        residues.setdefault(int(line) % run.line_step, set()).add(int(run.start[line]) % run.stride)
    assert all(len(found) == 1 for found in residues.values()), (run, lines)


IDS = [0, 0, 0, 1, 1, -1, -1, 0, 2, 2, 2, 2, -3, 1, 5] + [7] * 30 + [0] * 6
VOCABULARY: list[tuple[Pattern, Predicate]] = [
    (splat.full(), meaning.full()),
    (splat.causal(), meaning.causal()),
    (splat.window(0), meaning.window(0, 0)),
    (splat.window(3), meaning.window(3, 3)),
    (splat.window(2, 5), meaning.window(2, 5)),
    (splat.window(4, 0), meaning.window(4, 0)),
    (splat.window(99, 1), meaning.window(99, 1)),
    (splat.sliding_window(1), meaning.sliding_window(1)),
    (splat.sliding_window(6), meaning.sliding_window(6)),
    (splat.dilated_window(2, 1, 3), meaning.dilated_window(2, 1, 3)),
    (splat.dilated_window(0, 2, 7), meaning.dilated_window(0, 2, 7)),
    (splat.dilated_window(3, 3, 1), meaning.dilated_window(3, 3, 1)),
    (splat.strided(1), meaning.strided(1)),
    (splat.strided(5), meaning.strided(5)),
    (splat.strided(64), meaning.strided(64)),
    (splat.lattice_columns(4), meaning.lattice_columns(4, 0)),
    (splat.lattice_columns(6, 5), meaning.lattice_columns(6, 5)),
    (splat.lattice_columns(6, -1), meaning.lattice_columns(6, -1)),
    (splat.lattice_columns(50, 49), meaning.lattice_columns(50, 49)),
    (splat.blocked(4), meaning.blocked(4, 0, 0)),
    (splat.blocked(4, 1), meaning.blocked(4, 1, 0)),
    (splat.blocked(5, 1, 2), meaning.blocked(5, 1, 2)),
    (splat.blocked(64), meaning.blocked(64, 0, 0)),
    (splat.sink(0), meaning.sink(0)),
    (splat.sink(4), meaning.sink(4)),
    (splat.sink(1000), meaning.sink(1000)),
    (splat.global_columns(3), meaning.sink(3)),
    (splat.global_rows(0), meaning.global_rows(0)),
    (splat.global_rows(8), meaning.global_rows(8)),
    (splat.global_tokens(0), meaning.global_tokens(0)),
    (splat.global_tokens(3), meaning.global_tokens(3)),
    (splat.segments(IDS), meaning.segments(IDS)),
    (splat.segments([-1] * 60), meaning.segments([-1] * 60)),
    (splat.segments(lengths=[3, 0, 6, 20]), meaning.segment_lengths([3, 0, 6, 20], 60)),
    (splat.segments(lengths=[]), meaning.segment_lengths([], 60)),
    (splat.neighborhood(60, 7), meaning.neighborhood((60,), (7,), (1,), (False,))),
    (splat.neighborhood((6, 10), (3, 5)), meaning.neighborhood((6, 10), (3, 5), (1, 1), (False, False))),
    (
        splat.neighborhood((6, 10), (3, 4), (1, 2), (True, False)),
        meaning.neighborhood((6, 10), (3, 4), (1, 2), (True, False)),
    ),
    (
        splat.neighborhood((4, 5, 6), (2, 1, 3), causal=True),
        meaning.neighborhood((4, 5, 6), (2, 1, 3), (1, 1, 1), (True, True, True)),
    ),
]


@pytest.mark.parametrize(("pattern", "predicate"), VOCABULARY, ids=[repr(p)[:60] for p, _ in VOCABULARY])
def test_vocabulary(pattern: Pattern, predicate: Predicate) -> None:
    for q_len, kv_len, offset in SIZES:
        check(Case(pattern, q_len, kv_len, offset, predicate))


def test_vocabulary_is_complete() -> None:
    """Random patterns draw from every constructor that text may name."""
    from splat.pattern.parse import CONSTRUCTORS

    drawn = {name.partition("(")[0] for name in PRIMITIVES}
    assert drawn - {"from_mask"} == set(CONSTRUCTORS) - {"per_head"}


@pytest.mark.parametrize("name", PRIMITIVES)
@given(data=st.data())
def test_primitive(name: str, data: st.DataObject) -> None:
    check(data.draw(cases(depth=0, names=(name,))))


@more(4)
@given(cases(max_len=32))
def test_composition(case: Case) -> None:
    check(case)


def test_grid_that_its_dilation_does_not_divide() -> None:
    arguments = (6, 9), (3, 3), (1, 2), (False, False)
    check(Case(splat.neighborhood(*arguments), 54, 54, 0, meaning.neighborhood(*arguments)))


def test_grid_shorter_than_two_kernels() -> None:
    arguments = (5, 4), (3, 3), (1, 1), (False, False)
    check(Case(splat.neighborhood(*arguments), 20, 20, 0, meaning.neighborhood(*arguments)))


PICTURES = [
    ("causal()", 4, 5, 0, ["#....", "##...", "###..", "####."]),
    ("causal()", 2, 5, 2, ["###..", "####."]),
    ("window(1, 2)", 4, 4, 0, ["###.", "####", ".###", "..##"]),
    ("sliding_window(2)", 4, 4, 0, ["#...", "##..", ".##.", "..##"]),
    ("dilated_window(1, 1, 2)", 5, 5, 0, ["#.#..", ".#.#.", "#.#.#", ".#.#.", "..#.#"]),
    ("strided(3)", 4, 7, 1, [".#..#..", "..#..#.", "#..#..#", ".#..#.."]),
    ("lattice_columns(3, 2)", 2, 7, 0, ["..#..#.", "..#..#."]),
    ("blocked(2, 1, 0)", 5, 6, 0, ["##....", "##....", "####..", "####..", "..####"]),
    ("sink(2)", 2, 4, 0, ["##..", "##.."]),
    ("global_rows(1)", 3, 3, 0, ["###", "...", "..."]),
    ("global_tokens(1)", 3, 3, 0, ["###", "#..", "#.."]),
    ("segments([0, 0, -1, 0, 2])", 5, 5, 0, ["##.#.", "##.#.", ".....", "##.#.", "....#"]),
    ("segments(lengths=[2, 1])", 4, 4, 0, ["##..", "##..", "..#.", "...."]),
    ("neighborhood(5, 3)", 5, 5, 0, ["###..", "###..", ".###.", "..###", "..###"]),
    ("neighborhood(5, 2, causal=True)", 5, 5, 0, ["#....", "##...", ".##..", "..##.", "...##"]),
    ("neighborhood(6, 2, 3)", 6, 6, 0, ["#..#..", ".#..#.", "..#..#", "#..#..", ".#..#.", "..#..#"]),
    ("from_runs([0, 3], 2, [2, 9], kv_len=6)", 2, 6, 0, ["#.#...", "...#.#"]),
    ("causal() & window(1) | sink(1)", 4, 4, 0, ["#...", "##..", "###.", "#.##"]),
    ("window(1).T - causal()", 3, 3, 0, [".#.", "..#", "..."]),
]


@pytest.mark.parametrize(("text", "q_len", "kv_len", "offset", "picture"), PICTURES)
def test_picture(text: str, q_len: int, kv_len: int, offset: int, picture: list[str]) -> None:
    mask = splat.parse(text).to_dense(q_len, kv_len, query_offset=offset)
    assert ["".join(".#"[int(one)] for one in row) for row in mask] == picture


def test_random_blocks_chooses_distinct_blocks() -> None:
    mask = splat.random_blocks(4, 3, seed=7).to_dense(40)
    blocks = mask.reshape(10, 4, 10, 4)
    assert (blocks.any(axis=(1, 3)) == blocks.all(axis=(1, 3))).all()
    assert (blocks.any(axis=(1, 3)).sum(axis=1) == 3).all()
    assert splat.random_blocks(4, 99, seed=7).to_dense(40).all()
    assert not splat.random_blocks(4, 0, seed=7).to_dense(40).any()


@pytest.mark.parametrize("offset", [-1, -4, -6, -8, -40])
def test_random_blocks_before_the_first_position(offset: int) -> None:
    for pattern in (splat.random_blocks(4, 2, 0), splat.random_blocks(4, 2, 0).T):
        mask = pattern.to_dense(16, query_offset=offset)
        transposed = build_transposed(pattern, 16, 16, offset)
        np.testing.assert_array_equal(transposed.to_dense(), mask.T)


def test_random_blocks_is_spread_evenly() -> None:
    """Every block column is chosen about equally often, and seeds differ."""
    counts = splat.random_blocks(1, 8, seed=0).to_dense(2048, 64).sum(axis=0)
    assert counts.min() > 2048 * 8 / 64 * 0.75
    assert counts.max() < 2048 * 8 / 64 * 1.25
    assert (splat.random_blocks(1, 8, 0).to_dense(64) != splat.random_blocks(1, 8, 1).to_dense(64)).any()


def test_random_blocks_of_this_version() -> None:
    """The choice is pinned: a model trained with it must find it again."""
    first = splat.random_blocks(1, 2, seed=3).to_dense(6, 10)
    assert [np.flatnonzero(row).tolist() for row in first] == [[3, 7], [2, 5], [0, 1], [1, 7], [2, 9], [1, 4]]


def test_sliding_window_counts_the_query_itself() -> None:
    assert splat.sliding_window(5).to_dense(12)[8:].sum(axis=1).tolist() == [5] * 4
    assert (splat.sliding_window(5).to_dense(12) == (splat.causal() & splat.window(4)).to_dense(12)).all()


LARGEST: list[Any] = [
    (splat.window(2**30), meaning.full()),
    (splat.window(0, 2**30), meaning.window(0, 2**30)),
    (splat.sliding_window(2**30), meaning.causal()),
    (splat.dilated_window(2**30, 0, 1), meaning.causal()),
    (splat.dilated_window(2**30, 2**30, 3), meaning.strided(3)),
    (splat.dilated_window(1, 1, 2**30), meaning.window(0, 0)),
    (splat.strided(2**30), meaning.window(0, 0)),
    (splat.lattice_columns(2**30, -1), meaning.sink(0)),
    (splat.blocked(2**30), meaning.full()),
    (splat.blocked(1, 2**30, 2**30), meaning.full()),
    (splat.blocked(3, 0, 2**30), lambda i, j: j // 3 >= i // 3),
    (splat.sink(2**30), meaning.full()),
    (splat.global_rows(2**30), meaning.full()),
    pytest.param(
        splat.dilated_window(2**30, 2**30, 1),
        meaning.full(),
    ),
    pytest.param(
        splat.blocked(2**30, 1, 1),
        meaning.full(),
    ),
]


@pytest.mark.parametrize(("pattern", "predicate"), LARGEST)
def test_largest_arguments(pattern: Pattern, predicate: Predicate) -> None:
    """All that the constructors accept stays exact in 32 bits."""
    for offset in (0, 5, 2**30 - 9):
        check(Case(pattern, 9, 12, offset, predicate))
    check(Case(pattern & splat.causal(), 9, 12, 0, lambda i, j: predicate(i, j) & (j <= i)))


@pytest.mark.parametrize("position", [2**24 + 3, 2**30 - 40, 2**30 - 20])
def test_far_positions(position: int) -> None:
    """Positions are exact to the last of them."""
    for pattern, predicate in VOCABULARY:
        if not repr(pattern).startswith(("segments", "neighborhood")):
            check(Case(pattern, 20, 9, position, predicate))
    far = Axis(position, 20)
    assert [run.count.tolist() for run in splat.window(0).runs(far, far)] == [[1] * 20]
    assert sum(int(run.count.sum()) for run in (splat.strided(5) - splat.window(1)).runs(far, far)) == 80 - 20


def test_empty_axes() -> None:
    for pattern, _ in VOCABULARY:
        assert pattern.to_dense(0, 5).shape == (0, 5)
        assert not pattern.to_dense(5, 0).size
        assert (~pattern).to_dense(0, 0).shape == (0, 0)
        assert not any(run.count.any() for run in pattern.column_runs(Axis(0, 3), Axis(0, 0)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: splat.window(-1),
            "window: left must be in [0, 1073741824], but -1 was given. A side without limit is a large number; leave "
            "near keys out by a difference: window(9, 0) - window(2, 0).",
        ),
        (lambda: splat.window(3, -1), "window: right must be in [0, 1073741824], but -1 was given. A side without"),
        (lambda: splat.dilated_window(-1, 1, 2), "left must be in [0, 1073741824], but -1 was given. A side without"),
        (lambda: splat.dilated_window(1, -1, 2), "right must be in [0, 1073741824], but -1 was given. A side without"),
        (lambda: splat.window(1.5), "window: left must be an int, but 1.5 of type float was given"),  # type: ignore[arg-type]
        (lambda: splat.window(True), "window: left must be an int, but True of type bool"),
        (lambda: splat.window(1, -2), "window: right must be in"),
        (lambda: splat.window(2**30 + 1), "but 1073741825 was given"),
        (lambda: splat.sliding_window(0), "sliding_window: n must be in [1, "),
        (lambda: splat.dilated_window(1, 1, 0), "dilated_window: dilation must be in [1, "),
        (lambda: splat.strided(0), "strided: stride must be in [1, "),
        (lambda: splat.lattice_columns(0), "lattice_columns: stride must be in [1, "),
        (lambda: splat.blocked(0), "blocked: block must be in [1, "),
        (lambda: splat.blocked(1, -1), "blocked: before must be in [0, "),
        (lambda: splat.sink("4"), "sink: n must be an int, but '4' of type str"),  # type: ignore[arg-type]
        (lambda: splat.global_tokens(-1), "global_tokens: n must be in [0, "),
        (lambda: splat.random_blocks(4, 257, 0), "random_blocks: per_row must be in [0, 256], but 257"),
        (splat.segments, "lengths (one per document), but neither was given"),
        (lambda: splat.segments([0], lengths=[1]), "lengths (one per document), but both were given"),
        (lambda: splat.segments([0.5]), "ids must be integers of rank 1, but float64[1] was given"),
        (lambda: splat.segments([[0]]), "ids must be integers of rank 1, but int64[1, 1] was given"),
        (lambda: splat.segments(lengths=[3, -2]), "lengths must not be negative, but -2 was given"),
        (lambda: splat.window(np.array([3])), "window: left must be an int, but array([3]) of type ndarray was given"),  # type: ignore[arg-type]
        (lambda: splat.neighborhood((4, 4), 3, causal="no"), "causal must be True or False"),  # type: ignore[arg-type]
        (lambda: splat.per_head(splat.causal()), "per_head: patterns must be a list, one for each query head, but"),  # type: ignore[arg-type]
        (lambda: splat.per_head(3), "per_head: patterns must be a list, one for each query head, but 3 was given"),  # type: ignore[arg-type]
        (lambda: splat.neighborhood((2, 2, 2, 2), 1), "shape must have 1 to 3 dimensions"),
        (lambda: splat.neighborhood((4, 4), (1, 1, 1)), "does not fit shape (4, 4): give one value or 2"),
        (lambda: splat.neighborhood((8, 4), 3, 2), "kernel * dilation must not exceed the grid, but 3 * 2 > 4"),
    ],
)
def test_constructors_refuse(make: Callable[[], Pattern], message: str) -> None:
    with pytest.raises(PatternError) as caught:
        make()
    assert message in str(caught.value)


def test_grids_of_numpy_numbers() -> None:
    made = splat.neighborhood(np.array([8, 4]), np.array([3, 1]), np.array([2, 1]), np.array([True, False]))  # type: ignore[arg-type]
    assert made == splat.neighborhood((8, 4), (3, 1), (2, 1), (True, False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4.0,), "q_len must be an int, but 4.0 of type float was given"),
        ((-1,), "q_len must be in [0, 1073741824], but -1 was given"),
        ((4, 2**31), "1073741824], but 2147483648 was given"),
        ((4, 8, 2**31 - 5), "query_offset must be in [-1073741824, 1073741820], but 2147483643 was given"),
        ((4, 8, 1.7), "query_offset must be an int, but 1.7 of type float was given"),
        ((4, 8, "3"), "query_offset must be an int, but '3' of type str was given"),
        ((4, 8, True), "query_offset must be an int, but True of type bool was given"),
    ],
)
def test_positions_that_there_are_not(arguments: tuple[Any, ...], message: str) -> None:
    q_len, kv_len, offset = (*arguments, *(8, 0)[len(arguments) - 1 :])
    uses = [
        lambda: splat.build(splat.causal(), q_len, kv_len, offset),
        lambda: splat.causal().to_dense(q_len, kv_len, query_offset=offset),
        lambda: splat.plan(splat.causal(), q_len, kv_len, query_offset=offset),
    ]
    for use in uses:
        with pytest.raises(PatternError) as caught:
            use()
        assert message in str(caught.value)


def test_part_of_a_grid() -> None:
    """Fewer positions than the grid's are those of its beginning, or of a chunk."""
    whole = splat.neighborhood((8, 9), 3).to_dense(72)
    np.testing.assert_array_equal(splat.neighborhood((8, 9), 3).to_dense(64), whole[:64, :64])
    np.testing.assert_array_equal(splat.neighborhood((8, 9), 3).to_dense(8, 72, query_offset=64), whole[64:])
    for sizes in ((8, 73, 0), (8, 72, 65)):
        with pytest.raises(PatternError, match="has 72 positions, but the pattern is used up to position 73"):
            splat.neighborhood((8, 9), 3).to_dense(*sizes[:2], query_offset=sizes[2])


def test_too_few_positions_are_refused() -> None:
    with pytest.raises(PatternError, match="ids name 4 positions, but the pattern is used up to position 5"):
        splat.segments([0, 0, 1, 1]).to_dense(5)
    with pytest.raises(PatternError, match="has 12 positions, but the pattern is used up to position 13"):
        splat.neighborhood((3, 4), 3).to_dense(13)
