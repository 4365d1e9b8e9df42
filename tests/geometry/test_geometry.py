"""Row tiles partition the rows; spans bound what a tile's rows touch, and their full part is full."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import splat
from splat.acsr import NOWHERE, Component, build, build_transposed
from splat.geometry import (
    RowTiles,
    Spans,
    align_by_step,
    align_rows_of,
    analyze,
    is_aligned,
    next_power_of_two,
)
from tests.strategies import Case, cases, more

BLOCKS = st.sampled_from([1, 2, 4, 8, 16, 64])


def rows_of(tiles: RowTiles) -> list[int]:
    """All rows that the tiles name, tile by tile, without padding."""
    return [int(row) for row in tiles.rows.reshape(-1) if row < tiles.num_rows]


@given(st.integers(1, 70), st.integers(1, 90), BLOCKS)
def test_tiles_by_step_partition_the_rows(num_rows: int, step: int, block_q: int) -> None:
    tiles = align_by_step(num_rows, step, block_q)
    assert tiles.rows.shape == (tiles.num_tiles, tiles.block_q)
    assert tiles.block_q <= block_q
    assert sorted(rows_of(tiles)) == list(range(num_rows))
    for tile in tiles.rows:
        inside = tile[tile < num_rows]
        assert len(set(inside % tiles.step)) <= 1
        assert (np.diff(inside) == tiles.step).all()
        assert (tile[len(inside) :] == num_rows).all(), "padding comes last"


@more(4)
@given(cases(max_len=40, depth=2), BLOCKS)
def test_rows_by_number_partition_the_rows_with_runs(case: Case, block_q: int) -> None:
    for one in build(case.pattern, case.q_len, case.kv_len, case.query_offset).components:
        if not one.count.any():
            continue
        tiles = align_rows_of(one, case.q_len, block_q)
        assert tiles.block_q <= block_q
        assert sorted(rows_of(tiles)) == np.flatnonzero(one.count).tolist()
        for tile in tiles.rows:
            inside = tile[tile < case.q_len]
            assert len(inside) > 0
            assert (np.diff(inside) > 0).all()
            assert len(set(one.start[inside] % one.stride)) == 1
        assert is_aligned(one, tiles)


@given(st.integers(1, 50), st.integers(1, 9), BLOCKS, st.booleans())
def test_reductions_over_tiles(num_rows: int, step: int, block_q: int, by_number: bool) -> None:
    values = np.random.default_rng(num_rows * step).integers(-50, 50, num_rows).astype(np.int32)
    tiles = align_by_step(num_rows, step, block_q)
    if by_number:
        tiles = RowTiles(num_rows, tiles.block_q, row_map=tiles.rows[tiles.rows.min(axis=1) < num_rows])
    expected = [values[tile[tile < num_rows]] for tile in tiles.rows]
    for index, members in enumerate(expected):
        if len(members):
            assert tiles.smallest(values)[index] == members.min()
            assert tiles.largest(values)[index] == members.max()
    assert tiles.smallest(values).shape == (tiles.num_tiles,)


def columns_of(one: Component, row: int) -> set[int]:
    return {int(one.start[row]) + one.stride * t for t in range(int(one.count[row]))}


def check_spans(one: Component, tiles: RowTiles, spans: Spans) -> None:
    """Bounds of all columns, and a full part that every row of the tile has."""
    for n, tile in enumerate(tiles.rows):
        rows = tile[tile < tiles.num_rows]
        if not len(rows):
            continue  # nothing but padding: `tests/planning/test_schedule.py` asks that it do no work
        x0, x1, x2, x3, residue = (int(values[n]) for values in (spans.x0, spans.x1, spans.x2, spans.x3, spans.residue))
        touched = [columns_of(one, int(row)) for row in rows]
        every = set().union(*touched)
        assert int(spans.width[n]) == max(x3 - x0, 0)
        if not every:
            assert x0 >= x3
            continue
        lattice = {residue + one.stride * x for x in range(x0, x3)}
        assert every <= lattice
        assert {residue + one.stride * x0, residue + one.stride * (x3 - 1)} <= every, "the span is as small as can be"
        full = {residue + one.stride * x for x in range(max(x1, x0), min(x2, x3))} if x1 < x2 else set()
        assert all(full <= row for row in touched)
        if any(not row for row in touched):
            assert x1 == NOWHERE or not full


@more(6)
@given(cases(max_len=40, depth=2), BLOCKS, st.integers(1, 12))
def test_spans_bound_what_the_rows_touch(case: Case, block_q: int, step: int) -> None:
    for acsr in (
        build(case.pattern, case.q_len, case.kv_len, case.query_offset),
        build_transposed(case.pattern, case.q_len, case.kv_len, case.query_offset),
    ):
        for one in acsr.components:
            tiles = align_by_step(acsr.shape[0], (one.line_step or 1) if step % 2 else step, block_q)
            if is_aligned(one, tiles):
                check_spans(one, tiles, analyze(one, tiles))
            else:
                assert one.stride > 1
            if one.count.any():
                by_number = align_rows_of(one, acsr.shape[0], block_q)
                check_spans(one, by_number, analyze(one, by_number))


@more(2)
@given(cases(max_len=40, depth=1), st.integers(1, 6), st.sampled_from([2, 3, 4, 16]), st.sampled_from([1, 2, 4]))
def test_coarser_tiles_have_merged_spans(case: Case, step: int, factor: int, block_q: int) -> None:
    for one in build(case.pattern, case.q_len, case.kv_len, case.query_offset).components:
        fine = align_by_step(case.q_len, (one.line_step or 1) * step, block_q)
        coarse = RowTiles(case.q_len, fine.block_q * factor, fine.step)
        if not is_aligned(one, fine):
            continue
        direct = analyze(dataclasses.replace(one), coarse)  # of another component: nothing is known of it
        for merged in (analyze(one, fine).coarsen(factor, fine), analyze(one, coarse)):
            for name in ("x0", "x1", "x2", "x3"):
                np.testing.assert_array_equal(getattr(merged, name), getattr(direct, name), err_msg=name)
            here = direct.width > 0
            np.testing.assert_array_equal(merged.residue[here], direct.residue[here])
        assert analyze(one, coarse) is analyze(one, coarse), "spans are remembered"


def test_spans_of_a_window() -> None:
    """The picture in the module's text, in numbers."""
    (one,) = build(splat.window(2, 3), 12, 12).components
    spans = analyze(one, align_by_step(12, 1, 4))
    assert spans.x0.tolist() == [0, 2, 6]
    assert spans.x1.tolist() == [1, 5, 9]
    assert spans.x2.tolist() == [4, 8, 12]
    assert spans.x3.tolist() == [7, 11, 12]
    assert spans.width.tolist() == [7, 9, 6]


def test_strided_rows_are_dense_by_residue() -> None:
    (one,) = build(splat.strided(3), 12, 12).components
    tiles = align_by_step(12, 3, 4)
    assert tiles.rows.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    spans = analyze(one, tiles)
    assert spans.residue.tolist() == [0, 1, 2]
    assert (spans.x1 <= spans.x0).all()
    assert (spans.x2 >= spans.x3).all()
    assert not is_aligned(one, align_by_step(12, 1, 4))


def test_traced_numbers_give_the_same_spans() -> None:
    (one,) = build(splat.causal() & splat.strided(3), 14, 20, 5).components
    tiles = align_by_step(14, 3, 4)
    expected = analyze(one, tiles)
    found = jax.jit(lambda start, count: tuple(vars(analyze(Component(3, start, count, 3), tiles)).values()))(
        one.start, one.count
    )
    for values, name in zip(found, ("x0", "x1", "x2", "x3", "residue"), strict=True):
        np.testing.assert_array_equal(values, getattr(expected, name), err_msg=name)


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_two(n: int, power: int) -> None:
    assert next_power_of_two(n) == power


def test_text() -> None:
    assert str(align_by_step(100, 4, 16)) == "8 row tiles of 16 (step 4)"
    (one,) = build(splat.global_rows(3), 100, 100).components
    assert str(align_rows_of(one, 100, 16)) == "1 row tiles of 4 (row map)"
