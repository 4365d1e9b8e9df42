"""What every implementation of the operations on values must do: one suite, run by each through a subclass.

The truth is dense, in float64 NumPy. Padding of values is poisoned with NaN wherever values go in.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from jax.test_util import check_grads

import splat
from splat.acsr import ACSR
from splat.errors import UnsupportedError
from splat.ops.values import without
from tests.attention_suite import in_subprocess
from tests.strategies import Case, cases

Array = np.ndarray[Any, Any]

TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 1e-2, "float16": 2e-3}

PATTERNS = [
    "full()",
    "causal()",
    "window(3, 5)",
    "strided(5)",
    "lattice_columns(6, 2)",
    "dilated_window(2, 3, 4)",
    "blocked(8, 1, 0)",
    "window(2) | strided(7)",
    "causal() & window(9) | sink(3)",
    "global_tokens(3) | dilated_window(2, 3, 4)",
    "random_blocks(5, 2, 1)",
    "segments([" + "0, " * 9 + "-1, -1, " + "1, " * 26 + "])",
    "window(2) & lattice_columns(9)",
]


def matrix(acsr: ACSR, values: Any) -> Array:
    """The dense matrix [..., rows, columns] of values, float64."""
    values, here, columns = np.asarray(values, np.float64), acsr.has_value(), acsr.columns()
    out = np.zeros((*values.shape[:-1], acsr.shape[1]))
    row = np.broadcast_to(np.arange(acsr.shape[0])[:, None], here.shape)
    out[..., row[here], columns[here]] = values[..., here]
    return out


def compressed(acsr: ACSR, dense: Array, padding: float = 0.0) -> Array:
    """The values [..., rows, width] of a dense matrix."""
    columns = np.broadcast_to(np.maximum(acsr.columns(), 0), (*dense.shape[:-1], acsr.width))
    return np.where(acsr.has_value(), np.take_along_axis(dense, columns, axis=-1), padding)


def close(got: Any, wanted: Array, dtype: str) -> None:
    got = np.asarray(got, np.float64)
    assert got.shape == wanted.shape
    scale = max(1.0, np.abs(wanted).max(initial=0))
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE[dtype] * scale, rtol=0)


class ValuesSuite:
    """Subclasses name the implementation, and the dtypes it serves."""

    implementation: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16", "float64")
    #: Leading axes and head dim of the examples.
    leading: tuple[int, ...] = (2, 3)
    #: Whether the paper's specialisations can be switched off, and rows of a matrix that shows it.
    switches: bool = True
    switched_rows: int = 250
    #: Whether XLA can be told how to split it over devices.
    splits: bool = True

    def sddmm(self, query: Any, key: Any, acsr: ACSR, layout: str = "rows") -> Any:
        return splat.sddmm(query, key, acsr, layout=layout, implementation=self.implementation)

    def softmax(self, values: Any, acsr: ACSR, layout: str = "rows") -> Any:
        return splat.softmax(values, acsr, layout=layout, implementation=self.implementation)

    def spmm(self, values: Any, acsr: ACSR, dense: Any, layout: str = "rows") -> Any:
        return splat.spmm(values, acsr, dense, layout=layout, implementation=self.implementation)

    def spmm_transposed(self, values: Any, acsr: ACSR, dense: Any, layout: str = "rows") -> Any:
        return splat.spmm_transposed(values, acsr, dense, layout=layout, implementation=self.implementation)

    def attention(self, query: Any, key: Any, value: Any, acsr: ACSR, layout: str = "rows") -> Any:
        weights = self.softmax(self.sddmm(query, key, acsr, layout), acsr, layout)
        return self.spmm(weights, acsr, value, layout)

    def draw(self, rng: np.random.Generator, acsr: ACSR, head_dim: int, dtype: str) -> tuple[Any, Any, Any]:
        """query, key and values whose padding is NaN."""
        q = jnp.asarray(rng.standard_normal((*self.leading, acsr.shape[0], head_dim)), dtype)
        k = jnp.asarray(rng.standard_normal((*self.leading, acsr.shape[1], head_dim)), dtype)
        p = rng.standard_normal((*self.leading, acsr.shape[0], acsr.width))
        wide = "float64" if dtype == "float64" else "float32"
        return q, k, jnp.asarray(np.where(acsr.has_value(), p, np.nan), wide)

    def check(self, acsr: ACSR, rng: np.random.Generator, head_dim: int = 8, dtype: str = "float32") -> None:
        q, k, p = self.draw(rng, acsr, head_dim, dtype)
        wide_q, wide_k = np.asarray(q, np.float64), np.asarray(k, np.float64)
        values = self.sddmm(q, k, acsr)
        assert values.dtype == p.dtype
        close(
            values,
            compressed(acsr, wide_q @ np.swapaxes(wide_k, -1, -2)),
            "float64" if dtype == "float64" else "float32",
        )
        dense = matrix(acsr, p)
        for made, wanted in (
            (self.spmm(p, acsr, k), dense @ wide_k),
            (self.spmm_transposed(p, acsr, q), np.swapaxes(dense, -1, -2) @ wide_q),
        ):
            assert made.dtype == k.dtype
            close(made, wanted, dtype)
        weights = self.softmax(p, acsr)
        assert weights.dtype == p.dtype
        raised = np.where(acsr.has_value(), np.exp(np.where(acsr.has_value(), p, 0)), 0)
        total = raised.sum(axis=-1, keepdims=True)
        close(weights, raised / np.where(total == 0, 1, total), str(p.dtype))

    # -- numbers -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("text", PATTERNS)
    def test_patterns(self, text: str, rng: np.random.Generator) -> None:
        self.check(splat.build(splat.parse(text), 37), rng)

    @settings(max_examples=12, suppress_health_check=[HealthCheck.differing_executors])
    @given(cases())
    def test_composed_patterns(self, case: Case) -> None:
        acsr = splat.build(case.pattern, case.q_len, case.kv_len, case.query_offset)
        self.check(acsr, np.random.default_rng(case.q_len))

    @pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 70, 16), (200, 3, 5), (130, 131, 64), (97, 300, 33), (0, 4, 8)])
    def test_sizes(self, sizes: tuple[int, int, int], rng: np.random.Generator) -> None:
        q_len, kv_len, head_dim = sizes
        for text in ("window(40, 30) | lattice_columns(3)", "strided(3)"):
            self.check(splat.build(splat.parse(text), q_len, kv_len), rng, head_dim)

    def test_components_are_added_before_rounding(self, rng: np.random.Generator) -> None:
        """Sums are rounded to the dense array's dtype once, however many components they are of."""
        acsr = splat.build(splat.parse("random_blocks(4, 10, 0)"), 64)
        assert len(acsr.components) >= 6
        for dtype in self.dtypes:
            if dtype not in ("bfloat16", "float16"):
                continue
            q, k, p = self.draw(rng, acsr, 24, dtype)
            p = p.astype(dtype).astype(p.dtype)  # values may be multiplied as the dense array's dtype
            for operation, x in ((self.spmm, k), (self.spmm_transposed, q)):
                wanted = np.asarray(operation(p, acsr, x.astype(jnp.float32)))
                error = np.abs(np.asarray(operation(p, acsr, x), np.float64) - wanted)
                unit = float(jnp.finfo(dtype).eps) / 2
                assert (error <= 1.01 * unit * np.abs(wanted) + 1e-5).all(), dtype

    def test_dtypes(self, rng: np.random.Generator) -> None:
        for dtype in self.dtypes:
            with jax.enable_x64(dtype == "float64"):  # pyright: ignore[reportCallIssue]
                self.check(splat.build(splat.parse("window(9) | strided(7)"), 50), rng, 24, dtype)

    def test_nothing(self, rng: np.random.Generator) -> None:
        """No pair at all."""
        self.check(splat.build(splat.sink(3) & splat.segments([-1] * 9), 9), rng)

    def test_nan_stays_where_it_is(self, rng: np.random.Generator) -> None:
        """What is in no pair reaches no result, whatever it holds."""
        acsr = splat.build(splat.window(2) & splat.segments([0] * 20 + [-1] * 17 + [1] * 33), 70)
        q, k, p = self.draw(rng, acsr, 8, "float32")
        lost = np.arange(70) // 20 == 1
        lost[37:] = False
        bad_q, bad_k = (jnp.where(lost[:, None], jnp.nan, x) for x in (q, k))
        for good, bad in (
            (self.sddmm(q, k, acsr), self.sddmm(bad_q, bad_k, acsr)),
            (self.spmm(p, acsr, k), self.spmm(p, acsr, bad_k)),
            (self.spmm_transposed(p, acsr, q), self.spmm_transposed(p, acsr, bad_q)),
        ):
            np.testing.assert_array_equal(good, bad)

    def test_large_scores(self, rng: np.random.Generator) -> None:
        acsr = splat.build(splat.window(5), 40)
        values = jnp.asarray(rng.standard_normal((40, acsr.width)) * 1e4, "float32")
        weights = np.asarray(self.softmax(values, acsr))
        assert np.isfinite(weights).all()
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)

    # -- specialisations -----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("off", [("spans",), ("posets",), ("alignment",), ("spans", "posets", "alignment")])
    @pytest.mark.parametrize(
        "text", ["window(9) | strided(7)", "causal() & window(9) | sink(3)", "dilated_window(4, 4, 3)"]
    )
    def test_without(self, off: tuple[str, ...], text: str, rng: np.random.Generator) -> None:
        """The paper's specialisations change no result."""
        acsr = splat.build(splat.parse(text), self.switched_rows)
        with without(*off):
            if self.switches:
                self.check(acsr, rng, 20)
            else:
                with pytest.raises(UnsupportedError, match="nothing to switch off"):
                    self.check(acsr, rng, 20)

    # -- layouts -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("text", PATTERNS)
    def test_tiles(self, text: str, rng: np.random.Generator) -> None:
        """In tiles values are in another order, and padding of another size; what is made of them is the same."""
        acsr = splat.build(splat.parse(text), 37)
        q, k, _ = self.draw(rng, acsr, 8, "float32")
        rows, tiles = self.sddmm(q, k, acsr), self.sddmm(q, k, acsr, "tiles")
        assert np.count_nonzero(tiles) == np.count_nonzero(rows)
        np.testing.assert_allclose(np.sort(tiles[tiles != 0]), np.sort(rows[rows != 0]), atol=1e-5)
        # Padding is not read: it becomes NaN where it is, which is where the values of ones are 0.
        here = self.sddmm(jnp.ones_like(q), jnp.ones_like(k), acsr, "tiles") != 0
        tiles = jnp.where(here, tiles, jnp.nan)
        weights = self.softmax(tiles, acsr, "tiles")
        assert np.all(np.asarray(weights)[~np.asarray(here)] == 0)
        close(self.spmm(weights, acsr, k, "tiles"), np.asarray(self.spmm(self.softmax(rows, acsr), acsr, k)), "float32")
        made, wanted = (self.spmm_transposed(x, acsr, q, how) for x, how in ((tiles, "tiles"), (rows, "rows")))
        close(made, np.asarray(wanted), "float32")

    # -- transformations -----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("text", ["causal() & window(9) | sink(3)", "window(3) | strided(7)"])
    @pytest.mark.parametrize("layout", ["rows", "tiles"])
    def test_three_make_attention(self, text: str, layout: str, rng: np.random.Generator) -> None:
        pattern = splat.parse(text)
        acsr = splat.build(pattern, 45)
        q, k, v, cotangent = (jnp.asarray(rng.standard_normal((2, 2, 45, 8)), "float32") for _ in range(4))

        def fused(q: Any, k: Any, v: Any) -> Any:
            q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
            return jnp.swapaxes(splat.attention(q, k, v, pattern, scale=0.5, implementation="xla"), 1, 2)

        made, back = jax.vjp(jax.jit(lambda q, k, v: self.attention(q * 0.5, k, v, acsr, layout)), q, k, v)
        wanted, wanted_back = jax.vjp(fused, q, k, v)
        np.testing.assert_allclose(made, wanted, atol=5e-6)
        for one, other in zip(back(cotangent), wanted_back(cotangent), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)

    def test_derivatives(self, rng: np.random.Generator) -> None:
        """Of second order, in forward and reverse mode."""
        acsr = splat.build(splat.parse("window(2) | strided(4)"), 11)
        q, k, v = (jnp.asarray(rng.standard_normal((11, 3)), "float32") for _ in range(3))
        for layout in ("rows", "tiles"):
            check_grads(partial(self.attention, acsr=acsr, layout=layout), (q, k, v), order=2, atol=0.1, rtol=0.1)
        p = jnp.asarray(rng.standard_normal((11, acsr.width)), "float32")
        check_grads(lambda p, x: self.spmm_transposed(p, acsr, x), (p, q), order=2, atol=0.1, rtol=0.1)

    def test_vmap(self, rng: np.random.Generator) -> None:
        acsr = splat.build(splat.parse("window(2) | strided(4)"), 11)
        q, k, v = (jnp.asarray(rng.standard_normal((3, 2, 11, 3)), "float32") for _ in range(3))

        def run(q: Any, k: Any, v: Any) -> Any:
            return self.attention(q, k, v, acsr)

        once = jax.vmap(run, in_axes=(0, None, 0))(q, k[0], v)
        twice = jax.vmap(jax.vmap(run, in_axes=(0, None, 0)), in_axes=(1, 0, 1), out_axes=1)(q, k[0], v)
        for made in (once, twice):
            np.testing.assert_allclose(made, run(q, jnp.broadcast_to(k[0], k.shape), v), atol=2e-6)

    @pytest.mark.parametrize("layout", ["rows", "tiles"])
    def test_ranks_are_not_promoted(self, layout: str, rng: np.random.Generator) -> None:
        """Code is traced, forward and backward, where jax_numpy_rank_promotion is "raise"."""
        acsr = splat.build(splat.parse("window(2) | strided(4)"), 11)
        q, k, v = (jnp.asarray(rng.standard_normal((2, 11, 3)), "float32") for _ in range(3))
        with jax.numpy_rank_promotion("raise"):
            jax.make_jaxpr(jax.grad(lambda q, k, v: self.attention(q, k, v, acsr, layout).sum(), (0, 1, 2)))(q, k, v)

    def test_leading_axes_broadcast(self, rng: np.random.Generator) -> None:
        acsr = splat.build(splat.window(2), 11)
        q, k = jnp.asarray(rng.standard_normal((3, 1, 11, 4))), jnp.asarray(rng.standard_normal((2, 11, 4)))
        values = self.sddmm(q, k, acsr)
        assert values.shape == (3, 2, 11, acsr.width)
        np.testing.assert_allclose(values[2, 1], self.sddmm(q[2, 0], k[1], acsr), atol=1e-6)

    @pytest.mark.parametrize("kind", ["Auto", "Explicit", "shard_map"])
    def test_sharded(self, kind: str) -> None:
        """Over all leading axes: the same numbers and gradients, and nothing is gathered.

        Where XLA is not told how to split (mesh axes of type Auto), the numbers are all there is to see. Keys without
        leading axes are on every device; of type Explicit, where JAX would gather their gradient, there are none.
        """
        printed = in_subprocess(
            f"""
            import re, jax, jax.numpy as jnp, numpy as np, splat
            from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

            rng = np.random.default_rng(0)
            acsr = splat.build(splat.causal() & splat.window(3) | splat.sink(1), 9)
            spec, keys = P("data", "model"), {kind != "Explicit"}
            shapes, specs = ((2, 2, 9, 4), (9, 4) if keys else (2, 2, 9, 4)), (spec, P() if keys else spec, spec)
            arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (*shapes, shapes[0])]

            def run(q, k, v):
                weights = splat.softmax(splat.sddmm(q, k, acsr, implementation=name), acsr, implementation=name)
                return splat.spmm(weights, acsr, v, implementation=name)

            name, kind = {self.implementation!r}, getattr(AxisType, {kind!r}, AxisType.Auto)
            mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
            split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=spec) if {kind == "shard_map"} else run
            gradients = lambda run: jax.grad(lambda *arrays: (run(*arrays) ** 2).sum(), (0, 1, 2))
            given = [jax.device_put(x, NamedSharding(mesh, one)) for x, one in zip(arrays, specs)]
            with jax.set_mesh(mesh):
                compiled = jax.jit(gradients(split)).lower(*given).compile()
            for a, b in zip(compiled(*given), gradients(run)(*arrays)):
                np.testing.assert_allclose(a, b, atol=1e-5)
            print("moved:", *set(re.findall(r"all-gather|all-to-all|collective-permute", compiled.as_text())))
            """,
            XLA_FLAGS="--xla_force_host_platform_device_count=4",
        )
        assert printed.startswith("moved:")
        assert printed == "moved:\n" or (kind == "Auto" and not self.splits)
