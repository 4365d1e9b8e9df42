"""The line on stderr that says what is being compiled."""

from __future__ import annotations

import contextlib
import re
import sys
import time

from splat import config


class Progress:
    """The line on stderr that says what is compiled: rewritten in place on a terminal, else one at start and end."""

    def __init__(self, name: str, compiler: str):
        said = config.progress()
        self._stream = sys.stderr
        terminal = False
        with contextlib.suppress(AttributeError, ValueError):  # no stderr, or a closed one
            terminal = self._stream.isatty()
        self._in_place = terminal and said is None
        self._on = self._in_place or bool(said)
        what = re.sub(r"\bh(\d+)\b", r"H\1", name.replace("_", " "))
        self._text = f"splat: compiling {what} with {compiler} ..."
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        self._write(self._text if self._in_place else f"{self._text}\n")
        return self

    def tick(self) -> None:
        if self._in_place:
            self._write(f"\r{self._text} {time.monotonic() - self._began:.1f} s")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        took = f"{self._text} {time.monotonic() - self._began:.1f} s"
        self._write(f"\r{took}\n" if self._in_place else f"{took}\n")

    def _write(self, text: str) -> None:
        if self._on:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                self._stream.write(text)
                self._stream.flush()
