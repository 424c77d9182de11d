"""Upload each finished shard while the next is made; and publish a folder that is complete.

Of an uploaded shard only the header stays here, in a sparse file of the same size, so the work folder holds about two shards.
`NAME.partial/uploads` lists what is uploaded; a later run trusts it where the destination still has the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoint.manifest import MANIFEST, MAX_MANIFEST, SUMS, read_manifest, read_sums
from ..errors import HubError, InputError, LlavaWeightsError, OutputError, UsageError
from ..events import Listener, Note
from ..formats.folder import member
from ..storage.atomic import remove, write_file
from ..storage.hub import REPO, HubSource
from ..storage.strict_json import load_object
from ..storage.threads import GLANCE, interruption
from ..text import scheme_of
from .destinations import Destination, Repository, is_address, open_destination
from .read_back import disk_sum
from .work_folder import Job

SHARDS_HELD = 2  # shards on this machine: one goes up while the next is made


def job_at(output: str, *, reread: bool = True, on_event: Listener = lambda event: None) -> tuple[Path, Callable[[Path], Job]]:
    """The folder and the kind of job that `execute` needs for `output`, a path or an address. For an address, the work folder
    is made in the current folder. Raises UsageError where nothing can be written to such an address."""
    if not is_address(output):
        return Path(os.path.abspath(output)), Job
    destination = open_destination(output)
    return Path.cwd() / destination.address.rpartition("/")[2], lambda out: UploadJob(out, destination, reread, on_event)


class UploadJob(Job):
    """Work in progress whose output goes over the network. One thread uploads; what it raises is raised by the next call of the writer.

    After an interruption it may finish the request that it has begun, which no client can break off. It reads through a descriptor of its
    own, and writes nothing here any more.
    """

    def __init__(self, out: Path, destination: Destination, reread: bool, on_event: Listener) -> None:
        super().__init__(out)
        self.remote = True
        self.destination, self.reread, self.on_event = destination, reread, on_event
        self.uploads = self.partial / "uploads"
        self.held: Mapping[str, tuple[int, str]] = {}
        self.turn, self.closed = threading.Lock(), False
        self.sending: threading.Thread | None = None
        self.failure: BaseException | None = None

    @property
    def shown(self) -> str:
        return self.destination.address

    @property
    def published(self) -> bool:
        """Never: everything that publishing does may be done again."""
        return False

    @property
    def occupied(self) -> bool:
        """The destination holds something that is not of this work."""
        self.destination.check()
        return self._noted().get("destination") != self.shown and bool(self.destination.names())

    @property
    def remains(self) -> str:
        return f"{len(self._noted().get('shards', {}))} of them are uploaded; `{self.shown}` is not complete and has no manifest"

    def room(self, sizes: Sequence[int]) -> int:
        return sum(sorted(sizes)[-SHARDS_HELD:])

    def restore(self) -> None:
        """Nothing: what lies under the output's local name belongs to the user."""

    def begin(self, identity: Mapping[str, str], *, restart: bool) -> None:
        super().begin({**identity, "destination": self.shown}, restart=restart)

    def prepare(self) -> None:
        """Prepare the destination: from here on, what it holds belongs to this work."""
        noted = self._noted()
        if noted.get("destination") != self.shown:
            noted = {"destination": self.shown, "shards": {}, "replaced": sorted(self.destination.names())}
        self.destination.begin(hashlib.sha256(self.recorded.read_bytes()).hexdigest()[:12])
        if self.destination.made:
            self.on_event(Note(f"`{self.shown}` is {self.destination.made}"))
        write_file(self.uploads, json.dumps(noted).encode())
        self.held = self.destination.held()

    def uploaded(self, entry: Mapping[str, Any]) -> bool:
        """The destination has this shard, and its header is here."""
        name = entry["name"]
        noted = self._noted().get("shards", {}).get(name)
        if noted is None or noted["sha256"] != entry["sha256"] or self.held.get(name) != (entry["nbytes"], noted["tag"]):
            return False
        return bool(hashlib.sha256(_header(self.folder / name)).hexdigest() == noted["header"])

    def shard_done(self, entry: Mapping[str, Any]) -> None:
        """Begin to upload a finished shard, once the one before is uploaded."""
        self._wait()
        if self.uploaded(entry):
            _keep_header(self.folder / entry["name"], self.partial / "header")
        else:
            self.sending = threading.Thread(target=self._guard, args=(entry["name"], entry["sha256"], entry["read_back"]), daemon=True)
            self.sending.start()

    def _guard(self, name: str, sha256: str, read_back: str) -> None:
        try:
            self._upload(name, sha256, read_back)
        except BaseException as error:  # handed to the caller's thread
            self.failure = error

    def _upload(self, name: str, sha256: str, read_back: str) -> None:
        path = self.folder / name
        if self.reread and not _reads_as(path, read_back):
            hint = "check the disk; the same command writes this shard again"
            raise OutputError(f"`{name}` does not come back from the disk as it was written", hint=hint)
        size, tag = path.stat().st_size, self.destination.put(path, name)
        with self.turn:
            if self.closed:  # another run may be at work here by now
                return
            noted = self._noted()
            noted["shards"][name] = {"sha256": sha256, "tag": tag, "header": hashlib.sha256(_header(path)).hexdigest()}
            write_file(self.uploads, json.dumps(noted).encode())
            self.held = {**self.held, name: (size, tag)}
            _keep_header(path, self.partial / "header")  # not in the folder that will be the output

    def _wait(self) -> None:
        while self.sending is not None:
            self.sending.join(GLANCE)
            if not self.sending.is_alive():
                self.sending = None
            elif (stopped := interruption()) is not None:
                raise stopped
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def publish(self, *, force: bool) -> None:
        self._wait()
        noted = self._noted()
        shards, held = noted["shards"], self.destination.held()
        here = {path.name: path for path in self.folder.iterdir()}
        sizes = {name: here.pop(name).stat().st_size for name in list(here) if name in shards}
        for name, size in sizes.items():
            if held.get(name) != (size, shards[name]["tag"]):
                what = f"`{name}` at `{self.shown}` is no longer what was uploaded"
                raise HubError(what, hint="see who else writes there; the same command uploads it again")
        self.destination.publish(here, sizes, {*noted["replaced"], *shards})  # `--restart` may have cut other shards

    def close(self) -> None:
        with self.turn:
            self.closed = True

    def _noted(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            noted = json.loads(self.uploads.read_bytes())
            if isinstance(noted, dict):
                return noted
        return {}


def _reads_as(path: Path, read_back: str) -> bool:
    try:
        return disk_sum(path) == read_back
    except InputError:
        return False


def _header(path: Path) -> bytes:
    """The bytes of a safetensors file that come before its data."""
    with open(path, "rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), os.fstat(file.fileno()).st_size))


def _keep_header(path: Path, temporary: Path) -> None:
    """Replace `path` by a file of its size that holds only the header; at any time one of the two lies under this name."""
    remove(temporary)
    with open(temporary, "xb") as file:
        file.write(_header(path))
        file.truncate(path.stat().st_size)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def repository_of(text: str) -> Repository:
    """`owner/name[@branch]`. Raises UsageError for anything else."""
    found = REPO.fullmatch(text[len("hf://") :] if scheme_of(text) == "hf" else text)
    if found is None:
        raise UsageError(f"`--push {text}` is not a repository", hint="write `owner/name` or `owner/name@branch`")
    return Repository(HubSource(found["repo"], found["revision"]))


def push(folder: Path, hub: Repository, *, force: bool = False) -> str:
    """Publish a complete output, its card included, and return its page. One commit, so it is there as a whole or not at all.

    Files that are there already and equal stay. Raises OutputError where it is something else and `force` is not set, or where
    `folder` is no complete output; HubError where the Hub does not let it be done.
    """
    files = {path.name: member(folder, path.name) for path in folder.iterdir() if path.is_file()}
    if MANIFEST not in files or SUMS not in files:
        raise OutputError(f"`{folder.name}` is not a complete output: it has no manifest", hint="`llava-weights checksum` makes one")
    digests = {entry.path: entry.digest for entry in read_sums(files[SUMS])}
    hub.check()
    try:
        there = {name: tag for name, (_, tag) in hub.names().items()}
        same = any(digests.get(name) == tag for name, tag in there.items()) and set(there) <= set(files)
        if there and not (force or same):
            hub.refuse_occupied()
        return hub.publish(files, (), there if force else ())
    except LlavaWeightsError as error:
        error.kept = f"`{folder.name}` is complete; the same command only publishes it"
        raise


def differences(plan: Mapping[str, Any], output: Path) -> list[str]:
    """How the folder `output` differs from what `plan`, the document of a dry run, would make; empty where it is that, and whole.

    Compared are version, steps with their inputs, options, small files by digest and all files by size; and no input may be newer than
    the manifest, which was written last: headers do not show that values were edited. Raises InputError for a
    manifest that is not right, OSError where the folder can't be read.
    """
    made, files = load_object(output / MANIFEST, limit=MAX_MANIFEST), read_manifest(output / MANIFEST).files
    tool = made.get("tool")
    then = {"version": tool.get("version") if isinstance(tool, dict) else None, "steps": made.get("recipe"), "options": made.get("options")}
    found = [part for part, value in then.items() if value != plan.get(part)]
    found += [name for name, digest in plan["files"].items() if name not in files or files[name].sha256 != digest]
    for name, entry in files.items():
        path = output / name
        if not path.is_file() or path.stat().st_size != entry.size:
            found.append(f"{name} (not whole)")
    if plan["changed"] is None or plan["changed"] > (output / MANIFEST).stat().st_mtime_ns:
        found.append("an input that is newer, or can't be dated")
    return found
