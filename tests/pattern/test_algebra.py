"""Set algebra: closed, exact, disjoint; what it refuses, and how it is written."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import splat
from splat.acsr import build_transposed
from splat.errors import IrregularPatternError, PatternError
from splat.pattern import Axis, Pattern, Run
from splat.pattern.algebra import MAX_COMPONENTS, coalesce, difference, intersect, intersection, prune, subtract, union
from splat.pattern.core import MAX_DEPTH
from tests import strategies
from tests.strategies import Case, cases, more

Mask = np.ndarray[Any, Any]


#: Constructors whose patterns serve all lengths.
CLOSED_FORM = tuple(
    name for name in strategies.PRIMITIVES if not name.startswith(("segments", "from_", "neighborhood"))
)


@st.composite
def two(draw: Any) -> tuple[Pattern, Pattern, int, int, int]:
    """Two patterns, and sizes to use both at."""
    case, other = (draw(cases(max_len=32, depth=1, names=CLOSED_FORM)) for _ in range(2))
    return case.pattern, other.pattern, case.q_len, case.kv_len, case.query_offset


@more(2)
@given(two())
def test_operations_are_those_of_sets(given_two: tuple[Pattern, Pattern, int, int, int]) -> None:
    a, b, q_len, kv_len, offset = given_two

    def mask(pattern: Pattern) -> Mask:
        return pattern.to_dense(q_len, kv_len, query_offset=offset)

    in_a, in_b = mask(a), mask(b)
    for pattern, expected in [
        (a & b, in_a & in_b),
        (a | b, in_a | in_b),
        (a - b, in_a & ~in_b),
        (~a, ~in_a),
        (~~a, in_a),
        (~(a & b), ~in_a | ~in_b),  # De Morgan, and what else holds of sets
        (~(a | b), ~in_a & ~in_b),
        (~a | ~b, ~(in_a & in_b)),
        (a - (a - b), in_a & in_b),
        ((a - b) | (b - a), in_a ^ in_b),
        ((a | b) - (a & b), in_a ^ in_b),
        (a & ~a, np.zeros_like(in_a)),
        (a | ~a, np.ones_like(in_a)),
        (a - a, np.zeros_like(in_a)),
        (a | a, in_a),
    ]:
        try:
            found = mask(pattern)
        except IrregularPatternError:
            strategies.tally["refused"] += 1
            continue
        np.testing.assert_array_equal(found, expected, err_msg=repr(pattern))


@given(cases(max_len=32, depth=2))
def test_transpose(case: Case) -> None:
    columns = case.pattern.T
    assert case.pattern == columns.T
    if case.query_offset == 0:
        np.testing.assert_array_equal(columns.to_dense(case.kv_len, case.q_len), case.mask.T)


def test_expressions_are_hardly_ever_refused() -> None:
    """The cases that `cases()` rejects as too irregular are few: what people write is served."""
    before = strategies.tally.copy()

    @more(8)
    @given(cases())
    def draw(case: Case) -> None:
        del case

    draw()
    tried, refused, large = (strategies.tally[name] - before[name] for name in ("tried", "refused", "large"))
    assert tried >= 100
    assert refused <= 0.05 * tried
    assert large <= 0.05 * tried


COMMON = """
causal() & window(512) | sink(4)
window(128) | strided(128)
causal() & (window(64) | strided(64))
causal() & (blocked(64) | lattice_columns(64, 63))
causal() & blocked(64) & strided(4)
causal() & (blocked(64) & strided(4) | blocked(256) & strided(16) | blocked(1024) & strided(64))
window(16) | random_blocks(16, 3, 0) | global_tokens(16)
dilated_window(8, 8, 4) | global_tokens(8)
window(4) | dilated_window(4, 4, 8) | dilated_window(4, 4, 32) | sink(1)
strided(2) | strided(3) | strided(5)
~strided(16)
full() - segments(lengths=[100, 200, 300]) - window(3)
~(window(2) | strided(7) | sink(3)) & causal()
causal() & segments(lengths=[100, 200, 300]) & sliding_window(64) | sink(2)
neighborhood((16, 32), (5, 7)) | sink(4)
""".strip().splitlines()


@pytest.mark.parametrize("text", COMMON)
def test_common_expressions_have_few_components(text: str) -> None:
    pattern = splat.parse(text)
    n = 512
    mask = pattern.to_dense(n)
    np.testing.assert_array_equal(pattern.T.to_dense(n), mask.T)
    for runs in (pattern.runs(Axis(0, n), Axis(0, n)), pattern.column_runs(Axis(0, n), Axis(0, n))):
        assert len(runs) <= 32
        assert sum(int(run.count.sum()) for run in runs) == mask.sum()


@pytest.mark.parametrize(
    ("text", "components"),
    [
        ("causal() & window(5)", 1),
        ("window(5) & strided(3)", 1),
        ("strided(4) & strided(6)", 1),
        ("neighborhood((300, 8), (300, 8))", 1),
        ("causal() & window(64) | sink(4)", 2),
        ("window(4) | strided(8)", 3),
        ("causal() & (window(4) | strided(8))", 2),
        ("window(8) | global_tokens(4)", 3),
        ("window(3) | window(9)", 1),
        ("causal() | ~causal()", 1),
        ("blocked(8) - causal()", 1),
        ("full() - full()", 0),
        ("window(4) - window(9)", 0),
        ("strided(6) - strided(3)", 0),
        ("strided(3) - strided(6)", 1),
    ],
)
def test_number_of_components(text: str, components: int) -> None:
    """As few as a person would write: each further one is another loop in every kernel."""
    assert len(splat.parse(text).runs(Axis(0, 96), Axis(0, 96))) == components


# -- runs themselves ---------------------------------------------------------------------------------------------------

STRIDES = st.integers(1, 12)


@st.composite
def run(draw: Any, lines: int = 12) -> Run:
    stride = draw(STRIDES)
    numbers = st.lists(st.integers(0, 20), min_size=lines, max_size=lines)
    start, count = np.array(draw(numbers), np.int32), np.array(draw(numbers), np.int32) // 3
    return Run(stride, start, count, None)


def elements(runs: list[Run], line: int) -> list[int]:
    return sorted(int(r.start[line]) + r.stride * t for r in runs for t in range(int(r.count[line])))


@more(2)
@given(run(), run())
def test_two_runs(a: Run, b: Run) -> None:
    both, only_a, either = intersect(a, b), subtract(a, b), union([a], [b])
    for line in range(len(a.start)):
        in_a, in_b = set(elements([a], line)), set(elements([b], line))
        assert elements([both], line) == sorted(in_a & in_b)
        assert elements(only_a, line) == sorted(in_a - in_b)
        assert elements(either, line) == sorted(in_a | in_b)
        assert elements(coalesce(prune([a, *subtract(b, a)])), line) == sorted(in_a | in_b)


@given(run(), st.integers(-5, 60), st.integers(-5, 60))
def test_clip(a: Run, lo: int, hi: int) -> None:
    kept = a.clip(lo, hi)
    for line in range(len(a.start)):
        assert elements([kept], line) == [x for x in elements([a], line) if lo <= x < hi]
        assert kept.count[line] == 0 or kept.stop[line] == kept.start[line] + kept.stride * kept.count[line]


def one(stride: int, start: int, count: int) -> Run:
    return Run(stride, np.array([start], np.int32), np.array([count], np.int32))


def test_large_strides_meet_exactly() -> None:
    """The Chinese remainder theorem on strides whose product needs more than 32 bits."""
    p, q = 32771, 32749  # primes
    both = intersect(one(p, 5, 2**30 // p), one(q, 5, 2**30 // q))
    assert elements([both], 0) == [5, 5 + p * q]
    p, q = 30011, 30013
    at = 7 * p + 3
    both = intersect(one(p, 3, 1000), one(q, at % q, 2**30 // q))
    assert elements([both], 0) == [at]


def test_empty_operands() -> None:
    a = [one(1, 0, 4)]
    assert intersection(a, []) == difference([], a) == union([], []) == []
    assert elements(difference(a, []), 0) == elements(union(a, []), 0) == [0, 1, 2, 3]


def test_refuses_what_needs_too_many_components() -> None:
    with pytest.raises(IrregularPatternError) as caught:
        splat.build(~splat.strided(1000), 2, 400_000)
    message = str(caught.value)
    assert "strides 1 and 1000 needs 401 affine components, more than 256" in message
    assert "Choose strides that divide each other, or use dense masked attention" in message
    assert caught.value.runs == 401
    assert caught.value.row is None
    blocks = splat.random_blocks(1, 200, 0) & splat.lattice_columns(2)
    with pytest.raises(IrregularPatternError, match=rf"affine components, more than {MAX_COMPONENTS}. Simplify the"):
        (blocks | splat.random_blocks(1, 250, 1)).to_dense(3000)


@pytest.mark.parametrize(
    ("pattern", "q_len", "components"),
    [
        (splat.strided(64) | splat.strided(65), 4096, 3),  # by classes of the common stride: 64
        (splat.strided(257) | splat.strided(509), 4096, 3),
        (splat.strided(40) - splat.strided(90), 700, 3),
        (~splat.strided(1000), 2000, 3),
    ],
)
def test_lattices_that_meet_in_few_columns(pattern: Pattern, q_len: int, components: int) -> None:
    """They are cut there: what is left keeps its own stride, and rows that go well together."""
    assert len(splat.build(pattern, q_len).components) <= components
    distance = np.subtract.outer(np.arange(700), np.arange(700))
    expected = {
        "strided(64) | strided(65)": (distance % 64 == 0) | (distance % 65 == 0),
        "strided(257) | strided(509)": (distance % 257 == 0) | (distance % 509 == 0),
        "strided(40) - strided(90)": (distance % 40 == 0) & (distance % 90 != 0),
        "~strided(1000)": distance % 1000 != 0,
    }[repr(pattern)]
    np.testing.assert_array_equal(pattern.to_dense(700), expected)
    np.testing.assert_array_equal(build_transposed(pattern, 700, 700).to_dense(), expected.T)


def test_runs_that_share_no_line_are_disjoint() -> None:
    mask = splat.from_runs([0, 1], [257, 509], [3, 3]).to_dense(2, 2000)
    assert [np.flatnonzero(row).tolist() for row in mask] == [[0, 257, 514], [1, 510, 1019]]


def test_expressions_are_no_deeper_than_their_text_can_be_read() -> None:
    deep = functools.reduce(operator.or_, [splat.window(n) for n in range(MAX_DEPTH + 1)])
    assert splat.parse(repr(deep)) == deep
    assert hash(splat.parse(repr(deep))) == hash(deep)
    assert splat.plan(deep, 300).nnz == splat.plan(splat.window(MAX_DEPTH), 300).nnz
    each = splat.per_head([deep, splat.causal()])
    for deeper in (
        lambda: deep | splat.sink(1), lambda: splat.sink(1) & deep, lambda: ~deep, lambda: deep.T,
        lambda: each | splat.sink(1), lambda: splat.sink(1) | each,
    ):  # fmt: skip
        with pytest.raises(PatternError, match=f"more than {MAX_DEPTH} operations one inside the other. Combine"):
            deeper()


@pytest.mark.parametrize(
    ("text", "q_len", "components"),
    [
        ("strided(512) | global_rows(16) | strided(300)", 16384, 4),
        ("blocked(4096) | strided(1200) | strided(300)", 16384, 9),
    ],
)
def test_unions_fall_into_few_pieces(text: str, q_len: int, components: int) -> None:
    """Whichever side loses what they share."""
    pattern = splat.parse(text)
    assert len(splat.build(pattern, q_len).components) <= components
    mask = np.zeros((700, 700), bool)
    for part in text.split(" | "):
        mask |= splat.parse(part).to_dense(700)
    np.testing.assert_array_equal(pattern.to_dense(700), mask)


def test_strides_that_hardly_fit_meet_once() -> None:
    pattern = splat.strided(600_000_000) - splat.strided(400_000_000)
    assert splat.build(pattern, 10).nnz == 0
    assert splat.build(pattern, 1, 700_000_000).nnz == 1


def test_union_of_strides_avoids_the_refusal() -> None:
    """Only one of the two differences need be possible."""
    few = splat.build(splat.strided(4) | splat.lattice_columns(1021), 1, 2_000_000)
    assert len(few.components) < 10
    wide = splat.global_rows(1) | splat.strided(997)  # of which strided(300) leaves 401 pieces
    with pytest.raises(IrregularPatternError, match="needs 300 affine components, more than 256"):
        splat.build(wide - splat.strided(300), 2, 120_000)
    assert len(splat.build(splat.strided(300) | wide, 2, 120_000).components) < 10
    pattern = splat.strided(1000) | splat.window(3) | splat.strided(10)
    mask = pattern.to_dense(2100)
    assert mask.sum() == (splat.strided(10) | splat.window(3)).to_dense(2100).sum()
    assert (splat.strided(500) | splat.strided(7)).to_dense(1200)[0, [0, 7, 14, 500, 1000]].all()


def test_rows_without_runs_in_a_difference() -> None:
    pattern = splat.full() - splat.from_runs([0, 0, 3], 2, [0, 0, 1])
    expected = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]], bool)
    np.testing.assert_array_equal(pattern.to_dense(3, 4), expected)
    for one in pattern.runs(Axis(0, 3), Axis(0, 4)):
        here = one.count > 0
        assert one.line_step != 1 or len(set((one.start % one.stride)[here])) <= 1


# -- expressions -------------------------------------------------------------------------------------------------------


def test_patterns_are_values() -> None:
    a, b = splat.causal() & splat.window(3), splat.causal() & splat.window(3)
    assert a == b
    assert hash(a) == hash(b)
    assert a != splat.causal() & splat.window(4)
    assert a != splat.window(3) & splat.causal()
    assert splat.segments(np.array([0, 1], np.int64)) == splat.segments([0, 1])
    assert hash(splat.segments([0, 1])) == hash(splat.segments(np.array([0, 1])))
    assert splat.segments([0, 1]) != splat.segments([0, 2])
    assert len({a, b, ~a, ~~a, a.T, a.T.T}) == 3


def test_given_arrays_are_copied() -> None:
    ids = np.array([0, 0, 1])
    pattern = splat.segments(ids)
    ids[:] = 5
    assert pattern == splat.segments([0, 0, 1])
    assert pattern.to_dense(3).tolist() == [[True, True, False], [True, True, False], [False, False, True]]


@pytest.mark.parametrize("other", [3, None, "causal()", True, np.ones((2, 2), bool)])
def test_only_patterns_combine(other: Any) -> None:
    for combine in (lambda: splat.causal() & other, lambda: splat.causal() | other, lambda: splat.causal() - other):
        with pytest.raises(TypeError):
            combine()


def test_patterns_have_no_truth_value() -> None:
    """`p and q` would be q alone, in silence."""
    p, q = splat.window(4), splat.causal()
    uses: list[Any] = [bool, lambda p: p and q, lambda p: p or q, lambda p: not p, lambda p: all([p, q])]
    for pattern in (p, p & q, p | q, p - q, ~p, p.T, splat.per_head([p, q]), splat.segments([0, 1])):
        for use in uses:
            with pytest.raises(TypeError) as caught:
                use(pattern)
            assert str(caught.value) == (
                "a pattern is neither true nor false, so that `and`, `or` and `not` cannot combine patterns. Use & "
                "(both), | (either), - (first without second) and ~ (all others); ask whether there is one with "
                "`is None`."
            )
    assert p in [q, splat.window(4)]


def test_static_or_not() -> None:
    import jax.numpy as jnp

    runtime = splat.segments(jnp.zeros(4, int))
    assert (splat.causal() & splat.segments([0, 0])).is_static
    assert not (splat.causal() & ~runtime).is_static
    assert not splat.per_head([splat.causal(), runtime]).is_static


def test_a_complement_of_a_complement_costs_nothing() -> None:
    assert (~~splat.causal()) == splat.causal()
    assert repr(~~(splat.causal() | splat.sink(1))) == "causal() | sink(1)"
