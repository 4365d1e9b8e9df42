"""`torch.func`'s transforms: mapped calls are the calls one by one, gradients are those of `backward()`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.torch.cases import DEVICE, INTERPRETED, draw_inputs, torch

import splat  # isort: skip
import splat.torch  # isort: skip
from splat.codegen.cpp import compiler
from splat.torch import native, validate

MIXED = splat.parse("causal() & window(9) | sink(2)")
PATTERNS = [MIXED, splat.per_head([MIXED, splat.strided(4), MIXED, splat.window(3)])]


@pytest.fixture(autouse=True, params=["kernels", "interpreter"] if INTERPRETED else ["kernels"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the generated C++, and the GPU's in the interpreter."""
    if request.param == "kernels" and DEVICE == "cpu":
        if compiler.missing() is not None:
            pytest.skip("there is no C++ compiler")
        monkeypatch.setattr(validate, "_interprets", lambda: False)
        native._prepared.clear()


def loss(q: Any, k: Any, v: Any, weights: Any, lengths: Any = None, pattern: splat.Pattern = MIXED) -> Any:
    out, lse = splat.torch.attention(q, k, v, pattern, kv_lengths=lengths, return_lse=True)
    return (out * weights).sum() + lse.nan_to_num(neginf=0).sum()


def by_backward(*arguments: Any, **options: Any) -> list[Any]:
    leaves = [x.detach().clone().requires_grad_() for x in arguments[:3]]
    loss(*leaves, *arguments[3:], **options).backward()
    return [x.grad for x in leaves]


def draw(rng: np.random.Generator, samples: int) -> list[Any]:
    """query, key, value and weights of several calls: [samples, 2, N, T, H]."""
    each = [draw_inputs(rng, 11, 17, heads=(4, 2), head_dim=8, batch=2) for _ in range(samples)]
    return [torch.stack([getattr(one, name) for one in each]) for name in ("query", "key", "value", "d_out")]


@pytest.mark.parametrize("pattern", PATTERNS, ids=["one", "per_head"])
def test_gradients_of_samples(pattern: splat.Pattern, rng: np.random.Generator) -> None:
    """A key that all share, lengths that each has its own of, mapped axes that are not the first."""
    q, k, v, weights = draw(rng, 3)
    lengths = torch.tensor([[17, 3], [0, 11], [9, 16]], device=DEVICE)
    of_one = torch.func.grad(lambda *arguments: loss(*arguments, pattern=pattern), argnums=(0, 1, 2))
    mapped = torch.func.vmap(of_one, in_dims=(2, None, 0, 0, 0))
    found = mapped(q.movedim(0, 2), k[0], v, weights, lengths)
    for n in range(3):
        expected = by_backward(q[n], k[0], v[n], weights[n], lengths[n], pattern=pattern)
        torch.testing.assert_close([x[n] for x in found], expected)


def test_sinks_of_samples(rng: np.random.Generator) -> None:
    q, k, v, _ = draw(rng, 3)
    sinks = torch.tensor(rng.standard_normal((3, 4)), dtype=torch.float32, device=DEVICE)

    def of_one(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        return splat.torch.attention(q, k, v, MIXED, sinks=sinks).square().sum()

    gradients = torch.func.grad(of_one, argnums=(0, 1, 2, 3))
    found = torch.func.vmap(gradients)(q, k, v, sinks)
    for n in range(3):
        torch.testing.assert_close([x[n] for x in found], list(gradients(q[n], k[n], v[n], sinks[n])))


def test_values_of_samples_in_samples(rng: np.random.Generator) -> None:
    q, k, v, _ = draw(rng, 4)

    def of_one(q: Any, k: Any, v: Any) -> Any:
        return splat.torch.attention(q, k, v, MIXED)

    split = [x.unflatten(0, (2, 2)) for x in (q, k, v)]
    found = torch.func.vmap(torch.func.vmap(of_one, out_dims=1), in_dims=(0, 0, None))(*split[:2], split[2][0])
    expected = [[of_one(split[0][m, n], split[1][m, n], split[2][0, n]) for n in range(2)] for m in range(2)]
    torch.testing.assert_close(found, torch.stack([torch.stack(row, dim=1) for row in expected]))


def test_offsets_of_samples(rng: np.random.Generator) -> None:
    q, k, v, weights = draw(rng, 3)

    def of_one(q: Any, k: Any, v: Any, weights: Any, offsets: Any) -> Any:
        return (splat.torch.attention(q, k, v, MIXED, query_offset=offsets) * weights).sum()

    gradients = torch.func.grad(of_one, argnums=(0, 1, 2))
    for offsets in (torch.tensor([[0, 9], [30, 2], [5, 5]]), torch.tensor([3, 0, 12])):
        found = torch.func.vmap(gradients)(q, k, v, weights, offsets)
        for n in range(3):
            expected = gradients(q[n], k[n], v[n], weights[n], offsets[n])
            torch.testing.assert_close([x[n] for x in found], list(expected))


def test_gradients_and_jacobians(rng: np.random.Generator) -> None:
    q, k, v, weights = (x[0] for x in draw(rng, 1))
    expected = by_backward(q, k, v, weights)
    torch.testing.assert_close([torch.func.grad(loss)(q, k, v, weights)], expected[:1])
    value, pull = torch.func.vjp(lambda q, k, v: loss(q, k, v, weights), q, k, v)
    torch.testing.assert_close(list(pull(torch.ones_like(value))), expected)
    rows = torch.func.jacrev(lambda q: (splat.torch.attention(q, k, v, MIXED) * weights).sum((0, 2, 3)))(q)
    whole = torch.func.grad(lambda q: (splat.torch.attention(q, k, v, MIXED) * weights).sum())(q)
    assert rows.shape == (4, *q.shape)
    torch.testing.assert_close(rows.sum(0), whole)


def test_of_a_module(rng: np.random.Generator) -> None:
    """As training by functions is written; keys and values alone have parameters."""
    q, k, v, _ = (x[0] for x in draw(rng, 1))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(8, 8, bias=False, device=DEVICE)

        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return splat.torch.attention(q, self.project(k), v, MIXED).square().sum()

    model = Model()
    parameters = dict(model.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (q, k, v)))(parameters)
    model(q, k, v).backward()
    torch.testing.assert_close(found["project.weight"], model.project.weight.grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's forward mode
@pytest.mark.parametrize(
    "twice",
    [
        lambda f, x: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x),
        lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
        lambda f, x: torch.func.hessian(f)(x),
    ],
    ids=["grad-grad", "jacrev-jacrev", "hessian"],
)
def test_second_derivatives_are_refused(twice: Any, rng: np.random.Generator) -> None:
    q, k, v, weights = (x[0] for x in draw(rng, 1))
    with pytest.raises(splat.UnsupportedError, match=r"has first derivatives only|has no forward mode"):
        twice(lambda q: loss(q, k, v, weights), q)


def test_compiled(rng: np.random.Generator) -> None:
    """The gradient of what is compiled, and a compiled map. A compiled gradient PyTorch refuses."""
    q, k, v, weights = draw(rng, 2)
    compiled = torch.compile(loss, backend="aot_eager")
    torch.testing.assert_close(
        [torch.func.grad(compiled)(q[0], k[0], v[0], weights[0])], by_backward(q[0], k[0], v[0], weights[0])[:1]
    )
    mapped = torch.compile(torch.func.vmap(loss), backend="aot_eager", fullgraph=True)
    expected = torch.stack([loss(*one) for one in zip(q, k, v, weights, strict=True)])
    torch.testing.assert_close(mapped(q, k, v, weights), expected)
