"""The records of a folder's checksums, written and read: `SHA256SUMS` for standard tools, and a manifest with a digest for each tensor.

The digest of a tensor is over its raw little-endian, row-major values only, so it does not depend on shards, container or file names.
Records are read as untrusted input, whoever wrote them.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from .. import __version__
from ..errors import InputError
from ..formats.folder import member
from ..storage.reading import open_regular, present, refuse_disguise
from ..storage.strict_json import load_object, read_exactly
from ..tensors.dtypes import BLOCKS, ITEMSIZE, bytes_of
from ..text import listed, shown
from .checkpoint import Step, describe

MANIFEST = "llava-weights.manifest.json"
SUMS = "SHA256SUMS"
MANIFEST_SCHEMA = 1


@dataclass(frozen=True)
class FileEntry:
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """`shard` is the file that holds the tensor; the roots do not depend on it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    sha256: str
    shard: str


def root_of_tensors(tensors: Iterable[TensorEntry]) -> str:
    """sha256 of a line for each tensor, sorted by name: `name TAB dtype TAB dim,dim TAB sha256 LF`. `sha256sum` gives the same."""
    lines = (f"{t.name}\t{_content(t)}" for t in sorted(tensors, key=lambda t: t.name.encode()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def root_of_content(tensors: Iterable[TensorEntry]) -> str:
    """As `root_of_tensors`, but without names, and lines sorted: a pure renaming does not change it."""
    return hashlib.sha256("".join(sorted(map(_content, tensors))).encode()).hexdigest()


def _content(tensor: TensorEntry) -> str:
    return f"{tensor.dtype}\t{','.join(map(str, tensor.shape))}\t{tensor.sha256}\n"


ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}  # as coreutils writes a name, in a line that then begins with a backslash


def make_sums(files: Sequence[FileEntry]) -> bytes:
    """Lines that `sha256sum -c` reads, sorted by path."""
    return "".join(map(_line, sorted(files, key=lambda file: file.path))).encode()


def _line(file: FileEntry) -> str:
    name = "".join(ESCAPES.get(character, character) for character in file.path)
    mark = "\\" if name != file.path else ""
    return f"{mark}{file.sha256}  {name}\n"


def make_manifest(
    history: Sequence[Step],
    options: Mapping[str, Any],
    files: Sequence[FileEntry],
    tensors: Sequence[TensorEntry],
    tallies: Mapping[str, int],
) -> dict[str, Any]:
    """The manifest as plain data. Without a time, so that the same work gives the same bytes."""
    return {
        "schema": MANIFEST_SCHEMA,
        "tool": {"name": "llava-weights", "version": __version__},
        "root": {
            "tensors": root_of_tensors(tensors),
            "content": root_of_content(tensors),
            "files": hashlib.sha256(make_sums(files)).hexdigest(),
        },
        "recipe": [describe(step) for step in history],
        "options": dict(options),
        "tallies": dict(tallies),
        "environment": environment(),
        "files": [file.__dict__ for file in sorted(files, key=lambda file: file.path)],
        "tensors": [{**tensor.__dict__, "shape": list(tensor.shape)} for tensor in sorted(tensors, key=lambda t: t.name.encode())],
    }


def environment() -> dict[str, str]:
    """Versions of what arithmetic and bytes may depend on, none of which is imported for it."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("torch", "numpy", "zstandard", "huggingface_hub"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


GIT = "git-sha1"  # git's names of content, and the Hub's of small files: sha1 of a line with the size, then the bytes
MAX_MANIFEST = 16 << 20  # that of a 13B model has 250 kB
MAX_SUMS = 4 << 20  # bytes: lines for some 50,000 files
ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}  # by the digest's length in hexadecimal digits
# `digest  name` and `digest *name` of GNU's programs and Meta's checklist.chk; `SHA256 (name) = digest` of BSD's.
LINE = re.compile(
    r"(?P<escaped>\\?)(?:(?P<digest>[0-9A-Fa-f]{32,128})[ \t][ \t*]?(?P<path>.+)|[A-Z0-9-]+ \((?P<name>.+)\) = (?P<hex>[0-9A-Fa-f]{32,}))"
)
UNESCAPED = {text: char for char, text in ESCAPES.items()}
A_LIST = "give a file as `sha256sum` or `md5sum` write it, a manifest or a checkpoint"
WRITE_AGAIN = "write it again with `llava-weights checksum`, or download it again"

Entry = TypeVar("Entry", FileEntry, TensorEntry)


@dataclass(frozen=True)
class Manifest:
    """A `llava-weights.manifest.json` that agrees with itself.

    `recipe` has an object for each step, with objects `inputs` and `options` and a list of texts `warnings`; where it can't be read it
    is empty, and `doubt` says so.
    """

    path: Path
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    recipe: tuple[Mapping[str, Any], ...] = ()
    doubt: str = ""


@dataclass(frozen=True)
class Sum:
    """The digest that somebody says the file `path` has. `algorithm` is a name of hashlib's, or `manifest.GIT`."""

    path: str
    algorithm: str
    digest: str


def manifest_path(place: Path) -> Path:
    """Where the manifest of a folder, or of a single file, lies."""
    return place / MANIFEST if place.is_dir() else place.with_name(f"{place.name}.manifest.json")


def sums_path(place: Path) -> Path:
    return place / SUMS if place.is_dir() else place.with_name(f"{place.name}.sha256")


def find_manifest(place: Path) -> Manifest | None:
    """The manifest of a folder or file; for a file without its own, the entries about it in that of its folder."""
    own = manifest_path(place)
    if present(own):
        return read_manifest(member(own.parent, own.name))
    above = place.parent / MANIFEST
    if place.is_dir() or not present(above):
        return None
    whole = read_manifest(member(above.parent, above.name))
    if place.name not in whole.files:
        return None
    tensors = {name: entry for name, entry in whole.tensors.items() if entry.shard == place.name}
    return replace(whole, files={place.name: whole.files[place.name]}, tensors=tensors)


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file. Raises InputError unless it has this schema and its roots are those of its own lists."""
    found = load_object(path, limit=MAX_MANIFEST)
    if found.get("schema") != MANIFEST_SCHEMA:
        hint = "verify it with the version of llava-weights that wrote it" if type(found.get("schema")) is int else WRITE_AGAIN
        what = f"{shown(path.name)} is not a manifest of schema {MANIFEST_SCHEMA}"
        raise InputError(what, facts={"path": path, "schema": shown(str(found.get("schema")))}, hint=hint)
    files = _entries(path, found.get("files"), FileEntry)
    tensors = _entries(path, found.get("tensors"), TensorEntry)
    true = {"tensors": root_of_tensors(tensors.values()), "files": hashlib.sha256(make_sums(list(files.values()))).hexdigest()}
    root = found.get("root")
    wrong = [name for name, digest in true.items() if not isinstance(root, dict) or root.get(name) != digest]
    if wrong:
        raise _refusal(path, f"`root.{wrong[0]}` is not that of its list of {wrong[0]}")
    recipe = found.get("recipe", [])
    sound = isinstance(recipe, list) and all(map(_step_is_sound, recipe))
    doubt = "" if sound else f"{shown(path.name)} has no recipe that can be read"
    by_path, by_name = {entry.path: entry for entry in files.values()}, {entry.name: entry for entry in tensors.values()}
    return Manifest(path, by_path, by_name, tuple(recipe) if sound else (), doubt)


def _step_is_sound(step: Any) -> bool:
    objects = isinstance(step, dict) and all(isinstance(step.get(key, {}), dict) for key in ("inputs", "options"))
    texts = step.get("warnings", []) if objects else None
    return isinstance(texts, list) and all(isinstance(text, str) for text in texts)


def _entries(path: Path, rows: Any, kind: type[Entry]) -> dict[str, Entry]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise _refusal(path, "a list of files or tensors is missing")
    entries: dict[str, Entry] = {}
    keys = {field.name for field in fields(kind)}
    for row in rows:
        if row.keys() != keys or not (_file_is_sound(row) if kind is FileEntry else _tensor_is_sound(row)):
            raise _refusal(path, f"the entry {shown(str(row))} is not sound")
        name = row["path" if kind is FileEntry else "name"]
        if name in entries:
            raise _refusal(path, f"it lists {shown(name)} twice")
        values: dict[str, Any] = {key: tuple(value) if key == "shape" else value for key, value in row.items()}
        entries[name] = kind(**values)
    return entries


def _file_is_sound(row: Mapping[str, Any]) -> bool:
    return _is_digest(row["sha256"]) and _counts(row["size"]) and isinstance(row["path"], str) and is_inside(row["path"])


def _tensor_is_sound(row: Mapping[str, Any]) -> bool:
    texts = all(isinstance(row[key], str) for key in ("name", "dtype", "shard"))
    if (
        not texts
        or not row["name"]
        or not row["name"].isprintable()
        or row["dtype"] not in {**ITEMSIZE, **BLOCKS}
        or not _is_digest(row["sha256"])
    ):
        return False
    shape = row["shape"]
    return isinstance(shape, list) and _counts(row["nbytes"], *shape) and row["nbytes"] == bytes_of(row["dtype"], prod(shape))


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


def _counts(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 60 for value in values)


def is_inside(path: str) -> bool:
    """Whether a path from a list stays in its folder, as far as the text shows; `formats.folder.inside` checks links too."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and "\0" not in path


def _refusal(path: Path, reason: str) -> InputError:
    return InputError(f"{shown(path.name)} is not a manifest that can be trusted: {reason}", facts={"path": path}, hint=WRITE_AGAIN)


def read_sums(path: Path) -> tuple[Sum, ...]:
    """The lines of a list as GNU's or BSD's sha256sum and md5sum write it. Raises InputError for anything else."""
    with open_regular(path) as (fd, status):
        if status.st_size > MAX_SUMS:
            what = f"{shown(path.name)} has {status.st_size:,} bytes, too many for a list of checksums"
            raise InputError(what, facts={"path": path, "at most": f"{MAX_SUMS:,} bytes"}, hint=A_LIST)
        data = read_exactly(path, fd, status.st_size)
    refuse_disguise(path, data[:64])
    sums = []
    for number, line in enumerate(data.decode("utf-8", "surrogateescape").split("\n"), 1):  # not `splitlines`: names may hold \r and more
        if not line.strip() or line.startswith("#"):
            continue
        found = LINE.fullmatch(line.lstrip().removesuffix("\r"))
        digest = (found["digest"] or found["hex"]).lower() if found else ""
        name = (found["path"] or found["name"]).removeprefix("./") if found else ""
        if found and found["escaped"]:
            name = re.sub(r"\\[\\nr]", lambda escape: UNESCAPED[escape[0]], name)
        if len(digest) not in ALGORITHMS or not is_inside(name):
            what = f"{shown(path.name)} is not a list of checksums: line {number} is {shown(line[:100])}"
            raise InputError(what, facts={"path": path}, hint=A_LIST)
        sums.append(Sum(name, ALGORITHMS[len(digest)], digest))
    by_name = {(entry.path, entry.algorithm): entry for entry in sums}
    if contradicted := [entry.path for entry in sums if by_name[entry.path, entry.algorithm] != entry]:
        raise InputError(f"{shown(path.name)} lists two digests for {listed(contradicted)}", facts={"path": path}, hint=WRITE_AGAIN)
    if not sums:
        raise InputError(f"{shown(path.name)} lists no checksums", facts={"path": path}, hint=A_LIST)
    return tuple(by_name.values())
