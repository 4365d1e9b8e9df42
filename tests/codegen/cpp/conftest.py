"""Fixtures of the tests of the C++ compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from splat.codegen.cpp import compiler
from tests.codegen.cpp.compiling import Wrapper


@pytest.fixture
def fresh(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process, with an empty cache."""
    monkeypatch.setattr(compiler, "_loaded", {})
    monkeypatch.setattr(compiler, "_refused", set())


@pytest.fixture
def wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wrapper:
    """What CXX names."""
    made = Wrapper(tmp_path)
    monkeypatch.setenv("CXX", f"'{made.path}'")
    return made
