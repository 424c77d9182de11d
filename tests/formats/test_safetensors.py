"""The safetensors reader against files by the real library and hostile ones; the header writer against `save_file`."""

from __future__ import annotations

import json
import os
import random
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from llava_weights.errors import InputError
from llava_weights.formats.safetensors import index_safetensors, make_header
from llava_weights.storage.reading import SourceFile, Workspace
from llava_weights.tensors.dtypes import ITEMSIZE
from llava_weights.tensors.lazy import LazyTensor

PATIENT = settings(max_examples=60)
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
CONTENTS = st.dictionaries(NAMES | st.just('"\\/'), st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), max_size=12)


def make(contents: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    """Real tensors of these dtypes and shapes; the values count up, so that no two stretches of bytes are alike."""
    tensors = {}
    for number, (name, (dtype, shape)) in enumerate(contents.items()):
        size = LazyTensor(dtype=dtype, shape=shape).nbytes
        raw = torch.tensor([(number * 37 + i) % 2 if dtype == "BOOL" else (number * 37 + i) % 251 for i in range(size)], dtype=torch.uint8)
        tensors[name] = raw.view(getattr(torch, DTYPES[dtype])).reshape(shape)
    return tensors


def build(header: object, data: bytes = b"", *, padding: bytes = b"", length: int | None = None) -> bytes:
    """A file by hand. `header` is JSON text, or what `json.dumps` takes."""
    raw = (header if isinstance(header, bytes) else json.dumps(header).encode()) + padding
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def test_every_dtype_is_known_to_the_tests() -> None:
    assert DTYPES.keys() == ITEMSIZE.keys()


@PATIENT
@given(CONTENTS, st.dictionaries(st.just("format"), NAMES))
@example({"a": ("F16", (3,)), "b": ("F32", (1,))}, {})
def test_header_is_the_librarys(contents: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> None:
    """Law 1: header and layout are byte for byte those of `safetensors.torch.save`, in whatever order the tensors come."""
    tensors = make(contents)
    saved = safetensors.torch.save(tensors, metadata or None)
    lazy = [(name, LazyTensor(dtype=dtype, shape=shape)) for name, (dtype, shape) in contents.items()]
    header, places = make_header(lazy, metadata)
    assert saved.startswith(header)
    assert make_header(lazy[::-1], metadata) == (header, places)
    assert sorted(name for name, _, _ in places) == sorted(contents)
    assert all(tensor is dict(lazy)[name] for name, tensor, _ in places)
    written = bytearray(header)
    for name, _, offset in places:
        assert len(written) == len(header) + offset
        written += tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensors[name].numel() else b""
    assert written == saved


def test_golden_bytes(tmp_path: Path) -> None:
    lazy = [
        ("b", LazyTensor(dtype="F16", shape=(2, 1))),
        ("é", LazyTensor(dtype="I64", shape=())),
        ("a", LazyTensor(dtype="F16", shape=(0,))),
    ]
    header, places = make_header(lazy, {"format": "pt"})
    assert header == (
        b"\xc8\0\0\0\0\0\0\0"
        + '{"__metadata__":{"format":"pt"},"é":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
        '"a":{"dtype":"F16","shape":[0],"data_offsets":[8,8]},"b":{"dtype":"F16","shape":[2,1],"data_offsets":[8,12]}}'.encode().ljust(0xC8)
    )
    assert [(name, offset) for name, _, offset in places] == [("é", 0), ("a", 8), ("b", 8)]
    tensors = {"a": torch.zeros(0).half(), "b": torch.zeros(2, 1).half(), "é": torch.tensor(0)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == header + bytes(12)


def test_several_metadata_keys_are_sorted_and_readable() -> None:
    header, _ = make_header([], {"b": "2", "a": '"', "c": "\n"})
    assert header[8:].rstrip() == rb'{"__metadata__":{"a":"\"","b":"2","c":"\n"}}'
    expected = {safetensors.torch.save({}, {"c": "\n", "a": '"', "b": "2"}) for _ in range(200)}
    assert header in expected  # the library's order is random: one of six


@pytest.mark.parametrize("name", ["", "__metadata__", "a\tb", "a\0", "x" * 4097, "twice"])
def test_no_header_for_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match="name of a tensor"):
        make_header([("twice", LazyTensor(dtype="U8", shape=())), (name, LazyTensor(dtype="U8", shape=()))], {})


@PATIENT
@given(CONTENTS)
def test_files_of_the_library_are_read(tmp_path_factory: pytest.TempPathFactory, contents: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    path = tmp_path_factory.mktemp("x") / "model.safetensors"
    saved = make(contents)
    safetensors.torch.save_file(saved, path, {"format": "pt", "more": "é"})
    tensors, metadata = index_safetensors(path)
    assert metadata == {"format": "pt", "more": "é"}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == contents
    assert [tensor.offset for tensor in tensors.values()] == sorted(tensor.offset for tensor in tensors.values())
    work = Workspace()
    for name, tensor in tensors.items():
        raw = bytearray(tensor.nbytes)
        tensor.rows_into(memoryview(raw), 0, tensor.rows, work)
        assert not raw or raw == saved[name].reshape(-1).view(torch.uint8).numpy().tobytes()
    work.close()


def test_reference_file(fixtures: Path) -> None:
    path = fixtures / "A-delta-v0/expected-307-by-main/model.safetensors"
    tensors, metadata = index_safetensors(path)
    expected = safetensors.torch.load_file(path)
    assert metadata == {"format": "pt"}
    assert {name: tensor.shape for name, tensor in tensors.items()} == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    assert {tensor.file for tensor in tensors.values()} == {SourceFile.at(path, sha256(whole[8 : 8 + size]).hexdigest())}
    header, _ = make_header(list(tensors.items()), metadata)
    assert whole.startswith(header)


def test_offsets_need_no_alignment(tmp_path: Path) -> None:
    """Other writers do not sort by width. Values are copied when they are read, so alignment does not matter."""
    path = tmp_path / "odd.safetensors"
    path.write_bytes(build({"b": entry("F32", [1], [1, 5]), "a": entry("U8", [1], [0, 1])}, b"\7\0\0\x80?", padding=b" "))
    tensors, metadata = index_safetensors(path)
    assert list(tensors) == ["a", "b"]
    assert metadata == {}
    assert tensors["b"].offset % 4
    raw = bytearray(4)
    work = Workspace()
    tensors["b"].rows_into(memoryview(raw), 0, 1, work)
    work.close()
    assert raw == b"\0\0\x80?"


ONE = {"a": entry()}
HOSTILE = {
    "empty file": b"",
    "seven bytes": b"\x02\0\0\0\0\0\0",
    "length 0": build(b"", length=0) + b"{}",
    "length 1": build(b"{"),
    "length 2^64-1": build(ONE, bytes(4), length=2**64 - 1),
    "length 100,000,001": build(ONE, bytes(4), length=100_000_001),
    "length beyond the file": build(ONE, bytes(4), length=1000),
    "overlap": build({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)),
    "same bytes twice": build({"a": entry(), "b": entry()}, bytes(4)),
    "hole": build({"a": entry(), "b": entry(offsets=[5, 9])}, bytes(9)),
    "hole at the start": build({"a": entry(offsets=[1, 5])}, bytes(5)),
    "trailing byte": build(ONE, bytes(5)),
    "short data": build(ONE, bytes(3)),
    "data without tensors": build({}, bytes(1)),
    "end before begin": build({"a": entry(shape=[0], offsets=[4, 0])}, bytes(4)),
    "negative offset": build({"a": entry(offsets=[-4, 0])}, bytes(4)),
    "negative axis": build({"a": entry(shape=[-2, -2])}, bytes(4)),
    "float offsets": build({"a": entry(offsets=[0, 4.0])}, bytes(4)),
    "bool offsets": build({"a": entry(shape=[1], offsets=[False, True])}, bytes(1)),
    "bool shape": build({"a": entry(shape=[True], offsets=[0, 1])}, bytes(1)),
    "text offsets": build({"a": entry(offsets="04")}, bytes(4)),
    "three offsets": build({"a": entry(offsets=[0, 4, 4])}, bytes(4)),
    "shape is a number": build({"a": entry(shape=4)}, bytes(4)),
    "shape does not fill": build({"a": entry(shape=[5])}, bytes(4)),
    "shape wraps to 0": build({"a": entry(shape=[2**32, 2**32], offsets=[0, 0])}),
    "shape wraps to 4": build({"a": entry(shape=[2**62 + 1, 4])}, bytes(4)),
    "shape times width wraps": build({"a": entry("F32", [2**62 + 1])}, bytes(4)),
    "huge axis beside 0": build({"a": entry(shape=[0, 2**63], offsets=[0, 0])}),
    "1,000 axes": build({"a": entry(shape=[1] * 1000, offsets=[0, 1])}, bytes(1)),
    "unknown dtype": build({"a": entry("Q4_0")}, bytes(4)),
    "dtype of half a byte": build({"a": entry("F4", [8])}, bytes(4)),
    "dtype is a list": build({"a": entry(["U8"])}, bytes(4)),
    "unknown field": build({"a": entry(zip=1)}, bytes(4)),
    "missing field": build({"a": {"dtype": "U8", "shape": [4]}}, bytes(4)),
    "entry is a list": build({"a": ["U8", [4], [0, 4]]}, bytes(4)),
    "header is a list": build([ONE], bytes(4)),
    "empty name": build({"": entry()}, bytes(4)),
    "NUL in a name": build({"a\0b": entry()}, bytes(4)),
    "escape in a name": build({"\x1b[2J": entry()}, bytes(4)),
    "TAB in a name": build({"a\tb": entry()}, bytes(4)),
    "long name": build({"é" * 2049: entry()}, bytes(4)),
    "key twice": build(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
    "field twice": build(b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
    "metadata key twice": build(b'{"__metadata__":{"format":"pt","format":"tf"}}'),
    "metadata twice": build(b'{"__metadata__":{},"__metadata__":{}}'),
    "metadata is a list": build({"__metadata__": []}),
    "metadata number": build({"__metadata__": {"format": 1}}),
    "byte order mark": build(b"\xef\xbb\xbf{}"),
    "leading blank": build(b" {}"),
    "trailing NUL": build(b"{}\0\0"),
    "not UTF-8": build(b'{"\xff":%s}' % json.dumps(entry()).encode(), bytes(4)),
    "lone surrogate": build({"\ud800": entry()}, bytes(4)),
    "nested 100,000 deep": build(b'{"a":' * 100_000 + b"}" * 100_000),
    "lists 100,000 deep": build(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "20,001 empty tensors": build(
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(20_001)) + b"}"
    ),
    "5,000,000 lists": build(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"),
    "17 MB of metadata": build(b'{"__metadata__":{"a":"' + b"x" * 17_000_000 + b'"}}'),
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "HTML": b"<!DOCTYPE html><html>404</html>",
    "zip": b"PK\x03\x04\0\0\0\0\0\0\0\0\0\0\0\0",
    "GGUF": b"GGUF\3\0\0\0\0\0\0\0\0\0\0\0",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(InputError, match=r"`model.safetensors`") as caught:
        index_safetensors(path)
    assert caught.value.what.isprintable()
    if case in ("Git LFS pointer", "HTML", "zip", "GGUF"):
        assert case in caught.value.what


def test_traps_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe", "folder", "missing"):
        with pytest.raises(InputError, match=f"`{name}.safetensors`"):
            index_safetensors(tmp_path / f"{name}.safetensors")


def test_truncated_anywhere(tmp_path: Path, fixtures: Path) -> None:
    whole = (fixtures / "common/clip-tiny-42px/model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "model.safetensors"
    chance = random.Random(20)
    for size in [
        *(chance.randrange(header, len(whole)) for _ in range(20)),
        *(chance.randrange(1, header) for _ in range(20)),
        len(whole) - 1,
    ]:
        path.write_bytes(whole[:size])
        with pytest.raises(InputError) as caught:
            index_safetensors(path)
        if size >= header:
            assert f"is truncated, expected {len(whole):,} bytes, found {size:,}" in caught.value.what
        elif size >= 8:
            assert f"is truncated, expected at least {header:,} bytes, found {size:,}" in caught.value.what


SOUND = safetensors.torch.save(
    make({"a.weight": ("F16", (2, 3)), "b": ("BF16", ()), "é": ("F32", (0, 7)), "c": ("U8", (5,))}), {"format": "pt"}
)


@settings(PATIENT, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.sampled_from(b'{}[]":,0123456789ab-\\ \0\xff')), min_size=1, max_size=3))
def test_damaged_header_is_read_as_the_library_reads_it_or_refused(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]]
) -> None:
    """No exception but InputError; and whatever is accepted, the library accepts too, with the same meaning."""
    damaged = bytearray(SOUND)
    for position, value in edits:
        damaged[position] = value
    path = tmp_path_factory.mktemp("x") / "model.safetensors"
    path.write_bytes(damaged)
    try:
        tensors, _ = index_safetensors(path)
    except InputError:
        return
    try:
        expected = safetensors.torch.load(bytes(damaged))
    except SafetensorError as error:
        pytest.fail(f"we read what the library refuses: {error}")
    assert {name: (DTYPES[t.dtype], t.shape) for name, t in tensors.items()} == {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in expected.items()
    }
    for name, tensor in tensors.items():
        raw = damaged[tensor.offset : tensor.offset + tensor.nbytes]
        assert not raw or raw == expected[name].reshape(-1).view(torch.uint8).numpy().tobytes()
