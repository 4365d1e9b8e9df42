"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the path of a new file beside `path`, which takes its place in the end, and is removed after an error.

    It has the same suffix. What is there and no regular file, such as /dev/stdout, is given itself. An OSError names
    `path`.
    """
    whole = path.resolve()  # a link stays one
    # Not tempfile: its files are readable by their owner only, and results are shared.
    there = path.exists() and not path.is_file()
    written = path if there else whole.with_name(f".{whole.stem}.{os.getpid()}{whole.suffix}")
    try:
        yield written
        if not there:
            if whole.exists():
                shutil.copymode(whole, written)
            os.replace(written, whole)
    except BaseException as error:
        with contextlib.suppress(OSError):
            if not there:
                written.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
