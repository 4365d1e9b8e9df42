"""What needs a process of its own: `python -m benchmarks.cpu.child {first,threads} ...`. The last line is JSON."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from typing import Any


def first(case: Any, direction: str) -> dict[str, float]:
    """Seconds of the first call in this process, with nothing compiled before, and of a warm one."""
    with tempfile.TemporaryDirectory(prefix="splat-bench-") as folder:
        os.environ["SPLAT_CACHE_DIR"] = folder
        import jax
        import jax.numpy as jnp

        import splat
        from benchmarks.cpu import jax_side

        query, key, value, _ = jax_side.inputs(case)
        jax.block_until_ready(jnp.ones(8) + 1)
        pattern = splat.parse(case.text)

        def attention(q: Any, k: Any, v: Any) -> Any:
            return splat.attention(q, k, v, pattern, implementation="cpp")

        gradient = jax.grad(lambda q, k, v: attention(q, k, v).astype("float32").sum(), argnums=(0, 1, 2))
        function = attention if direction == "forward" else gradient
        seconds = []
        for _ in range(6):
            begin = time.perf_counter()
            jax.block_until_ready(function(query, key, value))
            seconds.append(time.perf_counter() - begin)
    return {"first_s": seconds[0], "warm_s": statistics.median(seconds[1:])}


def threads(case: Any, cores: list[int], calls: int) -> dict[str, Any]:
    """Milliseconds of each call on these processors alone."""
    os.sched_setaffinity(0, cores)
    from benchmarks.cpu import clock, jax_side

    turns = clock.take_turns({"ours": jax_side.ready(case)}, calls, 5.0)
    return turns.to_json()


def main() -> None:
    parser = argparse.ArgumentParser(description="measure in a fresh process; used by the cpu suite")
    parser.add_argument("what", choices=("first", "threads"))
    parser.add_argument("text")
    parser.add_argument("q_len", type=int)
    parser.add_argument("head_dim", type=int)
    parser.add_argument("dtype")
    parser.add_argument("--direction", choices=("forward", "gradients"), default="forward")
    parser.add_argument("--cores", type=int, nargs="+", default=[])
    parser.add_argument("--calls", type=int, default=21)
    given = parser.parse_args()
    from benchmarks.cpu.setting import Case

    case = Case(given.text, given.q_len, given.head_dim, given.dtype)
    if given.what == "first":
        result = first(case, given.direction)
    else:
        result = threads(case, given.cores, given.calls)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
