"""Exceptions reach other processes whole: pools pickle them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from splat import errors

ALL = [
    errors.ArgumentError("a"),
    errors.PatternError("b"),
    errors.ParseError("c"),
    errors.IrregularPatternError("d", row=3, runs=9),
    errors.UnsupportedError("e"),
    errors.CompileError("f", command="c++ f.cpp", log="no", folder=Path("kept")),
    errors.CompileError("g", command="c++", log="", folder=None),
]


def test_none_is_missing() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SplatError)}
    assert {type(error) for error in ALL} | {errors.SplatError} == kinds


@pytest.mark.parametrize("error", ALL, ids=lambda error: f"{type(error).__name__} {error}")
def test_copies(error: errors.SplatError) -> None:
    for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(copied) is type(error)
        assert str(copied) == str(error)
        assert vars(copied) == vars(error)
