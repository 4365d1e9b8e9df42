"""SPLAT: a compiler for regular sparse attention.

    import splat
    p   = splat.causal() & splat.window(512) | splat.sink(4)
    out = splat.attention(q, k, v, p)          # q [B, T, N, H], k and v [B, S, K, H], as jax.nn.dot_product_attention

Importing this package touches no device and imports no framework; JAX is imported when an operation is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from splat.errors import (
    ArgumentError,
    IrregularPatternError,
    ParseError,
    PatternError,
    SplatError,
    UnsupportedError,
)
from splat.pattern import (
    Pattern,
    blocked,
    causal,
    dilated_window,
    from_csr,
    from_mask,
    from_runs,
    full,
    global_columns,
    global_rows,
    global_tokens,
    lattice_columns,
    neighborhood,
    parse,
    per_head,
    random_blocks,
    segments,
    sink,
    sliding_window,
    strided,
    window,
)

if TYPE_CHECKING:
    from splat.acsr import ACSR, build
    from splat.ops import attention, dot_product_attention, emit, plan, sddmm, softmax, spmm, spmm_transposed
    from splat.planning import Plan

__version__ = "0.1.0"

_LAZY = {
    "ACSR": "splat.acsr",
    "Plan": "splat.planning",
    "attention": "splat.ops",
    "build": "splat.acsr",
    "dot_product_attention": "splat.ops",
    "emit": "splat.ops",
    "plan": "splat.ops",
    "sddmm": "splat.ops",
    "softmax": "splat.ops",
    "spmm": "splat.ops",
    "spmm_transposed": "splat.ops",
}

__all__ = [
    "ACSR",
    "ArgumentError",
    "IrregularPatternError",
    "ParseError",
    "Pattern",
    "PatternError",
    "Plan",
    "SplatError",
    "UnsupportedError",
    "attention",
    "blocked",
    "build",
    "causal",
    "dilated_window",
    "dot_product_attention",
    "emit",
    "from_csr",
    "from_mask",
    "from_runs",
    "full",
    "global_columns",
    "global_rows",
    "global_tokens",
    "lattice_columns",
    "neighborhood",
    "parse",
    "per_head",
    "plan",
    "random_blocks",
    "sddmm",
    "segments",
    "sink",
    "sliding_window",
    "softmax",
    "spmm",
    "spmm_transposed",
    "strided",
    "window",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'splat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
