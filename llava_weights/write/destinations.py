"""Where an output over the network goes: a folder of a bucket (`s3://`, `gs://`), or of a repository on the Hub (`hf://`).

A bucket has no transactions, so the manifest is deleted first and put last: what has one is complete. On the Hub each finished shard is
a commit on a branch named after the work; at the end one commit on the real branch takes over all of them, with the small files.
Nothing but huggingface_hub and obstore ever sees a credential.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoint.manifest import MANIFEST
from ..errors import HubError, LlavaWeightsError, OutputError, UsageError
from ..storage import buckets
from ..storage.http import endpoint
from ..storage.hub import HubSource, LibraryRetries, hub_error, narration, parse_source
from ..storage.places import RemoteFolder, RemotePath
from ..storage.reading import SourceFile
from ..storage.retry import CHECK_CONNECTION, TRIES, Absent, Attempts, Passing
from ..text import scheme_of

T = TypeVar("T")
WRITABLE_SCHEMES = ("s3", "gs", "hf")
CONFLICTS = (409, 412, 429)  # another commit was faster, or too many requests
LOGIN = "log in with `hf auth login`, or set `HF_TOKEN`, with a token that may write to {page}"

FileTags = dict[str, tuple[int, str]]  # size, and ETag or (of a large file on the Hub) sha256, by bare name


def is_address(text: str) -> bool:
    """Whether `text` is an address: anything with a scheme, also one that is written with a single slash."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text) is not None


def open_destination(text: str) -> Bucket | Repository:
    """Nothing is asked yet. Raises UsageError for what can't be written to."""
    scheme = scheme_of(text)
    address = (scheme + text[len(scheme) :]).rstrip("/")
    if scheme == "hf":
        source = parse_source(address)
        if isinstance(source, HubSource):
            return Repository(source)
    if re.fullmatch(r"(s3|gs)://[a-z0-9][a-z0-9._-]+/[^?#@\s]+", address) and not {"", ".", ".."} & set(address.split("/")[3:]):
        return Bucket(address)
    hint = "write `s3://bucket/folder`, `gs://bucket/folder` or `hf://owner/name[@branch][/folder]`"
    if scheme and scheme not in WRITABLE_SCHEMES:
        raise UsageError(f"`{scheme}://` is no place to write to", facts={"given": text}, hint=f"{hint}, or a path")
    raise UsageError(f"`{text}` is no place to write to", hint=hint)


class Bucket:
    """A folder of an object store. Every method raises HubError where the network or the other side does not let it be done, as those of
    `Repository` do, which means the same by the same names."""

    def __init__(self, address: str) -> None:
        self.address, self.made = address, ""  # the second: what the user should know of what was made here

    def check(self) -> None:
        """Refuse at once what can't end well: nothing here, `names` is the first request."""

    def names(self) -> FileTags:
        """What the folder holds; nothing where it does not exist. Names that begin with a dot do not count."""
        try:
            found = _retried(self.address, lambda: buckets.list_folder(self.address), lambda error: error)[0]
        except Absent:
            return {}
        return {name: (file.size, file.etag) for name, file in found.items() if not name.startswith(".")}

    held = names  # with what is uploaded and not yet visible

    def begin(self, key: str) -> None:
        """Make ready for work named `key`, which may have begun before."""
        if MANIFEST in self.names():  # what is replaced must not look complete meanwhile
            self._remove(MANIFEST)

    def folder(self) -> RemotePath:
        """What `held` says, to be read."""
        files = {name: SourceFile(f"{self.address}/{name}", size, 0, 0, etag=tag) for name, (size, tag) in self.held().items()}
        return RemotePath(RemoteFolder(self.address, files))

    def put(self, path: Path, name: str) -> str:
        """Upload a file; returns its tag, as `held` will say it."""
        return self.send(path, name, path.stat().st_size)

    def send(self, data: Path | Iterator[memoryview], name: str, size: int) -> str:
        """As `put`, also for bytes that come in order."""
        try:
            return self._once(lambda: buckets.put(f"{self.address}/{name}", data, size))
        except Absent:
            what = f"there is no bucket `{self.address.split('/')[2]}`, or this key may not see it"
        raise HubError(what, facts={"address": self.address}, hint="make it first, or check the credentials")

    def publish(self, files: Mapping[str, Path], shards: Collection[str], replaced: Collection[str]) -> str:
        """Make the folder hold `shards`, which are uploaded, and `files`, the manifest last; what else there is of `replaced` is deleted.
        Returns its page."""
        for name in sorted(files, key=lambda name: (name == MANIFEST, name.endswith(".index.json"), name)):
            if name == MANIFEST:
                for stray in set(replaced) & set(self.names()) - set(files) - set(shards):
                    self._remove(stray)
            self.put(files[name], name)
        return self.address

    def _remove(self, name: str) -> None:
        try:
            self._once(lambda: buckets.delete(f"{self.address}/{name}"))
        except Absent:
            return

    def _once(self, action: Callable[[], T]) -> T:
        """What `action` returns, which obstore has tried often enough. Raises HubError, in plain words, where it can't be done."""
        try:
            return action()
        except Passing as error:
            facts = {"address": self.address, "tries": buckets.PART_TRIES, "reason": error}
            raise HubError(f"`{self.address}` can't be written over the network", facts=facts, hint=CHECK_CONNECTION) from None


class Repository:
    """A model repository on the Hub, or a folder of it. A new one is private."""

    def __init__(self, source: HubSource) -> None:
        self.source, self.repo, self.target = source, source.repo_id, source.revision or "main"
        self.address = (
            f"hf://{self.repo}" + (f"@{source.revision}" if source.revision else "") + (f"/{source.folder}" if source.folder else "")
        )
        self.prefix = f"{source.folder}/" if source.folder else ""
        self.branch: str | None = None  # of the shards that wait for the others
        self.made = ""

    @property
    def page(self) -> str:
        """What a browser opens."""
        return f"{endpoint()}/{self.repo}" + (
            f"/tree/{self.target}/{self.source.folder}".rstrip("/") if self.source != HubSource(self.repo) else ""
        )

    def check(self) -> None:
        endpoint()
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise HubError(f"`{self.repo}` can't be written: `HF_HUB_OFFLINE` is set", hint="unset it")
        if get_token() is None:
            raise HubError(f"nobody is logged in who could write to `{self.repo}`", hint=self._login)

    def refuse_occupied(self) -> None:
        """Raise HubError where nobody is logged in, OutputError where there is something."""
        self.check()
        if self.names():
            hint = "choose another, or pass `--force` to replace what is there"
            raise OutputError(f"`{self.address}` exists and is not empty", hint=hint)

    def names(self) -> FileTags:
        return self._tree(self.target)

    def held(self) -> FileTags:
        return self.names() | (self._tree(self.branch) if self.branch else {})

    def folder(self) -> RemotePath:
        commit = self._do(lambda api: api.model_info(self.repo, revision=self.branch).sha)
        home = f"hf://{self.repo}@{commit}/{self.prefix}"
        files = {name: SourceFile(home + name, size, 0, 0, etag=tag) for name, (size, tag) in self._tree(str(commit)).items()}
        return RemotePath(RemoteFolder(home.rstrip("/"), files))

    def begin(self, key: str) -> None:
        self._open()
        self.branch = f"llava-weights-partial-{key}"
        self._do(lambda api: api.create_branch(self.repo, branch=self.branch, revision=self.target, exist_ok=True))

    def put(self, path: Path, name: str) -> str:
        from huggingface_hub import CommitOperationAdd

        assert self.branch is not None

        def send(api: Any) -> str:
            add = CommitOperationAdd(self.prefix + name, path)
            api.create_commit(self.repo, [add], commit_message=f"{name}, of an upload that is not finished", revision=self.branch)
            return add.upload_info.sha256.hex()

        return str(self._do(send))

    def publish(self, files: Mapping[str, Path], shards: Collection[str], replaced: Collection[str]) -> str:
        if self.branch is None:
            self._open()
        self._do(lambda api: self._commit(api, files, shards, replaced))
        if self.branch:
            self._do(lambda api: self._forget(api, str(self.branch)))
        return self.page

    def _open(self) -> None:
        """Make the repository and the branch, where they do not exist."""
        if not self._do(lambda api: api.repo_exists(self.repo)):
            self.made = "a new private repository"
            self._do(lambda api: api.create_repo(self.repo, private=True, exist_ok=True))
        if self.target != "main":
            self._do(lambda api: api.create_branch(self.repo, branch=self.target, exist_ok=True))

    def _commit(self, api: Any, files: Mapping[str, Path], shards: Collection[str], replaced: Collection[str]) -> None:
        """One commit. It is put together anew for each try, since one whose answer got lost has happened."""
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        here, waiting = self.names(), self._tree(self.branch) if self.branch else {}
        operations: list[Any] = [CommitOperationAdd(self.prefix + name, path) for name, path in files.items()]
        for name in shards:
            if name in waiting and here.get(name) != waiting[name]:
                operations.append(CommitOperationCopy(self.prefix + name, self.prefix + name, src_revision=self.branch))
        strays = set(replaced) & set(here) - set(files) - set(shards)
        operations += [CommitOperationDelete(self.prefix + name, is_folder=False) for name in sorted(strays)]
        api.create_commit(self.repo, operations, commit_message="Upload with llava-weights", revision=self.target)

    def _forget(self, api: Any, branch: str) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            api.delete_branch(self.repo, branch=branch)
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code != 404:
                raise

    def _tree(self, revision: str) -> FileTags:
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile

        def ask(api: Any) -> FileTags:
            try:
                found = list(api.list_repo_tree(self.repo, self.source.folder or None, revision=revision))
            except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
                return {}
            files = {file.path.removeprefix(self.prefix): file for file in found if isinstance(file, RepoFile)}
            return {name: (file.size, str(file.lfs.sha256 if file.lfs else file.blob_id)) for name, file in files.items() if name[0] != "."}

        return self._do(ask)

    @property
    def _login(self) -> str:
        return LOGIN.format(page=f"{endpoint()}/{self.repo}")

    def _do(self, action: Callable[[Any], T]) -> T:
        address = endpoint()
        from huggingface_hub import HfApi

        api = HfApi(endpoint=address, library_name="llava-weights")

        def quietly() -> T:
            with narration(progress=False), LibraryRetries(self.address) as retries:
                try:
                    return action(api)
                except Exception:
                    if not retries.spent:
                        raise
            raise Passing(retries.reason, tries=TRIES)

        return _retried(self.address, quietly, self._explained)

    def _explained(self, error: Exception) -> Exception:
        """`error` as it is where another try may help, else in the user's words."""
        while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # how huggingface_hub wraps an upload's failure
            error = error.__cause__
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in CONFLICTS or (status or 0) >= 500:
            return Passing(f"status {status}")
        if isinstance(error, ValueError | RuntimeError) and status is None:
            return HubError(f"`{self.repo}` can't be written", facts={"reason": str(error).partition("\n")[0]}, hint=CHECK_CONNECTION)
        explained = hub_error(error, self.source) if status is not None else None
        if explained is not None and status in (401, 403, 404):
            explained.hint = self._login
        return explained or error


def _retried(address: str, action: Callable[[], T], explained: Callable[[Exception], Exception]) -> T:
    """What `action` returns, tried again after failures that may pass. Raises HubError where they do not."""
    attempts = Attempts(address)
    while True:
        try:
            return action()
        except (Absent, OutputError):
            raise
        except Exception as error:
            try:
                attempts.after(explained(error))
                continue
            except LlavaWeightsError as known:
                given_up = known
        if "tries" in given_up.facts:
            given_up = HubError(f"`{address}` can't be written over the network", facts=given_up.facts, hint=CHECK_CONNECTION)
        raise given_up  # outside of `except`: the library's own message may hold a token, so it must not be the context
