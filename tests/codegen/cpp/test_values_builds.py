"""Operations on values as other builds: watched by sanitizers, and for processors that this one can stand for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from splat.codegen.cpp import compiler
from tests.codegen.cpp.test_builds import PROCESSORS, SANITIZERS, can_run, sanitized

pytestmark = pytest.mark.skipif(
    compiler.missing() is not None, reason=f"nothing can be compiled here: {compiler.missing()}"
)

__all__ = ["sanitized"]


def check(environment: dict[str, str], rng: np.random.Generator) -> None:
    command = [sys.executable, "-m", "tests.codegen.cpp.values_check", str(rng.integers(1 << 31))]
    variables = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(
        command, check=False, cwd=Path(__file__).parents[3], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_sanitizers_have_no_complaint(sanitized: dict[str, str], rng: np.random.Generator) -> None:
    check(sanitized | {"SPLAT_CXXFLAGS": SANITIZERS}, rng)


@pytest.mark.parametrize("flags", PROCESSORS)
def test_processors(flags: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    can_run(flags, monkeypatch)
    check({"SPLAT_CXXFLAGS": flags}, rng)
