"""The tables that kernels read say what the schedule says: read here in NumPy, as `kernels.tiles` documents them.

Nothing is shared with the kernels, and neither triton nor a GPU is needed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import splat
from splat.acsr import NOWHERE
from splat.codegen.triton.lower import UNROLLED_WALKS, PassSpec, Tables, lower
from splat.pattern import Pattern
from splat.planning import SCHEDULES, Plan, Problem, Schedule, find, make_plan
from splat.planning.kernels import kernel_configs
from splat.tiling import Test as Comparison
from tests.attention_suite import MODELS, SPARSE_SUITE, VOCABULARY
from tests.strategies import Case, cases, more

Array = np.ndarray[Any, Any]

FIELDS = 6


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a pass's kernels do, by its static facts and its tables.

    Attributes:
      rows: int [slots, block_q], `num_rows` where padded.
      kept: int [num_rows, num_cols], how often each pair is kept.
    """

    rows: Array
    kept: Array


def rows_of(spec: PassSpec, tables: Tables, num_rows: int) -> Array:
    if spec.facts.step is None:
        return tables["ROWS"]
    n = np.arange(spec.block_q)
    rows = tables["TILES"][:, :1] + spec.facts.step * n
    return np.where((n < spec.tile_rows) & (rows < num_rows), rows, num_rows)


def walks_of(spec: PassSpec, tables: Tables) -> Iterator[tuple[int, list[tuple[Comparison, ...] | None]]]:
    """Every walk's stride and what its three phases compare: nothing where the phase is full, None: it is absent."""
    if spec.facts.looped is None:
        for walk in spec.facts.walks:
            yield walk.stride, [walk.left or None, () if walk.full else None, walk.right or None]
        return
    stride, tests = spec.facts.looped
    for walk in tables["WALKS"]:
        assert walk.shape == (1 + tests,)
        assert stride in (None, walk[0])
        both = tuple(Comparison(int(n), True, True) for n in walk[1:])
        yield int(walk[0]), [both or None, (), both or None]


def read(spec: PassSpec, tables: Tables, shape: tuple[int, int]) -> Reading:
    num_rows, num_cols = shape
    tiles, bounds = tables["TILES"], tables.get("BOUNDS")
    assert tiles.shape == (spec.num_slots, 1 + FIELDS * spec.num_walks)
    assert all(table.dtype == np.int32 for table in tables.values())
    rows = rows_of(spec, tables, num_rows)
    assert rows.shape == (spec.num_slots, spec.block_q)
    assert ((rows >= 0) & (rows <= num_rows)).all()
    kept = np.zeros((num_rows + 1, num_cols), int)
    for w, (stride, phases) in enumerate(walks_of(spec, tables)):
        for slot in range(spec.num_slots):
            *edges, stop, residue = (int(x) for x in tiles[slot, 1 + FIELDS * w :][:FIELDS])
            assert 0 <= residue + stride * (stop - 1) < num_cols or stop == 0
            for begin, end, tests in zip(edges[:-1], edges[1:], phases, strict=True):
                assert end >= begin
                assert (end - begin) % spec.block_kv == 0
                if end > begin:
                    assert tests is not None, "the kernel has no such phase"
                    assert begin >= 0
                    x = np.arange(begin, end)
                    keep = _kept(tests, bounds, rows[slot], x, num_rows)
                    assert not keep[:, x >= stop].any(), "what is read from `stop` on is not kept"
                    inside = x < stop
                    kept[rows[slot][:, None], (residue + stride * x[inside])[None, :]] += keep[:, inside]
    return Reading(rows, kept[:num_rows])


def _kept(tests: Sequence[Comparison], bounds: Array | None, rows: Array, x: Array, num_rows: int) -> Array:
    """bool [block_q, x]"""
    if not tests:
        return np.broadcast_to((rows < num_rows)[:, None], (rows.size, x.size))
    assert bounds is not None
    assert bounds.shape[1:] == (2, num_rows)
    sides = np.pad(bounds, ((0, 0), (0, 0), (0, 1)))[:, :, rows]
    sides[:, 0, rows == num_rows], sides[:, 1, rows == num_rows] = NOWHERE, -NOWHERE
    keep = np.zeros((rows.size, x.size), bool)
    for test in tests:
        lower, upper = sides[test.component][:, :, None]
        keep |= (not test.lower or x >= lower) & (not test.upper or x < upper)
    return keep


def check_slots(spec: PassSpec, tables: Tables, rows: Array, num_rows: int) -> None:
    """SLOTS names each row's place, -1 where it has none; without SLOTS every row has one."""
    valid = rows[rows < num_rows]
    assert np.unique(valid).size == valid.size, "a row is in two tiles"
    if "SLOTS" not in tables:
        assert spec.facts.covers_rows
        assert valid.size == num_rows
        return
    expected = np.full(num_rows, -1)
    expected[valid] = np.flatnonzero(rows.ravel() < num_rows)
    np.testing.assert_array_equal(tables["SLOTS"], expected)


def check(specs: Sequence[PassSpec], tables: Sequence[Tables], mask: Array) -> None:
    """The passes keep every pair of the mask once; the last one may write in place, the others have slots."""
    assert len(specs) == len(tables)
    total = np.zeros(mask.shape, int)
    for n, (spec, table) in enumerate(zip(specs, tables, strict=True)):
        found = read(spec, {name: np.asarray(one) for name, one in table.items()}, mask.shape)
        total += found.kept
        check_slots(spec, {name: np.asarray(one) for name, one in table.items()}, found.rows, mask.shape[0])
        assert "SLOTS" in table or n == len(specs) - 1
    np.testing.assert_array_equal(total, mask)


def plan_of(pattern: Pattern, q_len: int, kv_len: int, target: str = "interpreter", **settings: Any) -> Plan:
    problem = Problem(pattern, q_len, kv_len, head_dim=64)
    return make_plan(problem, implementation="triton", target=target, **settings)


def masks(plan: Plan, mask: Array) -> Iterator[tuple[Schedule, Array]]:
    for which in SCHEDULES:
        yield getattr(plan, which), mask.T if which == "d_key_value" else mask


# -- static plans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*VOCABULARY, *SPARSE_SUITE.values(), *MODELS.values()], ids=lambda text: text[:32])
@pytest.mark.parametrize("target", ["interpreter", "h100", "mi300x"])
def test_patterns(text: str, target: str) -> None:
    length = 40 if text in VOCABULARY else 48
    plan = plan_of(splat.parse(text), length, length, target)
    for schedule, mask in masks(plan, plan.problem.pattern.to_dense(length)):
        check(*lower(schedule), mask)


@settings(more(4), suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(cases(), st.sampled_from(["interpreter", "h100"]), st.sampled_from([{}, (16, 16), (32, 64), (64, 16)]))
def test_composed_patterns(case: Case, target: str, blocks: Any) -> None:
    sizes = dict(zip(("block_q", "block_kv"), blocks, strict=True)) if blocks else {}
    try:
        plan = plan_of(case.pattern, case.q_len, case.kv_len, target, query_offset=case.query_offset, **sizes)
        for schedule, mask in masks(plan, case.mask):
            check(*lower(schedule), mask)
    except splat.IrregularPatternError:
        hypothesis.reject()


def test_lengths_do_not_change_the_facts() -> None:
    """One kernel for all lengths. The tables hold what differs."""
    for text in ("causal() & window(100, 0)", "strided(16)", "causal() & (window(40, 0) | sink(3))", "global_rows(5)"):
        facts = {
            tuple(spec.facts for spec in lower(plan_of(splat.parse(text), n, n).forward)[0]) for n in (512, 768, 1280)
        }
        assert len(facts) == 1, text


@pytest.mark.parametrize("which", SCHEDULES)
def test_lengths_below_a_stride_are_no_strides(which: str) -> None:
    """Chunks of a prompt, say: each row is alone in its residue, and none of them needs a kernel of its own."""
    for text in ("causal() & (window(64) | strided(512))", "causal() & dilated_window(40, 0, 512)"):
        facts = set()
        for n in range(260, 500, 40):
            problem = Problem(splat.parse(text), n, n, 128, dtype="bfloat16")
            plan = make_plan(problem, implementation="triton", target="h100")
            facts.add(tuple(spec.facts for spec in lower(getattr(plan, which))[0]))
        assert len(facts) == 1, text


#: Some rows, or keys, of these have most of the pairs: they are read from a map.
MAPPED = ("blocked(64, 1, 1) | global_tokens(64) | random_blocks(64, 3, 0)", "random_blocks(64, 3, 0)",
          "causal() & (blocked(256) | lattice_columns(256, 255))")  # fmt: skip


@pytest.mark.parametrize("target", ["a100", "h100", "b200", "mi300x"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_are_those_that_there_are_kernels_for(target: str, head_dim: int) -> None:
    """Also where rows are read from a map: as many as the kernel takes, of what it was surveyed for."""
    arch = find(target).arch
    for dtype, text in itertools.product(("bfloat16", "float32"), MAPPED):
        grouped = text == MAPPED[0]
        problem = Problem(splat.parse(text), 8192, 8192, head_dim, 2 if grouped else 1, dtype=dtype)
        plan = make_plan(problem, implementation="triton", target=target)
        for which in SCHEDULES:
            known = [(one.block_q, one.block_kv) for one in kernel_configs(arch, which, head_dim, dtype, grouped)]
            specs, tables = lower(getattr(plan, which))
            for spec, table in zip(specs, tables, strict=True):
                assert (spec.block_q, spec.block_kv) in known
                assert spec.tile_rows <= spec.block_q
                assert rows_of(spec, table, 8192).shape == (spec.num_slots, spec.block_q)


@pytest.mark.parametrize("target", ["a100", "h100", "b200", "mi300x"])
def test_maps_of_other_sizes_keep_every_pair(target: str) -> None:
    pattern = splat.causal() & (splat.window(50) | splat.strided(50))
    for head_dim in (64, 256):
        plan = make_plan(
            Problem(pattern, 16, 500, head_dim, dtype="bfloat16"), implementation="triton", target=target,
            query_offset=484,
        )  # fmt: skip
        mask = pattern.to_dense(16, 500, query_offset=484)
        for which in SCHEDULES:
            check(*lower(getattr(plan, which)), mask.T if which == "d_key_value" else mask)


def test_more_walks_than_are_written_out() -> None:
    several = "window(3) | lattice_columns(5, 1) | lattice_columns(7, 3)"
    for text, stride in (("random_blocks(4, 12, 0)", 1), (several, None)):
        (spec,), (tables,) = lower(plan_of(splat.parse(text), 60, 60).forward)
        assert spec.num_walks > UNROLLED_WALKS
        assert spec.facts.walks == ()
        assert spec.facts.looped is not None
        assert spec.facts.looped[0] == stride
        assert len(tables["WALKS"]) == spec.num_walks


def test_only_the_tables_that_are_read() -> None:
    """No bounds where every tile is full, no slots where nothing is merged, no rows that follow from the first."""

    def names(text: str) -> list[list[str]]:
        return [sorted(table) for table in lower(plan_of(splat.parse(text), 64, 64).forward)[1]]

    assert names("full()") == [["TILES"]]
    assert names("causal()") == [["BOUNDS", "TILES"]]
    assert names("window(3) | strided(4)") == [["BOUNDS", "SLOTS", "TILES"], ["BOUNDS", "TILES"]]
    assert names("global_rows(3)") == [["ROWS", "SLOTS", "TILES"]]
    assert names("sink(0)") == []


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
        static = plan_of(pattern, 21, 70, query_offset=offset)
        for schedule, wanted in masks(static, mask):
            check(*lower(schedule), wanted)


def test_runtime_segments(rng: np.random.Generator) -> None:
    specs: list[Any] = []

    @jax.jit
    def tables(ids: Any) -> Any:
        pattern = splat.causal() & splat.segments(ids) & splat.window(19) | splat.sink(1)
        specs[:] = [lower(getattr(plan_of(pattern, 50, 50), which)) for which in SCHEDULES]
        return [made for _, made in specs]

    for ids in ([0] * 50, [0] * 10 + [1] * 25 + [-1] * 15, list(range(50)), [-1] * 50, np.sort(rng.integers(0, 6, 50))):
        made = tables(jnp.asarray(ids, jnp.int32))
        pattern = splat.causal() & splat.segments(np.asarray(ids)) & splat.window(19) | splat.sink(1)
        mask = np.asarray(pattern.to_dense(50))
        for (spec, _), one, wanted in zip(specs, made, (mask, mask, mask.T), strict=True):
            check(spec, one, wanted)


def test_the_same_decisions_give_the_same_tables() -> None:
    """Traced or not: the tiles of one walk, with their phases. (The order may differ: ties, tiles without work.)"""
    pattern = splat.causal() & splat.window(40, 0)
    static = lower(plan_of(pattern, 90, 90, block_q=16, block_kv=16, query_offset=0).forward)
    traced = lower(plan_of(pattern, 90, 90, block_q=16, block_kv=16, query_offset=jnp.int32(0)).forward)
    (spec,), (table,) = traced
    assert (spec.tile_rows, spec.block_q, spec.block_kv) == (16, 16, 16)
    for name in ("TILES", "BOUNDS"):
        found, wanted = np.asarray(table[name]), static[1][0][name]
        if name == "TILES":
            found, wanted = (x[np.argsort(x[:, 0])] for x in (found, wanted))
        np.testing.assert_array_equal(found, wanted)
