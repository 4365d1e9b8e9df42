"""The cache of compiled artifacts where it cannot be written: full, read-only and odd file systems."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from splat.codegen import cache, files
from splat.errors import SplatError
from tests.codegen.caching import DATA, KEY, OTHER, builder, ended, left, mounted, must_not_build, python


@pytest.fixture
def small_disk(cache_dir: Path) -> Iterator[Path]:
    """The cache folder on a file system of its own, of 64 KB."""
    with mounted(cache_dir, "size=64k"):
        yield cache_dir


def caught(key: str = KEY) -> tuple[cache.Entry, list[str]]:
    """The entry, built where needed, and the warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made = cache.load_or_build(key, "forward", builder)
    assert {warning.filename for warning in seen} <= {__file__}, "it does not point to the caller's line"
    return made, [str(warning.message) for warning in seen]


def expect_own_folder(cache_dir: Path, reason: str) -> None:
    """Two artifacts are built in a folder of the process's own, with one warning."""
    before = sorted(os.listdir(cache_dir)) if cache_dir.is_dir() else []
    made, said = caught()
    assert len(said) == 1
    assert said[0] == (
        f"compiled kernels cannot be kept in {cache_dir} ({reason}); this process compiles its own. "
        "Set SPLAT_CACHE_DIR to another folder."
    )
    assert cache_dir not in made.folder.parents
    assert made.intact()
    assert (made.folder / "a.so").read_bytes() == DATA
    assert cache.load_or_build(KEY, "forward", must_not_build) == made
    other, said = caught(OTHER)
    assert said == []
    assert other.folder.parent == made.folder.parent
    assert (sorted(os.listdir(cache_dir)) if cache_dir.is_dir() else []) == before, "something half-written"


def test_a_full_disk(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(64 << 10))
    expect_own_folder(small_disk, "No space left on device")


def test_a_disk_that_fills_up(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes((64 << 10) - len(DATA) // 4096 * 4096))
    expect_own_folder(small_disk, "No space left on device")


def test_a_read_only_disk(small_disk: Path) -> None:
    made = cache.load_or_build(OTHER, "earlier", builder)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert cache.load_or_build(OTHER, "earlier", must_not_build) == made, "what lies there is used, without a warning"
    built, said = caught()
    assert "Read-only file system" in said[0]
    assert built.intact()
    with pytest.raises(OSError, match="Read-only file system"):
        cache.clear()


def test_a_noexec_disk(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No library can be loaded from it: entries that lie there are not used either."""
    with mounted(cache_dir, "size=64k") as disk:
        cache.load_or_build(KEY, "forward", builder)
        subprocess.run(["mount", "-o", "remount,noexec", str(disk)], check=True)
        expect_own_folder(disk, "its file system is mounted noexec")
        monkeypatch.setattr(cache, "_private", {})
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with pytest.raises(SplatError, match=r"neither in .* noexec\) nor in the temporary folder .* noexec\)\. Make"):
            cache.load_or_build(KEY, "forward", builder)
        assert os.listdir(disk) == [KEY]


def test_a_full_temporary_disk(cache_dir: Path) -> None:
    with mounted(cache_dir.parent / "temporary", "size=4k"):
        made, said = caught()
        assert (made.folder.parent, made.intact(), said) == (cache_dir, True, [])
        assert left(cache_dir) == [KEY]


def test_both_disks_full(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(64 << 10))
    with mounted(small_disk.parent / "temporary", "size=4k") as temporary, pytest.raises(SplatError) as error:
        caught()
    assert str(error.value) == (
        f"compiled kernels can be written neither in the cache folder {small_disk} (No space left on device) nor in "
        f"the temporary folder {temporary} (No space left on device). Make room there, or set SPLAT_CACHE_DIR, and "
        "TMPDIR for temporary files, to other folders."
    )
    assert os.listdir(small_disk) == ["filler"]


def test_a_disk_that_fails(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, data: bytes) -> None:
        if cache_dir in path.parents:
            path.write_bytes(data[:50])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        files.write(path, data)

    monkeypatch.setattr(cache, "write", fail)
    cache_dir.mkdir()
    expect_own_folder(cache_dir, "No space left on device")


def test_a_file_system_without_locks(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = cache.locked

    def fail(path: Path, wait_s: float):
        if cache_dir in path.parents:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(path))
        return locked(path, wait_s)

    monkeypatch.setattr(cache, "locked", fail)
    cache_dir.mkdir()
    expect_own_folder(cache_dir, "No locks available")


def test_a_folder_below_a_file(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_dir.write_text("a file")
    monkeypatch.setenv("SPLAT_CACHE_DIR", str(cache_dir / "below"))
    expect_own_folder(cache_dir / "below", "Not a directory")


def test_no_home_folder(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise FileNotFoundError(errno.ENOENT, "no home folder is known", "~")

    monkeypatch.setattr(cache.config, "cache_dir", fail)
    made, said = caught()
    assert made.intact()
    assert said[0].startswith("compiled kernels cannot be kept in the home folder (no home folder is known)")


def test_the_own_folder_is_removed_at_exit(cache_dir: Path) -> None:
    cache_dir.write_text("a file")
    script = """
made = cache.load_or_build(KEY, "forward", builder)
child = os.fork()  # ends as a process does that the user forks: what is the parent's stays
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert made.intact()
    print(made.folder)
"""
    out, err = ended(python(script))
    assert err.count("Warning") == 1
    assert not Path(out.strip()).exists()
    assert os.listdir(cache_dir.parent / "temporary") == []


def test_an_own_folder_that_is_removed_is_made_anew(cache_dir: Path) -> None:
    cache_dir.write_text("a file")
    made, _ = caught()
    shutil.rmtree(made.folder.parent.parent)
    made, _ = caught()
    assert made.intact()


def test_nothing_can_be_written(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/tmp")

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    assert cache.load_or_build(KEY, "forward", builder).intact()
    assert left(cache_dir) == [KEY], "it is built in the cache folder"
    cache.clear()
    cache_dir.rmdir()
    cache_dir.write_text("a file")
    with pytest.raises(
        SplatError, match=r"folder .*/cache \(File exists\) nor in .*/temporary \(Read-only file system\)"
    ):
        cache.load_or_build(KEY, "forward", builder)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_limit_on_file_size(cache_dir: Path, when: str) -> None:
    """Half a file can be written, anywhere: in the temporary folder too."""
    script = """
import resource
def limited(scratch):
    if sys.argv[1] == "before":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    info = builder(scratch)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return info
cache.load_or_build(KEY, "forward", limited)
"""
    _, err = ended(python(script, when), 1)
    last = err.strip().splitlines()[-1]
    assert last.startswith("splat.errors.SplatError: compiled kernels can be written neither in the cache folder")
    assert "File too large" in last
    assert left(cache_dir) == []
