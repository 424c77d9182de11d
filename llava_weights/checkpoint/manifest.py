"""The records of a folder's checksums, written and read: `SHA256SUMS` for standard tools, and a manifest with a digest for each tensor.

The digest of a tensor is over its raw little-endian, row-major values only, so it does not depend on shards, container or file names. It
is BLAKE3 in schema 2, which is written, and sha256 in schema 1, which is still read. Digests of two algorithms say nothing of each other:
who compares with a record hashes the values by the record's own algorithm.
Records are read as untrusted input, whoever wrote them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from .. import __version__
from ..errors import InputError
from ..formats.folder import member
from ..storage.digests import FILES, TENSOR_DIGESTS, TENSORS, digest_of, is_digest, named
from ..storage.places import open_place
from ..storage.reading import present, refuse_disguise
from ..storage.strict_json import load_object, read_exactly
from ..tensors.dtypes import BLOCKS, ITEMSIZE, bytes_of
from ..text import listed, shown
from .checkpoint import Step, describe

MANIFEST = "llava-weights.manifest.json"
SUMS = "SHA256SUMS"
MANIFEST_SCHEMA = 2
OLD_SCHEMA = 1  # of version 0.1: sha256 for everything, and roots that do not name it


@dataclass(frozen=True)
class FileEntry:
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """`digest`, by `algorithm`, is that of the values. `shard` is the file that holds the tensor; the roots do not depend on it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    digest: str
    shard: str
    algorithm: str = TENSORS

    def same_values(self, other: TensorEntry) -> bool:
        """Whether both hold the same bytes. Raises ValueError for digests of two algorithms, which can't tell."""
        if self.algorithm != other.algorithm:
            raise ValueError(f"`{self.name}`: its {self.algorithm} can't be compared with a {other.algorithm}")
        return self.digest == other.digest


def root_of_tensors(tensors: Iterable[TensorEntry], algorithm: str = TENSORS) -> str:
    """`algorithm:digest` of a line for each tensor, sorted by name: `name TAB dtype TAB dim,dim TAB digest LF`. `b3sum` gives the same.

    Raises ValueError where the tensors' digests are of another algorithm.
    """
    lines = (f"{t.name}\t{_content(t, algorithm)}" for t in sorted(tensors, key=lambda t: t.name.encode()))
    return named(algorithm, digest_of("".join(lines).encode(), algorithm))


def root_of_content(tensors: Iterable[TensorEntry], algorithm: str = TENSORS) -> str:
    """As `root_of_tensors`, but without names, and lines sorted: a pure renaming does not change it."""
    lines = sorted(_content(tensor, algorithm) for tensor in tensors)
    return named(algorithm, digest_of("".join(lines).encode(), algorithm))


def root_of_files(files: Sequence[FileEntry]) -> str:
    """`sha256:digest` of `SHA256SUMS`."""
    return named(FILES, digest_of(make_sums(files), FILES))


def _content(tensor: TensorEntry, algorithm: str) -> str:
    if tensor.algorithm != algorithm:
        raise ValueError(f"`{tensor.name}` has a {tensor.algorithm}, which is no part of a root by {algorithm}")
    return f"{tensor.dtype}\t{','.join(map(str, tensor.shape))}\t{tensor.digest}\n"


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
        "digests": {"files": FILES, "tensors": TENSORS},
        "root": {"tensors": root_of_tensors(tensors), "content": root_of_content(tensors), "files": root_of_files(files)},
        "recipe": [describe(step) for step in history],
        "options": dict(options),
        "tallies": dict(tallies),
        "environment": environment(),
        "files": [file.__dict__ for file in sorted(files, key=lambda file: file.path)],
        "tensors": [tensor_row(tensor) for tensor in sorted(tensors, key=lambda t: t.name.encode())],
    }


def tensor_row(tensor: TensorEntry) -> dict[str, Any]:
    """A tensor as the manifest has it: its digest stands under the name of the algorithm."""
    about = {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape), "nbytes": tensor.nbytes}
    return about | {tensor.algorithm: tensor.digest, "shard": tensor.shard}


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
    """A `llava-weights.manifest.json` that agrees with itself. `algorithm` is that of its tensors' digests.

    `recipe` has an object for each step, with objects `inputs` and `options` and a list of texts `warnings`; where it can't be read it
    is empty, and `doubt` says so.
    """

    path: Path
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    algorithm: str = TENSORS
    recipe: tuple[Mapping[str, Any], ...] = ()
    doubt: str = ""

    @property
    def root(self) -> str:
        """`algorithm:digest` of all tensors, as `root_of_tensors`."""
        return root_of_tensors(self.tensors.values(), self.algorithm)


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
    """The manifest in a file. Raises InputError unless it has a known schema, known digests, and its roots are those of its own lists."""
    found = load_object(path, limit=MAX_MANIFEST)
    schema = found.get("schema")
    if type(schema) is not int or schema not in (OLD_SCHEMA, MANIFEST_SCHEMA):
        hint = "verify it with the version of llava-weights that wrote it" if type(schema) is int else WRITE_AGAIN
        what = f"{shown(path.name)} is not a manifest of schema {OLD_SCHEMA} or {MANIFEST_SCHEMA}"
        raise InputError(what, facts={"path": path, "schema": shown(str(schema))}, hint=hint)
    algorithm = "sha256" if schema == OLD_SCHEMA else _algorithm(path, found.get("digests"))
    files = _entries(path, found.get("files"), "path", _file_of)
    tensors = _entries(path, found.get("tensors"), "name", lambda row: _tensor_of(row, algorithm))
    true = {"tensors": root_of_tensors(tensors.values(), algorithm), "files": root_of_files(list(files.values()))}
    if schema == OLD_SCHEMA:
        true = {name: root.removeprefix("sha256:") for name, root in true.items()}
    stated = found.get("root")
    wrong = [name for name, root in true.items() if not isinstance(stated, dict) or stated.get(name) != root]
    if wrong:
        raise _refusal(path, f"`root.{wrong[0]}` is not that of its list of {wrong[0]}")
    recipe = found.get("recipe", [])
    sound = isinstance(recipe, list) and all(map(_step_is_sound, recipe))
    doubt = "" if sound else f"{shown(path.name)} has no recipe that can be read"
    return Manifest(path, files, tensors, algorithm, tuple(recipe) if sound else (), doubt)


def _algorithm(path: Path, digests: Any) -> str:
    """That of the tensors' digests. Raises InputError for one that is not known, by its name."""
    names = {name: digests.get(name) if isinstance(digests, dict) else None for name in ("files", "tensors")}
    for what, known in (("files", (FILES,)), ("tensors", TENSOR_DIGESTS)):
        if names[what] not in known:
            facts = {"path": path, "known": ", ".join(known)}
            hint = "verify it with a newer version of llava-weights" if isinstance(names[what], str) else WRITE_AGAIN
            raise InputError(f"{shown(path.name)} has digests of {what} by {shown(str(names[what]))}", facts=facts, hint=hint)
    return str(names["tensors"])


def _step_is_sound(step: Any) -> bool:
    objects = isinstance(step, dict) and all(isinstance(step.get(key, {}), dict) for key in ("inputs", "options"))
    texts = step.get("warnings", []) if objects else None
    return isinstance(texts, list) and all(isinstance(text, str) for text in texts)


def _entries(path: Path, rows: Any, name: str, read: Callable[[Mapping[str, Any]], Entry | None]) -> dict[str, Entry]:
    """What `read` makes of each row, by its `name`. Raises InputError where it makes nothing of one."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise _refusal(path, "a list of files or tensors is missing")
    entries: dict[str, Entry] = {}
    for row in rows:
        entry = read(row)
        if entry is None:
            raise _refusal(path, f"the entry {shown(str(row))} is not sound")
        if row[name] in entries:
            raise _refusal(path, f"it lists {shown(row[name])} twice")
        entries[row[name]] = entry
    return entries


def _file_of(row: Mapping[str, Any]) -> FileEntry | None:
    """None for a row that is not sound."""
    if row.keys() != {"path", "size", FILES} or not is_digest(row[FILES]) or not _counts(row["size"]):
        return None
    return FileEntry(**row) if isinstance(row["path"], str) and is_inside(row["path"]) else None


def _tensor_of(row: Mapping[str, Any], algorithm: str) -> TensorEntry | None:
    """None for a row that is not sound."""
    if row.keys() != {"name", "dtype", "shape", "nbytes", algorithm, "shard"}:
        return None
    texts = all(isinstance(row[key], str) for key in ("name", "dtype", "shard"))
    known = texts and (row["dtype"] in ITEMSIZE or row["dtype"] in BLOCKS)
    if not known or not row["name"] or not row["name"].isprintable() or not is_digest(row[algorithm]):
        return None
    name, dtype, shape, nbytes, digest, shard = (row[key] for key in ("name", "dtype", "shape", "nbytes", algorithm, "shard"))
    if not isinstance(shape, list) or not _counts(nbytes, *shape) or nbytes != bytes_of(dtype, prod(shape)):
        return None
    return TensorEntry(name, dtype, tuple(shape), nbytes, digest, shard, algorithm)


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
    with open_place(path) as source:
        if source.identity.size > MAX_SUMS:
            what = f"{shown(path.name)} has {source.identity.size:,} bytes, too many for a list of checksums"
            raise InputError(what, facts={"path": path, "at most": f"{MAX_SUMS:,} bytes"}, hint=A_LIST)
        data = read_exactly(source, source.identity.size)
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
