"""What happens where the C++ compiler fails or is interrupted, and what is said while it runs."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from splat.codegen import cache
from splat.codegen.cpp import compiler
from splat.codegen.cpp.progress import Progress
from splat.errors import ArgumentError, CompileError, SplatError
from tests.codegen.caching import left, mounted
from tests.codegen.cpp.compiling import REAL, SOURCE, Wrapper, build_elsewhere, temporary, wait_for

pytestmark = [
    pytest.mark.skipif(REAL is None, reason="no C++ compiler is installed here"),
    pytest.mark.usefixtures("fresh"),
]


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_compile_error(cache_dir: Path) -> None:
    source = "int first = nowhere;\n" + "".join(f"int more{n} = missing{n};\n" for n in range(20))
    with pytest.raises(CompileError) as caught:
        compiler.load("forward_float32_h64", source)
    error = caught.value
    text = str(error)
    assert text.startswith("the C++ compiler failed on forward_float32_h64 (exit code 1):\n")
    assert "nowhere" in text
    assert "missing19" not in text
    assert "more lines in the log)" in text
    assert error.command in text
    assert "SPLAT_CXXFLAGS" in text
    assert "missing19" in error.log
    assert error.folder is not None
    assert f"source and log: {error.folder}" in text
    assert error.folder.parent == cache_dir
    assert (error.folder / "forward_float32_h64.cpp").read_text() == source
    log = (error.folder / "forward_float32_h64.log").read_text()
    assert log.startswith(error.command)
    assert error.log in log
    assert temporary(cache_dir) == []
    assert cache.ls() == []
    with pytest.raises(CompileError):
        compiler.load("forward_float32_h64", source)


@pytest.mark.parametrize(
    ("script", "reason", "said"),
    [
        ("exit 3", "(exit code 3)", "(it said nothing)"),
        ("kill -SEGV $$", "(ended by signal 11)", "(it said nothing)"),
        ("exit 0", "(it wrote no library)", "(it said nothing)"),
        ("for n in $(seq 30); do echo line $n; done; exit 1", "(exit code 1)", "line 19\n"),
        ("sleep 600", "(it took longer than 0 s)", "(it said nothing)"),
    ],
)
def test_a_compiler_that_fails(
    wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch, cache_dir: Path, script: str, reason: str, said: str
) -> None:
    monkeypatch.setattr(compiler, "TIMEOUT_S", 0.3)
    wrapper.write(script)
    with pytest.raises(CompileError) as caught:
        compiler.build("forward", SOURCE)
    assert reason in str(caught.value)
    assert said in str(caught.value)
    assert temporary(cache_dir) == []
    wrapper.write()
    assert compiler.build("forward", SOURCE).exists()


def test_a_program_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c++").write_bytes(b"\x7fELF nothing")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    assert compiler.find().version == "unknown version"
    with pytest.raises(CompileError, match="it cannot be run: Exec format error"):
        compiler.build("forward", SOURCE)


def test_a_full_temporary_folder(wrapper: Wrapper, cache_dir: Path) -> None:
    wrapper.write('echo "fatal error: error writing to a.s: No space left on device" >&2; exit 1')
    with pytest.raises(
        SplatError, match=r"neither .*/cache \(No space .* nor .*/temporary \(No space left on device\)"
    ):
        compiler.build("forward", SOURCE)
    assert os.listdir(cache_dir) == temporary(cache_dir) == []
    assert len(wrapper.calls) == 2


#: What the compiler makes of it on the way is larger than the disks of the test.
LARGE = SOURCE + 'asm(".data\\n.fill 1000000, 1, 7\\n.text");\n'


@pytest.mark.parametrize("size", ["8k", "32k", "256k"])
def test_a_small_temporary_disk(cache_dir: Path, size: str) -> None:
    """The compiler, real here, finds it full, and no room there to say so."""
    with mounted(cache_dir.parent / "temporary", f"size={size}"):
        assert compiler.load("forward", LARGE).answer() == 42
        assert left(cache_dir) == [cache.ls()[0].key]


def test_small_disks(cache_dir: Path) -> None:
    with mounted(cache_dir, "size=256k"), mounted(cache_dir.parent / "temporary", "size=256k"):
        with pytest.raises(
            SplatError, match=r"neither .*/cache \(No space .* nor .*/temporary \(No space left on device\)"
        ):
            compiler.build("forward", LARGE)
        assert left(cache_dir) == []
        with pytest.raises(CompileError, match="nowhere"):
            compiler.build("forward", "int first = nowhere;\n")


def test_a_noexec_disk(cache_dir: Path) -> None:
    with mounted(cache_dir, "noexec"), pytest.warns(RuntimeWarning, match=r"\(its file system is mounted noexec\)"):
        assert compiler.load("forward", SOURCE).answer() == 42


def test_a_cache_folder_that_cannot_be_written(cache_dir: Path, wrapper: Wrapper) -> None:
    cache_dir.write_text("a file")
    with pytest.warns(RuntimeWarning, match="cannot be kept in .* Set SPLAT_CACHE_DIR") as seen:
        library = compiler.load("forward", SOURCE)
    assert len(seen) == 1
    assert library.answer() == 42
    assert compiler.build("forward", SOURCE).exists()
    assert compiler.build("other", SOURCE).exists()
    assert len(wrapper.calls) == 2


def test_a_library_that_cannot_be_loaded(wrapper: Wrapper) -> None:
    wrapper.write('while [ "$1" != -o ]; do shift; done; echo garbage > "$2"; exit 0')
    with pytest.raises(SplatError, match="cannot be loaded: .*SPLAT_CACHE_DIR"):
        compiler.load("forward", SOURCE)


def test_a_cache_that_is_cleared_before_loading(wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    build, cleared = compiler._build, []

    def clearing(job: compiler._Job) -> Path:
        path = build(job)
        if not cleared:
            cleared.append(cache.clear())
        return path

    monkeypatch.setattr(compiler, "_build", clearing)
    assert compiler.load("forward", SOURCE).answer() == 42
    assert len(wrapper.calls) == 2


# -- interrupted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted(wrapper: Wrapper, cache_dir: Path, tmp_path: Path, how: signal.Signals) -> None:
    wrapper.write(f'echo $$ > "{tmp_path}/id"; sleep 600 & wait')
    process = build_elsewhere()
    wait_for(lambda: (tmp_path / "id").exists() and (tmp_path / "id").read_text().strip())
    group = int((tmp_path / "id").read_text())
    time.sleep(0.3)  # in the moment of its start, a compiler would be left to end by itself
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert err.strip().endswith("KeyboardInterrupt")
        wait_for(lambda: not _runs(group))
        assert os.listdir(cache_dir) == temporary(cache_dir) == []
    else:
        assert process.returncode == -9
        os.killpg(group, signal.SIGKILL)  # nobody is left who could end the compiler before it is done
    wrapper.write()
    assert compiler.load("forward", SOURCE).answer() == 42
    assert os.listdir(cache_dir) == [cache.ls()[0].key]


def _runs(group: int) -> bool:
    """Whether a process of the group is alive; one that has ended may be listed until its parent asks."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
            states += [state] if int(of) == group else []
    return not Path("/proc/self/stat").exists() or bool(set(states) - {"Z"})


# -- progress ----------------------------------------------------------------------------------------------------------


def test_progress(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    compiler.build("silent", SOURCE)
    monkeypatch.setenv("SPLAT_PROGRESS", "1")
    name = compiler.find().name
    compiler.build("forward_float32_h64", SOURCE)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == f"splat: compiling forward float32 H64 with {name} ..."
    assert lines[1].startswith(lines[0])
    assert lines[1].endswith(" s")
    compiler.build("forward_float32_h64", SOURCE)
    assert capfd.readouterr().err == "", "what is there is not announced"
    monkeypatch.setenv("SPLAT_PROGRESS", "yes")
    with pytest.raises(ArgumentError, match="SPLAT_PROGRESS must be 0, 1 or not set, but it is 'yes'"):
        compiler.build("other", SOURCE)


@pytest.mark.parametrize("setting", ["", "0", "1"])
def test_progress_on_a_terminal(wrapper: Wrapper, setting: str) -> None:
    wrapper.write("sleep 0.5")
    ours, theirs = pty.openpty()
    script = f"from splat.codegen.cpp import compiler; compiler.build('backward_h64', {SOURCE!r})"
    env = {**os.environ, "SPLAT_PROGRESS": setting}
    with subprocess.Popen([sys.executable, "-c", script], stderr=theirs, env=env) as process:
        os.close(theirs)
        text = b""
        try:
            while piece := os.read(ours, 1000):
                text += piece
        except OSError:  # the other end is closed
            pass
        os.close(ours)
    assert process.returncode == 0
    start = "splat: compiling backward H64 with my c++ ..."
    lines = text.decode().replace("\r\n", "\n")
    assert lines.count("\n") == {"": 1, "0": 0, "1": 2}[setting]
    assert lines.count(f"\r\x1b[K{start} 0.") == (0 if setting else lines.count(start))
    assert lines.removeprefix("\r\x1b[K").startswith("" if setting == "0" else start)
    assert setting or lines.count("\r") >= 2


def test_what_is_compiled_side_by_side_shares_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("SPLAT_PROGRESS", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("d_query", "g++"):
        with Progress("d_key_value", "g++") as second:
            second.tick()
        terminal.write("|")
    first, then, *_, last = re.sub(r"\d+\.\d s", "N s", terminal.getvalue()).split("\r\x1b[K")[1:]
    assert first == "splat: compiling d query with g++ ... N s"
    assert then == f"{first} (and 1 more)"
    assert last == f"{first}\n"
    assert "splat: compiling d key value with g++ ... N s\n" in re.sub(r"\d+\.\d s", "N s", terminal.getvalue())
