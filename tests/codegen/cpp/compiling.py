"""What tests of the C++ compiler share: a source of one line, a script in the compiler's place, another process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from splat.codegen.cpp import compiler

EXPORTED = 'extern "C" __attribute__((visibility("default"))) int'
SOURCE = f"{EXPORTED} answer() {{ return 42; }}\n"
REAL = next(filter(None, map(shutil.which, compiler.CANDIDATES)), None)


class Wrapper:
    """A script that stands for the compiler, and writes down with which arguments it is called to compile."""

    def __init__(self, folder: Path):
        self.path = folder / "my c++"
        self.log = folder / "calls"
        self.write()

    def write(self, before: str = "", version: str = "Mine 1.0") -> None:
        self.path.write_text(
            f"#!/bin/sh\nif [ \"$1\" = --version ]; then echo '{version}'; exit; fi\n"
            f'echo "$@" >> "{self.log}"\n{before}\nexec {REAL} "$@"\n'
        )
        self.path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def build_elsewhere(name: str = "forward", source: str = SOURCE, **more: str) -> subprocess.Popen[str]:
    """A process that builds the source and prints the library's path."""
    script = (
        "import signal, sys\nfrom splat.codegen.cpp import compiler\n"
        # A shell's background jobs ignore it, and so do the processes they start.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "path = compiler.build(*sys.argv[1:])\n"
        "assert 'jax' not in sys.modules and 'jaxlib' not in sys.modules\n"
        "print(path)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, name, source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **more},
    )  # fmt: skip


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.01)


def temporary(cache_dir: Path) -> list[str]:
    return os.listdir(cache_dir.parent / "temporary")
