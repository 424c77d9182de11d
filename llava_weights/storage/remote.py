"""Remote checkpoints (`hf://`, `s3://`, `gs://`, `https://`), opened without a download.

Which files there are is asked once; every reader then works on the listing (`places.RemotePath`) as on a folder of this machine.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..errors import HubError, InputError, UsageError
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
from . import buckets, ranges, retry
from .http import LOOPBACK, MAX_SIZE, endpoint
from .hub import SIDECARS, HubSource, choose_files, hub_error, parse_source
from .places import HEAD, REQUESTS_AT_ONCE, TAIL, HeaderSource, Pieces, RemoteFolder, RemotePath, whole
from .reading import SourceFile
from .retry import Absent, Attempts, with_retries, within
from .threads import in_threads

REMOTE_SCHEMES = ("hf", "https", "http", "s3", "gs")
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}")
MAX_FILES = 1000
MAX_SMALL = 64 << 20  # the longest of the small files, a tokenizer.json, has 30 MB
# Plain HTTP has no listing: the files that are asked for there, besides those that an index names.
KNOWN_WEIGHTS = (*SINGLE_FILES, *ADAPTER_FILES, *BESIDE_ADAPTER, META_PARAMS, *META_FILES)
KNOWN_SMALL = (*SMALL_FILES, *LICENSE_FILES)


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
class Remote:
    """A remote checkpoint as the readers see it: a folder, or the one file that was asked for."""

    place: RemotePath
    name: str
    revision: str | None


def is_remote(text: str) -> bool:
    """Whether `text` is an address to read from over the network; an existing local path wins."""
    return scheme_of(text) in REMOTE_SCHEMES and not os.path.exists(text)


def open_remote(text: str, revision: str | None = None) -> Remote:
    """The checkpoint at an address. What its readers need first is asked for together: small files, and where headers usually are.

    Raises HubError where the network fails, InputError where there is nothing to read, UsageError where a package is missing or
    `revision` makes no sense.
    """
    scheme = scheme_of(text)
    listing = _listing(scheme + text[len(scheme) :], revision)
    folder = RemoteFolder(listing.address, listing.chosen())
    for name, found in zip(folder.files, in_threads(_first_pieces, folder.files.values(), REQUESTS_AT_ONCE), strict=True):
        folder.kept[name] = found
    return Remote(RemotePath(folder, listing.only), listing.name, listing.revision)


def _first_pieces(file: SourceFile) -> Pieces:
    """A small file whole; of a weight file the bytes that its header usually fits into: of a zip its end."""
    source, weights = HeaderSource(file), file.name.endswith(tuple(WEIGHT_SUFFIXES))
    places = [(0, HEAD if weights else file.size)]
    if weights and not file.name.endswith(".safetensors"):
        places.append((file.size - TAIL, file.size))
    source.expect(places)
    return source.kept


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
    address = text.rstrip("/")
    try:
        files, folders = with_retries(address, lambda: buckets.list_folder(address))
    except Absent:
        raise _missing(text) from None
    only, home = "", address
    if not files and not folders and (found := ranges.stat(address)):
        home, _, only = address.rpartition("/")
        files = {only: SourceFile(address, found[0], 0, 0, etag=found[1])}
    if not files and not folders:
        raise _missing(text)
    if parts := [part for part in TELLING if part in folders]:
        raise _in_parts(text, parts, "copy it to this machine first")
    return Listing(home, address, {name: file for name, file in files.items() if SAFE_NAME.fullmatch(name)}, None, only)


def _of_web(text: str) -> Listing:
    """The usual files that exist under an address, with the shards that an index names; or one file, and the small ones beside it."""
    address = text.rstrip("/")
    single = address.endswith(tuple(WEIGHT_SUFFIXES)) and not text.endswith("/")
    home, _, only = address.rpartition("/") if single else (address, "", "")
    files = _existing(home, (only, *BESIDE_ADAPTER, *KNOWN_SMALL) if only else (*INDEXES, *KNOWN_SMALL, *KNOWN_WEIGHTS))
    for index in () if only else INDEXES:
        if index in files and files[index].size <= MAX_SMALL:
            index_bytes = whole(RemotePath(RemoteFolder(home, files), index))
            named = set(re.findall(rb'"([A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.(?:safetensors|bin))"', index_bytes))
            files |= _existing(home, sorted(name.decode() for name in named)[:MAX_FILES])
            break
    if not files or (only and only not in files):
        raise _missing(text)
    return Listing(home, address, files, None, only)


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
