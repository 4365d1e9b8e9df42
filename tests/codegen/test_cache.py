"""The cache of compiled artifacts: its contract, with real processes and real kills."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from splat.codegen import cache, files
from tests.codegen.caching import DATA, KEY, OTHER, builder, ended, left, must_not_build, python, wait_for


def test_an_artifact_is_built_once(cache_dir: Path) -> None:
    assert cache.entry(KEY) is None
    assert cache.ls() == []
    made = cache.load_or_build(KEY, "forward", builder)
    assert made.folder == cache_dir / KEY
    assert (made.folder / "a.so").read_bytes() == DATA
    assert sorted(made.files) == ["a.cpp", "a.so"]
    assert made.size_bytes == len(DATA) + len("// source\n")
    again = cache.load_or_build(KEY, "forward", must_not_build)
    assert again == made == cache.entry(KEY)
    assert (again.name, again.info) == ("forward", {"compiler": "none"})
    assert cache.ls() == [made]
    assert left(cache_dir) == [KEY]
    assert cache_dir.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_build_that_fails_leaves_nothing(cache_dir: Path, failure: type[BaseException]) -> None:
    def fail(folder: Path) -> dict[str, str]:
        builder(folder)
        raise failure("no")

    with pytest.raises(failure):
        cache.load_or_build(KEY, "forward", fail)
    assert left(cache_dir) == []
    cache.load_or_build(KEY, "forward", builder)


def test_what_a_failed_build_leaves_for_a_report(cache_dir: Path) -> None:
    def fail(folder: Path) -> dict[str, str]:
        assert cache.keep_failed(KEY, {"a.cpp": "source", "a.log": "error"}) == cache_dir / f"{KEY}.failed"
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError):
            cache.load_or_build(KEY, "forward", fail)
    assert left(cache_dir) == [f"{KEY}.failed"]
    assert (cache_dir / f"{KEY}.failed" / "a.log").read_text() == "error"
    assert cache.ls() == []
    cache.load_or_build(KEY, "forward", builder)
    assert left(cache_dir) == [KEY]


def test_what_a_failed_build_leaves_where_the_folder_cannot_be_written(cache_dir: Path) -> None:
    cache_dir.write_text("a file")
    folder = cache.keep_failed(KEY, {"a.log": "error"})
    assert folder is not None
    assert folder.parent == cache_dir.parent / "temporary"
    assert (folder / "a.log").read_text() == "error"


# -- damage ------------------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    os.truncate(folder / "a.so", 100)


def flip(folder: Path) -> None:
    (folder / "a.so").write_bytes(DATA[:-1] + b"\0")


def remove(folder: Path) -> None:
    (folder / "a.so").unlink()


def forget(folder: Path) -> None:
    (folder / cache.RECORD).unlink()


def scribble(folder: Path) -> None:
    (folder / cache.RECORD).write_text('{"format": 1, "files": [')


def renumber(folder: Path) -> None:
    record = json.loads((folder / cache.RECORD).read_text())
    (folder / cache.RECORD).write_text(json.dumps(record | {"format": 0}))


def mistake(folder: Path) -> None:
    record = json.loads((folder / cache.RECORD).read_text())
    (folder / cache.RECORD).write_text(json.dumps(record | {"key": OTHER}))


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


@pytest.mark.parametrize("damage", [truncate, flip, remove, forget, scribble, renumber, mistake, replace_by_file])
def test_a_damaged_entry_is_built_again(cache_dir: Path, damage: Callable[[Path], None]) -> None:
    made = cache.load_or_build(KEY, "forward", builder)
    damage(made.folder)
    assert cache.entry(KEY) is None
    assert cache.load_or_build(KEY, "forward", builder).intact()
    assert (made.folder / "a.so").read_bytes() == DATA
    assert left(cache_dir) == [KEY]


def test_a_damaged_file_is_not_written_in_place(cache_dir: Path) -> None:
    made = cache.load_or_build(KEY, "forward", builder)
    truncate(made.folder)
    with open(made.folder / "a.so", "rb") as held:
        cache.load_or_build(KEY, "forward", builder)
        assert held.read() == DATA[:100]


# -- several at once ---------------------------------------------------------------------------------------------------


def test_processes_that_want_one_key(cache_dir: Path, tmp_path: Path) -> None:
    script = """
folder = Path(sys.argv[1])
def slow(scratch):
    with open(folder / "builds", "a") as file:
        file.write("build\\n")
    time.sleep(0.5)
    return builder(scratch)
(folder / f"ready-{os.getpid()}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
print(cache.load_or_build(KEY, "forward", slow).folder)
"""
    processes = [python(script, tmp_path) for _ in range(3)]
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    (tmp_path / "go").touch()
    assert {ended(process)[0].strip() for process in processes} == {str(cache_dir / KEY)}
    assert (tmp_path / "builds").read_text() == "build\n"
    assert left(cache_dir) == [KEY]


def test_threads_that_want_one_key(cache_dir: Path) -> None:
    builds, found = [], []

    def slow(folder: Path) -> dict[str, str]:
        builds.append(folder)
        time.sleep(0.1)
        return builder(folder)

    threads = [threading.Thread(target=lambda: found.append(cache.load_or_build(KEY, "f", slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(found) == 4
    assert left(cache_dir) == [KEY]


def test_a_builder_that_never_ends_is_not_waited_for(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "WAIT_S", 0.05)
    cache_dir.mkdir()
    with files.locked(cache_dir / f"{KEY}.lock", 0.0), pytest.warns(RuntimeWarning, match="does not release the lock"):
        made = cache.load_or_build(KEY, "forward", builder)
    assert made.folder.parent != cache_dir
    assert made.intact()


def test_a_lock_is_of_the_file_that_has_the_name(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with files.locked(path, 0.0):
        assert path.exists()
        with pytest.raises(TimeoutError), files.locked(path, 0.0):
            pass
        path.unlink()  # somebody removes it by hand
        with files.locked(path, 0.0):
            pass
    assert not path.exists()


# -- killed ------------------------------------------------------------------------------------------------------------


def test_killed_while_building(cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
def hang(scratch):
    builder(scratch)
    Path(sys.argv[1]).touch()
    time.sleep(600)
cache.load_or_build(KEY, "forward", hang)
"""
    process = python(script, tmp_path / "building")
    wait_for((tmp_path / "building").exists)
    assert KEY not in left(cache_dir)
    process.kill()
    ended(process, -9)
    assert len(left(cache_dir)) == 2  # the lock, and the temporary folder
    monkeypatch.setattr(files, "_LEFT_OVER_S", -1.0)
    began = time.monotonic()
    assert cache.load_or_build(OTHER, "other", builder).intact()
    assert left(cache_dir) == [OTHER], "leftovers of another key are removed too"
    assert cache.load_or_build(KEY, "forward", builder).intact()
    assert time.monotonic() - began < 30


KILL_AT_EVERY_STEP = """
import json, signal, tempfile
files._LEFT_OVER_S = -1.0
def watched(at):
    count = 0
    def hook(event, args):
        nonlocal count
        if event in {"open", "fcntl.flock"} or event.startswith(("os.", "tempfile.", "shutil.")):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    cache.load_or_build(KEY, "forward", builder)
    os._exit(0)

def forked(function, *args):
    child = os.fork()
    if child == 0:
        try:
            function(*args)
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def absent_or_whole():
    root = Path(os.environ["SPLAT_CACHE_DIR"])
    if (root / KEY).exists():
        assert cache.entry(KEY) is not None
        assert (root / KEY / "a.so").read_bytes() == DATA

root, steps, whole = Path(os.environ["SPLAT_CACHE_DIR"]), 0, 0
damaged = sys.argv[1] == "damaged"
if sys.argv[1] == "no temporary files":
    def refuse(*args, **more):
        raise OSError("refused")
    tempfile.mkdtemp = refuse
while True:
    cache.clear()
    assert not root.exists() or not list(root.iterdir()), list(root.iterdir())
    if damaged:
        cache.load_or_build(KEY, "forward", builder)
        os.truncate(root / KEY / "a.so", 7)
    code = forked(watched, steps + 1)
    if not damaged:
        absent_or_whole()
    if code == 0:
        break
    assert code == -9, code
    steps += 1
    whole += cache.entry(KEY) is not None
    made = cache.load_or_build(KEY, "forward", builder)
    assert made.folder == root / KEY and made.intact()
    cache.load_or_build("f" * 64, "other", builder)  # removes what the killed process has left
    names = set(os.listdir(root))
    assert names == {KEY, "f" * 64}, names
    assert os.listdir(os.environ["TMPDIR"]) == [], os.listdir(os.environ["TMPDIR"])
print(json.dumps([steps, whole]))
"""


@pytest.mark.parametrize("state", ["empty", "damaged", "no temporary files"])
def test_killed_at_every_step(cache_dir: Path, state: str) -> None:
    out, _ = ended(python(KILL_AT_EVERY_STEP, state))
    steps, whole = json.loads(out)
    assert steps > 20
    assert 0 < whole < steps / 2  # some of the kills come after the renaming


# -- ls and clear ------------------------------------------------------------------------------------------------------


def test_ls_is_sorted_and_skips_what_is_not_an_entry(cache_dir: Path) -> None:
    for key, name in ((KEY, "b"), (OTHER, "a")):
        cache.load_or_build(key, name, builder)
    (cache_dir / ("0" * 64)).mkdir()
    (cache_dir / "notes.txt").write_text("mine")
    assert [one.name for one in cache.ls()] == ["a", "b"]


def test_clear(cache_dir: Path) -> None:
    assert cache.clear() == cache.Cleared(0, 0, ())
    size = cache.load_or_build(KEY, "forward", builder).size_bytes
    cache.keep_failed(OTHER, {"a.log": "error"})
    (cache_dir / f"{OTHER}.12345678.tmp").mkdir()
    (cache_dir / f"{OTHER}.lock").touch()
    (cache_dir / "notes.txt").write_text("mine")
    (cache_dir / f"{KEY}.notes").write_text("mine too")
    done = cache.clear()
    assert (done.entries, done.busy) == (1, ())
    assert size < done.freed_bytes < size + 1000
    assert left(cache_dir) == [f"{KEY}.notes", "notes.txt"]


def test_clear_keeps_what_is_being_built(cache_dir: Path) -> None:
    cache.load_or_build(OTHER, "other", builder)

    def clearing(folder: Path) -> dict[str, str]:
        assert cache.clear().busy == (KEY,)
        return builder(folder)

    assert cache.load_or_build(KEY, "forward", clearing).intact()
    assert left(cache_dir) == [KEY]


DAY_S = 86400


def age(path: Path, days: float) -> None:
    then = time.time() - days * DAY_S
    os.utime(path, (then, then))


def test_clear_what_is_not_used(cache_dir: Path) -> None:
    for key, days in ((KEY, 40), (OTHER, 20)):
        made = cache.load_or_build(key, "forward", builder)
        assert 0 <= made.unused_s < 60
        age(made.folder / cache.RECORD, days)
        age(made.folder, 90)
        assert made.unused_s // DAY_S == days
    for letter, days in (("a", 40), ("b", 20)):
        failed = cache.keep_failed(letter * 64, {"a.log": "error"})
        assert failed is not None
        age(failed, days)
    (cache_dir / f"{OTHER}.12345678.tmp").mkdir()
    assert cache.clear(30 * DAY_S).entries == 1
    assert left(cache_dir) == ["b" * 64 + ".failed", OTHER]
    assert cache.clear(30 * DAY_S) == cache.Cleared(0, 0, ())
    assert cache.clear(0).entries == 1
    assert left(cache_dir) == []


@pytest.mark.parametrize("days", [40, -40])
def test_what_is_looked_up_counts_as_used(cache_dir: Path, days: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cache.load_or_build(KEY, "forward", builder)
    age(made.folder / cache.RECORD, days)
    assert cache.ls() == [made]
    assert round(made.unused_s / DAY_S) == days, "to list it is not to use it"
    cache.load_or_build(KEY, "forward", must_not_build)
    assert abs(made.unused_s) < 60

    def fail(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", fail)
    cache.load_or_build(KEY, "forward", must_not_build)
    monkeypatch.setattr(cache, "USED_S", -1.0)
    cache.load_or_build(KEY, "forward", must_not_build)
