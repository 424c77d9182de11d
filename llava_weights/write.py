"""Carry out a plan: preflight, shards one after another (or on a pool), small files, manifest, and the rename that publishes."""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .card import make_card
from .errors import Interrupted, LlavaWeightsError, OutputError, Terminated
from .events import Event, Progress, ReadingBack, ShardDone, Started
from .formats.safetensors import index_safetensors
from .formats.strict_json import json_bytes
from .job import Job, open_job, partial_folder, put_file, remove
from .manifest import MANIFEST, SUMS, FileEntry, TensorEntry, digest_file, make_manifest, make_sums, root_of_tensors
from .plan import MiB, Plan, Shard
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
    on_event: Listener = lambda event: None,
) -> Report:
    """Write `plan` to the folder `out`, which appears complete or not at all. Interrupted work is taken up again.

    `pool` is any `concurrent.futures.Executor` that sees the same file system; shards go to it as they are. `reread` reads every
    shard back from the disk before `out` gets its name. Raises OutputError where `out` can't be written, is in use or does not
    come back as it was written, InputError where an input turns out damaged; finished shards are kept.
    """
    target = Path(os.path.abspath(out))
    preflight(plan, target, force=force)
    try:
        with open_job(target) as job:
            return _run(plan, job, pool, restart, reread, on_event)
    except OSError as error:
        raise output_error(error, target) from error


def _run(plan: Plan, job: Job, pool: Executor | None, restart: bool, reread: bool, on_event: Listener) -> Report:
    job.begin(plan.identity, restart=restart)
    if job.published:
        results = {name: _result(entry) for name, entry in job.finished().items()}
        report = _report(plan, job.out, results, len(results))
        job.clean()
        return report
    results = dict(_trusted(job, plan))
    for stray in set(os.listdir(job.folder)) - set(results):
        remove(job.folder / stray)
    resumed, done = len(results), sum(result.nbytes for result in results.values())
    on_event(Started(len(plan.shards), plan.nbytes, resumed, done))
    try:
        for result in _write(plan, job, pool, results, done, on_event):
            results[result.name] = result
            job.record({name: asdict(finished) for name, finished in results.items()})
            index = [shard.name for shard in plan.shards].index(result.name) + 1
            on_event(ShardDone(result.name, index, len(plan.shards), result.nbytes, result.sha256))
        if reread:
            _read_back(job, list(results.values())[resumed:], plan.settings.jobs, on_event)
        finish(plan, job, results)
    except (LlavaWeightsError, OSError) as error:
        known = error if isinstance(error, LlavaWeightsError) else output_error(error, job.folder)
        known.kept = kept(job, len(results), len(plan.shards))
        raise known from error
    except KeyboardInterrupt as error:
        stopped = Interrupted("stopped", exit_code=143 if isinstance(error, Terminated) else 130)
        stopped.kept = kept(job, len(results), len(plan.shards)) + ". Run the same command to continue"
        raise stopped from error
    return _report(plan, job.out, results, resumed)


def _read_back(job: Job, written: Sequence[ShardResult], jobs: int, on_event: Listener) -> None:
    """Hash the shards of this run again, from the disk: their pages were dropped when they were written. Those of an earlier
    run were read when they were taken up. Raises OutputError for one that differs, which is then made again by the next run."""
    on_event(ReadingBack(sum(result.nbytes for result in written)))
    with ThreadPoolExecutor(jobs) as threads:
        digests = threads.map(lambda result: digest_file(job.folder / result.name), written)
        for result, digest in zip(written, digests, strict=True):
            if digest != result.sha256:
                raise OutputError(
                    f"`{result.name}` does not come back from the disk as it was written",
                    facts={"written": result.sha256, "read": digest},
                    hint="check the disk, or choose another `-o`; the same command writes this shard again",
                )


def kept(job: Job, done: int, shards: int) -> str:
    """The sentence that says what lies on disk after a run that did not finish."""
    return f"{done} of {shards} shards are kept in `{job.partial.name}`; `{job.out.name}` was not touched"


def preflight(plan: Plan, out: Path, *, force: bool = False) -> None:
    """Refuse what can't end well, before anything is written: an output that exists or holds an input, too little space."""
    partial = partial_folder(out)
    published = Job(out).published
    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink()):
        raise OutputError(f"`{out.name}` exists and is not a folder", facts={"output": out}, hint="choose another `-o`")
    if out.exists() and any(out.iterdir()) and not (force or published):
        raise OutputError(
            f"`{out.name}` exists and is not empty",
            facts={"output": out},
            hint="choose another `-o`, or pass `--force` to replace it after the new one is complete",
        )
    for source in (origin.path for step in plan.history for _, origin in step.inputs):
        inner, outer = source.resolve(), out.resolve()
        if inner.is_relative_to(outer) or (inner.is_dir() and outer.is_relative_to(inner)):
            raise OutputError(
                f"the output `{out.name}` is, holds or lies inside an input", facts={"input": source}, hint="choose another `-o`"
            )
    _check_space(plan, out, partial)


def _check_space(plan: Plan, out: Path, partial: Path) -> None:
    place = next(folder for folder in (partial, *out.parents) if folder.exists())
    there = sum(file.stat().st_blocks * 512 for file in (partial / "out").glob("*.safetensors")) if partial.exists() else 0
    free = shutil.disk_usage(place).free
    needed = max(0, plan.nbytes - there) + plan.nbytes // 50 + 64 * MiB
    if free < needed:
        raise OutputError(
            f"not enough space for `{out.name}`",
            facts={"needed": size(needed), "free": f"{size(free)} on {place}"},
            hint=f"free {size(needed - free)} or choose another `-o`",
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"can't write to `{place}`", hint="choose another `-o`, or change the folder's permissions")


def _trusted(job: Job, plan: Plan) -> Iterator[tuple[str, ShardResult]]:
    """Shards of an earlier run whose bytes still are what the journal says; the disk may have failed meanwhile."""
    names = {shard.name for shard in plan.shards}
    for name, entry in job.finished().items():
        result, path = _result(entry), job.folder / name
        if name in names and path.exists() and path.stat().st_size == result.nbytes and digest_file(path) == result.sha256:
            yield name, result


def _result(entry: Mapping[str, Any]) -> ShardResult:
    return ShardResult(**entry)


def _write(plan: Plan, job: Job, pool: Executor | None, done: Mapping[str, Any], nbytes: int, on_event: Listener) -> Iterator[ShardResult]:
    """Results of the shards that are left, as they finish."""
    left = [shard for shard in plan.shards if shard.name not in done]
    if pool is not None:
        futures: list[Future[ShardResult]] = [pool.submit(write_shard, shard, job.folder, plan.settings) for shard in left]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
        return
    counter = _Counter(nbytes, on_event)
    for shard in left:
        yield write_shard(shard, job.folder, plan.settings, on_bytes=counter.of(shard))


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
    """Small files, card, checksums, and last the manifest; then the folder gets its name."""
    for name, data in plan.files.items():
        put_file(job.folder / name, data if isinstance(data, bytes) else data.read_bytes())
    files = [FileEntry(shard.name, results[shard.name].nbytes, results[shard.name].sha256) for shard in plan.shards]
    tensors = tensor_entries(job.folder, results)
    write_index(job.folder, tensors)
    put_file(job.folder / "README.md", make_card(plan, files, tensors, tallies(results)).encode())
    for path in sorted(job.folder.iterdir()):
        if path.name in results:
            continue
        name = path.name
        files.append(FileEntry(name, path.stat().st_size, digest_file(path)))
    put_file(job.folder / SUMS, make_sums(files))
    put_file(job.folder / MANIFEST, json_bytes(make_manifest(plan, files, tensors, tallies(results))))
    job.publish()


def tensor_entries(folder: Path, results: Mapping[str, ShardResult]) -> list[TensorEntry]:
    """One entry a tensor, as the headers of the written files say, with the digest taken while it was written."""
    return [
        TensorEntry(name, tensor.dtype, tensor.shape, tensor.nbytes, results[shard].tensors[name], shard)
        for shard in sorted(results)
        for name, tensor in index_safetensors(folder / shard)[0].items()
    ]


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


def _report(plan: Plan, out: Path, results: Mapping[str, ShardResult], resumed: int) -> Report:
    nbytes = sum(result.nbytes for result in results.values())
    return Report(out, len(plan.shards), nbytes, resumed, root_of_tensors(tensor_entries(out, results)), tallies(results))
