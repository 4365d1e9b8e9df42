"""What every implementation that has score modification does with `score_mod` and `bias`; see `attention_suite`.

The truth is dense attention in float64, differentiated by JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import splat
from splat import reference
from splat.pattern import Pattern
from tests.attention_suite import QUICK, TOLERANCE, Inputs, draw_inputs, in_subprocess

BATCH, Q_LEN, KV_LEN, HEADS = 2, 33, 39, (4, 2)

#: Its rows' first keys are masked, and some rows' last.
PATTERN = splat.causal() & (splat.window(9) | splat.sink(2))


def alibi(a: Any, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return s + a[h] * (j - i)


def tables(a: Any, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    """Of distances, queries and keys; undefined for keys after the query."""
    return s * jnp.log(2.0 + i) + a[h, jnp.clip(i - j, 0, 11)] + a[0, i] - a[1, -1 - j] * jnp.log(i - j + 0.5)


def nonlinear(a: Any, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return a[h] * jnp.tanh(s) * jax.nn.sigmoid(s) + jax.nn.softplus(s) * (1 + b) - jnp.abs(s) ** 1.5 / 4


def whole_numbers(a: Any, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    far = (j - i) // 3 + jnp.minimum((j - i) % 4, b) - jnp.sign(i - 20) * (-j // 5) + jax.lax.rem(j - 40, jnp.int32(7))
    return s + a[h] * far.astype(s.dtype) / 10


def bits(a: Any, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    """Integers that come around, are shifted by more bits than they have, and are made of numbers they cannot hold."""
    mixed = (i * 1103515245 + j * 12345 + h) >> 16 & 7
    shifted = (5 << (i - j) * 3) % 11 + (-5 >> i) + (b << (j - 9)) % 13 + ((j * j * j * j * j * j) >> 7) % 5 + j**5 % 7
    held = (i * 37.5 - 400.0).astype(jnp.int8) // 50 + (i * 37.5 - 400.0).astype(jnp.uint8) // 100
    more = (j * 2.0**28 - 2.0**32).astype(jnp.int32) % 5 + jnp.log(2.0 - j).astype(jnp.int8) // 40
    return s + a[h] * (mixed + shifted + held + more).astype(s.dtype) / 10


def functions(a: Any, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    """Everything that a formula may hold, each bounded."""
    x = s / 4
    waves = jnp.sin(x) + jnp.cos(s) + jnp.arctan(s) + jnp.arctan2(s, 1 + x * x) + jnp.tan(x / 4)
    powers = jnp.exp(-x * x) + jnp.exp2(-jnp.abs(x)) + jnp.log(2 + s * s) + jnp.log1p(x * x) + jnp.expm1(-x * x)
    roots = jnp.sqrt(1 + s * s) + jax.lax.rsqrt(1 + s**4) + jnp.cbrt(2 + jnp.cos(s)) + (3 + jnp.sin(s)) ** 0.7
    steps = jnp.floor(i * 0.375 - j) + jnp.round(i * 0.25) + jnp.sign(s) + jnp.maximum(s, 0.1) + jnp.minimum(s, a[h])
    tests = jnp.where((s > 0) & ~(x < -0.2) | (i == j) ^ (h != 1), s, jnp.clip(x, -0.3, 0.4))
    others = jax.lax.erf(x) + jnp.sinh(x / 8) + jnp.cosh(x / 8) + 1 / (2 + x * x) + x**0
    return waves + powers + roots + steps / 4 + tests + others


@jax.custom_vjp
def rounded(x: Any) -> Any:
    """With a derivative of its own."""
    return jnp.round(x)


rounded.defvjp(lambda x: (rounded(x), None), lambda _, cotangent: (cotangent,))


class Mod(NamedTuple):
    """A modification by an array of this shape: (array, score, ...) -> score, or a bias where None; and a soft cap."""

    shape: tuple[int, ...]
    function: Callable[..., Any] | None = None
    bias: bool = False
    cap: float | None = None

    def options(self, closed: Any) -> dict[str, Any]:
        score_mod = None if self.function is None else partial(self.function, closed)
        return dict(score_mod=score_mod, bias=closed if self.bias else None, logits_soft_cap=self.cap)


MODS = {
    "ALiBi": Mod((4,), alibi),
    "tables": Mod((4, 64), tables),
    "nonlinear": Mod((4,), nonlinear),
    "whole numbers": Mod((4,), whole_numbers),
    "bits": Mod((4,), bits),
    "functions": Mod((4,), functions),
    "roots": Mod((4,), lambda a, s, b, h, i, j: jnp.where(s == 0, jnp.sqrt(jnp.abs(s)), s * a[h])),
    "masks": Mod((4,), lambda a, s, b, h, i, j: jnp.where(i // 7 >= j // 7 + h, s * a[h], -jnp.inf)),
    "straight through": Mod((2, 4), lambda a, s, b, h, i, j: rounded(s) + jax.nn.relu(s) * a[b, h]),
    "bias": Mod((1, 4, Q_LEN, KV_LEN), bias=True),
    "all": Mod((4, 1, KV_LEN), lambda a, s, b, h, i, j: jnp.tanh(s * a[h, 0, 0] + b), bias=True, cap=1.5),
}


def dense(
    inputs: Inputs, mask: Any, *, score_mod: Any = None, bias: Any = None, logits_soft_cap: Any = None,
    query_offset: Any = 0, kv_lengths: Any = None,
) -> Any:  # fmt: skip
    """(output, log-sum-exp), in float64."""
    query, key, value = inputs[:3]
    batch, q_len, heads, head_dim = query.shape
    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    allowed = jnp.broadcast_to(jnp.asarray(mask), (batch, heads, q_len, key.shape[1]))
    if kv_lengths is not None:
        allowed = allowed & (jnp.arange(key.shape[1]) < jnp.asarray(kv_lengths)[:, None, None, None])
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) / head_dim**0.5
    at = [x.astype(jnp.int32) for x in jnp.indices(scores.shape)]
    at[2] = at[2] + jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (batch,))[:, None, None, None]
    if score_mod is not None:
        for n in range(4):  # masked pairs are as the first allowed one: what it does of them has no meaning
            at[n] = jnp.where(allowed, at[n], at[n].reshape(-1)[allowed.argmax()])
        flat = jax.vmap(score_mod)(*(x.reshape(-1) for x in (scores, *at)))
        scores = flat.reshape(scores.shape)
    if bias is not None:
        scores = scores + bias
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    scores = jnp.where(allowed, scores, -jnp.inf)
    lse = jax.scipy.special.logsumexp(scores, axis=-1, keepdims=True)
    weights = jnp.where(jnp.isneginf(scores), 0, jnp.exp(scores - jnp.where(jnp.isneginf(lse), 0, lse)))
    return jnp.einsum("bnts,bsnh->btnh", weights, value), jnp.moveaxis(lse[..., 0], 1, 2)


def wide(x: Any) -> Any:
    x = np.asarray(x)
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def truth(inputs: Inputs, mask: Any, options: Callable[[Any], dict[str, Any]], closed: Any, **more: Any) -> list[Any]:
    """Output, log-sum-exp and the gradients of query, key, value and what is closed over."""
    with jax.enable_x64(True):  # pyright: ignore[reportCallIssue]
        inputs, closed = Inputs(*(jnp.asarray(wide(x)) for x in inputs)), jnp.asarray(wide(closed))

        def run(q: Any, k: Any, v: Any, closed: Any) -> Any:
            return dense(inputs._replace(query=q, key=k, value=v), mask, **options(closed), **more)

        results, backward = jax.vjp(run, *inputs[:3], closed)
        d_lse = jnp.where(jnp.isneginf(results[1]), 0, inputs.d_lse)
        return [np.asarray(x) for x in (*results, *backward((inputs.d_out, d_lse)))]


NAMES = ("out", "lse", "d_query", "d_key", "d_value", "d_closed")


def compare(found: list[Any], expected: list[Any], dtype: str) -> None:
    for name, a, b in zip(NAMES, found, expected, strict=True):
        a = np.asarray(a, np.float64)
        assert a.shape == b.shape, name
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b), err_msg=name)
        a, b = (np.where(np.isneginf(b), 0, x) for x in (a, b))
        bound = TOLERANCE["float32" if name == "lse" and dtype != "float64" else dtype] * 4
        error = np.abs(a - b).max(initial=0)
        assert error <= bound * max(1, np.abs(b).max(initial=0)), f"{name} is off by {error:.2g}"


class ScoreModSuite:
    """Subclass it, and name the implementation.

    Attributes:
      interpreted: it takes minutes for what others do in seconds: fewer cases of some tests.
    """

    implementation: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16", "float64")
    interpreted = False

    def attention(self, *args: Any, **kwargs: Any) -> Any:
        return splat.attention(*args, implementation=self.implementation, **kwargs)

    def run(self, pattern: Pattern, inputs: Inputs, options: Any, closed: Any, **more: Any) -> list[Any]:
        def results(inputs: Inputs, closed: Any, more: Any) -> list[Any]:
            def forward(q: Any, k: Any, v: Any, closed: Any) -> Any:
                return self.attention(q, k, v, pattern, return_lse=True, **options(closed), **more)

            out, backward = jax.vjp(forward, *inputs[:3], closed)
            return [*out, *backward((inputs.d_out, inputs.d_lse))]

        static = {name: more.pop(name) for name in list(more) if isinstance(more[name], int)}
        run = jax.jit(lambda inputs, closed, more: results(inputs, closed, more | static))
        return run.lower(inputs, closed, more).compile(QUICK)(inputs, closed, more)

    def check(
        self, pattern: Pattern, inputs: Inputs, name: str, rng: np.random.Generator, mask: Any = None, **more: Any
    ) -> None:
        dtype = str(inputs.query.dtype)
        shape, options = MODS[name].shape, MODS[name].options
        closed = jnp.asarray(rng.standard_normal(shape), jnp.promote_types(dtype, jnp.float32))
        if mask is None:
            mask = pattern.to_dense(*(x.shape[1] for x in inputs[:2]), query_offset=more.get("query_offset", 0))
        found = self.run(pattern, inputs, options, closed, **more)
        compare(found, truth(inputs, mask, options, closed, **more), dtype)

    def inputs(self, rng: np.random.Generator, **more: Any) -> Inputs:
        return draw_inputs(rng, Q_LEN, KV_LEN, **{"batch": BATCH, "heads": HEADS, **more})

    @pytest.mark.parametrize("name", MODS)
    def test_score_mods(self, name: str, rng: np.random.Generator) -> None:
        self.check(PATTERN, self.inputs(rng), name, rng)

    def test_the_oracle_is_the_reference(self, rng: np.random.Generator) -> None:
        inputs, mask = self.inputs(rng), PATTERN.to_dense(Q_LEN, KV_LEN)
        q, k, v, *cotangents = (np.asarray(x, np.float64) for x in inputs)
        options: Any = dict(logits_soft_cap=2.0, kv_lengths=np.array([7, 39]))
        forward = reference.attention(q, k, v, mask, **options)
        backward = reference.gradients(q, k, v, mask, cotangents[0], cotangents[1], **options)
        for a, b in zip(truth(inputs, mask, lambda _: {}, 0.0, **options), (*forward, *backward), strict=False):
            np.testing.assert_allclose(a, b, atol=1e-12)

    @pytest.mark.parametrize("name", ["tables", "all"])
    def test_dtypes_of_score_mods(self, name: str, rng: np.random.Generator) -> None:
        for dtype in self.dtypes[1:]:
            with jax.enable_x64(dtype == "float64"):  # pyright: ignore[reportCallIssue]
                self.check(PATTERN, self.inputs(rng, head_dim=16, dtype=dtype), name, rng)

    @pytest.mark.parametrize("name", ["ALiBi", "all"])
    def test_where_scores_are(self, name: str, rng: np.random.Generator) -> None:
        """Positions count the offset in; key lengths hide pairs, whatever a modification makes of them."""
        inputs, lengths = self.inputs(rng), jnp.asarray([0, 17])
        self.check(PATTERN, inputs, name, rng, query_offset=5)
        self.check(PATTERN, inputs, name, rng, kv_lengths=lengths)
        mask = PATTERN.to_dense(Q_LEN, KV_LEN, query_offset=4)
        self.check(PATTERN, inputs, name, rng, mask, query_offset=jnp.int32(4))
        masks = np.stack([PATTERN.to_dense(Q_LEN, KV_LEN, query_offset=n)[None] for n in (3, -2)])
        self.check(PATTERN, inputs, name, rng, masks, query_offset=jnp.asarray([3, -2]), kv_lengths=lengths)

    @pytest.mark.parametrize("text", ["window(4) | strided(6)", "global_rows(5) | lattice_columns(5, 2)"])
    def test_patterns_of_score_mods(self, text: str, rng: np.random.Generator) -> None:
        for name in ("masks", "bias")[self.interpreted :]:
            self.check(splat.parse(text), self.inputs(rng, head_dim=20), name, rng)

    def test_lengths_that_score_mods_use(self, rng: np.random.Generator) -> None:
        """What is not a number past the lengths spoils no gradient."""
        inputs, lengths = self.inputs(rng), jnp.asarray([7, 1])

        def options(a: Any) -> dict[str, Any]:
            return dict(score_mod=lambda s, b, h, i, j: s + a[h] * jnp.log(lengths[b] - j + 0.0))

        closed = jnp.asarray(rng.standard_normal(4), jnp.float32)
        found = self.run(splat.full(), inputs, options, closed, kv_lengths=lengths)
        mask = splat.full().to_dense(Q_LEN, KV_LEN)
        compare(found, truth(inputs, mask, options, closed, kv_lengths=lengths), "float32")

    def test_one_query(self, rng: np.random.Generator) -> None:
        """As in decoding."""
        pattern = splat.causal() & (splat.window(20) | splat.sink(3))
        inputs = draw_inputs(rng, 1, KV_LEN, batch=2, heads=HEADS)
        for name in ("ALiBi", "all")[self.interpreted :]:
            mask = pattern.to_dense(1, KV_LEN, query_offset=30)
            self.check(pattern, inputs, name, rng, mask, query_offset=jnp.int32(30))

    def test_heads_with_their_own_patterns(self, rng: np.random.Generator) -> None:
        """Each head keeps its number."""
        one, other = PATTERN, splat.window(5)
        masks = [x.to_dense(Q_LEN, KV_LEN) for x in (one, other, other, one)]
        self.check(splat.per_head([one, other, other, one]), self.inputs(rng), "ALiBi", rng, np.stack(masks))

    def test_vmap_of_score_mods(self, rng: np.random.Generator) -> None:
        """Over arrays, over what is closed over, and over both."""
        inputs = [self.inputs(rng) for _ in range(2)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *inputs)
        for mod in (MODS["ALiBi"], MODS["all"])[self.interpreted :]:
            closed = jnp.asarray(rng.standard_normal((2, *mod.shape)), jnp.float32)

            def loss(q: Any, k: Any, v: Any, closed: Any, mod: Mod = mod) -> Any:
                return (self.attention(q, k, v, PATTERN, **mod.options(closed)) ** 2).sum()

            run = jax.value_and_grad(loss, (0, 1, 2, 3))
            for axes in ((0, 0, 0, None), (0, 0, 0, 0), (None, None, None, 0))[: 1 if self.interpreted else 3]:
                given = [x if axis == 0 else x[0] for x, axis in zip((*stacked[:3], closed), axes, strict=True)]
                found = jax.jit(jax.vmap(run, axes))(*given)
                for n in range(2):
                    wanted = run(*(x[n] if axis == 0 else x for x, axis in zip(given, axes, strict=True)))
                    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                        np.testing.assert_allclose(a[n], b, atol=2e-5, rtol=2e-5)

    def test_score_mods_in_shard_map(self) -> None:
        """Closing over arrays of which each device has its part."""
        printed = in_subprocess(
            f"""
            import jax, jax.numpy as jnp, numpy as np, splat

            rng = np.random.default_rng(0)
            q, k, v = (jnp.asarray(rng.standard_normal((2, 20, n, 8)), jnp.float32) for n in (4, 2, 2))
            slopes = jnp.linspace(-1, 1, 8).reshape(2, 4)
            bias = jnp.asarray(rng.standard_normal((2, 1, 20, 20)), jnp.float32)
            table = jnp.linspace(0, 1, 20)

            def attend(q, k, v, slopes, bias, table):
                mod = lambda s, b, h, i, j: jax.nn.relu(s) * slopes[0, h] + table[i]
                return splat.attention(
                    q, k, v, splat.causal(), score_mod=mod, bias=bias, implementation={self.implementation!r}
                )

            def one_by_one(*arrays, table):
                parts = [attend(*(x[n : n + 1] for x in arrays), table) for n in range(2)]
                return jnp.concatenate(parts)

            mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
            P = jax.P
            sharded = jax.shard_map(attend, mesh=mesh, in_specs=(P("x"),) * 5 + (P(),), out_specs=P("x"))
            arrays = q, k, v, slopes, bias
            found = jax.jit(jax.grad(lambda *x: (sharded(*x) ** 2).sum(), tuple(range(6))))(*arrays, table)
            wanted = jax.grad(lambda *x: (one_by_one(*x[:5], table=x[5]) ** 2).sum(), tuple(range(6)))(*arrays, table)
            for a, b in zip(found, wanted):
                np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)
            print("same")
            """,
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
        )
        assert printed.split() == ["same"]

    def test_rows_that_a_score_mod_empties(self, rng: np.random.Generator) -> None:
        """Are rows that attend to nothing."""
        inputs = self.inputs(rng)

        def options(a: Any) -> dict[str, Any]:
            return dict(score_mod=lambda s, b, h, i, j: jnp.where(i < 20, s * a, -jnp.inf))

        found = self.run(PATTERN, inputs, options, jnp.float32(0.7))
        compare(found, truth(inputs, PATTERN.to_dense(Q_LEN, KV_LEN), options, 0.7), "float32")
        assert np.isneginf(found[1][:, 20:]).all()
        assert not found[0][:, 20:].any()
        assert not found[2][:, 20:].any()

    def test_what_is_hidden_stays_so_under_a_cap(self, rng: np.random.Generator) -> None:
        inputs = self.inputs(rng)
        hidden = rng.integers(0, 2, (1, 1, Q_LEN, KV_LEN)) > 0
        shown = jnp.asarray(rng.standard_normal((1, 4, Q_LEN, KV_LEN)), jnp.float32)

        def options(bias: Any) -> dict[str, Any]:
            return dict(bias=bias, logits_soft_cap=1.5)

        found = self.run(PATTERN, inputs, options, jnp.where(hidden, -jnp.inf, shown))
        mask = PATTERN.to_dense(Q_LEN, KV_LEN) & ~hidden
        compare(found, truth(inputs, mask, options, shown), "float32")

    def test_export_for_any_batch_with_a_score_mod(self, rng: np.random.Generator) -> None:
        """Forward and gradients."""
        pytest.importorskip("flatbuffers", reason="jax.export needs the flatbuffers package to serialise")
        from jax import export

        q, k, v, *_ = draw_inputs(rng, 24, 24, batch=3)
        slopes = jnp.linspace(-1, 1, 2)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array) -> jax.Array:
            return (self.attention(q, k, v, PATTERN, score_mod=partial(alibi, slopes)) ** 2).sum()

        (batch,) = export.symbolic_shape("batch")
        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
        kinds = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), jnp.float32) for x in (q, k, v)]
        kinds.append(jax.ShapeDtypeStruct(slopes.shape, jnp.float32))
        expected = run(q, k, v, slopes)
        jax.eval_shape(run, *kinds)
        found = export.export(run, disabled_checks=self.export_checks())(*kinds).call(q, k, v, slopes)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    @staticmethod
    def export_checks() -> list[Any]:
        return []

    def test_whole_numbers_that_are_closed_over(self, rng: np.random.Generator) -> None:
        """Documents, and a table of flags: read where indices say, clamped or filled as JAX does."""
        inputs = self.inputs(rng)
        ids = rng.integers(0, 3, (BATCH, 25)).astype(np.int16)
        flags = rng.integers(0, 2, KV_LEN) > 0

        def options(a: Any) -> dict[str, Any]:
            documents, near = jnp.asarray(ids), jnp.asarray(flags)

            def score_mod(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
                kind = jnp.take(documents[b], j - 1, mode="fill", fill_value=7)
                s = jnp.where(documents[b, i] == kind, s, s - 1)
                return jnp.where(near[j], s * a, s) + near[j] * a.astype(s.dtype)

            return dict(score_mod=score_mod)

        found = self.run(PATTERN, inputs, options, jnp.float32(0.7))
        compare(found, truth(inputs, PATTERN.to_dense(Q_LEN, KV_LEN), options, 0.7), "float32")

    def test_equal_score_mods_are_compiled_once(self, rng: np.random.Generator) -> None:
        """What counts is what they compute, with arrays of other values too."""
        q, k, v, *_ = self.inputs(rng)

        @jax.custom_jvp
        def gate(x: Any) -> Any:
            return jax.nn.relu(x)

        def mod(slopes: Any, factor: float = 1.0) -> Any:
            return lambda s, b, h, i, j: gate(s * factor) + slopes[h] * (j - i)

        gate.defjvps(lambda t, _, x: t * 2)

        def attend(slopes: Any, factor: float = 1.0) -> Any:
            score_mod = mod(slopes, factor)
            return jax.value_and_grad(lambda q: self.attention(q, k, v, PATTERN, score_mod=score_mod).sum())(q)

        slopes = jnp.arange(4.0)
        twice = slopes * 2
        first = attend(slopes)
        compiled: list[str] = []

        def listen(event: str, duration_secs: float, **_: Any) -> None:
            compiled.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            again = attend(slopes)
            attend(twice)
            assert not [name for name in compiled if "backend_compile" in name]
            other = attend(slopes, 3.0)
            assert [name for name in compiled if "backend_compile" in name]
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        np.testing.assert_array_equal(first[1], again[1])
        assert abs(other[0] - first[0]) > 1e-3

    def test_ranks_are_as_users_want_them(self, rng: np.random.Generator) -> None:
        with jax.numpy_rank_promotion("raise"):  # pyright: ignore[reportCallIssue]
            self.check(PATTERN, self.inputs(rng), "ALiBi", rng)

    def test_sharded_score_mods(self) -> None:
        """Devices know which batch entries and heads are theirs."""
        printed = in_subprocess(
            f"""
            import jax, jax.numpy as jnp, numpy as np, splat
            from jax.sharding import NamedSharding, PartitionSpec as P

            rng = np.random.default_rng(0)
            q, k, v = (jnp.asarray(rng.standard_normal((4, 24, n, 8)), jnp.float32) for n in (4, 2, 2))
            slopes = jnp.asarray(rng.standard_normal((4, 4)), jnp.float32)
            bias = jnp.asarray(rng.standard_normal((4, 4, 24, 1)), jnp.float32)
            pattern = splat.causal() & splat.window(7)

            def loss(q, k, v, slopes, bias):
                mod = lambda s, b, h, i, j: s + slopes[b, h] * (j - i)
                out = splat.attention(
                    q, k, v, pattern, score_mod=mod, bias=bias, implementation={self.implementation!r}
                )
                return (out**2).sum()

            gradient = jax.grad(loss, (0, 1, 2, 3, 4))
            wanted = gradient(q, k, v, slopes, bias)
            spec = P("data", None, "model")
            for kind in (jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto):
                mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
                given = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((q, k, v), (spec,) * 3)]
                for x, s in ((slopes, P()), (bias, P("data", "model"))):
                    given.append(jax.device_put(x, NamedSharding(mesh, s)))
                with jax.set_mesh(mesh):
                    found = jax.jit(gradient)(*given)
                for a, b in zip(found, wanted):
                    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)
                print(kind)
            """,
            XLA_FLAGS="--xla_force_host_platform_device_count=4",
        )
        assert len(printed.splitlines()) == 2
