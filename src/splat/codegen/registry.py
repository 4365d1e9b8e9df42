"""Which implementations there are, in order of preference, and how one is chosen."""

from __future__ import annotations

import dataclasses
import importlib

from splat.codegen.base import Implementation, Missing, Request
from splat.errors import ArgumentError, UnsupportedError, warn

#: name -> module that holds `IMPLEMENTATION`, in order of preference.
_MODULES = {"triton": "splat.codegen.triton.emit", "cpp": "splat.codegen.cpp.emit", "xla": "splat.codegen.xla"}

NAMES = tuple(_MODULES)

_said: set[str] = set()


def load(name: str) -> Implementation:
    """The implementation of that name. Raises ArgumentError for an unknown one."""
    if not isinstance(name, str) or name not in _MODULES:
        raise ArgumentError(
            f"implementation must be None or one of {', '.join(map(repr, NAMES))}, but {name!r} was given. None picks "
            "the best that can serve."
        )
    return importlib.import_module(_MODULES[name]).IMPLEMENTATION


def refusals(request: Request) -> dict[str, str | None]:
    """For every implementation, why it cannot serve the request; None where it can."""
    out: dict[str, str | None] = {}
    for name in _MODULES:
        try:
            out[name] = load(name).refusal(request)
        except ImportError as error:
            out[name] = str(error)
    return out


def choose(request: Request, name: str | None = None) -> Implementation:
    """The implementation named, or the best that can serve; an explicit choice is never replaced by another.

    Raises UnsupportedError with every reason where none can.
    """
    if name is not None:
        implementation = load(name)
        reason = implementation.refusal(dataclasses.replace(request, named=True))
        if reason:
            raise UnsupportedError(f"implementation={name!r} cannot serve this call: {reason}")
        return implementation
    reasons = refusals(request)
    missing = None
    for candidate, reason in reasons.items():
        if reason is None:
            if missing:
                _say_once(*missing, candidate)
            return load(candidate)
        if missing is None and isinstance(reason, Missing):
            missing = candidate, reason
    listed = "\n".join(f"  {candidate}: {reason}" for candidate, reason in reasons.items())
    raise UnsupportedError(f"no implementation can serve this call:\n{listed}")


def _say_once(name: str, reason: Missing, chosen: str) -> None:
    """That a slower implementation serves, because something is not installed."""
    if name not in _said:
        _said.add(name)
        warn(
            f"implementation={chosen!r} serves; {name!r} would be faster: {reason} To go on without it, say "
            f"implementation={chosen!r}."
        )
