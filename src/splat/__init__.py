"""SPLAT: a compiler for regular sparse attention."""

__version__ = "0.1.0"
