"""Waste: scores computed over non-zeros. Deterministic, needs no device, and bounded for the patterns people use."""

from __future__ import annotations

import pytest

import splat

BOUNDS = [
    ("window(256)", 1.15),
    ("sliding_window(512)", 1.15),
    ("strided(64)", 1.05),
    ("strided(128)", 1.05),
    ("blocked(128, 1)", 1.02),
    ("window(128) | strided(128)", 1.3),
    ("causal() & (blocked(256) | lattice_columns(256, 255))", 1.5),
    ("window(128) | global_tokens(16)", 1.5),
    ("causal() & blocked(256) & strided(4)", 2.0),
]


@pytest.mark.parametrize(("text", "bound"), BOUNDS)
def test_waste_at_16384_positions(text: str, bound: float) -> None:
    plan = splat.plan(text, 16384, block_q=64, block_kv=64)
    assert 1.0 <= plan.waste <= bound
    decisions = [one.decision for one in plan.forward.passes]
    assert {one.block_kv for one in decisions} == {64}
    assert {one.block_q for one in decisions} <= ({64} if "global" not in text else {64, 16})  # 16 rows are no 64
    area = sum(one.num_tiles * one.decision.block_q * one.decision.block_kv for one in plan.forward.passes)
    assert plan.waste == area / plan.nnz


@pytest.mark.parametrize(("text", "bound"), BOUNDS)
def test_waste_of_the_backward(text: str, bound: float) -> None:
    """dK and dV walk the columns: the transposed pattern is as regular."""
    backward = splat.plan(text, 16384, block_q=64, block_kv=64).d_key_value
    assert 1.0 <= backward.waste <= bound


@pytest.mark.parametrize("text", [text for text, _ in BOUNDS])
def test_the_models_own_choice_wastes_little(text: str) -> None:
    """Larger tiles than 64 may be cheaper though they waste more; not without limit."""
    assert splat.plan(text, 16384).waste < 2.6
