"""The settings: one table, read when they are needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import splat
from splat import config
from splat.errors import ArgumentError
from tests.requirements import missing

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for setting in config.SETTINGS:
        monkeypatch.delenv(setting.name, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(config.sys, "platform", "linux")


def test_the_table_is_complete() -> None:
    """What the sources read from the environment, and it alone, is in the table."""
    read = re.compile(r"(?:get|getenv|environ\[|split|envvar=)\(?[\"'](SPLAT_[A-Z_]+)[\"']")
    sources = [path.read_text(encoding="utf-8") for path in Path(splat.__file__).parent.rglob("*.py")]
    read_names = {name for source in sources for name in read.findall(source)}
    assert read_names == {setting.name for setting in config.SETTINGS}
    with pytest.raises(KeyError):
        config.get("SPLAT_NOTHING")


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert config.cache_dir() == tmp_path / ".cache" / "splat"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert config.cache_dir() == tmp_path / ".cache" / "splat"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert config.cache_dir() == tmp_path / "xdg" / "splat"
    monkeypatch.setattr(config.sys, "platform", "darwin")
    assert config.cache_dir() == tmp_path / "Library" / "Caches" / "splat"
    monkeypatch.setenv("SPLAT_CACHE_DIR", "~/mine")
    assert config.cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("SPLAT_CACHE_DIR", "relative")
    monkeypatch.chdir(tmp_path)
    assert config.cache_dir() == tmp_path / "relative"


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(OSError, match="no home folder is known"):
        config.cache_dir()


def test_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.cxxflags() == []
    monkeypatch.setenv("SPLAT_CXXFLAGS", "-g '-DA=b c'")
    assert config.cxxflags() == ["-g", "-DA=b c"]
    monkeypatch.setenv("SPLAT_CXXFLAGS", '-DA="b')
    with pytest.raises(ArgumentError, match="SPLAT_CXXFLAGS must be words as a shell reads them.*Close the quotation"):
        config.cxxflags()


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, meant in (("", None), ("0", False), ("1", True)):
        monkeypatch.setenv("SPLAT_PROGRESS", value)
        assert config.progress() is meant


def test_misspelt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLAT_CACHEDIR", "x")
    monkeypatch.setenv("SPLAT_TEST_SEED", "1")
    assert config.unknown() == ["SPLAT_CACHEDIR"]


def test_what_tests_require_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    cpp, torch, other = missing(["cpp", "torch", "rust"])
    assert cpp.startswith("SPLAT_TEST_REQUIRE names cpp, which is missing: CXX is '/no/such/compiler'")
    assert torch == "SPLAT_TEST_REQUIRE names torch, which is missing: install the package torch. Or require less."
    assert other == "SPLAT_TEST_REQUIRE must name some of cpp, triton, torch, but 'rust' was given"
    required = re.findall(r'SPLAT_TEST_REQUIRE="(.*)"', (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert required == ["cpp triton torch"]
