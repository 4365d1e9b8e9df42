"""Which implementations there are, in order of preference, and how one is chosen."""

from __future__ import annotations

import dataclasses
import importlib

from splat.codegen.base import Implementation, Request
from splat.errors import ArgumentError, UnsupportedError

#: name -> module that holds `IMPLEMENTATION`; the first that can serve is chosen. None: named, but not in this version.
_MODULES: dict[str, str | None] = {"triton": "splat.codegen.triton.emit", "cpp": None, "xla": "splat.codegen.xla"}

NAMES = tuple(_MODULES)

MISSING = "not part of this version of splat-attention"


def load(name: str) -> Implementation:
    """The implementation of that name. Raises ArgumentError for an unknown, UnsupportedError for a missing one."""
    if name not in _MODULES:
        raise ArgumentError(
            f"implementation must be None or one of {', '.join(map(repr, NAMES))}, but {name!r} was given. None picks "
            "the best that can serve."
        )
    module = _MODULES[name]
    if module is None:
        raise UnsupportedError(
            f"implementation={name!r} is {MISSING}. Use implementation='xla', which serves everywhere, or None."
        )
    return importlib.import_module(module).IMPLEMENTATION


def refusals(request: Request) -> dict[str, str | None]:
    """For every implementation, why it cannot serve the request; None where it can."""
    out: dict[str, str | None] = {}
    for name, module in _MODULES.items():
        try:
            out[name] = MISSING if module is None else load(name).refusal(request)
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
    for candidate, reason in reasons.items():
        if reason is None:
            return load(candidate)
    listed = "\n".join(f"  {candidate}: {reason}" for candidate, reason in reasons.items())
    raise UnsupportedError(f"no implementation can serve this call:\n{listed}")
