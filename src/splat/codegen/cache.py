"""Compiled artifacts on disk: made once, found by every later process.

An entry is a folder named by its key, a SHA-256 digest of everything that the artifact depends on:

    <SPLAT_CACHE_DIR>/
      <key>/                 the artifact's files and entry.json, which says what they are and what they must hold
      <key>.lock             held (flock) by the process that builds or removes <key>; dies with it
      <key>.<random>.tmp/    an entry on its way in or out
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
  when the process ends. Entries that lie in the unwritable folder already are used.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from splat import config
from splat.codegen.files import locked, remove_temporary_leftovers, sync_folder, temporary_folder, write
from splat.errors import SplatError

RECORD = "entry.json"
FORMAT = 1
#: How long to wait for another process that builds the same key, before building it for this process alone.
WAIT_S = 900.0

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
            return found
    return None


def load_or_build(key: str, name: str, build: Callable[[Path], dict[str, str]]) -> Entry:
    """The entry of that key, built where there is none.

    `build(folder)` writes the artifact's files into an empty folder and returns the entry's `info`. Files in folders
    that it creates there are not kept. It is called by one process and thread at a time for a key. What it raises is
    passed on, and nothing is left behind; an OSError is taken to mean that the folder cannot be written.

    Raises SplatError where not even a temporary folder can be written.
    """
    found = entry(key)
    if found is not None:
        return found
    with contextlib.ExitStack() as held:
        root = _lock_somewhere(held, key)
        found = entry(key)
        if found is not None:
            return found
        _remove_leftovers(root, key)
        try:
            scratch = held.enter_context(temporary_folder())
            info = build(scratch)
        except OSError as error:
            raise _nowhere(error) from error
        try:
            return _store(root, key, name, scratch, info)
        except OSError as reason:
            private = _private_root(reason)
            try:
                if private == root:
                    raise
                with _locked(private, key, WAIT_S):
                    return _store(private, key, name, scratch, info)
            except OSError as error:
                raise _nowhere(error, reason) from error


def _lock_somewhere(held: contextlib.ExitStack, key: str) -> Path:
    """Locks the key in the cache folder or, where that cannot be done, in this process's own; which one."""
    try:
        root = config.cache_dir()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        held.enter_context(_locked(root, key, WAIT_S))
    except OSError as reason:
        root = _private_root(reason)
        try:
            held.enter_context(_locked(root, key, WAIT_S))
        except OSError as error:
            raise _nowhere(error, reason) from error
    return root


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


def clear() -> Cleared:
    """Removes every entry and leftover from the cache folder; neither what is being built now, nor what is not ours.

    A process that uses an entry keeps what it has loaded.
    """
    root, entries, freed, busy = config.cache_dir(), 0, 0, []
    names: dict[str, list[str]] = {}
    for name, kind in _ours(root):
        names.setdefault(name[:64], []).extend([] if kind == ".lock" else [name])
    for key, mine in names.items():
        try:
            with _locked(root, key, 0.0):
                entries += (root / key).exists()
                before = sum(_size_bytes(root / name) for name in mine)
                _retire(root, key)
                for name in mine:
                    shutil.rmtree(root / name, ignore_errors=True)
                freed += before - sum(_size_bytes(root / name) for name in mine)
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
    staging = root / f"{key}.{secrets.token_hex(4)}.tmp"
    try:
        staging.mkdir()
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
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # not there any more, where all went well
    shutil.rmtree(root / f"{key}.failed", ignore_errors=True)
    return made


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

_guard = threading.Lock()
_private: dict[int, Path] = {}  # process id -> its own cache folder; a forked child makes one anew


def _roots() -> list[Path]:
    roots = []
    with contextlib.suppress(OSError):
        roots.append(config.cache_dir())
    if os.getpid() in _private:
        roots.append(_private[os.getpid()])
    return roots


def _private_root(reason: OSError) -> Path:
    """This process's own cache folder; says why there is one when it is made."""
    with _guard:
        root = _private.get(os.getpid())
        if root is not None and root.is_dir():
            return root
        until_exit = contextlib.ExitStack()
        try:
            root = _private[os.getpid()] = until_exit.enter_context(temporary_folder())
        except OSError as error:
            raise _nowhere(error, reason) from error
        atexit.register(until_exit.close)
    try:
        where = str(config.cache_dir())
    except OSError:
        where = "the home folder"
    warnings.warn(
        f"compiled kernels cannot be kept in {where} ({reason.strerror or reason}); this process compiles its own. "
        "Set SPLAT_CACHE_DIR to a folder that can be written.",
        RuntimeWarning,
        stacklevel=2,
    )
    return root


def _nowhere(error: OSError, reason: OSError | None = None) -> SplatError:
    first = f"neither in the cache folder ({reason.strerror or reason}) nor " if reason else ""
    return SplatError(
        f"compiled kernels cannot be written {first}in a temporary folder ({error.strerror or error}). Set "
        "SPLAT_CACHE_DIR, and TMPDIR for temporary files, to folders that can be written."
    )
