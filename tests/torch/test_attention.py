"""Values, log-sum-exp and gradients of `splat.torch.attention` against dense attention in float64."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.torch.cases import (
    DEVICE,
    TOLERANCE,
    Inputs,
    Results,
    as_numpy,
    check,
    compare,
    draw_inputs,
    needs_device,
    run,
    torch,
    truth,
)

import splat  # isort: skip
import splat.torch  # isort: skip

pytestmark = needs_device

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
    "causal() & (window(8, 0) | strided(8))",
    "causal() & (blocked(8) | lattice_columns(8, 7))",
    "window(4) | dilated_window(4, 4, 3) | global_tokens(2)",
    "window(2) - window(2)",
]

MIXED = "causal() & window(9) | sink(2)"


@pytest.mark.parametrize("text", VOCABULARY, ids=lambda text: text[:24])
def test_vocabulary(text: str, rng: np.random.Generator) -> None:
    check(text, draw_inputs(rng, 40, 40))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("text", [MIXED, "window(3) | strided(4)"])
def test_dtypes(text: str, dtype: str, rng: np.random.Generator) -> None:
    check(text, draw_inputs(rng, 33, 47, batch=2, head_dim=16, dtype=dtype))


@pytest.mark.parametrize("head_dim", [1, 7, 80])
def test_odd_head_dims(head_dim: int, rng: np.random.Generator) -> None:
    check("causal() & window(5)", draw_inputs(rng, 30, 30, head_dim=head_dim))


@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (6, 2)])
def test_grouped_queries(heads: tuple[int, int], rng: np.random.Generator) -> None:
    check("window(5) | sink(2)", draw_inputs(rng, 20, 20, heads=heads, batch=2))


@pytest.mark.parametrize("lengths", [(1, 40), (40, 1), (17, 50)])
def test_rectangles(lengths: tuple[int, int], rng: np.random.Generator) -> None:
    check("window(7, 3) | strided(6)", draw_inputs(rng, *lengths))


@pytest.mark.parametrize("shape", [(0, 2, 8, 4), (2, 2, 0, 4)])
def test_no_queries(shape: tuple[int, ...]) -> None:
    q = torch.ones(shape, device=DEVICE)
    k = torch.ones((shape[0], 2, 5, 4), device=DEVICE, requires_grad=True)
    out, lse = splat.torch.attention(q, k, k, splat.causal(), return_lse=True)
    assert out.shape == shape
    assert lse.shape == shape[:-1]
    (out.sum() + lse.sum()).backward()
    assert not k.grad.any()


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_transposed_views_are_read_where_they_lie(rng: np.random.Generator) -> None:
    """[B, T, N, H] in memory, one tensor that holds query, key and value, expanded heads, a strided last axis."""
    inputs = draw_inputs(rng, 20, 20, batch=2, heads=(2, 2))
    swapped = inputs._replace(**{
        name: getattr(inputs, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("query", "key", "d_out")
    })  # fmt: skip
    packed = torch.stack(inputs[:3], dim=3)  # [B, N, T, 3, H]
    views = inputs._replace(query=packed[..., 0, :], key=packed[..., 1, :], value=packed[..., 2, :])
    wide = torch.stack([inputs.value, inputs.value], dim=-1)
    last = inputs._replace(value=wide[..., 0], d_lse=inputs.d_lse.transpose(1, 2).contiguous().transpose(1, 2))
    whole = run(splat.parse(MIXED), inputs)
    for other in (swapped, views, last):
        assert not all(x.is_contiguous() for x in other)
        for a, b in zip(run(splat.parse(MIXED), other), whole, strict=True):
            torch.testing.assert_close(a, b)
    assert whole.out.transpose(1, 2).is_contiguous()


def test_expanded_tensors(rng: np.random.Generator) -> None:
    inputs = draw_inputs(rng, 20, 20, heads=(2, 2))
    key, value = inputs.key[:, :1].expand(-1, 2, -1, -1), inputs.value[:, :, :1].expand(-1, -1, 20, -1)
    check(MIXED, inputs._replace(key=key, value=value))
    leaf = inputs.query.detach().requires_grad_()
    splat.torch.attention(leaf, *inputs[1:3], splat.parse(MIXED)).sum().backward()  # an expanded gradient
    ones = inputs._replace(d_out=torch.ones_like(inputs.d_out), d_lse=torch.zeros_like(inputs.d_lse))
    torch.testing.assert_close(leaf.grad, run(splat.parse(MIXED), ones).d_query)


def test_views_at_odd_addresses(rng: np.random.Generator) -> None:
    """Tensor descriptors would need 16 bytes; pointers do not."""
    inputs = draw_inputs(rng, 40, 40, head_dim=16, dtype="bfloat16")
    wide = torch.cat([inputs.key[..., :8], inputs.key, inputs.key[..., :8]], dim=-1)
    for first in (8, 3):
        wide[..., first : first + 16] = inputs.key
        check(MIXED, inputs._replace(key=wide[..., first : first + 16]))


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [dict(logits_soft_cap=1.5), dict(scale=0.0), dict(scale=-2.0), dict(scale=1, logits_soft_cap=30)]
)
def test_scores(options: dict[str, Any], rng: np.random.Generator) -> None:
    check("causal() & window(9) | strided(8)", draw_inputs(rng, 30, 30), **options)


@pytest.mark.parametrize(
    ("text", "dtype"),
    [("causal()", torch.int64), ("window(3) | strided(5)", torch.int16), ("full()", torch.uint16),
     ("causal()", torch.uint32)],
)  # fmt: skip
def test_kv_lengths(text: str, dtype: Any, rng: np.random.Generator) -> None:
    """None, some, all and more keys than there are; of any integer dtype."""
    lengths = torch.tensor([0, 7, 30, 99], dtype=dtype, device=DEVICE)
    check(text, draw_inputs(rng, 24, 30, batch=4), kv_lengths=lengths)


def test_one_length_for_all(rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 24, 30, batch=2)
    lengths = [torch.tensor(x, device=DEVICE) for x in (7, [7, 7])]
    one, each = (splat.torch.attention(q, k, v, splat.causal(), kv_lengths=x) for x in lengths)
    assert torch.equal(one, each)


def test_nothing_past_the_lengths_is_read(rng: np.random.Generator) -> None:
    inputs = draw_inputs(rng, 24, 30, batch=2)
    lengths = torch.tensor([5, 23], device=DEVICE)
    poisoned = inputs._replace(key=inputs.key.clone(), value=inputs.value.clone())
    for n, length in enumerate(lengths.tolist()):
        poisoned.key[n, :, length:] = float("nan")
        poisoned.value[n, :, length:] = float("inf")
    expected = truth(inputs, splat.parse(MIXED).to_dense(24, 30), kv_lengths=lengths.cpu().numpy())
    compare(run(splat.parse(MIXED), poisoned, kv_lengths=lengths), expected, "float32")


@pytest.mark.parametrize("offset", [0, 13, 60])
@pytest.mark.parametrize("text", ["causal() & window(6) | sink(1)", "causal() & strided(3)"])
def test_query_offset(text: str, offset: int, rng: np.random.Generator) -> None:
    check(text, draw_inputs(rng, 9, 40), query_offset=offset)


@pytest.mark.parametrize("q_len", [1, 5, 12])
def test_an_offset_for_each_sequence(q_len: int, rng: np.random.Generator) -> None:
    """Those of a block of rows that is looked up, and of others; callers may count up their own tensor."""
    inputs, lengths = draw_inputs(rng, q_len, 1040, batch=4), torch.tensor([1040, 9, 1040, 700], device=DEVICE)
    for pattern in (splat.parse("causal() & window(6) | sink(2)"), splat.per_head([splat.causal(), splat.strided(9)])):
        expected = []
        for n, offset in enumerate((1022, 0, 31, 5000)):
            mask = pattern.to_dense(q_len, 1040, query_offset=offset)
            own = Inputs(*(x[n : n + 1] for x in inputs))
            expected.append(truth(own, mask, kv_lengths=lengths[n : n + 1].cpu().numpy()))
        for dtype in (torch.int64, torch.int32):
            offsets = torch.tensor([1022, 0, 31, 5000], dtype=dtype)
            leaves = q, k, v = [x.detach().requires_grad_() for x in inputs[:3]]
            out, lse = splat.torch.attention(
                q, k, v, pattern, query_offset=offsets, kv_lengths=lengths, return_lse=True
            )
            offsets += 1
            torch.autograd.backward([out, lse], [inputs.d_out, inputs.d_lse])
            found = Results(out, lse, *(x.grad for x in leaves))
            compare(found, Results(*(np.concatenate(of_each) for of_each in zip(*expected, strict=True))), "float32")


def test_offsets_that_are_alike_are_one(rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 5, 24, batch=2)
    attend = partial(splat.torch.attention, q, k, v, splat.causal())
    for offsets in (torch.tensor(3), torch.tensor([3, 3], dtype=torch.uint8)):
        assert torch.equal(attend(query_offset=offsets), attend(query_offset=3))


def test_offsets_at_the_end_of_documents(rng: np.random.Generator) -> None:
    """Whose pattern names few positions."""
    pattern = splat.causal() & splat.segments([0] * 7 + [1] * 9)
    for q_len in (1, 3):
        check(pattern, draw_inputs(rng, q_len, 16), query_offset=16 - q_len)
        with pytest.raises(splat.PatternError, match="16 positions"):
            splat.torch.attention(*draw_inputs(rng, q_len, 16)[:3], pattern, query_offset=17 - q_len)


def test_chunks_and_single_steps_are_the_whole(rng: np.random.Generator) -> None:
    """Prefill in pieces, then decoding one by one."""
    pattern = splat.causal() & splat.window(6) | splat.sink(2)
    q, k, v, *_ = draw_inputs(rng, 32, 32)
    edges = [0, 8, 16, *range(24, 33)]
    parts = [
        splat.torch.attention(q[:, :, start:stop], k, v, pattern, query_offset=start)
        for start, stop in itertools.pairwise(edges)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=2), splat.torch.attention(q, k, v, pattern))


# -- one pattern for each head -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_per_head(heads: tuple[int, int], rng: np.random.Generator) -> None:
    """In any order and grouping; heads with one pattern run together."""
    local, strided = splat.causal() & splat.window(5), splat.strided(4)
    pattern = splat.per_head([local, strided, local, splat.global_tokens(2) | splat.window(1)])
    check(pattern, draw_inputs(rng, 20, 28, heads=heads, batch=2))


@pytest.mark.parametrize("order", ["ABBA", "AABA", "AAAA", "ABAB", "BAAA"])
def test_per_head_orders(order: str, rng: np.random.Generator) -> None:
    patterns = {"A": splat.causal(), "B": splat.window(2)}
    pattern = splat.per_head([patterns[letter] for letter in order])
    check(pattern, draw_inputs(rng, 18, 18, heads=(4, 2)))


def test_per_head_with_options(rng: np.random.Generator) -> None:
    pattern = splat.per_head([splat.window(5), splat.window(5), splat.full(), splat.sink(0)]) & splat.causal()
    lengths = torch.tensor([9, 28], device=DEVICE)
    found = check(pattern, draw_inputs(rng, 20, 28, heads=(4, 2), batch=2), query_offset=3, kv_lengths=lengths)
    assert found.out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sinks(dtype: str, rng: np.random.Generator) -> None:
    """A score of each head in all of its rows, also those that attend to nothing, and its gradient."""
    pattern = (splat.window(6) | splat.strided(5)) & splat.segments([0] * 10 + [-1] * 7 + [1] * 13)
    inputs = draw_inputs(rng, 30, 30, batch=2, heads=(4, 2), dtype=dtype)
    values = np.array([0.7, -np.inf, -3, 20])
    sinks = torch.tensor(values, dtype=torch.float32, device=DEVICE, requires_grad=True)
    found = run(pattern, inputs, partial(splat.torch.attention, sinks=sinks))
    assert found.out.transpose(1, 2).is_contiguous()
    expected = truth(inputs, pattern.to_dense(30), sinks=values)
    compare(found, expected, dtype)
    with np.errstate(invalid="ignore"):
        weights = np.nan_to_num(np.exp(values - expected.lse), nan=1)  # where there is nothing but the sink
    d_weights = (expected.out * as_numpy(inputs.d_out)).sum(-1)
    wanted = (weights * (as_numpy(inputs.d_lse) - d_weights)).sum((0, 1))
    assert sinks.grad is not None
    np.testing.assert_allclose(sinks.grad.cpu(), wanted, atol=20 * TOLERANCE[dtype], rtol=10 * TOLERANCE[dtype])


def test_sinks_of_heads_with_patterns_of_their_own(rng: np.random.Generator) -> None:
    pattern = splat.per_head([splat.causal(), splat.window(2), splat.causal(), splat.strided(3)])
    inputs, sinks = draw_inputs(rng, 20, 20, heads=(4, 2)), np.array([1.0, 2, 3, 4])
    found = run(pattern, inputs, partial(splat.torch.attention, sinks=torch.tensor(sinks, device=DEVICE)))
    compare(found, truth(inputs, pattern.to_dense(20), sinks=sinks), "float32")


# -- autograd ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs(needs: tuple[int, ...], rng: np.random.Generator) -> None:
    inputs = draw_inputs(rng, 20, 20)
    found = run(splat.parse(MIXED), inputs, needs=needs)
    compare(found, truth(inputs, splat.parse(MIXED).to_dense(20)), "float32")
    assert [n for n in range(3) if found[2 + n] is not None] == list(needs)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_output(which: int, rng: np.random.Generator) -> None:
    inputs = draw_inputs(rng, 20, 20)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    q, k, v = leaves
    results = splat.torch.attention(q, k, v, splat.parse(MIXED), return_lse=True)
    gradients = torch.autograd.grad(results[which], leaves[: 3 - which], inputs[3 + which])
    other = torch.zeros_like(inputs[4 - which])
    zero = inputs._replace(d_lse=other) if which == 0 else inputs._replace(d_out=other)
    expected = truth(zero, splat.parse(MIXED).to_dense(20))
    out, lse = results
    d_query, d_key, d_value = (*gradients, *(None,) * which)
    compare(Results(out, lse, d_query, d_key, d_value), expected, "float32")


def test_second_derivatives_are_refused(rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 20, 20)
    q.requires_grad_()
    loss = splat.torch.attention(q, k, v, splat.causal()).square().sum()
    (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(splat.UnsupportedError, match=r"has first derivatives only.*Hessian-vector products"):
        gradient.sum().backward()


def test_changing_the_output_in_place(rng: np.random.Generator) -> None:
    """The backward reads it: PyTorch says so, as of its own attention."""
    q, k, v, *_ = draw_inputs(rng, 20, 20)
    out = splat.torch.attention(q.requires_grad_(), k, v, splat.causal())
    out.mul_(2)
    with pytest.raises(RuntimeError, match=r"needed for gradient computation has been modified by an inplace oper"):
        out.sum().backward()


def in_a_dual_level(f: Any, x: Any) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what linearize traces with
@pytest.mark.parametrize(
    "differentiate",
    [
        in_a_dual_level,
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.jvp(torch.func.vmap(f), (x[None],), (x[None],)),
        lambda f, x: torch.func.jacfwd(f)(x),
        torch.func.linearize,
    ],
    ids=["dual_level", "jvp", "jvp-vmap", "jacfwd", "linearize"],
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_forward_mode_is_refused(differentiate: Any, which: int, rng: np.random.Generator) -> None:
    arrays = draw_inputs(rng, 8, 8)[:3]

    def of_one(x: Any) -> Any:
        q, k, v = (x if n == which else y for n, y in enumerate(arrays))
        return splat.torch.attention(q, k, v, splat.causal())

    with pytest.raises(splat.UnsupportedError, match=r"no forward mode, but query, key or value .*Use backward\(\)"):
        differentiate(of_one, arrays[which])


def test_constants_in_forward_mode(rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 8, 8)
    out = splat.torch.attention(q, k, v, splat.causal())
    one = torch.ones((), device=DEVICE)
    found = torch.func.jvp(lambda x: x * splat.torch.attention(q, k, v, splat.causal()), (one,), (one,))
    torch.testing.assert_close(found, (out, out))


def test_rows_that_attend_to_nothing(rng: np.random.Generator) -> None:
    inputs = draw_inputs(rng, 30, 30)
    found = check("window(2) & (~blocked(10) | sink(3))", inputs)
    assert torch.isneginf(found.lse).any()


def test_results_are_the_same_every_time(rng: np.random.Generator) -> None:
    inputs = draw_inputs(rng, 40, 40, heads=(4, 2))
    first, second = (run(splat.parse("window(3) | strided(5)"), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast(rng: np.random.Generator) -> None:
    """As for torch's own attention: queries that RoPE made float32 meet bfloat16 keys."""
    q, k, v, *_ = draw_inputs(rng, 20, 20)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = splat.torch.attention(q, k.bfloat16(), v, splat.causal())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), splat.torch.attention(q, k, v, splat.causal()), atol=2e-2, rtol=2e-2)
