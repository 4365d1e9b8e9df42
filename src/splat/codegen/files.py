"""Files that outlive a crash: locks that die with their process, durable writes, folders that exist for a while."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

#: A temporary folder is left over where nobody holds the lock in it, and it is older than it takes to lock one.
_TEMPORARY, _ALIVE, _LEFT_OVER_S = "splat-temporary-", "alive", 60.0


@contextlib.contextmanager
def locked(path: Path, wait_s: float) -> Iterator[None]:
    """Holds the lock of that file, which is there while somebody holds or wants it. For threads and processes alike.

    Raises TimeoutError after `wait_s`, and any other OSError where the file cannot be made or locked. A process that
    is forked meanwhile, and ends, leaves the file to its parent.
    """
    process = os.getpid()
    descriptor = _acquire(path, time.monotonic() + wait_s)
    try:
        yield
    finally:
        if os.getpid() == process:
            with contextlib.suppress(OSError):
                path.unlink()  # before it is released: see _acquire
        os.close(descriptor)


def _acquire(path: Path, until: float) -> int:
    """The descriptor of the locked file.

    A file may be unlinked by who holds its lock, while others wait for it: what counts is the lock of the file that
    has the name now.
    """
    import fcntl  # not on Windows, where importing this file must still work

    pause = 0.01
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
            os.close(descriptor)
            continue
        except BlockingIOError:
            os.close(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if time.monotonic() >= until:
            raise TimeoutError(errno.ETIMEDOUT, "another process does not release the lock", str(path))
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


def write(path: Path, data: bytes) -> None:
    """Makes a new file, which is on the disk when this returns."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder where temporary files lie. Raises OSError where there can be none.

    What a killed process leaves is found by `remove_temporary_leftovers`.
    """
    process = os.getpid()
    folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
    try:
        with locked(folder / _ALIVE, 1.0):
            inner = folder / "files"
            inner.mkdir()
            yield inner
    finally:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)


def remove_temporary_leftovers() -> None:
    """Removes the temporary folders of this user's processes that were killed."""
    with contextlib.suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(OSError):
                status = folder.stat()
                if status.st_uid == os.getuid() and time.time() - status.st_mtime > _LEFT_OVER_S:
                    with locked(folder / _ALIVE, 0.0):
                        shutil.rmtree(folder, ignore_errors=True)
