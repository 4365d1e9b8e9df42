"""What is kept for later calls: made once, what was used last, in bounded memory."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from splat.locks import Lock
from splat.remembered import Remembered


@dataclasses.dataclass
class Sized:
    key: int
    nbytes: int


def memory(make: Callable[[int], Any], **limits: int) -> tuple[Remembered, Callable[[int], Any]]:
    """The memory, and what asks it for what `make` makes of a key."""
    remembered = Remembered(**limits)
    return remembered, lambda key: remembered(key, lambda: make(key))


def test_texts_in_keys_count() -> None:
    remembered = Remembered(entries=99, nbytes=60)
    for n in range(9):
        remembered((f"{n}" * 20, (n, "")), lambda n=n: n)
    assert len(remembered) == 3


def test_made_once() -> None:
    made: list[int] = []
    remembered, get = memory(lambda key: made.append(key) or [key], entries=9, nbytes=9)
    assert get(1) is get(1)
    assert get(2) == [2]
    assert made == [1, 2]
    remembered.clear()
    assert len(remembered) == 0
    assert get(1) == [1]
    assert made == [1, 2, 1]


def test_nothing_is_a_result_too() -> None:
    made: list[int] = []
    _, get = memory(made.append, entries=9, nbytes=9)
    assert [get(1), get(1)] == [None, None]
    assert made == [1]


def test_what_was_used_last_is_kept() -> None:
    made: list[int] = []
    remembered, get = memory(lambda key: made.append(key) or key, entries=2, nbytes=9)
    for key in (1, 2, 1, 3, 1, 2):
        assert get(key) == key
    assert made == [1, 2, 3, 2]
    assert len(remembered) == 2


def test_bytes_are_counted() -> None:
    remembered, get = memory(lambda key: Sized(key, 10 * key), entries=99, nbytes=60)
    kept = []
    for key in (1, 2, 3, 4, 1, 9):
        get(key)
        kept.append(list(remembered._known))
    assert kept == [[1], [1, 2], [1, 2, 3], [4], [4, 1], [9]]


def test_some_are_kept_whatever_they_weigh() -> None:
    remembered, get = memory(lambda key: Sized(key, 100), entries=3, nbytes=60, least=2)
    kept = []
    for key in (1, 2, 3):
        get(key)
        kept.append(list(remembered._known))
    assert kept == [[1], [1, 2], [2, 3]]


def test_what_fails_is_made_again() -> None:
    remembered, get = memory(lambda key: 1 / key, entries=9, nbytes=9)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            get(0)
    assert len(remembered) == 0


def test_two_threads_that_want_the_same() -> None:
    """Both may make it; it counts once."""
    both = threading.Barrier(2, timeout=30)

    def make(key: int) -> Sized:
        both.wait()
        return Sized(key, 10)

    remembered, get = memory(make, entries=9, nbytes=15)
    threads = [threading.Thread(target=get, args=(1,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(remembered), remembered._nbytes) == (1, 10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_a_lock_that_a_forked_process_does_not_wait_for() -> None:
    script = """
import os, signal, threading
from splat.remembered import Remembered
remembered, held, over = Remembered(entries=9), threading.Event(), threading.Event()
def hold():
    with remembered._lock:
        held.set()
        over.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if not child:
    signal.alarm(20)
    os._exit(remembered(1, lambda: 42))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
over.set()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"


def test_locks_of_what_is_gone_are_gone() -> None:
    reference = weakref.ref(Lock())
    gc.collect()
    assert reference() is None
