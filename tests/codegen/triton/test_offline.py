"""Compiling for GPUs that are not there: what is read off good and bad kernels, and how a compiler may fail."""

from __future__ import annotations

import importlib
import importlib.util
import json
import linecache
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from splat.codegen.triton import offline, offline_model
from splat.codegen.triton.launch import Kernel, Launch, Output
from splat.codegen.triton.offline import Compiled, Failure, Job, Outcome, compile_all
from splat.codegen.triton.offline_model import Loop, cycles_per_tile, loop_instructions
from splat.errors import ArgumentError

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

HERE = "tests.codegen.triton.test_offline"

# Attention without its softmax: the products and exponentials of one.
ATTEND = """
def attend(q, k, v, rows, length, out, SCORE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
           HEAD_DIM: tl.constexpr, DESCRIPTORS: tl.constexpr):
    lane = tl.arange(0, HEAD_DIM)
    at = (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q))[:, None] * HEAD_DIM + lane[None, :]
    queries = tl.load(q + at)
    acc = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    if DESCRIPTORS:
        keys = tl.make_tensor_descriptor(k, [length, HEAD_DIM], [HEAD_DIM, 1], [BLOCK_KV, HEAD_DIM])
        values = tl.make_tensor_descriptor(v, [length, HEAD_DIM], [HEAD_DIM, 1], [BLOCK_KV, HEAD_DIM])
    for x in tl.range(0, length, BLOCK_KV):
        if DESCRIPTORS:
            key = keys.load([x, 0])
            value = values.load([x, 0])
        else:
            tile = (x + tl.arange(0, BLOCK_KV))[:, None] * HEAD_DIM + lane[None, :]
            key = tl.load(k + tile)
            value = tl.load(v + tile)
        p = tl.exp2(SCORE[0](tl.dot(queries, key.T)))
        acc = tl.dot(p.to(value.dtype), value, acc)
    tl.store(out + at, acc.to(out.dtype.element_ty))
"""

# No product at all.
COPY = """
def copy(x, out, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.exp2(tl.load(x + at)))
"""

REFUSE = """
def refuse(x, out, SIZE: tl.constexpr):
    tl.static_assert(SIZE > 4096, "the tile is too small")
"""


# -- factories, which the compiling processes call ---------------------------------------------------------------------


def function(name: str, text: str) -> Any:
    """A `triton.jit` function made from text, as generated kernels are."""
    triton: Any = importlib.import_module("triton")
    file = f"<{name} {hash(text)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    namespace: dict[str, Any] = dict(tl=importlib.import_module("triton.language"), __name__=HERE)
    exec(compile(text, file, "exec"), namespace)
    return triton.jit(namespace[name])


def array(*shape: int, dtype: str = "bfloat16") -> Any:
    return SimpleNamespace(dtype=dtype, shape=shape)


def attend(
    block_q: int = 128, block_kv: int = 64, head_dim: int = 64, num_warps: int = 8, num_stages: int = 2,
    descriptors: bool = False, score: str = "s * 0.125", **ignored: Any,
) -> Launch:  # fmt: skip
    kernel = Kernel("attend", ATTEND, function("attend", ATTEND))
    scores = (function("score", f"def score(s):\n    return {score}\n"),)
    constants = dict(SCORE=scores, BLOCK_Q=block_q, BLOCK_KV=block_kv, HEAD_DIM=head_dim, DESCRIPTORS=descriptors)
    arrays = (array(4096, head_dim),) * 3
    out = (Output((4096, head_dim), "bfloat16"),)
    return Launch(kernel, 4096 // block_q, arrays, (1, 4096), out, constants, num_warps, num_stages)


def elementwise(text: str = COPY) -> Launch:
    name = "copy" if text == COPY else "refuse"
    shape = (1 << 20,)
    x, out = array(*shape, dtype="float32"), Output(shape, "float32")
    return Launch(Kernel(name, text, function(name, text)), 1024, (x,), (), (out,), dict(SIZE=1024), 4, 1)


def die() -> Launch:
    print("LLVM ERROR: ran out of patience", file=sys.stderr, flush=True)
    os.abort()


def dawdle() -> Launch:
    time.sleep(60)
    raise AssertionError("nobody waited")


def tell() -> Launch:
    raise RuntimeError(json.dumps([os.getppid(), os.environ.get("SPLAT_TEST_SAID"), os.getcwd()]))


def told() -> list[Any]:
    """(the process that forked for a job, a variable, the working folder), as a job of now sees them."""
    [failure] = compile_all([Job(f"{HERE}:tell", {}, "sm_90")])
    assert isinstance(failure, Failure)
    return json.loads(failure.message.removeprefix("RuntimeError: "))


# -- what is read off a kernel -----------------------------------------------------------------------------------------


@pytest.fixture
def interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the rest of the tests runs kernels in Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def one(arch: str, factory: str, **arguments: Any) -> Compiled:
    [result] = compile_all([Job(f"{HERE}:{factory}", arguments, arch, name=factory)])
    assert isinstance(result, Compiled), result
    assert (result.arch, result.seconds > 0) == (arch, True)
    return result


@needs_triton
@pytest.mark.usefixtures("interpreting")
@pytest.mark.parametrize(
    ("arch", "arguments", "tensor_core", "copies"),
    [
        ("sm_80", dict(block_q=64, num_warps=4), "mma.sync", "cp.async"),
        ("sm_90", {}, "wgmma", "cp.async"),
        ("sm_90", dict(descriptors=True), "wgmma", "tma"),
        ("sm_100", dict(descriptors=True), "tcgen05.mma", "tma"),
        ("gfx942", dict(num_warps=4, num_stages=1), "mfma", None),
        ("gfx942", dict(num_warps=4, num_stages=1, descriptors=True), "mfma", None),
    ],
)
def test_healthy_kernel(arch: str, arguments: dict[str, Any], tensor_core: str, copies: str | None) -> None:
    kernel = one(arch, "attend", **arguments)
    assert kernel.problems() == []
    assert list(kernel.tensor_core) == [tensor_core]
    assert list(kernel.copies) == ([copies] if copies else [])
    assert 32 <= kernel.registers <= 512
    assert 0 < kernel.shared_bytes < 128 << 10
    assert kernel.num_warps == arguments.get("num_warps", 8)
    loops = loop_instructions(kernel)
    assert loops is not None
    assert len(loops) == 1
    [loop] = loops
    assert loop.instructions == sum(loop.mix.values())
    threads = kernel.num_warps * offline_model.ARCHITECTURES[arch].warp_size
    assert loop.mix["special"] == arguments.get("block_q", 128) * 64 / threads
    assert loop.mix.get("other", 0) < 0.05 * loop.instructions
    assert "spill" not in loop.mix


@needs_triton
@pytest.mark.parametrize(
    ("arch", "arguments", "limit"),
    [
        ("sm_90", dict(head_dim=256, num_stages=4), "232,448"),
        ("gfx942", dict(block_q=32, block_kv=128, head_dim=256, num_warps=4), "65,536"),
    ],
)
def test_too_much_shared_memory(arch: str, arguments: dict[str, Any], limit: str) -> None:
    kernel = one(arch, "attend", **arguments)
    [problem] = [problem for problem in kernel.problems() if "shared memory" in problem]
    assert problem == (
        f"attend needs {kernel.shared_bytes:,} bytes of shared memory; {arch} has {limit}. "
        "Use smaller tiles or fewer stages."
    )


@needs_triton
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_no_tensor_core(arch: str) -> None:
    kernel = one(arch, "elementwise")
    assert kernel.problems() == [f"copy for {arch} has no tensor-core instruction."]
    assert kernel.problems(needs_tensor_core=False) == []


@needs_triton
def test_too_few_registers() -> None:
    kernel = one("sm_90", "attend", block_kv=128, head_dim=128, num_warps=4)
    assert "register" in kernel.serialized
    assert kernel.spilled_bytes > 0
    serialized, spills = kernel.problems()
    assert serialized == f"attend for sm_90: ptxas serialized its wgmma, due to {kernel.serialized} (C7515)."
    assert spills == (
        f"attend for sm_90 spills {kernel.spilled_bytes} bytes a thread; 0 are allowed. "
        "Use smaller tiles, more warps or fewer stages."
    )
    assert kernel.problems(kernel.spilled_bytes) == [serialized]


@needs_triton
def test_options_reach_the_compiler() -> None:
    [kernel] = compile_all([Job(f"{HERE}:attend", {}, "sm_90", options={"maxnreg": 64})])
    assert isinstance(kernel, Compiled)
    assert kernel.registers <= 64


@needs_triton
def test_functions_of_one_name_are_told_apart() -> None:
    texts = [one("sm_90", "attend", score=score).assembly for score in ("s * 0.25", "s * 3.0")]
    assert [["0f3E800000" in text, "0f40400000" in text] for text in texts] == [[True, False], [False, True]]


# -- how a job may fail ------------------------------------------------------------------------------------------------


@needs_triton
def test_failures_are_results() -> None:
    wanted = [
        Job(f"{HERE}:elementwise", {"text": REFUSE}, "sm_90", name="refuses"),
        Job(f"{HERE}:die", {}, "gfx942", name="dies"),
        Job(f"{HERE}:nothing", {}, "sm_90", name="is not there"),
        Job(f"{HERE}:attend", {"block_q": "many"}, "sm_90", name="has bad arguments"),
        Job(f"{HERE}:elementwise", {}, "sm_70", name="is for an unknown GPU"),
        Job(f"{HERE}:elementwise", {}, "gfx942", name="is fine"),
    ]
    seen: list[str] = []
    *failures, fine = compile_all(wanted, workers=2, progress=lambda job, result: seen.append(job.name))
    assert isinstance(fine, Compiled)
    assert sorted(seen) == sorted(job.name for job in wanted)
    found = []
    for job, failure in zip(wanted, failures, strict=False):
        assert isinstance(failure, Failure)
        assert (failure.name, failure.arch) == (job.name, job.arch)
        found.append((failure.outcome, failure.message))
        assert failure.problems() == [
            f"{job.name} for {job.arch} did not compile: {failure.outcome.value}. {failure.message}"
        ]
    assert [outcome for outcome, _ in found] == [Outcome.ERROR, Outcome.CRASH, *[Outcome.ERROR] * 3]
    messages = [message for _, message in found]
    assert "the tile is too small" in messages[0]
    assert messages[1] == "ended by SIGABRT; LLVM ERROR: ran out of patience"
    assert messages[2].startswith("AttributeError")
    assert messages[3].startswith("TypeError")
    assert messages[4] == ("ArgumentError: arch: 'sm_70' is unknown; expected one of sm_80, sm_90, sm_100, gfx942")


def test_too_slow() -> None:
    start = time.perf_counter()
    [failure] = compile_all([Job(f"{HERE}:dawdle", {}, "sm_90")], timeout_s=1.5)
    assert isinstance(failure, Failure)
    assert (failure.outcome, failure.message) == (Outcome.TIMEOUT, "No kernel after 1.5 s.")
    assert time.perf_counter() - start < 30


def test_one_process_forks_for_all_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as if it had been started for it; another takes its place when it is gone."""
    server, *_ = told()
    monkeypatch.setenv("SPLAT_TEST_SAID", "this")
    monkeypatch.chdir(tmp_path)
    assert told() == [server, "this", str(tmp_path)]
    monkeypatch.delenv("SPLAT_TEST_SAID")
    os.kill(server, signal.SIGKILL)
    offline._idle[-1]._process.wait()
    other, *rest = told()
    assert other != server
    assert rest == [None, str(tmp_path)]


def test_an_interrupted_job_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    server, *_ = told()

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr(offline.selectors.DefaultSelector, "select", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compile_all([Job(f"{HERE}:dawdle", {}, "sm_90")])
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
    assert told()[0] != server


def test_a_forked_process_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    (server, *_), own = told(), os.getpid()
    monkeypatch.setattr(offline.os, "getpid", lambda: own + 1)  # as if this were one
    other, *_ = told()
    assert other != server
    offline._end_forges()
    monkeypatch.undo()
    os.killpg(server, signal.SIGKILL)  # its owner's was left alone
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)


def test_messages_are_short() -> None:
    log = "\n".join(["#loc = loc(unknown)"] * 1000 + ["k.py:3:5: error: 'tt.dot' op expected", "x" * 1000])
    assert offline._complaints(log) == "k.py:3:5: error: 'tt.dot' op expected"
    assert offline._complaints("a\n\nb\n") == "a\nb"


def test_interpreted_kernels_are_refused() -> None:
    launch = Launch(Kernel("k", "", SimpleNamespace()), 1, (), (), (), {}, 4, 2)
    with pytest.raises(ArgumentError, match="k was made for Triton's interpreter and cannot be compiled; unset"):
        offline.compile_launch(launch, "sm_90")


# -- the signature -----------------------------------------------------------------------------------------------------


def parameters(*names: str, **facts: Any) -> Any:
    plain = dict(do_not_specialize=False, do_not_specialize_on_alignment=False, annotation_type="")
    return SimpleNamespace(
        params=[SimpleNamespace(**{**plain, **facts}, name=n, is_constexpr=n.isupper()) for n in names]
    )


def described(function: Any, values: list[Any], **constants: Any) -> tuple[Any, Any, Any]:
    arrays = tuple(value for value in values if hasattr(value, "dtype"))
    scalars = tuple(value for value in values if not hasattr(value, "dtype"))
    return offline.signature(Launch(Kernel("k", "", function), 1, arrays, scalars, (), constants, 4, 2), "sm_90")


ALIGNED = ["tt.divisibility", 16]


def test_signature_is_what_triton_specialises_on() -> None:
    values = [array(8), array(8, dtype="int32"), 1, 16, -3, 0, 1 << 31, True, 0.5]
    types, constants, facts = described(parameters(*"abcdefghi", "N"), values, N=7)
    assert list(types.values()) == ["*bf16", "*i32", "constexpr", "i32", "i32", "i32", "i64", "u1", "fp32", "constexpr"]
    assert constants == {(2,): 1, (9,): 7}
    assert facts == {(n,): [ALIGNED] for n in (0, 1, 3, 5, 6)}


def test_small_arrays_on_amd() -> None:
    launch = Launch(Kernel("k", "", parameters("a", "b")), 1, (array(1 << 29), array(1 << 30)), (), (), {}, 4, 2)
    assert offline.signature(launch, "gfx942")[2] == {(0,): [ALIGNED, ["tt.pointer_range", 32]], (1,): [ALIGNED]}
    assert offline.signature(launch, "gfx942", jax=True)[2] == {(0,): [ALIGNED], (1,): [ALIGNED]}


def test_jax_forgets_divisibility() -> None:
    launch = Launch(Kernel("k", "", parameters("a", "b", "c")), 1, (array(8),), (16, 1), (), {}, 4, 2)
    types, constants, facts = offline.signature(launch, "sm_90", jax=True)
    assert (types, constants, facts) == ({"a": "*bf16", "b": "i32", "c": "constexpr"}, {(2,): 1}, {(0,): [ALIGNED]})


def test_annotated_integers_stay() -> None:
    types, constants, facts = described(parameters("a", "b", annotation_type="i64"), [1, 32])
    assert (types, constants, facts) == ({"a": "i64", "b": "i64"}, {}, {(1,): [ALIGNED]})


@pytest.mark.parametrize(
    ("values", "constants", "message"),
    [
        ([array(1)], {}, "launch of k: 1 arrays, scalars and outputs for 2 run-time parameters (a, b)"),
        ([1, 2], dict(M=1), "launch of k: constants ['M'] for the compile-time parameters ['N']"),
        ([array(1, dtype="complex64"), 1], dict(N=1), "a: Triton has no type for dtype complex64; it has bfloat16,"),
    ],
)
def test_launches_that_do_not_fit(values: list[Any], constants: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        described(parameters("a", "b", "N"), values, **constants)


# -- loops and their model ---------------------------------------------------------------------------------------------


def test_loops_of_a_program() -> None:
    codes = """
        S2R R0, SR_TID ; .L_x_0: HGMMA.64x64x16.F32.BF16 R1, gdesc[UR4] ; .L_x_1: @!P0 BRA `(.L_x_4) ; .L_x_2:
        MUFU.EX2 R2, R2 ; FADD R1, R2, R3 ; @P0 BRA `(.L_x_0) ; .L_x_3: IADD3 R1, R1, 1 ; BRA.U UP0, `(.L_x_3) ; EXIT ;
        .L_x_4: SYNCS.PHASECHK P0 ; @!P0 BRA `(.L_x_4) ; BRA `(.L_x_2) ;
    """
    lines = re.sub(r"(\.L_x_\d:)", r"\n\1\n", codes.replace(";", ";\n")).splitlines()
    text = "\n".join(line if ":" in line else f"/*0000*/ {line.strip()}" for line in lines if line.strip())
    # The wait behind the program jumps back into the loop: it belongs to it, less what spins.
    loop = Loop(6, {"tensor": 1, "special": 1, "float": 1, "control": 3})
    assert offline_model._loops(text, offline_model._SASS) == [loop]


@pytest.mark.parametrize(
    ("instructions", "head_dim", "cycles"), [(453, 64, 2080), (743, 64, 2510), (482, 128, 3104), (773, 128, 3594)]
)
def test_cycles_of_a_hopper_tile(instructions: int, head_dim: int, cycles: int) -> None:
    loop = Loop(instructions, {"special": 66, "tensor": 12, "float": instructions - 78})
    flops = 4 * 128 * 128 * head_dim
    assert cycles_per_tile(loop, arch="sm_90", flops=flops, num_warps=8) == pytest.approx(cycles, rel=1e-3)


def test_products_without_tensor_cores_are_among_the_instructions() -> None:
    loop = Loop(4000, {"float": 3990, "special": 10})
    assert cycles_per_tile(loop, arch="sm_90", flops=1e9, num_warps=4, dtype="float32") == 4000


# -- the command -------------------------------------------------------------------------------------------------------


@needs_triton
def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    from benchmarks import sweep

    out = tmp_path / "sweep.json"
    asked = ["--sizes", "128x64,128x63", "--warps", "8", "--stages", "2", "--head-dim", "64", "--descriptors"]
    assert sweep.main(["--arch", "sm_90", *asked, "--factory", f"{HERE}:attend", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"128x64 .* descriptors .* wgmma .* tma .* pass", text)
    assert re.search(r"128x63 .* FAIL error", text)
    assert "1 of 2 are healthy" in text
    good, bad = json.loads(out.read_text())["samples"]
    assert good["problems"] == []
    assert good["cycles_per_score"] == pytest.approx(good["masked_cycles_per_score"])  # one loop
    assert 0.1 < good["cycles_per_score"] < 0.3
    assert "power of 2" in bad["message"]
