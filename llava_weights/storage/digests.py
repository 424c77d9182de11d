"""Which digest is taken of what.

    sha256      of files: what `sha256sum -c` and the Hub compare
    blake3      of the values of tensors, and of the roots over them: several times as fast, as safe, and without instructions of its own
    xxh3_128    of what was written and is read back: as fast as memory; it finds what a disk did, not what a person did

Sources: BLAKE3's paper (O'Connor, Aumasson, Neves, Wilcox-O'Hearn 2020), Python packages `blake3` and `xxhash`. Both let other threads
run while they digest.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Protocol

FILES = "sha256"
TENSORS = "blake3"
READ_BACK = "xxh3_128"
TENSOR_DIGESTS = (TENSORS, "sha256")  # the second in records of schema 1 and in integer deltas of version 1


class Digest(Protocol):
    """A digest that is being taken, of bytes in order."""

    def update(self, data: Any, /) -> Any:
        """Take the next bytes."""

    def hexdigest(self) -> str:
        """Of all bytes so far, in hexadecimal."""


def new_digest(algorithm: str) -> Digest:
    """A new digest: "blake3" (in the calling thread alone), "xxh3_128", or a name of hashlib's. Raises ValueError for any other."""
    if algorithm == TENSORS:
        from blake3 import blake3

        return blake3(max_threads=1)
    if algorithm == READ_BACK:
        from xxhash import xxh3_128

        return xxh3_128()
    return hashlib.new(algorithm, usedforsecurity=False)


def digest_of(data: Any, algorithm: str) -> str:
    """The digest of bytes that are there as a whole, in hexadecimal."""
    digest = new_digest(algorithm)
    digest.update(data)
    return digest.hexdigest()


def named(algorithm: str, digest: str) -> str:
    """`algorithm:digest`, for a digest that stands alone."""
    return f"{algorithm}:{digest}"


def is_digest(value: Any) -> bool:
    """Whether `value` is a sha256 or BLAKE3 in lower-case hexadecimal."""
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))
