"""Passes in parts ("split KV"): where a forward has fewer programs than the GPU has multiprocessors.

What decides is replaced here, so that small problems are divided, in more parts than they have tiles too.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import splat
from splat.codegen.base import Options
from splat.codegen.triton import program
from splat.codegen.triton.launch import Launch
from splat.codegen.triton.lower import PassSpec, lower
from splat.codegen.triton.offline import Compiled, Job, compile_all
from splat.codegen.triton.parts import in_parts
from splat.planning import Problem, find, make_plan
from splat.planning import plan as planning
from splat.planning.parts import PER_UNIT
from splat.remembered import Remembered
from tests.attention_suite import MODELS, SPARSE_SUITE, VOCABULARY, compare, draw_inputs, truth
from tests.codegen.triton.test_lower import plan_of as tables_plan
from tests.codegen.triton.test_lower import read
from tests.strategies import Case, cases, fewer, more

pytest.importorskip("triton", reason="triton is not installed: the interpreted kernels are untested here")

from splat.codegen.triton import record
from tests.codegen.triton.numpy_attention import attend, carry_out, check, plan_of

pytestmark = pytest.mark.sampled(1 / 3)

LOCAL = "causal() & (sink(2) | window(9, 0))"
MERGED = "window(3) | strided(4)"


@pytest.fixture
def divide(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the number of parts of every pass; plans that know how they were run before are forgotten."""
    monkeypatch.setattr(planning, "_remembered", Remembered(entries=16))

    def set_to(parts: int) -> None:
        monkeypatch.setattr(program, "parts_of", lambda programs, *others: parts)

    return set_to


def dividing(parts: int) -> Any:
    """As a context, for tests that hypothesis runs many times."""
    changed = pytest.MonkeyPatch()
    changed.setattr(program, "parts_of", lambda programs, *others: parts)
    return changed


# -- tables ------------------------------------------------------------------------------------------------------------


def check_tables(spec: PassSpec, tables: Any, parts: int, shape: tuple[int, int]) -> None:
    """Parts keep what the whole keeps, about the same number of tiles each, and have their results side by side."""
    divided, made = in_parts(spec, tables, parts, shape[0])
    np.testing.assert_array_equal(read(divided, made, shape).kept, read(spec, tables, shape).kept)
    assert (divided.num_slots, divided.parts) == (spec.num_slots * parts, parts)
    walks = made["TILES"][:, 1:].reshape(parts, spec.num_slots, -1, 6)
    tiles = (walks[..., 3] - walks[..., 0]).sum(-1) // spec.block_kv
    assert (tiles.max(0) - tiles.min(0) <= 1).all()
    assert tiles.sum(0).max(initial=0) == spec.longest
    found = read(spec, tables, shape).rows[:, : spec.tile_rows].ravel()
    slots = np.full(shape[0] + 1, -1)
    slots[found] = np.arange(found.size)
    np.testing.assert_array_equal(made["SLOTS"], slots[:-1])


@settings(more(2), suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(cases(), st.sampled_from(["interpreter", "h100"]), st.integers(2, 9))
def test_parts_of_tables_keep_every_pair(case: Case, target: str, parts: int) -> None:
    try:
        plan = tables_plan(case.pattern, case.q_len, case.kv_len, target, query_offset=case.query_offset)
        for spec, tables in zip(*lower(plan.forward), strict=True):
            check_tables(spec, tables, parts, (case.q_len, case.kv_len))
    except splat.IrregularPatternError:
        hypothesis.reject()


def test_parts_of_traced_tables() -> None:
    """One traced program for every offset, in as many parts for all of them."""
    pattern, specs = splat.parse(LOCAL), []

    @jax.jit
    def tables(offset: Any) -> Any:
        made = lower(tables_plan(pattern, 3, 200, query_offset=offset).forward)
        specs[:] = [in_parts(spec, table, 4, 3) for spec, table in zip(*made, strict=True)]
        return [table for _, table in specs]

    for offset in (0, 50, 197, 300):
        made = tables(jnp.int32(offset))
        kept = sum(
            read(spec, {name: np.asarray(x) for name, x in table.items()}, (3, 200)).kept
            for (spec, _), table in zip(specs, made, strict=True)
        )
        np.testing.assert_array_equal(kept, pattern.to_dense(3, 200, query_offset=offset))
        assert [spec.longest for spec, _ in specs] == [spec.num_walks * 13 for spec, _ in specs]  # of any offset


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*VOCABULARY, *SPARSE_SUITE.values(), *MODELS.values()], ids=lambda text: text[:32])
def test_patterns(text: str, divide: Any, rng: np.random.Generator) -> None:
    """Also with more parts than a row tile has tiles: most of those are empty."""
    divide(3)
    length = 40 if text in VOCABULARY else 48
    check(text, draw_inputs(rng, length, length, heads=(1, 1)))


@fewer(2)
@given(
    cases(max_len=40, depth=2),
    st.integers(2, 5),
    st.sampled_from([(1, 1), (2, 1)]),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_composed_patterns(
    case: Case, parts: int, heads: tuple[int, int], cap: float | None, with_lengths: bool, seed: int
) -> None:
    hypothesis.assume(len(case.pattern.runs(case.rows, case.cols)) <= 10)  # others take as long as all these
    rng = np.random.default_rng(seed)
    inputs = draw_inputs(rng, case.q_len, case.kv_len, heads=heads, head_dim=4)
    lengths = [int(rng.integers(0, case.kv_len + 3))] if with_lengths else None
    options: Any = dict(settings=dict(query_offset=case.query_offset), lengths=lengths, logits_soft_cap=cap)
    changed = dividing(parts)
    try:
        check(case.pattern, inputs, mask=case.mask, **options)
    except splat.IrregularPatternError:
        hypothesis.reject()
    finally:
        changed.undo()


@pytest.mark.parametrize("lengths", [[0, 1], [15, 90], [200, 17]])
@pytest.mark.parametrize("text", ["full()", "causal()", MERGED, "window(150) & strided(3)"])
@pytest.mark.parametrize("options", [{}, dict(DESCRIPTORS=True)], ids=["pointers", "descriptors"])
def test_lengths_that_leave_parts_without_keys(
    text: str, lengths: list[int], options: dict[str, Any], divide: Any, rng: np.random.Generator
) -> None:
    divide(4)
    inputs = draw_inputs(rng, 5, 200, heads=(4, 2), batch=2)
    check(text, inputs, lengths=lengths, settings=dict(query_offset=195), **options)


@pytest.mark.parametrize(
    ("text", "launched"),
    [
        ("causal()", ["splat_forward", "splat_merge"]),
        ("window(3) | strided(4)", ["splat_forward", "splat_forward", "splat_merge"]),
        ("global_rows(3)", ["splat_forward", "splat_merge"]),
        ("window(4) | global_rows(3)", ["splat_forward", "splat_forward", "splat_merge"]),
    ],
)
def test_one_merge(text: str, launched: list[str], divide: Any, rng: np.random.Generator) -> None:
    """Of all passes and their parts, where the last one is divided, or has not every row."""
    divide(2)
    made: list[Launch] = []

    def launch(one: Launch) -> list[Any]:
        made.append(one)
        return carry_out(one)

    inputs = draw_inputs(rng, 70, 70, heads=(1, 1))
    plan = plan_of(text, inputs)
    compare(attend(plan, inputs, launch=launch), truth(inputs, plan.problem.pattern.to_dense(70)), "float32")
    assert [one.kernel.name for one in made if one.kernel.name in ("splat_forward", "splat_merge")] == launched


def test_only_an_earlier_pass_is_divided(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Its parts are merged slot by slot, and the last pass does what it always does."""
    inputs = draw_inputs(rng, 70, 70, heads=(2, 1), batch=2)
    plan = plan_of("window(4) | global_rows(3)", inputs)
    few = 4  # of 1 row tile, 2 heads and 2 batch entries
    monkeypatch.setattr(program, "parts_of", lambda programs, *others: 3 if programs == few else 1)
    made: list[tuple[str, int, str]] = []

    def launch(one: Launch) -> list[Any]:
        made.append((one.kernel.name, one.programs, one.outputs[0].dtype))
        return carry_out(one)

    for lengths in (None, [31, 2]):
        expected = truth(inputs, plan.problem.pattern.to_dense(70), kv_lengths=lengths and np.asarray(lengths))
        compare(attend(plan, inputs, lengths=lengths, launch=launch), expected, "float32")
    forward = [one for one in made if one[0] in ("splat_forward", "splat_merge")][:3]
    assert [name for name, *_ in forward] == ["splat_forward", "splat_merge", "splat_forward"]
    assert forward[0][1] == 3 * few


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layouts_and_dtypes(dtype: str, divide: Any, rng: np.random.Generator) -> None:
    divide(3)
    for text in (LOCAL, MERGED, "random_blocks(3, 6, 0) | lattice_columns(5, 1)"):
        check(text, draw_inputs(rng, 30, 30, heads=(2, 1), head_dim=20, dtype=dtype), scale=0.3)


@pytest.mark.parametrize("options", [{}, dict(DESCRIPTORS=True)], ids=["pointers", "descriptors"])
def test_what_no_row_has_is_not_read(options: dict[str, Any], divide: Any, rng: np.random.Generator) -> None:
    divide(3)
    inputs = draw_inputs(rng, 2, 90, batch=2, heads=(1, 1))
    plan = plan_of("causal() & (sink(3) | window(40, 0))", inputs, query_offset=70)
    mask = plan.problem.pattern.to_dense(2, 90, query_offset=70)
    for lengths in (None, [7, 50]):
        unseen = ~mask.any(axis=0) | (np.arange(90) >= np.array(lengths or [90, 90])[:, None])
        bad = [np.where(unseen[..., None, None], np.nan, x).astype(x.dtype) for x in (inputs.key, inputs.value)]
        found = attend(plan, inputs._replace(key=bad[0], value=bad[1]), lengths=lengths, **options)
        compare(found, truth(inputs, mask, kv_lengths=None if lengths is None else np.array(lengths)), "float32")


def test_results_do_not_change_from_run_to_run(divide: Any, rng: np.random.Generator) -> None:
    divide(3)
    inputs = draw_inputs(rng, 20, 90)
    plan = plan_of("full()", inputs)
    for a, b in zip(attend(plan, inputs), attend(plan, inputs), strict=True):
        np.testing.assert_array_equal(a, b)


# -- behind JAX --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced", [False, True])
def test_decoding_behind_jax(traced: bool, divide: Any, rng: np.random.Generator) -> None:
    """Values, log-sum-exp and gradients of one query, at offsets that are known or not."""
    divide(3)
    q, k, v, d_out, _ = draw_inputs(rng, 1, 70, heads=(4, 2), batch=2)
    lengths = jnp.array([61, 30])

    def attend(implementation: str, q: Any, k: Any, v: Any, offset: Any) -> Any:
        return splat.attention(
            q, k, v, splat.causal() & splat.window(50) | splat.sink(2), query_offset=offset, kv_lengths=lengths,
            logits_soft_cap=3.0, return_lse=True, implementation=implementation,
        )  # fmt: skip

    def loss(implementation: str, *args: Any) -> Any:
        out, lse = attend(implementation, *args)
        return (out * d_out).sum() + (lse * lse).sum()

    def both(implementation: str, offset: Any) -> Any:
        made = attend(implementation, q, k, v, offset)
        return made, jax.grad(lambda *args: loss(implementation, *args, offset), argnums=(0, 1, 2))(q, k, v)

    ours = jax.jit(lambda offset: both("triton", offset)) if traced else lambda offset: both("triton", offset)
    for offset in (29, 60):
        for found, wanted in zip(jax.tree.leaves(ours(offset)), jax.tree.leaves(both("xla", offset)), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


# -- what is launched for GPUs -----------------------------------------------------------------------------------------


def decoding(
    pattern: str = "causal()", *, q_len: int = 1, kv_len: int = 131072, heads: tuple[int, int] = (32, 8),
    batch: int = 1, head_dim: int = 128, dtype: str = "bfloat16", target: str = "h100", lengths: bool = False,
) -> list[Launch]:  # fmt: skip
    """The launches of the forward of the last queries of a cache."""
    problem = Problem(splat.parse(pattern), q_len, kv_len, head_dim, *heads, batch, dtype)
    plan = make_plan(problem, implementation="triton", target=target, query_offset=kv_len - q_len)
    made = record.launches(plan, Options(head_dim**-0.5), lengths=lengths)
    return made[: [one.kernel.name for one in made].index("splat_delta")]


@pytest.mark.parametrize("target", ["a100", "h100", "h200", "b200", "mi300x"])
@pytest.mark.parametrize("pattern", ["causal()", "full()", "causal() & (window(4096, 0) | sink(4))"])
def test_every_multiprocessor_has_a_program(target: str, pattern: str) -> None:
    forward, merge = decoding(pattern, target=target)
    units = find(target).units
    assert forward.programs <= PER_UNIT * units
    assert forward.programs >= min(units, 256 if "window" in pattern else units)  # 66 tiles are 8 parts at most
    assert merge.kernel.name == "splat_merge"
    assert merge.programs == 32


def test_results_of_parts_are_small() -> None:
    """Whatever the lengths: the rows of two row tiles a multiprocessor at most."""
    for q_len, kv_len, heads in ((1, 1 << 20, (8, 1)), (64, 1 << 17, (32, 8)), (128, 1 << 17, (64, 8))):
        forward, _ = decoding(q_len=q_len, kv_len=kv_len, heads=heads)
        out, lse = forward.outputs
        assert np.prod(lse.shape) == forward.programs * min(q_len, forward.constants["BLOCK_Q"])
        assert np.prod(lse.shape) <= PER_UNIT * 132 * forward.constants["BLOCK_Q"]
        assert out.shape == (*lse.shape, 128)


@pytest.mark.parametrize(
    "settings",
    [dict(q_len=512), dict(batch=5), dict(kv_len=960), dict(q_len=8192, kv_len=8192, heads=(4, 4))],
    ids=lambda settings: next(iter(settings)),
)
def test_what_has_enough_programs_is_left_alone(settings: dict[str, Any]) -> None:
    assert [one.kernel.name for one in decoding(**settings)] == ["splat_forward"]


def test_lengths_and_offsets_share_kernels() -> None:
    """Of a GPU's decoding: how many parts there are is no constant of the text, nor of the compiled kernels."""
    made = [decoding(kv_len=kv_len) for kv_len in (2048, 65536, 131072)]
    made += [decoding(heads=(32, 8), batch=2)]
    assert len({one.programs for one, _ in made}) > 1
    assert len({(one.kernel.source, merge.kernel.source) for one, merge in made}) == 1
    assert len({tuple(sorted(one.constants.items())) for one, _ in made}) == 1


def compiled_part(*, which: int = 0, **arguments: Any) -> Launch:
    return decoding(**arguments)[which]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiled(arch: str) -> None:
    target = {"sm_80": "a100", "sm_90": "h100", "sm_100": "b200", "gfx942": "mi300x"}[arch]
    cases = [dict(which=which, lengths=lengths) for which in (0, 1) for lengths in (False, True)]
    cases += [
        dict(which=0, head_dim=64),
        dict(which=1, head_dim=256),
        dict(which=0, pattern=LOCAL.replace("9", "4096")),
    ]
    factory = f"{__name__}:compiled_part"
    jobs = [Job(factory, dict(target=target) | case, arch, name=str(case)) for case in cases]
    for case, found in zip(cases, compile_all(jobs), strict=True):
        assert isinstance(found, Compiled), found
        allowed = 16 if arch == "sm_80" and case["which"] == 0 else 0  # what the table says of the kernel
        assert found.problems(allowed, needs_tensor_core=case["which"] == 0) == [], case
