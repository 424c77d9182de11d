"""The checksum of a file as the disk has it: of every size, on file systems with and without reads past the page cache."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128

from llava_weights.errors import InputError, OutputError
from llava_weights.write.plan import READ_BACK_BYTES
from llava_weights.write.read_back import ReadBack, disk_sum
from llava_weights.write.shard import ShardResult

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
    monkeypatch.setattr("llava_weights.write.read_back.set_direct", lambda fd, on: direct.append(on) or on)
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


def result_of(data: bytes) -> ShardResult:
    return ShardResult("shard", len(data), "", xxh3_128(data).hexdigest(), {}, {})


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_is_read_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """No further than it is on the disk; where reads go through the cache, when it is finished."""
    if not direct:
        monkeypatch.setattr("llava_weights.write.read_back.set_direct", lambda fd, on: False)
    data, part = os.urandom(3 * READ_BACK_BYTES + 77), tmp_path / ".shard.part"
    part.write_bytes(data[: 2 * READ_BACK_BYTES] + bytes(len(data) - 2 * READ_BACK_BYTES))
    results, sizes, first = {"shard": result_of(data)}, list[int](), threading.Event()

    def on_bytes(nbytes: int, name: str) -> None:
        sizes.append(nbytes)
        first.set()

    with ReadBack(tmp_path, results, None, on_bytes) as reader:
        reader.follow("shard", part, READ_BACK_BYTES + 5)
        if direct and can_direct(part):
            assert first.wait(60)
            assert sizes == [READ_BACK_BYTES]
        rewrite(part, data)
        os.rename(part, tmp_path / "shard")
        reader.add(results["shard"])
        reader.finish()
    assert results
    assert sum(sizes) == len(data)


def can_direct(path: Path) -> bool:
    """Whether this file system reads past the cache at all."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def rewrite(path: Path, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.write(data)
        os.fsync(file.fileno())


@pytest.mark.parametrize("fault", ["", "damaged", "replaced", "gone"])
def test_a_shard_that_is_followed(tmp_path: Path, fault: str) -> None:
    """What is read is compared, also where somebody put another file in its place before it was finished."""
    data, part = os.urandom(2 * READ_BACK_BYTES + 100), tmp_path / ".shard.part"
    good = result_of(data)
    part.write_bytes(data if fault != "damaged" else data[:-1] + bytes([data[-1] ^ 1]))
    results, read = {"shard": good}, list[int]()
    with ReadBack(tmp_path, results, None, lambda nbytes, name: read.append(nbytes)) as reader:
        reader.follow("shard", part, 100)  # too little to begin
        assert not reader.growing
        reader.follow("shard", part, READ_BACK_BYTES)
        os.rename(part, tmp_path / "shard")
        if fault == "replaced":
            (tmp_path / "other").write_bytes(bytes(len(data)))
            os.rename(tmp_path / "other", tmp_path / "shard")
        if fault == "gone":
            (tmp_path / "shard").unlink()
        reader.add(good)
        if not fault:
            reader.finish()
            assert (results, sum(read), reader.left) == ({"shard": good}, len(data), 0)
            return
        with pytest.raises(OutputError, match="does not come back"):
            reader.finish()
    assert not results


def test_a_shard_that_is_never_finished(tmp_path: Path) -> None:
    """Its writer failed: the reader ends with the run."""
    part, before = tmp_path / ".shard.part", threading.active_count()
    part.write_bytes(bytes(3 * READ_BACK_BYTES))
    with ReadBack(tmp_path, {}, None, lambda nbytes, name: None) as reader:
        reader.follow("shard", part, READ_BACK_BYTES)
    assert threading.active_count() == before
