"""What a run will do, settled before the first byte is written: shards, sizes, memory, small files, fingerprint.

A plan is plain data. `--dry-run` prints it, resume compares it, and a shard of it can be sent to another process.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint.checkpoint import Checkpoint, CheckpointSource, Step, opened
from ..checkpoint.diagnose import role_of
from ..checkpoint.small_files import small_bytes
from ..errors import MOST_JOBS, UsageError, whole_number
from ..families.files import ADAPTER_CONFIG, ADAPTER_FILES, STANDARD
from ..formats.gguf import GgufKey, make_gguf_header
from ..formats.integer_delta import ToInteger
from ..formats.safetensors import make_header
from ..storage.direct import SPARE_BYTES
from ..storage.strict_json import json_bytes
from ..storage.threads import usable_cores
from ..tensors.holes import MORE, Watch, hole_sentences
from ..tensors.lazy import LazyTensor
from ..tensors.windows import WINDOW_BYTES, MiB, cut
from ..text import brief, is_text, redact, shards, shown, size

SHARD_METADATA = {"format": "pt"}  # without it transformers 4.37 and 4.45 stop with an AttributeError

SHARD_SIZE = "5GB"  # where nobody says
SMALLEST_WINDOW = MiB
LARGEST_SIZE = 1 << 50  # bytes of a shard or of memory: beyond is a typing error
MAX_NAME = 200  # characters of the name that GGUF files bear
LARGEST_SMALL_FILE = 64 << 20  # bytes, of all of them together too; the largest honest one, a tokenizer.json, has 17 MB
READ_BACK_BYTES = 4 * MiB  # of each shard in flight
BUFFERS_BEYOND_JOBS = 4  # windows by which the digest threads of a shard may lag behind its workers
# Workers that keep the digest of one shard's file busy: more of them write another shard at the same time. By processor time, 0.6 s per GB
# for the digest, and for the workers 0.4 (names only), 0.9 (a delta) or 1.7 (a LoRA of rank 64).
JOBS_PER_SHARD = 2
USUAL_MEMORY = 500 * MiB  # resident bytes of a run for which neither jobs nor memory are chosen
USUAL_WINDOWS = (WINDOW_BYTES, WINDOW_BYTES // 2)  # measured: smaller ones are slower
# Resident memory of the interpreter with the modules that a run imports, measured on CPython 3.11 with torch 2.13 (CPU) and 2 threads.
INTERPRETER, WITH_TORCH = 70 * MiB, 250 * MiB
WITH_NETWORK = 110 * MiB  # clients of HTTP and of object stores, and the bytes on their way in each of 8 workers
# Parts of an object, 8 MiB each: four on their way, others being put together. 2 GB to an S3 took 120 MiB more than to a folder, in all;
# what hf_xet takes was not measured.
UPLOADING = 160 * MiB
REMOTE_JOBS = 4  # workers in place of one, where inputs come over the network: most of them wait for an answer


@dataclass(frozen=True)
class Shard:
    """One output file, `name`, with the `tensors` that go into it, in order: the unit of work, of an interrupted run that continues, and of
    checksums.
    """

    name: str
    tensors: tuple[tuple[str, LazyTensor], ...]
    _watch: Watch | None = field(default=None, repr=False, compare=False)
    keys: tuple[GgufKey, ...] = ()  # of a GGUF file; without any it is a safetensors file

    def __reduce__(self) -> tuple[object, ...]:
        """A worker gets what is known of the files that this shard reads, a few kB, and nothing of the other inputs."""
        files = {leaf.file for _, tensor in self.tensors for leaf in tensor.leaves()}
        return Shard, (self.name, self.tensors, self._watch and self._watch.within(files), self.keys)

    def __str__(self) -> str:
        """Short, beside the whole `repr`, which is part of a plan's identity."""
        return f"Shard({brief(self.name)}, {len(self.tensors)} tensors, {size(self.nbytes)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython and notebooks show."""
        printer.text(str(self))

    @property
    def nbytes(self) -> int:
        """Bytes of all values, without the header."""
        return sum(tensor.nbytes for _, tensor in self.tensors)

    def header(self) -> tuple[bytes, list[tuple[str, LazyTensor, int]]]:
        """The first bytes of the file, and the tensors as they follow, end to end: (name, tensor, offset from the end of these bytes). The
        zeros that pad a GGUF file are among them under an empty name."""
        return make_gguf_header(self.keys, self.tensors) if self.keys else make_header(self.tensors, SHARD_METADATA)


@dataclass(frozen=True)
class Settings:
    """How a plan is carried out, without effect on what is written. `jobs` threads make `window` bytes each at a time; `drop_cache` drops
    what was read from the system's page cache; `upload` says that the output goes over a network; `in_flight` shards are written at the
    same time, by these jobs together.
    """

    jobs: int = 2
    window: int = WINDOW_BYTES
    drop_cache: bool = True
    upload: bool = False
    in_flight: int = 1

    @property
    def of_one_shard(self) -> Settings:
        """What one of the shards in flight is written with."""
        return replace(self, jobs=max(1, self.jobs // self.in_flight), in_flight=1)


@dataclass(frozen=True)
class Plan:
    """What `execute` does, settled before the first byte is written; a plan is plain data and can be pickled.

    `shards` are the weight files, `config` is config.json, `files` are the other small files, each as its bytes or as a path to copy.
    `history` is what was done to make the tensors, as manifest and card record it, `options` what was chosen of how they are cut.
    """

    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    files: Mapping[str, bytes | Path]
    history: tuple[Step, ...]
    settings: Settings = field(default_factory=Settings)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        count = sum(len(shard.tensors) for shard in self.shards)
        done = f", by {brief(', '.join(step.operation for step in self.history))}" if self.history else ""
        return f"Plan({shards(len(self.shards))}, {count} tensors, {size(self.nbytes)}, {self.settings.jobs} jobs{done})"

    @property
    def nbytes(self) -> int:
        """Bytes of all values, without headers."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def memory(self) -> int:
        """Most resident bytes of the whole process while the plan is carried out."""
        return _memory(self.shards, self.settings)

    @property
    def identity(self) -> dict[str, str]:
        """What makes two runs the same work, by part. A run that continues compares it, and names the part that differs."""
        sources = {leaf.file for shard in self.shards for _, tensor in shard.tensors for leaf in tensor.leaves()}
        small = {name: _digest(small_bytes(name, data, LARGEST_SMALL_FILE)) for name, data in self.files.items()}
        return {
            "version": __version__,
            "command": ", ".join(step.operation for step in self.history),
            "options": json.dumps(dict(self.options), sort_keys=True),
            "inputs": "\n".join(
                sorted(f"{redact(s.path)} {s.size} bytes, changed {s.etag or s.mtime_ns}, header {s.header_sha256[:16]}" for s in sources)
            ),
            "small files": _digest(json.dumps(small, sort_keys=True).encode()),
            "tensors": _digest(repr(self.shards).encode()),
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `identity`, in hexadecimal."""
        return _digest(json.dumps(self.identity, sort_keys=True).encode())


def make_plan(
    checkpoint: CheckpointSource,
    *,
    max_shard_size: int | str = SHARD_SIZE,
    max_memory: int | str | None = None,
    jobs: int | None = None,
    options: Mapping[str, Any] | None = None,
    upload: bool = False,
    accept_values: bool = False,
    name: str | None = None,
) -> Plan:
    """Cut `checkpoint` into shards, at the boundaries and with the names that the Hub's libraries use. Nothing is written.

    `max_shard_size` is the most bytes of a shard, `max_memory` the most resident bytes of the whole process: whole numbers, or texts such
    as "5GB" (10**9 bytes each) and "512MiB" (2**20). `jobs` is the number of worker threads, from 1 to 64; without it, as many as this
    process may use processors, as far as 500 MiB suffice. With 4 or more, several shards are written at a time. `upload` says that the
    output goes over a network, which takes memory. `options` is recorded as part of what was asked for: a run with others does not
    continue this one's work. `name` is that of the model, which the two files of a GGUF output bear whatever `max_shard_size` is, by
    default the input's own.

    Samples of the local inputs are read, and zeros that stand in place of values, as in half a download, raise InputError; with
    `accept_values` they become warnings of the last step. The same holds for what is found while the plan is carried out.

    Raises UsageError for a value that an option can't have and where the work does not fit into `max_memory`, InputError where an input is
    damaged, HubError where the Hub can't serve it.
    """
    limit, memory = parse_size(max_shard_size, "max-shard-size"), None if max_memory is None else parse_size(max_memory, "max-memory")
    if jobs is not None:
        whole_number("jobs", jobs, most=MOST_JOBS)
    if options is not None and not isinstance(options, Mapping):
        raise UsageError(f"`options` is of the type `{type(options).__name__}`, no mapping", hint="give a dict, or leave it out")
    checkpoint = opened(checkpoint, "checkpoint")
    watch = _watch(checkpoint, accept_values)
    watch.survey()
    shards = _gguf_shards(checkpoint, name, watch) if checkpoint.gguf else _shards(checkpoint, limit, watch)
    config = json_bytes(dict(checkpoint.config))
    files: dict[str, bytes | Path] = {"config.json": config, **checkpoint.files} if checkpoint.config else dict(checkpoint.files)
    several = REMOTE_JOBS if _uses_network(shards) else 1
    settings = _usual(shards, upload, several) if jobs is None else _settings(shards, jobs * several, upload)
    if memory is not None:
        settings = _fit(shards, settings, memory)
    chosen = {**({} if checkpoint.gguf else {"max_shard_size": limit}), **(options or {})}
    history = accepted(checkpoint.history, (hole.text for hole in sorted(watch.found)))
    return Plan(shards, checkpoint.config, files, history, settings, chosen)


def _watch(checkpoint: Checkpoint, accept: bool) -> Watch:
    if checkpoint.history:
        roles = {file.path: role for step in checkpoint.history for role, origin in step.inputs for file in origin.files}
    else:  # as it was opened, to cut it anew
        roles = dict.fromkeys((file.path for file in checkpoint.origin.files), role_of(checkpoint))
    leaves = ((name, leaf) for name, tensor in checkpoint.tensors.items() for leaf in tensor.leaves())
    return Watch(leaves, roles, accept=accept)


def accepted(history: tuple[Step, ...], holes: Iterable[str]) -> tuple[Step, ...]:
    """`history` with a warning in its last step for each of these holes that no warning names yet."""
    known = {warning.rpartition(": ")[0] for step in history for warning in step.warnings}  # one range may have two reasons
    new = hole_sentences(text for hole in holes if (text := f"accepted all the same: {hole}").rpartition(": ")[0] not in known)
    if not history or not new or any(warning.endswith(MORE) for step in history for warning in step.warnings):
        return history
    return (*history[:-1], replace(history[-1], warnings=(*history[-1].warnings, *new)))


def _gguf_shards(checkpoint: Checkpoint, name: str | None, watch: Watch) -> tuple[Shard, ...]:
    """The files of a GGUF output, called after `name`, or after the input. Raises UsageError for one that no file can have."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint.origin.name).strip("-.") or "model" if name is None else name
    if not isinstance(name, str) or not name or len(name) > MAX_NAME or not is_text(name) or not name.isprintable() or "/" in name:
        raise UsageError(f"{shown(str(name))} can't be the name of a GGUF file", hint="choose another name for the output")
    return tuple(
        Shard(file.file_name(name), tuple((each, checkpoint.tensors[each]) for each in file.names), watch, file.named(name))
        for file in checkpoint.gguf
    )


def _shards(checkpoint: Checkpoint, limit: int, watch: Watch) -> tuple[Shard, ...]:
    """A checkpoint cut into files of at most `limit` bytes, an adapter in one file. Raises UsageError for an adapter that is larger."""
    from huggingface_hub import split_state_dict_into_shards_factory as split

    tensors, stem = checkpoint.tensors, Path(STANDARD["safetensors"][0])
    if ADAPTER_CONFIG in checkpoint.files:
        stem = Path(ADAPTER_FILES[0]).with_suffix("")
        if checkpoint.nbytes > limit:
            what = f"the adapter has {checkpoint.nbytes:,} bytes, and PEFT reads an adapter from one file"
            hint = f"pass `--max-shard-size {-(-checkpoint.nbytes // 10**6)}MB` or more"
            raise UsageError(what, facts={"--max-shard-size": f"{limit:,} bytes"}, hint=hint)
    found = split(
        dict(tensors), get_storage_size=lambda tensor: tensor.nbytes, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=limit
    )
    return tuple(Shard(file, tuple((name, tensors[name]) for name in names), watch) for file, names in found.filename_to_tensors.items())


def _settings(shards: tuple[Shard, ...], jobs: int, upload: bool, window: int = WINDOW_BYTES) -> Settings:
    """Settings with as many shards in flight as these jobs keep busy; one where a network is the slower part, and of integer deltas, whose
    compression has no other bound than the jobs."""
    packed = any(isinstance(tensor, ToInteger) for shard in shards for _, tensor in shard.tensors)
    alone = upload or packed or _uses_network(shards)
    in_flight = 1 if alone else max(1, min(len(shards), jobs // JOBS_PER_SHARD))
    return Settings(jobs=jobs, window=window, upload=upload, in_flight=in_flight)


def _usual(shards: tuple[Shard, ...], upload: bool, several: int) -> Settings:
    """Settings with `several` jobs for each usable processor, of so many processors that the promise stays within USUAL_MEMORY; for two at
    least, since one job reads while the other computes."""
    needs = {window: _needs(shards, window) for window in USUAL_WINDOWS}
    for cores in range(min(usable_cores(), MOST_JOBS), 2, -1):
        for window in USUAL_WINDOWS:
            settings = _settings(shards, cores * several, upload, window)
            if _memory(shards, settings, needs[window]) <= USUAL_MEMORY:
                return settings
    return _settings(shards, 2 * several, upload)


def _needs(shards: tuple[Shard, ...], size: int) -> tuple[int, int]:
    """Bytes of the largest window, of about `size` bytes, and of the largest scratch beside one."""
    largest = scratch = 0
    for shard in shards:
        for window in cut(shard.tensors, 0, size):
            largest = max(largest, window.nbytes)
            scratch = max(scratch, *(piece.tensor.scratch(piece.stop - piece.start) for piece in window.pieces))
    return largest, scratch


def _memory(shards: tuple[Shard, ...], settings: Settings, needs: tuple[int, int] | None = None) -> int:
    """The promise of `Plan.memory`. `needs` are those of the settings' window, where they are known already."""
    largest, scratch = needs or _needs(shards, settings.window)
    uses_torch = any(tensor.uses_torch for shard in shards for _, tensor in shard.tensors)
    buffers = (settings.jobs + settings.in_flight * BUFFERS_BEYOND_JOBS) * largest + settings.jobs * (2 * scratch + SPARE_BYTES)
    network = (_uses_network(shards) or settings.upload) * WITH_NETWORK + settings.upload * UPLOADING
    return (WITH_TORCH if uses_torch else INTERPRETER) + network + buffers + settings.in_flight * READ_BACK_BYTES


def _uses_network(shards: tuple[Shard, ...]) -> bool:
    return any(leaf.file.remote for shard in shards for _, tensor in shard.tensors for leaf in tensor.leaves())


def _fit(shards: tuple[Shard, ...], settings: Settings, limit: int) -> Settings:
    """The largest window, then the fewest jobs, that keep the promise within `limit`."""
    for jobs in range(settings.jobs, 0, -1):
        window = settings.window
        while window >= SMALLEST_WINDOW:
            tried = _settings(shards, jobs, settings.upload, window)
            if _memory(shards, tried) <= limit:
                return tried
            window //= 2
    least = _memory(shards, _settings(shards, 1, settings.upload, SMALLEST_WINDOW))
    what = f"`--max-memory` is too small: this work needs {least:,} bytes"
    raise UsageError(what, facts={"given": f"{limit:,} bytes"}, hint=f"pass `--max-memory {-(-least // 10**6)}MB` or more")


_UNITS = {"": 1, "B": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9, "T": 10**12, "TB": 10**12,
          "KIB": 1 << 10, "MIB": MiB, "GIB": 1 << 30, "TIB": 1 << 40}  # fmt: skip


def parse_size(size: int | str, option: str) -> int:
    """Bytes of "5GB" (decimal, as on the Hub), "512MiB" or a whole number of bytes. Raises UsageError for anything else, and for what
    nobody can mean: more than a PiB, a text of less than 1 kB, or one without a unit of less than 1 MB."""
    if type(size) is int:
        return whole_number(option.replace("-", "_"), size, most=LARGEST_SIZE)
    found = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)", str(size).strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise UsageError(f"`--{option} {size}` is not a size", hint="write it as 5GB, 500MB or 512MiB")
    nbytes = float(found[1]) * unit
    if nbytes < (1_000 if found[2] else 1_000_000):
        hint = f"write the unit: {found[1]}GB" if not found[2] and nbytes else "write it as 5GB, 500MB or 512MiB"
        raise UsageError(f"`--{option} {size}` is {nbytes:g} bytes, too little", hint=hint)
    if nbytes > LARGEST_SIZE:
        raise UsageError(f"`--{option} {size}` is more than any file system holds", hint="write it as 5GB, 500MB or 512MiB")
    return int(nbytes)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
