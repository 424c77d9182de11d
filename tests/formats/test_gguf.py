"""The GGUF container: written as PyPI's `gguf` writes it, read back by it, and hostile files."""

from __future__ import annotations

import resource
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import Finished
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from llava_weights.errors import InputError
from llava_weights.formats.gguf import MAX_HEADER, TYPES, GgufKey, index_gguf, make_gguf_header
from llava_weights.tensors.dtypes import BLOCKS
from llava_weights.tensors.lazy import LazyTensor

KEYS = (
    GgufKey("general.architecture", "text", "llama"),
    GgufKey("general.name", "text", "Café \U0001f999"),
    GgufKey("a.number", "u32", 2**32 - 1),
    GgufKey("a.signed", "i32", -5),
    GgufKey("a.float", "f32", 0.5),
    GgufKey("a.flag", "bool", True),
    GgufKey("a.texts", "text", ("", "b", "\u2581a")),
    GgufKey("a.numbers", "i32", (1, -2, 3)),
    GgufKey("a.floats", "f32", (0.25, -1000.0)),
)
TENSORS = (("one.weight", "F16", (3, 5)), ("two", "F32", (7,)), ("three.weight", "Q8_0", (2, 64)), ("four", "BF16", (1, 2, 3, 4)))


def lazy(tensors: Sequence[tuple[str, str, tuple[int, ...]]] = TENSORS) -> list[tuple[str, LazyTensor]]:
    return [(name, LazyTensor(dtype=dtype, shape=shape)) for name, dtype, shape in tensors]


def whole(path: Path, keys: Sequence[GgufKey] = KEYS, tensors: Sequence[tuple[str, str, tuple[int, ...]]] = TENSORS) -> Path:
    """A file with these keys and tensors, whose bytes count up."""
    header, places = make_gguf_header(keys, lazy(tensors))
    data = bytearray()
    for name, tensor, offset in places:
        assert offset == len(data)
        data += bytes(i % 251 for i in range(tensor.nbytes)) if name else bytes(tensor.nbytes)
    path.write_bytes(header + data)
    return path


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    ours = whole(tmp_path / "ours.gguf")
    writer = GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_name(str(KEYS[1].value))
    writer.add_uint32("a.number", 2**32 - 1)
    writer.add_int32("a.signed", -5)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.flag", True)
    for key in KEYS[6:]:
        writer.add_array(key.name, list(key.value))  # type: ignore[arg-type]
    for name, dtype, shape in TENSORS:
        nbytes = LazyTensor(dtype=dtype, shape=shape).nbytes
        raw = np.array([i % 251 for i in range(nbytes)], np.uint8).reshape(*shape[:-1], -1)
        if dtype in ("F16", "F32"):
            raw = raw.view({"F16": np.float16, "F32": np.float32}[dtype]).reshape(shape)
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert ours.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_both_readers_agree(tmp_path: Path) -> None:
    path = whole(tmp_path / "a.gguf")
    tensors, keys = index_gguf(path)
    theirs = GGUFReader(path)
    assert [(t.name, t.tensor_type.name, tuple(map(int, t.shape[::-1])), int(t.data_offset)) for t in theirs.tensors] == [
        (name, tensor.dtype, tensor.shape, tensor.offset) for name, tensor in tensors.items()
    ]
    assert tuple(keys.values()) == KEYS
    assert [theirs.fields[key.name].contents() for key in KEYS] == [
        list(key.value) if isinstance(key.value, tuple) else key.value for key in KEYS
    ]


def test_the_tables_are_those_of_the_library() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    assert {name: number.value for name, number in GGMLQuantizationType.__members__.items() if name in TYPES} == TYPES
    assert {name: GGML_QUANT_SIZES[GGMLQuantizationType[name]] for name in BLOCKS} == BLOCKS


def test_names_that_no_file_can_have() -> None:
    for name in ("", "x" * 64, "a\nb"):
        with pytest.raises(ValueError, match="can't be the name"):
            make_gguf_header((), lazy([(name, "F16", (1, 2))]))
    with pytest.raises(ValueError, match="it is taken"):
        make_gguf_header((), lazy([("a", "F16", (1, 2)), ("a", "F16", (1, 2))]))


# --- hostile files ------------------------------------------------------------------------------------------------------


def text(value: str | bytes, size: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if size is None else size) + data


def head(tensors: int = 1, keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def entry(name: str | bytes = "a", axes: Sequence[int] = (32,), kind: int = 0, offset: int = 0, rank: int | None = None) -> bytes:
    return text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes) if rank is None else rank, *axes, kind, offset)


def file(*entries: bytes, keys: Sequence[bytes] = (), data: int = 128) -> bytes:
    start = head(len(entries), len(keys)) + b"".join(keys) + b"".join(entries)
    return start + bytes(-len(start) % 32 + data)


def key(kind: GGUFValueType | int, value: bytes, name: str | bytes = "k") -> bytes:
    return text(name) + struct.pack("<I", kind) + value


ARRAY, STRING, U32, U8, BOOL = 9, 8, 4, 0, 7


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return key(ARRAY, struct.pack("<IQ", kind, count) + items)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "magic only": (b"GGUF", "truncated"),
    "another magic": (b"GGML" + bytes(60), "does not begin with `GGUF`"),
    "HTML": (b"<!DOCTYPE html>" + bytes(40), "model.gguf"),
    "version 0": (head(version=0) + bytes(64), "version 0"),
    "version 1": (head(version=1) + bytes(64), "version 1"),
    "version 2**32 - 1": (head(version=2**32 - 1) + bytes(64), "version 4,294,967,295"),
    "big-endian": (head(version=3 << 24) + bytes(64), "big-endian"),
    "2**60 tensors": (head(tensors=2**60) + bytes(64), "1,152,921,504,606,846,976 tensors"),
    "2**64 - 1 keys": (head(keys=2**64 - 1) + bytes(64), "more than"),
    "20,001 tensors": (head(tensors=20_001) + bytes(64), "more than"),
    "more keys than bytes": (head(keys=4000), "truncated"),
    "more tensors than bytes": (head(tensors=20_000) + bytes(24), "truncated|a name has"),
    "a key of 2**60 bytes": (file(keys=[text(b"", 2**60)]), "a key has"),
    "an empty key": (file(keys=[key(U32, bytes(4), b"")]), "no name"),
    "a key of no UTF-8": (file(keys=[key(U32, bytes(4), b"\xff")]), "not UTF-8"),
    "a key with a NUL": (file(keys=[key(U32, bytes(4), b"a\0")]), "no name"),
    "a key twice": (file(keys=[key(U32, bytes(4))] * 2), "there twice"),
    "a text of 2**60 bytes": (file(keys=[key(STRING, text(b"", 2**60))]), "has 1,152,921,504,606,846,976 bytes"),
    "a text of 2**64 - 1 bytes": (file(keys=[key(STRING, text(b"", 2**64 - 1))]), "has 18,446,744,073,709,551,615 bytes"),
    "a text behind the end": (file(keys=[key(STRING, text(b"abc", 4000))]), "truncated"),
    "a text of no UTF-8": (file(keys=[key(STRING, text(b"\xc3("))]), "not UTF-8"),
    "an unknown kind": (file(keys=[key(13, bytes(8))]), "unknown kind 13"),
    "an array of 2**60 numbers": (file(keys=[array(U32, 2**60)]), "has 1,152,921,504,606,846,976 items"),
    "an array of 2**60 texts": (file(keys=[array(STRING, 2**60)]), "has 1,152,921,504,606,846,976 items"),
    "an array behind the end": (file(keys=[array(U32, 1_000_000)]), "truncated"),
    "an array of arrays": (file(keys=[array(ARRAY, 1, struct.pack("<IQ", U8, 0))]), "array of arrays"),
    "an array of an unknown kind": (file(keys=[array(77, 1, bytes(8))]), "unknown kind 77|array of arrays"),
    "many arrays": (file(keys=[key(ARRAY, struct.pack("<IQ", U8, 500_000) + bytes(500_000), f"k{n}") for n in range(5)]), "in all"),
    "half a flag": (file(keys=[key(BOOL, b"\2")]), "neither true nor false"),
    "an alignment of 0": (file(entry(), keys=[key(U32, bytes(4), "general.alignment")]), "alignment is `?0"),
    "an alignment of 33": (file(entry(), keys=[key(U32, struct.pack("<I", 33), "general.alignment")]), "alignment is `?33"),
    "an alignment of 2**31": (file(entry(), keys=[key(U32, struct.pack("<I", 2**31), "general.alignment")]), "alignment"),
    "an alignment in words": (file(entry(), keys=[key(STRING, text("32"), "general.alignment")]), "alignment is"),
    "a tensor of no name": (file(entry(name="")), "a name has"),
    "a tensor with a long name": (file(entry(name="x" * 64)), "a name has"),
    "a tensor with a name of 2**60 bytes": (head() + text(b"", 2**60) + bytes(64), "the name of a tensor has"),
    "a tensor with escape codes": (file(entry(name="\x1b[31m")), "can't be printed"),
    "a tensor twice": (file(entry(), entry(offset=128), data=256), "there twice"),
    "no axes": (file(entry(axes=(), rank=0)), "0 axes"),
    "five axes": (file(entry(axes=(1, 1, 1, 1, 1))), "5 axes"),
    "2**32 - 1 axes": (file(entry(axes=(1,), rank=2**32 - 1)), "4,294,967,295 axes"),
    "an axis of 0": (file(entry(axes=(0,))), "no possible shape"),
    "an axis of 2**60": (file(entry(axes=(2**60,))), "no possible shape"),
    "axes whose product is 2**64": (file(entry(axes=(2**32, 2**32))), "no possible shape"),
    "half a block": (file(entry(axes=(16,), kind=8)), "no possible shape"),
    "an unknown type": (file(entry(kind=99)), "type 99 is unknown"),
    "a type that was removed": (file(entry(kind=4)), "type 4 is unknown"),
    "an unaligned offset": (file(entry(offset=1)), "is not where"),
    "an offset of 2**63": (file(entry(offset=2**63)), "is not where"),
    "a hole": (file(entry(), entry("b", offset=160), data=320), "is not where"),
    "an overlap": (file(entry(), entry("b", offset=64), data=256), "overlaps"),
    "the same bytes twice": (file(entry(), entry("b", offset=0)), "overlaps"),
    "values behind the end": (file(entry(axes=(2**40,))), "is truncated"),
    "half of the values": (file(entry(), data=64), "is truncated"),
    "more than its values": (file(entry(), data=4096), "is too long"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, tmp_path: Path) -> None:
    data, says = HOSTILE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=says) as caught:
            index_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000 + 24 * len(data)
    assert caught.value.hint


def test_a_whole_file_of_the_same_parts_is_read(tmp_path: Path) -> None:
    """So that none of the hostile files above is refused for something else."""
    path = tmp_path / "model.gguf"
    path.write_bytes(file(entry(), entry("b", offset=128), keys=[key(U32, bytes(4)), key(STRING, text("x"), "l")], data=256))
    assert list(index_gguf(path)[0]) == ["a", "b"]


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "convert"])
@pytest.mark.parametrize("folder", [False, True])
def test_commands_refuse_hostile_files(command: str, folder: bool, cli: object, tmp_path: Path) -> None:
    path = tmp_path / "in" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(HOSTILE["an array of 2**60 texts"][0])
    path = path.parent if folder else path
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    more = {"diff": [str(path)], "convert": ["--to", "gguf", "-o", str(tmp_path / "out")]}.get(command, [])
    found: Finished = cli(command, str(path), *more)  # type: ignore[operator]
    assert not (tmp_path / "out").exists()
    assert found.code == 3
    assert "1,152,921,504,606,846,976 items" in found.stdout + found.stderr
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_header_is_read_no_further_than_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(head(keys=1) + key(STRING, text(b"", MAX_HEADER)))
    with open(path, "r+b") as out:
        out.truncate(1 << 40)
    with pytest.raises(InputError, match="its header has more than 50,331,648 bytes"):
        index_gguf(path)
