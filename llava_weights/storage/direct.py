"""Reading and writing past the page cache (O_DIRECT), where the file system has that: the kernel copies nothing and keeps no pages.

Offsets, sizes and addresses have to be multiples of BLOCK there. What a file system refuses goes through the cache.
"""

from __future__ import annotations

import errno
import fcntl
import os

BLOCK = 4096  # bytes; disks ask for 512 or 4096
SPARE_BYTES = 2 << 20  # of a piece that is read into spare memory, since neither tensors nor buffers begin at multiples of BLOCK


def set_direct(fd: int, direct: bool) -> bool:
    """Read and write past the page cache from here on, or not; whether it is so."""
    flag: int = getattr(os, "O_DIRECT", 0)  # only Linux has it
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~flag
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | flag if direct else flags)
    except OSError:  # a file system that has no such reads
        return False
    return direct and bool(flag)


def read_direct(fd: int, offset: int, out: memoryview, spare: memoryview) -> int:
    """Fill `out` from `offset` on, through `spare`, which is page-aligned; the bytes that came, fewer where the file ends or the file
    system refuses. No other thread uses `fd` meanwhile. Raises OSError where the disk fails."""
    import numpy as np

    done, target, source = 0, np.frombuffer(out, np.uint8), np.frombuffer(spare, np.uint8)
    if not set_direct(fd, True):
        return 0
    try:
        while done < len(out):
            before = (offset + done) % BLOCK
            wanted = min(len(spare), -(-(before + len(out) - done) // BLOCK) * BLOCK)
            count = min(os.preadv(fd, [spare[:wanted]], offset + done - before) - before, len(out) - done)
            if count <= 0:
                break
            np.copyto(target[done : done + count], source[before : before + count])  # a slice of a memoryview would stop other threads
            done += count
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        set_direct(fd, False)
    return done


def write_direct(fd: int, data: memoryview, offset: int) -> int:
    """Write the blocks of `data` at `offset`, both multiples of BLOCK as is the address; the bytes that were written, fewer where the file
    system refuses. Raises OSError where the disk fails or is full."""
    done = 0
    try:
        while done < len(data):
            done += os.pwrite(fd, data[done:], offset + done)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return done
