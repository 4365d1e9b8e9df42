"""Device facts and the cost model: it ranks schedules by their tiles, and says where it cannot predict."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import splat
from splat.errors import ArgumentError
from splat.geometry import Spans
from splat.planning import TARGETS, Target, cost_model, find, predict_ms


@pytest.mark.parametrize("name", ["cpu", *TARGETS])
def test_facts(name: str) -> None:
    target = find(name)
    assert target.name == name
    assert target.kind in {"cpu", "gpu"}
    assert set(target.matmul_flops) == {"float32", "float64", "bfloat16", "float16"}
    assert min(target.matmul_flops.values()) > 0
    assert target.bandwidth_bytes > 1e9
    assert len(target.source) > 10, "each row says where its numbers are from"


def test_newer_devices_are_faster() -> None:
    devices = [find(name) for name in ("a100", "h100", "h200", "b200")]
    assert all((np.diff([one.bandwidth_bytes for one in devices]) > 0).tolist())
    assert all((np.diff([one.matmul_flops["bfloat16"] for one in devices]) >= 0).tolist())


def test_unknown_device() -> None:
    with pytest.raises(ArgumentError, match="name the closest one to see predictions"):
        find("v100")


def spans(width: int, tiles: int = 4) -> Spans:
    zero = np.zeros(tiles, np.int32)
    return Spans(zero, zero, zero + width, zero + width, zero)


@pytest.mark.parametrize(("implementation", "device"), [("xla", "cpu"), ("triton", "h100")])
def test_more_tiles_cost_more(implementation: str, device: str) -> None:
    model = cost_model(implementation, find(device), 64, "float32")
    assert model.tiles_s(2, 64, 64) == 2 * model.tiles_s(1, 64, 64) > 0
    assert model.tiles_s(1, 64, 128) > model.tiles_s(1, 64, 64)
    assert model.tiles_s(1, 128, 128) < model.tiles_s(4, 64, 64), "one large tile is cheaper than four small ones"
    seconds, block_kv = model.best_block_kv([[spans(4096)]], 64, None)
    assert seconds <= min(model.best_block_kv([[spans(4096)]], 64, width)[0] for width in model.block_kv)
    assert seconds == model.best_block_kv([[spans(4096)]], 64, block_kv)[0]
    assert implementation == "xla" or block_kv in model.block_kv, "kernels have fixed tile sizes"
    assert model.best_block_kv([[spans(100)]], 64, 17) == (model.tiles_s(4 * 6, 64, 17), 17)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_cpp_counts_scores(dtype: str) -> None:
    """16 rows by one column, whatever the span's width."""
    target = find("cpu")
    model = cost_model("cpp", target, 64, dtype)
    score = 4 * 64 / target.attention_flops[dtype]
    assert model.tiles_s(3, 16, 1) == pytest.approx(3 * 16 * score)
    assert model.best_block_kv([[spans(4096)]], 16, None) == (pytest.approx(4 * 4096 * 16 * score), 1)
    assert model.kernel_block_q(4) == 16, "groups of fewer rows take as long"


@pytest.mark.parametrize("implementation", ["xla", "cpp"])
def test_larger_heads_cost_more(implementation: str) -> None:
    small, large = (cost_model(implementation, find("cpu"), head_dim, "float32") for head_dim in (32, 256))
    assert small.tiles_s(1, 64, 64) < large.tiles_s(1, 64, 64)


def test_only_measured_models_predict() -> None:
    plan = splat.plan("causal()", 256)
    for implementation, device, predicts in [
        ("xla", "cpu", True),
        ("cpp", "cpu", True),
        ("triton", "h100", True),
        ("triton", "a100", False),
        ("xla", "h100", False),
    ]:
        model = cost_model(implementation, find(device), 64, "float32")
        assert model.predicts is predicts
        assert (predict_ms(plan.forward, model, plan.problem) is not None) is predicts


def test_prediction_counts_heads_and_batch() -> None:
    one, eight = (
        splat.plan("causal()", 256, batch=b, num_q_heads=n, block_q=64, block_kv=64) for b, n in ((1, 1), (2, 4))
    )
    assert one.predicted_ms is not None
    assert eight.predicted_ms == pytest.approx(8 * one.predicted_ms)


def test_targets_are_values() -> None:
    assert find("h100") == dataclasses.replace(find("h100"))
    assert isinstance(find("cpu"), Target)
