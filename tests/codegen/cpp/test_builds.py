"""The kernels as other builds: watched by sanitizers, and for processors that this one can stand for.

And what is to be seen in calls without JAX only: that no memory beside the arrays is touched, that numbers do not
depend on threads, and that nothing of positions in no pair reaches a result. `driver.py` makes the calls.
"""

from __future__ import annotations

import dataclasses
import itertools
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splat.codegen.cpp import amx, compiler, generate
from tests.attention_suite import TOLERANCE, Inputs, truth
from tests.codegen.cpp.driver import Array, Case, Ended, Job, run, run_elsewhere

pytestmark = pytest.mark.skipif(
    compiler.missing() is not None, reason=f"nothing can be compiled here: {compiler.missing()}"
)

#: A document of 20, of 30 and of 19, with positions of no document before, between and after them.
DOCUMENTS = [-1] * 5 + [0] * 20 + [-1] * 7 + [1] * 30 + [-1] * 4 + [2] * 19 + [-1] * 9
#: Three rows that attend to 37 keys: they are read from a table.
FEW = f"from_runs({[0] * 40}, [1], {[37 if row in (3, 20, 38) else 0 for row in range(40)]})"

CASES = {
    "window": Case("window(3, 5)", (67, 75), 24, "float32", heads=(4, 2), kv_lengths=(75, 31)),
    "union": Case("window(9) | strided(7)", (1050, 1050), 33, "float64", batch=1, layout="gaps"),
    "tokens": Case("window(8) | global_tokens(3)", (530, 530), 64, "bfloat16", layout="gaps"),
    "capped": Case("causal()", (100, 117), 33, "float16", soft_cap=3.0),
    "capped, matrix tiles": Case("window(40)", (100, 117), 64, "bfloat16", heads=(4, 2), soft_cap=3.0),
    "packed": Case("causal()", (200, 200), 64, "float32", layout="heads"),
    "packed, long rows": Case("causal()", (450, 450), 256, "float32", heads=(1, 1), batch=1, layout="heads"),
    "rings": Case(
        "window(20) | global_tokens(3)", (530, 530), 33, "float32", heads=(4, 2), kv_lengths=(530, 317), layout="gaps"
    ),
    "rows": Case("global_rows(5)", (70, 45), 24, "float32"),
    "few": Case(FEW, (40, 40), 64, "float16", layout="gaps"),
    "blocks": Case("random_blocks(60, 12, 0)", (800, 800), 24, "bfloat16"),
    "odd": Case("window(9) | strided(7)", (131, 133), 33, "bfloat16", heads=(4, 2), kv_lengths=(53, 0)),
    "odd rings": Case("window(20, 7)", (530, 530), 33, "bfloat16", batch=1, layout="gaps"),
    "shared keys": Case("window(3, 5)", (67, 75), 24, "float32", heads=(16, 1), batch=1, kv_lengths=(75,)),
    "decode": Case("window(0, 1300) | strided(3)", (8, 1400), 64, "float32", heads=(10, 2), kv_lengths=(1400, 700)),
}
BLOCKS = CASES["blocks"]  # 12 walks, and on some machines matrix tiles

#: Without optimisation kernels compile four times as fast, and run fast enough.
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -g1 -O0"
#: Fresh memory holds NaN: what is read before it is written shows in the results.
SANITIZED = {
    "ASAN_OPTIONS": f"detect_leaks=0:abort_on_error=1:max_malloc_fill_size={1 << 30}:malloc_fill_byte=255",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}

ARM = platform.machine().lower() in {"arm64", "aarch64"}
BASELINE = "-march=armv8-a" if ARM else "-march=x86-64"
#: Flags -> what a processor must have to run what they make.
PROCESSORS = {
    BASELINE: set(),
    "-march=x86-64-v3": {"avx2", "bmi2", "f16c", "fma"},
    "-march=x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
#: What AMD's processors with products of bfloat16 pairs get by themselves, for any that has them.
PAIRS = "-mno-amx-bf16 -DSPLAT_PAIRS=1"
#: Kernels for matrix tiles, which a header stands in for.
TILES = f"-DSPLAT_AMX=1 -O1 -iquote {shlex.quote(str(Path(__file__).with_name('emulated')))}"
NEEDED = PROCESSORS | {PAIRS: {"avx512_bf16"}, TILES: {"avx512_bf16"}}


def kernels_of(case: Case) -> list[str]:
    """dK and dV add up in the results, which takes results of full precision."""
    if case.lengths[0] <= generate.few_queries(case.dtype):
        return ["decode"]
    return [kernel for kernel in generate.KERNELS if kernel != "backward" or case.dtype == case.compute]


def solve(case: Case, arrays: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """All that a backward reads, and what every kernel should give."""
    options = dict(scale=case.scale, logits_soft_cap=case.soft_cap, kv_lengths=case.kv_lengths)
    expected = truth(Inputs(*(arrays[name] for name in Inputs._fields)), case.mask, **options)._asdict()
    made = {"out": expected["out"].astype(arrays["query"].dtype), "lse": expected["lse"].astype(case.compute)}
    return arrays | made, expected


def check(found: dict[str, Array], expected: dict[str, Array], case: Case, slack: float = 1.0) -> None:
    for name, x in found.items():
        a, b = x.astype(np.float64), expected[name]
        if name == "lse":
            np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b), err_msg="rows that attend to nothing")
            a, b = a[np.isfinite(b)], b[np.isfinite(b)]
        bound = TOLERANCE[case.compute if name == "lse" else case.dtype] * slack * max(1, np.abs(b).max(initial=0))
        error = np.abs(a - b).max(initial=0)
        assert error <= bound, f"{name} is off by {error:.2g}"  # not if it is NaN


def check_all(jobs: list[Job], expected: dict[str, Array], environment: dict[str, str] | None = None) -> None:
    for job, found in zip(jobs, run_elsewhere(jobs, environment), strict=True):
        check(found, expected, job.case)


# -- sanitizers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sanitized(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables of a process that sanitizers watch; what is compiled is for it."""
    found = compiler.find()
    if "clang" in found.version.lower():
        pytest.skip("the sanitizers of clang are not loaded into a process as those of gcc are")
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        command = [*found.command, f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            pytest.skip(f"{found.name} has no {name}")
        libraries.append(path)
    monkeypatch.setenv("SPLAT_CXXFLAGS", SANITIZERS)
    return SANITIZED | {"LD_PRELOAD": " ".join(libraries)}


@pytest.mark.parametrize("name", CASES)
def test_sanitizers_have_no_complaint(name: str, sanitized: dict[str, str], rng: np.random.Generator) -> None:
    case = CASES[name]
    arrays, expected = solve(case, case.draw(rng))
    jobs = [Job(case.build(kernel), case, kernel, arrays, n) for kernel in kernels_of(case) for n in (1, 2)]
    check_all(jobs, expected, sanitized)


@pytest.fixture
def one_too_far(tmp_path: Path) -> str:
    """The flag for a header that is wrong: rows of results are written one element too far."""
    right = (compiler.INCLUDE / "splat" / "tile.hpp").read_text()
    wrong = right.replace("position + d, square[n]", "position + d + 1, square[n]")
    assert wrong != right
    (tmp_path / "splat").mkdir()
    (tmp_path / "splat" / "tile.hpp").write_text(wrong)
    return f"-iquote {tmp_path}"


def test_the_sanitizer_sees_what_is_wrong(
    one_too_far: str, cache_dir: Path, sanitized: dict[str, str], rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("SPLAT_CXXFLAGS", f"{one_too_far} {SANITIZERS}")
    case = CASES["packed"]
    arrays, _ = solve(case, case.draw(rng))
    with pytest.raises(Ended, match=r"(?s)AddressSanitizer: .*WRITE of size .*lanes_to_rows"):
        run_elsewhere([Job(case.build("forward"), case, "forward", arrays)], sanitized)


def test_the_sanitizer_sees_what_is_undefined(
    cache_dir: Path, sanitized: dict[str, str], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLAT_CXXFLAGS", SANITIZERS)
    text = 'extern "C" __attribute__((visibility("default"))) int splat_run(void*, int n) { return n + 2147483647; }'
    case = CASES["packed"]
    arrays, _ = solve(case, case.draw(rng))
    with pytest.raises(Ended, match="runtime error: signed integer overflow"):
        run_elsewhere([Job(compiler.build("undefined", text), case, "forward", arrays)], sanitized)


def test_borders_see_what_is_wrong(
    one_too_far: str, cache_dir: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a sanitizer is blind: in what is written in assembly."""
    monkeypatch.setenv("SPLAT_CXXFLAGS", f"{one_too_far} -O1")
    for name, said in (("packed", "exit code -1[01]"), ("few", "forward writes between the rows of out")):
        case = CASES[name]
        arrays, _ = solve(case, case.draw(rng))
        with pytest.raises(Ended, match=said):
            run_elsewhere([Job(case.build("forward"), case, "forward", arrays, border="after")])


# -- processors --------------------------------------------------------------------------------------------------------


def can_run(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is for the processors of the flags; skips where this is none of them."""
    if not flags:
        monkeypatch.delenv("SPLAT_CXXFLAGS", raising=False)
        return
    if ARM and flags != BASELINE:
        pytest.skip("for other processors than ARM's")
    if flags == TILES:
        if "amx_bf16" in compiler.processor().split():
            pytest.skip("this processor has matrix tiles: the tests of all kernels show them")
        monkeypatch.setattr(amx, "is_granted", lambda: True)
    lacking = NEEDED[flags] - set(compiler.processor().split())
    if lacking:
        pytest.skip(f"this processor has no {', '.join(sorted(lacking))}")
    if not compiler._accepts(compiler.find(), shlex.split(flags)):
        pytest.skip(f"{compiler.find().version} knows no {flags}")
    monkeypatch.setenv("SPLAT_CXXFLAGS", flags)


#: One of every data type, and rows from a table.
SOME = ["window", "union", "tokens", "capped", "few", "decode"]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("flags", PROCESSORS)
def test_processors(flags: str, name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, and no access beside the arrays."""
    can_run(flags, monkeypatch)
    case = CASES[name]
    arrays, expected = solve(case, case.draw(rng))
    jobs = []
    for kernel in kernels_of(case):
        library = case.build(kernel)
        jobs += [Job(library, case, kernel, arrays, 1, "after"), Job(library, case, kernel, arrays, 2, "before")]
    check_all(jobs, expected)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == "bfloat16"])
def test_pairs(name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    can_run("", monkeypatch)
    own = compiler.bfloat16_by(compiler.find()) == "pairs"
    test_processors("" if own else PAIRS, name, rng, monkeypatch)


#: Odd head dims, strides and edges; a soft cap; rings.
OF_TILES = ["odd", "capped, matrix tiles", "odd rings"]


@pytest.mark.parametrize("name", OF_TILES)
def test_matrix_tiles(name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors without them."""
    test_processors(TILES, name, rng, monkeypatch)


#: Flags, and the cases that are made otherwise with them than on most processors.
ELSEWHERE = {
    "-march=x86-64-v4": ("window", "tokens"),
    "-march=sapphirerapids": ("tokens",),
    f"-march=sapphirerapids {PAIRS}": ("tokens",),
}


@pytest.mark.parametrize("flags", ELSEWHERE)
def test_what_other_processors_run_compiles(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if ARM:
        pytest.skip("for other processors than ARM's")
    if not compiler._accepts(compiler.find(), shlex.split(flags)):
        pytest.skip(f"{compiler.find().version} knows no {flags}")
    monkeypatch.setenv("SPLAT_CXXFLAGS", f"{flags} -O0")
    monkeypatch.setattr(amx, "is_granted", lambda: flags == "-march=sapphirerapids")
    for case in map(CASES.__getitem__, ELSEWHERE[flags]):
        for kernel in kernels_of(case):
            case.build(kernel)


@pytest.mark.parametrize("name", ["window", "union", "tokens", "decode"])
def test_clang(name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("clang++", *(f"clang++-{version}" for version in range(40, 10, -1)))
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("needs clang++ (Debian, Ubuntu: apt install clang)")
    monkeypatch.setenv("CXX", found)
    test_processors("", name, rng, monkeypatch)


@pytest.fixture
def arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The command that makes a call as a 64-bit Arm processor would; what is compiled is for one."""
    if ARM:
        pytest.skip("this processor is one: the tests of all kernels show it")
    names = ("aarch64-linux-gnu-g++", "qemu-aarch64")
    found = [shutil.which(name) for name in names]
    if None in found:
        pytest.skip(f"needs {' and '.join(names)} (Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user)")
    cross, emulator = map(str, found)
    program = tmp_path / "elsewhere"
    source = Path(__file__).with_name("elsewhere.cpp")
    subprocess.run([cross, "-std=c++17", f"-I{compiler.INCLUDE}", str(source), "-o", str(program), "-ldl"], check=True)
    libc = subprocess.run([cross, "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True).stdout
    monkeypatch.setenv("CXX", cross)
    monkeypatch.setenv("SPLAT_CXXFLAGS", "-march=armv8-a")
    return (emulator, "-L", str(Path(libc.strip()).parents[1]), str(program))


@pytest.mark.parametrize("name", SOME)
def test_arm(name: str, arm: tuple[str, ...], rng: np.random.Generator) -> None:
    case = CASES[name]
    arrays, expected = solve(case, case.draw(rng))
    for kernel in kernels_of(case):
        check(run(Job(case.build(kernel), case, kernel, arrays, 2, emulator=arm)), expected, case)


#: (flags, case). With AVX2, float16 alone is made by other instructions than with the baseline.
EXTREMES = [*itertools.product(("", BASELINE), SOME[:4]), ("-march=x86-64-v3", "capped")]


@pytest.mark.parametrize(("flags", "name"), EXTREMES)
def test_extreme_numbers(flags: str, name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with one weight that counts, and values below the normal numbers; both are as ever after the call."""
    can_run(flags, monkeypatch)
    case = CASES[name]
    small = {"float64": 1e-310, "float16": 1e-6}.get(case.dtype, 1e-39)
    for factors in ({"query": 100.0}, {"value": small}):
        drawn = case.draw(rng)
        drawn |= {n: (drawn[n].astype(np.float64) * factor).astype(drawn[n].dtype) for n, factor in factors.items()}
        arrays, expected = solve(case, drawn)
        largest = np.abs(expected["lse"][np.isfinite(expected["lse"])]).max()
        for kernel in kernels_of(case):
            found = run(Job(case.build(kernel), case, kernel, arrays, 2))
            check(found, expected, case, slack=max(1, largest))
            if kernel in ("forward", "decode") and case.dtype == "float16" and "value" in factors:
                assert np.abs(found["out"] - expected["out"]).max() <= 2**-24, "these are no numbers to lose"
            assert np.float32(1e-40) * np.float32(1) == np.float32(1e-40) != 0
            assert np.float64(5e-324) * 1 != 0


@pytest.mark.parametrize("flags", ["", TILES])
def test_scores_of_minus_infinity(flags: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they are the first that a row has: those that follow count."""
    can_run(flags, monkeypatch)
    case = Case("window(40)", (100, 117), 64, "bfloat16")
    drawn = case.draw(rng)
    drawn["query"][..., 0] = np.abs(drawn["query"][..., 0])
    drawn["key"][:, 31, :, 0] = -np.inf  # all that row 71 has of the first 32
    with np.errstate(invalid="ignore"):  # gradients there are NaN
        arrays, expected = solve(case, drawn)
    for kernel in ("forward", "decode"):
        check(run(Job(case.build(kernel), case, kernel, arrays)), expected, case)


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["window", "union", "tokens", "capped", "blocks", "shared keys", "decode"])
def test_threads_make_no_difference(name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits are the same whenever a kernel is called, and with any number of threads."""
    can_run("", monkeypatch)
    case = CASES[name]
    arrays, _ = solve(case, case.draw(rng))
    for kernel in kernels_of(case):
        job = Job(case.build(kernel), case, kernel, arrays)
        one = bits(run(job))
        for n in (1, 2, 3, 3):
            assert bits(run(dataclasses.replace(job, num_threads=n))) == one, f"{kernel}, 1 and {n} threads"


def bits(results: dict[str, Array]) -> dict[str, bytes]:
    return {name: x.tobytes() for name, x in results.items()}


# -- what is in no pair ------------------------------------------------------------------------------------------------

HOLES = Case(f"window(6) & segments({DOCUMENTS})", (94, 94), 64, "float32", layout="heads")
STRIDES = Case("window(9) | strided(7)", (131, 131), 33, "bfloat16", heads=(4, 2), kv_lengths=(53, 0))
#: name -> a case with queries or keys that are in no pair.
UNPAIRED = {
    "holes": HOLES,
    "holes, matrix tiles": dataclasses.replace(HOLES, dtype="bfloat16"),
    "lengths": CASES["window"],
    "lengths, matrix tiles": STRIDES,
    "lengths without edges, matrix tiles": Case("blocked(16)", (32, 32), 64, "bfloat16", kv_lengths=(16, 0)),
    "few": CASES["few"],
}


@pytest.mark.parametrize(
    ("flags", "name"), [*(("", name) for name in UNPAIRED), *((TILES, name) for name in UNPAIRED if "tiles" in name)]
)
def test_nothing_of_what_is_in_no_pair(
    flags: str, name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN and infinity there change no bit of any result, those of these positions included."""
    can_run(flags, monkeypatch)
    case = UNPAIRED[name]
    arrays, expected = solve(case, case.draw(rng))
    lengths = np.array(case.kv_lengths or [case.lengths[1]] * case.batch)
    pairs = case.mask & (np.arange(case.lengths[1]) < lengths[:, None, None])  # [batch, query, key]
    queries, keys = ~pairs.any(axis=2), ~pairs.any(axis=1)
    assert queries.any() or keys.any()
    poisoned: dict[str, Any] = dict(arrays)
    for operand, where in (("query", queries), ("d_out", queries), ("d_lse", queries), ("key", keys), ("value", keys)):
        x = arrays[operand].copy()
        x[where] = rng.choice([np.nan, np.inf, -np.inf], x[where].shape)
        poisoned[operand] = x
    for kernel in kernels_of(case):
        job = Job(case.build(kernel), case, kernel, arrays)
        found = run(job)
        check(found, expected, case)
        for n in (1, 2):
            assert bits(run(dataclasses.replace(job, arrays=poisoned, num_threads=n))) == bits(found), kernel
