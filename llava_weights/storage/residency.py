"""What of a file lies in the system's page cache: `cachestat` of Linux 6.5 and later, else `mincore`.

Both tell it only of files that are this user's own, or that it may write: others could be spied on. Where neither tells, nothing counts as
cached.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

CACHESTAT = 451  # the number of the system call, the same on every architecture but Alpha
MAP_FAILED = ctypes.c_void_p(-1).value
PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    """`struct cachestat_range` of linux/mman.h."""

    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    """`struct cachestat` of linux/mman.h, in pages."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted"))


def resident_stretches(fd: int, size: int, stretch: int) -> frozenset[int]:
    """The numbers of those stretches of `stretch` bytes, of a file of `size` bytes, of which the page cache holds more than half.

    `stretch` is a multiple of the page size. Reads nothing and raises nothing; empty where the system does not tell.
    """
    if sys.platform != "linux" or not size:
        return frozenset()
    counts = by_cachestat(fd, size, stretch)
    if counts is None:
        counts = by_mincore(fd, size, stretch) or []
    return frozenset(n for n, pages in enumerate(counts) if 2 * pages * PAGE > min(stretch, size - n * stretch))


def by_cachestat(fd: int, size: int, stretch: int) -> list[int] | None:
    """Cached pages of each stretch; None where the kernel does not have the call, or does not allow it."""
    found, counts = [], _Counts()
    for start in range(0, size, stretch):
        asked = _Range(start, min(stretch, size - start))
        if _libc.syscall(ctypes.c_long(CACHESTAT), fd, ctypes.byref(asked), ctypes.byref(counts), 0):
            return None
        found.append(counts.cached)
    return found


def by_mincore(fd: int, size: int, stretch: int) -> list[int] | None:
    """The same by `mincore` over a map that is never read; None for a file of another user, of which it says that all is cached."""
    if os.fstat(fd).st_uid != os.geteuid():
        return None
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    _libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    _libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address in (None, MAP_FAILED):
        return None
    try:
        found = []
        for start in range(0, size, stretch):
            length = min(stretch, size - start)
            pages = ctypes.create_string_buffer(-(-length // PAGE))
            if _libc.mincore(address + start, length, pages):
                return None
            found.append(sum(byte & 1 for byte in pages.raw))
        return found
    finally:
        _libc.munmap(address, size)
