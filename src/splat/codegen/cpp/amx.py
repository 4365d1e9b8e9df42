"""Matrix tiles (Intel AMX): Linux grants them to a process that asks."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@functools.cache
def is_granted() -> bool:
    """Whether this process may use them; asked once. Also refused where a thread's signal stack is too small."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arguments = (ctypes.c_long(number) for number in (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA))
    return ctypes.CDLL(None).syscall(*arguments) == 0
