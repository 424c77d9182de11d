"""Remote checkpoints (`hf://`, `s3://`, `gs://`, `https://`), opened without a download.

Each gets a shadow: a private folder with its small files, whole, and its weight files as sparse files of the true size that hold only
headers. Every reader works on it as on any folder. `reading.SHADOWS` maps each file to the remote one, so that tensors name that one
and their values are read from there.
"""

from __future__ import annotations

import atexit
import fnmatch
import io
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from ..errors import HubError, InputError, LlavaWeightsError, UsageError
from ..families.files import (
    ADAPTER_FILES,
    BESIDE_ADAPTER,
    INDEXES,
    LICENSE_FILES,
    META_FILES,
    META_PARAMS,
    SINGLE_FILES,
    SMALL_FILES,
    WEIGHT_SUFFIXES,
)
from ..families.xtuner import TELLING
from ..text import listed, scheme_of
from . import ranges, retry
from .http import LOOPBACK, MAX_SIZE, endpoint
from .hub import SIDECARS, HubSource, choose_files, hub_error, parse_source
from .reading import SHADOWS, SourceFile, join_ranges
from .retry import Absent, Attempts, name_of, with_retries, within
from .threads import in_threads

REMOTE_SCHEMES = ("hf", "https", "http", "s3", "gs")
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}")
MAX_FILES = 1000
MAX_SMALL = 64 << 20  # the longest of the small files, a tokenizer.json, has 30 MB
MAX_HEADERS = 64 << 20  # of one weight file; that of a 13B model has 100 kB
MAX_REMOTE_DIRECTORY = 4 << 20
HEAD, TAIL = 32 << 10, (64 << 10) + 22  # bytes that most safetensors headers fit into; the longest end of a zip, comment included
MEMBER_HEAD = 30 + 512  # a zip member's own header: torch pads its name with at most 64 bytes
JOIN = 16 << 10  # bytes between two ranges that cost less than another request
REQUESTS_AT_ONCE = 8
# Plain HTTP has no listing: the files that are asked for there, besides those that an index names.
KNOWN_WEIGHTS = (*SINGLE_FILES, *ADAPTER_FILES, *BESIDE_ADAPTER, META_PARAMS, *META_FILES)
KNOWN_SMALL = (*SMALL_FILES, *LICENSE_FILES)
NOT_A_ZIP = (ArithmeticError, LookupError, NotImplementedError, OSError, ValueError, struct.error)


@dataclass(frozen=True)
class Listing:
    """The files of a remote folder by bare name, each with its pinned address. `only` is the one file that was asked for."""

    address: str
    name: str  # as manifests and cards show it
    files: Mapping[str, SourceFile]
    revision: str | None = None
    only: str = ""

    def chosen(self) -> dict[str, SourceFile]:
        """The files that are needed, as when a repository is downloaded. Raises InputError where there are no weights."""
        names: Iterable[str] = choose_files(self.files)
        if self.only and not self.only.startswith("consolidated."):  # one file of Meta's needs the others
            beside = (self.only, *BESIDE_ADAPTER, *SIDECARS)
            names = [name for name in self.files if any(fnmatch.fnmatchcase(name, kind) for kind in beside)]
        found = {name: self.files[name] for name in names}
        if not any(name.endswith(tuple(WEIGHT_SUFFIXES)) for name in found) or self.only not in (*found, ""):
            hint = "give a folder with .safetensors, pytorch_model*.bin or consolidated.*.pth files, or one such file"
            raise InputError(f"`{self.address}` has no weights that can be read", hint=hint)
        for name, file in found.items():
            limit = MAX_SIZE if name.endswith(tuple(WEIGHT_SUFFIXES)) else MAX_SMALL
            if len(found) > MAX_FILES or not 0 <= file.size <= limit:
                raise InputError(
                    f"`{name}` has {file.size:,} bytes, at most {limit:,} are read",
                    facts={"address": file.path},
                    hint="download the repository, and take out what is no part of the model",
                )
        return found


@dataclass(frozen=True)
class Shadow:
    """A remote checkpoint as the readers see it: `path` is a local folder or file and is never shown."""

    path: Path
    name: str
    revision: str | None


def is_remote(text: str) -> bool:
    """Whether `text` is an address to read from over the network; an existing local path wins."""
    return scheme_of(text) in REMOTE_SCHEMES and not os.path.exists(text)


@contextmanager
def shadowed(text: str, revision: str | None = None) -> Iterator[Shadow]:
    """Make the shadow of the checkpoint at an address, reading headers and small files. Errors inside name the address.

    It stays until `forget` or the end of the process. Raises HubError where the network fails, InputError where there is no sound
    checkpoint, UsageError where a package is missing or `revision` makes no sense.
    """
    scheme = scheme_of(text)
    listing = _listing(scheme + text[len(scheme) :], revision)
    chosen = listing.chosen()
    folder = Path(tempfile.mkdtemp(prefix="llava-weights-")) / (re.sub(r"[^\w.\-]", "_", name_of(listing.address)) or "remote")
    _folders.append(folder.parent)
    folder.mkdir()
    in_threads(lambda name: _shadow(folder / name, chosen[name]), chosen, REQUESTS_AT_ONCE)
    try:
        yield Shadow(folder / listing.only if listing.only else folder, listing.name, listing.revision)
    except LlavaWeightsError as error:
        error.what = error.what.replace(str(folder), listing.address)
        error.facts = {label: text.replace(str(folder), listing.address) for label, text in error.facts.items()}
        error.hint = error.hint and error.hint.replace(str(folder), listing.address)
        raise


_folders: list[Path] = []


@atexit.register
def forget() -> None:
    """Delete the shadows of this process. What was opened stays readable, except for its small files."""
    for folder in _folders:
        shutil.rmtree(folder, ignore_errors=True)
    _folders.clear()
    SHADOWS.clear()


# --- which files there are ------------------------------------------------------------------------------------------


def _listing(text: str, revision: str | None) -> Listing:
    if text.startswith("hf://"):
        return _of_hub(text, revision)
    if revision is not None:
        raise UsageError(f"`{text}` is no repository, so it has no revision `{revision}`", hint="leave out `--revision`")
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - raises too
    except ValueError as error:
        raise UsageError(f"`{text}` is no address", facts={"reason": error}, hint="check how it is written") from None
    if parts.query or parts.fragment or "@" in parts.netloc or not parts.netloc:
        hint = "for private files use `hf://` or `s3://`, which take their credentials from the environment"
        raise UsageError("an address has no user, password, query or fragment", hint=hint)
    if text.startswith("http://") and not LOOPBACK.fullmatch(parts.hostname or ""):
        raise UsageError(f"`{text}` could be changed on its way", hint="use `https://`")
    return _of_web(text) if text.startswith("http") else _of_store(text)


def _of_hub(text: str, revision: str | None) -> Listing:
    """A repository at the commit that its branch or tag has now."""
    source = parse_source(text)
    assert isinstance(source, HubSource)
    source = source.at(revision)
    info = _ask_hub(source)
    sizes = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    folder, _, only = source.folder.rpartition("/") if source.folder in sizes else (source.folder, "", "")
    prefix = f"{folder}/" if folder else ""
    if parts := [] if only else [part for part in TELLING if any(_is_part(path, prefix + part) for path in sizes)]:
        raise _in_parts(text, parts, f"give `{source.repo_id}@{info.sha}`, which is downloaded first")
    address = f"hf://{source.repo_id}@{info.sha}/{prefix}"
    files = {}
    for path, found in sizes.items():
        name = path.removeprefix(prefix)
        if path.startswith(prefix) and SAFE_NAME.fullmatch(name):
            etag = str(found.lfs.sha256 if found.lfs else found.blob_id)
            files[name] = SourceFile(address + name, int(found.size or 0), 0, 0, etag=etag)
    return Listing(address.rstrip("/"), source.repo_id, files, info.sha, only)


def _ask_hub(source: HubSource) -> Any:
    address = endpoint()
    from huggingface_hub import HfApi

    api, tries = HfApi(endpoint=address, library_name="llava-weights"), Attempts(f"hf://{source.repo_id}")
    how: Any = {"revision": source.revision, "files_metadata": True, "timeout": 30}
    while True:
        try:
            info = within(retry.ANSWER_SECONDS, lambda: api.model_info(source.repo_id, **how))
            if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
                raise HubError(f"the Hub names no commit of `{source.repo_id}`", hint="run the same command again, or give the revision")
            return info
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if type(error).__name__ == "OfflineModeIsEnabled":
                raise HubError(f"`{source.repo_id}` can't be read: `HF_HUB_OFFLINE` is set", hint="unset it") from None
            explained = hub_error(error, source)
            try:
                tries.after(error if explained is None or status == 429 or status >= 500 else explained)
                continue
            except HubError as given_up:
                explained = explained or given_up
        raise explained  # outside of `except`: the library's own message may hold a token, so it must not be the context


def _of_store(text: str) -> Listing:
    """The objects directly under a key of `s3://` or `gs://`, or the one that has this key."""
    address, store = text.rstrip("/"), ranges.filesystem(text)
    try:
        found = with_retries(address, lambda: ranges.stored(address, lambda _, path: store.ls(path, detail=True)))
    except Absent:
        raise _missing(text) from None
    scheme, files = text.partition("://")[0], {}
    single = len(found) == 1 and f"{scheme}://{found[0]['name']}" == address and found[0]["type"] == "file"
    home, _, only = address.rpartition("/") if single else (address, "", "")
    folders = [str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "directory"]
    if parts := [part for part in TELLING if part in folders]:
        raise _in_parts(text, parts, "copy it to this machine first")
    for entry in found:
        name = str(entry["name"]).rpartition("/")[2]
        if entry["type"] == "file" and SAFE_NAME.fullmatch(name):
            files[name] = SourceFile(f"{home}/{name}", int(entry["size"]), 0, 0, etag=ranges.etag_of(entry))
    return Listing(address, address, files, None, only)


def _of_web(text: str) -> Listing:
    """The usual files that exist under an address, with the shards that an index names; or one file, and the small ones beside it."""
    address = text.rstrip("/")
    single = address.endswith(tuple(WEIGHT_SUFFIXES)) and not text.endswith("/")
    home, _, only = address.rpartition("/") if single else (address, "", "")
    files = _existing(home, (only, *BESIDE_ADAPTER, *KNOWN_SMALL) if only else (*INDEXES, *KNOWN_SMALL, *KNOWN_WEIGHTS))
    for index in () if only else INDEXES:
        if index in files and files[index].size <= MAX_SMALL:
            named = set(re.findall(rb'"([A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.(?:safetensors|bin))"', _whole(files[index])))
            files |= _existing(home, sorted(name.decode() for name in named)[:MAX_FILES])
            break
    if not files or (only and only not in files):
        raise _missing(text)
    return Listing(address, address, files, None, only)


def _existing(home: str, names: Iterable[str]) -> dict[str, SourceFile]:
    def ask(name: str) -> SourceFile | None:
        found = ranges.stat(f"{home}/{name}")
        return SourceFile(f"{home}/{name}", found[0], 0, 0, etag=found[1]) if found else None

    return {file.name: file for file in in_threads(ask, names, REQUESTS_AT_ONCE) if file}


def _is_part(path: str, part: str) -> bool:
    return path.startswith(f"{part}/") and path.endswith(tuple(WEIGHT_SUFFIXES))


def _in_parts(text: str, parts: list[str], hint: str) -> InputError:
    """The error for a checkpoint in several folders, of which a listing is one."""
    return InputError(
        f"`{text}` keeps its parts in folders, which are read on this machine alone", facts={"folders": listed(parts)}, hint=hint
    )


def _missing(text: str) -> InputError:
    hint = "check the address; plain HTTP has no listing, so a folder there needs files of the usual names"
    return InputError(f"there is nothing to read at `{text}`", hint=hint)


# --- what the shadow holds ------------------------------------------------------------------------------------------


def _whole(file: SourceFile) -> bytes:
    data = bytearray(file.size)
    ranges.read(file, 0, memoryview(data))
    return bytes(data)


def _shadow(path: Path, file: SourceFile) -> None:
    """Write one file of the shadow: a small one whole, a weight file with its headers only."""
    if not path.name.endswith(tuple(WEIGHT_SUFFIXES)):
        path.write_bytes(_whole(file))
        return
    with path.open("x+b", buffering=0) as sparse:
        sparse.truncate(file.size)
        holes = _Holes(file, sparse)
        _fill_safetensors(holes) if path.name.endswith(".safetensors") else _fill_zip(holes)
    SHADOWS[os.path.abspath(path)] = file


@dataclass
class _Holes(io.RawIOBase):
    """A sparse file that fills itself where it is read. Raises InputError where a hostile file asks for too much of it."""

    file: SourceFile
    sparse: IO[bytes]
    filled: list[tuple[int, int]] = field(default_factory=list)
    position: int = 0

    def fill(self, start: int, stop: int) -> None:
        start, stop = max(0, start), min(stop, self.file.size)
        if start >= stop or any(first <= start and stop <= last for first, last in self.filled):
            return
        if sum(last - first for first, last in self.filled) + stop - start > MAX_HEADERS:
            what = f"`{self.file.name}` would need more than {MAX_HEADERS:,} bytes only to tell what it holds"
            raise InputError(what, facts={"address": self.file.path}, hint="download it first")
        self.filled.append((start, stop))
        data = bytearray(stop - start)
        ranges.read(self.file, start, memoryview(data))
        os.pwrite(self.sparse.fileno(), data, start)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.file.size)[whence]
        if self.position < 0:
            raise OSError("a place before the start")
        return self.position

    def read(self, size: int = -1) -> bytes:
        stop = self.file.size if size < 0 else min(self.file.size, self.position + size)
        if stop - self.position > MAX_REMOTE_DIRECTORY:
            what = f"the directory of `{self.file.name}` has more than {MAX_REMOTE_DIRECTORY:,} bytes"
            raise InputError(what, facts={"address": self.file.path}, hint="download it first")
        self.fill(self.position, stop)
        data = os.pread(self.sparse.fileno(), max(0, stop - self.position), self.position)
        self.position += len(data)
        return data


def _fill_safetensors(holes: _Holes) -> None:
    """The length and the header. Errors in them are left to the reader of the shadow."""
    holes.fill(0, HEAD)
    size = int.from_bytes(os.pread(holes.sparse.fileno(), 8, 0), "little")
    if HEAD < 8 + size <= MAX_HEADERS:
        holes.fill(HEAD, 8 + size)


def _fill_zip(holes: _Holes) -> None:
    """The end, the directory, each member's own header, and the small members. Errors in them are left to the reader of the shadow."""
    from zipfile import BadZipFile, ZipFile

    holes.fill(holes.file.size - TAIL, holes.file.size)
    holes.fill(0, 512)
    try:
        with ZipFile(holes) as archive:
            members = archive.infolist()
    except (BadZipFile, *NOT_A_ZIP):
        return
    wanted = []
    for member in members:
        small = 0 if re.search(r"/data/\d+$", member.filename) else member.file_size
        wanted.append((member.header_offset, member.header_offset + MEMBER_HEAD + len(member.filename.encode()) + small))
    in_threads(lambda place: holes.fill(*place), join_ranges(wanted, gap=JOIN), REQUESTS_AT_ONCE)
