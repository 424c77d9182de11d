"""The checksum of a file as the disk has it: of every size, on file systems with and without reads past the page cache."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128

from llava_weights.errors import InputError
from llava_weights.write.plan import READ_BACK_BYTES
from llava_weights.write.read_back import disk_sum

SIZES = [0, 1, 4095, 4096, 12345, READ_BACK_BYTES, READ_BACK_BYTES + 4097]


@pytest.mark.parametrize("size", SIZES)
def test_sum_of_a_file(tmp_path: Path, size: int) -> None:
    data, read = os.urandom(size), list[int]()
    (tmp_path / "file").write_bytes(data)
    assert disk_sum(tmp_path / "file", read.append) == xxh3_128(data).hexdigest()
    assert sum(read) == size


@pytest.mark.parametrize("shortest", [1, 100, 4096])
def test_reads_that_a_file_system_refuses_or_cuts_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shortest: int) -> None:
    """As network file systems do: a short read leaves a place where the kernel allows no read past the cache."""
    data = os.urandom(20_000)
    (tmp_path / "file").write_bytes(data)
    original, refused = os.preadv, list[int]()

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        if offset % 4096 and not refused:
            refused.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(fd, [buffers[0][: shortest * (1 + offset)]], offset)

    direct = list[bool]()
    monkeypatch.setattr("llava_weights.write.read_back._set_direct", lambda fd, on: direct.append(on) or on)
    monkeypatch.setattr(os, "preadv", preadv)
    assert disk_sum(tmp_path / "file") == xxh3_128(data).hexdigest()
    assert direct == ([True, False] if shortest % 4096 else [True])


def test_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        disk_sum(tmp_path / "none")
    with pytest.raises(InputError, match="a folder"):
        disk_sum(tmp_path)


def test_it_stops(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * READ_BACK_BYTES))
    stopping, read = threading.Event(), list[int]()

    def stop(nbytes: int) -> None:
        read.append(nbytes)
        stopping.set()

    disk_sum(tmp_path / "file", stop, stopping)
    assert read == [READ_BACK_BYTES]
