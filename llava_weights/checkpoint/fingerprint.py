"""A fingerprint of a base: a few values of each matrix, by which a delta tells whether it was made for this base, without its weights.

    {"format": "llava-weights fingerprint", "schema": 1, "name": ..., "rows": 8, "columns": 16, "digest": "blake3:...", "tensors": {NAME:
        {"dtype": "F16", "shape": [5120, 5120], "values": BASE64}}}

`values` are those where `rows` evenly spread rows and `columns` evenly spread columns cross, row by row, little-endian, in the dtype of the
tensor; tensors that are no matrices of floats have none. `digest` is that of a line for each tensor, sorted by name:
`name TAB dtype TAB dim,dim TAB values LF`.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..storage.digests import TENSORS, digest_of, named
from ..storage.output_file import check_file, write_report
from ..storage.reading import Workspace
from ..storage.strict_json import json_bytes, load_object
from ..tensors.dtypes import ITEMSIZE, MAX_AXES, to_float32
from ..tensors.lazy import LazyTensor, each
from ..tensors.sampling import LARGEST_ROW, even
from ..text import shown
from .checkpoint import Checkpoint, CheckpointSource, Origin, opened, to_place
from .diagnose import RoundTrip, float_matrices, round_trip_of, state

FORMAT, SCHEMA = "llava-weights fingerprint", 1
ROWS, COLUMNS = 8, 16  # of each matrix: 36,000 values of a 13B, 72 kB of its 26 GB, where the round trip needs a thousand
MAX_FINGERPRINT = 8 << 20  # bytes; that of a 65B has some 200 kB
RECORD_AGAIN = "record it again with `llava-weights inspect BASE --fingerprint FILE`, or get the file again"


@dataclass(frozen=True)
class Fingerprint:
    """The samples of a base: `checkpoint` has its names, dtypes and shapes, and no values but these."""

    name: str
    checkpoint: Checkpoint
    samples: Mapping[str, bytes]

    def round_trip(self, delta: Mapping[str, LazyTensor]) -> RoundTrip:
        """Whether the delta can have been made for this base, as `diagnose.round_trip` tells it of whole weights."""
        tensors = self.checkpoint.tensors
        names = [name for name in float_matrices(delta) if name in self.samples and tensors[name].shape[1] == delta[name].shape[1]]

        def both(name: str, work: Workspace) -> tuple[np.ndarray, np.ndarray]:
            rows, columns = places(tensors[name])
            kept = [number for number, row in enumerate(rows) if row < delta[name].rows]
            here = to_float32(self.samples[name], tensors[name].dtype).reshape(len(rows), len(columns))
            return here[kept], values_at(delta[name], [rows[number] for number in kept], columns, work)

        return round_trip_of(each(both, names, delta))

    def document(self) -> bytes:
        """The file."""
        tensors = {
            name: {"dtype": tensor.dtype, "shape": list(tensor.shape)}
            | ({"values": base64.b64encode(self.samples[name]).decode()} if name in self.samples else {})
            for name, tensor in self.checkpoint.tensors.items()
        }
        head = {"format": FORMAT, "schema": SCHEMA, "name": self.name, "rows": ROWS, "columns": COLUMNS}
        return json_bytes(head | {"digest": _digest(tensors), "tensors": tensors})


def places(tensor: LazyTensor) -> tuple[list[int], list[int]]:
    """The rows and the columns of a matrix that are sampled."""
    return even(tensor.shape[0], ROWS), even(tensor.shape[1], COLUMNS)


def values_at(tensor: LazyTensor, rows: list[int], columns: list[int], work: Workspace) -> np.ndarray:
    """Values of a matrix in float32 where these rows and columns cross. A row is the least that is read."""
    return np.stack([to_float32(_row(tensor, row, work), tensor.dtype)[columns] for row in rows]) if rows else np.empty((0, len(columns)))


def _row(tensor: LazyTensor, row: int, work: Workspace) -> bytearray:
    raw = bytearray(tensor.row_nbytes)
    tensor.rows_into(memoryview(raw), row, row + 1, work)
    return raw


def record_fingerprint(base: CheckpointSource, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Record a few values of `base` in the file `path`, by which `which_base` tells without the weights whether a delta was made for it.

    The file holds 128 values of each matrix, of a 13B 72 kB of its 26 GB: they are weights, so whoever may not pass these on may not pass
    on the file. `base` is a text model that deltas are added to. Eight rows of each matrix are read. `force` replaces a file that exists.

    Raises InputError for what is no such model, OutputError where the file exists or can't be written, UsageError for what is no path,
    HubError where the Hub can't serve it. Returns the path.
    """
    target = check_file(path, force=force, inputs=() if isinstance(base, Checkpoint) else [to_place(base, "base")])
    write_report(target, take_fingerprint(opened(base, "base")).document(), force=force)
    return target


def take_fingerprint(base: Checkpoint) -> Fingerprint:
    """The fingerprint of a base. Reads eight rows of each matrix. Raises InputError for what no delta is added to."""
    if base.layout != "llama" or state(base.parameters()).verdict == "delta":
        kind = "an unapplied delta" if base.layout == "llama" else f"a checkpoint in the {base.layout} layout"
        what = f"{shown(base.origin.name)} is {kind}, and no base of deltas"
        raise InputError(what, hint="give the text model that deltas are added to")
    tensors = dict(sorted(base.parameters().items()))

    def sampled(name: str, work: Workspace) -> bytes:
        rows, columns = places(tensors[name])
        size = ITEMSIZE[tensors[name].dtype]
        return b"".join(bytes(raw[c * size : (c + 1) * size]) for row in rows for raw in [_row(tensors[name], row, work)] for c in columns)

    samples = each(sampled, float_matrices(tensors), tensors)
    return Fingerprint(base.origin.name, described(base.origin.name, tensors), samples)


def read_fingerprint(path: Path) -> Fingerprint:
    """The fingerprint in a file. Raises InputError for what is none, or is damaged."""
    found = load_object(path, limit=MAX_FINGERPRINT)
    if found.get("format") != FORMAT or found.get("schema") != SCHEMA or (found.get("rows"), found.get("columns")) != (ROWS, COLUMNS):
        what = f"{shown(path.name)} is no fingerprint of schema {SCHEMA}"
        raise InputError(what, facts={"path": path}, hint=RECORD_AGAIN)
    rows, name = found.get("tensors"), found.get("name")
    if not isinstance(name, str) or not isinstance(rows, dict) or not rows or not all(map(_is_sound, rows, rows.values())):
        raise InputError(f"{shown(path.name)} has entries that are not sound", facts={"path": path}, hint=RECORD_AGAIN)
    if found.get("digest") != _digest(rows):
        raise InputError(f"{shown(path.name)} is damaged: its digest is another", facts={"path": path}, hint=RECORD_AGAIN)
    tensors = {key: LazyTensor(dtype=row["dtype"], shape=tuple(row["shape"])) for key, row in rows.items()}
    samples = {key: base64.b64decode(row["values"]) for key, row in rows.items() if "values" in row}
    return Fingerprint(name, described(name, tensors), samples)


def described(name: str, tensors: Mapping[str, LazyTensor]) -> Checkpoint:
    """A checkpoint without values."""
    described = {key: LazyTensor(dtype=tensor.dtype, shape=tensor.shape) for key, tensor in tensors.items()}
    return Checkpoint(described, {}, Origin(name, Path(name), "safetensors", ()))


def _digest(tensors: Mapping[str, Any]) -> str:
    lines = (f"{n}\t{r['dtype']}\t{','.join(map(str, r['shape']))}\t{r.get('values', '')}\n" for n, r in sorted(tensors.items()))
    return named(TENSORS, digest_of("".join(lines).encode(), TENSORS))


def _is_sound(name: str, row: Any) -> bool:
    if not name.isprintable() or not isinstance(row, dict) or not {"dtype", "shape"} <= row.keys() <= {"dtype", "shape", "values"}:
        return False
    shape = row["shape"]
    counts = isinstance(shape, list) and len(shape) <= MAX_AXES and all(type(axis) is int and 0 <= axis < 1 << 48 for axis in shape)
    if not counts or row["dtype"] not in ITEMSIZE or not isinstance(row.get("values", ""), str):
        return False
    if "values" not in row:
        return True
    tensor = LazyTensor(dtype=row["dtype"], shape=tuple(shape))
    if len(shape) != 2 or not tensor.numel or tensor.row_nbytes > LARGEST_ROW:
        return False
    rows, columns = places(tensor)
    try:
        return len(base64.b64decode(row["values"], validate=True)) == len(rows) * len(columns) * ITEMSIZE[row["dtype"]]
    except binascii.Error:
        return False
