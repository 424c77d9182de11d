"""Where inputs come from: a local path, or a repository on the Hub, of which only what is needed is downloaded.

Downloads go through huggingface_hub, so its cache and its variables hold: `HF_HUB_CACHE`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import difflib
import errno
import fnmatch
import glob
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ..errors import HubError, InputError, LlavaWeightsError, OutputError, UsageError
from ..events import Note, tell
from ..families.files import DOWNLOADS, LICENSE_PREFIXES, SMALL_FILES, WEIGHT_SUFFIXES
from ..families.xtuner import FOLDERS, TELLING
from ..text import redact, scheme_of
from . import retry
from .http import endpoint
from .retry import Passing, tell_retry, within
from .strict_json import MAX_INDEX, load_object

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo


SIDECARS = (*SMALL_FILES, *(f"{prefix}*" for prefix in LICENSE_PREFIXES))

# What the Hub answers, by the class in huggingface_hub.errors or the HTTP status: the message, the hint, and the facts to show with it.
ANSWERS: tuple[tuple[str | int, str, str, tuple[str, ...]], ...] = (
    ("GatedRepoError", "access to `{repo}` is gated", "accept the licence on {page}, then `hf auth login`", ("logged in as",)),
    ("RevisionNotFoundError", "`{repo}` has no revision `{revision}`", "see its branches and commits on {page}/commits/main", ()),
    ("RepositoryNotFoundError", "`{repo}` is no local path, and not on the Hub, or private there", "{local}", ("logged in as", "endpoint")),
    ("DisabledRepoError", "`{repo}` was disabled on the Hub", "look for another copy and check its digests", ()),
    (401, "the Hub does not accept the token", "make a new one with `hf auth login`, or unset `HF_TOKEN`", ("logged in as", "endpoint")),
    (403, "the Hub refuses access to `{repo}`", "use a token that may read {page}", ("logged in as",)),
    (429, "the Hub gets too many requests from here", "wait some minutes, then run the same command again", ("logged in as",)),
)
HTTP_LIBRARIES = ("requests", "urllib3", "httpx", "httpx2", "httpcore")  # those that huggingface_hub uses, from 0.34 on
CONNECTION_HINT = "check the connection and `HF_ENDPOINT`, then run the same command again; files that are complete are kept"
NO_SPACE, NO_SPACE_HINT = "not enough space for the cache of the Hub", "free some, or point `HF_HUB_CACHE` at a larger disk"

NAME = r"(?![\w.-]*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
REPO = re.compile(rf"(?P<repo>{NAME}/{NAME})(?:@(?P<revision>[^\s@]+))?")
HF_URI = re.compile(
    rf"hf://(?:models/)?(?!datasets/|spaces/|kernels/|buckets/)(?P<repo>{NAME}/{NAME})"
    r"(?:@(?P<revision>refs/\w+/[^/\s]+|[^/\s@]+))?(?:/(?P<folder>.*))?"
)
ACCEPTED_SOURCES = "write a path, `owner/name`, or an address that begins with `hf://`, `https://`, `s3://` or `gs://`"
FILE_SUFFIXES = (*WEIGHT_SUFFIXES, ".json", ".model", ".zip")


@dataclass(frozen=True)
class LocalSource:
    """A file or folder that exists."""

    path: Path


@dataclass(frozen=True)
class HubSource:
    """A model repository `owner/name`, at a branch, tag or commit (None: the main branch), or a folder inside it ("": its top)."""

    repo_id: str
    revision: str | None = None
    folder: str = ""

    def at(self, revision: str | None) -> HubSource:
        """The same at the revision that was asked for beside it. Raises UsageError where it has another one."""
        if revision and self.revision and revision != self.revision:
            what = f"`{self.repo_id}@{self.revision}` and `--revision {revision}` ask for different revisions"
            raise UsageError(what, hint="give the revision once")
        return replace(self, revision=self.revision or revision)


@dataclass(frozen=True)
class FetchedRepo:
    """A repository on disk. `revision` is the full commit sha; `from_cache`: the Hub was not asked whether there is a newer one."""

    folder: Path
    repo_id: str
    revision: str
    from_cache: bool = False


def source_text(source: str | Path) -> str:
    """A source as text. A `Path` has made one slash of the two in an address."""
    return re.sub(r"^([a-z][a-z0-9]+):/(?=[^/])", r"\1://", str(source)) if isinstance(source, Path) else source


def parse_source(text: str) -> LocalSource | HubSource:
    """Read a local path, `owner/name[@revision]` or `hf://owner/name[@revision][/folder]`. A local path that exists always wins; where
    none does, a note says that the Hub is asked.

    Raises InputError where it is none of them, with the nearest name that does exist; UsageError for an address of another kind.
    """
    path = Path(os.path.expanduser(text))
    if text and os.path.exists(path):
        return LocalSource(path)
    scheme = scheme_of(text)
    if scheme == "hf":
        match = HF_URI.fullmatch(scheme + text[len(scheme) :])
        folder = PurePosixPath(match["folder"] or "") if match else PurePosixPath()
        if match is None or folder.is_absolute() or ".." in folder.parts:
            raise _error(InputError, f"`{text}` is not a model on the Hub", None, "write `hf://owner/name[@revision][/folder]`")
        return HubSource(match["repo"], unquote(match["revision"]) if match["revision"] else None, "/".join(folder.parts))
    match = REPO.fullmatch(text)
    if match and not match["repo"].endswith(FILE_SUFFIXES):
        tell(Note(redact(f"there is no local path `{text}`, so it is looked for on the Hub")))
        return HubSource(match["repo"], match["revision"])
    if scheme in ("s3", "gs"):
        raise InputError(f"`{text}` is neither a local path nor a repository of the Hub", hint="download it first")
    if scheme not in ("", "http", "https"):
        raise UsageError(f"nothing is read from `{scheme}://`", facts={"given": text}, hint=ACCEPTED_SOURCES)
    page = re.fullmatch(rf"(?i:https?)://(?:[^/@]*@)?[^/]+/({NAME}/{NAME})(?:/.*)?", text)
    hint = _did_you_mean(path, "check the path; a repository on the Hub is written `owner/name`")
    hint = f"write `{page[1]}` for this repository of the Hub" if page else hint
    raise _error(InputError, f"the path `{text}` does not exist", {"looked in": _deepest_folder(path).resolve()}, hint)


def may_be_revised(text: str) -> bool:
    """Whether `text` is a repository, by name or `hf://` address, without a revision: an `@` behind it would begin one."""
    found = HF_URI.fullmatch(text) if text.startswith("hf://") else REPO.fullmatch(text)
    return bool(found and not found["revision"] and not found.groupdict().get("folder"))


def nearest_path(path: Path) -> Path | None:
    """The existing path most like `path`, which does not exist: its first wrong part replaced by a similar name beside it."""
    parent = _deepest_folder(path)
    wrong, *rest = path.parts[len(parent.parts) :] or ("",)
    try:
        names = {entry.name.lower(): entry.name for entry in os.scandir(parent)}
    except OSError:
        return None
    similar = (parent.joinpath(names[name], *rest) for name in difflib.get_close_matches(wrong.lower(), names, n=3))
    return next(filter(os.path.exists, similar), None)


def _deepest_folder(path: Path) -> Path:
    return next(parent for parent in (*path.parents, Path()) if os.path.isdir(parent))


def choose_files(names: Iterable[str]) -> tuple[str, ...]:
    """Of the file names in one folder of a repository, those to download, sorted; () where it holds no weights. Of its folders only those
    in which xtuner keeps the parts of a LLaVA count."""
    every = sorted(names)
    top = [name for name in every if "/" not in name]
    parts = {folder: _of_one([name.removeprefix(f"{folder}/") for name in every if name.startswith(f"{folder}/")]) for folder in FOLDERS}
    if not any(parts[folder] for folder in TELLING):
        return _of_one(top)
    above = _of_one(top) or tuple(name for name in top if any(fnmatch.fnmatchcase(name, pattern) for pattern in SIDECARS))
    return tuple(sorted((*above, *(f"{folder}/{name}" for folder, chosen in parts.items() for name in chosen))))


def _of_one(names: list[str]) -> tuple[str, ...]:
    """As `choose_files`, of the names directly in a folder."""
    names = [name for name in names if "/" not in name]
    for patterns in DOWNLOADS:
        if fnmatch.filter(names, patterns[0]):
            return tuple(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns + SIDECARS))
    return ()


def fetch(source: HubSource, *, revision: str | None = None, progress: bool | None = None) -> FetchedRepo:
    """Download the weights, config and tokenizer files of a repository into the Hub's cache, or find them there.

    `revision` is the one asked for beside `source.revision`; they must agree. `progress` shows the library's bars on stderr (None: only
    if it is a terminal). Without a network the cached copy serves if it is complete. Raises HubError, OutputError where the cache has no
    space, InputError where the repository has no weights, UsageError where the revisions differ.
    """
    source = source.at(revision)
    endpoint()
    with narration(sys.stderr.isatty() if progress is None else progress):
        try:
            return _fetch(source)
        except LlavaWeightsError:
            raise
        except Exception as error:
            explained = hub_error(error, source)
            if explained is None:
                raise
        raise explained  # outside of `except`: the library's own message may hold a token, so it must not be the context


def _fetch(source: HubSource) -> FetchedRepo:
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=endpoint(), library_name="llava-weights")
    if constants.HF_HUB_OFFLINE:
        return _from_cache(api, source)
    try:
        how: Any = {"revision": source.revision, "files_metadata": True, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
        info = within(retry.ANSWER_SECONDS, lambda: api.model_info(source.repo_id, **how))
    except Exception as error:
        if not _unreachable(error):
            raise
        try:
            return _from_cache(api, source)
        except (OSError, HubError):
            raise error from None
    chosen = _chosen_of((sibling.rfilename for sibling in info.siblings or ()), source)
    _check_space(source, info, chosen)
    patterns = [glob.escape(name) for name in chosen]  # by branch, not by commit: so the library notes the branch for offline use
    snapshot = Path(api.snapshot_download(source.repo_id, revision=source.revision, allow_patterns=patterns))
    if snapshot.name != info.sha or not all((snapshot / name).exists() for name in chosen):
        raise _error(HubError, f"`{source.repo_id}` changed while it was being downloaded", None, "run the same command again")
    return FetchedRepo(snapshot / source.folder, source.repo_id, snapshot.name)


def _from_cache(api: HfApi, source: HubSource) -> FetchedRepo:
    """The cached copy. Raises LocalEntryNotFoundError where there is none, HubError where a download of it was not finished."""
    # Newer versions of the library check that the files of these patterns are there; what else belongs to it, the weights' index says.
    snapshot = Path(api.snapshot_download(source.repo_id, revision=source.revision, local_files_only=True, allow_patterns="config.json"))
    folder = snapshot / source.folder
    places = [folder, *(folder / part for part in FOLDERS)]
    there = (path.relative_to(folder).as_posix() for place in places if place.is_dir() for path in place.iterdir())
    chosen = choose_files(there)
    indexes = [PurePosixPath(name) for name in chosen if name.endswith(".index.json")]
    missing = sorted({str(index.parent / shard) for index in indexes for shard in _shards(folder / index)} - set(chosen))
    if missing or not chosen:
        facts = {"missing": _some(missing) or "the weights", "cache": folder}
        hint = f"run `hf download {source.repo_id}` where the Hub can be reached"
        raise _error(HubError, f"the copy of `{source.repo_id}` in the cache is not complete", facts, hint)
    return FetchedRepo(folder, source.repo_id, snapshot.name, from_cache=True)


def _shards(index: Path) -> set[str]:
    """The files that an index names; none where it is damaged, which its reader reports."""
    try:
        named = load_object(index, limit=MAX_INDEX).get("weight_map")
    except InputError:
        return set()
    return {str(name) for name in named.values()} if isinstance(named, dict) else set()


def _chosen_of(paths: Iterable[str], source: HubSource) -> tuple[str, ...]:
    """The paths to download. Raises InputError where there are no weights among them."""
    prefix = f"{source.folder}/" if source.folder else ""
    names = sorted(path.removeprefix(prefix) for path in paths if path.startswith(prefix))
    if chosen := choose_files(names):
        return tuple(prefix + name for name in chosen)
    where = f"`{source.repo_id}/{source.folder}`".replace("/`", "`")
    hint = "it needs .safetensors, pytorch_model*.bin or consolidated.*.pth files; for a folder of it write `hf://owner/name/folder`"
    raise _error(InputError, f"{where} has no weights that can be read", {"files": _some(names) or "none"}, hint)


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if names[6:] else "")


def _check_space(source: HubSource, info: ModelInfo, chosen: tuple[str, ...]) -> None:
    """Raise OutputError if the cache's file system has less room than the download needs."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    repo = cache / f"models--{source.repo_id.replace('/', '--')}"  # the cache's documented layout: blobs are named after their digest
    needed = 0
    for sibling in info.siblings or ():
        if sibling.rfilename in chosen:
            blob = repo / "blobs" / str(sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)
            copies = (blob, blob.with_name(f"{blob.name}.incomplete"), repo / "snapshots" / str(info.sha) / sibling.rfilename)
            needed += max(0, (sibling.size or 0) - max((copy.stat().st_size for copy in copies if copy.exists()), default=0))
    free = shutil.disk_usage(_deepest_folder(cache.absolute() / "x")).free
    if needed > free:
        facts = {"needed": f"{needed / 1e9:,.1f} GB", "free": f"{free / 1e9:,.1f} GB", "cache": cache}
        raise _error(OutputError, NO_SPACE, facts, NO_SPACE_HINT)


def hub_error(error: Exception, source: HubSource) -> LlavaWeightsError | None:
    """The error to show for one of huggingface_hub's; None where neither the Hub nor the disk is the cause."""
    from huggingface_hub import constants, errors

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    cache, repo = constants.HF_HUB_CACHE, f"`{source.repo_id}`"
    facts = {"endpoint": endpoint(), "cache": cache, "reason": f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"}
    number = cause.errno if isinstance(cause, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(cause):
        return _error(OutputError, NO_SPACE, {"cache": cache}, NO_SPACE_HINT)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _error(OutputError, f"the cache of the Hub `{cache}` can't be written", None, "point `HF_HUB_CACHE` at a folder of yours")
    for kind, what, hint, keys in ANSWERS:
        if kind == _status(cause) or (isinstance(kind, str) and isinstance(cause, getattr(errors, kind))):
            return _refusal(source, what, hint, keys)
    if isinstance(cause, errors.LocalEntryNotFoundError):
        hint = _did_you_mean(source.repo_id, f"unset it, or run `hf download {source.repo_id}` where the Hub can be reached")
        absent = {"revision": source.revision or "main", "cache": cache}
        return _error(HubError, f"{repo} is no local path, nor in the cache, and `HF_HUB_OFFLINE` is set", absent, hint)
    if _unreachable(cause):
        return _error(
            HubError, f"{repo} is no local path, and the Hub can't be reached for it", facts, _did_you_mean(source.repo_id, CONNECTION_HINT)
        )
    if isinstance(cause, (OSError, ValueError, RuntimeError)):
        return _error(HubError, f"{repo} can't be downloaded", facts, CONNECTION_HINT)
    return None


def _refusal(source: HubSource, what: str, hint: str, keys: tuple[str, ...]) -> LlavaWeightsError:
    from huggingface_hub import constants

    stored = "the account of `hf auth login`" if os.path.isfile(constants.HF_TOKEN_PATH) else "nobody (no HF_TOKEN, no `hf auth login`)"
    login = "the owner of `HF_TOKEN`" if os.environ.get("HF_TOKEN") else stored
    facts = {"logged in as": login, "endpoint": endpoint()}
    words = {
        "repo": source.repo_id,
        "revision": source.revision or "main",
        "page": f"{endpoint()}/{source.repo_id}",
        "local": _did_you_mean(source.repo_id, "check the name; for a private repository, `hf auth login`"),
    }
    return _error(HubError, what.format(**words), {key: facts[key] for key in keys}, hint.format(**words))


def _did_you_mean(path: Path | str, otherwise: str) -> str:
    """A hint at the most similar local path, else `otherwise`: a mistyped path looks like a repository's name."""
    near = nearest_path(Path(path))
    return f"did you mean the local path `{near}`?" if near else otherwise


def _unreachable(error: BaseException) -> bool:
    """Whether the Hub gave no answer, or one that says that it is broken: then a cached copy will do."""
    status = _status(error)
    if status is not None:
        return status >= 500
    return isinstance(error, (ConnectionError, TimeoutError, Passing)) or type(error).__module__.split(".")[0] in HTTP_LIBRARIES


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def narration(progress: bool) -> Iterator[None]:
    """Inside, huggingface_hub shows bars only with `progress`, and no log lines. `HF_HUB_DISABLE_PROGRESS_BARS` overrides both."""
    from huggingface_hub import constants
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    level = get_verbosity()
    silence = not progress and constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    set_verbosity(logging.ERROR)
    if silence:
        disable_progress_bars()
    try:
        yield
    finally:
        set_verbosity(level)
        if silence:
            enable_progress_bars()


class LibraryRetries(logging.Handler):
    """Reads the log of huggingface_hub's own loop, which tries most requests again for half a minute, and sends a note of each retry.
    `spent` says whether that loop has given up, so that no second one is put around it."""

    _turn, _active, _before = threading.Lock(), list["LibraryRetries"](), (0, True)

    def __init__(self, address: str) -> None:
        super().__init__(logging.WARNING)
        self.address, self.tries, self.last, self.spent, self.reason = address, 0, False, False, ""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if found := re.search(r"\[Retry (\d+)/(\d+)\]", text):
            self.tries, self.last, self.spent = int(found[1]), found[1] == found[2], False
            tell_retry(self.address, self.reason)
        else:
            self.reason, self.spent = text.partition(" thrown while")[0].strip("'"), self.last

    def __enter__(self) -> LibraryRetries:
        log = logging.getLogger("huggingface_hub.utils._http")
        with self._turn:
            if not self._active:
                LibraryRetries._before = log.level, log.propagate
                log.setLevel(logging.WARNING)
                log.propagate = False
            self._active.append(self)
            log.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        log = logging.getLogger("huggingface_hub.utils._http")
        with self._turn:
            log.removeHandler(self)
            self._active.remove(self)
            if not self._active:
                log.setLevel(self._before[0])
                log.propagate = self._before[1]


def _error(kind: type[LlavaWeightsError], what: str, facts: Mapping[str, object] | None, hint: str) -> LlavaWeightsError:
    return kind(what, facts=facts, hint=hint)
