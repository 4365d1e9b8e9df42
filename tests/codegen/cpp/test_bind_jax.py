"""Compiled kernels as JAX operations: registered once, under names of their own, and what they refuse.

The kernels' numbers are for `tests/ops/test_attention_cpp.py`.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import splat
from splat.codegen.base import Options
from splat.codegen.cpp import bind_jax, compiler
from splat.codegen.cpp.emit import kernels_of
from splat.codegen.cpp.generate import KernelFacts, source
from splat.codegen.cpp.lower import passes_of
from splat.errors import CompileError, UnsupportedError
from splat.planning import Plan, Problem, make_plan
from tests.attention_suite import in_subprocess

pytestmark = pytest.mark.skipif(
    compiler.missing() is not None, reason=f"nothing can be compiled here: {compiler.missing()}"
)

OPTIONS = Options(0.5)
FLOAT32 = jnp.float32


def plan_of(text: str = "causal() & window(5)", length: int = 20, dtype: str = "float32") -> Plan:
    return make_plan(Problem(splat.parse(text), length, length, 8, 2, 1, 1, dtype), implementation="cpp")


def facts_of(kernel: str = "forward", **settings: Any) -> KernelFacts:
    (facts,) = kernels_of(plan_of(**settings), OPTIONS, kernel)
    return facts


def operands_of(plan: Plan, batch: int = 1) -> list[Any]:
    """query, key, value and tables of a forward call."""
    p = plan.problem
    q, k = (jnp.ones((batch, p.q_len, heads, p.head_dim), p.dtype) for heads in (p.num_q_heads, p.num_kv_heads))
    _, tables = passes_of(plan, "forward")
    return [q, k, k, *(table for one in tables for table in one)]


def run(facts: KernelFacts, operands: list[Any]) -> list[Any]:
    q = operands[0]
    results = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:3], FLOAT32)]
    return bind_jax.call(facts, OPTIONS, operands, results)


# -- registration ------------------------------------------------------------------------------------------------------


def test_registered_once() -> None:
    """By any number of threads; one text is one name."""
    facts = facts_of(length=64)
    with ThreadPoolExecutor(8) as pool:
        names = set(pool.map(lambda _: bind_jax.prepare(facts), range(32)))
    assert len(names) == 1
    assert bind_jax.prepare(facts_of(length=96)) in names, "another length is the same kernel"
    assert bind_jax.prepare(facts_of(text="strided(4)")) not in names


def test_names_do_not_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two libraries are two names, even if all that names are made of is the same."""

    class Library:
        """A copy of a library, at another address."""

        _name = "one"

        def __init__(self, function: Any):
            self.splat_ffi = function

    function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    libraries = [Library(function(lambda _: None)) for _ in range(2)]
    rest = iter(libraries)
    monkeypatch.setattr(bind_jax.compiler, "load", lambda name, text: next(rest))
    registered: dict[str, Any] = {}
    monkeypatch.setattr(bind_jax.jax.ffi, "register_ffi_target", lambda name, *_, **__: registered.update({name: 1}))
    monkeypatch.setattr(bind_jax.jax.ffi, "pycapsule", lambda entry: entry)
    monkeypatch.setattr(bind_jax, "_targets", {})
    names = [bind_jax.prepare(facts_of()) for _ in libraries]
    assert len(set(names)) == 2
    assert set(registered) == set(names)


def test_side_by_side() -> None:
    every = kernels_of(plan_of(), OPTIONS)
    bind_jax.prepare_all(every)
    assert len({bind_jax.prepare(facts) for facts in every}) == 3


@pytest.mark.parametrize("implementation", ["cpp", None])
def test_what_does_not_compile_is_said(
    implementation: str | None, monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    """Also where an implementation was not asked for: a compiler that fails is not one that is missing."""
    monkeypatch.setattr(bind_jax, "source", lambda facts: source(facts).replace("Facts {", "Facts {;("))
    q = jnp.ones((1, 20, 2, 8))
    with pytest.raises(CompileError, match="the C\\+\\+ compiler failed on forward_float32_h8"):
        splat.attention(q, q, q, splat.causal() & splat.window(7), implementation=implementation)


def test_without_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare:
        _name = "bare"

    monkeypatch.setattr(bind_jax.compiler, "load", lambda name, text: Bare())
    with pytest.raises(UnsupportedError, match="this jaxlib brings no headers of the XLA FFI"):
        bind_jax.prepare(facts_of())


def test_nothing_is_compiled_at_import() -> None:
    printed = in_subprocess(
        """
        import splat
        from splat.codegen.cpp import compiler
        compiler.load = None
        import splat.codegen.cpp.emit
        from splat.codegen.cpp import bind_jax
        assert not bind_jax._targets
        print(splat.plan("causal()", 64, implementation="cpp").implementation)
        """
    )
    assert printed.strip() == "cpp"


# -- calls that do not fit ---------------------------------------------------------------------------------------------


def test_the_call_that_fits() -> None:
    plan = plan_of()
    out, lse = run(facts_of(), operands_of(plan))
    np.testing.assert_allclose(out, 1, atol=1e-6)
    assert lse.shape == (1, 20, 2)


def other(operands: list[Any], at: int, value: Any) -> list[Any]:
    return [*operands[:at], value, *operands[at + 1 :]]


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, lambda x: x.astype("bfloat16"), "query has type 16, not 11"),
        (1, lambda x: x[0], "key has 3 axes, not 4"),
        (1, lambda x: x[..., :7], "axis 3 of key has length 7, not 8"),
        (2, lambda x: x[:, :19], "axis 1 of value has length 19, not 20"),
        (2, lambda x: x[:, :, [0, 0]], "axis 2 of value has length 2, not 1"),
        (3, lambda x: x[:1], "axis 0 of GROUPS has length 1, not 2"),
        (3, lambda x: x[:, :, :4], "axis 2 of GROUPS has length 4, not 5"),
        (3, lambda x: x.astype(np.float32), "GROUPS has type 11, not 4"),
        (4, lambda x: x[:, :, :19], "axis 2 of BOUNDS has length 19, not 20"),
    ],
)
def test_what_does_not_fit_is_refused(at: int, change: Any, message: str) -> None:
    """By the library itself: a kernel never runs on arrays of other sizes."""
    operands = operands_of(plan_of())
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"splat: {message}"):
        jax.block_until_ready(run(facts_of(), other(operands, at, change(operands[at]))))


def test_counts_that_do_not_fit_are_refused() -> None:
    operands = operands_of(plan_of())
    with pytest.raises(jax.errors.JaxRuntimeError, match="splat: 5 operands, or one more with kv_lengths, but there"):
        jax.block_until_ready(run(facts_of(), operands[:-1]))
    q = operands[0]
    results = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    with pytest.raises(jax.errors.JaxRuntimeError, match="splat: 2 results, but there are 1"):
        jax.block_until_ready(bind_jax.call(facts_of(), OPTIONS, operands, results))
    three = jnp.ones((1, 20, 3, 8))
    with pytest.raises(jax.errors.JaxRuntimeError, match="splat: 3 query heads cannot share 2 key heads"):
        jax.block_until_ready(run(facts_of(), [three, three[:, :, :2], three[:, :, :2], *operands[3:]]))


def test_lengths_are_one_operand_more() -> None:
    operands = operands_of(plan_of())
    lengths = jnp.zeros(1, jnp.int32)
    out, lse = run(facts_of(), [*operands[:3], lengths, *operands[3:]])
    assert not out.any()
    assert np.isneginf(lse).all()
    with pytest.raises(jax.errors.JaxRuntimeError, match="splat: axis 0 of kv_lengths has length 2, not 1"):
        jax.block_until_ready(run(facts_of(), [*operands[:3], jnp.zeros(2, jnp.int32), *operands[3:]]))


# -- threads -----------------------------------------------------------------------------------------------------------


def test_calls_side_by_side() -> None:
    """From several threads at once, and several in one program: each has all of XLA's pool to draw from."""
    plan = plan_of("window(9) | strided(7)", 300)
    facts = kernels_of(plan, OPTIONS, "forward")[0]
    rng = np.random.default_rng(0)
    given = [jnp.asarray(rng.standard_normal((4, 300, 2, 8)), FLOAT32) for _ in range(6)]
    tables = operands_of(plan)[3:]

    @jax.jit
    def attend(*queries: Any) -> list[Any]:
        return [run(facts, [q, q[:, :, :1], q[:, :, :1], *tables])[0] for q in queries]

    alone = [attend(q)[0] for q in given]
    for a, b in zip(attend(*given), alone, strict=True):
        np.testing.assert_array_equal(a, b)
    with ThreadPoolExecutor(6) as pool:
        for _ in range(10):
            for (a,), b in zip(pool.map(attend, given), alone, strict=True):
                np.testing.assert_array_equal(a, b)
