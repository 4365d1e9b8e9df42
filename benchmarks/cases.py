"""The registry of patterns, which is `splat.bench.cases`."""

from __future__ import annotations

from splat.bench.cases import CASES, SUITES, Bar, Case, named, of

__all__ = ["CASES", "SUITES", "Bar", "Case", "named", "of"]
