"""Finding and running the system's C++ compiler, on sources of one line; what builds again, and what does not."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from splat.codegen import cache
from splat.codegen.cpp import compiler
from splat.errors import ArgumentError, UnsupportedError
from tests.codegen.cpp.compiling import EXPORTED, REAL, SOURCE, Wrapper, build_elsewhere, temporary

pytestmark = [
    pytest.mark.skipif(REAL is None, reason="no C++ compiler is installed here"),
    pytest.mark.usefixtures("fresh"),
]


# -- what it is for ----------------------------------------------------------------------------------------------------


def test_load(cache_dir: Path) -> None:
    library = compiler.load("forward_float32_h64", SOURCE)
    assert library.answer() == 42
    assert compiler.load("forward_float32_h64", SOURCE) is library
    [entry] = cache.ls()
    assert entry.name == "forward_float32_h64"
    assert sorted(entry.files) == ["forward_float32_h64.cpp", "forward_float32_h64.so"]
    assert (entry.folder / "forward_float32_h64.cpp").read_text() == SOURCE
    assert entry.info["compiler"] == compiler.find().version
    assert "-O2" in entry.info["command"]
    assert float(entry.info["seconds"]) > 0
    assert os.listdir(cache_dir) == [entry.key]
    assert temporary(cache_dir) == []


def test_what_is_not_exported_is_hidden() -> None:
    library = compiler.load("hidden", f'extern "C" int inner() {{ return 1; }}\n{SOURCE}')
    assert library.answer() == 42
    with pytest.raises(AttributeError):
        library.inner  # noqa: B018


def test_headers_can_be_included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "ours.hpp").write_text("#pragma once\nconstexpr int forty = 40;\n")
    monkeypatch.setattr(compiler, "INCLUDE", tmp_path / "include")
    # XLA's interface is there wherever jaxlib is.
    source = '#include "ours.hpp"\n#include "xla/ffi/api/c_api.h"\n#include <immintrin.h>\n'
    source = source if os.uname().machine == "x86_64" else source.replace("#include <immintrin.h>\n", "")
    assert compiler.load("included", f"{source}{EXPORTED} answer() {{ return forty + 2; }}\n").answer() == 42


def test_a_second_process_finds_it(wrapper: Wrapper) -> None:
    path = compiler.build("forward", SOURCE)
    out, err = build_elsewhere().communicate(timeout=120)
    assert (out.strip(), err) == (str(path), "")
    assert len(wrapper.calls) == 1


def test_processes_that_want_one_source(wrapper: Wrapper) -> None:
    wrapper.write("sleep 0.5")
    processes = [build_elsewhere() for _ in range(2)]
    found = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert len(found) == 1
    assert ctypes.CDLL(found.pop()).answer() == 42
    assert len(wrapper.calls) == 1


def test_threads_that_want_one_source(wrapper: Wrapper) -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(compiler.load("forward", SOURCE))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(map(id, found))) == 1
    assert len(wrapper.calls) == 1


@pytest.mark.parametrize(("name", "file"), [("../../x y", "_.._x_y.so"), ("", "kernel.so"), ("-o", "o.so")])
def test_a_name_becomes_a_file_name(name: str, file: str) -> None:
    assert compiler.build(name, SOURCE).name == file


def test_folders_with_spaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPLAT_CACHE_DIR", str(tmp_path / "a b'c"))
    assert compiler.load("forward", SOURCE).answer() == 42


# -- what builds again -------------------------------------------------------------------------------------------------


def test_a_truncated_library_is_built_again(wrapper: Wrapper) -> None:
    path = compiler.build("forward", SOURCE)
    assert compiler.build("forward", SOURCE) == path
    os.truncate(path, 1000)
    assert compiler.load("forward", SOURCE).answer() == 42
    assert len(wrapper.calls) == 2


def test_an_upgraded_compiler_builds_again(wrapper: Wrapper) -> None:
    first = compiler.build("forward", SOURCE)
    wrapper.write(version="Mine 2.0")
    assert compiler.find().version == "Mine 2.0"
    assert compiler.build("forward", SOURCE) != first
    assert len(wrapper.calls) == 2
    assert {entry.info["compiler"] for entry in cache.ls()} == {"Mine 1.0", "Mine 2.0"}


def test_other_flags_build_again(wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"{EXPORTED} answer() {{ return ANSWER; }}\n"
    for value in (1, 2, 1):
        monkeypatch.setenv("SPLAT_CXXFLAGS", f"-DANSWER={value} '-DTEXT=a b'")
        assert compiler.load("forward", source).answer() == value
    assert len(wrapper.calls) == 2
    assert wrapper.calls[0].endswith("-DANSWER=1 -DTEXT=a b"), "the user's flags come last"


def test_other_headers_build_again(wrapper: Wrapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = tmp_path / "include" / "deep" / "value.hpp"
    header.parent.mkdir(parents=True)
    monkeypatch.setattr(compiler, "INCLUDE", tmp_path / "include")
    source = f'#include "deep/value.hpp"\n{EXPORTED} answer() {{ return VALUE; }}\n'
    for value in (7, 18, 7):
        header.write_text(f"#define VALUE {value}\n")
        assert compiler.load("forward", source).answer() == value
    assert len(wrapper.calls) == 2


def test_another_processor_builds_again(wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler.processor()
    first = compiler.build("forward", SOURCE)
    monkeypatch.setattr(compiler, "processor", lambda: "another")
    assert compiler.build("forward", SOURCE) != first


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names an instruction set of x86")
def test_an_instruction_set_of_the_users_choice(wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLAT_CXXFLAGS", "-march=x86-64-v2")
    first = compiler.build("forward", SOURCE)
    assert "native" not in wrapper.calls[0]
    monkeypatch.setattr(compiler, "processor", lambda: "another")
    assert compiler.build("forward", SOURCE) == first, "it runs on every processor that has the instruction set"
    monkeypatch.setenv("SPLAT_CXXFLAGS", "-march=native")
    assert compiler.build("forward", SOURCE) != first
    assert wrapper.calls[1].count("=native") == 1


def test_the_keys_parts_do_not_run_into_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for name, source in (("a", "b"), ("ab", ""), ("", "ab"), ("a", "b\n")):
        keys.add(compiler._job(name, source).key)
    assert len(keys) == 4


# -- which compiler ----------------------------------------------------------------------------------------------------


def test_missing_starts_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which asks for the compiler's version."""
    assert compiler.missing() is None
    monkeypatch.setattr(subprocess, "Popen", None)
    assert compiler.missing() is None


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("g++ (Ubuntu 9.4.0-1ubuntu1~20.04.2) 9.4.0", False),
        ("x86_64-linux-gnu-g++-8 (GCC) 8.5.0 20210514 (Red Hat 8.5.0-20)", False),
        ("c++ (GCC) 10.2.1 20210130", True),
        ("g++ (Debian 12.2.0-14+deb12u1) 12.2.0", True),
        ("Debian clang version 9.0.1", True),
        ("Mine 1.0", True),
    ],
)
def test_old_compilers_are_missing(version: str, fits: bool, wrapper: Wrapper) -> None:
    """gcc 9 has not all that the headers are written with: there other implementations serve."""
    wrapper.write(version=version)
    said = compiler.missing()
    assert (said is None) == fits
    if said is not None:
        assert said.startswith(f"the C++ compiler is {version}, but gcc 10 or newer is needed. Install a compiler (")
        with pytest.raises(UnsupportedError, match="gcc 10 or newer is needed"):
            compiler.load("forward", SOURCE)


def test_a_forked_child_waits_for_nobody(cache_dir: Path) -> None:
    """What the parent's threads compile, the child compiles or finds by itself."""
    script = f"""
import os, signal
from splat.codegen.cpp import compiler
job = compiler._job("forward", {SOURCE!r})
with compiler._one_key.setdefault(job.key, compiler.threading.Lock()):
    child = os.fork()
    if not child:
        signal.alarm(60)
        os._exit(compiler.load("forward", {SOURCE!r}).answer())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"


def test_trial(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler.trial(compiler.find()) is None
    assert temporary(cache_dir) == []
    assert not cache_dir.exists(), "nothing is kept"
    remedy = "Set CXX to a C++ compiler, and check SPLAT_CXXFLAGS."
    monkeypatch.setenv("CXX", "true")
    assert compiler.trial(compiler.find()) == (
        f"three lines of C++ cannot be compiled (it wrote no library): (it said nothing). {remedy}"
    )
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("SPLAT_CXXFLAGS", "-std=c++5")
    said = compiler.trial(compiler.find()) or ""
    assert said.startswith("three lines of C++ cannot be compiled (exit code 1): ")
    assert "c++5" in said
    assert said.endswith(f". {remedy}")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = compiler.missing()
    assert said == (
        "no C++ compiler (c++, g++ or clang++) is on the PATH. Install a compiler (Debian, Ubuntu: apt install g++; "
        "conda: conda install -c conda-forge cxx-compiler; macOS: xcode-select --install), or set CXX to one."
    )
    for call in (compiler.find, lambda: compiler.build("forward", SOURCE), lambda: compiler.load("forward", SOURCE)):
        with pytest.raises(UnsupportedError) as caught:
            call()
        assert str(caught.value) == said


def test_candidates_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for n, name in enumerate(compiler.CANDIDATES):
        folder = tmp_path / str(n)
        folder.mkdir()
        for other in compiler.CANDIDATES[n:]:
            Wrapper(folder).path.rename(folder / other)
        monkeypatch.setenv("PATH", str(folder))
        assert compiler.find().name == name
    monkeypatch.setenv("PATH", str(tmp_path / "0"))
    monkeypatch.setenv("CXX", "g++")
    assert compiler.find().command == (str(tmp_path / "0" / "g++"),)


def test_a_compiler_that_comes_and_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(2):
        assert "no C++ compiler" in (compiler.missing() or "")
        Wrapper(tmp_path).path.rename(tmp_path / "g++")
        assert compiler.missing() is None
        (tmp_path / "g++").unlink()


def test_a_compiler_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call asks whether there is one."""
    assert compiler.missing() is None
    monkeypatch.setattr(compiler.shutil, "which", None)
    assert compiler.missing() is None


def test_cxx_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/c++ -m64")
    said = compiler.missing()
    assert said is not None
    assert said.startswith("CXX is '/no/such/c++ -m64', but there is no program '/no/such/c++'. Install a compiler (")
    monkeypatch.setenv("CXX", "")
    assert compiler.missing() is None


def test_cxx_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "'g++ -O3")
    assert (compiler.missing() or "").startswith('CXX must be words as a shell reads them, but "\'g++ -O3" was given')
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("SPLAT_CXXFLAGS", "'-O3")
    with pytest.raises(ArgumentError, match="SPLAT_CXXFLAGS must be words as a shell reads them"):
        compiler.build("forward", SOURCE)


def test_cxx_with_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{REAL} -DANSWER=43")
    assert compiler.load("forward", f"{EXPORTED} answer() {{ return ANSWER; }}\n").answer() == 43
    assert compiler.find().command[1:] == ("-DANSWER=43",)


def test_what_macos_has_in_the_place_of_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler.sys, "platform", "darwin")
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert compiler._is_stub("/usr/bin/c++")
    assert not compiler._is_stub("/opt/bin/c++")
    monkeypatch.setattr(os.path, "exists", lambda path: path.startswith("/Library/Developer"))
    assert not compiler._is_stub("/usr/bin/c++")


def test_a_compiler_that_does_not_know_native(wrapper: Wrapper) -> None:
    wrapper.write('case "$*" in *=native*) echo "error: unknown value native" >&2; exit 1;; esac')
    assert compiler.load("forward", SOURCE).answer() == 42
    assert "native" not in wrapper.calls[-1]
    calls = len(wrapper.calls)
    compiler.build("other", SOURCE)
    assert len(wrapper.calls) == calls + 1, "it is asked once"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="which flag comes first differs")
def test_a_compiler_that_wants_mcpu(wrapper: Wrapper) -> None:
    wrapper.write('case "$*" in *-march=native*) echo "error: unknown value native" >&2; exit 1;; esac')
    assert compiler.load("forward", SOURCE).answer() == 42
    assert "-mcpu=native" in wrapper.calls[-1]
