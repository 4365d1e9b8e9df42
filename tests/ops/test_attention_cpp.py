"""The C++ implementation: what every implementation must do, and what is its own."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import splat
from splat.codegen.cpp import bind_jax, compiler
from splat.errors import UnsupportedError
from tests.attention_suite import AttentionSuite, draw_inputs
from tests.score_mod_suite import ScoreModSuite
from tests.sharding_suite import ShardingSuite

pytestmark = pytest.mark.skipif(
    compiler.missing() is not None, reason=f"nothing can be compiled here: {compiler.missing()}"
)


class TestCpp(AttentionSuite, ShardingSuite):
    implementation = "cpp"
    export_checks = staticmethod(bind_jax.export_checks)

    def test_forward_over_reverse(self, rng: np.random.Generator) -> None:  # type: ignore[override]
        """Refused, with the implementation that can."""
        q, k, v, tangent, _ = draw_inputs(rng, 8, 8, heads=(1, 1))

        def gradient(q: Any) -> Any:
            return jax.grad(lambda q: (self.attention(q, k, v, splat.causal()) ** 2).sum())(q)

        with pytest.raises(UnsupportedError, match="Use implementation='xla' for Hessian-vector products"):
            jax.jvp(gradient, (q,), (tangent,))

    def test_export(self, rng: np.random.Generator) -> None:
        """JAX vouches for custom calls of its own only: what is exported is for a process that knows the kernels."""
        pytest.importorskip("flatbuffers", reason="jax.export needs the flatbuffers package to serialise")
        from jax import export

        q, k, v, *_ = draw_inputs(rng, 20, 20)
        run = jax.jit(lambda q, k, v: self.attention(q, k, v, splat.causal() & splat.window(5)))
        expected = run(q, k, v)
        gradient = jax.grad(lambda q: run(q, k, v).sum())(q)
        with pytest.raises(ValueError, match="custom call"):
            export.export(run)(q, k, v).serialize()
        read = export.deserialize(
            export.export(run, disabled_checks=self.export_checks())(q, k, v).serialize(vjp_order=1)
        )
        np.testing.assert_array_equal(read.call(q, k, v), expected)
        np.testing.assert_array_equal(jax.grad(lambda q: read.call(q, k, v).sum())(q), gradient)


class TestCppScoreMod(ScoreModSuite):
    implementation = "cpp"
    export_checks = staticmethod(bind_jax.export_checks)


@pytest.mark.parametrize("name", ["tables", "functions", "bias"])
def test_score_mods_with_all_gradients_in_one(name: str, rng: np.random.Generator, monkeypatch: Any) -> None:
    monkeypatch.setenv("NPROC", "1")
    TestCppScoreMod().test_score_mods(name, rng)


def test_score_mods_without_text(rng: np.random.Generator) -> None:
    """A loop: refused by name, served by xla otherwise."""
    q, k, v, *_ = draw_inputs(rng, 12, 12)

    def score_mod(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + jax.lax.fori_loop(0, i - j, lambda n, x: x + 1.0 / (1 + n), 0.0)

    def run(implementation: Any) -> Any:
        return splat.attention(q, k, v, splat.causal(), score_mod=score_mod, implementation=implementation)

    with pytest.raises(UnsupportedError, match="score_mod uses while, and the cpp implementation has no text for that"):
        run("cpp")
    np.testing.assert_array_equal(run(None), run("xla"))


@pytest.mark.parametrize(
    ("pattern", "sizes", "options"),
    [
        ("window(9, 4)", {}, {}),
        ("causal() & window(9) | sink(2)", {"heads": (4, 2)}, {}),
        ("window(5) | strided(8)", {"head_dim": 20}, {}),
        ("window(5) | strided(8)", {"head_dim": 20, "dtype": "float64"}, {}),
        ("global_rows(3) | strided(4)", {"heads": (6, 1)}, {"logits_soft_cap": 3.0}),
        ("global_rows(5)", {}, {}),
        ("causal()", {"batch": 3}, {"kv_lengths": np.array([70, 1, 33])}),
        ("random_blocks(8, 2, 1) | window(3)", {"head_dim": 33}, {"scale": 0.3}),
        (splat.window(2) & splat.segments([0] * 20 + [-1] * 17 + [1] * 33), {}, {}),
        ("dilated_window(3, 2, 4)", {"head_dim": 80}, {"query_offset": 5}),
    ],
)
def test_all_gradients_in_one(
    pattern: splat.Pattern | str,
    sizes: dict[str, Any],
    options: dict[str, Any],
    rng: np.random.Generator,
    monkeypatch: Any,
) -> None:
    """The kernel that is chosen where the heads keep all threads busy: as they do one."""
    monkeypatch.setenv("NPROC", "1")
    called = []
    prepare = bind_jax.prepare
    monkeypatch.setattr(bind_jax, "prepare", lambda facts: called.append(facts.kernel) or prepare(facts))
    with jax.enable_x64(sizes.get("dtype") == "float64"):  # pyright: ignore[reportCallIssue]
        inputs = draw_inputs(rng, 70, 70, **{"head_dim": 8, **sizes})
        TestCpp().check(pattern, inputs, **options)
    assert {"forward", "backward"} == set(called)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_holes_are_not_read", ["full()"]),
        ("test_a_query_without_keys_may_hold_anything", []),
        ("test_empty_rows", []),
        ("test_weights_of_large_scores", ["strided(4)", 1e4]),
        ("test_nothing_past_the_lengths_is_read", [np.nan]),
        ("test_results_are_the_same_every_time", []),
        ("test_a_query_that_is_nan", []),
    ],
)
def test_of_the_suite_with_all_gradients_in_one(
    name: str, arguments: list[Any], rng: np.random.Generator, monkeypatch: Any
) -> None:
    monkeypatch.setenv("NPROC", "1")
    getattr(TestCpp(), name)(*arguments, rng)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_large_results(dtype: str, threads: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a second-level cache holds: they are stored past the caches, by all kernels that can."""
    monkeypatch.setenv("NPROC", threads)
    drawn = draw_inputs(rng, 4100, 4100, batch=1, heads=(4, 4), head_dim=64)
    q, k, v, cotangent = (jax.numpy.asarray(x, dtype) for x in drawn[:4])
    assert q.size * q.dtype.itemsize >= 2 << 20

    def run(implementation: str) -> Any:
        pattern = splat.parse("window(9) | strided(64)")
        out, vjp = jax.vjp(lambda q, k, v: splat.attention(q, k, v, pattern, implementation=implementation), q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *vjp(cotangent))]

    for ours, wanted in zip(run("cpp"), run("xla"), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-5 if dtype == "float32" else 4e-2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_soft_cap_far_above_all_scores(dtype: str, rng: np.random.Generator) -> None:
    """Changes nothing: tanh is right relative to its value."""
    with jax.enable_x64(dtype == "float64"):  # pyright: ignore[reportCallIssue]
        inputs = draw_inputs(rng, 30, 30, head_dim=64, dtype=dtype)
        suite, pattern = TestCpp(), splat.parse("window(9)")
        for cap in (1e5, 1e7):
            suite.check(pattern, inputs, logits_soft_cap=cap)
            found = suite.attention(*inputs[:3], pattern, logits_soft_cap=cap)
            plain = suite.attention(*inputs[:3], pattern)
            np.testing.assert_allclose(found, plain, atol=2e-6 if dtype == "float32" else 1e-8)
