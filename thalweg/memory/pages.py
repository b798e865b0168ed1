"""Memory that will be written soon, taken from the system beforehand."""

from __future__ import annotations

import ctypes
import mmap
import sys

_POPULATE_WRITE = 23  # madvise: Linux 5.14 and later; older ones answer that they do not know it


def take_pages(address: int, size: int) -> None:
    """Have the whole pages of [address, address + size) now instead of at their first write. What they hold stays, also
    under somebody's writes. Where the system cannot do it nothing happens: they come when they are written."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (address + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if whole > 0 and sys.platform == "linux":
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(first, whole, _POPULATE_WRITE)
