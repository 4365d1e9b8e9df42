"""Which of the tests marked `sampled` are run: see `conftest.py`."""

from __future__ import annotations

import zlib


def is_drawn(sample: str, share: float, test: str) -> bool:
    """The same in every process."""
    return zlib.crc32(f"{sample} {test}".encode()) < share * 2**32
