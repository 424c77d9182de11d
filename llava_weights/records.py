"""What was recorded about a checkpoint, by us or by others: manifests, lists of checksums, the Hub's metadata. All of it is untrusted."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from .buffers import ITEMSIZE
from .errors import HubError, InputError, LlavaWeightsError
from .formats import listed, open_regular, refuse_disguise, shown
from .formats.strict_json import load_object, read_exactly
from .hub import HubSource, endpoint, explain
from .manifest import MANIFEST, SCHEMA, SUMS, FileEntry, TensorEntry, make_sums, root_of_tensors
from .rehash import GIT

MAX_MANIFEST = 16 << 20  # that of a 13B model has 250 kB
MAX_SUMS = 16 << 20
ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}  # by the digest's length in hexadecimal digits
# `digest  name` and `digest *name` of GNU's programs and Meta's checklist.chk; `SHA256 (name) = digest` of BSD's.
LINE = re.compile(r"\\?(?P<digest>[0-9A-Fa-f]{32,128})[ \t][ \t*]?(?P<path>\S.*)|[A-Z0-9-]+ \((?P<name>.+)\) = (?P<hex>[0-9A-Fa-f]{32,})")
AGAIN = "write it again with `llava-weights checksum`, or get it again from where it came from"

Entry = TypeVar("Entry", FileEntry, TensorEntry)


@dataclass(frozen=True)
class Manifest:
    """A `llava-weights.manifest.json` that agrees with itself.

    `recipe` has what each step says of itself: objects `inputs` and `options`, and a list of texts `warnings`; `doubt` says why there
    is none, where what stands there can't be read.
    """

    path: Path
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    recipe: tuple[Mapping[str, Any], ...] = ()
    doubt: str = ""


@dataclass(frozen=True)
class Sum:
    """The digest that somebody says the file `path` has. `algorithm` is a name of hashlib's, or `rehash.GIT`."""

    path: str
    algorithm: str
    digest: str


def manifest_path(place: Path) -> Path:
    """Where the manifest of a folder, or of a single file, lies."""
    return place / MANIFEST if place.is_dir() else place.with_name(f"{place.name}.manifest.json")


def sums_path(place: Path) -> Path:
    return place / SUMS if place.is_dir() else place.with_name(f"{place.name}.sha256")


def find_manifest(place: Path) -> Manifest | None:
    """The manifest of a folder or file; for a file also that of its folder, cut to what it says of this file."""
    if manifest_path(place).is_file():
        return read_manifest(manifest_path(place))
    above = place.parent / MANIFEST
    if place.is_dir() or not above.is_file():
        return None
    whole = read_manifest(above)
    if place.name not in whole.files:
        return None
    tensors = {name: entry for name, entry in whole.tensors.items() if entry.shard == place.name}
    return replace(whole, files={place.name: whole.files[place.name]}, tensors=tensors)


def read_manifest(path: Path) -> Manifest:
    """Raises InputError unless the file is a manifest of this schema whose roots are those of its own lists."""
    found = load_object(path, limit=MAX_MANIFEST)
    if found.get("schema") != SCHEMA:
        hint = "verify it with the version of llava-weights that wrote it" if type(found.get("schema")) is int else AGAIN
        what = f"{shown(path.name)} is not a manifest of schema {SCHEMA}"
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
    texts = all(isinstance(row[key], str) and row[key].isprintable() for key in ("name", "dtype", "shard"))
    if not texts or not row["name"] or row["dtype"] not in ITEMSIZE or not _is_digest(row["sha256"]):
        return False
    shape = row["shape"]
    return isinstance(shape, list) and _counts(row["nbytes"], *shape) and row["nbytes"] == prod(shape) * ITEMSIZE[row["dtype"]]


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


def _counts(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 60 for value in values)


def is_inside(path: str) -> bool:
    """Whether a path from a list stays in the folder that it is relative to."""
    parts = PurePosixPath(path).parts
    return bool(parts) and path.isprintable() and "\\" not in path and not path.startswith("/") and ".." not in parts


def _refusal(path: Path, reason: str) -> InputError:
    return InputError(f"{shown(path.name)} is not a manifest that can be trusted: {reason}", facts={"path": path}, hint=AGAIN)


def read_sums(path: Path) -> tuple[Sum, ...]:
    """The lines of a list as sha256sum, md5sum or their BSD cousins write it. Raises InputError for anything else."""
    with open_regular(path) as (fd, status):
        if status.st_size > MAX_SUMS:
            raise InputError(f"{shown(path.name)} has {status.st_size:,} bytes, too many for a list of checksums", facts={"path": path})
        data = read_exactly(path, fd, status.st_size)
    refuse_disguise(path, data[:64])
    sums = []
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = LINE.fullmatch(line.strip())
        digest = (found["digest"] or found["hex"]).lower() if found else ""
        name = (found["path"] or found["name"]).removeprefix("./") if found else ""
        if len(digest) not in ALGORITHMS or not is_inside(name):
            what = f"{shown(path.name)} is not a list of checksums: line {number} is {shown(line[:100])}"
            raise InputError(what, facts={"path": path}, hint="give a file as `sha256sum` or `md5sum` write it, a manifest or a checkpoint")
        sums.append(Sum(name, ALGORITHMS[len(digest)], digest))
    by_name = {(entry.path, entry.algorithm): entry for entry in sums}
    if contradicted := [entry.path for entry in sums if by_name[entry.path, entry.algorithm] != entry]:
        raise InputError(f"{shown(path.name)} lists two digests for {listed(contradicted)}", facts={"path": path})
    if not sums:
        raise InputError(f"{shown(path.name)} lists no checksums", facts={"path": path})
    return tuple(by_name.values())


def hub_sums(source: HubSource) -> tuple[str, tuple[Sum, ...]]:
    """The commit of a repository, and the digests that the Hub has of the files in its folder: sha256 of large files, git's of small ones.

    Raises HubError.
    """
    from huggingface_hub import HfApi, constants

    api, timeout = HfApi(endpoint=endpoint(), library_name="llava-weights"), constants.HF_HUB_DOWNLOAD_TIMEOUT
    explained: LlavaWeightsError | None = None
    try:
        info = api.model_info(source.repo_id, revision=source.revision, files_metadata=True, timeout=timeout)
    except Exception as error:
        explained = explain(error, source)
        if explained is None:
            raise
    if explained:  # outside of `except`: the library's own message may hold a token, so it must not be the context
        raise explained
    prefix = f"{source.folder}/" if source.folder else ""
    sums = []
    for sibling in info.siblings or ():
        name = sibling.rfilename.removeprefix(prefix)
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if sibling.rfilename.startswith(prefix) and digest and is_inside(name):
            sums.append(Sum(name, "sha256" if sibling.lfs else GIT, digest))
    if not sums:
        raise HubError(f"`{source.repo_id}` has no files there", hint="check the revision and the folder")
    return str(info.sha), tuple(sums)
