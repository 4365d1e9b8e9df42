"""What is made once and kept for later calls, in bounded memory."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from splat.locks import Lock

_Made = TypeVar("_Made")


class Remembered:
    """What was made, by what it was made for; what was used last, as much as fits. For several threads.

    Two threads that want the same at once may both make it. What is no longer kept is told by its `forget()`, if it
    has one.
    """

    def __init__(self, *, entries: int, nbytes: float = math.inf, least: int = 1):
        """Keeps `entries` at most, and `least` or those that take at most `nbytes`.

        An entry takes the `nbytes` of what was made, if it has them, and those of the texts in its key.
        """
        self._entries, self._limit, self._least = entries, nbytes, least
        self._known: OrderedDict[Hashable, Any] = OrderedDict()
        self._nbytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._known)

    def __call__(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """What `make()` gives for the key, which says all that it depends on."""
        try:  # each step is whole by itself, and another thread may drop the key between them
            made = self._known[key]
            self._known.move_to_end(key)
            return made
        except KeyError:
            pass
        made, dropped = make(), []
        with self._lock:
            if key not in self._known:
                self._known[key] = made
                self._nbytes += _nbytes(key, made)
            while len(self._known) > self._entries or (self._nbytes > self._limit and len(self._known) > self._least):
                oldest = self._known.popitem(last=False)
                self._nbytes -= _nbytes(*oldest)
                dropped.append(oldest[1])
        _forget(dropped)
        return made

    def clear(self) -> None:
        with self._lock:
            dropped = list(self._known.values())
            self._known.clear()
            self._nbytes = 0
        _forget(dropped)


def _forget(dropped: list[Any]) -> None:
    for made in dropped:
        if forget := getattr(made, "forget", None):
            forget()


def _nbytes(key: Any, made: Any) -> int:
    return _text_bytes(key) + getattr(made, "nbytes", 0)


def _text_bytes(key: Any) -> int:
    if isinstance(key, tuple):
        return sum(map(_text_bytes, key))
    return len(key) if isinstance(key, str) else 0
