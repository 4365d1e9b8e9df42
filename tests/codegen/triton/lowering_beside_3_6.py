"""`lowering`, where a program has imported jax-triton beside a Triton that lacks what 3.6 lacks."""

from __future__ import annotations

import sys

import triton.backends.nvidia.driver as driver

from tests.codegen.triton.lowering import CASES, main

if __name__ == "__main__":
    if hasattr(driver, "TMA_TF32"):
        delattr(driver, "TMA_TF32")
    import jax_triton  # noqa: F401  # before SPLAT does

    main(CASES, sys.argv[1:])
