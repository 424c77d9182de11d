"""A streamed shard is the file that safetensors would write, with the digests that sha256sum would give."""

from __future__ import annotations

import hashlib
import os
import resource
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128

from llava_weights.errors import InputError, OutputError
from llava_weights.storage import direct
from llava_weights.storage.reading import Record, SourceFile
from llava_weights.tensors.lazy import LazyTensor, PermuteRope, Stored, cast
from llava_weights.tensors.windows import cut, row_ranges
from llava_weights.write.plan import Settings, Shard
from llava_weights.write.shard import write_shard

DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}


def on_disk(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Stored]:
    """The tensors one after another in a headerless file, each with the CRC-32 of its bytes."""
    path, laid_out = folder / "weights.raw", b""
    places = {}
    for name, tensor in tensors.items():
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        places[name] = Record(len(laid_out), len(data), zlib.crc32(data))
        laid_out += data
    path.write_bytes(laid_out)
    file = SourceFile.at(path)
    return {
        name: Stored(dtype=DTYPES[tensor.dtype], shape=tuple(tensor.shape), file=file, offset=places[name].offset, record=places[name])
        for name, tensor in tensors.items()
    }


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "zeta.half": torch.randn(37, 11).half(),
        "alpha.half": torch.randn(5, 300).half(),
        "norm": torch.randn(48),
        "ids": torch.arange(12).view(3, 4),
        "flags": torch.arange(7, dtype=torch.uint8),
        "brain": torch.randn(8, 2, 3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 6).half(),
        "größe": torch.randn(2, 2),
    }


@pytest.mark.parametrize("settings", [Settings(1, 64), Settings(2, 1000), Settings(3, 1 << 20), Settings(2, 16, drop_cache=False)])
def test_bytes_and_digests(tmp_path: Path, tensors: dict[str, torch.Tensor], settings: Settings) -> None:
    safetensors.torch.save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    written: list[int] = []
    shard = Shard("found.safetensors", tuple(on_disk(tmp_path, tensors).items()))
    result = write_shard(shard, tmp_path, settings, on_bytes=written.append)
    found = (tmp_path / "found.safetensors").read_bytes()
    assert found == (tmp_path / "expected").read_bytes()
    assert result.sha256 == hashlib.sha256(found).hexdigest()
    assert result.nbytes == len(found)
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values())
    raw = {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    assert result.tensors == {name: blake3(data).hexdigest() for name, data in raw.items()}
    assert result.read_back == xxh3_128(found).hexdigest()
    assert sorted(os.listdir(tmp_path)) == ["expected", "found.safetensors", "weights.raw"]


@pytest.mark.parametrize("refused", [False, True])
def test_whole_blocks_are_written_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    """Behind a header of any size; offsets, sizes and addresses are what the system asks for. Where it refuses, the cache is used."""
    torch.manual_seed(4)
    tensors = {
        **{f"{n:04000}": torch.randn(3) for n in range(20)},
        **{f"w{n}": torch.randn(rows, 333).half() for n, rows in enumerate((400, 700, 5, 901))},
    }
    safetensors.torch.save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    blocks, original = list[tuple[int, int]](), direct.write_direct

    def write_direct(fd: int, data: memoryview, offset: int) -> int:
        address = np.frombuffer(data, np.uint8).ctypes.data
        assert (offset % 4096, len(data) % 4096, address % 4096) == (0, 0, 0)
        blocks.append((offset, len(data)))
        return 0 if refused else original(fd, data, offset)

    monkeypatch.setattr("llava_weights.write.shard.write_direct", write_direct)
    monkeypatch.setattr("llava_weights.write.shard.set_direct", lambda fd, on: direct.set_direct(fd, on) or True)
    reached = list[int]()
    shard = Shard("found.safetensors", tuple(on_disk(tmp_path, tensors).items()))
    write_shard(shard, tmp_path, Settings(2, 200_000), on_disk=lambda path, nbytes: reached.append(nbytes))
    size = (tmp_path / "expected").stat().st_size
    assert (tmp_path / "found.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    assert reached == sorted(reached)
    assert len(blocks) == 1 if refused else sum(nbytes for _, nbytes in blocks) > size * 0.8


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9), st.sampled_from([1, 2, 4])), min_size=1, max_size=8), st.integers(1, 200))
def test_windows_tile_the_data(shapes: list[tuple[int, int, int]], size: int) -> None:
    tensors = []
    for number, (rows, columns, heads) in enumerate(shapes):
        plain = LazyTensor(dtype="F16", shape=(rows * heads * 2, columns))
        tensors.append((str(number), PermuteRope(dtype="F16", shape=plain.shape, source=plain, heads=heads) if rows else plain))
    windows = list(cut(tensors, 100, size))
    end = 100
    for window in windows:
        assert window.offset == end
        assert window.nbytes == sum(piece.nbytes for piece in window.pieces)
        assert [piece.at for piece in window.pieces] == [sum(p.nbytes for p in window.pieces[:i]) for i in range(len(window.pieces))]
        end += window.nbytes
    assert end == 100 + sum(tensor.nbytes for _, tensor in tensors)
    for name, tensor in tensors:
        ranges = [(piece.start, piece.stop) for window in windows for piece in window.pieces if piece.name == name]
        assert ranges == list(row_ranges(tensor, size))
        assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
        assert ranges[-1][1] == tensor.rows
        assert all(start % tensor.row_unit == 0 for start, _ in ranges)


@given(st.integers(2, 500), st.integers(1, 2000), st.integers(1, 4000))
def test_no_window_is_a_single_row(rows: int, columns: int, size: int) -> None:
    assert all(stop - start > 1 for start, stop in row_ranges(LazyTensor(dtype="F16", shape=(rows, columns)), size))


def test_memory_does_not_grow_with_the_tensor() -> None:
    small, large = (LazyTensor(dtype="F16", shape=(rows, 5120)) for rows in (32_000, 3_200_000))
    largest = [max(window.nbytes for window in cut([("x", tensor)], 0, 8 << 20)) for tensor in (small, large)]
    assert largest[0] == largest[1] <= 8 << 20


def test_a_flipped_bit_in_a_zip_record_is_found(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    lazy = on_disk(tmp_path, tensors)
    data = bytearray((tmp_path / "weights.raw").read_bytes())
    data[lazy["alpha.half"].offset + 100] ^= 4
    (tmp_path / "weights.raw").write_bytes(data)
    file = SourceFile.at(tmp_path / "weights.raw")
    lazy = {name: replace(tensor, file=file) for name, tensor in lazy.items()}
    with pytest.raises(InputError, match="CRC-32"):
        write_shard(Shard("x.safetensors", tuple(lazy.items())), tmp_path, Settings(2, 128))
    assert os.listdir(tmp_path) == ["weights.raw"]


def test_a_source_that_changed_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    lazy = on_disk(tmp_path, tensors)
    os.utime(tmp_path / "weights.raw", (1, 1))
    with pytest.raises(InputError, match="changed while"):
        write_shard(Shard("x.safetensors", tuple(lazy.items())), tmp_path, Settings())


def test_a_source_that_shrank_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    lazy = on_disk(tmp_path, tensors)
    os.truncate(tmp_path / "weights.raw", 100)
    file = SourceFile.at(tmp_path / "weights.raw")
    lazy = {name: replace(tensor, file=file) for name, tensor in lazy.items()}
    with pytest.raises(InputError, match="changed while"):
        write_shard(Shard("x.safetensors", tuple(lazy.items())), tmp_path, Settings())


def test_overflow_names_the_tensor(tmp_path: Path) -> None:
    lazy = on_disk(tmp_path, {"fine": torch.ones(4), "wide": torch.tensor([1e6, 1.0])})
    from llava_weights.tensors.lazy import Add

    wide = cast(lazy["wide"], "F16")
    items = (("fine", lazy["fine"]), ("wide", Add(dtype="F16", shape=(2,), base=wide, delta=wide)))
    with pytest.raises(InputError, match="`wide` would hold inf or NaN"):
        write_shard(Shard("x.safetensors", items), tmp_path, Settings())


def test_a_full_disk_is_an_output_error(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    lazy = on_disk(tmp_path, tensors)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OutputError, match=r"can't write `x\.safetensors`: File too large"):
            write_shard(Shard("x.safetensors", tuple(lazy.items())), tmp_path, Settings())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["weights.raw"]


def test_an_interruption_leaves_no_file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(Shard("x.safetensors", tuple(on_disk(tmp_path, tensors).items())), tmp_path, Settings(3, 32), on_bytes=interrupt)
    assert os.listdir(tmp_path) == ["weights.raw"]
