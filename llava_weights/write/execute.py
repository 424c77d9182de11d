"""Carry out a plan: preflight, shards one after another (or on a pool), small files, manifest, and the rename that publishes."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import to_place
from ..checkpoint.manifest import MANIFEST, SUMS, FileEntry, TensorEntry, make_manifest, make_sums, root_of_tensors
from ..checkpoint.rehash import digest_file
from ..checkpoint.small_files import small_bytes
from ..errors import InputError, Interrupted, LlavaWeightsError, OutputError, UsageError, shortage
from ..events import Listener, Note, Progress, ReadingBack, ShardDone, Started, check_listener
from ..formats.folder import same_header
from ..formats.gguf import index_gguf
from ..formats.safetensors import index_safetensors
from ..storage.atomic import output_error, put_file, remove, sync_folder
from ..storage.places import Place
from ..storage.reading import DropBehind, SourceFile
from ..storage.strict_json import json_bytes
from ..storage.threads import Brake, Shield, interruption
from ..tensors.dtypes import one_thread
from ..tensors.windows import MiB
from ..text import is_text, listed, shards, shown, size
from .card import make_card
from .destinations import is_address
from .executors import completed
from .plan import LARGEST_SMALL_FILE, Plan, Shard, accepted
from .read_back import ReadBack
from .shard import ShardResult, write_shard
from .shards import InFolder, Shards
from .upload import room_for, shards_of
from .windows_kept import shard_of
from .work_folder import Job, check_work_folder, lies_in, meets, mount_of, open_job

ANOTHER_PLACE = "choose another `-o`: a folder below it will do"


@dataclass(frozen=True)
class Report:
    """What a finished run did. `out` is the folder that was made, of `shards` weight files with `nbytes` bytes of values; `resumed` of the
    shards were finished by an earlier run. `root` is the digest of all tensors (their names, dtypes, shapes and values), the same however
    they are cut into files, with the name of its algorithm: "blake3:...". `tallies` counts what was measured on the way, such as values
    that a delta does not give back.
    """

    out: Path
    shards: int
    nbytes: int
    resumed: int
    root: str
    tallies: Mapping[str, int]


def execute(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    pool: Executor | None = None,
    force: bool = False,
    restart: bool = False,
    reread: bool = True,
    complete: bool = False,
    on_event: Listener = lambda event: None,
) -> Report:
    """Carry out `plan`: write the folder `out`, which appears whole or not at all. A run that was interrupted continues.

    `pool` is any `concurrent.futures.Executor` whose workers see the same file system; by default threads of this process write. `force`
    replaces a folder that is there, once the new one is whole. `restart` begins again in place of continuing. `reread` reads every shard
    back from the disk before `out` gets its name. `complete` ends a job that `execute_portion` did: it writes no shard. `on_event` is
    called with each Event, such as a ProgressBar.

    Raises UsageError for an argument of another kind, OutputError where `out` can't be written, is in use, is another run's work, or does
    not come back as it was written, and with `complete` where shards are missing (it names the portions); InputError where an input turns
    out damaged or changes meanwhile; HubError where one can't be read over the network; Interrupted on Ctrl-C. Finished shards are kept,
    and `kept` of the error says what lies on the disk.
    """
    return run_plan(plan, out, pool=pool, force=force, restart=restart, reread=reread, complete=complete, on_event=on_event)


def run_plan(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    pool: Executor | None = None,
    force: bool = False,
    restart: bool = False,
    reread: bool = True,
    complete: bool = False,
    make_job: Callable[[Path], Job] = Job,
    on_event: Listener = lambda event: None,
) -> Report:
    """As `execute`. `make_job` says where the shards go, such as to an address (`upload.job_at`)."""
    check_listener(on_event)
    if not isinstance(plan, Plan):
        raise UsageError(f"the plan is of the type `{type(plan).__name__}`", hint="give what `make_plan` returns")
    if pool is not None and not isinstance(pool, Executor):
        raise UsageError(
            f"the pool is of the type `{type(pool).__name__}`, no `concurrent.futures.Executor`", hint="pass one, or leave it out"
        )
    target = to_folder(out)
    preflight(plan, target, force=force, make_job=make_job)
    try:
        with open_job(target, make_job) as job:
            loaded = {name: small_bytes(name, data, LARGEST_SMALL_FILE) for name, data in plan.files.items()}  # one reading, one state
            return _run(replace(plan, files=loaded), job, pool, force, restart, reread, complete, on_event)
    except OSError as error:
        raise output_error(error, target) from error


def _run(
    plan: Plan, job: Job, pool: Executor | None, force: bool, restart: bool, reread: bool, complete: bool, on_event: Listener
) -> Report:
    if not job.locked:
        on_event(Note(f"there are no locks where `{job.partial.name}` lies: start no second run with this output", warning=True))
    job.begin(plan.identity, restart=restart)
    if job.published:
        results = dict(trusted(job, plan, InFolder(job.out)))
        if len(results) == len(plan.shards):
            report = _report(plan, job, results, len(results), tensor_entries(job.out, results))
            _clean(job, on_event)
            return report
        job.begin(plan.identity, restart=True)
    _check_free(job, force)
    shards = shards_of(job)
    try:
        results = dict(trusted(job, plan, shards, again=reread and not job.remote, on_event=on_event))
    except KeyboardInterrupt as error:
        raise Interrupted.of(error, f"What an earlier run finished is kept in `{job.partial.name}`; {job.remains}") from error
    if complete and len(results) < len(plan.shards):
        raise _incomplete(plan, job, results)
    unfinished = {shard.name for shard in plan.shards} - set(results)
    _sweep(job, results, unfinished)
    resumed = len(results)
    with keeping(plan, job, results):
        note_sources(plan, job, fresh=not (results or has_windows(job)))
        counter = ByteCounter(results, on_event)
        with ReadBack(job.folder, results, pool, counter.read_back, plan.settings.in_flight) as reader:
            write_shards(plan, job, shards, pool, results, counter, reader if reread and not job.remote else None)
            _check_sources(plan, job, pool, results, on_event)
            if left := reader.left:
                on_event(ReadingBack(left))
            reader.finish()
        _sweep(job, results)  # of workers that died
        tensors = finish(plan, job, shards, results)
        report = _report(plan, job, results, resumed, tensors)
        job.publish(force=force)
    _clean(job, on_event)
    return report


def note_sources(plan: Plan, job: Job, *, fresh: bool) -> None:
    """Note the state that the inputs had when they were indexed, unless there are finished shards (`fresh`) of an earlier state."""
    if fresh or not job.sources.exists():
        known = {} if not fresh else {_key(file): file.state for file in _local_sources(plan)}
        job.note_sources(known)


def _key(file: SourceFile) -> str:
    """A digest of the path: a folder's name may hold a token."""
    return hashlib.sha256(os.fsencode(file.path)).hexdigest()


def _local_sources(plan: Plan) -> set[SourceFile]:
    files = {leaf.file for shard in plan.shards for _, tensor in shard.tensors for leaf in tensor.leaves()}
    return {file for file in files if not file.remote}


def _check_sources(plan: Plan, job: Job, pool: Executor | None, results: dict[str, ShardResult], on_event: Listener) -> None:
    """Raise InputError where an input holds other bytes than when the first shards were made of it, though its size and time are the same.

    A file that was replaced or edited since has another inode or change time; so has one that was only linked or renamed, or lies on some
    network file systems. So the shards that read it are made once more, without being written: only other bytes count. Shards that
    come out with other bytes are deleted.
    """
    noted, now = job.noted_sources(), {file: SourceFile.at(Path(file.path)).state for file in _local_sources(plan)}
    moved = {file for file, state in now.items() if noted.get(_key(file)) != state}
    if not moved:
        return
    on_event(Note(f"{listed(sorted(file.name for file in moved))}: touched since this work began, so what was read is read again"))
    shards = [shard for shard in plan.shards if any(leaf.file in moved for _, tensor in shard.tensors for leaf in tensor.leaves())]
    alone = replace(plan.settings, in_flight=1)
    calls = [partial(write_shard, shard, job.folder, alone, keep=False) for shard in shards]
    with Shield():
        again = completed(pool, calls) if pool is not None else (call() for call in calls)
        found = {result.name: result.sha256 for result in again}
    wrong = [shard.name for shard in shards if found[shard.name] != results[shard.name].sha256]
    for name in wrong:  # whichever journal names it
        del results[name]
        remove(job.folder / name)
    sync_folder(job.folder)
    if wrong and job.remote:  # where the shard itself is not deleted
        job.record({name: asdict(result) for name, result in results.items()})
    same = all(map(same_header, moved))
    if same:  # what is kept now was made of this state
        job.note_sources({_key(file): state for file, state in now.items()})
    if wrong or not same:
        names = sorted(file.name for file in moved)
        facts = {"file": ", ".join(sorted(file.path for file in moved)), "shards that other bytes went into": ", ".join(wrong) or "unknown"}
        hint = "wait until nothing writes to the inputs, then run the same command again" + ("" if same else " with `--restart`")
        raise InputError(f"{listed(names)} changed while it was being read, in size and time the same", facts=facts, hint=hint)


def _sweep(job: Job, results: Mapping[str, ShardResult], unfinished: Collection[str] = ()) -> None:
    """Delete what is no finished shard, nor the windows of an unfinished one."""
    for stray in set(os.listdir(job.folder)) - set(results):
        path = job.folder / stray
        if shard_of(stray) not in unfinished or path.is_symlink() or not path.is_file():
            remove(path)


def has_windows(job: Job) -> bool:
    """Whether windows of an unfinished shard are kept."""
    return any(shard_of(name) for name in os.listdir(job.folder))


def _incomplete(plan: Plan, job: Job, results: Mapping[str, ShardResult]) -> OutputError:
    left = [index for index, shard in enumerate(plan.shards) if shard.name not in results]
    facts, hint = {"missing": ", ".join(plan.shards[index].name for index in left)}, "the same command without `--finish` writes them here"
    if count := job.portions():
        facts["portions"] = ", ".join(f"{number + 1}/{count}" for number in sorted({index % count for index in left}))
        hint = "run these portions again with `--shards`, then `--finish`; or write them here with the same command without `--finish`"
    error = OutputError(f"{len(left)} of {len(plan.shards)} shards are missing or damaged", facts=facts, hint=hint)
    error.kept = kept(job, len(results), len(plan.shards))
    return error


def write_shards(
    plan: Plan,
    job: Job,
    shards: Shards,
    pool: Executor | None,
    results: dict[str, ShardResult],
    counter: ByteCounter,
    reader: ReadBack | None = None,
) -> None:
    """Write the shards of `plan` that `results` lacks, each with its journal line as it is finished. `reader` reads them back, large
    ones while they are made; those of an earlier run were read when this one began. Raises OutputError as `ReadBack.check`.
    """
    on_event = counter.on_event
    again = sum(shard.nbytes for shard in plan.shards if shard.name not in results) if reader else 0
    on_event(Started(len(plan.shards), plan.nbytes, len(results), counter.nbytes, to_read_back=again))
    job.record({name: asdict(result) for name, result in results.items()})  # without a torn line, and what is not trusted
    indices = {shard.name: index for index, shard in enumerate(plan.shards, 1)}

    def keep(result: ShardResult) -> None:
        results[result.name] = result  # from here on it is kept
        if (kept_now := shards.keep(result)) != result:
            job.append(asdict(kept_now))
            results[result.name] = kept_now

    with Shield(), closing(_write(plan, shards, pool, dict(results), counter, reader)) as written:
        for result in list(results.values()):
            keep(result)
        for result in written:
            job.append(asdict(result))
            keep(result)
            on_event(ShardDone(result.name, indices[result.name], len(plan.shards), result.nbytes, result.sha256))
            if reader:
                reader.add(result)
                if pool is None:  # else what the pool has begun is finished and kept first
                    reader.check()


def to_folder(out: str | os.PathLike[str]) -> Path:
    """The folder to write, as an absolute path. Raises UsageError for an address, which would become a local folder of that name."""
    place = to_place(out, "output")
    if is_address(str(place)):
        hint = "give a folder; the command line writes to addresses"
        raise UsageError("the output is an address, and no folder", facts={"output": str(place)}, hint=hint)
    return Path(os.path.abspath(place))


@contextmanager
def keeping(plan: Plan, job: Job, results: Mapping[str, ShardResult]) -> Iterator[None]:
    """Turn every early end into an error that says what lies on disk."""
    try:
        yield
    except Exception as error:
        known = error if isinstance(error, LlavaWeightsError) else shortage(error)
        known = known or (output_error(error, job.folder) if isinstance(error, OSError) else None)
        if known is None:
            raise
        known.kept = kept(job, len(results), len(plan.shards))
        raise known from error
    except KeyboardInterrupt as error:
        raise Interrupted.of(error, kept(job, len(results), len(plan.shards))) from error


def _clean(job: Job, on_event: Listener) -> None:
    """Delete the work folder. OUT is complete: what can't be deleted is no reason to fail."""
    try:
        job.clean()
    except OSError as error:
        on_event(Note(f"`{job.partial.name}` can't be deleted: {error.strerror}", warning=True))
    except KeyboardInterrupt as error:
        raise Interrupted.of(error, f"`{job.out.name}` is complete; what is left of `{job.partial.name}` can be deleted") from error


def _digest(path: Path) -> str:
    """The sha256 of a written file. Raises OutputError where it can't be read."""
    try:
        return digest_file(path)
    except InputError as error:
        raise OutputError(f"{error.what}, though it was just written", facts={"file": path}, hint="check the disk") from error


def kept(job: Job, done: int, shards: int) -> str:
    """The sentence that says what lies on disk after a run that did not finish."""
    if job.published:
        return f"`{job.out.name}` is complete"
    return f"{done} of {shards} shards are kept in `{job.partial.name}`; {job.remains}"


def preflight(plan: Plan, out: Path, *, force: bool = False, make_job: Callable[[Path], Job] = Job) -> None:
    """Refuse what can't end well, before anything is written: an output that exists or holds an input, too little space."""
    try:
        _refuse(plan, make_job(out), force)
    except OSError as error:
        raise output_error(error, out) from error


@dataclass(frozen=True)
class Begun:
    """What an earlier run left in `folder`: `done` shards with `nbytes` bytes, of the `shards` of a plan."""

    folder: str
    done: int
    shards: int
    nbytes: int

    def sentence(self, *, restart: bool) -> str:
        if restart:
            return f"`{self.folder}` holds an earlier run's work ({shards(self.done)}, {size(self.nbytes)}), which `--restart` would delete"
        return f"`{self.folder}` holds {self.done} of {shards(self.shards)} ({size(self.nbytes)}), which the run would check and continue"


def begun_earlier(plan: Plan, out: Path, *, restart: bool = False, make_job: Callable[[Path], Job] = Job) -> Begun | None:
    """What lies there of an earlier run on `plan`, by its journal, unread; None where there is nothing. Raises OutputError where the work
    belongs to another plan, unless `restart`, since the run itself would end so."""
    job = make_job(out)
    try:
        if not job.partial.is_dir() or not (restart or job.begun(plan.identity)):
            return None
        names = {shard.name for shard in plan.shards}
        found = {name: entry.get("nbytes") for name, entry in job.finished().items() if restart or name in names}
        sizes = [nbytes for nbytes in found.values() if type(nbytes) is int]
    except FileNotFoundError:  # the run that held it ended meanwhile
        return None
    except OSError as error:
        raise output_error(error, out) from error
    return Begun(job.partial.name, len(sizes), len(plan.shards), sum(sizes))


def _refuse(plan: Plan, job: Job, force: bool) -> None:
    out = job.out
    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink()) and not job.remote:
        raise OutputError(f"`{out.name}` exists and is not a folder", facts={"output": out}, hint="choose another `-o`")
    with suppress(FileNotFoundError):  # another run ended meanwhile
        check_work_folder(job.partial)
    _check_free(job, force)
    _check_small_files(plan)
    _check_inputs(plan, job)
    _check_place(job)
    _check_space(plan, job)


def _check_inputs(plan: Plan, job: Job) -> None:
    """Refuse an output or work folder that is an input, holds one or lies inside one: the run would write over it or delete it."""
    origins = [origin for step in plan.history for _, origin in step.inputs]
    read = {leaf.file.path for shard in plan.shards for _, tensor in shard.tensors for leaf in tensor.leaves() if not leaf.file.remote}
    read |= {file.path for origin in origins for file in origin.files if not file.remote}
    if job.remote and (read_there := [file for origin in origins for file in origin.files if file.path.startswith(f"{job.shown}/")]):
        what = f"the output `{job.shown}` is an input"
        raise OutputError(what, facts={"input": read_there[0].path}, hint="choose another `-o`")
    given = [origin.path for origin in origins if not origin.remote]
    sources = [*given, *map(Path, sorted(read)), *(data for data in plan.files.values() if isinstance(data, Path))]
    for place in job.places:
        source = meets(place, sources) or next((path for path in given if lies_in(place, path)), None)
        if source is not None:
            what = "output" if place == job.out else "work folder"
            facts = {"input": source, what: place}
            raise OutputError(f"the {what} `{place.name}` is, holds or lies inside an input", facts=facts, hint="choose another `-o`")


def _check_small_files(plan: Plan) -> None:
    """Raise InputError for a name that no manifest can hold, and for files that take more memory than the plan allows for them."""
    if odd := [name for name in plan.files if not is_text(name)]:
        raise InputError(f"the name {shown(odd[0])} is not UTF-8", hint="rename that file: a manifest holds text only")
    sizes = {name: SourceFile.at(data).size if isinstance(data, Path) else len(data) for name, data in plan.files.items()}
    if (total := sum(sizes.values())) > LARGEST_SMALL_FILE:
        largest = max(sizes, key=lambda name: sizes[name])
        what = f"the small files have {size(total)} together, at most {size(LARGEST_SMALL_FILE)} are copied"
        facts = {"largest": f"{shown(largest)}, {size(sizes[largest])}"}
        raise InputError(what, facts=facts, hint="take out of the input's folder what is no part of the model")


def _check_place(job: Job) -> None:
    """Refuse now what would fail at the end: a folder can't be renamed from one mount to another, and a mount point can't be replaced."""
    above = next(folder for folder in job.out.parents if folder.exists())
    inside = (job.partial, job.folder, *(() if job.remote else (job.out, job.aside)))
    for place in (place for place in inside if place.is_dir()):
        if mount_of(place) != mount_of(above):
            facts = {place.name: place, "mounted apart from": above}
            raise OutputError(f"`{place.name}` is a mount point, so no output can get its name there", facts=facts, hint=ANOTHER_PLACE)
    for place in (above, *(place for place in inside if place.is_dir() and (place != job.out or job.occupied))):
        if not os.access(place, os.W_OK | os.X_OK):
            raise OutputError(f"can't write to `{place}`", hint="choose another `-o`, or change the folder's permissions")


def _check_free(job: Job, force: bool) -> None:
    if job.occupied and not (force or job.published):
        what, facts = f"`{job.out.name}` exists and is not empty", {"output": job.shown}
        raise OutputError(what, facts=facts, hint="choose another `-o`, or pass `--force` to replace it after the new one is complete")


def _check_space(plan: Plan, job: Job) -> None:
    place = next(folder for folder in (job.partial, *job.out.parents) if folder.exists())
    there = 0
    for file in job.folder.glob("*"):
        with suppress(OSError):  # renamed meanwhile, where portions are at work
            there += file.lstat().st_blocks * 512
    free = shutil.disk_usage(place).free
    room = room_for(job, plan.shards)
    needed = max(0, room - there) + room // 50 + 64 * MiB
    if free < needed:
        what, facts = f"not enough space for `{job.out.name}`", {"needed": size(needed), "free": f"{size(free)} on {place}"}
        raise OutputError(what, facts=facts, hint=f"free {size(needed - free)} or choose another `-o`")


def trusted(
    job: Job, plan: Plan, shards: Shards, *, again: bool = True, on_event: Listener = lambda event: None
) -> Iterator[tuple[str, ShardResult]]:
    """Shards of an earlier run whose bytes are still those of the journal: the disk may have failed meanwhile. `again`: whether what is
    left will be read back."""
    tensors = {shard.name: {name for name, _ in shard.tensors} for shard in plan.shards}
    found = {name: _result(entry) for name, entry in job.finished().items()}
    known = {name: result for name, result in found.items() if result and result.tensors.keys() == tensors.get(name)}
    total, done = sum(result.nbytes for result in known.values() if shards.reads(result)), [0]
    if total:
        left = plan.nbytes - sum(result.nbytes for result in known.values())
        on_event(Started(len(known), total, what="Checking", to_follow=max(0, left) * (1 + again)))

    def add(nbytes: int) -> None:
        done[0] += nbytes
        on_event(Progress(done[0], name))

    for name, result in known.items():
        if shards.holds(result, add):
            yield name, result


def _result(entry: Mapping[str, Any]) -> ShardResult | None:
    """A line of the journal; None for one that no run of this version wrote."""
    kinds = {"name": str, "nbytes": int, "sha256": str, "read_back": str, "tensors": dict, "tallies": dict, "holes": list, "tag": str}
    sound = entry.keys() == kinds.keys() and all(type(entry[key]) is kind for key, kind in kinds.items())
    sound = sound and {type(text) for text in (*entry["tensors"].values(), *entry["holes"])} <= {str}
    return ShardResult(**entry) if sound and {type(count) for count in entry["tallies"].values()} <= {int} else None


def _write(
    plan: Plan, shards: Shards, pool: Executor | None, done: Mapping[str, Any], counter: ByteCounter, reader: ReadBack | None
) -> Generator[ShardResult]:
    """Results of the shards that are left, as they finish."""
    left = [shard for shard in plan.shards if shard.name not in done]
    if pool is not None:
        add = {shard.name: partial(counter.of(shard), shard.nbytes) for shard in left}
        alone = replace(plan.settings, in_flight=1)  # each worker of the pool writes one shard with all jobs
        for result in completed(pool, [shards.task(shard, alone) for shard in left]):
            if isinstance(shards, InFolder) and result.name not in os.listdir(shards.folder):
                raise _not_shared(shards.folder, result)
            yield result
            add[result.name]()
        return
    settings = replace(plan.settings, in_flight=max(1, min(plan.settings.in_flight, len(left))))
    behind, brake = DropBehind(), Brake()
    how: dict[str, Any] = {"behind": behind, "brake": brake, "resume": True}
    calls = [
        shards.task(shard, settings, on_bytes=counter.of(shard), on_disk=partial(reader.follow, shard.name) if reader else None, **how)
        for shard in left
    ]
    if settings.in_flight > 1:
        with one_thread(), ThreadPoolExecutor(settings.in_flight) as threads:
            yield from completed(threads, calls, in_flight=settings.in_flight, stop=brake.pull)
        return
    for call in calls:
        if (stopped := interruption()) is not None:
            raise stopped
        yield call()


def _not_shared(folder: Path, result: ShardResult) -> OutputError:
    hint = "put `-o` on a file system that all workers share"
    return OutputError(f"`{result.name}` was written where this machine does not see it", facts={"folder": folder}, hint=hint)


class ByteCounter:
    """Adds up what is written, from the `results` of an earlier run on, and what is read back; workers call from several threads."""

    def __init__(self, results: Mapping[str, ShardResult], on_event: Listener) -> None:
        self.nbytes, self.back, self.on_event, self.lock = sum(result.nbytes for result in results.values()), 0, on_event, threading.Lock()

    def of(self, shard: Shard) -> Callable[[int], None]:
        def add(nbytes: int) -> None:
            with self.lock:
                self.nbytes += nbytes
                self.on_event(Progress(self.nbytes, shard.name, self.back))

        return add

    def read_back(self, nbytes: int, shard: str) -> None:
        with self.lock:
            self.back += nbytes
            self.on_event(Progress(self.nbytes, shard, self.back))


def finish(plan: Plan, job: Job, shards: Shards, results: Mapping[str, ShardResult]) -> list[TensorEntry]:
    """Small files, card, checksums, and last the manifest; after this the folder may get its name. Returns what the shards hold."""
    plan = replace(plan, history=accepted(plan.history, sorted({hole for result in results.values() for hole in result.holes})))
    for name, data in plan.files.items():
        put_file(job.folder / name, small_bytes(name, data, LARGEST_SMALL_FILE))
    files = [FileEntry(shard.name, results[shard.name].nbytes, results[shard.name].sha256) for shard in plan.shards]
    tensors = tensor_entries(shards.place, results)
    write_index(job.folder, tensors)
    put_file(job.folder / "README.md", make_card(plan, tensors, tallies(results)).encode())
    for path in sorted(job.folder.iterdir()):
        if path.name in results:
            continue
        name = path.name
        files.append(FileEntry(name, path.stat().st_size, _digest(path)))
    put_file(job.folder / SUMS, make_sums(files))
    put_file(job.folder / MANIFEST, json_bytes(make_manifest(plan.history, plan.options, files, tensors, tallies(results))))
    return tensors


def tensor_entries(folder: Place, results: Mapping[str, ShardResult]) -> list[TensorEntry]:
    """One entry for each tensor, as the headers of the written files say, with the digest taken while it was written.

    Raises OutputError where a header does not come back."""
    try:
        return [
            TensorEntry(name, tensor.dtype, tensor.shape, tensor.nbytes, results[shard].tensors[name], shard)
            for shard in sorted(results)
            for name, tensor in (index_gguf if shard.endswith(".gguf") else index_safetensors)(folder / shard)[0].items()
        ]
    except InputError as error:
        raise OutputError(error.what, facts=error.facts, hint="check the disk") from error


def write_index(folder: Path, tensors: Sequence[TensorEntry]) -> None:
    """`model.safetensors.index.json`, where there is more than one shard."""
    if len({tensor.shard for tensor in tensors if not tensor.shard.endswith(".gguf")}) > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in tensors)}
        placed = {tensor.name: tensor.shard for tensor in sorted(tensors, key=lambda tensor: tensor.name)}
        put_file(folder / "model.safetensors.index.json", json_bytes({"metadata": total, "weight_map": placed}))


def tallies(results: Mapping[str, ShardResult]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for result in results.values():
        total.update(result.tallies)
    return {key: count for key, count in sorted(total.items()) if key != "non_finite"}


def _report(plan: Plan, job: Job, results: Mapping[str, ShardResult], resumed: int, tensors: list[TensorEntry]) -> Report:
    nbytes = sum(result.nbytes for result in results.values())
    return Report(job.out, len(plan.shards), nbytes, resumed, root_of_tensors(tensors), tallies(results))
