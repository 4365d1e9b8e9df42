"""Operations on values as JAX would send them to a GPU: cases for `lowering.report`, like `attention_lowering`."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp

import splat
from splat.codegen.triton.emit import IMPLEMENTATION
from tests.codegen.triton.lowering import KernelCall, lower, main

BATCH, LENGTH, HEAD_DIM = 3, 2048, 64

PATTERNS = {"window": "causal() & window(512, 0)", "several": "causal() & (window(256, 0) | strided(64))"}


def attend(text: str, *, dtype: Any = jnp.bfloat16, compute_capability: int = 90) -> list[KernelCall]:
    """Scores, weights, their sums with values, and the transposed product: each operation once."""
    acsr = splat.build(splat.parse(text), LENGTH)
    dense = jax.ShapeDtypeStruct((BATCH, LENGTH, HEAD_DIM), dtype)

    def run(q: Any, k: Any, v: Any) -> Any:
        weights = IMPLEMENTATION.softmax(acsr, IMPLEMENTATION.sddmm(acsr, q, k))
        return IMPLEMENTATION.spmm(acsr, weights, v), IMPLEMENTATION.spmm_transposed(acsr, weights, q)

    return lower(run, dense, dense, dense, compute_capability=compute_capability)


CASES = {
    "window": lambda: attend(PATTERNS["window"]),
    "several": lambda: attend(PATTERNS["several"]),
    "ampere": lambda: attend(PATTERNS["window"], compute_capability=80),
    "float32": lambda: attend(PATTERNS["window"], dtype=jnp.float32),
}

if __name__ == "__main__":
    main(CASES, sys.argv[1:])
