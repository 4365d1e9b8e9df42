"""The portable implementation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.attention_suite import AttentionSuite
from tests.score_mod_suite import KV_LEN, MODS, PATTERN, Q_LEN, ScoreModSuite, dense
from tests.sharding_suite import ShardingSuite


@pytest.mark.sampled(1 / 3)
class TestXla(AttentionSuite, ShardingSuite):
    implementation = "xla"
    splits = False  # XLA splits what it sees as it sees fit


@pytest.mark.sampled(1 / 2)
class TestXlaScoreMod(ScoreModSuite):
    implementation = "xla"

    def test_forward_over_reverse(self, rng: np.random.Generator) -> None:
        """Hessian-vector products, by query and by what is closed over."""
        inputs = self.inputs(rng, batch=1)
        q, k, v, tangent, _ = inputs
        mask, options = PATTERN.to_dense(Q_LEN, KV_LEN), MODS["all"].options
        closed = jnp.asarray(rng.standard_normal(MODS["all"].shape), jnp.float32)

        def product(attend: Any) -> Any:
            def gradient(q: Any, a: Any) -> Any:
                return jax.grad(lambda *x: (attend(x[0], x[1]) ** 2).sum(), (0, 1))(q, a)

            return jax.jvp(gradient, (q, closed), (tangent, closed))

        ours = product(lambda q, a: self.attention(q, k, v, PATTERN, **options(a)))
        theirs = product(lambda q, a: dense(inputs._replace(query=q), mask, **options(a))[0])
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
