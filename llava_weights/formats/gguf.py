"""The GGUF container of llama.cpp: its header read strictly, and written as llama.cpp's own converters do.

    "GGUF" | version 3 | number of tensors | number of keys | keys with their values | tensors: name, shape, type, offset
    | zeros to a multiple of 32 | each tensor's bytes, zeros to a multiple of 32 behind each

Numbers are little-endian; shapes stand with the innermost axis first. Source: ggml/src/gguf.cpp and gguf-py of llama.cpp at 0c1e570.

The header is packed here and not by PyPI's `gguf`, though the bytes are the same: that class writes to a file that it opened itself, and
the engine wants the header as bytes, with all offsets, before a value is read. The reader is our own because the library's maps the file
and trusts its counts.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from math import prod
from typing import Any

import numpy as np

from ..errors import InputError
from ..storage.places import Place, open_place
from ..storage.reading import DOWNLOAD_AGAIN, Source, SourceFile, Workspace, refuse_disguise
from ..storage.strict_json import read_exactly
from ..tensors.dtypes import BLOCKS, bytes_of
from ..tensors.lazy import LazyTensor, Stored
from ..text import shown

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
MAX_HEADER = 48 << 20  # bytes; with Llama 3's 128,256 tokens and 280,147 merges it has 8 million
FIRST_READ = 1 << 20  # bytes; over a network the rest of a longer header is asked for when it is needed
MAX_KEYS = 4096
MAX_TENSORS = 20_000
MAX_NAME = 64  # bytes of a tensor's name: GGML_MAX_NAME
MAX_KEY = 1024  # bytes of a key
MAX_ITEMS = 2_000_000  # of all arrays together; Gemma has three of 262,144, one for each token
MAX_RANK = 4  # GGML_MAX_DIMS
MAX_AXIS = 1 << 48
TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13,
    "Q6_K": 14, "Q8_K": 15, "I8": 24, "I16": 25, "I32": 26, "I64": 27, "F64": 28, "BF16": 30,
}  # fmt: skip
DTYPES = {number: dtype for dtype, number in TYPES.items()}
# Kinds of values by their number: name, and how `struct` writes one.
NUMBERS = {
    0: ("u8", "B"), 1: ("i8", "b"), 2: ("u16", "H"), 3: ("i16", "h"), 4: ("u32", "I"), 5: ("i32", "i"), 6: ("f32", "f"), 7: ("bool", "?"),
    10: ("u64", "Q"), 11: ("i64", "q"), 12: ("f64", "d"),
}  # fmt: skip
TEXT, ARRAY = 8, 9
KIND = {**{name: number for number, (name, _) in NUMBERS.items()}, "text": TEXT}

Value = bool | int | float | str | tuple[Any, ...]


@dataclass(frozen=True)
class GgufKey:
    """A key of the header and its value. `kind` is "u32", "i32", "f32", "bool", "text" and so on; of an array that of its items."""

    name: str
    kind: str
    value: Value


@dataclass(frozen=True)
class GgufFile:
    """A file of a GGUF output: its `keys`, and the `names` of its tensors, both in order. It is called `prefix`NAME-`label`.gguf, where
    NAME is the output's own; `name_key` is the key that has it as its value."""

    prefix: str
    label: str
    keys: tuple[GgufKey, ...]
    names: tuple[str, ...]
    name_key: str = "general.name"

    def file_name(self, name: str) -> str:
        """What the file of a model `name` is called."""
        return f"{self.prefix}{name}-{self.label}.gguf"

    def named(self, name: str) -> tuple[GgufKey, ...]:
        """The keys with `name` as that of the model."""
        return tuple(replace(key, value=name) if key.name == self.name_key else key for key in self.keys)


@dataclass(frozen=True, kw_only=True)
class Zeros(LazyTensor):
    """The zeros between two tensors: bytes."""

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        out[:] = bytes(len(out))


def make_gguf_header(keys: Sequence[GgufKey], tensors: Sequence[tuple[str, LazyTensor]]) -> tuple[bytes, list[tuple[str, LazyTensor, int]]]:
    """The first bytes of a file with these keys and tensors, and what then follows without a gap: (name, tensor, offset from the end of
    these bytes), the zeros between tensors, which have an empty name, too.

    Raises ValueError for names that are repeated or that `index_gguf` refuses.
    """
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(keys)))
    for key in keys:
        head += _packed_text(key.name) + _packed_value(key)
    places: list[tuple[str, LazyTensor, int]] = []
    names: set[str] = set()
    at = 0
    for name, tensor in tensors:
        if problem := "it is taken" if name in names else _name_problem(name):
            raise ValueError(f"{shown(name)} can't be the name of a tensor: {problem}")
        names.add(name)
        axes = tensor.shape[::-1]
        head += _packed_text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, TYPES[tensor.dtype], at)
        places.append((name, tensor, at))
        at += tensor.nbytes
        if gap := -at % ALIGNMENT:
            places.append(("", Zeros(dtype="U8", shape=(gap,)), at))
            at += gap
    return bytes(head + bytes(-len(head) % ALIGNMENT)), places


def _packed_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed_value(key: GgufKey) -> bytes:
    kind = KIND[key.kind]
    values = key.value if isinstance(key.value, tuple) else (key.value,)
    head = struct.pack("<IIQ", ARRAY, kind, len(values)) if isinstance(key.value, tuple) else struct.pack("<I", kind)
    if kind == TEXT:
        return head + b"".join(map(_packed_text, values))
    return head + struct.pack(f"<{len(values)}{NUMBERS[kind][1]}", *values)


def index_gguf(path: Place) -> tuple[dict[str, Stored], dict[str, GgufKey]]:
    """The tensors of a file in the order of their bytes, and its keys by name. Reads the header only.

    Raises InputError unless the file is regular, little-endian, of version 2 or 3, and its tensors lie one behind the other up to its end.
    """
    with open_place(path) as source:
        return _index(_Reader(path, source))


def _index(reader: _Reader) -> tuple[dict[str, Stored], dict[str, GgufKey]]:
    path = reader.path
    reader.look(min(64, reader.source.identity.size))
    if reader.data[:4] != MAGIC:
        refuse_disguise(path, reader.data[:64])
        raise _refusal(path, "it does not begin with `GGUF`")
    reader.position = 4
    version = reader.number("I")
    if version not in (2, VERSION):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        raise _refusal(path, "it is big-endian" if swapped in (2, VERSION) else f"it is of version {version:,}, not 2 or 3")
    tensors, keys = reader.number("Q"), reader.number("Q")
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise _refusal(path, f"it lists {tensors:,} tensors and {keys:,} keys, more than {MAX_TENSORS:,} and {MAX_KEYS:,}")
    found = _keys(reader, keys)
    alignment = found["general.alignment"].value if "general.alignment" in found else ALIGNMENT
    if type(alignment) is not int or alignment < 8 or alignment > 1 << 20 or alignment & (alignment - 1):
        raise _refusal(path, f"its alignment is {shown(str(alignment))}, not a power of two from 8 to 1,048,576")
    entries = [_entry(reader) for _ in range(tensors)]
    header = reader.data[: reader.position]
    file = replace(reader.source.identity, header_sha256=sha256(header).hexdigest())
    return _lay_out(path, entries, file, reader.position, alignment), found


class _Reader:
    """The first bytes of a file, read number by number, and from the file twice as many each time. Raises InputError past their end."""

    def __init__(self, path: Place, source: Source) -> None:
        self.path, self.source, self.data, self.position, self.items = path, source, b"", 0, 0

    def look(self, stop: int) -> None:
        """Have the bytes up to `stop`."""
        if stop > len(self.data):
            most = min(self.source.identity.size, MAX_HEADER)
            if stop > most:
                whole = most < MAX_HEADER
                raise _refusal(self.path, "its header is truncated" if whole else f"its header has more than {MAX_HEADER:,} bytes")
            self.data = read_exactly(self.source, min(most, max(stop, FIRST_READ, 2 * len(self.data))))

    def take(self, size: int) -> bytes:
        self.look(self.position + size)
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self, limit: int, what: str) -> str:
        size = self.number("Q")
        if size > limit:
            raise _refusal(self.path, f"{what} has {size:,} bytes, more than {limit:,}")
        try:
            return self.take(size).decode()
        except UnicodeDecodeError as error:
            raise _refusal(self.path, f"{what} is not UTF-8") from error


def _keys(reader: _Reader, count: int) -> dict[str, GgufKey]:
    keys: dict[str, GgufKey] = {}
    for _ in range(count):
        name = reader.text(MAX_KEY, "a key")
        if not name or not name.isprintable() or name in keys:
            raise _refusal(reader.path, f"the key {shown(name)} is {'there twice' if name in keys else 'no name'}")
        keys[name] = _value(reader, name)
    return keys


def _value(reader: _Reader, name: str) -> GgufKey:
    kind = reader.number("I")
    value: Value | None = None
    what = f"the value of {shown(name)}"
    if kind == ARRAY:
        kind, count = reader.number("I"), reader.number("Q")
        reader.items += count
        if reader.items > MAX_ITEMS:
            raise _refusal(reader.path, f"{what} has {count:,} items, and no more than {MAX_ITEMS:,} are read in all")
        if kind == TEXT:
            value = tuple(reader.text(MAX_HEADER, what) for _ in range(count))
        elif kind in NUMBERS:
            form = NUMBERS[kind][1]
            raw = reader.take(count * struct.calcsize(f"<{form}"))
            _check_bools(reader, kind, raw, what)
            value = tuple(np.frombuffer(raw, f"<{form}").tolist())
    elif kind == TEXT:
        value = reader.text(MAX_HEADER, what)
    elif kind in NUMBERS:
        raw = reader.take(struct.calcsize(f"<{NUMBERS[kind][1]}"))
        _check_bools(reader, kind, raw, what)
        value = struct.unpack(f"<{NUMBERS[kind][1]}", raw)[0]
    if value is None:
        raise _refusal(reader.path, f"{what} is of the unknown kind {kind:,}" if kind != ARRAY else f"{what} is an array of arrays")
    return GgufKey(name, "text" if kind == TEXT else NUMBERS[kind][0], value)


def _check_bools(reader: _Reader, kind: int, raw: bytes, what: str) -> None:
    if NUMBERS[kind][0] == "bool" and raw.strip(b"\0\1"):
        raise _refusal(reader.path, f"{what} is neither true nor false")


def _entry(reader: _Reader) -> tuple[str, str, tuple[int, ...], int]:
    """Name, dtype, shape and offset of a tensor."""
    name = reader.text(MAX_NAME, "the name of a tensor")
    if problem := _name_problem(name):
        raise _refusal(reader.path, f"tensor {shown(name)}: {problem}")
    rank = reader.number("I")
    if not 1 <= rank <= MAX_RANK:
        raise _refusal(reader.path, f"tensor {shown(name)}: it has {rank:,} axes, not 1 to {MAX_RANK}")
    axes = tuple(reader.number("Q") for _ in range(rank))
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in DTYPES:
        raise _refusal(reader.path, f"tensor {shown(name)}: its type {kind:,} is unknown")
    if not all(0 < axis < MAX_AXIS for axis in axes) or prod(axes) >= MAX_AXIS or axes[0] % BLOCKS.get(DTYPES[kind], (1, 1))[0]:
        raise _refusal(reader.path, f"tensor {shown(name)}: {DTYPES[kind]} {list(axes[::-1])} is no possible shape")
    return name, DTYPES[kind], axes[::-1], offset


def _lay_out(
    path: Place, entries: list[tuple[str, str, tuple[int, ...], int]], file: SourceFile, header: int, alignment: int
) -> dict[str, Stored]:
    """The tensors in file order. Raises InputError unless each begins where the one before it ends, but for the padding."""
    start = header + -header % alignment
    end = padded = 0
    tensors: dict[str, Stored] = {}
    for name, dtype, shape, offset in entries:
        if name in tensors:
            raise _refusal(path, f"tensor {shown(name)} is there twice")
        if offset != padded:
            between = "overlaps the tensor before it" if offset < end else f"is not where the tensor before it ends, at {padded:,}"
            raise _refusal(path, f"tensor {shown(name)} at {offset:,} {between}")
        tensors[name] = Stored(dtype=dtype, shape=shape, file=file, offset=start + offset, name=name)
        end = offset + bytes_of(dtype, prod(shape))
        padded = end + -end % alignment
    if not start + end <= file.size <= start + padded and not (not entries and file.size >= header):
        state = "is truncated" if file.size < start + end else "is too long"
        what = f"{shown(path.name)} {state}, expected {start + padded:,} bytes, found {file.size:,}"
        raise InputError(what, facts={"path": path}, hint=DOWNLOAD_AGAIN)
    return tensors


def _name_problem(name: str) -> str:
    if not name or len(name.encode()) >= MAX_NAME:
        return f"a name has 1 to {MAX_NAME - 1} bytes"
    return "" if name.isprintable() else "its name holds characters that can't be printed"


def _refusal(path: Place, reason: str) -> InputError:
    return InputError(f"{shown(path.name)} is not a valid GGUF file: {reason}", facts={"path": path}, hint=DOWNLOAD_AGAIN)
