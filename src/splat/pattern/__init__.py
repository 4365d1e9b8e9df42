"""Patterns: sets of (query, key) pairs as expressions, evaluated to affine runs in closed form."""

from splat.pattern.core import Axis, Pattern, Run
from splat.pattern.data import from_csr, from_mask, from_runs
from splat.pattern.grids import neighborhood, random_blocks
from splat.pattern.heads import PerHead, key_heads, per_head
from splat.pattern.library import (
    blocked,
    causal,
    dilated_window,
    full,
    global_columns,
    global_rows,
    global_tokens,
    lattice_columns,
    segments,
    sink,
    sliding_window,
    strided,
    window,
)
from splat.pattern.parse import parse

__all__ = [
    "Axis",
    "Pattern",
    "PerHead",
    "Run",
    "blocked",
    "causal",
    "dilated_window",
    "from_csr",
    "from_mask",
    "from_runs",
    "full",
    "global_columns",
    "global_rows",
    "global_tokens",
    "key_heads",
    "lattice_columns",
    "neighborhood",
    "parse",
    "per_head",
    "random_blocks",
    "segments",
    "sink",
    "sliding_window",
    "strided",
    "window",
]
