"""The Triton implementation, its kernels interpreted on the CPU: values and gradients as they will be on a GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import splat
from splat.errors import UnsupportedError
from tests.attention_suite import AttentionSuite, draw_inputs
from tests.score_mod_suite import ScoreModSuite
from tests.sharding_suite import ShardingSuite

pytest.importorskip("triton", reason="triton is not installed: the interpreted kernels are untested here")


@pytest.mark.sampled(1 / 2)
class TestTritonScoreMod(ScoreModSuite):
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")
    interpreted = True

    @pytest.mark.parametrize("name", ["all"])
    def test_where_scores_are(self, name: str, rng: np.random.Generator) -> None:
        super().test_where_scores_are(name, rng)

    # A callback cannot be exported. The others are JAX's part, the same as that of `cpp`.
    test_export_for_any_batch_with_a_score_mod = None  # type: ignore[assignment]
    test_equal_score_mods_are_compiled_once = test_ranks_are_as_users_want_them = None  # type: ignore[assignment]
    test_score_mods_in_shard_map = test_the_oracle_is_the_reference = None  # type: ignore[assignment]


@pytest.mark.sampled(1 / 3)
class TestTriton(AttentionSuite, ShardingSuite):
    implementation = "triton"
    splits = False  # interpreted kernels call back into Python, and XLA gathers for them

    # What the interpreter cannot show: a callback cannot be exported, and 65,536 positions would take it an hour.
    # tests/codegen/triton/test_lowering.py exports; test_no_score_matrix holds here too.
    test_export = test_export_for_any_batch = None  # type: ignore[assignment]
    test_memory_of_a_long_sequence = None  # type: ignore[assignment]

    def test_float64(self, rng: np.random.Generator) -> None:
        """Refused: there are no kernels for it."""
        with jax.enable_x64(True):
            x = jnp.ones((1, 8, 1, 8), jnp.float64)
            with pytest.raises(UnsupportedError, match="serves float32, bfloat16, float16, not float64"):
                self.attention(x, x, x, splat.causal())

    def test_forward_over_reverse(self, rng: np.random.Generator) -> None:  # type: ignore[override]
        """Refused, with the implementation that can."""
        q, k, v, tangent, _ = draw_inputs(rng, 8, 8, heads=(1, 1))

        def gradient(q: Any) -> Any:
            return jax.grad(lambda q: (self.attention(q, k, v, splat.causal()) ** 2).sum())(q)

        with pytest.raises(UnsupportedError, match="Use implementation='xla' for Hessian-vector products"):
            jax.jvp(gradient, (q,), (tangent,))
