"""The safetensors container: its header read strictly, and written as the library writes it.

    8 bytes: length n, little-endian | n bytes: JSON, padded with spaces | the tensors' bytes

The JSON maps each name to `{"dtype", "shape", "data_offsets": [begin, end]}`, counted from the end of the header, and
`__metadata__` to texts. The rules are those of safetensors 0.8, and stricter: that library accepts names with NUL, repeated keys,
unknown fields and 99 MB of metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from math import prod
from typing import Any

from ..errors import InputError
from ..storage.places import Place, open_place
from ..storage.reading import DOWNLOAD_AGAIN, SourceFile, refuse_disguise
from ..storage.strict_json import parse_json, read_exactly
from ..tensors.dtypes import ITEMSIZE, MAX_AXES
from ..tensors.lazy import LazyTensor, Stored
from ..text import shown

MAX_HEADER = 16 << 20  # bytes; the library's limit is 100 MB, and the header of a 13B model has less than 100 kB
MAX_TENSORS = 20_000  # LLaMA 65B has 723, and the library takes seconds and 800 MB for 700,000 empty ones
MAX_NAME = 4096  # bytes of UTF-8
MAX_AXIS = 1 << 48

# The library sorts by dtype, the last of these first, and then by name, so that wide values are aligned. The same in 0.4, 0.5 and 0.8.
SORT_ORDER = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64")


def index_safetensors(path: Place) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file in the order of their bytes, and the texts of its `__metadata__`. Reads the header only.

    Raises InputError unless the file is regular, exactly as long as its header says, and every tensor valid.
    """
    with open_place(path) as source:
        head = read_exactly(source, min(source.identity.size, 64))
        size = int.from_bytes(head[:8], "little")
        if len(head) < 8 or not 2 <= size <= MAX_HEADER:  # the first bytes of other formats would be longer headers than any
            refuse_disguise(path, head)
            raise _refusal(path, f"its header would have {size:,} bytes" if len(head) >= 8 else f"it has only {len(head)} bytes")
        header = read_exactly(source, 8 + size)[8:]
    return read_header(path, header, source.identity)


def read_header(path: Place, header: bytes, file: SourceFile) -> tuple[dict[str, Stored], dict[str, str]]:
    """As `index_safetensors`, of a `file` with this JSON in its header. Errors name `path`."""
    entries, metadata = _parse_header(path, header)
    return _lay_out(path, entries, replace(file, header_sha256=sha256(header).hexdigest()), 8 + len(header)), metadata


def make_header(tensors: Sequence[tuple[str, LazyTensor]], metadata: Mapping[str, str]) -> tuple[bytes, list[tuple[str, LazyTensor, int]]]:
    """The first bytes of a file with these tensors, length and padding included, and where each tensor's bytes then go:
    (name, tensor, offset from the end of these bytes), in the order of the file.

    Together they are byte for byte what `safetensors.torch.save_file` writes, but with the metadata sorted by key, which the library
    writes in random order. Raises ValueError for names that are repeated or that `index_safetensors` refuses.
    """
    ordered = sorted(tensors, key=lambda item: (-SORT_ORDER.index(item[1].dtype), item[0]))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    places = []
    end = 0
    for name, tensor in ordered:
        if problem := "it is taken" if name in header or name == "__metadata__" else _name_problem(name):
            raise ValueError(f"{shown(name)} can't be the name of a tensor: {problem}")
        places.append((name, tensor, end))
        end += tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (places[-1][2], end)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _refusal(path: Place, reason: str) -> InputError:
    return InputError(f"{shown(path.name)} is not a valid safetensors file: {reason}", facts={"path": path}, hint=DOWNLOAD_AGAIN)


def _parse_header(path: Place, header: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    if not header.startswith(b"{") or not header.rstrip(b" ").endswith(b"}"):
        raise _refusal(path, "its header is not a JSON object followed by blanks")
    if header.count(b"{") + header.count(b"[") > 3 * MAX_TENSORS:  # three for each tensor; before the parsing, which is expensive
        raise _refusal(path, f"it lists more than {MAX_TENSORS:,} tensors")
    entries = parse_json(header, name=path.name, path=path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refusal(path, "`__metadata__` does not map texts to texts")
    return entries, metadata


def _lay_out(path: Place, entries: dict[str, Any], file: SourceFile, start: int) -> dict[str, Stored]:
    """The tensors in file order. Raises InputError unless they fill the bytes from `start` on without a hole or an overlap."""
    places = sorted((*_offsets(path, name, entry), name) for name, entry in entries.items())
    end = 0
    tensors = {}
    for begin, stop, name in places:
        if begin != end:
            between = "overlaps the tensor before it" if begin < end else f"leaves a hole of {begin - end:,} bytes before it"
            raise _refusal(path, f"{shown(name)} {between}")
        dtype, shape = entries[name]["dtype"], tuple(entries[name]["shape"])
        tensors[name] = Stored(dtype=dtype, shape=shape, file=file, offset=start + begin, name=name)
        end = stop
    if file.size != start + end:
        state = "is truncated" if file.size < start + end else "is too long"
        what = f"{shown(path.name)} {state}, expected {start + end:,} bytes, found {file.size:,}"
        raise InputError(what, facts={"path": path}, hint=DOWNLOAD_AGAIN)
    return tensors


def _offsets(path: Place, name: str, entry: Any) -> tuple[int, int]:
    """Where the bytes of a tensor begin and end. Raises InputError unless its name and entry are sound."""
    problem = _name_problem(name) or _entry_problem(entry)
    if problem:
        raise _refusal(path, f"tensor {shown(name)}: {problem}")
    begin, end = entry["data_offsets"]
    if end - begin != prod(entry["shape"]) * ITEMSIZE[entry["dtype"]]:
        raise _refusal(path, f"tensor {shown(name)}: {entry['dtype']} {entry['shape']} does not fill bytes {begin:,} to {end:,}")
    return begin, end


def _name_problem(name: str) -> str:
    if not name or len(name.encode()) > MAX_NAME:
        return f"a name has 1 to {MAX_NAME} bytes"
    return "" if name.isprintable() else "its name holds characters that can't be printed"


def _entry_problem(entry: Any) -> str:
    """Why this is not `{"dtype": ..., "shape": [...], "data_offsets": [begin, end]}`, else empty."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "it needs exactly dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        return f"its dtype {shown(str(dtype))} is unknown"
    if not are_counts(shape) or len(shape) > MAX_AXES or any(axis >= MAX_AXIS for axis in shape):
        return f"its shape is not a list of at most {MAX_AXES} sizes"
    return "" if are_counts(offsets) and len(offsets) == 2 else "its data_offsets are not two byte counts"


def are_counts(value: Any) -> bool:
    """Whether it is a list of whole numbers, none below 0."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)  # `bool` is an int in Python
