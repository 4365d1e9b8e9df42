"""The kernel for few queries: values for any plan, in parts or not, and that it reads what is attended to alone."""

from __future__ import annotations

from typing import Any

import hypothesis
import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import splat
from splat import reference
from splat.codegen.base import Options
from splat.codegen.cpp import bind_jax, compiler, generate
from splat.codegen.cpp.call import ARRAYS, PACKED, Call, Placed, prepare
from splat.codegen.cpp.call import Array as PlacedArray
from splat.codegen.cpp.emit import kernels_of
from splat.pattern import Pattern
from splat.planning import Plan, Problem, make_plan
from tests.attention_suite import TOLERANCE, draw_inputs
from tests.strategies import Case, cases

needs_compiler = pytest.mark.skipif(
    compiler.missing() is not None, reason=f"nothing can be compiled here: {compiler.missing()}"
)

Array = np.ndarray[Any, Any]
TYPES = {"bfloat16": ml_dtypes.bfloat16}
SINKS = "causal() & window(900, 0) | sink(4)"


def plan_of(
    pattern: Pattern | str, q_len: int, kv_len: int, head_dim: int, heads: tuple[int, int], batch: int, dtype: str,
    offset: int = 0,
) -> Plan:  # fmt: skip
    pattern = splat.parse(pattern) if isinstance(pattern, str) else pattern
    problem = Problem(pattern, q_len, kv_len, head_dim, *heads, batch, dtype)
    return make_plan(problem, implementation="cpp", query_offset=offset)


def draw(rng: np.random.Generator, plan: Plan) -> dict[str, Array]:
    p = plan.problem
    shapes = {"query": (p.q_len, p.num_q_heads), "key": (p.kv_len, p.num_kv_heads), "value": (p.kv_len, p.num_kv_heads)}
    dtype = TYPES.get(p.dtype, p.dtype)
    return {n: rng.standard_normal((p.batch, *shape, p.head_dim)).astype(dtype) for n, shape in shapes.items()}


def place(x: Array) -> Placed:
    batch, position, head = (stride // x.itemsize for stride in x.strides[:3])
    return x.ctypes.data, batch, position, head


def decode(
    plan: Plan, arrays: dict[str, Array], lengths: Array | None = None, cap: float | None = None, threads: int = 2
) -> tuple[Array, Array]:
    """(output, log-sum-exp), of the kernel itself, whatever the number of queries is; outputs held NaN before."""
    p = plan.problem
    out = np.full(arrays["query"].shape, np.nan, arrays["query"].dtype)
    lse = np.full(out.shape[:3], np.nan, np.float64 if p.dtype == "float64" else np.float32)
    prepared = prepare(plan, Options(0.3, cap), "decode", lengths=lengths is not None)
    if prepared is None:
        return np.zeros_like(out), np.full_like(lse, -np.inf)
    placed = {name: place(x) for name, x in {**arrays, "out": out, "lse": lse}.items()}
    sizes = (p.batch, p.q_len, p.kv_len, p.num_q_heads, p.num_kv_heads)
    prepared(placed, None if lengths is None else lengths.ctypes.data, sizes, threads)
    return out, lse


def check(found: tuple[Array, Array], plan: Plan, arrays: dict[str, Array], mask: Array, **options: Any) -> None:
    q, k, v = (x.astype(np.float64) for x in arrays.values())
    expected = reference.attention(q, k, v, mask, scale=0.3, **options)
    for name, a, b, dtype in zip(
        ("out", "lse"), found, expected, (plan.problem.dtype, str(found[1].dtype)), strict=True
    ):
        np.testing.assert_array_equal(np.isneginf(a.astype(np.float64)), np.isneginf(b), err_msg=name)
        error = np.abs(np.where(np.isneginf(b), 0, a.astype(np.float64) - np.where(np.isneginf(b), 0, b)))
        bound = TOLERANCE[dtype] * max(1, np.abs(b[np.isfinite(b)]).max(initial=0))
        assert error.max(initial=0) <= bound, f"{name} is off by {error.max()}"  # not if it is NaN


@needs_compiler
@given(
    cases(max_len=60, depth=2),
    st.sampled_from([(1, 1), (2, 1), (7, 1), (4, 4)]),
    st.sampled_from(["float32", "float64", "bfloat16"]),
    st.integers(0, 2**16),
)
@settings(suppress_health_check=[hypothesis.HealthCheck.too_slow])
def test_composed_patterns(case: Case, heads: tuple[int, int], dtype: str, seed: int) -> None:
    """Any number of queries: more than a unit has are several units."""
    try:
        plan = plan_of(case.pattern, case.q_len, case.kv_len, 8, heads, 2, dtype, case.query_offset)
    except splat.IrregularPatternError:
        hypothesis.reject()
    rng = np.random.default_rng(seed)
    arrays = draw(rng, plan)
    lengths = rng.integers(0, case.kv_len + 1, 2).astype(np.int32) if seed % 2 else None
    check(decode(plan, arrays, lengths), plan, arrays, case.mask, kv_lengths=lengths)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("head_dim", [1, 5, 24, 64, 200, 1030])
def test_head_dims(head_dim: int, dtype: str, rng: np.random.Generator) -> None:
    for q_len, heads in ((1, (4, 4)), (3, (7, 1))):
        plan = plan_of("window(20) | strided(3)", q_len, 150, head_dim, heads, 2, dtype, 100)
        arrays = draw(rng, plan)
        check(decode(plan, arrays), plan, arrays, plan.problem.pattern.to_dense(q_len, 150, query_offset=100))


LONG = [SINKS, "full()", "strided(3)", "blocked(64) | strided(2)", "random_blocks(16, 60, 0)", "causal()"]


@needs_compiler
@pytest.mark.parametrize("text", LONG)
@pytest.mark.parametrize("q_len", [1, 2, 8])
def test_parts(q_len: int, text: str, rng: np.random.Generator) -> None:
    """Columns in parts, which are merged; with lengths, a sequence may have fewer of them than the plan, or none."""
    pattern, kv_len = splat.parse(text), 3000
    for heads, offset in (((1, 1), 2900), ((24, 2), 2000), ((3, 3), 700)):
        plan = plan_of(pattern, q_len, kv_len, 24, heads, 2, "float32", offset)
        arrays, mask = draw(rng, plan), pattern.to_dense(q_len, kv_len, query_offset=offset)
        for lengths in (None, np.array([kv_len, 3], np.int32), np.array([0, 1700], np.int32)):
            found = decode(plan, arrays, lengths)
            check(found, plan, arrays, mask, kv_lengths=lengths)
            for threads in (1, 3, 8):
                again = decode(plan, arrays, lengths, threads=threads)
                assert [x.tobytes() for x in again] == [x.tobytes() for x in found], "bits depend on threads"


@needs_compiler
@pytest.mark.parametrize(("factor", "cap", "atol"), [(1.0, None, 1e-5), (1e3, None, 1e-2), (1e3, 5.0, 1e-5)])
def test_the_maximum_rises(factor: float, cap: float | None, atol: float, rng: np.random.Generator) -> None:
    """Again and again, and from part to part; or falls. Scores in the thousands are rounded to a thousandth or so."""
    plan = plan_of("full()", 2, 2000, 64, (2, 1), 1, "float32")
    drawn = draw(rng, plan)
    rising = np.linspace(0, factor, 2000, dtype=np.float32)[:, None, None]
    for factors in (rising, rising[::-1]):
        arrays = drawn | {"key": drawn["key"] * factors}
        q, k, v = (x.astype(np.float64) for x in arrays.values())
        out, lse = reference.attention(q, k, v, np.ones((2, 2000), bool), scale=0.3, logits_soft_cap=cap)
        found = decode(plan, arrays, cap=cap)
        np.testing.assert_allclose(found[0], out, atol=atol)
        np.testing.assert_allclose(found[1], lse, rtol=1e-6, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(
    "text", [SINKS, "strided(5)", "window(3, 4) | strided(9)", "lattice_columns(100, 7) | window(2)"]
)
def test_nothing_else_is_read(text: str, rng: np.random.Generator) -> None:
    """NaN in what some query attends to spoils that query alone, and elsewhere no bit of any."""
    pattern = splat.parse(text)
    plan = plan_of(pattern, 3, 1500, 24, (4, 2), 1, "float32", 1200)
    arrays, mask = draw(rng, plan), pattern.to_dense(3, 1500, query_offset=1200)
    found = decode(plan, arrays)
    for row in range(3):
        spoiled = arrays | {name: arrays[name].copy() for name in ("key", "value")}
        for name in ("key", "value"):
            spoiled[name][:, ~mask[row]] = np.nan
        again = decode(plan, spoiled)
        for a, b in zip(found, again, strict=True):
            np.testing.assert_array_equal(a[:, row], b[:, row])
        for other in range(3):
            assert np.isnan(again[0][:, other]).all() == bool((mask[other] & ~mask[row]).any())


@needs_compiler
@pytest.mark.parametrize("batch", [60, 700])
def test_many_heads_have_fewer_parts(batch: int, rng: np.random.Generator) -> None:
    """Enough of them keep all threads busy, and what parts have made waits in memory."""
    plan = plan_of("full()", 1, 2000, 4, (8, 8), batch, "float32")
    arrays = draw(rng, plan)
    found = decode(plan, arrays)
    check(found, plan, arrays, np.ones((1, 2000), bool))
    assert [x.tobytes() for x in decode(plan, arrays, threads=5)] == [x.tobytes() for x in found]


@needs_compiler
def test_rows_that_attend_to_nothing(rng: np.random.Generator) -> None:
    plan = plan_of("strided(4) & window(0, 2000)", 4, 900, 24, (2, 2), 1, "float32", 898)
    arrays = draw(rng, plan)
    mask = plan.problem.pattern.to_dense(4, 900, query_offset=898)
    assert not mask.any(axis=1).all()
    assert mask.any()
    check(decode(plan, arrays), plan, arrays, mask)


# -- which kernel is called --------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("q_len", [1, generate.few_queries("float32"), generate.few_queries("float32") + 1])
def test_few_queries_have_it(q_len: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients too, one program for all positions, and the forward of many queries gives the same."""
    called = []
    real = bind_jax.prepare
    monkeypatch.setattr(bind_jax, "prepare", lambda facts: called.append(facts.kernel) or real(facts))
    pattern = splat.parse(SINKS)
    q, k, v, *_ = draw_inputs(rng, q_len, 1100, batch=2, heads=(4, 2))

    def attention(q: Any, at: Any) -> Any:
        return splat.attention(q, k, v, pattern, query_offset=at, implementation="cpp")

    run, gradient = jax.jit(attention), jax.jit(jax.grad(lambda q, at: (attention(q, at) ** 2).sum()))
    for at in (0, 3, 777, 1095):
        mask = pattern.to_dense(q_len, 1100, query_offset=at)
        a, b, c = (np.asarray(x, np.float64) for x in (q, k, v))
        out, lse = reference.attention(a, b, c, mask)
        np.testing.assert_allclose(run(q, at), out, atol=1e-5)
        d_query, *_ = reference.gradients(a, b, c, mask, 2 * out, np.zeros_like(lse))
        np.testing.assert_allclose(gradient(q, at), d_query, atol=1e-4)
    wanted = "decode" if q_len <= generate.few_queries("float32") else "forward"
    assert {"decode", "forward"} & set(called) == {wanted}


@needs_compiler
def test_a_batch_at_different_positions(rng: np.random.Generator) -> None:
    """One call for all: nobody's keys are copied. Gradients too, with the lengths of the sequences."""
    pattern = splat.parse(SINKS)
    q, k, v, *_ = draw_inputs(rng, 2, 1100, batch=4, heads=(4, 2))
    at, lengths = np.array([0, 3, 777, 1095]), np.array([1100, 2, 1100, 900])

    def one(q: Any, k: Any, v: Any, at: Any, length: Any) -> Any:
        options = dict(query_offset=at, kv_lengths=length[None], implementation="cpp")
        return splat.attention(q[None], k[None], v[None], pattern, **options)[0]

    run = jax.jit(jax.vmap(one)).lower(q, k, v, at, lengths).compile()
    text = run.as_text() or ""
    assert text.count("custom-call(") == 1, text
    assert " while(" not in text
    gradients = jax.grad(lambda q, k, v: (jax.vmap(one)(q, k, v, at, lengths) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
    out = run(q, k, v, at, lengths)
    for n in range(4):
        a, b, c = (np.asarray(x[n : n + 1], np.float64) for x in (q, k, v))
        mask, options = pattern.to_dense(2, 1100, query_offset=int(at[n])), dict(kv_lengths=lengths[n : n + 1])
        expected, lse = reference.attention(a, b, c, mask, **options)
        np.testing.assert_allclose(out[n : n + 1], expected, atol=1e-5)
        wanted = reference.gradients(a, b, c, mask, 2 * expected, np.zeros_like(lse), **options)
        for found, x in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(found[n : n + 1], x, atol=1e-4)


@needs_compiler
def test_positions_in_one_cache(rng: np.random.Generator) -> None:
    """One after the other: what they share is not repeated."""
    pattern = splat.parse(SINKS)
    q, k, v, *_ = draw_inputs(rng, 1, 1100, heads=(4, 2))
    queries, at = rng.standard_normal((5, *q.shape)).astype(np.float32), np.array([0, 3, 777, 1095, 1099])

    def one(q: Any, at: Any) -> Any:
        return splat.attention(q, k, v, pattern, query_offset=at, implementation="cpp")

    run = jax.jit(jax.vmap(one)).lower(queries, at).compile()
    assert "f32[5,1,1100," not in (run.as_text() or "")
    for n, out in enumerate(run(queries, at)):
        mask = pattern.to_dense(1, 1100, query_offset=int(at[n]))
        a, b, c = (np.asarray(x, np.float64) for x in (queries[n], k, v))
        expected, _ = reference.attention(a, b, c, mask)
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_calls_are_packed_as_they_are_declared() -> None:
    call = Call(*range(5), 5.5, 6.5)
    for n, name in enumerate(ARRAYS):
        setattr(call, name, PlacedArray(*range(10 * n + 10, 10 * n + 14)))
    call.kv_lengths, call.tables, call.num_groups, call.where, call.arrays = 777, 888, 999, 111, 222
    places = [number for n in range(len(ARRAYS)) for number in range(10 * n + 10, 10 * n + 14)]
    assert bytes(call) == PACKED.pack(*range(5), 5.5, 6.5, *places, 777, 888, 999, 111, 222)


def test_one_text_for_all_patterns_and_positions() -> None:
    """No token waits for a compiler."""
    texts = {
        generate.source(facts)
        for text in LONG
        for at in (0, 1, 1000, 2995)
        for facts in kernels_of(plan_of(text, 1, 3000, 64, (8, 2), 1, "float32", at), Options(0.125), "forward")
    }
    assert len(texts) == 1
