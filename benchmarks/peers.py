"""FlexAttention's view of our patterns, which is `splat.bench.flex`, and how long its block masks take to make."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from splat.bench.flex import FLEX_BLOCK, Formula, block_counts, block_mask, flex_area, has_flex, mask_formula
from splat.bench.memory import peak_rss_bytes

__all__ = [
    "FLEX_BLOCK",
    "Formula",
    "block_counts",
    "block_mask",
    "flex_area",
    "flex_planning",
    "has_flex",
    "mask_formula",
    "run_module",
]


def flex_planning(text: str, q_len: int, repetitions: int) -> dict[str, Any]:
    """Milliseconds and peak memory of `create_block_mask`, in a process of its own: {"ms": [...], "peak_bytes": n}."""
    return run_module("benchmarks.peers", text, str(q_len), str(repetitions))


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


def main() -> None:
    parser = argparse.ArgumentParser(description="measure create_block_mask once; used by the planning suite")
    parser.add_argument("text")
    parser.add_argument("q_len", type=int)
    parser.add_argument("repetitions", type=int)
    given = parser.parse_args()
    block_mask(given.text, 256)  # what the first call loads is not the mask's
    before, ms = peak_rss_bytes(), []
    for _ in range(given.repetitions):
        begin = time.perf_counter()
        block_mask(given.text, given.q_len)
        ms.append(1e3 * (time.perf_counter() - begin))
    after = peak_rss_bytes()
    print(json.dumps({"ms": ms, "peak_bytes": None if before is None or after is None else after - before}))


if __name__ == "__main__":
    main()
