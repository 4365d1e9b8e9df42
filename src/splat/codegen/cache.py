"""Compiled artifacts on disk: made once, found by every later process.

An entry is a folder named by its key, a SHA-256 digest of everything that the artifact depends on:

    <SPLAT_CACHE_DIR>/
      <key>/                 the artifact's files and entry.json, which says what they are and what they must hold
      <key>.lock             held (flock) by the process that builds or removes <key>; dies with it
      <key>.<random>.tmp/    an entry on its way in or out, or built here for want of a place for temporary files
      <key>.failed/          what the last build that failed has left, for a report

The contract:

- An entry appears by the renaming of a complete folder whose files are on the disk, so that no process ever sees half
  of one. Files are never written in place: who has mapped an old one keeps it.
- Its files are compared with the recorded sizes and checksums whenever it is looked up; what does not agree counts as
  missing and is built again.
- Of several processes and threads that want one key, one builds, and the others wait and find what it has built.
- A process may be killed at any point. What it leaves is removed by a later build or `clear`, which knows leftovers
  by their lock: nobody holds it.
- Where the folder cannot be written, a folder of this process's own takes its place, with one warning, and is removed
  when the process ends. Entries that lie in the unwritable folder already are used; those on a file system that is
  mounted noexec, from which no library can be loaded, are not.
- What is built is built where temporary files lie, and once more in the cache folder where they cannot be written.
- When an entry was last used is the time of its entry.json, brought up to date when it is looked up, once an hour.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from splat import config
from splat.codegen.files import locked, remove_temporary_leftovers, sync_folder, temporary_folder, write
from splat.errors import SplatError, warn
from splat.locks import Lock

RECORD = "entry.json"
FORMAT = 1
#: How long to wait for another process that builds the same key, before building it for this process alone.
WAIT_S = 900.0
#: By how much the time of an entry's last use may be behind.
USED_S = 3600.0

_OURS = re.compile(r"(?P<key>[0-9a-f]{64})(?P<kind>\.lock|\.failed|\.[0-9a-f]{8}\.tmp)?")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One artifact.

    Attributes:
      folder: where its files lie.
      key: what it was built from, as a digest.
      name: for people.
      created: when, UTC.
      info: what else its builder said: the compiler, its flags, and so on.
      files: size in bytes and SHA-256 digest of each file, by name.
    """

    folder: Path
    key: str
    name: str
    created: datetime
    info: dict[str, str]
    files: dict[str, tuple[int, str]]

    @property
    def size_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    @property
    def unused_s(self) -> float:
        """For how many seconds no process has looked it up; up to `USED_S` too many."""
        return _unused_s(self.folder)

    def intact(self) -> bool:
        """Whether every file holds what was recorded."""
        try:
            return all(_digest((self.folder / name).read_bytes()) == known for name, known in self.files.items())
        except OSError:
            return False


@dataclasses.dataclass(frozen=True)
class Cleared:
    """What `clear` did: entries and bytes removed, keys that it left because they are being built."""

    entries: int
    freed_bytes: int
    busy: tuple[str, ...]


# -- what callers use --------------------------------------------------------------------------------------------------


def entry(key: str) -> Entry | None:
    """The intact entry of that key, in the cache folder or in this process's own; None where there is none."""
    for root in _roots():
        found = _read(root / key)
        if found is not None and found.key == key and found.intact():
            _mark_used(found.folder)
            return found
    return None


def load_or_build(key: str, name: str, build: Callable[[Path], dict[str, str]]) -> Entry:
    """The entry of that key, built where there is none.

    `build(folder)` writes the artifact's files into an empty folder and returns the entry's `info`. Files in folders
    that it creates there are not kept. It is called by one process and thread at a time for a key. What it raises is
    passed on, and nothing is left behind; an OSError is taken to mean that the folder cannot be written, and it is
    called once more with another.

    Raises SplatError where neither the cache folder nor a temporary folder can be written.
    """
    found = entry(key)
    if found is not None:
        return found
    with contextlib.ExitStack() as held:
        root, refused = _lock_somewhere(held, key)
        found = entry(key)
        if found is not None:
            return found
        _remove_leftovers(root, key)
        scratch, info = _build_somewhere(held, root, key, build, refused)
        try:
            return _store(root, key, name, scratch, info)
        except OSError as reason:
            private = _private_root(refused or reason)
            try:
                if private == root:
                    raise
                with _locked(private, key, WAIT_S):
                    return _store(private, key, name, scratch, info)
            except OSError as error:
                raise _nowhere(error, refused or reason) from error


def _lock_somewhere(held: contextlib.ExitStack, key: str) -> tuple[Path, OSError | None]:
    """Locks the key in the cache folder or, where that cannot be done, in this process's own; which one, and why."""
    try:
        root = config.cache_dir()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_loadable(root)
        held.enter_context(_locked(root, key, WAIT_S))
    except OSError as reason:
        root = _private_root(reason)
        try:
            held.enter_context(_locked(root, key, WAIT_S))
        except OSError as error:
            raise _nowhere(error, reason) from error
        return root, reason
    return root, None


def _build_somewhere(
    held: contextlib.ExitStack, root: Path, key: str, build: Callable[[Path], dict[str, str]], refused: OSError | None
) -> tuple[Path, dict[str, str]]:
    """Builds where temporary files lie or, where that cannot be done, in the cache folder; the folder, and the info.

    The key is locked in `root`: the cache folder or, where `refused` says why it is not that, a temporary one.
    """
    failed = []
    for place in [temporary_folder()] + ([] if refused else [_staging(root, key)]):
        try:
            with contextlib.ExitStack() as until_built:
                scratch = until_built.enter_context(place)
                info = build(scratch)
                held.push(until_built.pop_all())
                return scratch, info
        except OSError as error:
            failed.append(error)
    raise _nowhere(failed[0], refused or failed[-1]) from failed[0]


def keep_failed(key: str, files: dict[str, str]) -> Path | None:
    """Writes what a build that failed leaves (text by file name) where a user finds it; the folder, or None.

    Called by the builder of that key, under its lock.
    """
    with contextlib.suppress(OSError):
        folder = config.cache_dir() / f"{key}.failed"
        try:
            folder.mkdir(exist_ok=True)
            return _write_texts(folder, files)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        return _write_texts(Path(tempfile.mkdtemp(prefix="splat-failed-")), files)
    return None


def ls() -> list[Entry]:
    """The entries in the cache folder by name and age; their files are not checked."""
    root = config.cache_dir()
    found = (_read(root / name) for name, kind in _ours(root) if not kind)
    return sorted((one for one in found if one is not None), key=lambda one: (one.name, one.created, one.key))


def clear(unused_s: float | None = None) -> Cleared:
    """Removes every entry and leftover from the cache folder; neither what is being built now, nor what is not ours.

    With `unused_s`, only entries that nobody has looked up for so many seconds, what builds that failed so long ago
    have left, and what killed processes have. A process that uses an entry keeps what it has loaded.
    """
    root, entries, freed, busy = config.cache_dir(), 0, 0, []
    names: dict[str, list[str]] = {}
    for name, kind in _ours(root):
        names.setdefault(name[:64], []).extend([] if kind == ".lock" else [name])
    for key, mine in names.items():
        try:
            with _locked(root, key, 0.0):
                old = [
                    name for name in mine
                    if unused_s is None or name.endswith(".tmp") or _unused_s(root / name) >= unused_s
                ]  # fmt: skip
                before = sum(_size_bytes(root / name) for name in old)
                if key in old:
                    entries += (root / key).exists()
                    _retire(root, key)
                for name in old:
                    shutil.rmtree(root / name, ignore_errors=True)
                freed += before - sum(_size_bytes(root / name) for name in old)
        except TimeoutError:
            busy.append(key)
    return Cleared(entries, freed, tuple(busy))


# -- entries -----------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> Entry | None:
    """The entry in that folder, as its record says; None where there is no record, or no sound one."""
    try:
        said: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if said["format"] != FORMAT:
            return None
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in said["files"].items()}
        info = {str(name): str(value) for name, value in said["info"].items()}
        created = datetime.fromisoformat(said["created"])
        return Entry(folder, str(said["key"]), str(said["name"]), created, info, files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _store(root: Path, key: str, name: str, scratch: Path, info: dict[str, str]) -> Entry:
    """Moves the files in `scratch` into the entry of that key. Its lock is held."""
    with _staging(root, key) as staging:
        files = {}
        for source in sorted(path for path in scratch.iterdir() if path.is_file()):
            data = source.read_bytes()
            files[source.name] = _digest(data)
            write(staging / source.name, data)
        created = datetime.now(UTC).replace(microsecond=0)
        made = Entry(root / key, key, name, created, info, files)
        record = {"format": FORMAT, "key": key, "name": name, "created": created.isoformat(), "info": info,
                  "files": files}  # fmt: skip
        write(staging / RECORD, (json.dumps(record, indent=1) + "\n").encode())
        sync_folder(staging)
        _retire(root, key)
        staging.rename(root / key)
        sync_folder(root)
    shutil.rmtree(root / f"{key}.failed", ignore_errors=True)
    return made


@contextlib.contextmanager
def _staging(root: Path, key: str) -> Iterator[Path]:
    """An empty folder beside the entry of that key, removed unless it is renamed. Its lock is held."""
    folder = root / f"{key}.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _retire(root: Path, key: str) -> None:
    """Takes what lies at an entry's place away, in one step."""
    aside = root / f"{key}.{secrets.token_hex(4)}.tmp"
    try:
        (root / key).rename(aside)
    except FileNotFoundError:
        return
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)


def _unused_s(folder: Path) -> float:
    """Seconds since the entry in that folder was used; where there is no record, since the folder was changed."""
    for path in (folder / RECORD, folder):
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime
    return 0.0


def _mark_used(folder: Path) -> None:
    if abs(_unused_s(folder)) > USED_S:  # less than 0: the clock has been put back
        with contextlib.suppress(OSError):  # it may be somebody else's, or read-only
            os.utime(folder / RECORD)


def _digest(data: bytes) -> tuple[int, str]:
    return len(data), hashlib.sha256(data).hexdigest()


def _write_texts(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def _ours(root: Path) -> list[tuple[str, str]]:
    """Name and kind ("" for an entry) of all that is ours in a cache folder."""
    try:
        matches = [_OURS.fullmatch(name) for name in sorted(os.listdir(root))]
    except FileNotFoundError:
        return []
    return [(match[0], match["kind"] or "") for match in matches if match]


def _locked(root: Path, key: str, wait_s: float) -> contextlib.AbstractContextManager[None]:
    return locked(root / f"{key}.lock", wait_s)


def _size_bytes(path: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for below in path.rglob("*"):
            with contextlib.suppress(OSError):
                total += below.stat().st_size
    return total


def _remove_leftovers(root: Path, held: str) -> None:
    """Removes what killed processes have left: temporary folders and locks, but those of keys that others hold."""
    for name, kind in _ours(root):
        key = name[:64]
        if kind == ".lock" and key != held:
            with contextlib.suppress(OSError), _locked(root, key, 0.0):
                pass  # to release it is to remove it
        elif kind.endswith(".tmp"):
            lock = contextlib.nullcontext() if key == held else _locked(root, key, 0.0)
            with contextlib.suppress(OSError), lock:
                shutil.rmtree(root / name, ignore_errors=True)
    remove_temporary_leftovers()


# -- folders of one process --------------------------------------------------------------------------------------------

_guard = Lock()
_private: dict[int, Path] = {}  # process id -> its own cache folder; a forked child makes one anew


def _roots() -> list[Path]:
    roots = []
    with contextlib.suppress(OSError):
        _check_loadable(config.cache_dir())
        roots.append(config.cache_dir())
    if os.getpid() in _private:
        roots.append(_private[os.getpid()])
    return roots


def _check_loadable(root: Path) -> None:
    """Raises OSError where libraries in that folder cannot be loaded."""
    if os.statvfs(root).f_flag & getattr(os, "ST_NOEXEC", 0):  # Linux says so; where nothing does, loading fails
        raise PermissionError(errno.EACCES, "its file system is mounted noexec", str(root))


def _private_root(reason: OSError) -> Path:
    """This process's own cache folder; says why there is one when it is made."""
    with _guard:
        root = _private.get(os.getpid())
        if root is not None and root.is_dir():
            return root
        try:
            with contextlib.ExitStack() as made:
                root = made.enter_context(temporary_folder())
                _check_loadable(root)
                atexit.register(made.pop_all().close)
        except OSError as error:
            raise _nowhere(error, reason) from error
        _private[os.getpid()] = root
    warn(
        f"compiled kernels cannot be kept in {_path(config.cache_dir) or 'the home folder'} "
        f"({reason.strerror or reason}); this process compiles its own. Set SPLAT_CACHE_DIR to another folder.",
        RuntimeWarning,
    )
    return root


def _nowhere(temporary: OSError, kept: OSError) -> SplatError:
    """The error where temporary files can be written as little as the cache folder, for these reasons."""
    return SplatError(
        "compiled kernels can be written neither in the cache folder"
        f"{_path(config.cache_dir, ' ')} ({kept.strerror or kept}) nor in the temporary folder"
        f"{_path(tempfile.gettempdir, ' ')} ({temporary.strerror or temporary}). Make room there, or set "
        "SPLAT_CACHE_DIR, and TMPDIR for temporary files, to other folders."
    )


def _path(folder: Callable[[], object], before: str = "") -> str:
    """The path that `folder` returns; nothing where it raises OSError, as there is none."""
    try:
        return f"{before}{folder()}"
    except OSError:
        return ""
