"""ACSR: what a pattern becomes keeps its pairs, by rows, by columns and by numbers alone."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, reject

import splat
from splat.acsr import ACSR, NOWHERE, Component, build, build_transposed
from splat.bench.memory import traced_peak_bytes
from splat.errors import ArgumentError, IrregularPatternError, PatternError
from tests.strategies import Case, cases, more


def component(stride: int, start: list[int], count: list[int], line_step: int | None = 1) -> Component:
    return Component(stride, np.array(start, np.int32), np.array(count, np.int32), line_step)


@more(6)
@given(cases())
def test_every_stage_keeps_the_pairs(case: Case) -> None:
    mask = case.mask
    sizes = case.q_len, case.kv_len, case.query_offset
    acsr = build(case.pattern, *sizes)
    acsr.validate()
    assert acsr.shape == mask.shape
    np.testing.assert_array_equal(acsr.to_dense(), mask)
    np.testing.assert_array_equal(acsr.row_nnz, mask.sum(axis=1))
    assert acsr.nnz == mask.sum()
    assert acsr.density == mask.mean()
    seen = np.flatnonzero(mask.any(axis=0))
    assert acsr.seen_columns == ((seen[0], seen[-1] + 1, seen.size) if seen.size else (0, 0, 0))
    cols, here = acsr.columns(), acsr.has_value()
    assert cols.shape == here.shape == (mask.shape[0], acsr.width)
    np.testing.assert_array_equal(here, cols >= 0)
    found = np.zeros_like(mask)
    found[np.nonzero(here)[0], cols[here]] = True
    np.testing.assert_array_equal(found, mask)
    for offset, one in zip(acsr.offsets, acsr.components, strict=True):
        np.testing.assert_array_equal(here[:, offset : offset + one.width].sum(axis=1), one.count)
    assert len({acsr, build(case.pattern, *sizes)}) == 1
    columns = build_transposed(case.pattern, *sizes)
    columns.validate()
    assert columns.shape == mask.T.shape
    np.testing.assert_array_equal(columns.to_dense(), mask.T)
    try:
        by_numbers = acsr.transpose()
    except IrregularPatternError:  # the closed form may be regular where its numbers alone do not show it
        reject()
    by_numbers.validate()
    np.testing.assert_array_equal(by_numbers.to_dense(), mask.T)


@pytest.mark.parametrize("text", ["strided(2**30)", "strided(9973) & strided(9967)", "lattice_columns(2**29, 5)"])
def test_columns_of_a_stride_without_end(text: str) -> None:
    """It is longer than the matrix, and takes no memory."""
    acsr = build(splat.parse(text.replace("2**30", str(2**30)).replace("2**29", str(2**29))), 64, 64)
    seen = np.flatnonzero(acsr.to_dense().any(axis=0))
    assert acsr.seen_columns == (seen[0], seen[-1] + 1, seen.size)
    assert traced_peak_bytes(lambda: dataclasses.replace(acsr).seen_columns) < 1e5


@given(cases(max_len=24, depth=2))
def test_bounds(case: Case) -> None:
    """Lattice bounds name a row's columns; rows without a run have bounds that no column is between."""
    acsr = build(case.pattern, case.q_len, case.kv_len, case.query_offset)
    mask = np.zeros(acsr.shape, int)
    for one in acsr.components:
        lower, upper = one.bounds
        assert one.is_static
        assert one.has_empty_rows == (one.count == 0).any()
        residue = np.broadcast_to(one.residue, lower.shape)
        for row in range(acsr.shape[0]):
            if one.count[row] == 0:
                assert (lower[row], upper[row]) == (NOWHERE, -NOWHERE)
            for x in range(lower[row], upper[row]):
                mask[row, residue[row] + one.stride * x] += 1
    np.testing.assert_array_equal(mask, case.mask)


def test_traced_offset_gives_traced_components() -> None:
    pattern = splat.causal() & splat.strided(3) | splat.sink(2)

    @jax.jit
    def metadata(offset: Any) -> Any:
        acsr = build(pattern, 6, 20, offset)
        assert not acsr.is_static
        columns = build_transposed(pattern, 6, 20, offset)
        strides[:] = [[c.stride for c in one.components] for one in (acsr, columns)]
        return [[(c.start, c.count) for c in one.components] for one in (acsr, columns)]

    strides: list[list[int]] = []
    for offset in (0, 4, 14):
        rows, columns = metadata(jnp.int32(offset))
        mask = pattern.to_dense(6, 20, query_offset=offset)
        for found, stride, shape, expected in zip(
            (rows, columns), strides, ((6, 20), (20, 6)), (mask, mask.T), strict=True
        ):
            components = [Component(s, np.asarray(a), np.asarray(c)) for s, (a, c) in zip(stride, found, strict=True)]
            np.testing.assert_array_equal(ACSR(shape, tuple(components)).to_dense(), expected)


def test_metadata_is_in_proportion_to_rows() -> None:
    for n in (1024, 4096):
        acsr = build(splat.causal() & splat.window(256) | splat.sink(4), n, n)
        assert acsr.metadata_bytes == 2 * 2 * 4 * n
        assert sum(c.start.nbytes + c.count.nbytes for c in acsr.components) == acsr.metadata_bytes


def test_text() -> None:
    text = str(build(splat.causal() & splat.window(2) | splat.sink(1), 8, 8))
    assert text == (
        "ACSR 8 x 8, 2 components, 26 non-zeros (40.62%), 128 bytes of metadata\n"
        "  0: stride 1, up to 3 a row\n"
        "  1: stride 1, up to 1 a row"
    )
    assert str(build(splat.segments(jnp.zeros(8, jnp.int32)), 8, 8)) == (
        "ACSR 8 x 8, 1 components\n  0: stride 1, run-time"
    )


def test_equality_ignores_what_no_row_reads() -> None:
    a = ACSR((3, 4), (component(2, [0, 1, 3], [2, 1, 0]),))
    assert a == ACSR((3, 4), (component(2, [0, 1, 0], [2, 1, 0], None),))
    assert a != ACSR((3, 4), (component(2, [0, 1, 3], [2, 1, 1]),))
    assert a != ACSR((3, 5), a.components)
    assert a != ACSR((3, 4), a.components * 2)
    assert a != "an ACSR"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (component(0, [0, 0], [1, 1]), "needs stride >= 1"),
        (component(1, [0], [1]), "start, count of shape [2]"),
        (component(1, [0, 3], [1, 2]), "leaves the matrix of 2 x 4"),
        (component(2, [0, 1], [1, 3]), "leaves the matrix of 2 x 4"),
        (component(1, [-1, 0], [1, 1]), "leaves the matrix of 2 x 4"),
        (component(1, [0, 0], [-1, 1]), "leaves the matrix of 2 x 4"),
        (component(2, [0, 1], [1, 1], 1), "rows equal modulo 1 do not share a residue"),
        (
            dataclasses.replace(component(1, [0, 0], [1, 1]), start=np.zeros(2, np.int64)),
            "needs int32 arrays, but has int64 and int32",
        ),
    ],
)
def test_validate_finds(bad: Component, message: str) -> None:
    good = component(1, [0, 0], [1, 1])
    with pytest.raises(PatternError) as caught:
        ACSR((2, 4), (good, bad)).validate()
    assert "component 1 of this ACSR" in str(caught.value)
    assert message in str(caught.value)


def test_validate_accepts_residues_by_step() -> None:
    ACSR((4, 4), (component(2, [0, 1, 0, 1], [1, 1, 1, 1], 2),)).validate()
    ACSR((4, 4), (component(2, [0, 1, 1, 1], [1, 1, 1, 1], None),)).validate()
    ACSR((4, 4), (component(2, [0, 1, 1, 1], [1, 1, 0, 1], 2),)).validate()


def test_nobody_writes_into_a_matrix() -> None:
    start, count = np.arange(8, dtype=np.int32), np.ones(8, np.int32)
    matrix = ACSR((8, 8), (Component(1, start, count),))
    count[:] = 0
    assert matrix.nnz == 8
    for one in (matrix, build(splat.window(2), 8), build_transposed(splat.strided(3), 8, 8)):
        for array in (one.components[0].start, one.components[0].count):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


def test_build_takes_text_and_patterns_alone() -> None:
    known = splat.causal() & splat.window(2)
    np.testing.assert_array_equal(build("causal() & window(2)", 5).to_dense(), known.to_dense(5))
    with pytest.raises(ArgumentError, match="pattern must be a splat pattern such as .* but ndarray was given"):
        build(np.ones((4, 4), bool), 4)  # type: ignore[arg-type]


def test_a_pair_named_twice_is_found() -> None:
    with pytest.raises(PatternError, match="names a pair more than once"):
        ACSR((2, 4), (component(1, [0, 0], [2, 1]), component(2, [1, 1], [1, 1]))).to_dense()


def test_empty_matrices() -> None:
    for q_len, kv_len in ((0, 4), (4, 0), (0, 0)):
        acsr = build(splat.causal() & splat.window(2), q_len, kv_len)
        acsr.validate()
        assert (acsr.nnz, acsr.density) == (0, 0.0)
        assert acsr.to_dense().shape == (q_len, kv_len)
        assert acsr.transpose().shape == (kv_len, q_len)


def test_more_rows_than_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[build.__module__]
    monkeypatch.setattr(module, "_memory_bytes", lambda: 1 << 30)
    build(splat.window(2), 1000)
    with pytest.raises(PatternError, match="q_len 1,000,000,000 takes at least 37 GiB to plan, and this machine has 1"):
        build(splat.window(2), 10**9)
    with pytest.raises(PatternError, match="kv_len 100,000,000 takes at least 4 GiB to plan"):
        build_transposed(splat.window(2), 1, 10**8)
    monkeypatch.setattr(module, "_memory_bytes", lambda: None)  # where the system does not say
    build(splat.window(2), 1000)
