"""Every file in examples/ runs as a script, with ``--quick``, and prints something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    if "import torch" in path.read_text():
        pytest.importorskip("torch", reason="PyTorch is not installed")
    done = subprocess.run(
        [sys.executable, str(path), "--quick"], check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"TRITON_INTERPRET": "0", "XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, f"{path.name} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip(), f"{path.name} printed nothing"
