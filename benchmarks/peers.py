"""FlexAttention's view of our patterns, which is `splat.bench.flex`, and measuring in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from splat.bench.flex import FLEX_BLOCK, Formula, block_counts, block_mask, flex_area, has_flex, mask_formula

__all__ = [
    "FLEX_BLOCK",
    "Formula",
    "block_counts",
    "block_mask",
    "flex_area",
    "has_flex",
    "mask_formula",
    "run_module",
]


def run_module(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m module arguments` prints, as JSON; its own process, so that its memory is its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
