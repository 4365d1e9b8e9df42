"""recover(): exact on any structure, and the components a person would write on the patterns people use."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import hypothesis.extra.numpy
import numpy as np
import pytest
from hypothesis import strategies as st

from splat.errors import ArgumentError, IrregularPatternError
from splat.pattern.recover import recover

Array = np.ndarray[Any, Any]
SIZES = (300, 1024)


def csr(mask: Array) -> tuple[Array, Array, tuple[int, int]]:
    return np.concatenate([[0], np.cumsum(mask.sum(axis=1))]), np.nonzero(mask)[1], mask.shape


def recover_checked(mask: Array, **options: Any) -> list[tuple[int, Array, Array]]:
    """Recover, and check that the components are well formed, disjoint and together exactly the mask."""
    components = recover(*csr(mask), **options)
    times = np.zeros(mask.shape, np.int64)
    for stride, start, count in components:
        assert isinstance(stride, int)
        assert stride > 0
        assert start.dtype == count.dtype == np.int32
        assert start.shape == count.shape == mask.shape[:1]
        assert count.max() > 0
        assert not start[count == 0].any()
        row = np.repeat(np.arange(len(start)), count)
        t = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        np.add.at(times, (row, start[row] + stride * t), 1)
    np.testing.assert_array_equal(times, mask.astype(np.int64))
    return components


def grid(n: int) -> tuple[Array, Array]:
    i, j = np.ogrid[:n, :n]
    return i, j


def window(n: int, left: int, right: int, dilation: int = 1) -> Array:
    i, j = grid(n)
    return (j >= i - left * dilation) & (j <= i + right * dilation) & ((j - i) % dilation == 0)


def strided(n: int, stride: int) -> Array:
    i, j = grid(n)
    return (j - i) % stride == 0


def random_blocks(n: int, block: int, per_row: int) -> Array:
    rng = np.random.default_rng(0)
    size = -(-n // block)
    blocks = np.zeros((size, size), bool)
    for row in blocks:
        row[rng.choice(size, per_row, replace=False)] = True
    return np.kron(blocks, np.ones((block, block), bool))[:n, :n]


def neighborhood(height: int, width: int, kernel: int) -> Array:
    def one(length: int) -> Array:
        first = np.clip(np.arange(length) - kernel // 2, 0, length - kernel)[:, None]
        return (np.arange(length) >= first) & (np.arange(length) < first + kernel)

    return np.kron(one(height), one(width)).astype(bool)


def stretches(mask: Array) -> int:
    """The most stretches of neighbouring columns in one row."""
    return int((mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]).sum(axis=1).max())


@functools.cache
def cases(n: int) -> dict[str, tuple[Array, list[int]]]:
    """Masks, and the strides of the components to find in them."""
    i, j = grid(n)
    causal = j <= i
    shuffle = np.random.default_rng(0).permutation(n)
    big_bird = random_blocks(n, 16, 3) | (np.abs(i // 16 - j // 16) <= 1) | (i < 16) | (j < 16)
    return {
        "full": (causal | True, [1]),
        "causal": (causal, [1]),
        "identity": (i == j, [1]),
        "window": (window(n, 16, 16), [1]),
        "causal window": (window(n, 30, 0), [1]),
        "jagged window": (np.abs(i - j) <= np.random.default_rng(0).integers(0, 40, (n, 1)), [1]),
        "strided": (strided(n, 4), [4]),
        "strided, one or two columns in a row": (strided(n, int(0.6 * n)), [int(0.6 * n)]),
        "strided, two or three columns in a row": (strided(n, int(0.4 * n)), [int(0.4 * n)]),
        "causal strided": (strided(n, 7) & causal, [7]),
        "strided, rows permuted": ((strided(n, 7) & causal)[shuffle], [7]),
        "lattice columns": ((j % 8 == 3) & (i >= 0), [8]),
        "rectangular": (strided(n, 5)[: n // 3], [5]),
        "dilated window": (window(n, 8, 8, 3), [3]),
        "causal dilated window": (window(n, 8, 0, 3), [3]),
        "blocked": (i // 64 == j // 64, [1]),
        "LongNet": ((i // 64 == j // 64) & strided(n, 4) & causal, [4]),
        "window | sink(4)": (window(n, 16, 16) | (j < 4), [1, 1]),
        "window | sink(1)": (window(n, 16, 16) | (j < 1), [1, 1]),
        "causal & (window | sink)": ((window(n, 30, 0) | (j < 4)) & causal, [1, 1]),
        "diagonal | sink(1)": ((i == j) | (j < 1), [1, 1]),
        "dilated window | sink": (window(n, 8, 0, 2) | (j < 4), [1, 2]),
        "window | strided": (window(n, 8, 8) | strided(n, 32), [1, 32, 32]),
        "causal & (window | strided)": ((window(n, 8, 8) | strided(n, 32)) & causal, [1, 32]),
        "window | dilated window": (window(n, 4, 4) | window(n, 10, 10, 8), [1, 8, 8]),
        "OpenAI fixed": (causal & ((i // 64 == j // 64) | (j % 64 == 63)), [1, 64]),
        "Longformer": (window(n, 16, 16) | (j < 3) | (i < 3), [1, 1]),
        "Longformer, global tokens inside": (window(n, 16, 16) | ((j // 4) == 30) | ((i // 4) == 30), [1, 1]),
        "random blocks": (random_blocks(n, 16, 3), [1, 1, 1]),
        "BigBird": (big_bird, [1] * stretches(big_bird)),
        "neighborhood": (neighborhood(20, 24, 7), [1] * 7),
        "complement of a window": (~window(n, 5, 5), [1, 1]),
        "complement of strided": (~strided(n, 4), [2, 4]),
        "strided | lattice columns": (strided(n, 32) | (j % 32 == 0), [32, 32]),
        "strided(3) | strided(5)": (strided(n, 3) | strided(n, 5), [3, 15, 15]),
        "causal & (strided(3) | strided(5))": ((strided(n, 3) | strided(n, 5)) & causal, [3, 15, 15]),
        "a stride for half of the rows": (np.where(i < n // 2, strided(n, 4), strided(n, 5)), [4, 5]),
        "a stride for each eighth of the rows": ((j - i) % (2 + 8 * i // n) == 0, [2, 3, 4, 5, 6, 7, 8, 9]),
    }


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", cases(SIZES[0]))
def test_finds_natural_components(name: str, n: int) -> None:
    mask, strides = cases(n)[name]
    assert [stride for stride, _, _ in recover_checked(mask)] == strides


def test_wide_window_and_strided_meet() -> None:
    n = 2048
    (one, start, count), (left, _, left_count), (right, _, right_count) = recover_checked(
        window(n, 128, 128) | strided(n, 128)
    )
    assert (one, left, right) == (1, 128, 128)
    # The window keeps both its ends, although they are on the stride, so it is a window in every row.
    rows = np.arange(n)
    np.testing.assert_array_equal(start, np.maximum(rows - 128, 0))
    np.testing.assert_array_equal(start + count, np.minimum(rows + 129, n))
    assert (left_count[0], right_count[-1]) == (0, 0)


@pytest.mark.parametrize("sink", [1, 4])
def test_window_and_sink_do_not_swap(sink: int) -> None:
    n, left = 256, 16
    (_, *a), (_, *b) = recover_checked(window(n, left, 0) | (grid(n)[1] < sink))
    (window_start, window_count), (sink_start, sink_count) = sorted((a, b), key=lambda part: -int(part[0].max()))
    apart = np.arange(n) > left + sink
    np.testing.assert_array_equal(window_start[apart], np.arange(n)[apart] - left)
    np.testing.assert_array_equal(window_count[apart], left + 1)
    assert not sink_start.any()
    np.testing.assert_array_equal(sink_count[apart], sink)
    # Where the two touch they are one run, and it belongs to the window, whose last column moves row by row.
    whole = np.arange(sink, left + 1)
    np.testing.assert_array_equal((window_start + window_count)[whole], whole + 1)


def test_moving_window_passes_a_global_column() -> None:
    n = 256
    (_, *a), (_, *b) = recover_checked(window(n, 4, 4) | (grid(n)[1] == 100))
    (column, present), (start, count) = sorted((a, b), key=lambda part: int(part[1].max()))
    np.testing.assert_array_equal(start[:95], np.maximum(np.arange(95) - 4, 0))
    np.testing.assert_array_equal(start[106:], np.arange(106, n) - 4)
    assert set(column[present > 0]) == {100}
    assert count.max() == 10  # the window, and the column where it touches


def test_unsorted_and_repeated_indices_count_once() -> None:
    (stride, start, count), *more = recover(np.array([0, 5, 5, 7]), np.array([6, 0, 4, 2, 4, 7, 5]), (3, 8))
    assert not more
    assert stride == 2
    assert start.tolist() == [0, 0, 5]
    assert count.tolist() == [4, 0, 2]


def test_accepts_any_integer_type() -> None:
    mask = window(40, 3, 3)
    indptr, indices, shape = csr(mask)
    expected = recover(indptr, indices, shape)
    for dtype in (np.int32, np.uint64, np.int16):
        for given, wanted in zip(recover(indptr.astype(dtype), indices.astype(dtype), shape), expected, strict=True):
            assert given[0] == wanted[0]
            np.testing.assert_array_equal(given[1:], wanted[1:])


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (4, 7)])
def test_nothing_to_recover(shape: tuple[int, int]) -> None:
    assert recover([0] * (shape[0] + 1), [], shape) == []


def test_smallest() -> None:
    ((stride, start, count),) = recover([0, 1], [0], (1, 1))
    assert (stride, start.tolist(), count.tolist()) == (1, [0], [1])


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    hypothesis.extra.numpy.arrays(bool, st.tuples(st.integers(1, 14), st.integers(1, 30))),
)
def test_exact_on_any_structure(mask: Array) -> None:
    components = recover_checked(mask, max_components=10_000)
    assert len(components) <= stretches(mask)


@st.composite
def unions_of_runs(draw: st.DrawFn) -> Array:
    """A union of a few bands of runs: starts that move or stay, stops that move or stay."""
    n = draw(st.integers(1, 60))
    i, j = grid(n)
    mask = np.zeros((n, n), bool)
    for _ in range(draw(st.integers(1, 4))):
        stride, slope = draw(st.integers(1, 9)), draw(st.integers(0, 2))
        first, length = draw(st.integers(-10, n)), draw(st.integers(1, 40))
        offset = j - slope * i - first
        mask |= (offset >= 0) & (offset < length) & (offset % stride == 0)
    return mask


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(unions_of_runs(), st.randoms(use_true_random=False))
def test_exact_on_unions_of_runs(mask: Array, random: Any) -> None:
    recover_checked(mask, max_components=10_000)
    order = list(range(len(mask)))
    random.shuffle(order)
    recover_checked(mask[order], max_components=10_000)


def test_irregular_row_is_named() -> None:
    n = 512
    mask = np.tril(np.ones((n, n), bool))
    mask[17] = np.random.default_rng(0).random(n) < 0.5
    with pytest.raises(IrregularPatternError) as caught:
        recover(*csr(mask))
    assert caught.value.row == 17
    assert caught.value.runs is not None
    assert caught.value.runs > 64
    assert str(caught.value) == (
        f"row 17 is not regular: it needs {caught.value.runs} arithmetic progressions, more than max_components=64. "
        "SPLAT serves patterns whose rows are a few progressions; for an arbitrary mask use dense masked attention, "
        "or raise max_components."
    )


def test_too_many_strides_together() -> None:
    i, j = grid(200)
    mask = (j % (i + 1) == 0) & (i < 12)  # each row is one run, but of its own stride
    with pytest.raises(IrregularPatternError, match="regular one by one but not together: they need") as caught:
        recover(*csr(mask), max_components=5)
    assert caught.value.row is None
    assert caught.value.runs is not None
    assert 5 < caught.value.runs <= 12
    assert len(recover_checked(mask, max_components=12)) == caught.value.runs


def test_max_components_is_inclusive() -> None:
    mask = window(200, 8, 8) | strided(200, 32)
    assert len(recover(*csr(mask), max_components=3)) == 3
    with pytest.raises(IrregularPatternError, match="max_components=2"):
        recover(*csr(mask), max_components=2)


@pytest.mark.parametrize(
    ("indptr", "indices", "shape", "options", "message"),
    [
        ([0, 1], [0], (2, 2), {}, r"indptr must have length rows \+ 1 = 3 for shape \(2, 2\), got 2"),
        ([0, 2, 1], [0], (2, 2), {}, "indptr must not decrease, but does after row 1"),
        ([1, 1, 1], [0], (2, 2), {}, r"indptr must go from 0 to len\(indices\) = 1, got 1 to 1"),
        ([0, 1, 3], [0, 1], (2, 2), {}, r"indptr must go from 0 to len\(indices\) = 2, got 0 to 3"),
        ([0, 1, 2], [0, 2], (2, 2), {}, r"indices must be in \[0, 2\), got values from 0 to 2"),
        ([0, 1, 2], [0, -1], (2, 2), {}, r"indices must be in \[0, 2\), got values from -1 to 0"),
        ([0, 1, 2], [0.0, 1.0], (2, 2), {}, r"indices must be a 1-D integer array, got shape \(2,\), dtype float64"),
        ([[0, 1, 2]], [0, 1], (2, 2), {}, r"indptr must be a 1-D integer array, got shape \(1, 3\), dtype int64"),
        ([0], [], (0, -1), {}, "neither negative"),
        ([0, 1], [0], (1, 1), {"max_components": 0}, "max_components must be an int of at least 1, but 0 was given"),
    ],
)
def test_refuses_malformed_input(
    indptr: Any, indices: Any, shape: tuple[int, int], options: dict[str, int], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        recover(indptr, indices, shape, **options)
