"""What PyTorch's machinery asks of a registered operation: opcheck, torch.compile, export, checkpointing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.torch.cases import DEVICE, INTERPRETED, draw_inputs, needs_device, run, torch

import splat  # isort: skip
import splat.torch  # isort: skip
from splat.codegen.cpp import compiler
from splat.torch import native, validate
from splat.torch.operation import attend, attend_backward

pytestmark = [
    needs_device,
    # Dynamo's and Inductor's own.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PATTERN = splat.causal() & splat.window(6) | splat.sink(2)
HEADS = splat.per_head([PATTERN, splat.strided(3)])


@pytest.fixture(autouse=True, params=["native"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go to C++ kernels, as they do for users; where a test asks for "interpreted" ones, to a GPU's."""
    if DEVICE == "cpu" and request.param == "native":
        if compiler.missing() is not None:
            pytest.skip("there is no C++ compiler")
        monkeypatch.setattr(validate, "_interprets", lambda: False)
    native._prepared.clear()


BOTH = pytest.mark.parametrize("kernels", ["native", "interpreted"] if DEVICE == "cpu" else ["native"], indirect=True)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    import torch._functorch.config
    import torch._inductor.config

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(backend: str = "aot_eager") -> Any:
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(backend)


# -- the operations ----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("lengths", [False, True])
def test_opcheck(lengths: bool, rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 9, 20, batch=2, heads=(2, 1))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    arrays = [x.requires_grad_() for x in (q, k, v)]
    given = torch.tensor([5, 20], dtype=torch.int32, device=DEVICE) if lengths else None
    offsets = torch.tensor([4, 1]) if lengths else None
    static = (repr(PATTERN), 0.3, 5.0, 2) if lengths else (repr(PATTERN), None, None, 0)
    torch.library.opcheck(attend, (*arrays, given, offsets, *static))


@BOTH
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_opcheck_of_the_backward(wanted: tuple[bool, bool], rng: np.random.Generator) -> None:
    q, k, v, d_out, d_lse = draw_inputs(rng, 9, 9, batch=2)
    static, offsets = (repr(PATTERN), None, None, 0), torch.tensor([3, 0]) if wanted[0] else None
    out, lse = attend(q, k, v, None, offsets, *static)
    cotangents = (d_out, None if wanted[0] else d_lse)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(
        attend_backward, (q, k, v, None, offsets, out, lse, *cotangents, *static, *wanted), test_utils=utils
    )


@pytest.mark.parametrize("shape", [(1, 2, 0, 8), (0, 2, 4, 8)])
def test_opcheck_without_queries(shape: tuple[int, ...]) -> None:
    q = torch.ones(shape, device=DEVICE, requires_grad=True)
    k = torch.ones((shape[0], 1, 4, 8), device=DEVICE, requires_grad=True)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(attend, (q, k, k.detach(), None, None, repr(PATTERN), None, None, 0), test_utils=utils)


# -- torch.compile -----------------------------------------------------------------------------------------------------


def assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@BOTH
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_forward_and_backward(backend: str, rng: np.random.Generator) -> None:
    inputs = draw_inputs(rng, 24, 24, batch=2)
    lengths = torch.tensor([7, 24], device=DEVICE)
    options = dict(kv_lengths=lengths, logits_soft_cap=4.0)
    caches = (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    )
    with caches[0], caches[1]:  # on the disk
        attend = torch.compile(splat.torch.attention, backend=backend, fullgraph=True)
        assert_same(run(PATTERN, inputs, attend, **options), run(PATTERN, inputs, **options))


@pytest.mark.parametrize(
    "pattern", [HEADS, splat.segments([0] * 9 + [1] * 15) - splat.strided(5)], ids=["heads", "ids"]
)
def test_compile_a_module(pattern: Any, rng: np.random.Generator) -> None:
    """A layer between other operations, its pattern an attribute."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pattern = pattern
            self.sinks = torch.nn.Parameter(torch.tensor([0.5, 3], device=DEVICE))
            self.project = torch.nn.Linear(16, 48, device=DEVICE)

        def forward(self, x: Any) -> Any:
            q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return x + splat.torch.attention(q, k, v, self.pattern, sinks=self.sinks).transpose(1, 2).flatten(2)

    layer, x = Layer(), draw_inputs(rng, 24, 24, heads=(2, 2)).query.transpose(1, 2).flatten(2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for model in (layer, compiled):
        layer.zero_grad()
        out = model(x)
        out.square().sum().backward()
        results.append((out, layer.project.weight.grad.clone(), layer.sinks.grad.clone()))
    assert_same(*results)


def test_other_offsets_are_not_compiled_again(rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 1, 24)
    backend = counted()
    step = torch.compile(
        lambda q, at: splat.torch.attention(q, k, v, PATTERN, query_offset=at), backend=backend, fullgraph=True
    )
    for at in range(8):
        assert_same([step(q, at)], [splat.torch.attention(q, k, v, PATTERN, query_offset=at)])
    assert backend.frame_count <= 3  # one for 0, one for all others


def test_offsets_of_sequences_are_not_compiled_again(rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 1, 24, batch=2)
    backend = counted()
    step = torch.compile(
        lambda q, at: splat.torch.attention(q, k, v, PATTERN, query_offset=at), backend=backend, fullgraph=True
    )
    for at in range(8):
        offsets = torch.tensor([at, 20 - at])
        assert_same([step(q, offsets)], [splat.torch.attention(q, k, v, PATTERN, query_offset=offsets)])
    assert backend.frame_count == 1


def test_kernels_are_not_traced(rng: np.random.Generator) -> None:
    """Nor where torch.compile gives up a function, and looks into those that it calls."""
    q, k, v, *_ = draw_inputs(rng, 20, 24)

    @torch.compiler.disable(recursive=False)
    def given_up(q: Any) -> Any:
        return attend(q, k, v, None, None, repr(PATTERN), None, None, 0)[0]

    backend = counted()
    found = torch.compile(lambda q: given_up(q) * 2, backend=backend)(q)
    assert_same([found], [splat.torch.attention(q, k, v, PATTERN) * 2])
    assert backend.frame_count == 1


def test_other_lengths_are_compiled_once_more(rng: np.random.Generator) -> None:
    backend = counted()
    attend = torch.compile(splat.torch.attention, backend=backend, fullgraph=True)
    for length in (17, 18, 30, 40):
        q, k, v, *_ = draw_inputs(rng, length, length)
        assert_same([attend(q, k, v, PATTERN)], [splat.torch.attention(q, k, v, PATTERN)])
    assert backend.frame_count == 2  # the first length, then any


def test_another_pattern_is_another_function(rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 20, 20)
    backend = counted()
    attend = torch.compile(splat.torch.attention, backend=backend, fullgraph=True)
    for pattern in (PATTERN, splat.causal(), PATTERN):
        assert_same([attend(q, k, v, pattern)], [splat.torch.attention(q, k, v, pattern)])
    assert backend.frame_count == 2


def test_sdpa_compiles(rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 20, 20, heads=(2, 2))
    attend = torch.compile(splat.torch.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    window = splat.window(5)
    for pattern in (None, window):
        found = attend(q, k, v, is_causal=True, pattern=pattern)
        assert_same([found], [splat.torch.scaled_dot_product_attention(q, k, v, is_causal=True, pattern=pattern)])
    with pytest.raises(Exception, match="attn_mask is not known while torch.compile traces"):
        attend(q, k, v, attn_mask=torch.ones(20, 20, dtype=torch.bool, device=DEVICE))


def test_a_pattern_made_inside_is_refused(rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 20, 20)
    attend = torch.compile(
        lambda q: splat.torch.attention(q, k, v, splat.causal() & splat.window(3)), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(
        Exception, match="pattern was made inside a function that torch.compile traces. Make it outside"
    ):
        attend(q)


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_export(rng: np.random.Generator) -> None:
    """Written and read again: the graph holds the pattern's text and no table."""

    class Model(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return splat.torch.attention(q, k, v, HEADS)

    q, k, v, *_ = draw_inputs(rng, 20, 20)
    exported = torch.export.export(Model(), (q, k, v))
    assert repr(PATTERN) in str(exported.graph)
    assert not exported.constants
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    assert_same([torch.export.load(file).module()(q, k, v)], [Model()(q, k, v)])


def test_export_for_other_lengths(rng: np.random.Generator) -> None:
    """Also where the offset is made of them."""

    class Model(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return splat.torch.attention(q, k, v, PATTERN, query_offset=k.shape[2] - q.shape[2])

    inputs = draw_inputs(rng, 9, 20)[:3]
    queries, keys = (torch.export.Dim(name, min=2, max=64) for name in ("queries", "keys"))
    exported = torch.export.export(Model(), inputs, dynamic_shapes=({2: queries}, {2: keys}, {2: keys}))
    for q_len, kv_len in ((9, 20), (5, 33)):
        given = draw_inputs(rng, q_len, kv_len)[:3]
        assert_same([exported.module()(*given)], [Model()(*given)])


def test_checkpoint(rng: np.random.Generator) -> None:
    from torch.utils.checkpoint import checkpoint

    def again(*args: Any, **options: Any) -> Any:
        return checkpoint(splat.torch.attention, *args, use_reentrant=False, **options)

    inputs = draw_inputs(rng, 20, 20)
    assert_same(run(PATTERN, inputs, again), run(PATTERN, inputs))


def test_vmap(rng: np.random.Generator) -> None:
    q, k, v, *_ = draw_inputs(rng, 20, 20, batch=3)
    found = torch.vmap(lambda q, k, v: splat.torch.attention(q[None], k[None], v[None], PATTERN)[0])(q, k, v)
    assert_same([found], [splat.torch.attention(q, k, v, PATTERN)])


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
def test_cuda_graphs(rng: np.random.Generator) -> None:
    inputs = draw_inputs(rng, 64, 64, head_dim=64, dtype="bfloat16")
    attend = torch.compile(splat.torch.attention, mode="reduce-overhead", fullgraph=True)
    expected = run(PATTERN, inputs)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        assert_same(run(PATTERN, inputs, attend), expected)
