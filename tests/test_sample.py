"""`make test` draws a share of some tests: about so many, and others the next time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.sampling import is_drawn

GRID = "tests/codegen/triton/test_configs.py"


def test_a_share_is_drawn() -> None:
    one, other = ({n for n in range(3000) if is_drawn(sample, 1 / 3, f"test[{n}]")} for sample in ("1", "2"))
    assert 900 < len(one) < 1100
    assert 250 < len(one & other) < 420


def test_collection_follows_it() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", GRID]
    environment = os.environ | {"SPLAT_TEST_SAMPLE": "5"}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert 15 < len(found) < 90
    assert all(is_drawn("5", 1 / 3, test) for test in found)
