"""What is made once and kept for later calls, in bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Made = TypeVar("_Made")


class Remembered(Generic[_Key, _Made]):
    """What a function makes, by what it was made for; what was used last, as much as fits. For several threads.

    Two threads that want the same at once may both make it.
    """

    def __init__(self, make: Callable[[_Key], _Made], *, entries: int, nbytes: int, least: int = 1):
        """Keeps `entries` at most, and `least` or those whose `nbytes` (of those that have it) are at most `nbytes`."""
        self._make, self._entries, self._limit, self._least = make, entries, nbytes, least
        self._known: OrderedDict[_Key, _Made] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def __call__(self, key: _Key) -> _Made:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        made = self._make(key)
        with self._lock:
            if key not in self._known:
                self._known[key] = made
                self._nbytes += _nbytes(made)
            while len(self._known) > self._entries or (self._nbytes > self._limit and len(self._known) > self._least):
                _, oldest = self._known.popitem(last=False)
                self._nbytes -= _nbytes(oldest)
        return made

    def clear(self) -> None:
        with self._lock:
            self._known.clear()
            self._nbytes = 0


def _nbytes(made: Any) -> int:
    return getattr(made, "nbytes", 0)
