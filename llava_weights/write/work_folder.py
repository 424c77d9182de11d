"""The folder of work in progress: `OUT.partial/` beside OUT, with a lock, the plan's identity, a journal, and the coming OUT.

    OUT.partial/.llava-weights-work   marks a work folder, which may be deleted; a folder without it is somebody else's
    OUT.partial/lock        held by the running process (flock); its death frees it
    OUT.partial/plan.json   what this work is; other work is refused
    OUT.partial/journal     one line for each finished shard, with a checksum; a torn last line is ignored
    OUT.partial/sources     inode and change time of each input when the first shard was begun
    OUT.partial/out/.NAME.part, .NAME.windows   a shard that is not finished, and which windows of it are (windows_kept.py)
    OUT.partial/journal-00003-of-00016, lock-00003-of-00016   the same of one portion; portions share `lock`, whole runs hold it alone
    OUT.partial/out/        becomes OUT in one rename, when it is complete

Order on disk: data is fsynced before its rename, the folder after it, then comes the journal line. Without one of these fsyncs,
simulated power cuts leave broken states (docs/reliability.md).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..storage.atomic import NOT_SUPPORTED, make_folder, naming, put_file, remove, sync_folder, write_file
from ..storage.reading import unreadable

MARKER = ".llava-weights-work"
MARK = b"Work in progress of `llava-weights`, which deletes this folder when the output beside it is complete.\n"
MOST_ON_PATH = 10_000  # files and folders; the kernel itself follows 40 links
WORK_FORMAT = "3"  # of the work folder, in plan.json; 0.1.0 wrote none
KNOWN_NAMES = re.compile(
    r"\.{0,2}(lock(-begin|-\d{5}-of-\d{5})?|plan\.json|journal(-\d{5}-of-\d{5})?|uploads|sources|out|replaced|llava-weights-work)(\.[0-9a-f]{8})?(\.part)?"
)

JOURNAL = re.compile(r"journal(-\d{5}-of-(?P<count>\d{5}))?")


def partial_folder(out: Path) -> Path:
    """Where the work for `out` is done. Raises OutputError for a folder that nothing can lie beside, as `/`."""
    if not out.name:
        raise OutputError(f"`{out}` can't be an output: it is no folder that could get its name at the end", hint="choose another `-o`")
    return out.with_name(out.name + ".partial")


class Job:
    """One output's work in progress, locked by this process. Made by `open_job`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.partial = partial_folder(out)
        self.folder = self.partial / "out"
        self.recorded = self.partial / "plan.json"
        self.journal = self.partial / "journal"
        self.aside = self.partial / "replaced"
        self.sources = self.partial / "sources"
        self.locked = True  # False on a file system without locks
        self.remote = False  # True where the output goes over the network: upload.py

    @property
    def shown(self) -> str:
        """Where the output will be."""
        return str(self.out)

    @property
    def places(self) -> tuple[Path, ...]:
        """The folders in which this work writes, and whose content it may delete."""
        return (self.partial,) if self.remote else (self.out, self.partial)

    @property
    def remains(self) -> str:
        """What became of the output, as the end of a sentence about shards that are kept."""
        return f"`{self.out.name}` was not touched"

    def begin(self, identity: Mapping[str, str], *, restart: bool) -> None:
        """Take up earlier work on the same plan, or start anew. Raises OutputError where the earlier work is another's."""
        identity = {"format": WORK_FORMAT, **identity}
        earlier = None if restart else _read_plan(self.recorded)
        if earlier is None:  # no shard can be finished yet
            self._forget()
            for path in (self.folder, self.sources, *self._journals()):
                remove(path)
            self.folder.mkdir()
            sync_folder(self.partial)  # before plan.json, so that a plan without a folder means: it was published
            write_file(self.recorded, json.dumps(identity, indent=2).encode())
        elif earlier != identity:
            raise self._belongs_to_another(earlier, identity)
        elif self.folder.is_symlink() or not (self.folder.is_dir() or self.published):  # somebody moved it away
            self.begin(identity, restart=True)

    def begun(self, identity: Mapping[str, str]) -> bool:
        """Whether earlier work on the same plan lies there, without taking it up. Raises OutputError where it is another's."""
        earlier = _read_plan(self.recorded)
        if earlier is not None and earlier != {"format": WORK_FORMAT, **identity}:
            raise self._belongs_to_another(earlier, {"format": WORK_FORMAT, **identity})
        return earlier is not None

    def _belongs_to_another(self, then: Mapping[str, str], now: Mapping[str, str]) -> OutputError:
        version, current = then.get("version", "unknown"), now.get("version", "unknown")
        if (then.get("format"), version) != (now.get("format"), current):
            what = f"the partial work in `{self.partial.name}` was begun by another version of llava-weights"
            facts = {"version, then": version, "version, now": current}
            if then.get("format") != now.get("format"):
                facts |= {"form of the work folder, then": then.get("format", "1"), "form of the work folder, now": now.get("format", "1")}
            return OutputError(what, facts=facts, hint="pass `--restart` to begin again, or finish it with the version that began it")
        facts = {}
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
        """OUT has its name and the run died before it cleaned up; or somebody deleted `out/`. Only the bytes of OUT tell which."""
        return self.recorded.exists() and not os.path.lexists(self.folder) and self.occupied

    @property
    def occupied(self) -> bool:
        """OUT holds something."""
        return self.out.is_dir() and any(self.out.iterdir())

    def restore(self) -> None:
        """Bring back the OUT that a run with `--force` moved aside, where it died before the new one had the name."""
        if self.aside.is_dir() and not self.aside.is_symlink() and not self.occupied:
            os.rename(self.aside, self.out)
            sync_folder(self.out.parent)

    def finished(self) -> dict[str, dict[str, Any]]:
        """Journal entries by shard name, those whose line is whole."""
        entries = {}
        for journal in self._journals():
            for line in journal.read_bytes().splitlines():
                entry = _entry(line)
                if entry is None:
                    break
                entries[entry["name"]] = entry
        return entries

    def _journals(self) -> list[Path]:
        return sorted(path for path in self.partial.iterdir() if JOURNAL.fullmatch(path.name))

    def portions(self) -> int | None:
        """Into how many portions the work was cut, where all that were begun agree."""
        counts = {found["count"] for path in self._journals() if (found := JOURNAL.fullmatch(path.name)) and found["count"]}
        return int(counts.pop()) if len(counts) == 1 else None

    def record(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the journal anew: whole lines only, durable when this returns."""
        write_file(self.journal, b"".join(map(_line, entries.values())))

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the journal that `record` wrote, durable when this returns: its cost does not grow with the journal."""
        with naming(self.journal), open(self.journal, "ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())

    def noted_sources(self) -> dict[str, list[int]]:
        """The state of each input of which all finished shards were made, by a digest of its path, as far as it is known."""
        with naming(self.sources):
            found = _json(self.sources.read_bytes()) if self.sources.exists() else None
        return found if isinstance(found, dict) else {}

    def note_sources(self, states: Mapping[str, list[int]]) -> None:
        write_file(self.sources, json.dumps(states).encode())

    def publish(self, *, force: bool) -> None:
        """Give the complete folder its name. With `force`, an OUT that was there is moved aside before, and deleted by `clean`."""
        sync_folder(self.folder)
        if force and self.occupied:
            remove(self.aside)  # of a run that was killed while it deleted this
            self._move_aside()
        os.rename(self.folder, self.out)
        sync_folder(self.out.parent)

    def _move_aside(self) -> None:
        try:
            os.rename(self.out, self.aside)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            what = f"`{self.out.name}` can't be moved out of the way: {error.strerror}"
            hint = "delete it (a folder of a container's image can't be moved); the same command then only gives the new one its name"
            raise OutputError(what, facts={"output": self.out}, hint=hint) from error

    def clean(self) -> None:
        """Delete the work folder, the bulk first and the marker last. Files that no run wrote stay."""
        remove(self.aside)
        self._forget()
        for path in self.partial.iterdir():
            if path.name not in ("lock", MARKER) and KNOWN_NAMES.fullmatch(path.name):
                remove(path)
        sync_folder(self.partial)
        remove(self.partial / MARKER)
        remove(self.partial / "lock")
        with suppress(OSError):  # NFS keeps a name for the lock until it is closed, then `open_job` does this
            self.partial.rmdir()
        sync_folder(self.out.parent)

    def _forget(self) -> None:
        """Delete plan.json, without which nothing else here counts: first and durably: later changes may reach the disk in any order."""
        if os.path.lexists(self.recorded):
            remove(self.recorded)
            sync_folder(self.partial)


@contextmanager
def open_job(out: Path, make_job: Callable[[Path], Job] = Job, *, shared: bool = False) -> Iterator[Job]:
    """The locked work folder of `out`; `shared` with processes that ask the same. Raises OutputError where another run holds it or it
    can't be made."""
    job = make_job(out)
    while True:
        fd = _open_lock(job.partial)
        if fd is None:
            continue
        try:
            with naming(job.partial / "lock"):
                job.locked = lock(fd, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
                current = is_still(fd, job.partial / "lock")
        except BlockingIOError as error:
            holder = os.read(fd, 32).decode(errors="replace").strip()
            os.close(fd)
            what, facts = f"`{out.name}` is in use by another run", {"process": holder or "unknown", "work folder": job.partial}
            raise OutputError(what, facts=facts, hint="wait for it to end, or choose another `-o`") from error
        except OSError:
            os.close(fd)
            raise
        if current:
            break
        os.close(fd)  # another run finished and deleted the folder after this file was opened and before it was locked
    try:
        _mark(job.partial)
        with naming(job.partial / "lock"):
            os.truncate(fd, 0)
            os.pwrite(fd, b"portions\n" if shared else f"{os.getpid()}\n".encode(), 0)
        sync_folder(job.partial)
        if not shared:
            job.restore()
        yield job
    finally:
        os.close(fd)
        with suppress(OSError):  # unless it is empty, it stays
            job.partial.rmdir()


def _open_lock(partial: Path) -> int | None:
    """The lock file; None where another run deleted the folder meanwhile. Raises OutputError where it is no work folder."""
    make_folder(partial)
    with suppress(FileNotFoundError):
        check_work_folder(partial)
        return os.open(partial / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    return None


def check_work_folder(partial: Path) -> None:
    """Raise OutputError where `partial` exists and is neither a work folder nor empty: what lies in it would be deleted."""
    if os.path.lexists(partial) and (partial.is_symlink() or not partial.is_dir() or not _is_work_folder(partial)):
        hint = "move it away, or choose another `-o`"
        raise OutputError(f"`{partial.name}` exists and is not the work of an earlier run", facts={"folder": partial}, hint=hint)


def _is_work_folder(partial: Path) -> bool:
    names = set(os.listdir(partial))
    if MARKER in names:
        return _small_file(partial / MARKER) == MARK
    known = {name for name in names if name == "lock" or name.startswith(f".{MARKER}.")}
    if "lock" in known:  # of a run that died before it marked the folder, or of 0.1.0: a process id, or "portions"
        written = _small_file(partial / "lock")
        if written is None or not re.fullmatch(rb"[\d\n\0]*|[portions\n\0]*", written):  # a power cut leaves a part, or zeros
            return False
    return known == names or ("lock" in known and {"version", "tensors"} <= (_read_plan(partial / "plan.json") or {}).keys())


def _small_file(path: Path) -> bytes | None:
    """The bytes of a small regular file; None for anything else."""
    status = path.lstat()
    return path.read_bytes() if stat.S_ISREG(status.st_mode) and status.st_size <= 1000 else None


def _mark(partial: Path) -> None:
    """Mark the folder, durably and before anything else lies in it. The temporary name is unique: portions may begin at once."""
    if not (partial / MARKER).exists():
        temporary = partial / f".{MARKER}.{secrets.token_hex(4)}.part"
        put_file(temporary, MARK)
        os.rename(temporary, partial / MARKER)


def lock(fd: int, kind: int) -> bool:
    """Take a lock of flock's `kind`; False where the file system has none. Raises BlockingIOError where another process holds it."""
    try:
        fcntl.flock(fd, kind)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        return False
    return True


def is_still(fd: int, path: Path) -> bool:
    """Whether `path` still names the file that is open as `fd`."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def meets(place: Path, sources: Iterable[Path]) -> Path | None:
    """The first of `sources` that lies in the folder `place`, or whose path leads through it; None where there is none.

    Files and folders are compared by identity, however they are spelled: through links, `..`, mounts, or in another case. Hard links
    don't count: what is deleted or replaced under one name is still there under the other.
    """
    inside = {_itself(place)} if os.path.lexists(place) else set()
    for folder, folders, files in os.walk(place):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):  # of another run's work
                status = os.lstat(os.path.join(folder, name))
                if stat.S_ISDIR(status.st_mode) or status.st_nlink == 1:
                    inside.add((status.st_dev, status.st_ino))
    return next((source for source in sources if not inside.isdisjoint(_trace(source))), None)


def _trace(source: Path) -> set[tuple[int, int]]:
    """What the path of an input leads through. Raises InputError where the disk refuses to say."""
    try:
        return {*map(_itself, _on_path(source))}
    except OSError as error:
        raise unreadable(source, error) from error


def lies_in(place: Path, folder: Path) -> bool:
    """Whether `place`, which need not exist, lies in the input `folder` or is it; not in a file. Raises InputError where that can't be
    read."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise unreadable(folder, error) from error
    return stat.S_ISDIR(status.st_mode) and any((status.st_dev, status.st_ino) == _itself(part) for part in _on_path(place))


def _on_path(path: Path) -> set[Path]:
    """`path`, every folder above it, and the same of what the links among them lead to; those that exist."""
    found, waiting = set[Path](), [path.absolute()]
    while waiting and len(found) < MOST_ON_PATH:
        place = waiting.pop()
        for part in (place, *place.parents):
            if part not in found and os.path.lexists(part):
                found.add(part)
                if part.is_symlink():
                    waiting.append(part.parent / os.readlink(part) / place.relative_to(part))
    return found


def _itself(path: Path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def mount_of(folder: Path) -> object:
    """Which mount `folder` lies on: names can be moved within one, not from one to another. Two may be of one file system."""
    fd = os.open(folder, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # only Linux has it
            lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
            return next((line for line in lines if line.startswith("mnt_id:")), os.fstat(fd).st_dev)
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry, sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n"


def _entry(line: bytes) -> dict[str, Any] | None:
    """What a line of the journal says; None for one that is torn, or that no run wrote."""
    check, _, text = line.partition(b" ")
    if hashlib.sha256(text).hexdigest()[:16].encode() != check:
        return None
    entry = _json(text)
    return entry if isinstance(entry, dict) and isinstance(entry.get("name"), str) else None


def _read_plan(path: Path) -> dict[str, str] | None:
    """The identity in plan.json; None where there is none, or that no run wrote."""
    found = _json(path.read_bytes()) if path.exists() else None
    return found if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()) else None


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _differing(then: str, now: str) -> tuple[str, str]:
    """The lines that only one of two texts has: of a list of a hundred inputs, the one that changed."""
    before, after = then.splitlines(), now.splitlines()
    return "; ".join(line for line in before if line not in after) or "-", "; ".join(line for line in after if line not in before) or "-"
