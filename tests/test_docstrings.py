"""The examples in docstrings do what they say. Those of `splat.torch` are in tests/torch."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
TEXTS = {path: path.read_text(encoding="utf-8") for path in sorted((SRC / "splat").rglob("*.py"))}
FILES = [path for path, text in TEXTS.items() if "\n    >>> " in text and "+SKIP" not in text]
MODULES = [".".join(path.relative_to(SRC).with_suffix("").parts) for path in FILES if "torch" not in path.parts]


def test_there_are_examples() -> None:
    assert {"splat.ops.attention", "splat.ops.values", "splat.ops.inspect", "splat.pattern.core"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    done = doctest.testmod(importlib.import_module(name))
    assert done.attempted
    assert not done.failed
