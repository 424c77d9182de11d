"""Carry out a plan: preflight, shards one after another (or on a pool), small files, manifest, and the rename that publishes."""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .card import make_card
from .checkpoint import small_bytes
from .errors import InputError, Interrupted, LlavaWeightsError, OutputError, Terminated
from .events import Event, Note, Progress, ReadingBack, ShardDone, Started
from .executors import completed
from .formats.safetensors import index_safetensors
from .formats.strict_json import json_bytes
from .job import Job, open_job, put_file, remove
from .manifest import MANIFEST, SUMS, FileEntry, TensorEntry, digest_file, make_manifest, make_sums, root_of_tensors
from .plan import LARGEST_SMALL_FILE, MiB, Plan, Shard, accepted
from .stream import ShardResult, output_error, write_shard
from .wording import size

Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Report:
    """What a finished run did. `root` is the digest of all tensors, whatever their shards (facts: verify 1.3)."""

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
    make_job: Callable[[Path], Job] = Job,
    on_event: Listener = lambda event: None,
) -> Report:
    """Write `plan` to the folder `out`, which appears complete or not at all. Interrupted work is taken up again.

    `pool` is any `concurrent.futures.Executor` that sees the same file system; shards go to it as they are. `reread` reads every
    shard back from the disk before `out` gets its name. `complete` writes no shard: all must be there. `make_job` may send them
    elsewhere (`upload.job_at`). Raises OutputError where `out`
    can't be written, is in use or does not come back as it was written, InputError where an input turns out damaged; finished shards
    are kept.
    """
    target = Path(os.path.abspath(out))
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
        results = dict(trusted(job, plan, job.out))
        if len(results) == len(plan.shards):
            report = _report(plan, job, results, len(results))
            _clean(job, on_event)
            return report
        job.begin(plan.identity, restart=True)
    _check_free(job, force)
    job.prepare()
    results = dict(trusted(job, plan, job.folder))
    if complete and len(results) < len(plan.shards):
        raise _incomplete(plan, job, results)
    _sweep(job, results)
    resumed = len(results)
    with keeping(plan, job, results):
        write_shards(plan, job, pool, results, on_event)
        if reread and not job.elsewhere:
            _read_back(job, list(results.values())[resumed:], pool, plan.settings.jobs, on_event)
        _sweep(job, results)  # of workers that died
        finish(plan, job, results)
        report = _report(plan, job, results, resumed)
        job.publish(force=force)
    _clean(job, on_event)
    return report


def _sweep(job: Job, results: Mapping[str, ShardResult]) -> None:
    for stray in set(os.listdir(job.folder)) - set(results):
        remove(job.folder / stray)


def _incomplete(plan: Plan, job: Job, results: Mapping[str, ShardResult]) -> OutputError:
    left = [index for index, shard in enumerate(plan.shards) if shard.name not in results]
    facts, hint = {"missing": ", ".join(plan.shards[index].name for index in left)}, "the same command without `--finish` writes them here"
    if count := job.portions():
        facts["portions"] = ", ".join(f"{number + 1}/{count}" for number in sorted({index % count for index in left}))
        hint = "run these portions again with `--shards`, then `--finish`; or write them here with the same command without `--finish`"
    error = OutputError(f"{len(left)} of {len(plan.shards)} shards are missing or damaged", facts=facts, hint=hint)
    error.kept = kept(job, len(results), len(plan.shards))
    return error


def write_shards(plan: Plan, job: Job, pool: Executor | None, results: dict[str, ShardResult], on_event: Listener) -> None:
    """Write the shards of `plan` that `results` lacks, each with its journal line as it is finished."""
    done = sum(result.nbytes for result in results.values())
    on_event(Started(len(plan.shards), plan.nbytes, len(results), done))
    job.record({name: asdict(result) for name, result in results.items()})  # without a torn line, and what is not trusted
    indices = {shard.name: index for index, shard in enumerate(plan.shards, 1)}
    for result in list(results.values()):
        job.shard_done(asdict(result))
    for result in _write(plan, job, pool, dict(results), done, on_event):
        results[result.name] = result
        job.append(asdict(result))
        job.shard_done(asdict(result))
        on_event(ShardDone(result.name, indices[result.name], len(plan.shards), result.nbytes, result.sha256))


@contextmanager
def keeping(plan: Plan, job: Job, results: Mapping[str, ShardResult]) -> Iterator[None]:
    """Make every way in which work can end an error that says what lies on disk."""
    try:
        yield
    except (LlavaWeightsError, OSError) as error:
        known = error if isinstance(error, LlavaWeightsError) else output_error(error, job.folder)
        known.kept = kept(job, len(results), len(plan.shards))
        raise known from error
    except KeyboardInterrupt as error:
        raise _interrupted(error, kept(job, len(results), len(plan.shards)) + ". Run the same command to continue") from error


def _clean(job: Job, on_event: Listener) -> None:
    """Delete the work folder. OUT is complete: what can't be deleted is no reason to fail."""
    try:
        job.clean()
    except OSError as error:
        on_event(Note(f"`{job.partial.name}` can't be deleted: {error.strerror}", warning=True))
    except KeyboardInterrupt as error:
        raise _interrupted(error, f"`{job.out.name}` is complete; what is left of `{job.partial.name}` can be deleted") from error


def _interrupted(error: KeyboardInterrupt, kept: str) -> Interrupted:
    stopped = Interrupted("stopped", exit_code=143 if isinstance(error, Terminated) else 130)
    stopped.kept = kept
    return stopped


def _read_back(job: Job, written: Sequence[ShardResult], pool: Executor | None, jobs: int, on_event: Listener) -> None:
    """Hash the shards of this run again, from the disk: their pages were dropped when they were written. Those of an earlier
    run were read when they were taken up. Raises OutputError for one that differs, which is then made again by the next run."""
    on_event(ReadingBack(sum(result.nbytes for result in written)))
    with ThreadPoolExecutor(jobs) as threads:
        digests = (pool or threads).map(_digest, [job.folder / result.name for result in written])
        for result, digest in zip(written, digests, strict=True):
            if digest != result.sha256:
                raise OutputError(
                    f"`{result.name}` does not come back from the disk as it was written",
                    facts={"written": result.sha256, "read": digest},
                    hint="check the disk, or choose another `-o`; the same command writes this shard again",
                )


def _digest(path: Path) -> str:
    """The sha256 of a file of ours. Raises OutputError where it can't be read."""
    try:
        return digest_file(path)
    except OSError as error:
        raise OutputError(f"`{path.name}` can't be read back: {error.strerror}", facts={"file": path}, hint="check the disk") from error


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


def _refuse(plan: Plan, job: Job, force: bool) -> None:
    out = job.out
    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink()) and not job.elsewhere:
        raise OutputError(f"`{out.name}` exists and is not a folder", facts={"output": out}, hint="choose another `-o`")
    _check_free(job, force)
    for source in () if job.elsewhere else (origin.path for step in plan.history for _, origin in step.inputs):
        inner, outer = source.resolve(), out.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise OutputError(
                f"the output `{out.name}` is, holds or lies inside an input", facts={"input": source}, hint="choose another `-o`"
            )
    _check_space(plan, job)


def _check_free(job: Job, force: bool) -> None:
    if job.occupied and not (force or job.published):
        raise OutputError(
            f"`{job.out.name}` exists and is not empty",
            facts={"output": job.shown},
            hint="choose another `-o`, or pass `--force` to replace it after the new one is complete",
        )


def _check_space(plan: Plan, job: Job) -> None:
    place = next(folder for folder in (job.partial, *job.out.parents) if folder.exists())
    there = 0
    for file in job.folder.glob("*"):
        with suppress(OSError):  # renamed meanwhile, where portions are at work
            there += file.lstat().st_blocks * 512
    free = shutil.disk_usage(place).free
    room = job.room([shard.nbytes for shard in plan.shards])
    needed = max(0, room - there) + room // 50 + 64 * MiB
    if free < needed:
        raise OutputError(
            f"not enough space for `{job.out.name}`",
            facts={"needed": size(needed), "free": f"{size(free)} on {place}"},
            hint=f"free {size(needed - free)} or choose another `-o`",
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"can't write to `{place}`", hint="choose another `-o`, or change the folder's permissions")


def trusted(job: Job, plan: Plan, folder: Path) -> Iterator[tuple[str, ShardResult]]:
    """Shards of an earlier run whose bytes still are what the journal says; the disk may have failed meanwhile."""
    names = {shard.name for shard in plan.shards}
    for name, entry in job.finished().items():
        result, path = _result(entry), folder / name
        with suppress(OSError):  # one that can't be read is made again
            same = name in names and not path.is_symlink() and path.stat().st_size == result.nbytes
            if same and (job.uploaded(entry) or digest_file(path) == result.sha256):
                yield name, result


def _result(entry: Mapping[str, Any]) -> ShardResult:
    return ShardResult(**entry)


def _write(plan: Plan, job: Job, pool: Executor | None, done: Mapping[str, Any], nbytes: int, on_event: Listener) -> Iterator[ShardResult]:
    """Results of the shards that are left, as they finish."""
    left = [shard for shard in plan.shards if shard.name not in done]
    counter = _Counter(nbytes, on_event)
    if pool is not None:
        add = {shard.name: partial(counter.of(shard), shard.nbytes) for shard in left}
        for result in completed(pool, [partial(write_shard, shard, job.folder, plan.settings) for shard in left]):
            if result.name not in os.listdir(job.folder):
                raise _not_shared(job, result)
            yield result
            add[result.name]()
        return
    for shard in left:
        yield write_shard(shard, job.folder, plan.settings, on_bytes=counter.of(shard))


def _not_shared(job: Job, result: ShardResult) -> OutputError:
    hint = "put `-o` on a file system that all workers share"
    return OutputError(f"`{result.name}` was written where this machine does not see it", facts={"folder": job.folder}, hint=hint)


class _Counter:
    """Adds up what the workers write; they call from several threads."""

    def __init__(self, nbytes: int, on_event: Listener) -> None:
        self.nbytes, self.on_event, self.lock = nbytes, on_event, threading.Lock()

    def of(self, shard: Shard) -> Callable[[int], None]:
        def add(nbytes: int) -> None:
            with self.lock:
                self.nbytes += nbytes
                self.on_event(Progress(self.nbytes, shard.name))

        return add


def finish(plan: Plan, job: Job, results: Mapping[str, ShardResult]) -> None:
    """Small files, card, checksums, and last the manifest; after this the folder may get its name."""
    plan = replace(plan, history=accepted(plan.history, sorted({hole for result in results.values() for hole in result.holes})))
    for name, data in plan.files.items():
        put_file(job.folder / name, small_bytes(name, data, LARGEST_SMALL_FILE))
    files = [FileEntry(shard.name, results[shard.name].nbytes, results[shard.name].sha256) for shard in plan.shards]
    tensors = tensor_entries(job.folder, results)
    write_index(job.folder, tensors)
    put_file(job.folder / "README.md", make_card(plan, files, tensors, tallies(results)).encode())
    for path in sorted(job.folder.iterdir()):
        if path.name in results:
            continue
        name = path.name
        files.append(FileEntry(name, path.stat().st_size, _digest(path)))
    put_file(job.folder / SUMS, make_sums(files))
    put_file(job.folder / MANIFEST, json_bytes(make_manifest(plan, files, tensors, tallies(results))))


def tensor_entries(folder: Path, results: Mapping[str, ShardResult]) -> list[TensorEntry]:
    """One entry a tensor, as the headers of the written files say, with the digest taken while it was written.

    Raises OutputError where a header does not come back."""
    try:
        return [
            TensorEntry(name, tensor.dtype, tensor.shape, tensor.nbytes, results[shard].tensors[name], shard)
            for shard in sorted(results)
            for name, tensor in index_safetensors(folder / shard)[0].items()
        ]
    except InputError as error:
        raise OutputError(error.what, facts=error.facts, hint="check the disk") from error


def write_index(folder: Path, tensors: Sequence[TensorEntry]) -> None:
    """`model.safetensors.index.json`, where there is more than one shard."""
    if len({tensor.shard for tensor in tensors}) > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in tensors)}
        placed = {tensor.name: tensor.shard for tensor in sorted(tensors, key=lambda tensor: tensor.name)}
        put_file(folder / "model.safetensors.index.json", json_bytes({"metadata": total, "weight_map": placed}))


def tallies(results: Mapping[str, ShardResult]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for result in results.values():
        total.update(result.tallies)
    return {key: count for key, count in sorted(total.items()) if key != "non_finite"}


def _report(plan: Plan, job: Job, results: Mapping[str, ShardResult], resumed: int) -> Report:
    folder = job.out if job.published else job.folder
    nbytes = sum(result.nbytes for result in results.values())
    return Report(job.out, len(plan.shards), nbytes, resumed, root_of_tensors(tensor_entries(folder, results)), tallies(results))
