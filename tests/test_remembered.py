"""What is kept for later calls: made once, what was used last, in bounded memory."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from splat.remembered import Remembered


@dataclasses.dataclass
class Sized:
    key: int
    nbytes: int


def test_made_once() -> None:
    made: list[int] = []
    remembered = Remembered[int, list[int]](lambda key: made.append(key) or [key], entries=9, nbytes=9)
    assert remembered(1) is remembered(1)
    assert remembered(2) == [2]
    assert made == [1, 2]
    remembered.clear()
    assert len(remembered) == 0
    assert remembered(1) == [1]
    assert made == [1, 2, 1]


def test_nothing_is_a_result_too() -> None:
    made: list[int] = []
    remembered = Remembered[int, None](made.append, entries=9, nbytes=9)
    assert [remembered(1), remembered(1)] == [None, None]
    assert made == [1]


def test_what_was_used_last_is_kept() -> None:
    made: list[int] = []
    remembered = Remembered[int, int](lambda key: made.append(key) or key, entries=2, nbytes=9)
    for key in (1, 2, 1, 3, 1, 2):
        assert remembered(key) == key
    assert made == [1, 2, 3, 2]
    assert len(remembered) == 2


def test_bytes_are_counted() -> None:
    remembered = Remembered[int, Sized](lambda key: Sized(key, 10 * key), entries=99, nbytes=60)
    kept = []
    for key in (1, 2, 3, 4, 1, 9):
        remembered(key)
        kept.append(list(remembered._known))
    assert kept == [[1], [1, 2], [1, 2, 3], [4], [4, 1], [9]]


def test_some_are_kept_whatever_they_weigh() -> None:
    remembered = Remembered[int, Sized](lambda key: Sized(key, 100), entries=3, nbytes=60, least=2)
    kept = []
    for key in (1, 2, 3):
        remembered(key)
        kept.append(list(remembered._known))
    assert kept == [[1], [1, 2], [2, 3]]


def test_what_fails_is_made_again() -> None:
    remembered = Remembered[int, float](lambda key: 1 / key, entries=9, nbytes=9)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            remembered(0)
    assert len(remembered) == 0


def test_two_threads_that_want_the_same() -> None:
    """Both may make it; it counts once."""
    both = threading.Barrier(2, timeout=30)

    def make(key: int) -> Sized:
        both.wait()
        return Sized(key, 10)

    remembered = Remembered[int, Sized](make, entries=9, nbytes=15)
    threads = [threading.Thread(target=remembered, args=(1,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(remembered), remembered._nbytes) == (1, 10)
