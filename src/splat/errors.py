"""Every exception SPLAT raises on purpose, and how it warns.

A message names the argument, what was expected, what was given and the remedy.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path


class SplatError(Exception):
    """Base of all SPLAT errors."""


class ArgumentError(SplatError, ValueError):
    """An argument has a wrong value, shape or dtype."""


class PatternError(ArgumentError):
    """A pattern is malformed, or does not fit the lengths it is used with."""


class ParseError(PatternError):
    """A pattern expression cannot be read."""


class IrregularPatternError(PatternError):
    """A pattern, or the result of set algebra, needs too many affine components.

    Attributes:
      row: the row that needs most runs, or None where the components rather than one row are too many.
      runs: how many runs that row (or how many components the pattern) needs.
    """

    def __init__(self, message: str, *, row: int | None = None, runs: int | None = None):
        super().__init__(message)
        self.row = row
        self.runs = runs


class UnsupportedError(SplatError, NotImplementedError):
    """The request is meaningful, but no (or not the named) implementation can serve it."""


class CompileError(SplatError):
    """The system's C++ compiler did not make a library of generated source.

    Attributes:
      command: what was run, as a shell reads it.
      log: everything that the compiler said.
      folder: where source and log are kept; None where they could be written nowhere.
    """

    # Defaults, because an exception is copied by its message alone, and given its attributes after that.
    def __init__(self, message: str, *, command: str = "", log: str = "", folder: Path | None = None):
        super().__init__(message)
        self.command = command
        self.log = log
        self.folder = folder


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the user's line: the nearest that is neither SPLAT's nor of what calls SPLAT."""
    warnings.warn(message, category, stacklevel=_users_level())


def _users_level() -> int:
    frame, level = sys._getframe(1), 1
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _CALLERS:
            return level
        frame, level = frame.f_back, level + 1
    return 2  # in a thread that compiles side by side with others


_CALLERS = {"splat", "jax", "torch", "concurrent", "threading"}
