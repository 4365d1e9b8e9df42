"""What every test relies on: JAX on the CPU unless told otherwise, hypothesis profiles, fresh random input.

Settings, all environment variables:

- ``SPLAT_TEST_PROFILE``: the hypothesis profile, ``ci`` (default) or ``dev`` (more examples of each property).
- ``SPLAT_TEST_SEED``: the seed of the ``rng`` fixture, to repeat a failure; a failing test prints the one it had.
- ``SPLAT_TEST_SAMPLE``: of tests marked `sampled`, only a share is run, drawn by this number (``new``: by another one
  each time, which the report's header shows). Not set or empty: all are run. ``make test`` sets it, ``make test-all``
  does not.
- ``SPLAT_TEST_REQUIRE``: of ``cpp triton torch``, what must be here: nothing is tested where a test would be skipped
  for the lack of it. CI requires all three.
- ``JAX_PLATFORMS``: as JAX reads it; ``cpu`` where it is not set.
- ``XLA_FLAGS``: as XLA reads it; where it is not set, XLA compiles without optimising, which most tests wait for.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports jax
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton; what compiles does so in a subprocess

import numpy as np
import pytest
from hypothesis import settings

from tests.requirements import missing
from tests.sampling import is_drawn

# Failing assertions of the shared suite show their values, as those of test files do.
pytest.register_assert_rewrite("tests.attention_suite", "tests.score_mod_suite")

settings.register_profile("ci", max_examples=25, deadline=None, derandomize=False, print_blob=True)
settings.register_profile("dev", max_examples=200, deadline=None, derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("SPLAT_TEST_PROFILE", "ci"))


@pytest.fixture
def rng() -> np.random.Generator:
    """A random generator with a fresh seed, which pytest shows where the test fails."""
    chosen = os.environ.get("SPLAT_TEST_SEED")
    seed = int(chosen) if chosen else secrets.randbits(32)
    print(f"rng: repeat with SPLAT_TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of compiled kernels, and a temporary folder beside it, of this test and its subprocesses.

    Tests that do not ask for it find what earlier runs have compiled.
    """
    from splat.codegen import cache

    temporary, folder = tmp_path / "temporary", tmp_path / "cache"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(cache, "_private", {})
    monkeypatch.setenv("SPLAT_CACHE_DIR", str(folder))
    for name in ("SPLAT_CXXFLAGS", "SPLAT_PROGRESS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return folder


def pytest_configure() -> None:
    """Raises UsageError where something that is required is missing. Draws the sample, for all processes."""
    if os.environ.get("SPLAT_TEST_SAMPLE") == "new":
        os.environ["SPLAT_TEST_SAMPLE"] = str(secrets.randbits(32))
    required = os.environ.get("SPLAT_TEST_REQUIRE", "").split()
    if required and (lacking := missing(required)):
        raise pytest.UsageError("\n".join(lacking))


def pytest_report_header() -> str | None:
    sample = os.environ.get("SPLAT_TEST_SAMPLE")
    return f"of tests marked `sampled`, a share is run: repeat with SPLAT_TEST_SAMPLE={sample}" if sample else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what the sample has not."""
    sample = os.environ.get("SPLAT_TEST_SAMPLE")
    if not sample:
        return

    def drawn(item: pytest.Item) -> bool:
        mark = item.get_closest_marker("sampled")
        return mark is None or is_drawn(sample, mark.args[0], item.nodeid)

    left_out = [item for item in items if not drawn(item)]
    items[:] = [item for item in items if drawn(item)]
    config.hook.pytest_deselected(items=left_out)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the files of tests/golden anew")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """(file, text): fails where the file holds another text. With --update-golden, writes it."""

    def check(file: Path, text: str) -> None:
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        remedy = f"the text is not that of {file.name}; if it is meant to change, run pytest with --update-golden"
        assert file.exists(), remedy
        assert text == file.read_text(encoding="utf-8"), remedy

    return check
