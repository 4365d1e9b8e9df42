"""The drop-in: what `jax.nn.dot_product_attention` gives for its own features, and patterns besides."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import splat
from splat.errors import ArgumentError, UnsupportedError

ATOL = 2e-6


def draw(rng: np.random.Generator, q_len: int = 12, kv_len: int = 12, heads: tuple[int, int] = (2, 2), batch: int = 3):
    shapes = [(batch, q_len, heads[0], 8), (batch, kv_len, heads[1], 8), (batch, kv_len, heads[1], 8)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def both(arrays: list[Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = splat.dot_product_attention(*arrays, **options), jax.nn.dot_product_attention(*arrays, **options)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return np.asarray(ours), np.asarray(theirs)


OPTIONS: list[dict[str, Any]] = [
    {},
    dict(is_causal=True),
    dict(local_window_size=3),
    dict(local_window_size=(2, 0)),
    dict(local_window_size=(0, 4)),
    dict(is_causal=True, local_window_size=2),
    dict(scale=0.3),
    dict(scale=0.0, is_causal=True),
    dict(key_value_seq_lengths=jnp.array([1, 12, 7])),
    dict(key_value_seq_lengths=jnp.array([4, 5, 6]), is_causal=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_as_jax(options: dict[str, Any], rng: np.random.Generator) -> None:
    np.testing.assert_allclose(*both(draw(rng), **options), atol=ATOL)


@pytest.mark.parametrize("options", [{}, dict(is_causal=True), dict(local_window_size=(3, 1))], ids=str)
def test_more_keys_than_queries(options: dict[str, Any], rng: np.random.Generator) -> None:
    np.testing.assert_allclose(*both(draw(rng, 7, 12), **options), atol=ATOL)


def test_more_queries_than_keys(rng: np.random.Generator) -> None:
    np.testing.assert_allclose(*both(draw(rng, 12, 7), is_causal=True), atol=ATOL)


@pytest.mark.parametrize("heads", [(4, 2), (4, 1)])
def test_grouped_queries(heads: tuple[int, int], rng: np.random.Generator) -> None:
    np.testing.assert_allclose(*both(draw(rng, heads=heads), is_causal=True), atol=ATOL)


def test_without_a_batch_axis(rng: np.random.Generator) -> None:
    arrays = [x[0] for x in draw(rng)]
    np.testing.assert_allclose(*both(arrays, is_causal=True), atol=ATOL)
    np.testing.assert_allclose(*both(arrays, key_value_seq_lengths=jnp.array([5])), atol=ATOL)


@pytest.mark.parametrize("shape", [(3, 2, 12, 12), (1, 2, 1, 12), (12, 1)])
def test_bias(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    """And its gradient."""
    arrays, bias = draw(rng), jnp.asarray(rng.standard_normal(shape), jnp.float32)
    np.testing.assert_allclose(
        *both(arrays, bias=bias.reshape((1,) * (4 - bias.ndim) + shape), is_causal=True), atol=ATOL
    )

    def gradient(attend: Any) -> Any:
        return jax.grad(lambda bias: (attend(*arrays, bias=bias, is_causal=True) ** 2).sum())(bias.reshape(shape))

    def theirs(q: Any, k: Any, v: Any, *, bias: Any, **more: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, bias[(None,) * (4 - len(shape))], **more)

    np.testing.assert_allclose(gradient(splat.dot_product_attention), gradient(theirs), atol=1e-5)


@pytest.mark.parametrize("lengths", [[0, 5, 12], [12, 12, 12]])
def test_query_lengths(lengths: list[int], rng: np.random.Generator) -> None:
    """Rows before the lengths are JAX's. Past them JAX leaves the mean of the values in places; here it is 0."""
    arrays, past = draw(rng), np.arange(12) >= np.array(lengths)[:, None]
    for options in ({}, dict(is_causal=True, key_value_seq_lengths=jnp.array([12, 6, 9]))):
        ours, theirs = both(arrays, query_seq_lengths=jnp.array(lengths), **options)
        np.testing.assert_allclose(ours[~past], theirs[~past], atol=ATOL)
        assert not ours[past].any()
    _, lse = splat.dot_product_attention(*arrays, query_seq_lengths=jnp.array(lengths), return_residual=True)
    assert np.isneginf(np.asarray(lse)[past]).all()
    assert np.isfinite(np.asarray(lse)[~past]).all()


def test_lengths_with_wide_integers(rng: np.random.Generator) -> None:
    """Where JAX counts in 64 bits, and promotes nothing by itself."""
    q, k, v = draw(rng)
    lengths = jnp.array([3, 12, 8], jnp.int32)
    expected = splat.dot_product_attention(q, k, v, query_seq_lengths=lengths)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        found = splat.dot_product_attention(q, k, v, query_seq_lengths=lengths)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_gradients_with_lengths(rng: np.random.Generator) -> None:
    q, k, v = draw(rng)
    lengths = dict(query_seq_lengths=jnp.array([3, 12, 8]), key_value_seq_lengths=jnp.array([12, 5, 9]))
    inside = (np.arange(12) < np.array([3, 12, 8])[:, None])[:, :, None, None]

    def loss(attend: Any) -> Any:
        return lambda q, k, v: (jnp.where(inside, attend(q, k, v, **lengths), 0) ** 2).sum()

    ours = jax.grad(loss(splat.dot_product_attention), (0, 1, 2))(q, k, v)
    theirs = jax.grad(loss(jax.nn.dot_product_attention), (0, 1, 2))(q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def masks() -> dict[str, np.ndarray]:
    one = (splat.causal() & splat.window(3) | splat.sink(1)).to_dense(12)
    other = splat.strided(3).to_dense(12)
    return {
        "[T, S]": one,
        "[1, 1, T, S]": one[None, None],
        "[1, N, T, S]": np.stack([one, other])[None],
        "[B, 1, T, S]": np.broadcast_to(one, (3, 1, 12, 12)),
        "[B, N, T, S]": np.broadcast_to(np.stack([other, one]), (3, 2, 12, 12)),
        "[1, 1, 1, S]": (np.arange(12) % 4 == 1)[None, None, None],
        "[1, 1, T, 1]": np.ones((1, 1, 12, 1), bool),
        "[N, T, S]": np.stack([one, other]),
    }


@pytest.mark.parametrize("shape", masks())
def test_masks(shape: str, rng: np.random.Generator) -> None:
    mask, arrays = masks()[shape], draw(rng)
    ours = splat.dot_product_attention(*arrays, mask=mask)
    theirs = jax.nn.dot_product_attention(*arrays, mask=jnp.asarray(mask.reshape((1,) * (4 - mask.ndim) + mask.shape)))
    np.testing.assert_allclose(ours, theirs, atol=ATOL)
    np.testing.assert_array_equal(splat.dot_product_attention(*arrays, mask=jnp.asarray(mask)), ours)


def test_a_window_of_numpy(rng: np.random.Generator) -> None:
    arrays = draw(rng)
    ours = splat.dot_product_attention(*arrays, local_window_size=np.int64(2))  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(ours, splat.dot_product_attention(*arrays, local_window_size=2))


def test_a_mask_is_looked_at_once(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads with the same mask have one pattern, which is recovered once."""
    seen: list[Any] = []
    attention = importlib.import_module("splat.ops.attention")
    original = attention.from_mask
    monkeypatch.setattr(attention, "from_mask", lambda mask: seen.append(mask) or original(mask))
    splat.dot_product_attention(
        *draw(rng, heads=(4, 4)), mask=np.broadcast_to(splat.causal().to_dense(12), (4, 12, 12))
    )
    assert len(seen) == 1


def test_nothing_to_mask(rng: np.random.Generator) -> None:
    arrays = [x[:0] for x in draw(rng)]
    assert splat.dot_product_attention(*arrays, mask=np.ones((0, 1, 12, 12), bool)).shape == (0, 12, 2, 8)


def test_mask_and_the_rest_are_intersected(rng: np.random.Generator) -> None:
    mask = splat.strided(2).to_dense(12)
    options = dict(is_causal=True, local_window_size=(6, 0), key_value_seq_lengths=jnp.array([12, 9, 12]))
    arrays = draw(rng)
    ours = splat.dot_product_attention(*arrays, mask=mask, **options)
    theirs = jax.nn.dot_product_attention(*arrays, mask=jnp.asarray(mask)[None, None], **options)
    alive = (mask & (splat.causal() & splat.window(6, 0)).to_dense(12)) & (np.arange(12) < 9)
    rows = alive.any(axis=1)
    np.testing.assert_allclose(ours[:, rows], theirs[:, rows], atol=ATOL)
    with_pattern = splat.dot_product_attention(*arrays, pattern=splat.strided(2), **options)
    np.testing.assert_allclose(ours, with_pattern, atol=ATOL)


@pytest.mark.parametrize("rank", [3, 4])
def test_residual(rank: int, rng: np.random.Generator) -> None:
    arrays = draw(rng) if rank == 4 else [x[0] for x in draw(rng)]
    ours = splat.dot_product_attention(*arrays, is_causal=True, return_residual=True)
    theirs = jax.nn.dot_product_attention(*arrays, is_causal=True, return_residual=True)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=ATOL)


def test_a_row_without_keys_is_zero(rng: np.random.Generator) -> None:
    """Where JAX gives the mean of the values."""
    mask = splat.causal().to_dense(12)
    mask[4] = False
    out, lse = splat.dot_product_attention(*draw(rng), mask=mask, return_residual=True)
    assert not out[:, 4].any()
    assert np.isneginf(lse[:, 4]).all()


def test_half_precision(rng: np.random.Generator) -> None:
    arrays = [x.astype(jnp.bfloat16) for x in draw(rng)]
    ours, theirs = both(arrays, is_causal=True)
    np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), atol=3e-2)


def test_under_jit_and_vmap(rng: np.random.Generator) -> None:
    arrays = draw(rng)
    attend = jax.jit(lambda *x: splat.dot_product_attention(*x, is_causal=True))
    expected = jax.nn.dot_product_attention(*arrays, is_causal=True)
    np.testing.assert_allclose(attend(*arrays), expected, atol=ATOL)
    np.testing.assert_allclose(jax.vmap(attend)(*arrays), expected, atol=ATOL)


def test_per_head_pattern(rng: np.random.Generator) -> None:
    arrays = draw(rng)
    pattern = splat.per_head([splat.window(2), splat.full()])
    ours = splat.dot_product_attention(*arrays, pattern=pattern, is_causal=True)
    q, k, v = arrays
    np.testing.assert_allclose(ours, splat.attention(q, k, v, pattern & splat.causal()), atol=ATOL)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(bias=np.zeros((2, 1, 12, 12))), ArgumentError, "bias must be floating-point numbers, broadcastable to"),
        (
            dict(local_window_size=(1, 2, 3)),
            ArgumentError,
            "local_window_size must be an int or (left, right), but (1, 2",
        ),
        (dict(local_window_size=-1), ArgumentError, "window: left must be in [0, "),
        (
            dict(mask=np.zeros((12, 12))),
            ArgumentError,
            "mask must be bool, broadcastable to [B, N, T, S], but float64[12",
        ),
        (dict(mask=np.ones((11, 12), bool)), ArgumentError, "[B, N, T, S] = [3, 2, 12, 12], but [11, 12] was given"),
        (dict(mask=np.ones((1, 1, 1, 1, 12), bool)), ArgumentError, "mask must be bool, broadcastable to [B, N, T, S]"),
        (
            dict(mask=np.arange(3)[:, None, None, None] + np.zeros((1, 1, 12, 12)) > 1),
            UnsupportedError,
            "mask differs between batch entries. Use key_value_seq_lengths for padding, segments(ids) with jax.vmap",
        ),
        (
            dict(query_seq_lengths=np.ones(2, int)),
            ArgumentError,
            "query_seq_lengths must be integers of shape [3] or []",
        ),
        (dict(implementation="cudnn"), ArgumentError, "implementation must be None or one of 'triton', 'cpp', 'xla'"),
        (
            dict(pattern="causal()"),
            ArgumentError,
            "but str was given. Use splat.from_mask for a boolean mask, splat.parse",
        ),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str, rng: np.random.Generator) -> None:
    with pytest.raises(error) as caught:
        splat.dot_product_attention(*draw(rng), **options)
    assert message in str(caught.value)


def test_lengths_are_named_as_the_caller_did(rng: np.random.Generator) -> None:
    with pytest.raises(ArgumentError, match="key_value_seq_lengths must be integers"):
        splat.dot_product_attention(*draw(rng), key_value_seq_lengths=np.ones(2, int))


def test_traced_mask_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(UnsupportedError, match="mask is traced, so its structure cannot be recovered"):
        jax.jit(lambda mask: splat.dot_product_attention(*draw(rng), mask=mask))(np.ones((12, 12), bool))
