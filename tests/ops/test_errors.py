"""Refusals: what was given, what is accepted and what to do, said before anything is planned or compiled."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import splat
from splat.codegen import Request, choose, refusals, registry
from splat.codegen.cpp import compiler
from splat.codegen.triton import bind_jax
from splat.errors import ArgumentError, IrregularPatternError, PatternError, SplatError, UnsupportedError
from splat.planning import plan


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """What is compiled meanwhile."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if "backend_compile" in event:
            seen.append(f"{event}: {duration_secs:.3f} s")

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def x(*shape: int, dtype: str = "float32") -> Any:
    return jax.device_put(np.zeros(shape, jnp.dtype(dtype)))  # a transfer: nothing to compile


def call(**changes: Any) -> dict[str, Any]:
    good = dict(query=x(2, 8, 4, 16), key=x(2, 6, 2, 16), value=x(2, 6, 2, 16), pattern=splat.causal())
    return good | changes


REFUSED: list[Any] = [
    # arrays
    (call(query=x(8, 4, 16)), ArgumentError, "query must have shape [B, T, N, H], but shape [8, 4, 16] was given."),
    (call(query=x(8, 4, 16)), ArgumentError, "PyTorch's [B, N, T, H] needs swapaxes(1, 2); a missing batch axis needs"),
    (call(key=x(1, 2, 6, 2, 16)), ArgumentError, "key must have shape [B, S, K, H], but shape [1, 2, 6, 2, 16] was"),
    (call(value=x(6, 16)), ArgumentError, "value must have shape [B, S, K, H], but shape [6, 16] was given"),
    (
        call(value=x(2, 7, 2, 16)),
        ArgumentError,
        "key and value must have one shape, but [2, 6, 2, 16] and [2, 7, 2, 16]",
    ),
    (
        call(value=x(2, 6, 2, 8)),
        ArgumentError,
        "key and value must have one shape, but [2, 6, 2, 16] and [2, 6, 2, 8] were given. Where only head dims "
        "differ, fill the smaller with zeros (jnp.pad; query as key), give scale=16**-0.5 and cut the output.",
    ),
    (
        call(query=x(3, 8, 4, 16)),
        ArgumentError,
        "query [3, 8, 4, 16] and key [2, 6, 2, 16] must agree in batch (axis 0) and head dim (axis 3). Keys that serve "
        "every batch entry need jnp.broadcast_to.",
    ),
    (call(query=x(2, 8, 4, 8)), ArgumentError, "must agree in batch (axis 0) and head dim (axis 3)"),
    (
        call(query=x(2, 8, 3, 16)),
        ArgumentError,
        "the number of query heads must be a multiple of the key/value heads, but 3 and 2 were given",
    ),
    (
        call(key=x(2, 6, 8, 16), value=x(2, 6, 8, 16)),
        ArgumentError,
        "must be a multiple of the key/value heads, but 4 and 8",
    ),
    (
        call(key=x(2, 0, 2, 16), value=x(2, 0, 2, 16)),
        ArgumentError,
        "key and value must have at least one position, but kv",
    ),
    (call(query=x(2, 8, 0, 16)), ArgumentError, "heads and head dim must not be 0"),
    (
        call(query=x(2, 8, 4, 0), key=x(2, 6, 2, 0), value=x(2, 6, 2, 0)),
        ArgumentError,
        "heads and head dim must not be 0",
    ),
    (
        call(key=x(2, 6, 2, 16, dtype="bfloat16")),
        ArgumentError,
        "query, key and value must have one dtype, but float32, bfloat16 and float32 were given. Convert them, for "
        "example with key.astype(query.dtype).",
    ),
    (
        call(query=x(2, 8, 4, 16, dtype="float8_e4m3fn")),
        UnsupportedError,
        "query must be one of float32, bfloat16, float16, float64, but float8_e4m3fn was given. Convert it first, for",
    ),
    (call(value=x(2, 6, 2, 16, dtype="int32")), UnsupportedError, "value must be one of float32, bfloat16, float16"),
    (call(query=x(2, 8, 4, 16, dtype="complex64")), UnsupportedError, "but complex64 was given"),
    (call(query=None), ArgumentError, "query must be an array of numbers, but NoneType was given"),
    (call(key="abc"), ArgumentError, "key must be an array of numbers, but str was given"),
    (call(value=[[1.0], [2.0, 3.0]]), ArgumentError, "value must be an array of numbers, but list was given"),
    (call(query=jax.ShapeDtypeStruct((2, 8, 4, 16), "float32")), ArgumentError, "but ShapeDtypeStruct was given"),
    # patterns
    (
        call(pattern=None),
        ArgumentError,
        "pattern must be a splat pattern such as splat.causal() & splat.window(512), but",
    ),
    (
        call(pattern="causal()"),
        ArgumentError,
        "but str was given. Use splat.from_mask for a boolean mask, splat.parse for",
    ),
    (call(pattern=np.ones((8, 6), bool)), ArgumentError, "but ndarray was given. Use splat.from_mask"),
    (call(pattern=splat.causal), ArgumentError, "but function was given"),
    (
        call(pattern=splat.per_head([splat.causal()] * 3)),
        ArgumentError,
        "pattern: per_head names 3 heads, but query has 4. Give one for each.",
    ),
    (
        call(pattern=splat.from_mask(np.ones((8, 7), bool))),
        PatternError,
        "this pattern was made from data for 7 key positions, but is used with 6. Build it again for these lengths",
    ),
    (
        call(pattern=splat.from_mask(np.ones((9, 6), bool)) & splat.causal()),
        PatternError,
        "this pattern was made from data for 9 query positions, but is used with 8. Build it again",
    ),
    (
        call(pattern=splat.segments([0] * 7)),
        PatternError,
        "segments: ids name 7 positions, but the pattern is used up to position 8. Give one id per position",
    ),
    (
        call(pattern=splat.segments([0] * 8), query_offset=1),
        PatternError,
        "segments: ids name 8 positions, but the pattern is used up to position 9",
    ),
    (
        call(pattern=splat.neighborhood((2, 3), 1)),
        PatternError,
        "neighborhood: a grid of shape (2, 3) has 6 positions, but the pattern is used up to position 8",
    ),
    # options
    (call(scale="1"), ArgumentError, "scale must be a number or None, but str was given"),
    (call(scale=True), ArgumentError, "scale must be a number or None, but bool was given"),
    (call(scale=10**400), ArgumentError, "scale must be a number or None, but int was given"),
    (call(scale=float("inf")), ArgumentError, "scale must be in [-1e+37, 1e+37] or None, but inf was given"),
    (call(scale="much"), ArgumentError, "scale must be a number or None, but str was given"),
    (call(scale=np.ones(2)), ArgumentError, "scale must be a number or None, but ndarray was given"),
    (call(scale=1e300), ArgumentError, "scale must be in [-1e+37, 1e+37] or None, but 1e+300 was given"),
    (call(logits_soft_cap=1e300), ArgumentError, "logits_soft_cap must be in [1e-37, 1e+37] or None"),
    (
        call(logits_soft_cap=-1.0),
        ArgumentError,
        "logits_soft_cap must be in [1e-37, 1e+37] or None, but -1.0 was given",
    ),
    (
        call(logits_soft_cap=0),
        ArgumentError,
        "logits_soft_cap must be in [1e-37, 1e+37] or None, but 0.0 was given",
    ),
    (
        call(logits_soft_cap=float("nan")),
        ArgumentError,
        "logits_soft_cap must be in [1e-37, 1e+37] or None, but nan was given",
    ),
    (
        call(bias=x(3, 6)),
        ArgumentError,
        "bias must be floating-point numbers, broadcastable to [B, N, T, S] = [2, 4, 8, 6]",
    ),
    (call(bias=x(1, 1, 1, 1, 1)), ArgumentError, "[B, N, T, S] = [2, 4, 8, 6], but float32[1, 1, 1, 1, 1] was given"),
    (call(bias=x(8, 6, dtype="int32")), ArgumentError, "but int32[8, 6] was given."),
    (call(bias=x(8, 6) > 0), ArgumentError, "but bool[8, 6] was given. A bool mask is a pattern: from_mask(mask)."),
    (call(bias=[[1.0], [2.0, 3.0]]), ArgumentError, "bias must be an array of numbers, but list was given"),
    (
        call(score_mod=1.0),
        ArgumentError,
        "score_mod must be a function (score, batch, head, q_idx, kv_idx) -> score, but",
    ),
    (
        call(score_mod=lambda s, i, j: s),
        ArgumentError,
        "q_idx, kv_idx) -> score, but a function of (s, i, j) was given",
    ),
    (call(score_mod=lambda *_: None), ArgumentError, "must return one floating-point number for one score, but it"),
    (call(score_mod=lambda s, *_: s > 0), ArgumentError, "for one score, but it returned bool[]"),
    (call(score_mod=lambda s, *_: s * x(3)), ArgumentError, "for one score, but it returned float32[3]"),
    (
        call(score_mod=lambda s, *_: jax.debug.print("{}", s) or s),
        ArgumentError,
        "score_mod must compute a score and do nothing else, but it has side effects (such as jax.debug.print)",
    ),
    (call(sinks=x(3)), ArgumentError, "sinks must be floating-point numbers of shape [4], one for each query head"),
    (call(sinks=x(4, dtype="int32")), ArgumentError, "one for each query head, but int32[4] was given"),
    (call(sinks=splat.sink(4)), ArgumentError, "sinks must be an array of numbers, but Sink was given"),
    (call(query_offset=-1), ArgumentError, "query_offset must be in [0, 2**30 - 8] for 8 queries, but -1 was given"),
    (
        call(query_offset=np.array(-5)),
        ArgumentError,
        "query_offset must be in [0, 2**30 - 8] for 8 queries, but -5 was",
    ),
    (call(query_offset=np.array(2**40)), ArgumentError, "query_offset must be in [0, 2**30 - 8] for 8 queries"),
    (
        call(query_offset=None),
        ArgumentError,
        "query_offset must be an int or integers, but NoneType was given",
    ),
    (call(query_offset="a"), ArgumentError, "query_offset must be an int or integers, but str was given"),
    (call(kv_lengths=[[3], [4, 5]]), ArgumentError, "kv_lengths must be an array of numbers, but list was given"),
    (call(return_lse="no"), ArgumentError, "return_lse must be True or False, but str was given"),
    (call(implementation=["cpp"]), ArgumentError, "implementation must be None or one of 'triton', 'cpp', 'xla'"),
    (call(query_offset=x()), ArgumentError, "integers of shape [] or [2] (one for each sequence), but float32[] was"),
    (call(query_offset=x(3, dtype="int32")), ArgumentError, "integers of shape [] or [2] (one for each sequence), but"),
    (
        call(kv_lengths=x(3, dtype="int32")),
        ArgumentError,
        "kv_lengths must be integers of shape [2] or [] (2 is the batch size), but int32[3] was given. Give one length "
        "per sequence, or one for all.",
    ),
    (call(kv_lengths=x(2)), ArgumentError, "kv_lengths must be integers of shape [2] or [] (2 is the batch size), but"),
    (call(kv_lengths=-1), ArgumentError, "kv_lengths must not be negative, but -1 was given. 0 is no position at all;"),
    (call(kv_lengths=[3, -2]), ArgumentError, "kv_lengths must not be negative, but -2 was given"),
    (call(kv_lengths=np.array([-128, 3], np.int8)), ArgumentError, "kv_lengths must not be negative, but -128 was"),
    # implementations
    (
        call(implementation="cuda"),
        ArgumentError,
        "implementation must be None or one of 'triton', 'cpp', 'xla', but 'cuda' was given. None picks the best",
    ),
]
REFUSED = [one for one in REFUSED if one[1] is not None]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED, ids=[message[:48] for *_, message in REFUSED])
def test_refused(arguments: dict[str, Any], error: type[SplatError], message: str, compiled: list[str]) -> None:
    with pytest.raises(error) as caught:
        splat.attention(**arguments)
    assert message in str(caught.value)
    assert compiled == []


def test_the_listener_would_see_a_compilation(compiled: list[str]) -> None:
    jax.jit(lambda x: x * 3 + 1)(x(7, 3))
    assert compiled


def test_refused_by_the_drop_in() -> None:
    q, k = x(2, 8, 4, 16), x(2, 8, 2, 16)
    attend: Any = splat.dot_product_attention
    for arguments, options, message in (
        ((x(8, 4, 16), k, k), {}, "query must have shape [B, T, N, H], but shape [8, 4, 16] was given"),
        ((q, k, k, splat.causal()), {}, "bias was given a pattern. Pass it by name: pattern=..."),
        ((q, k, k, None, splat.causal()), {}, "mask was given a pattern"),
        ((q, k, k), dict(mask=[[True] * 8, [True]]), "mask must be an array of numbers, but list was given"),
        ((q, k, k), dict(is_causal="False"), "is_causal must be True or False, but str was given"),
        ((q, k, k), dict(return_residual=1), "return_residual must be True or False, but int was given"),
        (
            (q, k, k),
            dict(local_window_size=-1),
            "local_window_size must be an int or (left, right), as sides of a window",
        ),
        ((q, k, k), dict(local_window_size=(None, 2)), "local_window_size must be an int or (left, right), as sides"),
    ):
        with pytest.raises(ArgumentError) as caught:
            attend(*arguments, **options)
        assert message in str(caught.value)
    with pytest.raises(ArgumentError, match="is_causal must be True or False, but .*Tracer was given"):
        jax.jit(lambda flag: attend(q, k, k, is_causal=flag))(True)


def test_only_the_batch_may_be_symbolic() -> None:
    (t,) = jax.export.symbolic_shape("t")
    for q, k in (((2, t, 4, 16), (2, 6, 2, 16)), ((2, 8, 4, 16), (2, t, 2, 16)), ((2, 8, 4, t), (2, 6, 2, t))):
        arrays = [jax.ShapeDtypeStruct(shape, "float32") for shape in (q, k, k)]
        with pytest.raises(UnsupportedError, match="Only the batch may be symbolic"):
            jax.export.export(jax.jit(lambda q, k, v: splat.attention(q, k, v, splat.causal())))(*arrays)


@pytest.mark.parametrize("implementation", ["xla", "cpp"])
def test_offsets_saturate(implementation: str) -> None:
    """One past all positions is none that comes around."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((1, 8, 2, 16), *[(1, 40, 2, 16)] * 2))
    run = partial(splat.attention, q, k, v, implementation=implementation)
    for offset in (jnp.uint32(2**31 + 3), jnp.int32(2**31 - 1), jnp.int32(2**30)):
        np.testing.assert_array_equal(run(splat.causal(), query_offset=offset), run(splat.full()))
        assert not np.asarray(run(splat.window(5), query_offset=offset)).any()
    for offset in (jnp.int32(-(2**31)), jnp.int8(-128)):
        assert not np.asarray(run(splat.causal(), query_offset=offset)).any()
    np.testing.assert_array_equal(
        run(splat.causal(), query_offset=np.array(3)), run(splat.causal(), query_offset=np.int64(3))
    )


def test_traced_options_that_are_compiled_in() -> None:
    def run(**options: Any) -> Any:
        return splat.attention(**call(**options))

    with pytest.raises(ArgumentError) as caught:
        jax.jit(lambda scale: run(scale=scale))(0.5)
    assert str(caught.value) == (
        "scale must be a Python number, because it is compiled in, but a traced array was given. Multiply query by a "
        "run-time scale instead."
    )
    with pytest.raises(ArgumentError, match="logits_soft_cap must be a Python number, because it is compiled in"):
        jax.jit(lambda cap: run(logits_soft_cap=cap))(0.5)


def test_numbers_in_all_forms_are_taken() -> None:
    expected = splat.attention(**call(scale=2.0))
    for scale in (2, np.float32(2), np.array(2), jnp.float32(2)):
        np.testing.assert_array_equal(splat.attention(**call(scale=scale)), expected)
    expected = splat.attention(**call(query_offset=3))
    for offset in (np.int64(3), np.uint8(3), jnp.int32(3), np.array(3)):
        np.testing.assert_allclose(splat.attention(**call(query_offset=offset)), expected, atol=1e-6)


def test_unknown_arguments() -> None:
    for name in ("mask", "dropout"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            splat.attention(**call(**{name: None}))


def test_errors_have_one_base_and_the_usual_one() -> None:
    """`except ValueError` and `except NotImplementedError` work as for other libraries."""
    assert issubclass(ArgumentError, (SplatError, ValueError))
    assert issubclass(PatternError, ArgumentError)
    assert issubclass(IrregularPatternError, PatternError)
    assert issubclass(UnsupportedError, NotImplementedError)


# -- choosing an implementation ----------------------------------------------------------------------------------------


def test_an_implementation_says_why_not() -> None:
    reasons = refusals(Request("cpu", "float32", 64))
    assert set(reasons) == {"triton", "cpp", "xla"}
    assert reasons["xla"] is None
    assert reasons["cpp"] == compiler.missing()
    assert reasons["triton"] is not None
    assert "needs a GPU, and this is for a cpu. Use implementation='xla', or None" in reasons["triton"]
    assert choose(Request("cpu", "float32", 64), "xla").name == "xla"
    elsewhere = refusals(Request("gpu", "float32", 64, elsewhere=True))
    assert elsewhere["cpp"] is not None
    assert "is for CPUs, and this is for a gpu. Use implementation='xla', or None for the" in elsewhere["cpp"]


def test_none_is_the_fastest_that_can_serve() -> None:
    assert choose(Request("cpu", "float32", 64, elsewhere=True)).name == "cpp"
    assert choose(Request("gpu", "float32", 64, elsewhere=True)).name == "triton"
    assert choose(Request("tpu", "float32", 64, elsewhere=True)).name == "xla"
    assert choose(Request("gpu", "float64", 64, elsewhere=True)).name == "xla"
    assert choose(Request("cpu", "float32", 64, elsewhere=True, blocks=(32, None))).name == "xla"
    assert choose(Request("cpu", "float32", 64, elsewhere=True, blocks=(16, 1))).name == "cpp"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """None goes on without it, and says so once; an explicit choice does not."""
    reason = "no C++ compiler (c++, g++ or clang++) is on the PATH. Install one."
    monkeypatch.setattr(compiler, "missing", lambda: reason)
    monkeypatch.setattr(registry, "_said", set())
    with pytest.warns(UserWarning, match="'cpp' would be faster") as seen:
        found = [splat.attention(**call()) for _ in range(3)]
    assert [str(one.message) for one in seen] == [
        f"implementation='xla' serves; 'cpp' would be faster: {reason} To go on without it, say implementation='xla'."
    ]
    assert seen[0].filename == __file__, "the warning names the caller's line"
    np.testing.assert_array_equal(found[0], splat.attention(**call(implementation="xla")))
    with pytest.raises(UnsupportedError) as caught:
        splat.attention(**call(implementation="cpp"))
    assert str(caught.value) == f"implementation='cpp' cannot serve this call: {reason}"
    assert splat.plan("causal()", 64).implementation == "cpp", "planning needs no compiler"


def test_without_the_packages_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where it matters most: said once too."""
    reason = "jax-triton is not installed: `pip install splat-attention[jax-cuda]`."
    monkeypatch.setattr(bind_jax, "missing", lambda: reason)
    monkeypatch.setattr(registry, "_said", set())
    with pytest.warns(UserWarning, match=f"'xla' serves; 'triton' would be faster: {re.escape(reason)}") as seen:
        assert [choose(Request("gpu", "float32", 64)).name for _ in range(2)] == ["xla", "xla"]
    assert len(seen) == 1


@pytest.mark.parametrize("attend", [splat.attention, splat.dot_product_attention])
def test_a_warning_names_the_users_line(attend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "missing", lambda: "nothing to compile with.")
    monkeypatch.setattr(registry, "_said", set())
    with pytest.warns(UserWarning, match="'cpp' would be faster") as seen:
        attend(**call())
    assert seen[0].filename == __file__


def test_none_can_serve() -> None:
    request = Request("cpu", "float8_e5m2", 64)
    with pytest.raises(UnsupportedError) as caught:
        choose(request)
    first, *reasons = str(caught.value).splitlines()
    assert first == "no implementation can serve this call:"
    assert [line.split(":")[0].strip() for line in reasons] == ["triton", "cpp", "xla"]
    assert "serves float32, bfloat16, float16, float64, not float8_e5m2. Convert the inputs." in reasons[2]
    with pytest.raises(
        UnsupportedError, match="implementation='xla' cannot serve this call: the xla implementation serves"
    ):
        choose(request, "xla")


# -- plan and emit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_q_heads=8, num_kv_heads=3), "num_q_heads must be a multiple of num_kv_heads, but 8 and 3 were given"),
        (
            dict(logits_soft_cap=0.0),
            "logits_soft_cap must be in [1e-37, 1e+37] or None, but 0.0 was given",
        ),
        (dict(scale=float("inf")), "scale must be in [-1e+37, 1e+37] or None, but inf was given"),
    ],
)
def test_what_emit_refuses(options: dict[str, Any], message: str) -> None:
    for target in ("xla", "cpp", "triton"):
        with pytest.raises(ArgumentError, match=re.escape(message)):
            splat.emit("causal()", 64, target=target, **options)


def test_one_plan_for_any_number_of_heads() -> None:
    """And of sequences: only what differs is planned."""
    pattern = splat.causal() & splat.window(7) | splat.sink(3)
    plan._remembered.clear()
    for batch, heads in ((1, 1), (2, 2), (3, 4)):
        for implementation in ("xla", "cpp"):
            y = x(batch, 20, heads, 16)
            splat.attention(y, y, y, pattern, implementation=implementation)
    assert len(plan._remembered) == 2


def test_emit_is_text_of_the_program() -> None:
    text = splat.emit("causal() & window(8)", 32, num_q_heads=4, num_kv_heads=2, head_dim=16, dtype="bfloat16")
    assert "stablehlo." in text
    assert "tensor<1x32x4x16xbf16>" in text
    assert "tensor<1x32x2x16xbf16>" in text
    assert text == splat.emit(
        splat.causal() & splat.window(8), 32, 32, num_q_heads=4, num_kv_heads=2, head_dim=16, dtype="bf16"
    )
    assert text != splat.emit("causal() & window(8)", 32, num_q_heads=4, num_kv_heads=2, head_dim=16, scale=1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(target="cuda"), ArgumentError, "target must be one of 'triton', 'cpp', 'xla', 'ptx', but 'cuda' was"),
        (dict(target="cpp", kernel="delta"), ArgumentError, "kernel must be one of forward, d_query, d_key_value,"),
        (dict(target="cpp", device="h100"), UnsupportedError, "the cpp implementation is for CPUs"),
        (dict(target="triton", device="cpu"), UnsupportedError, "needs a GPU, and this is for a cpu"),
        (dict(target="triton", kernel="bwd"), ArgumentError, "kernel must be one of forward, d_query, d_key_value,"),
        (dict(target="triton", kernel="merge"), ArgumentError, "this plan launches no kernel 'merge'"),
        (dict(target="triton", head_dim=512), UnsupportedError, "serves head dims up to 256, not 512"),
        (dict(target="ptx", arch="sm_75"), ArgumentError, "arch must be one of 'gfx942', 'sm_100', 'sm_80', 'sm_90',"),
        (dict(target="ptx", arch="sm_90", device="a100"), ArgumentError, "device and arch name the same thing"),
        (dict(target="cpp", arch="sm_90"), ArgumentError, "arch is for GPU kernels, but the target is 'cpp'"),
        (dict(target="xla", kernel="dq"), ArgumentError, "kernel must be 'forward' for target 'xla', or one of sddmm,"),
        (dict(target="triton", kernel="bwd"), ArgumentError, "sddmm, softmax, spmm, spmm_transposed, but 'bwd' was"),
        (dict(kernel="sddmm", scale=0.5, block_q=64), ArgumentError, "an operation on values, which has no scale, blo"),
        (dict(kernel="spmm", head_dim=0), ArgumentError, "head_dim must be in"),
        (dict(target="cpp", kernel="sddmm", device="h100"), UnsupportedError, "the cpp implementation is for CPUs"),
        (dict(target="triton", kernel="spmm", dtype="float64"), UnsupportedError, "serves float32, bfloat16, float16,"),
        (dict(kernel="spmm", query_offset=jnp.int32(3)), UnsupportedError, "whose matrix is static, but this pattern"),
        (dict(kernel="spmm", query_offset=-99), ArgumentError, "no pair, so that there is no kernel 'spmm'"),
    ],
)
def test_emit_refuses(arguments: dict[str, Any], error: type[SplatError], message: str) -> None:
    with pytest.raises(error) as caught:
        splat.emit("causal()", 32, **arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("kernel", ["sddmm", "softmax", "spmm", "spmm_transposed"])
def test_emit_of_operations_on_values(kernel: str) -> None:
    def text(target: str, **arguments: Any) -> str:
        return splat.emit("window(8)", 64, 80, target=target, kernel=kernel, num_q_heads=4, head_dim=16, **arguments)

    shlo = text("xla", batch=2)
    of_values, rows, columns = "tensor<8x64x17xf32>", "tensor<8x64x16xf32>", "tensor<8x80x16xf32>"
    signature = {
        "sddmm": (rows, columns, of_values), "softmax": (of_values, of_values), "spmm": (of_values, columns, rows),
        "spmm_transposed": (of_values, rows, columns),
    }  # fmt: skip
    main = next(line for line in shlo.splitlines() if "@main" in line)
    assert tuple(re.findall(r"tensor<[^>]*>", main)) == signature[kernel]

    cpp = text("cpp", dtype="bfloat16")
    assert f"SPLAT_VALUES_KERNEL({kernel}, Facts)" in cpp
    assert f"using Scalar = {'float' if kernel == 'softmax' else 'bfloat16'};" in cpp

    if importlib.util.find_spec("triton"):
        triton = text("triton", arch="sm_80", dtype="bf16", batch=2)
        assert triton.startswith(f"# splat {splat.__version__}: Triton kernels of {kernel}\n# ACSR 64 x 80")
        assert f"def splat_{kernel.removesuffix('_transposed')}(" in triton


def test_emit_compiles_operations_on_values() -> None:
    """Every launch of one: here of two components."""
    pytest.importorskip("triton", reason="triton is not installed: nothing to compile with")
    text = splat.emit(
        "causal() & (window(99) | strided(200))", 1024, 1000, target="ptx", kernel="spmm", dtype="bfloat16"
    )
    assert text.count("splat_spmm for sm_90: ") == 2
    assert "wgmma" in text.splitlines()[1]


@pytest.mark.parametrize(("arch", "instruction"), [("sm_90", "wgmma"), ("gfx942", "mfma")])
def test_emit_compiles_without_a_gpu(arch: str, instruction: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed: nothing to compile with")
    text = splat.emit("causal() & window(99)", 1024, target="ptx", arch=arch, head_dim=64, dtype="bfloat16")
    facts = text.splitlines()[1]
    assert f"splat_forward for {arch}: " in facts
    for word in ("registers", "0 bytes spilled", "bytes of shared memory", instruction):
        assert word in facts
    assert text.count(instruction) > 4, "and the assembly itself"
