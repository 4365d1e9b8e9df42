"""The line on stderr that says what is being compiled."""

from __future__ import annotations

import contextlib
import re
import sys
import time

from splat import config
from splat.locks import Lock, in_forked

#: What is being compiled now: on a terminal they share the last line.
_present: list[Progress] = []
_lock = Lock()
in_forked(_present.clear)  # what the parent's other threads compile


class Progress:
    """Says what is compiled: rewritten in place on a terminal, else a line at start and one at end."""

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
        if not self._in_place:
            self._write(f"{self._text}\n")
            return self
        with _lock:
            _present.append(self)
            self._redraw()
        return self

    def tick(self) -> None:
        if self._in_place:
            with _lock:
                self._redraw()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._in_place:
            self._write(f"{self._line()}\n")
            return
        with _lock:
            _present.remove(self)
            self._write(f"\r\x1b[K{self._line()}\n")
            self._redraw()

    def _line(self) -> str:
        return f"{self._text} {time.monotonic() - self._began:.1f} s"

    def _redraw(self) -> None:
        if _present:
            others = len(_present) - 1
            more = f" (and {others} more)" if others else ""
            self._write(f"\r\x1b[K{_present[0]._line()}{more}")

    def _write(self, text: str) -> None:
        if self._on:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                self._stream.write(text)
                self._stream.flush()
