"""How an integer delta stores values: ranks of floats, their differences, byte planes, zstandard frames.

Each function turns one block, a few MiB. Memory is the caller's; what comes from a file is never trusted with a size.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np

from ..errors import InputError
from . import DOWNLOAD_AGAIN, shown

LEVEL = 3  # zlib 6 comes within three points of it and is far slower (facts: peers 4.1)
CHUNK = 1 << 16  # values turned at once: with their two temporaries they stay in the processor's cache


def pack(raw: memoryview, base: memoryview, width: int, planes: memoryview) -> bytes:
    """`raw`, little-endian values of `width` bytes, as one zstandard frame with its content's size and checksum.

    The first values, those that `base` holds too, are stored as differences `rank(raw) - rank(base)` modulo 2^(8 width), folded:
    0, -1, 1, -2, ... become 0, 1, 2, 3, ... The others keep their bits. All low bytes come first, then all next ones, and so
    on. `planes`, as long as `raw`, is overwritten.
    """
    _split(raw, base, width, planes)
    packed: bytes = _zstandard().ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True).compress(planes)
    return packed


def unpack(packed: memoryview, size: int, base: memoryview, width: int, out: memoryview, *, skip: int = 0, name: str) -> None:
    """The inverse of `pack`: the values from number `skip` on, as many as `out` takes; `base` starts at the same value.

    Raises InputError, naming the tensor `name`, unless `packed` is one frame that holds `size` bytes and has their checksum.
    """
    zstandard = _zstandard()
    try:
        frame = zstandard.get_frame_parameters(packed)
        if (frame.content_size, frame.has_checksum) != (size, True):  # before any memory is taken
            raise zstandard.ZstdError(f"it does not hold {size:,} bytes with a checksum")
        planes = zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise InputError(f"a block of {shown(name)} is damaged", facts={"reason": error}, hint=DOWNLOAD_AGAIN) from error
    _join(memoryview(planes), width, skip, base, out)


def _split(raw: memoryview, base: memoryview, width: int, planes: memoryview) -> None:
    values, known, lanes = _values(raw, width), _values(base, width), _lanes(planes, width)
    difference, spare = np.empty(CHUNK, values.dtype), np.empty(CHUNK, values.dtype)
    for part, common in _chunks(len(values), len(known)):
        stored, temporary = difference[: part.stop - part.start], spare[: part.stop - part.start]
        if common:
            _rank(values[part], stored)
            _rank(known[part], temporary)
            stored -= temporary
            np.right_shift(stored, 8 * width - 1, out=temporary)  # -1 where it is negative, else 0
            stored <<= 1
            stored ^= temporary
        else:
            stored[:] = values[part]
        unsigned = stored.view(f"<u{width}")
        for lane in lanes:  # shifts and casts are twice as fast as strided copies
            np.copyto(lane[part], unsigned, casting="unsafe")
            unsigned >>= 8


def _join(planes: memoryview, width: int, skip: int, base: memoryview, out: memoryview) -> None:
    values, known, lanes = _values(out, width), _values(base, width), _lanes(planes, width)[:, skip:]
    difference, spare = np.empty(CHUNK, values.dtype), np.empty(CHUNK, values.dtype)
    for part, common in _chunks(len(values), len(known)):
        stored, temporary = difference[: part.stop - part.start], spare[: part.stop - part.start]
        unsigned = stored.view(f"<u{width}")
        unsigned[:] = lanes[-1][part]
        for lane in lanes[-2::-1]:
            unsigned <<= 8
            unsigned |= lane[part]
        if common:
            np.bitwise_and(stored, 1, out=temporary)
            np.negative(temporary, out=temporary)
            unsigned >>= 1
            stored ^= temporary
            _rank(known[part], temporary)
            stored += temporary
            _rank(stored, values[part])
        else:
            values[part] = stored


def _rank(bits: np.ndarray, out: np.ndarray) -> None:
    """The rank of each float among all floats, from its bits; the same again is the way back. Memory of both is separate."""
    np.right_shift(bits, 8 * bits.itemsize - 1, out=out)
    out &= np.iinfo(bits.dtype).max
    out ^= bits


def _values(raw: memoryview, width: int) -> np.ndarray:
    return np.frombuffer(raw, f"<i{width}")


def _lanes(planes: memoryview, width: int) -> np.ndarray:
    return np.frombuffer(planes, np.uint8).reshape(width, len(planes) // width)


def _chunks(count: int, common: int) -> Iterator[tuple[slice, bool]]:
    """Numbers of values, at most CHUNK at a time, and whether the base has them."""
    for first, last, both in ((0, common, True), (common, count, False)):
        for start in range(first, last, CHUNK):
            yield slice(start, min(start + CHUNK, last)), both


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError as error:
        raise InputError("integer deltas need the package `zstandard`", hint="pip install zstandard") from error
    return zstandard
