"""Every environment variable that changes what SPLAT does, in one table.

They are read when they are needed, never at import, so that a program may set them after it has imported SPLAT.
A variable that is set to nothing counts as not set.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
import sys
from pathlib import Path

from splat.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Setting:
    """One environment variable.

    Attributes:
      name: of the variable.
      meaning: what it does, in one line.
      default: what holds where it is not set, in words.
    """

    name: str
    meaning: str
    default: str


SETTINGS = (
    Setting("SPLAT_CACHE_DIR", "the folder of compiled kernels", "the platform's cache folder"),
    Setting("SPLAT_CXXFLAGS", "more flags for the C++ compiler, after SPLAT's own", "none"),
    Setting("SPLAT_PROGRESS", "1: a line on stderr for each compilation; 0: none", "if stderr is a terminal"),
    Setting("SPLAT_DEBUG", "1: the command line shows the traceback of an error", "0"),
)
_NAMES = frozenset(setting.name for setting in SETTINGS)


def get(name: str) -> str | None:
    """The variable's text as it is now; None where it is not set. `name` is one of `SETTINGS`."""
    if name not in _NAMES:
        raise KeyError(name)
    return os.environ.get(name) or None


def unknown() -> list[str]:
    """Variables that look like settings of SPLAT and are none, as misspelt ones do; those of the tests are left out."""
    ours = (name for name in os.environ if name.startswith("SPLAT_") and not name.startswith("SPLAT_TEST_"))
    return sorted(name for name in ours if name not in _NAMES)


def cache_dir() -> Path:
    """The folder of compiled kernels; absolute, and perhaps not there yet.

    Raises OSError where it would lie in the home folder, and none is known.
    """
    given = get("SPLAT_CACHE_DIR")
    try:
        if given:
            return Path(given).expanduser().absolute()
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "splat"
        base = os.environ.get("XDG_CACHE_HOME", "")
        # A relative one is to be ignored, says the XDG specification.
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "splat"
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "no home folder is known", given or "~") from None


def cxxflags() -> list[str]:
    """The flags of SPLAT_CXXFLAGS, one string each."""
    return split("SPLAT_CXXFLAGS", get("SPLAT_CXXFLAGS") or "")


def progress() -> bool | None:
    """Whether compilations are announced; None: where stderr is a terminal."""
    given = get("SPLAT_PROGRESS")
    if given not in (None, "0", "1"):
        raise ArgumentError(f"SPLAT_PROGRESS must be 0, 1 or not set, but it is {given!r}")
    return None if given is None else given == "1"


def split(name: str, text: str) -> list[str]:
    """The words of a variable's text, as a shell splits them. Raises ArgumentError for an open quotation."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ArgumentError(
            f"{name} must be words as a shell reads them, but {text!r} was given ({error}). Close the quotation."
        ) from None
