"""`import splat` loads NumPy and nothing else, and leaves no trace on the disk."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import splat

HEAVY = {"jax", "jaxlib", "torch", "triton", "matplotlib", "rich", "typer", "scipy"}

# Reports what `import splat` loaded, and what it opened for writing, made, renamed or started meanwhile.
PROBE = """
import json, os, sys
before = set(sys.modules)
traces = []
def hook(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        traces.append(f"open {args[0]}")
    elif event in {"os.mkdir", "os.rename", "os.symlink", "subprocess.Popen", "os.system", "socket.connect"}:
        traces.append(f"{event} {args[:1]}")
sys.addaudithook(hook)
import splat
traces = list(traces)
loaded = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
json.dump({"loaded": loaded, "traces": traces}, sys.stdout)
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the probe reports, run in an empty folder that is also its home, cache and temporary folder."""
    folder = tmp_path_factory.mktemp("empty")
    source = Path(splat.__file__).parents[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SPLAT_", "XDG_"))}
    env |= {"HOME": str(folder), "TMPDIR": str(folder), "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE],
        check=False,
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    report["files"] = sorted(path.name for path in folder.iterdir())
    return report


def test_import_loads_no_heavy_module(probe: dict[str, Any]) -> None:
    assert not HEAVY & set(probe["loaded"])


def test_import_loads_numpy_at_most(probe: dict[str, Any]) -> None:
    assert "splat" in probe["loaded"]
    third_party = {name for name in probe["loaded"] if name not in sys.stdlib_module_names}
    assert third_party <= {"splat", "numpy"}


def test_import_leaves_no_trace(probe: dict[str, Any]) -> None:
    assert probe["traces"] == []
    assert probe["files"] == []


def test_version_is_the_installed_one() -> None:
    installed = importlib.metadata.version("splat-attention")
    assert splat.__version__ == installed, "the version changed after the installation: `touch pyproject.toml`, `make`"
