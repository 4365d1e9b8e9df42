"""What tests of the cache of compiled artifacts share: a builder of a small artifact, here and in other processes."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

KEY, OTHER = "0123456789abcdef" * 4, "f" * 64
DATA = bytes(range(256)) * 40


def builder(folder: Path) -> dict[str, str]:
    (folder / "a.so").write_bytes(DATA)
    (folder / "a.cpp").write_text("// source\n")
    (folder / "scratch").mkdir()
    (folder / "scratch" / "log").write_text("not kept")
    return {"compiler": "none"}


def must_not_build(folder: Path) -> dict[str, str]:
    raise AssertionError("built again")


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """The folder on a file system of its own, mounted with these options."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "splat-test", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def python(script: str, *args: object) -> subprocess.Popen[str]:
    """A Python process that runs the script."""
    lines = (
        "import os, sys, time",
        "from pathlib import Path",
        "from splat.codegen import cache, files",
        f"KEY, DATA = {KEY!r}, bytes(range(256)) * 40",
        "def builder(folder):",
        "    (folder / 'a.so').write_bytes(DATA)",
        "    return {}",
        script,
    )
    command = [sys.executable, "-c", "\n".join(lines), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a process that ends with that exit code."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.01)


def left(folder: Path) -> list[str]:
    """What lies in the cache folder and in the folder of temporary files beside it."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(names + [path.name for path in (folder.parent / "temporary").iterdir()])
