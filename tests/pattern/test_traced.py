"""The closed formulas on traced JAX arrays give what they give on NumPy arrays: run-time offsets, ids and lengths."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import splat
from splat.errors import IrregularPatternError, PatternError, UnsupportedError
from splat.pattern import Axis, Pattern, Run
from splat.pattern.algebra import intersect
from splat.pattern.core import with_arrays, without_arrays
from tests import strategies
from tests.strategies import Case, cases

Mask = np.ndarray[Any, Any]


def traced(pattern: Pattern, q_len: int, kv_len: int, by_column: bool = False) -> Callable[[int], Mask]:
    """offset -> how often the pattern's runs, found by one compiled function of the offset, name each pair."""
    facts: list[tuple[int, int | None]] = []

    def find(start: Any) -> Any:
        rows, cols = Axis(start, q_len), Axis(0, kv_len)
        runs = pattern.column_runs(cols, rows) if by_column else pattern.runs(rows, cols)
        facts[:] = [(run.stride, run.line_step) for run in runs]
        return [(run.start, run.count) for run in runs]

    # Compiled for one use: without optimisation that is quicker.
    compiled = jax.jit(find).lower(jnp.int32(0)).compile({"xla_backend_optimization_level": "0"})

    def mask(offset: int) -> Mask:
        origin, shape = (offset, (kv_len, q_len)) if by_column else (0, (q_len, kv_len))
        times = np.zeros(shape, int)
        for (stride, line_step), (start, count) in zip(facts, compiled(jnp.int32(offset)), strict=True):
            start, count = np.asarray(start), np.asarray(count)
            assert start.shape == count.shape == shape[:1]
            assert start.dtype == np.int32
            for line in range(shape[0]):
                for t in range(int(count[line])):
                    times[line, start[line] + stride * t - origin] += 1
            if line_step is not None and stride > 1:
                here = np.flatnonzero(count > 0)
                residues = {(int(line) % line_step, int(start[line]) % stride) for line in here}
                assert len(residues) == len({group for group, _ in residues}), "lines of one group share a residue"
        return times.T if by_column else times

    return mask


def test_large_strides_meet_exactly() -> None:
    """The Chinese remainder theorem in 32 bits: the strides' product has 30, the steps on the way more."""
    p, q = 30011, 30013
    at = np.array([7 * p + 3, 29000 * p + 5, 12345 * p + 30010, 0, p * q - 1], np.int32)
    a, b = ((at % stride, np.full(at.shape, p * q // stride, np.int32)) for stride in (p, q))

    @jax.jit
    def meet(a: Any, b: Any) -> Any:
        both = intersect(Run(p, *a), Run(q, *b))
        return both.start, both.count

    start, count = meet(a, b)
    np.testing.assert_array_equal(start, at)
    np.testing.assert_array_equal(count, 1)


@given(st.data())
def test_strides_whose_common_one_is_longer_than_any_position(data: st.DataObject) -> None:
    """They meet once or never; what is in between does not fit in 32 bits."""
    p, q = 49999, 50000
    at = data.draw(st.lists(st.integers(0, 2**30 - 1), min_size=4, max_size=4).map(np.array))
    shift = data.draw(st.sampled_from([0, 0, 1, p - 1]))
    a, b = ((start.astype(np.int32), ((2**30 - 1 - start) // stride + 1).astype(np.int32))
            for start, stride in ((at % p, p), ((at + shift) % q, q)))  # fmt: skip
    both = intersect(Run(p, *a), Run(q, *b))
    traced = jax.jit(lambda a, b: [(run.start, run.count) for run in [intersect(Run(p, *a), Run(q, *b))]])(a, b)
    for count, (start, found) in ((both.count, (both.start, both.count)), (both.count, traced[0])):
        np.testing.assert_array_equal(found, count)
        np.testing.assert_array_equal(np.asarray(start)[count > 0] % p, at[count > 0] % p)
        np.testing.assert_array_equal(np.asarray(start)[count > 0] % q, (at[count > 0] + shift) % q)
    if not shift:
        np.testing.assert_array_equal(both.count, 1)
        np.testing.assert_array_equal(both.start, at)


IDS = [0, 0, 0, 1, 1, -1, -1, 0, 2, 2, 2, 2, -3, 1, 5] + [7] * 25
VOCABULARY = [
    "full()",
    "causal()",
    "window(2, 5)",
    "sliding_window(4)",
    "dilated_window(2, 1, 3)",
    "strided(5)",
    "lattice_columns(6, 5)",
    "blocked(5, 1, 2)",
    "sink(4)",
    "global_rows(8)",
    "global_tokens(3)",
    f"segments({IDS})",
    "segments(lengths=[3, 0, 6, 20])",
    "neighborhood(40, 5)",
    "neighborhood((5, 8), (2, 3), (2, 2), (False, True))",
    "random_blocks(4, 2, 1)",
    f"from_runs([{[0, 1] * 20}, {[5] * 40}], [3, 1], [{[2] * 40}, {[0, 9] * 20}])",
    "causal() & window(3) | sink(2)",
    "causal() & (window(3) | strided(4))",
    "window(3) - strided(2)",
    "~(window(1) | lattice_columns(3))",
    "(blocked(4) - causal()).T | global_tokens(1)",
    "strided(4) & strided(6) | dilated_window(1, 1, 5)",
]


@pytest.mark.parametrize("text", VOCABULARY, ids=lambda text: text[:40])
def test_traced_offset(text: str) -> None:
    pattern = splat.parse(text)
    for by_column in (False, True) if "random_blocks" not in text else (False,):
        mask = traced(pattern, 9, 20, by_column)
        for offset in (3, 11):
            np.testing.assert_array_equal(mask(offset), pattern.to_dense(9, 20, query_offset=offset))


DATA = [
    "from_runs([0, 1, 2, 3, 1, 2], 2, [3, 4, 2, 0, 1, 3])",
    "from_runs([0, 1, 2, 3, 4, 5], 3, [3, 4, 2, 1, 1, 2])",
    "from_runs([0, 1, 2, 3, 4, 5], 3, [3, 4, 2, 1, 1, 2]) | window(1)",
    "segments([0, 0, 1, -1, 0, 2])",
    "neighborhood((2, 3), (2, 2))",
]


@pytest.mark.parametrize("text", DATA)
@pytest.mark.parametrize("by_column", [False, True])
def test_positions_that_data_does_not_name(text: str, by_column: bool) -> None:
    """Where a run-time offset leaves them, nothing attends: the same seen from rows and from columns."""
    pattern, known, q_len, kv_len = splat.parse(text), 6, 4, 6
    alone = splat.parse(text.removesuffix(" | window(1)"))
    mask = traced(pattern, q_len, kv_len, by_column)
    for offset in (-3, 0, 4, 5, 6, 9):
        here = np.zeros((3 + known + 9 + q_len, kv_len), bool)
        here[3 : 3 + known] = alone.to_dense(known, kv_len)
        if pattern != alone:
            here |= splat.window(1).to_dense(len(here), kv_len, query_offset=-3)
        np.testing.assert_array_equal(mask(offset), here[3 + offset :][:q_len], err_msg=f"offset {offset}")


def test_columns_before_the_first() -> None:
    """Runs say for which rows they are, but for no number of columns: there are none before the first."""
    pattern = splat.from_runs([0, 1, 2, 3], 1, [1, 1, 1, 1]).T
    np.testing.assert_array_equal(pattern.to_dense(4, 4, query_offset=-2), np.eye(4, k=-2, dtype=bool))
    np.testing.assert_array_equal(splat.build(pattern, 4, 4, query_offset=-2).to_dense(), np.eye(4, k=-2, dtype=bool))


@pytest.mark.parametrize("text", DATA)
def test_known_positions_that_data_does_not_name(text: str) -> None:
    for q_len, offset, told in ((4, -2, "positions? -2"), (4, 3, "position"), (2, -2, "positions? -2")):
        with pytest.raises(PatternError, match=told):
            splat.build(splat.parse(text), q_len, 6, query_offset=offset)


@settings(max_examples=settings().max_examples // 2)  # each is compiled
@given(cases(max_len=16, depth=2), st.booleans())
def test_composition(case: Case, by_column: bool) -> None:
    try:
        mask = traced(case.pattern, case.q_len, case.kv_len, by_column)
    except UnsupportedError:  # random_blocks by column, see below
        assert "random_blocks" in repr(case.pattern)
        reject()
    except IrregularPatternError:  # nothing is known to be empty, so that more components are left
        reject()
    np.testing.assert_array_equal(mask(case.query_offset), case.mask)


def test_transposed_random_blocks_are_refused() -> None:
    """Which block rows choose a block column is only known once the offset is."""
    with pytest.raises(UnsupportedError, match=r"random_blocks: .* a run-time query_offset"):
        traced(splat.random_blocks(4, 2, 1).T, 9, 20)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([np.int32, np.int16]))
def test_runtime_segments(lengths: list[int], dtype: Any) -> None:
    """A JAX array outside of jit is a run-time value too."""
    n = 24
    ids = np.append(np.repeat(np.arange(len(lengths)), lengths), np.full(n, -1))[:n].astype(dtype)
    pattern = splat.segments(jnp.asarray(ids))
    assert not pattern.is_static
    np.testing.assert_array_equal(pattern.to_dense(n), strategies.dense(strategies.segments(ids.tolist()), n, n))


def test_traced_segments_do_not_recompile() -> None:
    traces = itertools.count()

    @jax.jit
    def find(ids: Any) -> Any:
        next(traces)
        pattern = splat.causal() & splat.segments(ids) & splat.window(3) | splat.sink(1)
        return [(run.start, run.count) for run in pattern.runs(Axis(0, 12), Axis(0, 12))]

    for ids in ([0] * 12, [0] * 5 + [1] * 7, [-1] * 3 + [4] * 9, list(range(12))):
        found = find(jnp.asarray(ids, jnp.int32))
        mask = np.zeros((12, 12), int)
        for start, count in found:
            for line in range(12):
                mask[line, int(start[line]) : int(start[line] + count[line])] += 1
        pattern = splat.causal() & splat.segments(ids) & splat.window(3) | splat.sink(1)
        np.testing.assert_array_equal(mask, pattern.to_dense(12))
    assert next(traces) == 1


STRIDES: dict[str, Callable[[Pattern], Pattern]] = {
    "all of a stride in documents": lambda documents: (documents | splat.strided(2)) & splat.strided(4),
    "none of them": lambda documents: (splat.strided(2) - documents) & splat.strided(3),
    "or another stride": lambda documents: splat.strided(4) & documents | splat.strided(6),
    "another stride without": lambda documents: splat.strided(6) - (splat.strided(4) & documents),
    "or columns": lambda documents: splat.lattice_columns(8) | splat.strided(6) & documents,
    "neighbours without": lambda documents: splat.window(5) - (splat.strided(4) & documents),
}


@pytest.mark.parametrize("name", STRIDES)
def test_traced_segments_and_strides(name: str) -> None:
    """A run's start may be known where its count is not."""
    ids, strides = np.array([0] * 7 + [1] * 12 + [-1] * 5), []

    @jax.jit
    def find(ids: Any) -> Any:
        runs = STRIDES[name](splat.segments(ids)).runs(Axis(0, 24), Axis(0, 24))
        strides.extend(run.stride for run in runs)
        return [(run.start, run.count) for run in runs]

    mask = np.zeros((24, 24), int)
    found = find(jnp.asarray(ids))
    for stride, (start, count) in zip(strides, found, strict=True):
        for line in range(24):
            mask[line, int(start[line]) :: stride][: int(count[line])] += 1
    np.testing.assert_array_equal(mask, STRIDES[name](splat.segments(ids)).to_dense(24))


def test_holes_for_arrays() -> None:
    """Patterns without their run-time arrays are equal, and with others they are others."""
    first, second, third = (jnp.asarray(ids, jnp.int32) for ids in ([0] * 8, [0] * 3 + [1] * 5, [0] * 6 + [1] * 2))
    one, other = (splat.causal() & splat.segments(a) | splat.segments(b) for a, b in ((first, second), (third, first)))
    assert one != other
    assert without_arrays(one) == without_arrays(other)
    assert without_arrays(one) != without_arrays(splat.causal() & splat.segments(first) | splat.segments(first))
    assert repr(without_arrays(splat.segments(first))) == "segments(<run-time array ?[]>)"
    filled = with_arrays(without_arrays(one), [third, first])
    assert filled == other
    np.testing.assert_array_equal(filled.to_dense(8), other.to_dense(8))


def test_traced_lengths() -> None:
    find = jax.jit(
        lambda lengths: [
            (run.start, run.count) for run in splat.segments(lengths=lengths).runs(Axis(0, 10), Axis(0, 10))
        ]
    )
    for lengths in ([3, 4, 3], [10, 0, 0], [0, 0, 0], [1, 0, 8], [4, 4, 9]):
        ((start, count),) = find(jnp.asarray(lengths))
        mask = (np.arange(10) >= start[:, None]) & (np.arange(10) < (start + count)[:, None])
        expected = strategies.dense(strategies.segment_lengths(lengths, 10), 10, 10)
        np.testing.assert_array_equal(mask, expected)


@jax.jit
def lengths_runs(lengths: Any) -> Any:
    (run,) = splat.segments(lengths=lengths).runs(Axis(0, 24), Axis(0, 24))
    return run.start, run.count


@given(st.data(), st.sampled_from(["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]))
def test_lengths_of_any_integers(data: st.DataObject, dtype: str) -> None:
    """However small they are, and however much they sum to."""
    largest = int(np.iinfo(dtype).max)
    length = st.integers(0, 9) | st.integers(0, largest) | st.sampled_from([min(n, largest) for n in (2**30, 2**63)])
    lengths = data.draw(st.lists(length, min_size=4, max_size=4))
    known = np.array(lengths, dtype)
    expected = strategies.dense(strategies.segment_lengths([min(n, 24) for n in lengths], 24), 24, 24)
    np.testing.assert_array_equal(splat.segments(lengths=known).to_dense(24), expected)
    if known.dtype.itemsize <= 4:  # JAX has no more bits unless told so
        given_to_jax = jnp.asarray(known)
        np.testing.assert_array_equal(splat.segments(lengths=given_to_jax).to_dense(24), expected)
        start, count = (np.asarray(x)[:, None] for x in lengths_runs(given_to_jax))
        np.testing.assert_array_equal((np.arange(24) >= start) & (np.arange(24) < start + count), expected)


def test_traced_ids_must_be_as_long() -> None:
    with pytest.raises(PatternError, match="ids name 4 positions, but the pattern is used up to position 5"):
        splat.segments(jnp.zeros(4, int)).to_dense(5)


def test_traced_ids_of_another_rank() -> None:
    with pytest.raises(PatternError, match=r"For a batch of different segmentations use jax\.vmap over attention"):
        splat.segments(jnp.zeros((2, 4), int))
    with pytest.raises(PatternError, match="ids must be integers of rank 1, but float32"):
        splat.segments(jnp.zeros(4))


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint8])
def test_ids_of_several_stretches_are_refused(dtype: Any) -> None:
    """Where they are known: NumPy's are served instead."""
    ids = np.array([4, 4, 0, 0, 7, 4, 0], dtype)
    assert splat.segments(ids).to_dense(7)[0].tolist() == [True, True, False, False, False, True, False]
    with pytest.raises(PatternError) as caught:
        splat.segments(jnp.asarray(ids))
    assert str(caught.value) == (
        "segments: each id of a JAX array must be one stretch of positions, but id 0 begins at 2 and again at 6. Give "
        "NumPy ids, which may recur anywhere, or sort the tokens by id."
    )


def test_traced_ids_are_not_looked_at() -> None:
    def stretches(ids: Any) -> Any:
        return [run.count for run in splat.segments(ids).runs(Axis(0, 3), Axis(0, 3))]

    np.testing.assert_array_equal(jax.jit(stretches)(jnp.array([0, 1, 0]))[0], 1)
    known = jnp.array([0, 1, 0])
    with pytest.raises(PatternError, match="id 0 begins at 0 and again at 2"):
        jax.jit(lambda: stretches(known))()


@pytest.mark.parametrize("ids", [[], [3], [-1, 5, 5, -1, -1, 2, -1, 0], [-2, -1, -2]])
def test_padding_may_be_in_several_stretches(ids: list[int]) -> None:
    known = np.array(ids, np.int32)
    expected = splat.segments(known).to_dense(len(ids))
    np.testing.assert_array_equal(splat.segments(jnp.asarray(known)).to_dense(len(ids)), expected)


def test_text_of_a_runtime_pattern_says_so() -> None:
    assert (
        repr(splat.causal() & splat.segments(jnp.zeros(4, jnp.int32)))
        == "causal() & segments(<run-time array int32[4]>)"
    )
