"""What tests may be required not to be skipped for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable


def missing(required: list[str]) -> list[str]:
    """A sentence for each that is not here."""
    from splat.codegen.cpp import compiler

    def package(name: str) -> str | None:
        return None if importlib.util.find_spec(name) else f"install the package {name}"

    checks: dict[str, Callable[[], str | None]] = {
        "cpp": compiler.missing,
        "triton": lambda: package("triton"),
        "torch": lambda: package("torch"),
    }
    out = []
    for name in required:
        if name not in checks:
            out.append(f"SPLAT_TEST_REQUIRE must name some of {', '.join(checks)}, but {name!r} was given")
        elif reason := checks[name]():
            out.append(f"SPLAT_TEST_REQUIRE names {name}, which is missing: {reason.rstrip('.')}. Or require less.")
    return out
