"""Every command of `splat`, as a user calls it."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import splat
from splat.cli import app, demo, doctor
from splat.cli import cache as cache_command
from splat.cli.errors import EXTRAS
from splat.codegen import cache
from splat.codegen.cpp import compiler
from splat.files import replacing
from splat.planning import Plan

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("SPLAT_DEBUG", raising=False)

    def call(*args: str, code: int = 0) -> str:
        """stdout, or stderr where the exit code is not 0."""
        result = CliRunner().invoke(app, list(args))
        assert result.exit_code == code, (result.output, result.exception)
        return result.stderr if code else result.stdout

    return call


def test_paths_are_printed_as_they_are(run, tmp_path: Path) -> None:
    folder = tmp_path / "[red]1"
    folder.mkdir()
    out = str(folder / "p.png")
    assert f"picture: {out}" in run("show", "window(3)", "--q-len", "64", "--out", out)


def test_show(run, tmp_path: Path) -> None:
    out = tmp_path / "p.png"
    text = run("show", "window(128) | strided(128)", "--q-len", "2048", "--out", str(out))
    plan = splat.plan("window(128) | strided(128)", 2048, block_q=64, block_kv=64)
    assert f"{plan.nnz:,}" in text
    assert f"{plan.waste:.3f}" in text
    assert str(out) in text
    assert "\x1b" not in text
    assert all(glyph in text for glyph in "█▓░")
    assert out.read_bytes().startswith(PNG)
    assert out.stat().st_size > 20_000


def test_show_options(run) -> None:
    text = run("show", "causal()", "--q-len", "3", "--kv-len", "40", "--query-offset", "37", "--block-kv", "8")
    assert "3 x 40 from 37" in text
    assert f"{38 + 39 + 40}" in text


def test_show_one_pattern_per_head(run, tmp_path: Path) -> None:
    out = tmp_path / "p.png"
    text = run("show", "per_head([causal(), window(9), causal()])", "--q-len", "64", "--out", str(out))
    assert "heads 0, 2:" in text
    assert "heads 1:" in text
    assert out.read_bytes().startswith(PNG)


def test_plan(run) -> None:
    sizes = ["--q-len", "512", "--head-dim", "32", "--num-q-heads", "4", "--num-kv-heads", "2", "--batch", "3"]
    text = run("plan", "causal() & window(64)", *sizes, "--dtype", "bfloat16", "--implementation", "xla")
    assert "batch 3, heads 4/2, head dim 32, bfloat16, on cpu" in text
    assert "* xla" in text


def test_plan_as_json(run) -> None:
    text = run("plan", "causal() & window(64)", "--q-len", "512", "--block-q", "64", "--block-kv", "32", "--json")
    data = json.loads(text)
    assert data["problem"]["pattern"] == "causal() & window(64)"
    assert data["passes"][0]["block_kv"] == 32
    assert Plan.from_json(text).to_json() == text.strip()


def test_emit(run, tmp_path: Path) -> None:
    text = run("emit", "causal() & window(32)", "--q-len", "64", "--target", "xla", "--head-dim", "16")
    assert "stablehlo" in text
    out = tmp_path / "program.txt"
    run("emit", "causal() & window(32)", "--q-len", "64", "--head-dim", "16", "--out", str(out))
    assert out.read_text(encoding="utf-8").strip() == text.strip()


def test_emit_of_an_operation_on_values(run) -> None:
    text = run("emit", "window(8)", "--q-len", "64", "--target", "cpp", "--kernel", "sddmm", "--head-dim", "16")
    assert "SPLAT_VALUES_KERNEL(sddmm, Facts)" in text
    assert "head_dim = 16;" in text
    assert "spmm_transposed" in run("emit", "--help")


@pytest.mark.parametrize("kernel", ["forward", "sddmm", "softmax", "spmm", "spmm_transposed"])
def test_emit_keeps_float64(run, kernel: str) -> None:
    text = run("emit", "window(8)", "--q-len", "64", "--kernel", kernel, "--dtype", "float64")
    assert "xf64>" in text
    assert "xf32>" not in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["show", "windw(3)"], "did you mean window?"),
        (["plan", "window(3"], "cannot read this pattern"),
        (["plan", "causal()", "--target", "b300"], "target must be one of 'cpu'"),
        (["plan", "causal()", "--implementation", "fast"], "implementation must be None or one of"),
        (["plan", "causal()", "--dtype", "int8"], "not int8"),
        (["emit", "causal()", "--target", "fortran"], "target must be one of"),
        (["emit", "causal()", "--kernel", "sddmm", "--scale", "2"], "which has no scale"),
        (["plan", "causal()", "--head-dim", "0"], "head_dim must be in"),
        (
            ["emit", "window(8)", "--q-len", "64", "--target", "cpp", "--arch", "sm_90"],
            "arch is for GPU kernels, but the target is 'cpp', which is for CPUs, and 'sm_90' was given. Leave arch "
            "out, or take the target triton or ptx.",
        ),
        (["show", "causal()", "--out", "/no/such/folder/p.png"], "--out must lie in a folder that exists"),
        (
            ["show", "causal()", "--out", "p.jpg"],
            "pictures are written as .png, .svg, .pdf, but the file p.jpg ends in",
        ),
        (["demo", "--out", "/"], "--out must name a file"),
    ],
)
def test_errors_are_a_line(run, args: list[str], message: str) -> None:
    text = run(*args, code=2)
    assert text.startswith("error: ")
    assert message in text
    assert "Traceback" not in text


@pytest.mark.parametrize("command", ["show", "plan", "emit"])
def test_lengths_name_their_option(run, command: str) -> None:
    """The one that was given, also where the other has its value."""
    for option, number in (("--q-len", "0"), ("--q-len", "-3"), ("--kv-len", "0")):
        text = run(command, "causal()", option, number, code=2)
        assert f"Invalid value for '{option}'" in text
        assert ("--q-len" in text, "--kv-len" in text) == (option == "--q-len", option == "--kv-len")


def test_debug_raises_the_error(run, monkeypatch: pytest.MonkeyPatch) -> None:
    for args in (["--debug", "plan", "windw(3)"], ["plan", "windw(3)"]):
        result = CliRunner().invoke(app, args)
        assert isinstance(result.exception, splat.ParseError)
        monkeypatch.setenv("SPLAT_DEBUG", "1")


def test_version_and_help(run) -> None:
    assert run("--version").strip() == f"splat {splat.__version__}"
    for command in ("demo", "show", "plan", "emit", "doctor", "cache"):
        assert command in run("--help")
        assert f"Example: splat {command}" in run(command, "--help")


def test_help_imports_little() -> None:
    probe = (
        "import runpy, sys\n"
        "sys.argv = ['splat', '--help']\n"
        "try:\n    runpy.run_module('splat', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'jax', 'jaxlib', 'torch', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


# -- cache -------------------------------------------------------------------------------------------------------------


def _kept(key: str, name: str) -> cache.Entry:
    def build(folder: Path) -> dict[str, str]:
        (folder / "a.so").write_bytes(bytes(12_345))
        return {"compiler": "g++ (Some [system]) 12.2.0"}

    return cache.load_or_build(key, name, build)


def test_cache(run, cache_dir: Path) -> None:
    assert run("cache", "ls") == f"0 compiled kernels, 0 B: {cache_dir}\n"
    assert not cache_dir.exists()
    _kept("ab" * 32, "forward_float32_h64")
    _kept("cd" * 32, "backward_float32_h64")
    header, *rows, total = (line.strip() for line in run("cache", "ls").splitlines())
    assert header.split() == ["name", "size", "age", "unused", "compiler", "key"]
    assert [row.split()[0] for row in rows] == ["backward_float32_h64", "forward_float32_h64"]
    assert rows[0].endswith("g++ (Some [system]) 12.2.0  cdcdcdcdcdcd")
    assert "  12 KB  " in rows[0]
    assert total == f"2 compiled kernels, 25 KB: {cache_dir}"
    text = run("cache", "clear")
    assert text.startswith("removed 2 compiled kernels, ")
    assert text.endswith(f" KB freed: {cache_dir}\n")
    assert run("cache", "clear") == f"removed 0 compiled kernels, 0 B freed: {cache_dir}\n"


def test_cache_clear_what_is_not_used(run, cache_dir: Path) -> None:
    _kept("ab" * 32, "forward_float32_h64")
    old = _kept("cd" * 32, "backward_float32_h64")
    long_ago = time.time() - 31 * 86400
    os.utime(old.folder / cache.RECORD, (long_ago, long_ago))
    assert run("cache", "ls").splitlines()[1].split()[5:7] == ["31", "d"]
    assert "unused" in run("cache", "clear", "--help")
    assert run("cache", "clear", "--unused", "32").startswith("removed 0 compiled kernels, 0 B freed")
    assert run("cache", "clear", "--unused", "31").startswith("removed 1 compiled kernel, ")
    assert [entry.name for entry in cache.ls()] == ["forward_float32_h64"]
    assert "--unused" in run("cache", "clear", "--unused", "-1", code=2)


def test_cache_clear_keeps_what_is_being_built(run, cache_dir: Path) -> None:
    said = []

    def build(folder: Path) -> dict[str, str]:
        said.append(run("cache", "clear"))
        return {}

    cache.load_or_build("ab" * 32, "forward", build)
    assert said == [f"removed 0 compiled kernels, 0 B freed: {cache_dir} (1 left, being compiled now)\n"]


@pytest.mark.parametrize("below", [".", "below/it"])
def test_cache_where_a_file_is(run, cache_dir: Path, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_dir.write_text("a file")
    monkeypatch.setenv("SPLAT_CACHE_DIR", str(cache_dir / below))
    for command in ("ls", "clear"):
        assert run("cache", command, code=2) == (
            f"error: compiled kernels are kept in the folder {cache_dir / below}, but {cache_dir} is a file. Set "
            "SPLAT_CACHE_DIR to a folder, or remove the file.\n"
        )


def test_sizes_and_ages_for_people() -> None:
    sizes = {
        0: "0 B",
        999: "999 B",
        1000: "1 KB",
        12_345: "12 KB",
        999_499: "999 KB",
        999_500: "1.0 MB",
        10**10: "10.0 GB",
    }
    assert {size: cache_command.spell_bytes(size) for size in sizes} == sizes
    ages = {-1: "0 s", 59.9: "59 s", 60: "1 min", 3600: "1 h", 86400 * 40: "40 d"}
    assert {age: cache_command.spell_age(age) for age in ages} == ages


# -- doctor ------------------------------------------------------------------------------------------------------------


def test_missing_packages_have_a_remedy(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra of the project's own."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert {"jax-cuda", *EXTRAS.values()} <= set(extras)
    assert set(doctor.OPTIONAL) <= {package.replace("_", "-") for package in EXTRAS}
    monkeypatch.setitem(sys.modules, "triton", None)
    text = run("emit", "window(8)", "--q-len", "64", "--target", "triton", code=2)
    assert "pip install 'splat-attention[kernels]', or see `splat doctor`" in text
    monkeypatch.setattr(doctor, "_version", lambda package: doctor.MISSING)
    assert doctor._optional("triton", "GPU kernels") == (
        "not installed (GPU kernels): pip install 'splat-attention[kernels]'"
    )
    monkeypatch.setattr(Path, "exists", lambda path: True)
    sees = doctor._jax_rows({"jax": "1", "jaxlib": "1", "devices": ["cpu:0"], "platform": "cpu"})["devices"]
    assert "jax sees no GPU: pip install 'splat-attention[jax-cuda]'" in sees


def test_doctor(run) -> None:
    text = run("doctor")
    assert splat.__version__ in text
    assert "cpu:0" in text
    assert "serves float32" in text
    for name in ("triton", "cpp", "xla", "torch", "threads", "numpy"):
        assert name in text


def test_doctor_on_the_compiler(run, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE", "raise RuntimeError")
    monkeypatch.setenv("SPLAT_CXXFLAGS", "-DSOME=1")
    monkeypatch.setenv("SPLAT_CHACHE_DIR", "/tmp")
    monkeypatch.setenv("NPROC", "7")
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    _kept("ab" * 32, "forward_float32_h64")
    text = run("doctor")
    assert "-std=c++17" in text
    assert "-DSOME=1" in text
    assert doctor.cpp()["threads"] == "7"
    assert doctor.cpp()["kept in"] == f"{cache_dir} (1 compiled kernel, 12 KB)"
    assert doctor.settings()["SPLAT_CHACHE_DIR"] == "/tmp (not a setting of SPLAT: misspelt?)"
    assert "misspelt?" in text


def test_doctor_without_a_compiler(run, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE", "raise RuntimeError")
    monkeypatch.setenv("CXX", "/no/such/c++")
    cache_dir.write_text("a file")
    text = run("doctor")
    assert "CXX is '/no/such/c++', but there is no program '/no/such/c++'. Install a compiler" in " ".join(text.split())
    assert doctor.cpp()["kept in"] == f"nowhere: {cache_dir}: Not a directory; set SPLAT_CACHE_DIR"


def test_doctor_tries_the_compiler(run, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "problem" not in doctor.cpp()
    monkeypatch.setattr(doctor, "PROBE", "raise RuntimeError")
    monkeypatch.setenv("CXX", "false")
    text = " ".join(run("doctor").split())
    assert "three lines of C++ cannot be compiled (exit code 1): (it said nothing). Set CXX to a C++" in text
    assert "cpp no: the C++ compiler does not work: see C++ kernels, problem" in text
    assert not cache_dir.exists()
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    assert doctor.cpp()["not tried"].startswith("no temporary files: No such file or directory; set TMPDIR to a")


def test_doctor_on_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler.missing():
        pytest.skip(f"nothing can be compiled here: {compiler.missing()}")
    found = compiler.find()
    assert compiler.bfloat16_by(found) in doctor.BFLOAT16_BY
    assert doctor.cpp()["bfloat16"] in doctor.BFLOAT16_BY.values()
    monkeypatch.setattr(compiler, "bfloat16_by", lambda found: "matrix tiles")
    monkeypatch.setattr(doctor, "probe_amx", lambda: "refused (Invalid argument)")
    assert doctor.cpp()["bfloat16"] == doctor.BFLOAT16_BY["float32"]
    monkeypatch.undo()
    for flags, by in (("-march=x86-64-v4", "float32"), ("-march=sapphirerapids", "matrix tiles"),
                      ("-march=znver3 -mavx512bf16 -mavx512bw -mavx512dq -mavx512vl", "pairs"),
                      ("-march=cooperlake", "float32"), ("-march=nonsense", "")):  # fmt: skip
        monkeypatch.setenv("SPLAT_CXXFLAGS", flags)
        if platform.machine() == "x86_64":
            assert compiler.bfloat16_by(found) == by, flags


def test_doctor_asks_for_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.probe_amx().startswith(("granted", "refused ("))
    monkeypatch.setattr(doctor, "AMX_PROBE", "raise OSError")
    assert doctor.probe_amx() == "not known to be granted"
    has_amx = "amx_tile" in doctor.machine()["instruction sets"]
    assert ("AMX" in doctor.machine()) == has_amx


@pytest.mark.parametrize(
    ("probe", "message", "implementation"),
    [
        ("raise RuntimeError('no such device')", "does not work (exit code 1): RuntimeError: no such device", "xla"),
        ("import os; os.abort()", "does not work", "not asked"),
    ],
)
def test_doctor_with_a_broken_jax(run, monkeypatch, probe: str, message: str, implementation: str) -> None:
    monkeypatch.setattr(doctor, "PROBE", probe)
    text = run("doctor")
    assert message in text
    assert implementation in text


def test_doctor_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE", "import time; time.sleep(60)")
    assert "gave no answer within" in doctor.probe_jax(timeout_s=0.2)["error"]


# -- demo --------------------------------------------------------------------------------------------------------------


def test_demo(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MAX_ROUNDS", 2)
    out = tmp_path / "demo.png"
    text = run("demo", "--q-len", "1000", "--out", str(out))
    for pattern, _ in demo.CASES:
        assert pattern in text
    assert "speed-up" in text
    assert "1,000 of 1,000 rows" in text
    assert out.read_bytes().startswith(PNG)
    assert out.stat().st_size > 50_000


def test_demo_fails_where_results_are_wrong(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MAX_ROUNDS", 1)
    monkeypatch.setattr(demo, "CASES", (("window(256)", lambda i, j: abs(i - j) <= 255),))
    text = run("demo", "--q-len", "512", "--out", str(tmp_path / "demo.png"), code=1)
    assert "wrong results" in text
    assert "window(256)" in text


def test_demo_masks_are_the_patterns() -> None:
    import numpy as np

    at = np.arange(700)
    for pattern, keep in demo.CASES:
        assert (splat.parse(pattern).to_dense(700) == keep(at[:, None], at[None, :])).all()


def test_dense_attention_in_pieces_is_exact() -> None:
    import jax
    import numpy as np

    rng = np.random.default_rng(3)
    q, k, v = (rng.normal(size=(1, 50, 2, 8)).astype(np.float32) for _ in range(3))
    mask = rng.random((50, 50)) < 0.5
    whole = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])
    np.testing.assert_allclose(demo.dense_attention(q, k, v, jax.numpy.asarray(mask), 16), whole, atol=1e-6)


# -- files -------------------------------------------------------------------------------------------------------------

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


@needs_full
@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("plan window(3) --q-len 64", "error: No space left on device"),
        ("--help", "error: No space left on device"),
        ("--version", "error: No space left on device"),
        ("emit window(3) --q-len 64 --target cpp --out /dev/full", "error: /dev/full: No space left on device"),
        ("show window(3) --q-len 64 --out /dev/full", "error: /dev/full: No space left on device"),
    ],
)
def test_a_full_disk_is_told_in_a_line(args: str, says: str) -> None:
    with open("/dev/null" if "--out" in args else "/dev/full", "w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "splat", *args.split()], stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (2, f"{says}\n")


@pytest.mark.parametrize("streams", ["1", "2", "12"])
def test_streams_that_are_closed(streams: str, tmp_path: Path) -> None:
    path = tmp_path / "out.cpp"
    args = ["-m", "splat", "emit", "window(3)", "--q-len", "64", "--target", "cpp", "--out", str(path)]
    script = f"import os\nfor one in {streams!r}: os.close(int(one))\n"
    script += f"os.execv({sys.executable!r}, {[sys.executable, *args]!r})"
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == 0
    assert path.stat().st_size > 0


def test_a_terminal_of_no_width() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "splat", "show", "window(3)", "--q-len", "64"],
        env=os.environ | {"COLUMNS": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "non-zeros" in done.stdout


def test_who_stops_reading_is_told_nothing() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "splat", "plan", "window(3)"],
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("before", encoding="utf-8")

    def fail(written: Path) -> None:
        written.write_text("half", encoding="utf-8")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left on device: '.*/out.txt'"), replacing(path) as written:
        fail(written)
    assert [one.read_text(encoding="utf-8") for one in tmp_path.iterdir()] == ["before"]
    link = tmp_path / "link"
    link.symlink_to(path)
    with replacing(link) as written:
        written.write_text("after", encoding="utf-8")
    assert link.is_symlink()
    assert path.read_text(encoding="utf-8") == "after"
    with replacing(Path(os.devnull)) as written:
        assert written == Path(os.devnull)
