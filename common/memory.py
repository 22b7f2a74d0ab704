"""The C heap of a process that moves megabytes: freed memory is kept for the next message instead of given back.

glibc maps a block above its threshold anew and unmaps it when it is freed, so a message costs a page fault per 4 KiB,
twice or more. Its threshold rises by itself, but not above 32 MiB; with small buckets no gain is to be seen
(bench/RESULTS.md). Kept, the same memory serves the next message.

Who sets malloc's tunables in the environment (`GLIBC_TUNABLES`, `MALLOC_ARENA_MAX`) has decided, and is not overruled.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_NEVER = (1 << 31) - 1
_TOP_PAD_BYTES = 4 << 20
_ARENAS = 2
_TUNABLES = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_")
"""What glibc reads, beside `GLIBC_TUNABLES`."""


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Tells glibc's malloc to keep what is freed. Call it first thing in a process.

    Returns:
        Whether malloc does so now; False without glibc, or where the environment sets malloc's tunables.
    """
    if sys.platform != "linux" or _is_tuned(environment):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = (
        (_M_MMAP_THRESHOLD, 1 << 30),
        (_M_TRIM_THRESHOLD, _NEVER),
        (_M_TOP_PAD, _TOP_PAD_BYTES),
        (_M_ARENA_MAX, _ARENAS),
    )
    taken = [mallopt(name, value) == 1 for name, value in settings]
    return all(taken)


def _is_tuned(environment: Mapping[str, str]) -> bool:
    return any(name in environment for name in _TUNABLES) or "glibc.malloc." in environment.get("GLIBC_TUNABLES", "")
