"""What every implementation of attention must do: one suite, run by each through a subclass.

    class TestXla(AttentionSuite):
        implementation = "xla"

The truth is `splat.reference`, dense attention in float64. Sizes are small and patterns scaled down with them, because
compilation is what these tests spend their time on.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import re
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import splat
from splat import reference
from splat.errors import UnsupportedError
from splat.pattern import Pattern
from splat.remembered import Remembered
from tests.strategies import Case, cases

Array = np.ndarray[Any, Any]

#: Largest error relative to the largest value of the truth (but at least 1), by dtype of the inputs.
TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 1.5e-2, "float16": 2e-3}

#: For what is compiled to run once: without optimisation that is quicker.
QUICK: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}

VOCABULARY = [
    "full()",
    "causal()",
    "window(3, 5)",
    "sliding_window(7)",
    "dilated_window(2, 3, 4)",
    "strided(5)",
    "lattice_columns(6, 2)",
    "blocked(8, 1, 0)",
    "sink(3)",
    "global_rows(5)",
    "global_tokens(3)",
    "segments([" + "0, " * 9 + "-1, -1, " + "1, " * 14 + "0, 0, 0, 0, " + "7, " * 11 + "])",
    "random_blocks(5, 2, 1)",
    "neighborhood((8, 5), (3, 2), (1, 2), (False, True))",
]

#: The patterns of the sparse-attention suite, at a sixteenth or so of their size.
SPARSE_SUITE = {
    "StreamingLLM": "causal() & (sink(2) | window(16, 0))",
    "block-local": "causal() & blocked(8, 2)",
    "OpenAI strided": "causal() & (window(8, 0) | strided(8))",
    "OpenAI fixed": "causal() & (blocked(8) | lattice_columns(8, 7))",
    "LongNet": "causal() & blocked(16) & strided(4)",
}

MODELS = {
    "Longformer": "window(4) | dilated_window(4, 4, 3) | global_tokens(2)",
    "BigBird": "blocked(4, 1, 1) | random_blocks(4, 2, 0) | global_tokens(4)",
    "Gemma local": "causal() & sliding_window(12) & segments([" + "0, " * 30 + "1, " * 18 + "])",
    "neighbourhood": "neighborhood((6, 8), (3, 5))",
    "prefix": "causal() | sink(10) & global_rows(10)",
    "multi-scale": "causal() & (blocked(8) | blocked(24) & strided(3) | blocked(48) & strided(12))",
}

#: What several tests run, so that kernels are compiled once: with heads of 16 in every dtype, with heads of 8.
OF_ALL_DTYPES = ("causal() & window(9) | sink(2)", "strided(4)")
TWO_PASSES = "causal() & window(9) | strided(8)"


class Inputs(NamedTuple):
    """query, key and value, and cotangents of output and log-sum-exp."""

    query: Any
    key: Any
    value: Any
    d_out: Any
    d_lse: Any


class Results(NamedTuple):
    """Output, log-sum-exp, and the cotangents of query, key and value."""

    out: Any
    lse: Any
    d_query: Any
    d_key: Any
    d_value: Any


def draw_inputs(
    rng: np.random.Generator, q_len: int, kv_len: int, *, batch=1, heads=(2, 1), head_dim=8, dtype="float32"
) -> Inputs:
    q_shape, k_shape = (batch, q_len, heads[0], head_dim), (batch, kv_len, heads[1], head_dim)
    shapes = (q_shape, k_shape, k_shape, q_shape)
    q, k, v, d_out = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    d_lse = rng.standard_normal(q_shape[:-1]).astype(np.float64 if dtype == "float64" else np.float32)
    return Inputs(q, k, v, d_out, jnp.asarray(d_lse))


def truth(inputs: Inputs, mask: Array, **options: Any) -> Results:
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in inputs)
    out, lse = reference.attention(q, k, v, mask, **options)
    return Results(out, lse, *reference.gradients(q, k, v, mask, d_out, d_lse, **options))


def compare(found: Results, expected: Results, dtype: str) -> None:
    """Dtypes, shapes, values; -inf exactly where a row attends to nothing, NaN nowhere."""
    accumulator = "float64" if dtype == "float64" else "float32"
    for name, a, b in zip(Results._fields, found, expected, strict=True):
        assert str(a.dtype) == (accumulator if name == "lse" else dtype), name
        a = np.asarray(a, np.float64)
        assert a.shape == b.shape, name
        if name == "lse":
            np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b), err_msg="rows that attend to nothing")
            a, b = a[np.isfinite(b)], b[np.isfinite(b)]
        bound = TOLERANCE[accumulator if name == "lse" else dtype]
        error = np.abs(a - b).max(initial=0)
        assert error <= bound * max(1, np.abs(b).max(initial=0)), f"{name} is off by {error:.2g}"


def in_subprocess(source: str, **environment: str) -> str:
    """What a script prints, run by a fresh interpreter with warnings as errors."""
    env = dict(os.environ) | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(splat.__file__).parents[1])} | environment
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
        check=False,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class AttentionSuite:
    """Subclass it, and name the implementation."""

    implementation: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")

    # -- running -------------------------------------------------------------------------------------------------------

    def attention(self, *args: Any, **kwargs: Any) -> Any:
        return splat.attention(*args, implementation=self.implementation, **kwargs)

    def compiled(
        self, pattern: Pattern, inputs: Inputs, *, quick: bool = False, like: Any = None, **options: Any
    ) -> Any:
        """(inputs, run-time options) -> Results, compiled once; `like` are run-time options of the right shapes."""

        def run(inputs: Inputs, runtime: dict[str, Any]) -> Results:
            def forward(q: Any, k: Any, v: Any) -> Any:
                return self.attention(q, k, v, pattern, return_lse=True, **options, **runtime)

            (out, lse), backward = jax.vjp(forward, *inputs[:3])
            return Results(out, lse, *backward((inputs.d_out, inputs.d_lse)))

        lowered = jax.jit(run).lower(inputs, like or {})
        return lowered.compile(QUICK if quick else {})

    def check(self, pattern: Pattern | str, inputs: Inputs, mask: Array | None = None, **options: Any) -> Results:
        """Values, log-sum-exp and gradients against the truth."""
        pattern = splat.parse(pattern) if isinstance(pattern, str) else pattern
        offset = options.get("query_offset", 0)
        if mask is None:
            mask = pattern.to_dense(inputs.query.shape[1], inputs.key.shape[1], query_offset=offset)
        found = self.compiled(pattern, inputs, **options)(inputs, {})
        known = {name: value for name, value in options.items() if name not in {"quick", "query_offset"}}
        compare(found, truth(inputs, mask, **known), str(inputs.query.dtype))
        return found

    # -- patterns ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("text", VOCABULARY, ids=lambda text: text[:24])
    def test_vocabulary(self, text: str, rng: np.random.Generator) -> None:
        self.check(text, draw_inputs(rng, 40, 40))

    @pytest.mark.parametrize("name", SPARSE_SUITE)
    def test_sparse_suite(self, name: str, rng: np.random.Generator) -> None:
        self.check(SPARSE_SUITE[name], draw_inputs(rng, 64, 64))

    @pytest.mark.parametrize("name", MODELS)
    def test_models(self, name: str, rng: np.random.Generator) -> None:
        self.check(MODELS[name], draw_inputs(rng, 48, 48))

    @settings(
        max_examples=settings().max_examples // 2,  # each is compiled
        phases=[Phase.explicit, Phase.reuse, Phase.generate],  # nor shrunk: that takes minutes
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
    )
    @given(
        cases(max_len=24, depth=2),
        st.sampled_from([(1, 1), (2, 1), (4, 2)]),
        st.sampled_from([None, 2.0]),
        st.integers(0, 2**16),
    )
    def test_composed_patterns(self, case: Case, heads: tuple[int, int], cap: float | None, seed: int) -> None:
        inputs = draw_inputs(np.random.default_rng(seed), case.q_len, case.kv_len, heads=heads, head_dim=4)
        options = dict(query_offset=case.query_offset, logits_soft_cap=cap, quick=True)
        try:
            self.check(case.pattern, inputs, case.mask, **options)
        except splat.IrregularPatternError:
            hypothesis.reject()

    # -- inputs --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("text", OF_ALL_DTYPES)
    def test_dtypes(self, text: str, rng: np.random.Generator) -> None:
        for dtype in self.dtypes:
            self.check(text, draw_inputs(rng, 33, 47, batch=2, head_dim=16, dtype=dtype))

    def test_float64(self, rng: np.random.Generator) -> None:
        with jax.enable_x64(True):
            for text in ("causal() & window(9) | sink(2)", "window(3) | strided(5)"):
                inputs = draw_inputs(rng, 33, 47, batch=2, dtype="float64")
                assert inputs.query.dtype == jnp.float64
                self.check(text, inputs)

    @pytest.mark.parametrize("head_dim", [1, 7, 80])
    def test_odd_head_dims(self, head_dim: int, rng: np.random.Generator) -> None:
        self.check("causal() & window(5)", draw_inputs(rng, 30, 30, head_dim=head_dim))

    @pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 1), (6, 2)])
    def test_grouped_queries(self, heads: tuple[int, int], rng: np.random.Generator) -> None:
        self.check("window(5) | sink(2)", draw_inputs(rng, 20, 20, heads=heads, batch=2))

    @pytest.mark.parametrize("lengths", [(1, 1), (1, 40), (40, 1), (17, 50), (50, 17), (128, 5)])
    def test_rectangles(self, lengths: tuple[int, int], rng: np.random.Generator) -> None:
        self.check("window(7, 3) | strided(6)", draw_inputs(rng, *lengths))

    @pytest.mark.parametrize("shape", [(0, 8, 2, 4), (2, 0, 2, 4)])
    def test_no_queries(self, shape: tuple[int, ...]) -> None:
        q, k = jnp.ones(shape), jnp.ones((shape[0], 5, 2, 4))
        out, lse = self.attention(q, k, k, splat.causal(), return_lse=True)
        assert out.shape == shape
        assert lse.shape == shape[:-1]
        d_k, d_v = jax.grad(lambda k, v: self.attention(q, k, v, splat.causal()).sum(), (0, 1))(k, k)
        assert not d_k.any()
        assert not d_v.any()

    def test_numpy_arrays_are_taken(self) -> None:
        x = np.random.default_rng(0).standard_normal((1, 12, 2, 4)).astype(np.float32)
        out = self.attention(x, x, x, splat.causal())
        assert isinstance(out, jax.Array)
        np.testing.assert_array_equal(out, self.attention(*(jnp.asarray(x),) * 3, splat.causal()))

    # -- options -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("text", ["causal()", "window(3) | strided(5)"])
    def test_kv_lengths(self, text: str, rng: np.random.Generator) -> None:
        """One program for all lengths: none, some, all and more keys than there are."""
        inputs = draw_inputs(rng, 24, 30, batch=4)
        pattern = splat.parse(text)
        run = self.compiled(pattern, inputs, like={"kv_lengths": jnp.zeros(4, jnp.int32)})
        for lengths in ([0, 7, 30, 99], [1, 29, 31, 0]):
            found = run(inputs, {"kv_lengths": jnp.asarray(lengths, jnp.int32)})
            compare(found, truth(inputs, pattern.to_dense(24, 30), kv_lengths=np.array(lengths)), "float32")

    def test_lengths_beyond_int32(self, rng: np.random.Generator) -> None:
        """As sentinels for "no limit": all keys, not none."""
        inputs = draw_inputs(rng, 24, 30, batch=3)
        for text in ("causal()", "strided(4)"):
            lengths = np.array([2**31 - 1, 2**31 + 5, 2**63 - 1])
            found = self.attention(*inputs[:3], splat.parse(text), kv_lengths=lengths)
            np.testing.assert_array_equal(found, self.attention(*inputs[:3], splat.parse(text), kv_lengths=30))
        small = self.attention(*inputs[:3], splat.causal(), kv_lengths=np.array([7, 127, 7], np.int8))
        np.testing.assert_array_equal(small, self.attention(*inputs[:3], splat.causal(), kv_lengths=[7, 30, 7]))

    def test_one_length_for_all(self, rng: np.random.Generator) -> None:
        inputs = draw_inputs(rng, 24, 30, batch=2)
        found = self.attention(*inputs[:3], splat.causal(), kv_lengths=7)
        np.testing.assert_array_equal(found, self.attention(*inputs[:3], splat.causal(), kv_lengths=np.array([7, 7])))

    @pytest.mark.parametrize("text", ["causal() & window(6) | sink(1)", "causal() & strided(3)"])
    def test_query_offset(self, text: str, rng: np.random.Generator) -> None:
        """Static offsets are planned for; a traced one is served by one program."""
        pattern = splat.parse(text)
        inputs = draw_inputs(rng, 9, 40)
        run = self.compiled(pattern, inputs, like={"query_offset": jnp.int32(0)})
        for offset in (0, 13, 31, 60):
            found = run(inputs, {"query_offset": jnp.int32(offset)})
            compare(found, truth(inputs, pattern.to_dense(9, 40, query_offset=offset)), "float32")
        self.check(pattern, inputs, query_offset=13)

    def test_query_offset_that_hides_the_columns(self, rng: np.random.Generator) -> None:
        """Forward as always; backward is refused, because which rows choose a block is known too late."""
        pattern = splat.random_blocks(4, 2, 0)
        q, k, v, *_ = draw_inputs(rng, 9, 40)
        run = jax.jit(lambda q, offset: self.attention(q, k, v, pattern, query_offset=offset))
        for offset in (0, 17):
            expected = self.attention(q, k, v, pattern, query_offset=offset)
            np.testing.assert_allclose(run(q, offset), expected, atol=1e-6)
        with pytest.raises(UnsupportedError, match=r"random_blocks: gradients with a run-time query_offset are not"):
            jax.grad(lambda q: run(q, 3).sum())(q)

    def test_columns_that_are_not_regular(self, rng: np.random.Generator) -> None:
        pattern = splat.from_runs(rng.integers(0, 4, 4000), 1, rng.integers(0, 2, 4000))
        inputs = draw_inputs(rng, 4000, 4, heads=(1, 1), head_dim=4)
        out = self.attention(*inputs[:3], pattern)
        np.testing.assert_allclose(out, truth(inputs, pattern.to_dense(4000, 4)).out, atol=1e-5)
        with pytest.raises(splat.IrregularPatternError, match="gradients cannot be planned for it"):
            jax.grad(lambda q: self.attention(q, *inputs[1:3], pattern).sum())(inputs.query)

    def test_chunks_are_the_whole(self, rng: np.random.Generator) -> None:
        """Queries in chunks, each at its offset: prefill in pieces, and decoding one by one."""
        pattern = splat.causal() & splat.window(6) | splat.sink(2)
        q, k, v, *_ = draw_inputs(rng, 32, 32)
        whole = self.attention(q, k, v, pattern)
        step = jax.jit(lambda q, offset: self.attention(q, k, v, pattern, query_offset=offset))
        chunks = [step(q[:, at : at + 8], at) for at in range(0, 32, 8)]
        np.testing.assert_allclose(jnp.concatenate(chunks, axis=1), whole, atol=1e-6)

    @pytest.mark.parametrize(
        "options", [dict(logits_soft_cap=1.5), dict(scale=0.0), dict(scale=-2.0), dict(scale=1, logits_soft_cap=30)]
    )
    def test_scores(self, options: dict[str, Any], rng: np.random.Generator) -> None:
        self.check(TWO_PASSES, draw_inputs(rng, 30, 30), **options)

    def test_sinks(self, rng: np.random.Generator) -> None:
        """A score of each head in all of its rows, also those that attend to nothing, and its gradient."""
        pattern = (splat.window(6) | splat.strided(5)) & splat.segments([0] * 10 + [-1] * 7 + [1] * 13)
        sinks = np.array([0.7, -np.inf, -3, 20])
        for dtype in self.dtypes:
            inputs = draw_inputs(rng, 30, 30, batch=2, heads=(4, 2), dtype=dtype)

            def run(inputs: Inputs, sinks: Any) -> tuple[Results, Any]:
                def forward(*arrays: Any) -> Any:
                    return self.attention(*arrays[:3], pattern, sinks=arrays[3], return_lse=True)

                (out, lse), backward = jax.vjp(forward, *inputs[:3], sinks)
                *gradients, d_sinks = backward((inputs.d_out, inputs.d_lse))
                return Results(out, lse, *gradients), d_sinks

            found, d_sinks = jax.jit(run)(inputs, jnp.asarray(sinks, jnp.promote_types(dtype, jnp.float32)))
            expected = truth(inputs, pattern.to_dense(30), sinks=sinks)
            compare(found, expected, dtype)
            with np.errstate(invalid="ignore"):
                weights = np.nan_to_num(np.exp(sinks - expected.lse), nan=1)  # where there is nothing but the sink
            d_weights = (expected.out * np.asarray(inputs.d_out, np.float64)).sum(-1)
            wanted = (weights * (np.asarray(inputs.d_lse, np.float64) - d_weights)).sum((0, 1))
            np.testing.assert_allclose(d_sinks, wanted, atol=20 * TOLERANCE[dtype], rtol=10 * TOLERANCE[dtype])

    def test_large_scores_do_not_overflow(self, rng: np.random.Generator) -> None:
        inputs = draw_inputs(rng, 24, 24)
        inputs = inputs._replace(query=inputs.query * 1e4, key=inputs.key * 1e4)
        out, lse = self.attention(*inputs[:3], splat.causal(), return_lse=True)
        expected = truth(inputs, splat.causal().to_dense(24))
        np.testing.assert_allclose(out, expected.out, atol=1e-5)
        np.testing.assert_allclose(lse, expected.lse, atol=1e-6 * np.abs(expected.lse).max())

    @pytest.mark.parametrize("factor", [1e16, -1e16])
    def test_scores_of_any_size(self, factor: float, rng: np.random.Generator) -> None:
        """Equal scores far below or above all others weigh equally."""
        inputs = draw_inputs(rng, 24, 24)
        query, key = jnp.full_like(inputs.query, 1e16), jnp.full_like(inputs.key, factor)
        out, lse = self.attention(query, key, inputs.value, splat.causal(), return_lse=True)
        means = np.cumsum(np.asarray(inputs.value), axis=1) / np.arange(1, 25)[None, :, None, None]
        np.testing.assert_allclose(out, np.repeat(means, out.shape[2] // means.shape[2], axis=2), atol=1e-5)
        np.testing.assert_allclose(lse, 1e16 * factor * 8**0.5, rtol=1e-5)

    def test_a_query_that_is_nan(self, rng: np.random.Generator) -> None:
        """Its results are NaN, its log-sum-exp and gradient too; those of other queries are as before."""
        inputs = draw_inputs(rng, 24, 24)
        broken = inputs._replace(query=inputs.query.at[:, 3].set(np.nan))
        run = self.compiled(splat.causal(), inputs)
        before, after = run(inputs, {}), run(broken, {})
        for name in ("out", "lse", "d_query"):
            one, other = np.array(getattr(before, name)), np.array(getattr(after, name))
            assert np.isnan(other[:, 3]).all(), name
            one[:, 3] = other[:, 3] = 0
            np.testing.assert_allclose(other, one, atol=1e-6, err_msg=name)

    @pytest.mark.parametrize("factor", [1e2, 1e4, 1e6])
    @pytest.mark.parametrize("text", [*OF_ALL_DTYPES, TWO_PASSES])
    def test_weights_of_large_scores(self, text: str, factor: float, rng: np.random.Generator) -> None:
        """Rounded by more than 1, scores say which key is the largest and little else: no weight exceeds 1."""
        pattern = splat.parse(text)
        mask = pattern.to_dense(70)
        head_dim = 8 if text == TWO_PASSES else 16  # as elsewhere: kernels are compiled once
        for dtype in self.dtypes[: 1 if text == TWO_PASSES else None]:
            inputs = draw_inputs(rng, 70, 70, head_dim=head_dim, dtype=dtype)
            if factor * float(jnp.abs(inputs.key).max()) > float(jnp.finfo(dtype).max):
                continue
            inputs = inputs._replace(query=inputs.query * factor, key=inputs.key * factor)
            found = self.compiled(pattern, inputs)(inputs, {})
            expected = truth(inputs, mask)
            lse = expected.lse
            np.testing.assert_allclose(found.lse, lse, atol=1e-6 * np.abs(lse).max())
            scores = np.einsum(
                "btnh,bsh->btns", *(np.asarray(x, np.float64) for x in (inputs.query, inputs.key[:, :, 0]))
            )
            scores = np.where(mask[:, None], scores, -np.inf)
            second, first = np.moveaxis(np.sort(scores)[..., -2:], -1, 0)
            most = np.abs(scores[np.isfinite(scores)]).max()
            is_clear = first - second > max(1e-5 * most, 30 * head_dim**0.5)  # what is not the largest weighs nothing
            assert is_clear.mean() > 0.9
            error = np.abs(np.asarray(found.out, np.float64) - expected.out)[is_clear]
            assert error.max() <= 10 * TOLERANCE[dtype], dtype
            assert all(np.isfinite(np.asarray(x, np.float64)).all() for x in found[2:]), dtype
            bound = np.abs(np.asarray(inputs.d_out, np.float64)).sum(1).max(-1).sum()
            assert np.abs(np.asarray(found.d_value, np.float64)).max() <= 1.01 * bound, dtype

    def test_log_sum_exp_is_returned_when_asked(self, rng: np.random.Generator) -> None:
        inputs = draw_inputs(rng, 24, 24)
        out, lse = self.attention(*inputs[:3], splat.causal(), return_lse=True)
        assert lse.shape == (1, 24, 2)
        np.testing.assert_array_equal(out, self.attention(*inputs[:3], splat.causal()))

    # -- rows that attend to nothing, and what may not be looked at ----------------------------------------------------

    def test_empty_rows(self, rng: np.random.Generator) -> None:
        pattern = splat.window(2) & splat.segments([0] * 10 + [-1] * 7 + [1] * 13)
        found = self.check(pattern, draw_inputs(rng, 30, 30))
        assert not found.out[:, 10:17].any()
        assert np.isneginf(found.lse[:, 10:17]).all()
        assert not found.d_query[:, 10:17].any()
        assert not found.d_key[:, 10:17].any()

    @pytest.mark.parametrize(
        "pattern", [splat.sink(0), splat.window(2) - splat.window(2), splat.sink(3) - splat.full()]
    )
    def test_no_pairs_at_all(self, pattern: Pattern, rng: np.random.Generator) -> None:
        found = self.check(pattern, draw_inputs(rng, 12, 15))
        assert not any(x.any() for x in (found.out, *found[2:]))
        assert np.isneginf(found.lse).all()

    @pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
    def test_nothing_past_the_lengths_is_read(self, poison: float, rng: np.random.Generator) -> None:
        inputs = draw_inputs(rng, 24, 32, batch=2)
        lengths = np.array([0, 11])
        past = (np.arange(32) >= lengths[:, None])[:, :, None, None]
        bad = inputs._replace(key=jnp.where(past, poison, inputs.key), value=jnp.where(past, poison, inputs.value))
        for text in ("window(4) | strided(5)", "full()"):
            pattern = splat.parse(text)
            run = self.compiled(pattern, inputs, like={"kv_lengths": jnp.zeros(2, jnp.int32)})
            found = run(bad, {"kv_lengths": jnp.asarray(lengths, jnp.int32)})
            compare(found, truth(inputs, pattern.to_dense(24, 32), kv_lengths=lengths), "float32")
            for gradient in (found.d_key, found.d_value):
                assert not np.where(past, gradient, 0).any()

    @pytest.mark.parametrize(
        "text",
        [
            "causal() & window(3)",  # keys after the last query
            "lattice_columns(5, 2)",  # keys between the lattice's
            "strided(4) & sink(20)",
            "sink(3) | window(2)",
            "segments([" + "0, " * 8 + "-1, " * 32 + "])",
        ],
    )
    def test_keys_that_no_row_has_are_not_read(self, text: str, rng: np.random.Generator) -> None:
        inputs, pattern = draw_inputs(rng, 12, 40), splat.parse(text)
        mask = pattern.to_dense(12, 40)
        unseen = ~np.asarray(mask.any(axis=0))[None, :, None, None]
        assert unseen.any()
        expected = truth(inputs, mask)
        run = self.compiled(pattern, inputs)
        for poison in (np.nan, np.inf):
            bad = inputs._replace(
                key=jnp.where(unseen, poison, inputs.key), value=jnp.where(unseen, poison, inputs.value)
            )
            compare(run(bad, {}), expected, "float32")

    @pytest.mark.parametrize(
        "text", ["full()", "window(20)", "causal() & segments([" + "0, " * 12 + "-1, " * 9 + "1, " * 19 + "])"]
    )
    def test_holes_are_not_read(self, text: str, rng: np.random.Generator) -> None:
        """Keys, queries and cotangents of positions in no pair, between others in the same tile."""
        pattern = splat.parse(text) & splat.segments([0] * 12 + [-1] * 9 + [1] * 19)
        inputs = draw_inputs(rng, 40, 40)
        hole = ((np.arange(40) >= 12) & (np.arange(40) < 21))[None, :, None, None]
        expected = truth(inputs, pattern.to_dense(40))
        run = self.compiled(pattern, inputs)
        for poison in (np.nan, np.inf):
            q, k, v, d_out = (jnp.where(hole, poison, x) for x in inputs[:4])
            compare(run(Inputs(q, k, v, d_out, inputs.d_lse), {}), expected, "float32")

    def test_a_bad_query_spoils_its_own_row_only(self, rng: np.random.Generator) -> None:
        """In the forward; its keys' gradients are spoilt as in dense attention."""
        inputs = draw_inputs(rng, 24, 24)
        pattern = splat.causal() & splat.window(4)
        bad = inputs.query.at[:, 7].set(jnp.nan)
        out = self.attention(bad, inputs.key, inputs.value, pattern)
        good = self.attention(*inputs[:3], pattern)
        assert np.isnan(out[:, 7]).all()
        rest = np.arange(24) != 7
        np.testing.assert_array_equal(out[:, rest], good[:, rest])

    def test_nan_from_any_pass_stays(self, rng: np.random.Generator) -> None:
        """In the output and in the log-sum-exp of every query that attends to it."""
        inputs = draw_inputs(rng, 40, 40)
        pattern = splat.window(3) | splat.strided(16)
        bad = inputs.key.at[:, 4].set(jnp.nan)
        out, lse = self.attention(inputs.query, bad, inputs.value, pattern, return_lse=True)
        attending = pattern.to_dense(40)[:, 4]
        assert np.isnan(out[:, attending]).all()
        assert np.isnan(lse[:, attending]).all()

    def test_a_query_without_keys_may_hold_anything(self, rng: np.random.Generator) -> None:
        inputs = draw_inputs(rng, 24, 24)
        pattern = splat.window(2) & splat.segments([0] * 10 + [-1] * 4 + [1] * 10)
        expected = truth(inputs, pattern.to_dense(24))
        for poison in (np.nan, np.inf):
            bad = inputs._replace(query=inputs.query.at[:, 10:14].set(poison))
            compare(self.compiled(pattern, bad, quick=True)(bad, {}), expected, "float32")

    # -- determinism ---------------------------------------------------------------------------------------------------

    def test_results_are_the_same_every_time(self, rng: np.random.Generator) -> None:
        """Bitwise: call to call, and compilation to compilation."""
        pattern = splat.window(9) | splat.strided(7) | splat.global_tokens(2)
        inputs = draw_inputs(rng, 70, 70, heads=(4, 2))
        runs = [self.compiled(pattern, inputs) for _ in range(2)]
        first, *others = (run(inputs, {}) for run in runs for _ in range(3))
        for other in others:
            for a, b in zip(first, other, strict=True):
                np.testing.assert_array_equal(a, b)

    def test_rows_do_not_depend_on_their_neighbours_in_the_batch(self, rng: np.random.Generator) -> None:
        inputs = draw_inputs(rng, 24, 24, batch=3)
        pattern = splat.causal() & splat.window(5)
        alone = self.attention(*(x[1:2] for x in inputs[:3]), pattern)
        np.testing.assert_allclose(self.attention(*inputs[:3], pattern)[1:2], alone, atol=1e-6)

    # -- run-time patterns ---------------------------------------------------------------------------------------------

    def test_runtime_segments(self, rng: np.random.Generator) -> None:
        """Other documents, the same program: traced once."""
        inputs = draw_inputs(rng, 32, 32)
        traces = itertools.count()

        @jax.jit
        def run(inputs: Inputs, ids: Any) -> Results:
            next(traces)
            pattern = splat.causal() & splat.segments(ids) & splat.window(9) | splat.sink(1)
            (out, lse), backward = jax.vjp(
                lambda q, k, v: self.attention(q, k, v, pattern, return_lse=True), *inputs[:3]
            )
            return Results(out, lse, *backward((inputs.d_out, inputs.d_lse)))

        for ids in ([0] * 32, [0] * 10 + [1] * 15 + [-1] * 7, list(range(32)), [-1] * 32):
            pattern = splat.causal() & splat.segments(ids) & splat.window(9) | splat.sink(1)
            compare(run(inputs, jnp.asarray(ids)), truth(inputs, pattern.to_dense(32)), "float32")
        assert next(traces) == 1

    def test_without_jit(self, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run-time values in calls outside `jax.jit`: one program too, planned once, and its gradients."""
        plans = []
        module = sys.modules["splat.ops.attention"]
        real = module.make_plan
        monkeypatch.setattr(module, "make_plan", lambda *args, **options: plans.append(args) or real(*args, **options))
        q, k, v, *_ = draw_inputs(rng, 20, 23)

        def loss(q: Any, ids: Any, offset: Any) -> Any:
            out = self.attention(q, k, v, splat.window(12) & splat.segments(ids), query_offset=offset)
            return (out**2).sum(), out

        for ids, offset in (([0] * 6 + [3] * 10 + [-1] * 7, 3), ([5] * 20 + [2] * 3, 1)):
            (_, expected), expected_grad = jax.value_and_grad(loss, has_aux=True)(q, ids, offset)
            plans.clear()
            for _ in range(2):
                (_, out), grad = jax.value_and_grad(loss, has_aux=True)(q, jnp.asarray(ids), jnp.int32(offset))
                np.testing.assert_allclose(out, expected, atol=1e-6)
                np.testing.assert_allclose(grad, expected_grad, atol=1e-5)
            assert len(plans) == (1 if offset == 3 else 0)

    def test_runtime_segments_that_hide_nothing(self, rng: np.random.Generator) -> None:
        """No row of the forward attends to anything, whatever the documents are; gradients ask the columns."""
        q, k, v, *_ = draw_inputs(rng, 16, 40)

        def loss(q: Any, k: Any, ids: Any) -> Any:
            pattern = splat.window(8) | splat.causal() & splat.global_rows(4) & splat.segments(ids)
            return (self.attention(q, k, v, pattern, query_offset=20) ** 2).sum()

        found = jax.jit(jax.grad(loss, (0, 1)))(q, k, jnp.zeros(40, jnp.int32))
        for a, b in zip(found, jax.grad(loss, (0, 1))(q, k, [0] * 40), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)

    def test_vmap_over_segments(self, rng: np.random.Generator) -> None:
        """A batch of different documents, with gradients."""
        inputs = draw_inputs(rng, 24, 24, batch=3)
        ids = np.array([[0] * 24, [0] * 9 + [1] * 15, [0] * 4 + [1] * 12 + [-1] * 8])

        def loss(q: Any, k: Any, v: Any, ids: Any, d_out: Any) -> Any:
            out = self.attention(q[None], k[None], v[None], splat.causal() & splat.segments(ids))[0]
            return (out * d_out).sum(), out

        grad = jax.grad(loss, (0, 1, 2), has_aux=True)
        (*gradients,), out = jax.jit(jax.vmap(grad))(*inputs[:3], jnp.asarray(ids), inputs.d_out)
        for n in range(3):
            mask = (splat.causal() & splat.segments(ids[n])).to_dense(24)
            one = Inputs(*(x[n : n + 1] for x in inputs))
            expected = truth(one._replace(d_lse=np.zeros_like(one.d_lse)), mask)
            np.testing.assert_allclose(out[n : n + 1], expected.out, atol=1e-5)
            for a, b in zip(gradients, expected[2:], strict=True):
                np.testing.assert_allclose(a[n : n + 1], b, atol=1e-5)

    def test_vmap_over_offsets(self, rng: np.random.Generator) -> None:
        """Decoding a batch of sequences that are at different positions."""
        inputs = draw_inputs(rng, 1, 30, batch=3)
        pattern = splat.causal() & splat.window(7) | splat.sink(2)
        offsets = np.array([0, 12, 29])
        out = jax.jit(
            jax.vmap(lambda q, k, v, at: self.attention(q[None], k[None], v[None], pattern, query_offset=at)[0])
        )(*inputs[:3], offsets)
        for n, offset in enumerate(offsets):
            mask = pattern.to_dense(1, 30, query_offset=int(offset))
            expected = truth(Inputs(*(x[n : n + 1] for x in inputs)), mask)
            np.testing.assert_allclose(out[n : n + 1], expected.out, atol=1e-5)

    @pytest.mark.parametrize("q_len", [1, 9])
    def test_an_offset_for_each_sequence(self, q_len: int, rng: np.random.Generator) -> None:
        """As one call for each of them; per head, too, and with documents known at run time."""
        local, ids = splat.causal() & splat.window(7), jnp.asarray(rng.integers(0, 2, 60).cumsum())
        q, k, v, *_ = draw_inputs(rng, q_len, 30, batch=3)
        for pattern in (local | splat.sink(2), splat.per_head([local, splat.full()]), local & splat.segments(ids)):

            def loss(q: Any, k: Any, v: Any, offset: Any, lengths: Any, pattern: Any = pattern) -> Any:
                out, lse = self.attention(q, k, v, pattern, query_offset=offset, kv_lengths=lengths, return_lse=True)
                return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), out

            run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
            offsets, lengths = np.array([0, 12, 29]), jnp.array([30, 9, 30])
            (_, found), gradients = run(q, k, v, offsets, lengths)
            for n, offset in enumerate(offsets):
                own = q[n : n + 1], k[n : n + 1], v[n : n + 1], jnp.int32(offset), lengths[n : n + 1]
                (_, expected), of_one = run(*own)
                np.testing.assert_allclose(found[n : n + 1], expected, atol=1e-5)
                for a, b in zip(gradients, of_one, strict=True):
                    np.testing.assert_allclose(a[n : n + 1], b, atol=1e-5)

    @pytest.mark.parametrize("known", [True, False], ids=["static", "run-time"])
    def test_ranks_are_not_promoted(self, known: bool, rng: np.random.Generator) -> None:
        """Code is traced, forward and backward, where jax_numpy_rank_promotion is "raise"."""
        inputs = draw_inputs(rng, 32, 32, batch=2)
        ids, lengths = [0] * 10 + [1] * 22, np.array([20, 32])
        local = splat.causal() & (splat.window(9) | splat.strided(4))

        def loss(q: Any, k: Any, v: Any, offset: Any, ids: Any) -> Any:
            one, lse = self.attention(q, k, v, local, query_offset=offset, kv_lengths=lengths, return_lse=True)
            other = self.attention(q, k, v, splat.causal() & splat.segments(ids) & splat.window(9) | splat.sink(1))
            return (one + other).sum() + lse.sum()

        grad = jax.grad(loss, (0, 1, 2))
        with jax.numpy_rank_promotion("raise"):
            if known:
                jax.make_jaxpr(lambda *arrays: grad(*arrays, 0, ids))(*inputs[:3])
            else:
                jax.make_jaxpr(grad)(*inputs[:3], jnp.int32(0), jnp.asarray(ids))

    # -- one pattern for each head -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
    def test_per_head(self, heads: tuple[int, int], rng: np.random.Generator) -> None:
        """In any order and grouping; heads with one pattern run together."""
        local, strided = splat.causal() & splat.window(5), splat.strided(4)
        pattern = splat.per_head([local, strided, local, splat.global_tokens(2) | splat.window(1)])
        self.check(pattern, draw_inputs(rng, 20, 28, heads=heads, batch=2))

    def test_per_head_with_options(self, rng: np.random.Generator) -> None:
        pattern = splat.per_head([splat.window(5), splat.window(5), splat.full(), splat.sink(0)]) & splat.causal()
        lengths = np.array([9, 28])
        inputs = draw_inputs(rng, 20, 28, heads=(4, 2), batch=2)
        mask = pattern.to_dense(20, 28, query_offset=3)
        found = self.compiled(pattern, inputs, query_offset=3, kv_lengths=lengths)(inputs, {})
        compare(found, truth(inputs, mask, kv_lengths=lengths), "float32")

    def test_heads_with_equal_patterns_are_one(self, rng: np.random.Generator) -> None:
        inputs = draw_inputs(rng, 20, 20, heads=(2, 2))
        together = self.attention(*inputs[:3], splat.per_head([splat.window(3), splat.window(3)]))
        np.testing.assert_allclose(together, self.attention(*inputs[:3], splat.window(3)), atol=1e-6)

    # -- transformations -----------------------------------------------------------------------------------------------

    def test_vmap(self, rng: np.random.Generator) -> None:
        inputs = draw_inputs(rng, 20, 20, batch=6)
        pattern = splat.causal() & splat.window(5)
        folded = [x.reshape(3, 2, *x.shape[1:]) for x in inputs[:3]]
        out = jax.vmap(lambda q, k, v: self.attention(q, k, v, pattern))(*folded)
        np.testing.assert_allclose(out.reshape(6, *out.shape[2:]), self.attention(*inputs[:3], pattern), atol=1e-6)
        moved = [jnp.moveaxis(x, 0, 2) for x in folded]
        out = jax.vmap(lambda q, k, v: self.attention(q, k, v, pattern), in_axes=2, out_axes=2)(*moved)
        np.testing.assert_allclose(
            jnp.moveaxis(out, 2, 0).reshape(6, 20, 2, 8), self.attention(*inputs[:3], pattern), atol=1e-6
        )

    def test_checkpoint_and_scan(self, rng: np.random.Generator) -> None:
        """As in a model: rematerialised layers in a scan, under jit and grad."""
        inputs = draw_inputs(rng, 20, 20, heads=(2, 2))
        pattern = splat.causal() & splat.window(5)
        weights = jnp.asarray(rng.standard_normal((3, 8, 8)) / 3, jnp.float32)

        def model(weights: Any, attend: Any) -> Any:
            def layer(x: Any, w: Any) -> Any:
                h = x @ w
                return x + attend(h, h, x), None

            return (jax.lax.scan(jax.checkpoint(layer), inputs.value, weights)[0] ** 2).sum()

        def dense(q: Any, k: Any, v: Any) -> Any:
            return jax.nn.dot_product_attention(q, k, v, mask=pattern.to_dense(20)[None, None])

        ours = jax.jit(jax.grad(lambda w: model(w, lambda q, k, v: self.attention(q, k, v, pattern))))(weights)
        theirs = jax.grad(lambda w: model(w, dense))(weights)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(jnp.abs(theirs).max()))

    def test_gradient_of_one_argument(self, rng: np.random.Generator) -> None:
        inputs = draw_inputs(rng, 20, 20)
        pattern = splat.causal() & splat.window(5)
        expected = truth(inputs._replace(d_lse=np.zeros_like(inputs.d_lse)), pattern.to_dense(20))
        for n, name in enumerate(("d_query", "d_key", "d_value")):
            found = jax.grad(lambda *x: (self.attention(*x, pattern) * inputs.d_out).sum(), n)(*inputs[:3])
            np.testing.assert_allclose(found, getattr(expected, name), atol=1e-5)

    @pytest.mark.parametrize("text", ["causal() & window(5)", "window(2) | strided(4)", "~causal() & window(3)"])
    def test_forward_over_reverse(self, text: str, rng: np.random.Generator) -> None:
        """Hessian-vector products, in all three arguments at once; the last pattern has a row without keys."""
        q, k, v, tangent, _ = draw_inputs(rng, 20, 20, heads=(2, 2))
        pattern = splat.parse(text)
        mask = pattern.to_dense(20)

        def dense(q: Any, k: Any, v: Any) -> Any:
            out = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])
            return jnp.where(np.asarray(mask.any(axis=1))[None, :, None, None], out, 0)

        def hvp(attend: Any) -> Any:
            grad = jax.grad(lambda q, k, v: (attend(q, k, v) ** 2).sum(), (0, 1, 2))
            return jax.jit(lambda *x: jax.jvp(grad, x, (tangent, tangent, -tangent))[1])(q, k, v)

        for a, b in zip(hvp(lambda *x: self.attention(*x, pattern)), hvp(dense), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(jnp.abs(b).max())))

    def test_forward_mode_is_refused(self, rng: np.random.Generator) -> None:
        q, k, v, *_ = draw_inputs(rng, 8, 8)
        for call in (
            lambda: jax.jvp(lambda q: self.attention(q, k, v, splat.causal()), (q,), (q,)),
            lambda: jax.jit(jax.jacfwd(lambda q: self.attention(q, k, v, splat.causal())))(q),
            lambda: jax.jvp(lambda q: self.attention(q, k, v, splat.causal(), query_offset=jnp.int32(1)), (q,), (q,)),
        ):
            with pytest.raises(UnsupportedError) as caught:
                call()
            assert "splat.attention does not support forward mode (jax.jvp, jax.jacfwd) alone" in str(caught.value)
            assert "jax.jvp(jax.grad(f), ...), jax.hessian" in str(caught.value)
            assert "mask=pattern.to_dense(...)" in str(caught.value)

    def test_forward_mode_of_a_jitted_function(self, rng: np.random.Generator) -> None:
        """Refused too, in JAX's own words: the function has been traced by then."""
        q, k, v, *_ = draw_inputs(rng, 8, 8)
        jitted = jax.jit(lambda q: self.attention(q, k, v, splat.causal()))
        with pytest.raises(TypeError, match=r"can't apply forward-mode autodiff \(jvp\) to a custom_vjp function"):
            jax.jvp(jitted, (q,), (q,))

    def test_reverse_over_reverse_is_refused(self, rng: np.random.Generator) -> None:
        q, k, v, *_ = draw_inputs(rng, 8, 8)

        def loss(q: Any) -> Any:
            return (self.attention(q, k, v, splat.causal()) ** 2).sum()

        with pytest.raises((UnsupportedError, ValueError), match=r"(?i)reverse"):
            jax.grad(lambda q: (jax.grad(loss)(q) ** 2).sum())(q)

    def test_export(self, rng: np.random.Generator) -> None:
        """Written and read again, by another process say."""
        pytest.importorskip("flatbuffers", reason="jax.export needs the flatbuffers package to serialise")
        from jax import export

        q, k, v, *_ = draw_inputs(rng, 20, 20)
        pattern = splat.causal() & splat.window(5) | splat.sink(1)
        run = jax.jit(lambda q, k, v: self.attention(q, k, v, pattern))
        written = export.export(run)(q, k, v).serialize(vjp_order=1)
        read = export.deserialize(written)
        np.testing.assert_allclose(read.call(q, k, v), run(q, k, v), atol=1e-6)
        found = jax.grad(lambda q: read.call(q, k, v).sum())(q)
        np.testing.assert_allclose(found, jax.grad(lambda q: run(q, k, v).sum())(q), atol=1e-5)

    def test_export_for_any_batch(self, rng: np.random.Generator) -> None:
        """Forward and gradients."""
        pytest.importorskip("flatbuffers", reason="jax.export needs the flatbuffers package to serialise")
        from jax import export

        q, k, v, *_ = draw_inputs(rng, 24, 24, batch=3)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return (self.attention(q, k, v, splat.causal() & splat.window(5) | splat.strided(4)) ** 2).sum()

        (batch,) = export.symbolic_shape("batch")
        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        kinds = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), jnp.float32) for x in (q, k, v)]
        expected = run(q, k, v)
        jax.eval_shape(run, *kinds)  # its kernels may be others than those of three batch entries
        found = export.export(run, disabled_checks=self.export_checks())(*kinds).call(q, k, v)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    @staticmethod
    def export_checks() -> list[Any]:
        """What an export is not to check."""
        return []

    # -- memory --------------------------------------------------------------------------------------------------------

    def test_plans_that_are_not_remembered_are_gone(
        self, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the programs that were made of them: JAX's memory of these is not to keep both for good."""
        planner = sys.modules["splat.planning.plan"]
        monkeypatch.setattr(planner, "_remembered", Remembered(entries=1))
        q, k, v, *_ = draw_inputs(rng, 8, 8)
        gone = []
        for left in range(3):
            jax.block_until_ready(self.attention(q, k, v, splat.window(left, 0)))
            (plan,) = planner._remembered._known.values()
            gone.append(weakref.ref(plan))
            del plan
        gc.collect()
        assert [one() is None for one in gone] == [True, True, False]

    @pytest.mark.parametrize("text", ["window(8) | strided(32) | global_tokens(3)", "causal()", "full()"])
    def test_no_score_matrix(self, text: str) -> None:
        """No array of the program is nearly as large as the scores would be; forward and backward."""
        batch, heads, n = 4, 16, 2048
        x = jax.ShapeDtypeStruct((batch, n, heads, 4), jnp.float32)

        def loss(q: Any, k: Any, v: Any) -> Any:
            return (self.attention(q, k, v, splat.parse(text)) ** 2).sum()

        shapes = tensor_shapes(jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).as_text())
        assert x.shape in shapes
        assert not any(sorted(shape)[-2:] == [n, n] for shape in shapes)
        assert max(math.prod(shape) for shape in shapes) < batch * heads * n * n / 8

    def test_memory_of_a_long_sequence(self) -> None:
        """65,536 positions, 8 heads of 64: 0.4 GB of inputs. A score matrix would need 137 GB."""
        printed = in_subprocess(
            f"""
            import pathlib, resource, jax, jax.numpy as jnp, splat

            def peak_kib():
                status = pathlib.Path("/proc/self/status")
                if status.exists():  # ru_maxrss also counts the process that this one was started from
                    return int(status.read_text().split("VmHWM:")[1].split()[0])
                return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

            pattern = splat.window(256)
            q, k, v = (jnp.full((1, 65536, 8, 64), x, jnp.float32) for x in (0.1, 0.2, 0.3))
            attend = lambda q, k, v: splat.attention(q, k, v, pattern, implementation={self.implementation!r})
            out = jax.jit(attend)(q, k, v)
            print(float(abs(out - 0.3).max()))
            print(peak_kib())
            grad = jax.jit(jax.grad(lambda q, k, v: attend(q, k, v).sum(), (0, 1, 2)))(q, k, v)
            print(float(abs(grad[2] - 1)[:, 512:-512].max()))
            print(peak_kib())
            """
        )
        error, forward_kib, d_value_error, backward_kib = map(float, printed.split())
        assert error < 1e-5
        assert d_value_error < 1e-3
        assert forward_kib * 1024 < 1.5e9
        assert backward_kib * 1024 < 2.5e9


def tensor_shapes(stablehlo: str) -> set[tuple[int, ...]]:
    """The shapes of all tensors in the text of a program."""
    found = re.findall(r"tensor<((?:\d+x)+)[a-z]", stablehlo)
    return {tuple(int(n) for n in one.rstrip("x").split("x")) for one in found}
