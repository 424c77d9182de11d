"""Reads and writes past the page cache: any range, and what happens where a file system refuses or cuts them short."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from llava_weights.errors import InputError
from llava_weights.storage.direct import BLOCK, SPARE_BYTES, read_direct, set_direct, write_direct
from llava_weights.storage.reading import DropBehind, SourceFile, Workspace, private_buffer

RANGES = [(0, 1), (1, 4095), (4095, 2), (4096, 8192), (5000, 200_000), (123, SPARE_BYTES * 2 + 77)]


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    data = os.urandom(SPARE_BYTES * 2 + 12_345)
    (tmp_path / "file").write_bytes(data)
    return data


@pytest.mark.parametrize(("offset", "size"), RANGES)
def test_any_range(tmp_path: Path, data: bytes, offset: int, size: int) -> None:
    out, fd = bytearray(size), os.open(tmp_path / "file", os.O_RDONLY)
    try:
        count = read_direct(fd, offset, memoryview(out), private_buffer(SPARE_BYTES))
        supported = set_direct(fd, True)
    finally:
        os.close(fd)
    assert count in (0, size)
    assert count or not supported
    assert out[:count] == data[offset : offset + count]


def test_a_file_that_ends_early(tmp_path: Path, data: bytes) -> None:
    """As many bytes as there are; a worker then says that the file changed."""
    out, fd = bytearray(20_000), os.open(tmp_path / "file", os.O_RDONLY)
    try:
        count = read_direct(fd, len(data) - 5000, memoryview(out), private_buffer(SPARE_BYTES))
    finally:
        os.close(fd)
    assert out[:count] == data[-5000:][:count]
    file = SourceFile.at(tmp_path / "file")
    work = Workspace()
    try:
        work.read(file, 0, memoryview(bytearray(100_000)))
        os.truncate(tmp_path / "file", 150_000)
        with pytest.raises(InputError, match="changed while it was being read"):
            work.read(file, 100_000, memoryview(bytearray(100_000)))
    finally:
        work.close()


@pytest.mark.parametrize("most", [1, 5000, 8192, 100_000])
@pytest.mark.parametrize("refused", [False, True])
def test_short_and_refused_reads(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch, most: int, refused: bool) -> None:
    """The worker has the same bytes whatever comes at a time, and where the file system has no such reads the cache is asked."""
    original, direct = os.preadv, list[bool]()

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        blocks = not offset % BLOCK and not len(buffers[0]) % BLOCK
        if direct and direct[-1] and (refused or not blocks):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(fd, [buffers[0][: max(most, 1 + offset % BLOCK)]], offset)

    monkeypatch.setattr("llava_weights.storage.direct.set_direct", lambda fd, on: direct.append(on) or on)
    monkeypatch.setattr(os, "preadv", preadv)
    work, out, file = Workspace(behind=DropBehind()), bytearray(70_001), SourceFile.at(tmp_path / "file")
    work.behind.warm[file] = frozenset()  # although it was just written
    try:
        work.read(file, 4321, memoryview(out))
    finally:
        work.close()
    assert out == data[4321 : 4321 + len(out)]
    assert direct == [True, False]


def test_a_disk_that_fails(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(os, "pwrite", fail)
    with open(tmp_path / "file", "r+b") as file:
        with pytest.raises(OSError, match="Input/output"):
            os.preadv(file.fileno(), [bytearray(1)], read_direct(file.fileno(), 0, memoryview(bytearray(10)), private_buffer(SPARE_BYTES)))
        with pytest.raises(OSError, match="Input/output"):
            write_direct(file.fileno(), private_buffer(BLOCK), 0)


def test_writes(tmp_path: Path) -> None:
    """Whole blocks; a refusal leaves the rest to the cache."""
    fd, buffer = os.open(tmp_path / "new", os.O_RDWR | os.O_CREAT), private_buffer(3 * BLOCK)
    buffer[:] = os.urandom(len(buffer))
    try:
        set_direct(fd, True)
        assert write_direct(fd, buffer, BLOCK) in (0, len(buffer))
        set_direct(fd, False)
        os.pwrite(fd, buffer, BLOCK)
    finally:
        os.close(fd)
    assert (tmp_path / "new").read_bytes() == bytes(BLOCK) + bytes(buffer)
