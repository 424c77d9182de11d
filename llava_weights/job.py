"""The folder of work in progress: `OUT.partial/` beside OUT, with a lock, the plan's identity, a journal, and the coming OUT.

    OUT.partial/lock        held by the running process (flock); its death frees it
    OUT.partial/plan.json   what this work is; other work is refused
    OUT.partial/journal     one line a finished shard, each with its own checksum; a torn last line is ignored
    OUT.partial/out/        becomes OUT in one rename, when it is complete

Order on disk: data fsynced before its rename, the folder fsynced after, then the journal line. Leaving one of them out broke a
simulated power cut (facts: verify 4.3).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import OutputError


def partial_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


class Job:
    """One output's work in progress, locked by this process. Made by `open_job`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.partial = partial_folder(out)
        self.folder = self.partial / "out"
        self.journal = self.partial / "journal"

    def begin(self, identity: Mapping[str, str], *, restart: bool) -> None:
        """Take up earlier work on the same plan, or start anew. Raises OutputError where the earlier work is another's."""
        recorded = self.partial / "plan.json"
        if restart:
            for path in (self.folder, recorded, self.journal):
                remove(path)
        earlier = _read_json(recorded)
        if earlier is None:  # no shard can be finished yet
            remove(self.folder)
            remove(self.journal)
            self.folder.mkdir()  # before plan.json, so that a plan without a folder means: it was published
            write_file(recorded, json.dumps(dict(identity), indent=2).encode())
        elif earlier != dict(identity):
            raise self._belongs_to_another(earlier, identity)

    def _belongs_to_another(self, then: Mapping[str, str], now: Mapping[str, str]) -> OutputError:
        facts: dict[str, str] = {}
        for part in sorted(set(then) | set(now)):
            if then.get(part) != now.get(part):
                facts[f"{part}, then"], facts[f"{part}, now"] = _differing(then.get(part, ""), now.get(part, ""))
        return OutputError(
            f"the partial work in `{self.partial.name}` belongs to another command, or an input changed since",
            facts=facts,
            hint="repeat the earlier inputs and options to continue, or pass `--restart` to begin again",
        )

    @property
    def published(self) -> bool:
        """OUT got its name, and the run died before it cleaned up."""
        return not self.folder.exists() and (self.partial / "plan.json").exists()

    def finished(self) -> dict[str, dict[str, Any]]:
        """Journal entries by shard name, those whose line is whole."""
        entries = {}
        for line in self.journal.read_bytes().splitlines() if self.journal.exists() else ():
            check, _, text = line.partition(b" ")
            if hashlib.sha256(text).hexdigest()[:16].encode() != check:
                break
            entry = json.loads(text)
            entries[entry["name"]] = entry
        return entries

    def record(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the journal anew: whole lines only, durable when this returns."""
        lines = []
        for entry in entries.values():
            text = json.dumps(entry, sort_keys=True).encode()
            lines.append(hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n")
        write_file(self.journal, b"".join(lines))

    def publish(self) -> None:
        """Give the complete folder its name. An OUT that was there (`--force`) is moved aside before and deleted after."""
        sync_folder(self.folder)
        aside = self.partial / "replaced"
        if self.out.exists() and any(self.out.iterdir()):
            os.rename(self.out, aside)
        os.rename(self.folder, self.out)
        sync_folder(self.out.parent)
        self.clean()

    def clean(self) -> None:
        """Delete the work folder, the bulk first. Without plan.json it says nothing any more; the lock goes last."""
        order = {"replaced": 0, "plan.json": 1, "lock": 3}
        for path in sorted(self.partial.iterdir(), key=lambda path: order.get(path.name, 2)):
            remove(path)
        self.partial.rmdir()
        sync_folder(self.out.parent)


@contextmanager
def open_job(out: Path) -> Iterator[Job]:
    """The locked work folder of `out`. Raises OutputError where another run holds it or it can't be made."""
    job = Job(out)
    while True:
        job.partial.mkdir(parents=True, exist_ok=True)
        fd = os.open(job.partial / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(fd, 32).decode(errors="replace").strip()
            os.close(fd)
            raise OutputError(
                f"`{out.name}` is in use by another run",
                facts={"process": holder or "unknown", "work folder": job.partial},
                hint="wait for it to end, or choose another `-o`",
            ) from error
        if _is_still(fd, job.partial / "lock"):
            break
        os.close(fd)  # the run before us finished and deleted the folder between our open and our lock
    try:
        os.truncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield job
    finally:
        os.close(fd)


def _is_still(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.part")
    put_file(temporary, data)
    os.rename(temporary, path)
    sync_folder(path.parent)


def put_file(path: Path, data: bytes) -> None:
    """Write `data` where nobody looks yet, and fsync it; its name is durable when the folder is."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is not, before this."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Delete a file or a tree of ours; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _differing(then: str, now: str) -> tuple[str, str]:
    """The lines that only one of two texts has: of a list of a hundred inputs, the one that changed."""
    before, after = then.splitlines(), now.splitlines()
    return "; ".join(line for line in before if line not in after) or "-", "; ".join(line for line in after if line not in before) or "-"
