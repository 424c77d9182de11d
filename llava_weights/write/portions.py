"""One output written in portions, by separate processes that know nothing of each other, as the tasks of a Slurm array: `--shards 3/16`.

Each portion writes its shards into the common `OUT.partial/out`, with a journal and a lock of its own. None publishes:
`execute(plan, out, complete=True)` does, after reading every shard again. A whole run continues what portions left, and a
portion what a whole run left.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import OutputError, UsageError
from ..events import Listener, Note, check_listener
from ..storage.atomic import output_error, remove
from .execute import ByteCounter, has_windows, keeping, note_sources, preflight, to_folder, trusted, write_shards
from .plan import Plan
from .shards import InFolder
from .work_folder import Job, lock, open_job


@dataclass(frozen=True)
class Portion:
    """One of several processes that share a job: `number`, from 1, of `count`. It writes the shards `number`, `number + count`, ..."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, plan: Plan) -> Plan:
        """`plan` with the shards of this portion only."""
        return replace(plan, shards=plan.shards[self.number - 1 :: self.count])


@dataclass(frozen=True)
class PortionReport:
    """What a portion did for the folder `out`, which is not there yet. `shards` of the portion's shards are finished, with `nbytes` bytes
    of values; `resumed` of them were finished before.
    """

    out: Path
    portion: Portion
    shards: int
    nbytes: int
    resumed: int


def to_portion(text: str) -> Portion:
    """The portion that `text` names: "3/16" is the third of sixteen, counted from 1. Raises UsageError for anything else."""
    found = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text) if isinstance(text, str) else None
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"`--shards {text}` is not a portion", hint="write it as 3/16: the third of sixteen, counted from 1")
    return Portion(int(found[1]), int(found[2]))


def execute_portion(
    plan: Plan, out: str | os.PathLike[str], portion: Portion, *, force: bool = False, on_event: Listener = lambda event: None
) -> PortionReport:
    """Write the shards of one `portion` of `plan` into the work folder beside `out`, which is not made: `execute(plan, out, complete=True)`
    does that, once every portion is written. A portion that was interrupted continues.

    Any number of portions may run at once, on any machines that share the file system, in any order. `force` says that `out` may exist: the
    end of the job replaces it. `on_event` is called with each Event, such as a ProgressBar.

    Raises UsageError for an argument of another kind, OutputError where a whole run or another process with the same portion is at work,
    where the earlier work is another plan's, or where nothing can be written; InputError where an input turns out damaged; HubError where
    one can't be read over the network; Interrupted on Ctrl-C.
    """
    check_listener(on_event)
    if not isinstance(plan, Plan) or not isinstance(portion, Portion):
        raise UsageError("a portion is made of a plan", hint="give what `make_plan` and `to_portion` return")
    target, own = to_folder(out), portion.of(plan)
    preflight(plan, target, force=force)
    try:
        with open_job(target, shared=True) as job, _held(job, portion):
            if not job.locked:
                on_event(Note(f"there are no locks where `{job.partial.name}` lies: start no portion twice", warning=True))
            _begin(job, plan)
            if job.published:
                raise OutputError(f"`{target.name}` is complete, only not cleaned up", hint="the same command with `--finish` does that")
            shards = InFolder(job.folder)
            results = dict(trusted(job, own, shards))
            _sweep(job, own, set(results))
            resumed = len(results)
            with keeping(own, job, results):
                write_shards(own, job, shards, None, results, ByteCounter(results, on_event))
            return PortionReport(target, portion, len(results), sum(result.nbytes for result in results.values()), resumed)
    except OSError as error:
        raise output_error(error, target) from error


@contextmanager
def _held(job: Job, portion: Portion) -> Iterator[None]:
    """The portion's own lock, and its journal."""
    name = f"{portion.number:05d}-of-{portion.count:05d}"
    job.journal = job.partial / f"journal-{name}"
    fd = _open(job.partial / f"lock-{name}")
    try:
        try:
            lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "wait for it to end; each portion is run by one process"
            raise OutputError(f"portion {portion} of `{job.out.name}` is being written by another process", hint=hint) from error
        yield
    finally:
        os.close(fd)


def _begin(job: Job, plan: Plan) -> None:
    """One at a time: the first of them makes plan.json, the others compare their plan with it."""
    fd = _open(job.partial / "lock-begin")
    try:
        lock(fd, fcntl.LOCK_EX)
        job.begin(plan.identity, restart=False)
        if not job.sources.exists():
            note_sources(plan, job, fresh=not (job.finished() or has_windows(job)))
    except OutputError as error:
        error.hint = f"repeat the earlier inputs and options, or delete `{job.partial.name}`"
        raise
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def _sweep(job: Job, own: Plan, finished: set[str]) -> None:
    """Delete what killed processes left of this portion's shards. The rest may belong to a portion that is at work."""
    for name in os.listdir(job.folder):
        whole = re.sub(r"^\.|\.[0-9a-f]{8}\.part$", "", name)
        if whole in {shard.name for shard in own.shards} - finished or (whole != name and whole in finished):
            remove(job.folder / name)
