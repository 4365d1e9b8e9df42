"""The drop-in for `torch.nn.functional.scaled_dot_product_attention` against the original."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.torch.cases import DEVICE, draw_inputs, needs_device, torch

import splat  # isort: skip
import splat.torch  # isort: skip
from splat.pattern import PerHead
from splat.remembered import Remembered
from splat.torch import sdpa
from splat.torch.validate import Sizes

pytestmark = needs_device

ours = splat.torch.scaled_dot_product_attention
theirs: Any = torch.nn.functional.scaled_dot_product_attention
LOCAL = splat.causal() & splat.window(5)


def mask_of(pattern: Any, q_len: int, kv_len: int) -> Any:
    return torch.from_numpy(pattern.to_dense(q_len, kv_len)).to(DEVICE)


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.2}, {"is_causal": True, "enable_gqa": True}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_same_as_torch(options: dict[str, Any], rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 20, 26, batch=2, heads=(4, 2 if "enable_gqa" in options else 4))
    torch.testing.assert_close(ours(q, k, v, **options), theirs(q, k, v, **options))


def test_without_a_batch_axis(rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 20, 20, heads=(2, 2))
    found = ours(q[0], k[0], v[0], is_causal=True)
    torch.testing.assert_close(found, theirs(q[0], k[0], v[0], is_causal=True))


@pytest.mark.parametrize("axes", [0, 1, 2])
def test_masks(axes: int, rng: np.random.Generator) -> None:
    """[T, S]; [1, T, S]; [B, N, T, S], with a pattern for each head."""
    q, k, v, *_ = draw_inputs(rng, 20, 26, batch=2, heads=(2, 2))
    mask = mask_of(LOCAL, 20, 26)
    if axes == 1:
        mask = mask[None]
    if axes == 2:
        mask = torch.stack([mask, mask_of(splat.strided(3), 20, 26)])[None].expand(2, -1, -1, -1)
    torch.testing.assert_close(ours(q, k, v, mask), theirs(q, k, v, mask))


def test_masks_of_many_heads_are_recovered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recovered: list[Any] = []
    monkeypatch.setattr(sdpa, "from_mask", lambda mask: recovered.append(mask) or splat.from_mask(mask))
    sdpa._known.clear()
    heads = [splat.window(n) for n in range(40)]
    mask = torch.stack([mask_of(one, 50, 50) for one in heads])
    sizes = Sizes(batch=1, q_len=50, kv_len=50, num_q_heads=len(heads), num_kv_heads=len(heads), head_dim=8)
    found = [sdpa._of_mask(mask, sizes) for _ in range(2)][1]
    assert len(recovered) == len(heads)
    assert isinstance(found, PerHead)
    for one, other in zip(found.patterns, heads, strict=True):
        np.testing.assert_array_equal(one.to_dense(50), other.to_dense(50))


def test_masks_are_forgotten_when_they_weigh_much(monkeypatch: pytest.MonkeyPatch) -> None:
    one: Any = splat.from_mask(np.tri(50, dtype=bool))
    known = Remembered(entries=9, nbytes=3 * one.nbytes)
    monkeypatch.setattr(sdpa, "_known", known)
    for n in range(6):
        sdpa._recovered(np.tri(50, k=n, dtype=bool))
    assert len(known) == 3


def test_everything_is_intersected(rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 20, 20, heads=(2, 2))
    strided = splat.strided(3)
    found = ours(q, k, v, mask_of(splat.window(8), 20, 20), is_causal=True, pattern=strided)
    wanted = mask_of(splat.window(8) & splat.causal() & strided, 20, 20)
    torch.testing.assert_close(found, theirs(q, k, v, wanted))


def test_nothing_to_mask(rng: np.random.Generator) -> None:
    q, k, v = (x[:0] for x in draw_inputs(rng, 9, 9)[:3])
    mask = torch.ones(0, 1, 9, 9, dtype=torch.bool, device=q.device)
    assert splat.torch.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).shape == q.shape


def test_autocast(rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 20, 20, heads=(2, 2))
    with torch.autocast(DEVICE, torch.bfloat16):
        found, expected = (attend(q, k.bfloat16(), v, is_causal=True) for attend in (ours, theirs))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_rows_without_keys_are_zero(rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 6, 6, heads=(2, 2))
    mask = torch.ones(6, 6, dtype=torch.bool, device=DEVICE)
    mask[2] = False
    assert not ours(q, k, v, mask)[:, :, 2].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p must be 0, but 0.1 was given: attention dropout is not supported. Set it to 0"),
        ({"attn_mask": torch.zeros(8, 8)}, r"attn_mask must be a bool tensor, but float32 was given.*attn_mask == 0"),
        ({"attn_mask": torch.ones(8, 7) > 0}, r"broadcastable to [B, N, T, S] = [2, 4, 8, 8], but [8, 7] was given"),
        ({"attn_mask": torch.ones(2, 1, 8, 8).tril(1) > torch.tensor([0.0, 1.0])[:, None, None, None]},
         "attn_mask differs between batch entries. Use splat.torch.attention with kv_lengths for padding"),
        ({"enable_gqa": False}, "query has 4 heads, key and value have 2. Pass enable_gqa=True"),
    ],
    ids=["dropout", "floats", "shape", "batch", "gqa"],
)  # fmt: skip
def test_refusals(options: dict[str, Any], message: str, rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 8, 8, batch=2, heads=(4, 2))
    with pytest.raises((splat.ArgumentError, splat.UnsupportedError)) as caught:
        ours(q, k, v, **{"enable_gqa": True, **options})
    for part in message.split(".*"):
        assert part in str(caught.value)
