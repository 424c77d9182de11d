"""The `.bin` reader against torch.load on real files, and against hostile ones built by hand: nothing runs, nothing hangs."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_weights.errors import InputError
from llava_weights.formats.torch_zip import index_torch_zip, zip_records
from llava_weights.storage.reading import Workspace, crc_errors
from llava_weights.tensors.lazy import Stored

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
REAL = sorted([*FIXTURES.rglob("*.bin"), *FIXTURES.rglob("*.pth")])
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def values(tensor: Stored, work: Workspace) -> bytes:
    raw = bytearray(tensor.nbytes)
    tensor.rows_into(memoryview(raw), 0, tensor.rows, work)
    return bytes(raw)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def check_against_torch(path: Path) -> None:
    """Same names in the same order, same dtypes, shapes and bytes as torch.load, and the records' CRCs hold."""
    loaded = torch.load(path, weights_only=True)
    index = index_torch_zip(path)
    work = Workspace()
    assert list(index) == list(loaded)
    for name, tensor in index.items():
        assert (DTYPES[tensor.dtype], tensor.shape) == (loaded[name].dtype, tuple(loaded[name].shape))
        assert values(tensor, work) == raw_bytes(loaded[name])
    assert not list(crc_errors([work]))
    work.close()


# --- what torch.save writes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", REAL, ids=lambda path: str(path.relative_to(FIXTURES)))
def test_real_files_are_what_torch_load_makes_of_them(path: Path) -> None:
    check_against_torch(path)


def test_there_are_real_files_of_two_writers() -> None:
    assert {b"/byteorder" in path.read_bytes() for path in REAL} == {True, False}  # torch 2.13 and 2.0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = [(), (0,), (3, 0, 2), (1,), (5,), (1, 7, 1), (2, 3, 4)]
    torch.save({str(shape): torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype) for shape in shapes}, tmp_path / "x.bin")
    check_against_torch(tmp_path / "x.bin")


def test_a_state_dict_with_metadata_parameters_and_views(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Conv2d(1, 2, 3))
    state = module.state_dict()
    assert state._metadata
    whole = torch.arange(40.0).reshape(10, 4)
    state |= {"rows": whole[3:7], "tied": whole, "column.of.one": whole[:, :1][2:3], "parameter": torch.nn.Parameter(whole[1])}
    torch.save(state, tmp_path / "x.bin")
    check_against_torch(tmp_path / "x.bin")
    index = index_torch_zip(tmp_path / "x.bin")
    assert index["rows"].record == index["tied"].record
    assert index["rows"].offset - index["tied"].offset == 3 * 4 * 4


def test_old_rebuild_functions_and_plain_zip_writers(tmp_path: Path) -> None:
    old = call("torch._utils _rebuild_tensor", storage(numel=4), number(1), tupled(number(3)), tupled(number(1)))
    index = index_torch_zip(build(tmp_path, dict_of(x=old), {"0": struct.pack("<4f", 1, 2, 3, 4)}))
    assert struct.unpack("<3f", values(index["x"], Workspace())) == (2, 3, 4)


def test_an_empty_dict_and_a_thousand_tensors(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "empty.bin")
    assert index_torch_zip(tmp_path / "empty.bin") == {}
    torch.save({f"layer.{number}": torch.tensor([number]) for number in range(1000)}, tmp_path / "many.bin")
    check_against_torch(tmp_path / "many.bin")


@pytest.mark.parametrize("path", REAL[:3] + [path for path in REAL if "torch-2.0" in str(path)][:1], ids=lambda path: path.name)
def test_members_are_those_that_zipfile_sees(path: Path) -> None:
    data = path.read_bytes()
    with zipfile.ZipFile(path) as reference:
        expected = sorted(reference.infolist(), key=lambda info: info.header_offset)
        members = zip_records(path)
        assert [(m.name, m.header_offset, m.size, m.crc32) for m in members] == [
            (info.filename, info.header_offset, info.file_size, info.CRC) for info in expected
        ]
        for member in members:
            assert data[member.offset : member.offset + member.size] == reference.read(member.name)
            assert data[member.entry_offset :].startswith(b"PK\x01\x02")
            assert member.name.encode() == data[member.entry_offset + 46 :][: len(member.name)]


def test_no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    original = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, offset: (read.append((offset, sum(map(len, buffers)))), original(fd, buffers, offset))[1]
    )
    weights = {tensor.record for tensor in index_torch_zip(REAL[0]).values()}
    reads = [(begin, begin + count) for begin, count in read if begin]  # but for the first, which tells the kind of file
    assert reads
    assert not [record for record in weights for begin, end in reads if begin < record.offset + record.size and record.offset < end]


def test_neither_torch_nor_pickle_is_imported() -> None:
    code = "import sys; from pathlib import Path; from llava_weights.formats.torch_zip import index_torch_zip as index\n"
    code += f"assert index(Path({str(REAL[0])!r})); print(sorted({{'torch', 'pickle', '_pickle', 'zipfile'}} & set(sys.modules)))"
    before = "import sys, numpy; print(sorted({'torch', 'pickle', '_pickle', 'zipfile'} & set(sys.modules)))"  # numpy has its own
    imported, by_numpy = (
        subprocess.run([sys.executable, "-c", text], cwd=FIXTURES.parent, capture_output=True, text=True, check=True).stdout
        for text in (code, before)
    )
    assert imported == by_numpy


def test_the_header_digest_binds_names_not_values(tmp_path: Path) -> None:
    def digest(name: str, tensor: torch.Tensor) -> str:
        torch.save({name: tensor}, tmp_path / "x.bin")
        return index_torch_zip(tmp_path / "x.bin")[name].file.header_sha256

    assert digest("a", torch.zeros(4)) == digest("a", torch.zeros(4))
    assert len({digest("a", torch.zeros(4)), digest("b", torch.zeros(4)), digest("a", torch.zeros(2, 2)), digest("a", torch.ones(4))}) == 4


def test_zip64_as_torch_writes_it(tmp_path: Path) -> None:
    """A sparse copy of `torch.save({"a": torch.zeros(2**32 + 100, dtype=torch.int8), "b": torch.ones(3)})` by torch 2.13: the
    large member has (size, 0) in its own header and 24-byte descriptor, later ones their offset."""
    big = 2**32 + 100
    pickled = dict_of(a=tensor(kind="Char", numel=big, shape=[big]), b=tensor(key="1", numel=3, shape=[3]))
    ones = np.ones(3, "<f4").tobytes()
    contents = [
        ("data.pkl", pickled, len(pickled), zlib.crc32(pickled)),
        ("data/0", b"", big, 2838121701),
        ("data/1", ones, 12, zlib.crc32(ones)),
    ]
    directory, position = b"", 0
    with (tmp_path / "x.bin").open("wb") as file:
        for part, data, size, crc in contents:
            name, large, far = f"x/{part}".encode(), size >= 2**32, position >= 2**32
            extra = struct.pack("<2H2Q", 1, 16, size, 0) if large else struct.pack("<2HQ", 1, 8, position) if far else b""
            extra += struct.pack("<2s2s", b"FB", b"\x07\0") + b"Z" * 7
            file.seek(position)
            file.write(struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0x808, 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra + data)
            wide = [size, size] * large + [position] * far
            field = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
            short = [0xFFFFFFFF if large else size] * 2
            directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, 0x808, 0, 0, 0, crc, *short, len(name), len(field), 0, 0, 0, 0,
                                     0xFFFFFFFF if far else position) + name + field  # fmt: skip
            position += 30 + len(name) + len(extra) + size
            file.seek(position)
            position += file.write(struct.pack("<4sI2Q" if large else "<4sI2I", b"PK\7\x08", crc, size, size))
        file.write(directory + struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 798, 45, 0, 0, 3, 3, len(directory), position))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, position + len(directory), 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 3, 3, len(directory), 0xFFFFFFFF, 0))
    index = index_torch_zip(tmp_path / "x.bin")
    assert index["a"].shape == (big,)
    assert index["b"].offset > big
    assert values(index["b"], Workspace()) == ones
    with zipfile.ZipFile(tmp_path / "x.bin") as reference:  # the independent reader agrees that the file is sound
        assert reference.read("x/data/1") == ones


# --- hostile and damaged files ------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def named(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def tupled(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(name: str, *arguments: bytes) -> bytes:
    return named(name) + tupled(*arguments) + b"R"


def storage(key: str = "0", kind: str = "Float", numel: int = 4) -> bytes:
    return tupled(text("storage"), named(f"torch {kind}Storage"), text(key), text("cpu"), number(numel)) + b"Q"


def tensor(
    key: str = "0", kind: str = "Float", numel: int = 4, offset: int = 0, shape: list[int] | None = None, strides: list[int] | None = None
) -> bytes:
    shape = [4] if shape is None else shape
    strides = [1] * len(shape) if strides is None else strides
    sizes = tupled(*map(number, shape)), tupled(*map(number, strides))
    hooks = call("collections OrderedDict")
    return call("torch._utils _rebuild_tensor_v2", storage(key, kind, numel), number(offset), *sizes, b"\x89", hooks)


def items(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"


def dict_of(**values: bytes) -> bytes:
    return b"\x80\x02" + items(**values) + b"."


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


DATA = {"0": struct.pack("<4f", 1, 2, 3, 4)}
SOUND = dict_of(x=tensor())


def build(folder: Path, pickled: bytes, data: Mapping[str, bytes] = DATA, more: Mapping[str, bytes] | None = None, root: str = "x") -> Path:
    """A sound zip, by Python's own writer."""
    path = folder / "x.bin"
    numbered = {f"{root}/data/{key}": raw for key, raw in data.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, content in {f"{root}/data.pkl": pickled, **numbered, **(more or {})}.items():
            file.writestr(zipfile.ZipInfo(name), content)
    return path


def nested_tuple(depth: int) -> bytes:
    """Each level holds the one below twice: 2^depth steps to hash, one memo slot to store."""
    return b")" + b"".join(b"q\x00h\x00\x86" for _ in range(depth))


PICKLES: dict[str, tuple[bytes, str]] = {
    "os.system": (program(call("os system", text("touch marker"))), "it asks to run `os.system`"),
    "eval": (program(call("builtins eval", text("open('marker', 'w')"))), "`builtins.eval`"),
    "beside a tensor": (dict_of(x=tensor(), y=call("posix system", text("touch marker"))), "`posix.system`"),
    "getattr chain": (program(call("builtins getattr", named("os system"), text("x"))), "`builtins.getattr`"),
    "dotted torch name": (program(named("torch._utils os.system")), "`torch._utils.os.system`"),
    "meta tensor": (
        dict_of(x=call("torch._utils _rebuild_meta_tensor_no_storage", named("torch float32"))),
        "_rebuild_meta_tensor_no_storage",
    ),
    "bytearray(2**33)": (program(call("builtins bytearray", number(2**33))), "`builtins.bytearray`"),
    "terminal codes in the name": (program(named("os \x1b[2Jsystem")), "it asks to run"),
    "what pickle.dumps makes": (pickle.dumps(OrderedDict(x=os.getcwd)), "getcwd`"),
    "protocol 4": (pickle.dumps({"x": os.system}, protocol=4), "system`"),
    "protocol 5 frames": (pickle.dumps({"x": 1}, protocol=5), "protocol 5"),
    "STACK_GLOBAL of what is not a name": (program(nested_tuple(60) + b"K\x01\x93"), "not a name"),
    "INST": (program(b"(ios\nsystem\n"), "opcode"),
    "NEWOBJ": (program(named("collections OrderedDict") + b")\x81"), "opcode"),
    "EXT1": (program(b"\x82\x01"), "opcode"),
    "call of a storage type": (program(call("torch FloatStorage", number(4))), "calls something"),
    "call of a storage": (program(storage() + b")R"), "calls something"),
    "call of a text": (program(text("os.system") + b")R"), "calls something"),
    "OrderedDict of something": (program(call("collections OrderedDict", b"]")), "calls something"),
    "BUILD of a tensor": (program(tensor() + items(__setstate__=b"N") + b"b"), "state of an object"),
    "BUILD of a dict": (program(b"}" + items(_metadata=b"N") + b"b"), "state of an object"),
    "BUILD with more": (program(call("collections OrderedDict") + items(_metadata=b"N", update=b"N") + b"b"), "state of an object"),
    "SETITEM of a tensor": (program(tensor() + b"K\x00K\x01s"), "not a dict"),
    "SETITEMS of a list": (program(b"](K\x00K\x01u"), "not a dict"),
    "APPEND to a tensor": (program(tensor() + b"K\x01a"), "not a list"),
    "nested tuple as key": (program(b"}" + nested_tuple(100) + b"K\x01s"), "as key"),
    "tensor as key": (program(b"}" + tensor() + b"K\x01s"), "as key"),
    "colliding integers as keys": (program(b"}(" + b"".join(number(k * (2**61 - 1)) + b"N" for k in range(1, 50_000)) + b"u"), "as key"),
    "key twice": (program(b"}(" + text("x") + tensor() + text("x") + tensor() + b"u"), "twice"),
    "an odd number of items": (program(b"}(" + text("x") + b"u"), "damaged"),
    "nested lists": (program(b"]" * 124_999 + b"a" * 124_998), "`list`, not a dict"),
    "a million nested lists": (program(b"]" * 1_000_000 + b"a" * 999_999), "250,000 opcodes"),
    "itself inside": (program(b"}q\x00" + text("x") + b"h\x00s"), "`x (dict)`"),
    "text of 4 GiB": (b"\x80\x02X\xff\xff\xff\xff.", "4,294,967,295 bytes"),
    "text that is not there": (b"\x80\x02X\x00\x08\x00\x00.", "ends in the middle"),
    "text that is not UTF-8": (program(b"X\x02\x00\x00\x00\xff\xff"), "damaged"),
    "lone surrogate": (program(b"X\x03\x00\x00\x00\xed\xa0\x80"), "damaged"),
    "long integer": (program(b"\x8a\xff" + b"\x7f" * 255), "255 bytes"),
    "LONG4 bomb": (program(b"\x8b\xff\xff\xff\x7f"), "opcode"),
    "decimal text as integer": (program(b"I" + b"9" * 5000 + b"\n"), "opcode"),
    "memo slot missing": (program(b"h\x07"), "damaged"),
    "stack empty": (program(b"a"), "damaged"),
    "tuple of too many": (program(b"\x87"), "than it put"),
    "mark missing": (program(b"t"), "damaged"),
    "mark left": (program(b"(" + items(x=tensor())), "left over"),
    "no STOP": (SOUND[:-1], "ends in the middle"),
    "bytes after STOP": (SOUND + b"N", "left over"),
    "two values": (program(b"N" + items(x=tensor())), "left over"),
    "no protocol": (SOUND[2:], "begin"),
    "empty pickle": (b"", "ends in the middle"),
    "name without end": (b"\x80\x02c" + b"a" * 10_000, "without end"),
    "protocol 2 name of two lines, no more": (b"\x80\x02cos\n", "without end"),
    "not a dict": (program(tensor()), "`tensor`, not a dict"),
    "numbers beside tensors": (dict_of(x=tensor(), epoch=b"K\x07", note=text("hi"), none=b"N"), "3 things that are not tensors"),
    "wrapped": (dict_of(state_dict=items(x=tensor())), "`state_dict (dict)`"),
    "number as name": (program(b"}K\x01" + tensor() + b"s"), "`1 (tensor)`"),
    "empty name": (program(b"}" + text("") + tensor() + b"s"), "impossible name"),
    "line break in a name": (program(b"}" + text("a\nb") + tensor() + b"s"), "impossible name"),
    "storage as value": (dict_of(x=storage()), "`x (Storage)`"),
    "type as value": (dict_of(x=named("torch FloatStorage")), "`x (Name)`"),
    "numel smaller": (dict_of(x=tensor(numel=3, shape=[3])), "12 or 16 bytes"),
    "numel larger": (dict_of(x=tensor(numel=5)), "20 or 16 bytes"),
    "numel 2^62": (dict_of(x=tensor(numel=2**62)), "storage"),
    "numel 2^46": (dict_of(x=tensor(numel=2**46)), "about the size"),
    "numel negative": (dict_of(x=tensor(numel=-4)), "storage"),
    "storage reference of something else": (program(tupled(text("module"), b"N", b"N", b"N", b"N") + b"Q"), "storage"),
    "storage reference of a nested tuple": (program(nested_tuple(100) + b"Q"), "storage"),
    "storage missing": (dict_of(x=tensor(key="9")), "does not hold the values"),
    "storage outside": (dict_of(x=tensor(key="../data.pkl")), "does not hold the values"),
    "view beyond": (dict_of(x=tensor(offset=1)), "beyond"),
    "offset negative": (dict_of(x=tensor(offset=-1, shape=[1])), "offset"),
    "stride negative": (dict_of(x=tensor(offset=3, strides=[-1])), "shape"),
    "stride 0": (dict_of(x=tensor(shape=[10**6, 10**6], strides=[0, 0])), "beyond"),
    "stride 0 within": (dict_of(x=tensor(shape=[2, 2], strides=[0, 1])), "row by row"),
    "transposed": (dict_of(x=tensor(shape=[2, 2], strides=[1, 2])), "row by row"),
    "stride missing": (dict_of(x=tensor(shape=[2, 2], strides=[2])), "stride"),
    "nine axes": (dict_of(x=tensor(shape=[1] * 9)), "shape"),
    "axis of 2^60": (dict_of(x=tensor(shape=[0, 2**60], strides=[1, 1])), "shape"),
    "nothing of 2^94": (dict_of(x=tensor(shape=[0, 2**47, 2**47], strides=[1, 1, 1])), "impossible shape"),
    "nested tuple as shape": (dict_of(x=call("torch._utils _rebuild_tensor", storage(), b"K\x00", nested_tuple(100), b")")), "shape"),
    "backward hooks": (dict_of(x=call("torch._utils _rebuild_parameter", tensor(), b"\x89", items(x=b"N"))), "hooks"),
    "parameter of a number": (dict_of(x=call("torch._utils _rebuild_parameter", b"N", b"\x89", call("collections OrderedDict"))), "calls"),
    "quantised storage": (dict_of(x=tensor(kind="QInt8")), "`torch.QInt8Storage`"),
    "data of no tensor": (program(b"}"), "data of no tensor"),
}


def refusal(path: Path) -> InputError:
    """The error for a file; `zip_records` and the index may not fail in any other way."""
    with pytest.raises(InputError) as caught:
        index_torch_zip(path)
    error = caught.value
    assert path.name in error.what
    assert error.hint or not path.is_file()
    assert f"{error.what}{error.facts}{error.hint}".isprintable()
    return error


@pytest.mark.parametrize("case", PICKLES)
def test_hostile_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    pickled, expected = PICKLES[case]
    assert expected in refusal(build(tmp_path, pickled)).what
    assert os.listdir(tmp_path) == ["x.bin"]


def test_the_forbidden_name_and_what_to_do(tmp_path: Path) -> None:
    error = refusal(build(tmp_path, PICKLES["os.system"][0]))
    assert error.what == "`x.bin` is not a plain tensor file (it asks to run `os.system`)"
    assert error.hint == "do not load this file. Ask its author for a .safetensors version"


def test_hostile_pickles_take_little_memory(tmp_path: Path) -> None:
    """Less than 200 MiB above what the imports take, for all of them together."""
    for place, (pickled, _) in enumerate(PICKLES.values()):
        build(tmp_path, pickled).rename(tmp_path / f"{place}.bin")
    code = """
import resource, sys
from pathlib import Path
from llava_weights.errors import InputError
from llava_weights.formats.torch_zip import index_torch_zip
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in Path(sys.argv[1]).iterdir():
    try:
        index_torch_zip(path)
    except InputError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=FIXTURES.parent, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200 << 10


def patched(path: Path, old: bytes, new: bytes, *, which: int = 0) -> Path:
    """Replace one occurrence of some bytes by as many others."""
    data, at = bytearray(path.read_bytes()), -1
    for _ in range(which + 1):
        at = data.index(old, at + 1)
    data[at : at + len(old)] = new
    path.write_bytes(data)
    return path


def field(path: Path, signature: bytes, offset: int, value: bytes, *, which: int = 0) -> Path:
    """Overwrite a field at `offset` behind a signature."""
    data = path.read_bytes()
    at = -1
    for _ in range(which + 1):
        at = data.index(signature, at + 1)
    path.write_bytes(data[: at + offset] + value + data[at + offset + len(value) :])
    return path


def twice(folder: Path) -> Path:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(build(folder, SOUND), "a") as file:
        file.writestr("x/data.pkl", SOUND)
    return folder / "x.bin"


def compressed(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.bin", "w") as file:
        file.writestr("x/data.pkl", dict_of(x=tensor(numel=1 << 26, shape=[1 << 26])))
        file.writestr("x/data/0", bytes(1 << 20), zipfile.ZIP_DEFLATED)
    return folder / "x.bin"


def legacy(folder: Path) -> Path:
    torch.save({"x": torch.ones(2)}, folder / "x.bin", _use_new_zipfile_serialization=False)
    return folder / "x.bin"


def a_safetensors_file(folder: Path) -> Path:
    safetensors.torch.save_file({"x": torch.ones(2)}, folder / "x.bin")
    return folder / "x.bin"


def written(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "x.bin").write_bytes(content)
        return folder / "x.bin"

    return make


def script(folder: Path) -> Path:
    return build(folder, SOUND, more={"x/code/__torch__.py": b"", "x/constants.pkl": b"N."})


def sound(folder: Path) -> Path:
    return build(folder, SOUND)


CENTRAL, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"
FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "member twice": (twice, "twice"),
    "two roots": (lambda folder: build(folder, SOUND, more={"y/data/1": b""}), "not one that torch.save writes"),
    "path upwards": (lambda folder: build(folder, SOUND, more={"../../evil": b""}), "not one that torch.save writes"),
    "path upwards inside": (lambda folder: build(folder, SOUND, more={"x/../evil": b""}), "not one that torch.save writes"),
    "root upwards": (lambda folder: build(folder, SOUND, root=".."), "torch.save"),
    "no root": (lambda folder: build(folder, SOUND, root=""), "torch.save"),
    "unknown member": (lambda folder: build(folder, SOUND, more={"x/setup.py": b""}), "`x/setup.py`"),
    "TorchScript": (script, "TorchScript"),
    "big-endian": (lambda folder: build(folder, SOUND, more={"x/byteorder": b"big"}), "big-endian"),
    "no data.pkl": (lambda folder: patched(patched(sound(folder), b"data.pkl", b"data/777"), b"data.pkl", b"data/777"), "torch.save"),
    "compressed": (compressed, "compressed"),
    "encrypted": (lambda folder: field(sound(folder), CENTRAL, 8, b"\x01\x00", which=1), "encrypted"),
    "other local name": (lambda folder: field(sound(folder), LOCAL, 30, b"y"), "differ"),
    "other local size": (lambda folder: field(sound(folder), LOCAL, 22, b"\x01", which=1), "differ"),
    "other local CRC": (lambda folder: field(sound(folder), LOCAL, 14, b"\x01", which=1), "differ"),
    "other local method": (lambda folder: field(sound(folder), LOCAL, 8, b"\x08", which=1), "differ"),
    "sizes differ": (lambda folder: field(sound(folder), CENTRAL, 20, b"\x08", which=1), "size"),
    "zip64 size missing": (lambda folder: field(sound(folder), CENTRAL, 20, b"\xff" * 8, which=1), "size or place"),
    "overlap": (lambda folder: field(sound(folder), CENTRAL, 42, b"\x00\x00", which=1), "differ"),
    "beyond the end": (lambda folder: field(sound(folder), CENTRAL, 42, b"\x00\x00\x00\x7f", which=1), "beyond its end"),
    "name of a terminal code": (lambda folder: build(folder, SOUND, more={"x/\x1b[2J": b""}), "impossible name"),
    "CRC of data.pkl": (lambda folder: patched(sound(folder), text("cpu"), text("gpu")), "CRC-32"),
    "more members than listed": (lambda folder: field(sound(folder), END, 8, b"\x01\x00\x01\x00"), "as many as it says"),
    "several disks": (lambda folder: field(sound(folder), END, 4, b"\x01\x00"), "at its end"),
    "directory elsewhere": (lambda folder: field(sound(folder), END, 16, b"\x00\x00"), "at its end"),
    "bytes after the end": (lambda folder: written(sound(folder).read_bytes() + b"more")(folder), "4 bytes after its end"),
    "comment": (lambda folder: written(sound(folder).read_bytes()[:-2] + b"\x02\x00hi")(folder), "2 bytes after its end"),
    "bytes before the start": (lambda folder: written(b"MZ" + sound(folder).read_bytes())(folder), "not a zip"),
    "header before the start": (lambda folder: written(LOCAL + sound(folder).read_bytes())(folder), "at its end"),
    "legacy": (legacy, "a bare pickle"),
    "safetensors": (a_safetensors_file, "a safetensors file"),
    "Git LFS pointer": (written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "Git LFS pointer"),
    "HTML": (written(b"\n<!DOCTYPE html><html>not found</html>"), "HTML"),
    "tar": (written(bytes(257) + b"ustar\x0000" + bytes(2000)), "a tar archive"),
    "GGUF": (written(b"GGUF\x03" + bytes(100)), "GGUF"),
    "zeros": (written(bytes(4096)), "did not finish"),
    "empty": (written(b""), "empty"),
    "four bytes": (written(b"PK\x03\x04"), "cut short"),
    "noise": (written(b"\x00\x01\x02\x03" * 99), "not a zip"),
}


@pytest.mark.parametrize("case", FILES)
def test_hostile_and_foreign_files_are_refused(tmp_path: Path, case: str) -> None:
    make, expected = FILES[case]
    path = make(tmp_path)
    assert expected in refusal(path).what


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    """A second directory entry with the header of the first inside the data of another: each is sound by itself."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr(zipfile.ZipInfo("x/data/1"), b"\x00" * 16)
    member = inner.getvalue()[: 30 + 8 + 16] + b"\x00" * 2  # header, name, data: to the length of a float32 tensor
    path = build(tmp_path, dict_of(x=tensor(numel=14, shape=[14]), y=tensor(key="1")), {"0": member, "1": b"\x00" * 16})
    assert set(index_torch_zip(path)) == {"x", "y"}
    second = path.read_bytes().index(LOCAL, path.read_bytes().index(b"x/data/0"))
    field(path, CENTRAL, 42, struct.pack("<I", second), which=2)
    assert "overlap" in refusal(path).what


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: None], ids=["pipe", "folder", "missing"])
def test_what_is_not_a_file_is_refused_without_waiting(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x.bin")
    refusal(tmp_path / "x.bin")


def test_a_truncated_file_says_how_much_is_missing(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(10_000)}, tmp_path / "x.bin")
    os.truncate(tmp_path / "x.bin", 20_000)
    assert refusal(tmp_path / "x.bin").what == "`x.bin` is truncated, expected more than 40,000 bytes, found 20,000"


def plain(index: Mapping[str, Stored]) -> object:
    """An index without the digest and time of its file."""
    return [(name, tensor.dtype, tensor.shape, tensor.offset, tensor.record) for name, tensor in index.items()]


def small_files(folder: Path) -> Iterator[Path]:
    torch.save({"w": torch.arange(24, dtype=torch.float16).reshape(6, 4), "b": torch.ones(3)}, folder / "torch.bin")
    yield folder / "torch.bin"
    build(folder, SOUND).rename(folder / "python.bin")
    yield folder / "python.bin"


def test_truncated_anywhere(tmp_path: Path) -> None:
    draw = random.Random(1)
    for path in [*small_files(tmp_path), REAL[0]]:
        data = path.read_bytes()
        for size in [0, 1, 29, len(data) - 1, len(data) - 22, *draw.sample(range(len(data)), 20)]:
            refusal(written(data[:size])(tmp_path))


def test_one_flipped_bit_is_refused_harmless_or_caught_by_the_crc(tmp_path: Path) -> None:
    draw = random.Random(2)
    outcomes = {"refused": 0, "harmless": 0, "caught": 0}
    for path in small_files(tmp_path):
        data, expected = path.read_bytes(), plain(index_torch_zip(path))
        sound_values = [values(tensor, Workspace()) for tensor in index_torch_zip(path).values()]
        for at in draw.sample(range(len(data)), min(len(data), 500)):
            flipped = bytearray(data)
            flipped[at] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            try:
                index = index_torch_zip(path)
            except InputError:
                outcomes["refused"] += 1
                continue
            work = Workspace()
            found = [values(tensor, work) for tensor in index.values()]
            work.close()
            if list(crc_errors([work])):
                outcomes["caught"] += 1
                continue
            assert (plain(index), found) == (expected, sound_values), f"byte {at} of {path.name}"
            outcomes["harmless"] += 1
    assert all(outcomes.values()), outcomes


def index_or_refuse(path: Path) -> None:
    """Raise nothing but InputError, and let no tensor reach outside its record."""
    try:
        index = index_torch_zip(path)
    except InputError:
        return
    members = {(member.offset, member.size) for member in zip_records(path)}
    for found in index.values():
        assert found.record is not None
        assert (found.record.offset, found.record.size) in members
        assert found.record.offset <= found.offset
        assert found.offset + found.nbytes <= found.record.offset + found.record.size <= found.file.size


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four random edits: a byte, a bit, a stretch moved, repeated or cut out."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(changed) + 1), draw.randint(1, 12)
        piece = changed[(other := draw.randrange(len(changed) + 1)) : other + length]
        edit = draw.randrange(4)
        if edit == 0:
            changed[at : at + 1] = bytes([draw.choice(b"(.}])tRQbcuhqXKJ\x8a\x85\x86\x93\x94\x95\xff\x00" + bytes([draw.randrange(256)]))])
        elif edit == 1:
            changed[at:at] = piece
        elif edit == 2:
            changed[at : at + length] = piece
        else:
            del changed[at : at + length]
    return bytes(changed)


def test_mutated_pickles_raise_nothing_else(tmp_path: Path) -> None:
    draw = random.Random(3)
    with zipfile.ZipFile(REAL[0]) as file:
        real = file.read(file.namelist()[0])
    state = io.BytesIO()
    torch.save(torch.nn.Linear(2, 1).state_dict(), state)
    with zipfile.ZipFile(state) as file:
        small = file.read(file.namelist()[0])
    seeds = [SOUND, dict_of(x=tensor(), y=tensor(offset=2, shape=[1, 2], strides=[2, 1])), small, real]
    for number in range(1500):
        index_or_refuse(build(tmp_path, mutated(seeds[number % 4], draw), {"0": bytes(16), "1": bytes(8)}))


def test_mutated_files_raise_nothing_else(tmp_path: Path) -> None:
    draw = random.Random(4)
    seeds = [path.read_bytes() for path in small_files(tmp_path)]
    for number in range(800):
        data = seeds[number % 2]
        part = draw.randrange(len(data))  # most edits near the headers and the directory are refused by the first check
        changed = data[:part] + mutated(data[part : part + 64], draw) + data[part + 64 :]
        index_or_refuse(written(changed)(tmp_path))


PIECES = [
    *(bytes([opcode]) for opcode in b"(N}])t\x85\x86\x87aesuRbQ\x88\x89\x93\x94"),
    *(b"K\x00", b"K\x04", b"q\x00", b"h\x00", b"q\x01", b"h\x01"),
    *map(text, ["x", "storage", "_metadata", "0", "cpu"]), number(-1), number(2**40), storage(), tensor(), items(x=tensor()),
    *map(named, ["collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"]),
    call("collections OrderedDict"),
]  # fmt: skip


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PIECES), max_size=25))
def test_any_sequence_of_known_opcodes_raises_nothing_else(tmp_path: Path, pieces: list[bytes]) -> None:
    index_or_refuse(build(tmp_path, program(b"".join(pieces))))
