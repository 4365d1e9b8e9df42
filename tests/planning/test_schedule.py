"""Schedules: whatever is decided, every non-zero is kept by exactly one tile, and little else is computed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import splat
from splat.acsr import ACSR, Component, build, build_transposed
from splat.errors import PatternError
from splat.planning import (
    Pass,
    PassDecision,
    Schedule,
    build_schedule,
    cost_model,
    find,
    schedule,
)
from splat.tiling import Phase
from tests.strategies import Case, cases, more

MODELS = [
    cost_model("xla", find("cpu"), 64, "float32"),
    cost_model("triton", find("h100"), 128, "bfloat16"),
    cost_model("cpp", find("cpu"), 8, "float64"),
]
BLOCKS = st.one_of(st.none(), st.sampled_from([1, 2, 3, 4, 5, 8, 16, 32, 64, 96]))


def check(made: Schedule, mask: np.ndarray[Any, Any]) -> None:
    """Each pair once; order, sizes and counts as they are said to be."""
    np.testing.assert_array_equal(made.coverage(), mask)
    np.testing.assert_array_equal(made.to_dense(), mask)
    assert made.acsr.nnz == mask.sum()
    area = 0
    for one in made.passes:
        check_order(one)
        named = [int(row) for row in one.tiles.rows.reshape(-1) if row < mask.shape[0]]
        assert len(named) == len(set(named)), "row tiles share no row"
        if one.decision.step is not None:
            assert sorted(named) == list(range(mask.shape[0]))
        assert one.decision.block_q >= one.tiles.block_q, "a kernel may pad the rows of its tiles"
    for row, _, phase, keep in made.each_tile():
        area += keep.size
        if phase is Phase.FULL:
            assert (keep == (row < mask.shape[0])).all(), "a full tile needs no mask but that of padded rows"
    assert made.area == area
    assert made.waste == (area / mask.sum() if mask.any() else 1.0)
    parts = [n for one in made.passes for n in one.decision.components]
    assert sorted(parts) == list(range(len(made.acsr.components))), "each component is in one pass"


def check_order(one: Pass) -> None:
    """Longest first, and no tile without work."""
    work = np.sum([walk.num_tiles for walk in one.walks], axis=0)
    assert (np.diff(work[one.order]) <= 0).all()
    assert sorted(one.order.tolist()) == np.flatnonzero(work).tolist()


@more(12)
@given(cases(), st.booleans(), BLOCKS, BLOCKS, st.sampled_from(MODELS))
def test_every_pair_is_kept_once(case: Case, by_column: bool, block_q: int | None, block_kv: int | None, model) -> None:
    """The front end in one property: by rows and by columns, with given blocks and with the model's own."""
    mask = case.mask.T if by_column else case.mask
    acsr = (build_transposed if by_column else build)(case.pattern, case.q_len, case.kv_len, case.query_offset)
    made = schedule(acsr, model, block_q=block_q, block_kv=block_kv)
    check(made, mask)
    if block_kv is not None:
        assert all(one.decision.block_kv == block_kv for one in made.passes)
    again = build_schedule(acsr, made.decisions)
    assert again.decisions == made.decisions
    np.testing.assert_array_equal(again.coverage(), mask)


def decide_unseen(acsr: ACSR, block_q: int | None, block_kv: int | None) -> tuple[PassDecision, ...]:
    """What is decided where start and count are traced; nothing is compiled."""
    made: list[Schedule] = []

    def trace(numbers: Any) -> None:
        pairs = zip(acsr.components, numbers, strict=True)
        components = tuple(Component(c.stride, start, count, c.line_step) for c, (start, count) in pairs)
        made.append(schedule(ACSR(acsr.shape, components), MODELS[0], block_q=block_q, block_kv=block_kv))
        assert not made[-1].is_static

    jax.eval_shape(trace, [(c.start, c.count) for c in acsr.components])
    return made[-1].decisions


@more(2)
@given(cases(max_len=32, depth=2), BLOCKS, BLOCKS)
def test_decisions_without_numbers_serve_all_numbers(case: Case, block_q: int | None, block_kv: int | None) -> None:
    acsr = build(case.pattern, case.q_len, case.kv_len, case.query_offset)
    if acsr.components and all(one.line_step is not None for one in acsr.components):
        decisions = decide_unseen(acsr, block_q, block_kv)
        np.testing.assert_array_equal(build_schedule(acsr, decisions).coverage(), case.mask)


def test_residues_that_are_not_known_are_refused() -> None:
    irregular = Component(3, np.array([0, 1, 0, 2], np.int32), np.ones(4, np.int32), None)
    with pytest.raises(PatternError) as caught:
        decide_unseen(ACSR((4, 4), (irregular,)), None, None)
    assert str(caught.value) == (
        "component 0 has irregular residues modulo its stride 3, and cannot be combined with run-time arrays. Make the "
        "whole pattern static (NumPy arrays, an int query_offset)."
    )


@pytest.mark.parametrize("text", ["causal() & strided(3)", "window(2) | strided(5)", "blocked(4, 1) | sink(2)"])
def test_traced_numbers_give_the_same_walks(text: str) -> None:
    static = build(splat.parse(text), 20, 33, 13)
    decided = [PassDecision((n,), (c.line_step or 1), 4, 8) for n, c in enumerate(static.components)]
    decisions = tuple(decided)
    names = ("begin", "num_head", "num_full", "num_tail", "residue")

    @jax.jit
    def walks(numbers: Any) -> Any:
        components = [
            Component(c.stride, start, count, c.line_step)
            for c, (start, count) in zip(static.components, numbers, strict=True)
        ]
        made = build_schedule(ACSR(static.shape, tuple(components)), decisions)
        return [(one.order, [[getattr(walk, name) for name in names] for walk in one.walks]) for one in made.passes]

    expected = build_schedule(static, decisions)
    for (order, found), one in zip(
        walks([(c.start, c.count) for c in static.components]), expected.passes, strict=True
    ):
        assert order[: len(one.order)].tolist() == one.order.tolist()
        for values, walk in zip(found, one.walks, strict=True):
            for value, name in zip(values, names, strict=True):
                np.testing.assert_array_equal(value, getattr(walk, name), err_msg=name)


@pytest.mark.parametrize(
    ("text", "passes", "full"),
    [
        ("window(64)", 1, 0.2),
        ("causal()", 1, 0.6),
        ("strided(16)", 1, 1.0),
        ("blocked(64)", 1, 1.0),
        ("window(16) | strided(64)", 2, 0.0),
        ("full()", 1, 1.0),
    ],
)
def test_passes_and_full_tiles(text: str, passes: int, full: float) -> None:
    """Components that want other rows together get a pass of their own; most tiles need no mask."""
    made = schedule(build(splat.parse(text), 1024, 1024), MODELS[0], block_q=32, block_kv=32)
    assert len(made.passes) == passes
    tiles = sum(one.num_tiles for one in made.passes)
    assert sum(one.count(Phase.FULL) for one in made.passes) >= full * tiles


def test_few_long_rows_get_a_pass_of_their_own() -> None:
    made = schedule(build(splat.window(16) | splat.global_rows(2), 2048, 2048), MODELS[0], block_q=64, block_kv=64)
    assert made.waste < 4
    assert {one.decision.step for one in made.passes} == {1, None}


def test_as_many_passes_as_pay() -> None:
    """Each dilation wants rows of its own together."""
    pattern = splat.window(64) | splat.dilated_window(64, 64, 4) | splat.dilated_window(64, 64, 16)
    made = schedule(build(pattern | splat.dilated_window(64, 64, 64), 16384, 16384), MODELS[0])
    assert [one.decision.step for one in made.passes] == [1, 4, 16, 64]


def test_rows_of_several_components_are_one_grouping() -> None:
    """Register tokens, which all see each other: one component for each of them, all in the same rows."""
    ids = 1 + np.arange(64 * 64) // 64
    ids[::64] = 0
    made = schedule(build(splat.segments(ids), 4096, 4096), MODELS[0])
    assert {one.decision.step for one in made.passes} == {1, None}
    assert len(made.passes) == 2


@pytest.mark.parametrize("rows", [16, 64])
def test_the_same_rows_in_other_tiles_are_another_grouping(rows: int) -> None:
    """Side by side they are one tile; by the residue of their columns they are two, of half as many rows."""
    row = np.arange(512)
    start = [np.zeros(512, int), np.where(row < rows // 2, 100, 101)]
    count = [np.where(row < rows, 10, 0), np.where(row < rows, 20, 0)]
    pattern = splat.from_runs(start, [1, 2], count)
    for model in MODELS:
        check(schedule(build(pattern, 512, 256), model), pattern.to_dense(512, 256))


@pytest.mark.parametrize("text", ["strided(64) | strided(65)", "window(128) | strided(100) | strided(128)"])
def test_strides_that_have_little_in_common(text: str) -> None:
    for model in MODELS:
        made = schedule(build(splat.parse(text), 4096, 4096), model)
        assert made.waste < 3
        assert made.area < 4096**2 / 4


def test_tile_sizes_are_chosen_for_tiles_that_components_share() -> None:
    """13 rows of a grid that lie side by side: wide tiles serve several of them."""
    made = schedule(build(splat.neighborhood((64, 64), 13), 4096, 4096), MODELS[0])
    (one,) = made.passes

    def seconds(block_q: int, block_kv: int) -> float:
        (other,) = schedule(made.acsr, MODELS[0], block_q=block_q, block_kv=block_kv).passes
        return MODELS[0].tiles_s(other.num_tiles, block_q, block_kv)

    own = seconds(one.decision.block_q, one.decision.block_kv)
    assert own == min(seconds(q, kv) for q in (32, 64, 128, 256) for kv in (32, 64, 128, 256, 512))


def test_a_matrix_without_pairs_needs_no_pass() -> None:
    made = schedule(build(splat.window(3) - splat.window(3), 64, 64), MODELS[0])
    assert (made.passes, made.area, made.waste) == ((), 0, 1.0)
    assert made.coverage().sum() == 0
    assert str(made) == ""


def test_tiles_without_rows_do_no_work() -> None:
    """65 rows in one group of 64 need two tiles there, and one in all others: 65 tiles, not 128."""
    made = schedule(build(splat.strided(64), 4097, 4097), MODELS[0], block_q=64, block_kv=65)
    (one,) = made.passes
    assert all((one.tiles.rows[tile] < 4097).any() for tile in one.order)
    assert made.waste < 1.1


def test_merged_tiles_stay_lattices() -> None:
    """Rows 0 to 31 have even columns, rows 32 to 63 odd ones: no tile of 64 neighbouring rows is dense."""
    pattern = splat.from_runs([0] * 32 + [1] * 32, 2, [32] * 64)
    for block_q in (None, 16, 32, 64):
        made = schedule(build(pattern, 64, 64), MODELS[0], block_q=block_q)
        np.testing.assert_array_equal(made.coverage(), pattern.to_dense(64))


def test_text() -> None:
    made = schedule(build(splat.window(16) | splat.strided(64), 256, 256), MODELS[0], block_q=32, block_kv=32)
    assert str(made).splitlines() == [f"pass {n}: {one}" for n, one in enumerate(made.passes)]
    (one,) = schedule(build(splat.causal(), 128, 128), MODELS[0], block_q=32, block_kv=32).passes
    assert str(one) == "components 0: 4 row tiles of 32 (step 1), 32 x 32 tiles, 10 tiles: 6 full, 4 partial"
