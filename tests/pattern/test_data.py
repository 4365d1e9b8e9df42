"""Patterns given as data: from_mask, from_csr, from_runs."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, reject
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import splat
from splat.errors import ArgumentError, IrregularPatternError, PatternError
from splat.pattern import Axis
from tests.strategies import Case, cases, more, runs_mask

Array = np.ndarray[Any, Any]


def csr(mask: Array) -> tuple[Array, Array, tuple[int, int]]:
    matrix = scipy.sparse.csr_array(mask)
    return matrix.indptr, matrix.indices, mask.shape  # type: ignore[return-value]


@more(4)
@given(cases(max_len=32, depth=2))
def test_any_regular_mask_comes_back(case: Case) -> None:
    mask = case.mask
    for pattern in (splat.from_mask(mask), splat.from_csr(*csr(mask))):
        np.testing.assert_array_equal(pattern.to_dense(*mask.shape), mask)
        assert splat.parse(repr(pattern)) == pattern
        try:
            columns = pattern.T.to_dense(*mask.T.shape)
        except IrregularPatternError:  # rows may be regular where columns are not
            reject()
        np.testing.assert_array_equal(columns, mask.T)


@given(hnp.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 20))))
def test_small_arbitrary_masks_come_back(mask: Array) -> None:
    """64 components are enough for any mask this small, whatever it holds."""
    pattern = splat.from_mask(mask)
    np.testing.assert_array_equal(pattern.to_dense(*mask.shape), mask)
    np.testing.assert_array_equal(pattern.T.to_dense(*mask.T.shape), mask.T)


@pytest.mark.parametrize(
    ("text", "components"),
    [
        ("causal()", 1),
        ("window(16)", 1),
        ("strided(8)", 1),
        ("causal() & strided(8)", 1),
        ("dilated_window(4, 4, 3)", 1),
        ("causal() & window(16) | sink(4)", 2),
        ("blocked(16, 1)", 1),
        ("window(8) | strided(32)", 3),
    ],
)
def test_structure_is_recovered(text: str, components: int) -> None:
    n = 256
    pattern = splat.parse(text)
    recovered = splat.from_mask(pattern.to_dense(n))
    assert len(recovered.runs(Axis(0, n), Axis(0, n))) == components
    np.testing.assert_array_equal((recovered & splat.causal()).to_dense(n), (pattern & splat.causal()).to_dense(n))


@more(2)
@given(st.data())
def test_runs_as_given(data: st.DataObject) -> None:
    """Several components, one stride for each; they may overlap, be empty, and leave the matrix."""
    components, rows, cols = (data.draw(st.integers(1, most)) for most in (3, 12, 20))
    numbers = hnp.arrays(np.int64, (components, rows), elements=st.integers(-6, 24))
    start, count = data.draw(numbers), data.draw(numbers)
    stride = data.draw(hnp.arrays(np.int64, components, elements=st.integers(1, 9)))
    mask = runs_mask(start, stride[:, None], count, (rows, cols))
    for kv_len in (None, cols):
        pattern = splat.from_runs(start, stride, count, kv_len=kv_len)
        np.testing.assert_array_equal(pattern.to_dense(rows, cols), mask)
        np.testing.assert_array_equal(pattern.T.to_dense(cols, rows), mask.T)
        named = sum(int(run.count.sum()) for run in pattern.runs(Axis(0, rows), Axis(0, cols)))
        assert named == mask.sum(), "a pair named by several runs counts once"


@given(st.data())
def test_a_stride_for_every_row(data: st.DataObject) -> None:
    rows, cols = 8, 20
    numbers = hnp.arrays(np.int64, rows, elements=st.integers(0, 12))
    start, count = data.draw(numbers), data.draw(numbers)
    stride = data.draw(hnp.arrays(np.int64, rows, elements=st.integers(1, 4)))
    pattern = splat.from_runs(start, stride, count)
    mask = runs_mask(start[None], stride[None], count[None], (rows, cols))
    np.testing.assert_array_equal(pattern.to_dense(rows, cols), mask)
    np.testing.assert_array_equal(pattern.T.to_dense(cols, rows), mask.T)


def test_runs_of_any_integer_type() -> None:
    expected = splat.from_runs([0, 1], 2, [2, 1])
    for dtype in (np.int8, np.uint8, np.int32, np.uint64):
        assert splat.from_runs(np.array([0, 1], dtype), np.array(2, dtype), np.array([2, 1], dtype)) == expected
    assert splat.from_runs([[0, 1]], [2], [[2, 1]]) == expected
    assert splat.from_runs([0, 1], [2], [2, 1]) == expected


def test_strides_of_single_columns() -> None:
    """They say nothing; too many of others are refused at once."""
    rows = np.arange(1000)
    pattern = splat.from_runs(rows, rows + 1, np.where(rows == 7, 3, 1))
    assert len(splat.build(pattern, 1000).components) == 2
    expected = np.eye(1000, dtype=bool)
    expected[7, [7, 15, 23]] = True
    np.testing.assert_array_equal(pattern.to_dense(1000), expected)
    with pytest.raises(splat.IrregularPatternError, match="20000 different strides were given, more than 256 affine"):
        splat.from_runs(np.zeros(20000, int), np.arange(1, 20001), np.full(20000, 3))


def test_disjoint_runs_are_kept_as_given() -> None:
    pattern = splat.from_runs([[0, 0], [5, 9]], [1, 2], [[2, 3], [2, 1]])
    assert repr(pattern) == "from_runs([[0, 0], [5, 9]], [1, 2], [[2, 3], [2, 1]])"


def test_rows_at_an_offset() -> None:
    """A table for all positions serves a part of them, as in decoding."""
    mask = (splat.window(3, 0) | splat.strided(4)).to_dense(20)
    pattern = splat.from_mask(mask)
    np.testing.assert_array_equal(pattern.to_dense(5, 20, query_offset=15), mask[15:])
    np.testing.assert_array_equal(pattern.to_dense(1, 20, query_offset=7), mask[7:8])
    narrowed = mask & np.tri(20, dtype=bool)
    np.testing.assert_array_equal((pattern & splat.causal()).to_dense(5, 20, query_offset=15), narrowed[15:])


def test_transposed_table_at_an_offset() -> None:
    mask = (splat.window(3, 0) | splat.strided(4)).to_dense(20)
    np.testing.assert_array_equal(splat.from_mask(mask).T.to_dense(5, 20, query_offset=15), mask.T[15:])


def test_transposed_table_past_its_end() -> None:
    pattern = splat.from_mask(np.ones((5, 2), bool)).T
    with pytest.raises(PatternError, match="2 "):
        pattern.to_dense(2, 5, query_offset=1)


MADE_FOR = "this pattern was made from data for {}, but is used with {}. Build it again for these lengths, or describe"


@pytest.mark.parametrize(
    ("q_len", "kv_len", "offset", "message"),
    [
        (3, 4, 0, MADE_FOR.format("5 key positions", "4")),
        (3, 6, 0, MADE_FOR.format("5 key positions", "6")),
        (4, 5, 0, MADE_FOR.format("3 query positions", "4")),
        (2, 5, 0, MADE_FOR.format("3 query positions", "2")),
        (2, 5, 2, MADE_FOR.format("3 query positions", "positions 2 to 4")),
    ],
)
def test_other_sizes_are_refused(q_len: int, kv_len: int, offset: int, message: str) -> None:
    for pattern in (splat.from_mask(np.ones((3, 5), bool)), splat.causal() | ~splat.from_mask(np.ones((3, 5), bool))):
        with pytest.raises(PatternError) as caught:
            pattern.to_dense(q_len, kv_len, query_offset=offset)
        assert str(caught.value).startswith(message)


def test_a_first_part_wants_a_pattern_of_its_own() -> None:
    """It looks like a wrong length, which is the far more common mistake; later parts do not."""
    mask = np.tri(16, dtype=bool)
    pattern = splat.from_mask(mask)
    assert splat.build(pattern, 4, 16, 4).to_dense().tolist() == mask[4:8].tolist()
    with pytest.raises(PatternError) as caught:
        splat.build(pattern, 4, 16, 0)
    told = "A part that begins at position 0 looks like a wrong length: build it from the first 4 rows."
    assert str(caught.value).endswith(told)
    assert splat.build(splat.from_mask(mask[:4]), 4, 16, 0).to_dense().tolist() == mask[:4].tolist()
    with pytest.raises(PatternError, match="which serve all lengths.$"):
        splat.build(pattern, 17, 16, 0)


def test_runs_without_kv_len_serve_any() -> None:
    pattern = splat.from_runs([0, 2], 2, [3, 3])
    assert pattern.to_dense(2, 9).sum() == 6
    assert pattern.to_dense(2, 3).tolist() == [[True, False, True], [False, False, True]]
    assert pattern.T.to_dense(9, 2).sum() == 6


def test_irregular_mask_is_refused() -> None:
    rng = np.random.default_rng(0)
    mask = splat.window(3).to_dense(600)
    mask[17] = rng.random(600) < 0.5
    with pytest.raises(IrregularPatternError) as caught:
        splat.from_mask(mask)
    error = caught.value
    assert error.row == 17
    assert error.runs is not None
    assert 64 < error.runs <= mask[17].sum()
    assert str(error) == (
        f"row 17 is not regular: it needs {error.runs} arithmetic progressions, more than max_components=64. SPLAT "
        "serves patterns whose rows are a few progressions; for an arbitrary mask use dense masked attention, or raise "
        "max_components."
    )
    indptr, indices, shape = csr(mask)
    with pytest.raises(IrregularPatternError, match="row 17 is not regular"):
        splat.from_csr(indptr, indices, shape)
    served = splat.from_mask(mask, max_components=300)
    np.testing.assert_array_equal(served.to_dense(600), mask)


def test_rows_that_have_nothing_in_common_are_refused() -> None:
    """Each row is one progression, of a stride of its own: no component can hold two of them."""
    start, stride, count = np.zeros(40, int), 3 + np.arange(40), np.full(40, 5)
    mask = runs_mask(start[None], stride[None], count[None], (40, 400))
    with pytest.raises(IrregularPatternError) as caught:
        splat.from_mask(mask, max_components=3)
    assert caught.value.row is None
    assert caught.value.runs is not None
    assert f"the rows are regular one by one but not together: they need {caught.value.runs} com" in str(caught.value)


def test_columns_that_are_not_regular_are_refused() -> None:
    rng = np.random.default_rng(0)
    pattern = splat.from_runs(rng.integers(0, 4, 4000), 1, rng.integers(0, 2, 4000))
    assert pattern.to_dense(4000, 4).sum() > 1000
    with pytest.raises(
        IrregularPatternError, match=r"seen from its columns this pattern .* gradients cannot be planned"
    ):
        pattern.T.to_dense(4, 4000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: splat.from_mask([[1], [1, 2]]), "from_mask must be an array, but NumPy makes none of what was given"),
        (
            lambda: splat.from_mask(np.ones((2, 2))),
            "from_mask: mask must be bool [q_len, kv_len], but float64[2, 2] was",
        ),
        (lambda: splat.from_mask(np.ones((1, 2, 2), bool)), "use per_head([...])"),
        (lambda: splat.from_mask(np.ones(2, bool)), "but bool[2] was given"),
        (lambda: splat.from_mask(np.zeros((2, 2), int) == 1, max_components=0), "max_components must be an int of at"),
        (lambda: splat.from_mask(np.eye(2) == 1, max_components=cast(Any, 1.5)), "of at least 1, but 1.5 was given"),
        (lambda: splat.from_csr([0, 1], [5], (1, 3)), "indices must be in [0, 3), got values from 5 to 5"),
        (lambda: splat.from_csr([0, 2], [1], (1, 3)), "indptr must go from 0 to len(indices) = 1, got 0 to 2"),
        (lambda: splat.from_csr([0, 1], [1], (2, 3)), "indptr must have length rows + 1 = 3 for shape (2, 3), got 2"),
        (lambda: splat.from_csr([0.0, 1], [1], (1, 3)), "indptr must be a 1-D integer array"),
        (lambda: splat.from_csr([0, 1], [0], 4), "from_csr: shape must be (q_len, kv_len), but 4 was given"),  # type: ignore[arg-type]
        (lambda: splat.from_csr([0, 1], [0], (1, 2, 3)), "shape must be (q_len, kv_len), but (1, 2, 3) was given"),  # type: ignore[arg-type]
        (lambda: splat.from_csr([0, 1], [0], (1, 2.0)), "from_csr: shape[1] must be an int, but 2.0 of type float"),  # type: ignore[arg-type]
        (lambda: splat.from_runs([0], 1, [1], kv_len="8"), "from_runs: kv_len must be an int, but '8' of type str"),  # type: ignore[arg-type]
        (lambda: splat.from_runs([0], 1, [1], kv_len=-1), "from_runs: kv_len must be in [0, 1073741824], but -1 was"),
        (lambda: splat.from_runs([0.5], 1, [1]), "from_runs: start must be integers, but float64 was given"),
        (lambda: splat.from_runs([0], 1, [1.5]), "from_runs: count must be integers, but float64 was given"),
        (lambda: splat.from_runs([0], 1.5, [1]), "from_runs: stride must be integers, but float64 was given"),
        (lambda: splat.from_runs([0, 1], 1, [1]), "must have one shape, [rows] or [components, rows], but [2] and [1]"),
        (lambda: splat.from_runs(0, 1, 1), "but [] and [] were given"),
        (lambda: splat.from_runs([0], 0, [1]), "from_runs: stride must be positive, but 0 was given"),
        (lambda: splat.from_runs([0, 1], [1, 2, 3], [1, 1]), "from_runs: 3 strides were given for 2 rows"),
        (lambda: splat.from_runs([[0], [1]], [1, 2, 3], [[1], [1]]), "3 strides were given for 2 components"),
    ],
)
def test_malformed_data_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        make()
    assert message in str(caught.value)


def test_traced_data_is_refused() -> None:
    import jax
    import jax.numpy as jnp

    with pytest.raises(
        PatternError, match="from_mask needs values that are known now, but a traced JAX array was given"
    ):
        jax.jit(lambda mask: splat.from_mask(mask).to_dense(2))(jnp.ones((2, 2), bool))
    with pytest.raises(PatternError, match="from_runs needs values that are known now"):
        jax.jit(lambda start: splat.from_runs(start, 1, start).to_dense(2))(jnp.ones(2, int))
    assert splat.from_mask(jnp.ones((2, 2), bool)) == splat.from_mask(np.ones((2, 2), bool))


def test_ids_that_recur_too_often_are_refused() -> None:
    """Clusters of tokens that are not sorted by it; said before a component for each stretch is made."""
    ids = np.random.default_rng(0).integers(0, 4, 4096)
    with pytest.raises(IrregularPatternError, match=r"segments: id \d, of position \d+, is in \d+ stretches") as caught:
        splat.build(splat.causal() & splat.segments(ids), 4096)
    row, runs = caught.value.row, caught.value.runs
    assert runs == np.count_nonzero(np.diff((ids == ids[row]).astype(int), prepend=0) > 0)
    few = splat.segments(ids).to_dense(30, 40)  # here none is in as many
    np.testing.assert_array_equal(few, ids[:30, None] == ids[:40])
    np.testing.assert_array_equal(splat.segments(np.sort(ids)).to_dense(4096).sum(), (np.bincount(ids) ** 2).sum())


# -- numbers that 32 bits do not hold ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: splat.segments(np.array([0, 2**32, 0]))),
        pytest.param(lambda: splat.segments([0, 2**32, 0])),
        pytest.param(lambda: splat.segments(np.array([0, 2**31, 0], np.uint32))),
    ],
    ids=["int64", "list", "uint32"],
)
def test_segment_ids_may_be_any_integers(make: Any) -> None:
    """Hashes of documents, say: either exact, or refused with a sentence."""
    expected = [[True, False, True], [False, True, False], [True, False, True]]
    try:
        mask = make().to_dense(3)
    except PatternError:
        return
    assert mask.tolist() == expected


def test_segment_lengths_whose_sum_is_large() -> None:
    try:
        mask = splat.segments(lengths=[2**31 - 1, 5]).to_dense(3)
    except PatternError:
        return
    assert mask.all()


def test_runs_with_a_large_start() -> None:
    assert not splat.from_runs([2**40], 1, [5], kv_len=4).to_dense(1, 4).any()


def test_runs_with_a_large_count() -> None:
    assert splat.from_runs([0], 1, [2**40], kv_len=4).to_dense(1, 4).all()


def test_runs_with_a_large_stride() -> None:
    assert splat.from_runs([0], 2**40, [2], kv_len=4).to_dense(1, 4).tolist() == [[True, False, False, False]]


def test_runs_with_numbers_that_just_fit() -> None:
    assert splat.from_runs([0], 1, [2**31 - 1], kv_len=4).to_dense(1, 4).all()
    assert splat.from_runs([0], 3, [2**31 - 1]).to_dense(1, 4).tolist() == [[True, False, False, True]]
    mask = splat.from_runs([2**31 - 1, 2], 1, [1, 1], kv_len=4).to_dense(2, 4)
    assert mask.tolist() == [[False] * 4, [False, False, True, False]]
