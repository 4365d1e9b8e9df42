"""Locks for threads, in processes that may be forked."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable


class Lock:
    """A lock that is free in a process that was forked while another thread held it: that thread is not there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _every.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        self._lock = threading.Lock()


_every: weakref.WeakSet[Lock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in _every:
        lock.renew()


def in_forked(renew: Callable[[], None]) -> None:
    """Has `renew` called in each process that is forked from this one, before anything else runs there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)


in_forked(_renew_all)
