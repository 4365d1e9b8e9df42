"""The tables that the C++ kernels read say what the schedule says: read here in NumPy, as `call.hpp` documents them.

Nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import splat
from splat.acsr import NOWHERE
from splat.codegen.cpp.lower import (
    ALONE,
    GROUP,
    UNROLLED_WALKS,
    Holes,
    PassFacts,
    Tables,
    WalkFacts,
    holes_of,
    lower,
    passes_of,
)
from splat.errors import ArgumentError, IrregularPatternError
from splat.pattern import Pattern
from splat.pattern.core import ceil_div
from splat.planning import SCHEDULES, Plan, Problem, Schedule, make_plan
from splat.tiling import Test as Comparison
from tests.attention_suite import MODELS, SPARSE_SUITE, VOCABULARY
from tests.strategies import Case, cases, more

Array = np.ndarray[Any, Any]

#: Four whole rows far from each other: a row map.
FEW = splat.from_runs([0] * 256, 1, [256 if row in (3, 77, 78, 200) else 0 for row in range(256)])

#: More than eight walks of one stride: a loop.
MANY = "random_blocks(4, 12, 0)"


# -- reading -----------------------------------------------------------------------------------------------------------


def rows_of(facts: PassFacts, tables: dict[str, Array], num_rows: int) -> Array:
    """int [groups, 16]; `num_rows` where padded."""
    if facts.step is None:
        assert tables["ROWS"].shape == (len(tables["GROUPS"]), GROUP)
        return tables["ROWS"]
    per_residue = ceil_div(num_rows, facts.step * GROUP)
    assert len(tables["GROUPS"]) == min(facts.step, num_rows) * per_residue
    n = np.arange(len(tables["GROUPS"]))[:, None]
    rows = n // per_residue + facts.step * (GROUP * (n % per_residue) + np.arange(GROUP))
    return np.minimum(rows, num_rows)


def walks_of(facts: PassFacts) -> list[WalkFacts]:
    """Every walk; in a loop, walk w compares with row w of BOUNDS."""
    if facts.loop is None:
        return list(facts.walks)
    (one,) = facts.walks
    each = [tuple(Comparison(w, test.lower, test.upper) for test in one.tests) for w in range(facts.loop)]
    return [WalkFacts(one.stride, one.full, one.edges, tests) for tests in each]


def kept(tests: Sequence[Comparison], sides: Array, rows: Array, x: int) -> Array:
    """bool [16]: the rows of a group that keep column x."""
    out = np.zeros(rows.size, bool)
    for test in tests:
        lower_bound, upper_bound = sides[test.component][:, rows]
        out |= (not test.lower or x >= lower_bound) & (not test.upper or x < upper_bound)
    return out


def read(facts: PassFacts, given: Tables, shape: tuple[int, int]) -> Array:
    """int [num_rows, num_cols]: how often each pair is kept."""
    num_rows, num_cols = shape
    tables = {name: np.asarray(one) for name, one in zip(facts.table_names, given, strict=True)}
    assert all(table.dtype == np.int32 for table in tables.values())
    rows, groups = rows_of(facts, tables, num_rows), tables["GROUPS"]
    named = rows[rows < num_rows]
    assert np.unique(named).size == named.size, "a row is in two groups"
    assert not facts.covers_rows or named.size == num_rows
    sides = np.full((facts.num_tests, 2, num_rows + 1), NOWHERE)
    sides[:, 1] = -NOWHERE
    if facts.num_tests:
        assert tables["BOUNDS"].shape == (facts.num_tests, 2, num_rows)
        sides[:, :, :num_rows] = tables["BOUNDS"]
    assert groups.shape[1:] == (facts.num_walks, 5)
    counts = np.zeros((num_rows + 1, num_cols), int)
    for n, (numbers, members) in enumerate(zip(groups, rows, strict=True)):
        for w, walk in enumerate(walks_of(facts)):
            x0, x1, x2, x3, residue = (int(number) for number in numbers[w])
            assert 0 <= x0 <= x1 <= x2 <= x3
            assert x3 > x0 or not any(numbers[w]), f"group {n} has nothing to do in walk {w}"
            assert walk.full or x1 == x2
            assert walk.edges or (x0, x2) == (x1, x3)
            assert walk.edges == bool(walk.tests)
            assert x3 == x0 or residue + walk.stride * (x3 - 1) < num_cols, "no column outside is read"
            for x in range(x0, x3):
                full = x1 <= x < x2
                keep = members < num_rows if full else kept(walk.tests, sides, members, x)
                counts[members[keep], residue + walk.stride * x] += 1
                if full and walk.tests:  # the kernels may compare here too, where that is quicker
                    np.testing.assert_array_equal(kept(walk.tests, sides, members, x), keep)
    return counts[:num_rows]


def check(specs: Sequence[PassFacts], tables: Sequence[Tables], mask: Array) -> None:
    """The passes keep every pair of the mask once, and one that covers all rows is the first."""
    assert len(specs) == len(tables)
    covers = [facts.covers_rows for facts in specs]
    assert covers == sorted(covers, reverse=True)
    total = sum((read(facts, one, mask.shape) for facts, one in zip(specs, tables, strict=True)), np.zeros(mask.shape))
    np.testing.assert_array_equal(total, mask)


def plan_of(pattern: Pattern | str, q_len: int, kv_len: int | None = None, **settings: Any) -> Plan:
    pattern = splat.parse(pattern) if isinstance(pattern, str) else pattern
    problem = Problem(pattern, q_len, q_len if kv_len is None else kv_len)
    return make_plan(problem, implementation="cpp", **settings)


def masks(plan: Plan, mask: Array) -> Iterator[tuple[Schedule, Array]]:
    for which in SCHEDULES:
        yield getattr(plan, which), mask.T if which == "d_key_value" else mask


# -- static plans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [*VOCABULARY, *SPARSE_SUITE.values(), *MODELS.values(), MANY], ids=lambda text: text[:32]
)
def test_patterns(text: str) -> None:
    length = 40 if text in VOCABULARY else 48
    plan = plan_of(text, length)
    for schedule, mask in masks(plan, plan.problem.pattern.to_dense(length)):
        check(*lower(schedule), mask)


@settings(more(4), suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(cases())
def test_composed_patterns(case: Case) -> None:
    try:
        plan = plan_of(case.pattern, case.q_len, case.kv_len, query_offset=case.query_offset)
        for schedule, mask in masks(plan, case.mask):
            check(*lower(schedule), mask)
    except splat.IrregularPatternError:
        hypothesis.reject()


def test_lengths_do_not_change_the_facts() -> None:
    """One kernel for all lengths. The tables hold what differs."""
    for text in ("causal() & window(100, 0)", "strided(16)", "causal() & (window(40, 0) | sink(3))", "global_rows(5)"):
        assert len({lower(plan_of(text, n).forward)[0] for n in (512, 768, 1280)}) == 1, text


@pytest.mark.parametrize("which", SCHEDULES)
def test_lengths_below_a_stride_are_no_strides(which: str) -> None:
    """Chunks of a prompt, say: each row is alone in its residue, and none of them needs a kernel of its own."""
    for text in ("causal() & (window(8) | strided(512))", "causal() & dilated_window(40, 0, 512)"):
        lengths = range(48, 500, 64)  # whole groups
        assert len({lower(getattr(plan_of(text, n), which))[0] for n in lengths}) == 1, text
        assert {one.step for one in lower(getattr(plan_of(text, 400), which))[0]} <= {1, ALONE}


def test_more_pieces_in_longer_sequences_are_no_more_texts() -> None:
    """Decoding a pattern that is cut into pieces where it meets another: more of them as positions go on."""
    pattern, facts = splat.causal() - splat.strided(64), set()
    for offset in range(600, 4096, 32):
        plan = make_plan(Problem(pattern, 1, 4096), implementation="cpp", query_offset=offset)
        facts.add(lower(plan.forward)[0])
    assert len(facts) <= 4  # loops of 16, 32 and 64 pieces, and of all residue classes


def test_facts() -> None:
    """Phases and comparisons that there are none of are not there."""

    def facts(text: Pattern | str, which: str = "forward") -> tuple[PassFacts, ...]:
        return lower(getattr(plan_of(text, 256), which))[0]

    both = (Comparison(0, True, True),)
    assert facts("full()") == (PassFacts(1, 0, (WalkFacts(1, True, False, ()),)),)
    assert facts("causal()") == (PassFacts(1, 1, (WalkFacts(1, True, True, (Comparison(0, False, True),)),)),)
    lower_only = (Comparison(0, True, False),)
    assert facts("causal()", "d_key_value") == (PassFacts(1, 1, (WalkFacts(1, True, True, lower_only),)),)
    assert facts("window(40)") == (PassFacts(1, 1, (WalkFacts(1, True, True, both),)),)
    assert facts("window(3)") == (PassFacts(1, 1, (WalkFacts(1, False, True, both),)),)
    assert facts("strided(16)") == (PassFacts(16, 0, (WalkFacts(16, True, False, ()),)),)
    assert facts(FEW) == (PassFacts(None, 0, (WalkFacts(1, True, False, ()),)),)
    assert facts("sink(0)") == ()
    assert [one.step for one in facts("window(3) | strided(16)")] == [1, 16]
    assert [one.step for one in facts(FEW | splat.strided(16))] == [16, None], "all rows first"


def test_many_walks_are_a_loop() -> None:
    (facts,), ((groups, bounds),) = lower(plan_of("random_blocks(5, 12, 0)", 100).forward)
    assert facts.loop is not None
    assert facts.loop > UNROLLED_WALKS
    assert facts == PassFacts(1, facts.loop, (WalkFacts(1, True, True, (Comparison(0, True, True),)),), facts.loop)
    assert groups.shape == (7, facts.loop, 5)
    assert bounds.shape == (facts.loop, 2, 100)
    (facts,), (tables,) = lower(plan_of("random_blocks(16, 9, 0)", 256).forward)
    assert (facts.loop, facts.num_tests, len(tables)) == (16, 0, 1)
    assert facts.walks == (WalkFacts(1, True, False, ()),)
    several = " | ".join(f"lattice_columns({n}, 1)" for n in (5, 7, 9, 11))  # strides of their own: written out
    (facts, *_), _ = lower(plan_of(several, 60).forward)
    assert (facts.loop, len(facts.walks)) == (None, facts.num_walks)


def test_rows_that_fill_no_group() -> None:
    """Groups of 16 lanes with eight rows each, and with the rows of a map."""
    (facts,), (tables,) = lower(plan_of("strided(16)", 128).forward)
    assert facts.step == 16
    assert tables[0].shape == (16, 1, 5)
    (facts,), ((_, rows),) = lower(plan_of(FEW, 256).forward)
    assert rows.tolist() == [[3, 77, 78, 200] + [256] * 12]


def test_lowered_once() -> None:
    plan = plan_of("causal()", 64)
    assert passes_of(plan, "forward") is passes_of(plan, "forward")


def test_plans_with_other_tiles_are_refused() -> None:
    plan = make_plan(Problem(splat.causal(), 64, 64), implementation="xla", block_q=32, block_kv=32)
    with pytest.raises(ArgumentError, match="this plan has tiles of 32 x 32. Plan with implementation='cpp'"):
        lower(plan.forward)


# -- what lies between -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "queries", "keys"),
    [
        ("causal()", False, False),
        ("window(3)", False, False),
        ("sink(5)", False, False),
        ("lattice_columns(5, 2)", False, True),
        ("window(3) & segments([0] * 20 + [-1] * 4 + [1] * 40)", True, True),
        ("global_rows(3)", False, False),
        ("sink(0)", False, False),
    ],
)
def test_holes(text: str, queries: bool, keys: bool) -> None:
    if "segments" in text:
        pattern = splat.window(3) & splat.segments([0] * 20 + [-1] * 4 + [1] * 40)
    else:
        pattern = splat.parse(text)
    assert holes_of(plan_of(pattern, 64)) == Holes(queries, keys)


def test_holes_where_columns_are_not_regular(rng: np.random.Generator) -> None:
    """Such a plan has a forward only."""
    start, count = rng.integers(0, 4, 4000), rng.integers(0, 2, 4000)
    plan = plan_of(splat.from_runs(start, 1, count), 4000, 4)
    with pytest.raises(IrregularPatternError):
        plan.d_key_value  # noqa: B018
    assert holes_of(plan) == Holes(True, False)
    assert holes_of(plan_of(splat.from_runs(np.where(start == 1, 2, start), 1, count), 4000, 4)) == Holes(True, True)


# -- run-time plans ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["causal() & window(6) | sink(1)", "causal() & strided(3)", "causal() & (window(4) | strided(5))",
     "blocked(8, 1, 0)", "dilated_window(2, 3, 4)"],
)  # fmt: skip
def test_runtime_query_offset(text: str) -> None:
    """One traced program makes the tables for every offset; they keep what the static ones keep."""
    pattern, specs = splat.parse(text), []

    @jax.jit
    def tables(offset: Any) -> Any:
        plan = plan_of(pattern, 21, 70, query_offset=offset)
        assert not plan.is_static
        specs[:] = [lower(getattr(plan, which)) for which in SCHEDULES]
        return [made for _, made in specs]

    for offset in (0, 13, 49, 90):
        made = tables(jnp.int32(offset))
        mask = np.asarray(pattern.to_dense(21, 70, query_offset=offset))
        for (spec, _), one, wanted in zip(specs, made, (mask, mask, mask.T), strict=True):
            check(spec, one, wanted)


def test_runtime_segments(rng: np.random.Generator) -> None:
    specs: list[Any] = []

    @jax.jit
    def tables(ids: Any) -> Any:
        pattern = splat.causal() & splat.segments(ids) & splat.window(19) | splat.sink(1)
        specs[:] = [lower(getattr(plan_of(pattern, 50), which)) for which in SCHEDULES]
        return [made for _, made in specs]

    for ids in ([0] * 50, [0] * 10 + [1] * 25 + [-1] * 15, list(range(50)), [-1] * 50, np.sort(rng.integers(0, 6, 50))):
        made = tables(jnp.asarray(ids, jnp.int32))
        pattern = splat.causal() & splat.segments(np.asarray(ids)) & splat.window(19) | splat.sink(1)
        mask = np.asarray(pattern.to_dense(50))
        for (spec, _), one, wanted in zip(specs, made, (mask, mask, mask.T), strict=True):
            check(spec, one, wanted)
