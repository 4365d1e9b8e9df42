"""`splat bench`, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from splat.bench import record, variants
from splat.bench.peers import PEERS
from splat.bench.suites import SUITES
from splat.cli import app

TINY = ("--q-len", "64", "--heads", "1", "--head-dim", "16", "--implementation", "xla")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*args: str, code: int = 0) -> str:
        """stdout, or stderr where the exit code is 2."""
        result = CliRunner().invoke(app, ["bench", *args])
        assert result.exit_code == code, (result.output, result.exception)
        return result.stderr if code == 2 else result.stdout

    return call


def test_paper_from_end_to_end(run, tmp_path: Path) -> None:
    cases = ("--case", "windowed, 10 %", "--case", "strided, 50 %")
    tmp_path = tmp_path / "[red]1"
    text = run("paper", "--quick", "--out", str(tmp_path), *TINY, *cases)
    assert f"report: {tmp_path / 'paper.html'}; raw samples: {tmp_path / 'paper.json'}" in text
    made = record.read(tmp_path / "paper.json")
    assert len(made.records) == 6
    assert not made.failed
    assert made.ours == ("splat-xla",)
    for one in made.records:
        ours = one.measured["splat-xla"]
        assert ours.off is not None
        assert ours.off < 2e-5
        assert ours.first_ms > ours.median_ms
        assert "dense" in one.measured
    for op in ("sddmm", "spmm", "attention"):
        assert f"{op}: float32, batch 1, 1 head of 16" in text
    for name, peer in PEERS.items():
        if peer.missing("cpu"):
            assert f"{name} took no part: " in text
    page = (tmp_path / "paper.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 4
    again = run("paper", "--quick", *TINY, "--op", "spmm", "--case", "strided, 50 %", "--against", "none",
                "--baseline", _slowed(tmp_path / "paper.json", 1000.0))  # fmt: skip
    assert "Against the baseline" in again


def test_earlier_results_are_kept(run, tmp_path: Path) -> None:
    kept = tmp_path / "paper.json"
    kept.write_text("{}", encoding="utf-8")
    text = " ".join(run("paper", "--quick", *TINY, "--out", str(tmp_path), code=2).split())
    assert f"--out must be a folder without results of this suite, but {kept} exists. Give another folder" in text
    assert kept.read_text(encoding="utf-8") == "{}"
    assert list(tmp_path.iterdir()) == [kept]


def test_a_regression_is_an_exit_code(run, tmp_path: Path) -> None:
    args = ("paper", "--quick", *TINY, "--op", "sddmm", "--case", "windowed, 10 %", "--against", "none")
    run(*args, "--out", str(tmp_path))
    other = run("sas", "--quick", "--baseline", str(tmp_path / "paper.json"), code=2)
    assert "no problem in common with this run: it is of the suite paper" in other
    threads = run(*args, "--baseline", str(tmp_path / "paper.json"), "--threads", "1", code=2)
    assert "--baseline must be of the same threads, but it is of 2 and this run of 1. Give --threads 2" in threads
    text = run(*args, "--baseline", _slowed(tmp_path / "paper.json", 1e-3), code=1)
    assert "SLOWER: sddmm, windowed, 10 %, 64, splat-xla" in text


def _slowed(path: Path, factor: float) -> str:
    """The baseline as if it had taken so many times as long."""
    data = json.loads(path.read_text(encoding="utf-8"))
    for one in data["records"]:
        for measured in one["measured"].values():
            measured["ms"] = [factor * ms for ms in measured["ms"]]
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


def test_dtypes_side_by_side(run, tmp_path: Path) -> None:
    args = ("figures", "--quick", *TINY, "--case", "window 256", "--against", "dense")
    text = run(*args, "--dtype", "float32", "--dtype", "bfloat16", "--out", str(tmp_path))
    records = record.read(tmp_path / "figures.json").records
    tasks = [(op, dtype) for op in ("attention", "training") for dtype in ("float32", "bfloat16")]
    assert [(one.op, one.dtype) for one in records] == tasks
    assert len({one.key for one in records}) == 4
    for op, dtype in tasks:
        assert f"{op}: {dtype}, batch 1, 1 head of 16" in text
    for one in records:
        assert "dense" in one.measured
        for off in (one.gate_off, one.measured["splat-xla"].off):
            assert off is not None
            assert (off < 2e-5) == (one.dtype == "float32")


def test_planning_and_scaling(run, tmp_path: Path) -> None:
    text = run("planning", "--quick", "--against", "none", "--q-len", "64", "--q-len", "128", "--out", str(tmp_path))
    assert "planning: expression to printed plan" in text
    assert "slope of log over log" in text
    text = run("scaling", "--quick", "--against", "none", *TINY, "--q-len", "128", "--out", str(tmp_path))
    assert "slope of log over log" in text
    assert "memory" in (tmp_path / "planning.html").read_text(encoding="utf-8")


def test_variants_take_the_place_of_peers(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from contextlib import contextmanager

    on: list[bool] = []

    @contextmanager
    def switch():
        on.append(True)
        yield

    monkeypatch.setattr(variants, "VARIANTS", [variants.Variant("no-spans", "spans off", switch, ("spmm",))])
    run("ablation", "--quick", *TINY, "--case", "windowed, 10 %", "--out", str(tmp_path))
    made = record.read(tmp_path / "ablation.json")
    assert [sorted(one.measured) for one in made.records] == [
        ["splat-xla"], ["splat-xla", "splat-xla no-spans"], ["splat-xla"],
    ]  # fmt: skip
    assert on


def test_help_has_an_example(run) -> None:
    assert "Example: splat bench paper --quick" in run("--help")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["papers"], f"there is no suite named 'papers'; there are {', '.join(SUITES)}"),
        (["paper", "--against", "numpy"], "--against must name some of dense, bcoo, scipy"),
        (
            ["ablation", "--against", "scipy"],
            "--against cannot go with --ablate or the suite ablation, which measure SPLAT's own variants instead of "
            "peers, but scipy was given. Leave one of them out.",
        ),
        (["paper", "--ablate", "--against", "scipy"], "--against cannot go with --ablate"),
        (["paper", "--against", "cudnn"], "--against cudnn: runs on cuda only"),
        (["paper", "--baseline", "/no/such/file.json"], "--baseline /no/such/file.json cannot be read: No such file"),
        (["paper", "--op", "matmul"], "--op must name some of sddmm"),
        (["paper", "--op", "attention", "--dtype", "int8"], "--dtype must name some of float32, bfloat16, but int8"),
        (
            ["paper", "--dtype", "bfloat16"],
            "--dtype bfloat16 must go with operations that are measured in it, attention, training, but sddmm, spmm was"
            " given. Add --op attention --op training, or leave it out.",
        ),
        (["paper", "--case", "diagonal"], "--case must name cases of the suite paper: 'windowed, 10 %'"),
        (["paper", "--device", "cuda"], "--device cuda needs a GPU, but JAX has cpu here"),
        (["paper", "--device", "tpu"], "--device must be cpu or cuda, but 'tpu' was given"),
        (["paper", "--implementation", "fast"], "implementation must be None or one of"),
    ],
)
def test_errors_are_a_line(run, args: list[str], message: str) -> None:
    text = run(*args, "--quick", code=2)
    assert text.startswith("error: ")
    assert message in text
