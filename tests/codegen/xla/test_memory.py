"""Sequences whose scores no machine could hold."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

#: Of the whole process: Python, JAX, 0.54 GB of arrays, and what the call needs. All scores would be 137 GB.
MOST_BYTES = 1.5e9

LONG_CALL = """
import jax, numpy as np, splat
from splat.bench.memory import peak_rss_bytes
given = [np.ones((1, 65536, 8, 64), np.float32) for _ in range(3)]
given = [jax.device_put(given.pop()) for _ in range(3)]
out = jax.jit(lambda q, k, v: splat.attention(q, k, v, splat.window(256), implementation="xla"))(*given)
assert abs(float(out.mean()) - 1) < 1e-5
print(peak_rss_bytes() or 0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory as Linux counts it")
def test_65536_positions_need_little_memory() -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", LONG_CALL], env=environment, capture_output=True, text=True, check=True
    )
    assert 0.5e9 < int(done.stdout) < MOST_BYTES
