"""The portable implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import splat
from tests.attention_suite import AttentionSuite, draw_inputs
from tests.sharding_suite import ShardingSuite


class TestXla(AttentionSuite, ShardingSuite):
    implementation = "xla"
    splits = False  # XLA splits what it sees as it sees fit

    def test_export_for_any_batch(self, rng: np.random.Generator) -> None:
        """Forward and gradient."""
        pytest.importorskip("flatbuffers", reason="jax.export needs the flatbuffers package to serialise")
        from jax import export

        q, k, v, *_ = draw_inputs(rng, 24, 24, batch=3)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return (self.attention(q, k, v, splat.causal() & splat.window(5) | splat.strided(4)) ** 2).sum()

        (batch,) = export.symbolic_shape("batch")
        run = jax.jit(jax.value_and_grad(loss))
        kinds = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), jnp.float32) for x in (q, k, v)]
        found = export.export(run)(*kinds).call(q, k, v)
        for a, b in zip(found, run(q, k, v), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
