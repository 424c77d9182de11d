"""Outputs that go over the network: the work folder of one, and publishing a folder that is complete.

`NAME.partial/uploads` says which destination this work has, and what the destination held before.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoint.manifest import MANIFEST, MAX_MANIFEST, SUMS, read_manifest, read_sums
from ..errors import HubError, LlavaWeightsError, OutputError, UsageError
from ..events import Listener, Note
from ..formats.folder import member
from ..storage.atomic import write_file
from ..storage.hub import REPO, HubSource
from ..storage.strict_json import load_object
from ..text import scheme_of
from .destinations import Bucket, Repository, is_address, open_destination
from .plan import Shard
from .shard import is_integer
from .shards import InBucket, InFolder, InRepository, Shards
from .work_folder import Job


def job_at(output: str, *, reread: bool = True, on_event: Listener = lambda event: None) -> tuple[Path, Callable[[Path], Job]]:
    """The folder and the kind of job that `execute` needs for `output`, a path or an address. For an address, the work folder
    is made in the current folder. Raises UsageError where nothing can be written to such an address."""
    if not is_address(output):
        return Path(os.path.abspath(output)), Job
    destination = open_destination(output)
    return Path.cwd() / destination.address.rpartition("/")[2], lambda out: UploadJob(out, destination, reread, on_event)


class UploadJob(Job):
    """Work in progress whose output goes over the network."""

    def __init__(self, out: Path, destination: Bucket | Repository, reread: bool, on_event: Listener) -> None:
        super().__init__(out)
        self.remote = True
        self.destination, self.reread, self.on_event = destination, reread, on_event
        self.uploads = self.partial / "uploads"
        self.earlier: set[str] = set()  # shards of the work that `--restart` gave up

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
        sent = sum(bool(entry.get("tag")) for entry in self.finished().values())
        return f"{sent} of them are uploaded; `{self.shown}` is not complete and has no manifest"

    def restore(self) -> None:
        """Nothing: what lies under the output's local name belongs to the user."""

    def begin(self, identity: Mapping[str, str], *, restart: bool) -> None:
        self.earlier = set(self.finished()) if restart else set()
        super().begin({**identity, "destination": self.shown}, restart=restart)

    def open(self) -> Shards:
        """Prepare the destination: from here on, what it holds belongs to this work."""
        noted = self._noted()
        if noted.get("destination") != self.shown:
            noted = {"destination": self.shown, "replaced": sorted(self.destination.names())}
        noted["replaced"] = sorted({*noted["replaced"], *self.earlier})
        self.destination.begin(hashlib.sha256(self.recorded.read_bytes()).hexdigest()[:12])
        if self.destination.made:
            self.on_event(Note(f"`{self.shown}` is {self.destination.made}"))
        write_file(self.uploads, json.dumps(noted).encode())
        if isinstance(self.destination, Repository):
            return InRepository(self.folder, self.destination, reread=self.reread)
        return InBucket(self.folder, self.destination)

    def publish(self, *, force: bool) -> None:
        shards, held = self.finished(), self.destination.held()
        for name, entry in shards.items():
            if held.get(name) != (entry["nbytes"], entry["tag"]):
                what = f"`{name}` at `{self.shown}` is no longer what was uploaded"
                raise HubError(what, hint="see who else writes there; the same command uploads it again")
        here = {path.name: path for path in self.folder.iterdir()}
        self.destination.publish(here, shards, {*self._noted()["replaced"], *shards})

    def _noted(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            noted = json.loads(self.uploads.read_bytes())
            if isinstance(noted, dict) and isinstance(noted.get("replaced"), list):
                return noted
        return {}


def shards_of(job: Job) -> Shards:
    """Where the shards of a job go. Asks the network where they go there."""
    return job.open() if isinstance(job, UploadJob) else InFolder(job.folder)


def room_for(job: Job, shards: Sequence[Shard]) -> int:
    """Bytes of these shards that lie on this machine at one time."""
    if not isinstance(job, UploadJob):
        return sum(shard.nbytes for shard in shards)
    here = shards if isinstance(job.destination, Repository) else [shard for shard in shards if is_integer(shard)]
    return max((shard.nbytes for shard in here), default=0)


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
