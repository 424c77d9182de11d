"""Mend a checkpoint where it lies: what its records say is damaged or missing is taken from another copy, range by range where it can be.

    PATH/.NAME.repair        the file as it is put together: its own good ranges, and those of the other copy
    PATH/.NAME.repair.done   one line for each range that was taken, with an XXH3-128 of its bytes

A file gets its name in one rename, and only once the bytes on the disk have the digest that PATH itself, or else the Hub, states for it.
Tensor digests, zip CRCs and sizes only tell which ranges to take. No order on the disk is needed between the two files: a range counts
where its bytes, read again, have the checksum of its line, so a run that was killed is continued by the next.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import CheckpointSource, place_of
from ..checkpoint.manifest import (
    GIT,
    MANIFEST,
    SUMS,
    Manifest,
    Sum,
    TensorEntry,
    find_manifest,
    make_sums,
    manifest_path,
    read_sums,
    sums_path,
)
from ..checkpoint.rehash import made_rows, rehash
from ..errors import MOST_JOBS, InputError, Interrupted, LlavaWeightsError, MismatchError, OutputError, whole_number
from ..events import Listener, Progress, Started, check_listener, silent
from ..families.files import GGUF_SUFFIX, WEIGHT_SUFFIXES
from ..formats.folder import inside
from ..formats.safetensors import make_header
from ..storage.atomic import make_folder, naming, output_error, remove, sync_folder, write_file
from ..storage.digests import FILES, READ_BACK, digest_of, new_digest
from ..storage.hub import HubSource, choose_files, parse_source, source_text
from ..storage.reading import SourceFile, Workspace, drop_cache, present
from ..storage.remote import is_remote
from ..storage.threads import in_threads
from ..tensors.lazy import LazyTensor
from ..tensors.sampling import even
from ..tensors.windows import WINDOW_BYTES
from ..text import listed, shown, size
from ..write.shard import allocate
from ..write.work_folder import lock
from .checksums import counted
from .other_copy import Layout, OtherCopy, layout_here, layout_of, open_other, read_range

WEIGHTS = (*WEIGHT_SUFFIXES, GGUF_SUFFIX)
PROVING = (FILES, "sha512", GIT)  # digests of files that prove what comes from elsewhere; md5 and sha1 can be forged, a commit holds git's
PIECE_BYTES = 16 << 20  # of what is taken without a digest of its own: as much is lost where a run is cut off
SAMPLES, SAMPLE_BYTES = 16, 1024  # of a weight file, to see whether it is the other copy's, only damaged
ALIKE = 0.5  # least share of samples that are the same there: damage leaves most bytes, other weights share none but zeros
KEPT = "what was fetched is kept in hidden files, and every other file is right or as it was: the same command continues"


@dataclass(frozen=True)
class RepairedFile:
    """What became of one file that is not as recorded. `state` is "mended", "to mend" (in a dry run) or "refused", `problem` what is wrong
    with it, `reason` why it was refused, "" where it was not. `fetched` bytes of its `nbytes` come from the other copy.
    """

    name: str
    state: str
    problem: str
    reason: str = ""
    nbytes: int = 0
    fetched: int = 0


@dataclass(frozen=True)
class Repair:
    """What `repair` did, or would do. `name` is that of the checkpoint, `source` the other copy, `by` what says how the files must be.

    `right` files are as recorded and were not touched, `files` are all others. `notes` are sentences worth reading.
    """

    name: str
    source: str
    by: str
    right: int
    files: tuple[RepairedFile, ...]
    dry_run: bool = False
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        states = Counter(file.state for file in self.files)
        return f"Repair({self.name!r}, {', '.join(f'{count} {state}' for state, count in states.items()) or 'nothing to repair'})"

    @property
    def fetched(self) -> int:
        """Bytes of values and files that came, or would come, from the other copy; headers that are read to plan are not counted."""
        return sum(file.fetched for file in self.files)

    @property
    def exit_code(self) -> int:
        """0 where every file is as recorded now, or would be; 3 where one could not be mended."""
        return 3 if any(file.state == "refused" for file in self.files) else 0

    def lines(self) -> list[str]:
        """The report, line by line."""
        states = Counter(file.state for file in self.files)
        counts = [f"{counted(states[state], 'file')} {state}" for state in ("mended", "to mend", "refused") if states[state]]
        done = f"{', '.join(counts)}; {size(self.fetched)} {'to fetch' if self.dry_run else 'fetched'} from {self.source}"
        rows = [f"{self.name}: {done if counts else 'nothing to repair'}; {counted(self.right, 'file')} as recorded (by {self.by})"]
        for file in self.files:
            share = f"; {size(file.fetched)} of {size(file.nbytes)} from the other copy" if file.state != "refused" else ""
            rows.append(f"  {file.state:8} {shown(file.name)}: {file.problem}{share}")
            rows += [f"  {'':8} -> {file.reason}"] if file.reason else []
        return rows + [f"  {'note':8} {note}" for note in self.notes]

    def document(self) -> dict[str, Any]:
        """The same as plain data, for `--json`."""
        return {**asdict(self), "fetched": self.fetched, "exit_code": self.exit_code}


@dataclass(frozen=True)
class _Recorded:
    """How a file must be. `nbytes` is None where that is not recorded."""

    name: str
    algorithm: str
    digest: str
    nbytes: int | None = None


@dataclass(frozen=True)
class _Records:
    """What PATH states of its files, and where it states nothing, the Hub. `others` are second opinions: name -> digests."""

    files: Mapping[str, _Recorded]
    by: str
    own: bool
    manifest: Manifest | None = None
    others: Mapping[str, tuple[Sum, ...]] = field(default_factory=dict)
    refused: tuple[RepairedFile, ...] = ()


@dataclass(frozen=True)
class _Span:
    """Bytes [start, stop) of a file, to be taken from the same place in a file there, from a tensor there, or from bytes that are known.
    `digest` is that of the values, by an algorithm, where one is known."""

    start: int
    stop: int
    source: SourceFile | LazyTensor | bytes
    digest: tuple[str, str] | None = None

    @property
    def fetched(self) -> int:
        """Bytes that come from the other copy."""
        return 0 if isinstance(self.source, bytes) else self.stop - self.start


@dataclass(frozen=True)
class _Work:
    """How a file is mended: the ranges of each round, where a further round follows only while the whole is not right. `here` is the
    damaged file, of which all is kept that the first round does not take; None where it is missing."""

    file: RepairedFile
    recorded: _Recorded
    target: Path
    here: SourceFile | None
    rounds: tuple[tuple[_Span, ...], ...]
    right: float | None = None  # share of its values that have the recorded digests of tensors; None: not known

    def of(self, *rounds: tuple[_Span, ...]) -> _Work:
        """The same with these rounds, without empty ones."""
        kept = tuple(filter(None, rounds)) or ((),)
        return replace(self, file=replace(self.file, fetched=sum(span.fetched for span in kept[0])), rounds=kept)


class _Differs(Exception):
    """Bytes of the other copy are not those that are recorded."""


def repair(
    path: str | os.PathLike[str], source: CheckpointSource, *, dry_run: bool = False, jobs: int = 2, on_event: Listener = silent
) -> Repair:
    """Mend a checkpoint in place: what is damaged, cut short or missing by its own records comes from the other copy `source`.

    `path` is a folder or a weight file of this machine. Its manifest or SHA256SUMS says how each file must be; where it has neither, and
    `source` is on the Hub, the Hub's digests do. All of it is read. `source` is a folder, a file, `owner/name[@revision]`, `hf://`,
    `https://`, `s3://` or `gs://`, in any sharding, and for tensors in any container: of each damaged file only the tensors that are
    damaged are fetched, where digests of tensors (or CRCs of a zip) tell which. A new file is put together beside the damaged one, read
    back, and takes its name only if it has the recorded digest, so nothing becomes worse; files that are right are not touched, and a
    hard link to a damaged file keeps its bytes. With `dry_run` nothing is written. `jobs` is the number of threads, from 1 to 64.
    `on_event` is called with each Event, such as a ProgressBar.

    What could not be mended is in the result, and raises nothing. A call that is cut off is continued by the same call. Raises UsageError
    for options that can't be, InputError where nothing states what `path` must be, or an input is no checkpoint, MismatchError where the
    weights are rather other ones than damaged, HubError where the Hub or a server fails, OutputError where the files can't be written,
    Interrupted on Ctrl-C.
    """
    check_listener(on_event)
    whole_number("jobs", jobs, most=MOST_JOBS)
    place = _own_place(path)
    other = open_other(source, place)
    home = place if place.is_dir() else place.parent
    try:
        with _held(home, dry_run):
            records = _records(place, other)
            works, refused, right = _examine(place, records, other, jobs, on_event)
            _check_revision(works, right, other, records)
            notes = [f"{shown(name)} has other names (hard links), which keep the damaged bytes" for name in _linked(works)]
            files = [*records.refused, *refused]
            if not dry_run:
                _sweep(home, right)
            files += _carry_out(works, other, jobs, on_event) if works and not dry_run else [work.file for work in works]
            files += _mend_sums(place, records, files, dry_run=dry_run)
    except OSError as error:
        raise output_error(error, home) from error
    except KeyboardInterrupt as error:
        raise Interrupted.of(error, KEPT) from error
    return Repair(place.resolve().name, other.label, records.by, len(right), tuple(files), dry_run, tuple(notes))


def _own_place(path: object) -> Path:
    """The folder or weight file to repair. Raises InputError where it is not on this machine, or is neither."""
    given = place_of(path, "checkpoint")  # type: ignore[arg-type]  # it checks what it is
    text = source_text(given)
    where = None if is_remote(text) else parse_source(text)
    if where is None or isinstance(where, HubSource):
        raise InputError(
            f"`{text}` is not on this machine, where alone files are repaired", hint="give the folder that it was downloaded to"
        )
    if not (where.path.is_dir() or (where.path.is_file() and where.path.suffix in WEIGHTS)):
        raise InputError(
            f"{shown(where.path.name)} is no folder and no weight file", facts={"path": where.path}, hint="give the checkpoint"
        )
    return where.path


@contextmanager
def _held(home: Path, dry_run: bool) -> Iterator[None]:
    """One repair of a folder at a time. Raises OutputError where another is at work, or nothing can be written there."""
    if dry_run:
        yield
        return
    if not os.access(home, os.W_OK | os.X_OK):
        what = f"can't write in `{home.resolve().name}`: permission denied, or read-only"
        raise OutputError(what, facts={"folder": home}, hint="change its permissions, or copy it and repair the copy")
    fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with naming(home):
            lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise OutputError(f"`{home.resolve().name}` is being repaired by another run", hint="wait for it to end") from error
    finally:
        os.close(fd)


# --- how the files must be ------------------------------------------------------------------------------------------


def _records(place: Path, other: OtherCopy) -> _Records:
    """What is stated of the files of `place`. Raises InputError where nothing is."""
    manifest, sums, broken = None, {}, {}
    try:
        manifest = find_manifest(place)
    except InputError as error:
        broken[manifest_path(place).name] = error.what
    listing = sums_path(place)
    if present(listing):
        try:
            sums = {entry.path: entry for entry in read_sums(listing) if entry.algorithm in PROVING}
        except InputError as error:
            broken[listing.name] = error.what
    if manifest:
        files = {name: _Recorded(name, FILES, entry.sha256, entry.size) for name, entry in manifest.files.items()}
    else:
        files = {entry.path: _Recorded(entry.path, entry.algorithm, entry.digest) for entry in sums.values()}
    own, by = bool(files), "its manifest" if manifest else listing.name
    if not own:
        files, by = {name: _by_hub(name, other) for name in _of_the_model(place, other)}, other.label
    elif place.is_dir() and (names := _records_by_hub(files, manifest, other)):
        files |= {name: _by_hub(name, other) for name in names}
    if not files:
        facts = {"found": "; ".join(broken.values())} if broken else {"looked for": f"{MANIFEST}, {SUMS}"}
        hint = "give a revision of the Hub as `--from`: its digests say what the files must be"
        raise InputError(f"nothing states what {shown(place.resolve().name)} must be", facts=facts, hint=hint)
    others: dict[str, tuple[Sum, ...]] = {}
    for name in files if own else ():
        others[name] = tuple(entry for entry in (sums.get(name), other.sums.get(name)) if entry and entry.digest != files[name].digest)
    lost = [name for name in broken if name not in files and not (manifest and name == listing.name)]
    hint = "nothing states what it must be: `llava-weights checksum --force` writes a new one once all other files are right"
    refused = tuple(RepairedFile(name, "refused", f"damaged ({broken[name]})", hint) for name in lost)
    return _Records(files, by, own, manifest, others, refused)


def _by_hub(name: str, other: OtherCopy) -> _Recorded:
    entry, file = other.sums[name], other.find(name)
    return _Recorded(name, entry.algorithm, entry.digest, file.size if file else None)


def _records_by_hub(files: Mapping[str, _Recorded], manifest: Manifest | None, other: OtherCopy) -> list[str]:
    """The manifest as the Hub has it, where PATH has lost its own; only if the Hub and PATH agree on all that both state."""
    both = [(recorded.digest, other.stated(name, recorded.algorithm)) for name, recorded in files.items()]
    agree = any(stated for _, stated in both) and all(digest == stated for digest, stated in both if stated)
    return [MANIFEST] if agree and not manifest and MANIFEST not in files and MANIFEST in other.sums else []


def _of_the_model(place: Path, other: OtherCopy) -> list[str]:
    """The files of the Hub that are the checkpoint at `place`: of a repository that has its weights in two formats, those of one."""
    if place.is_file():
        return [place.name] if place.name in other.sums else []
    here = {name for name in other.sums if os.path.lexists(place / name)}
    kinds = {Path(name).suffix for name in here if name.endswith(WEIGHTS)}

    def other_format(name: str) -> bool:
        return bool(kinds) and Path(name.removesuffix(".index.json")).suffix in {*WEIGHTS} - kinds

    chosen = choose_files(name for name in other.sums if not other_format(name))
    weights = {name for name in here if name.endswith(WEIGHTS)}
    return sorted({*chosen, *weights, *({MANIFEST, SUMS} & {*other.sums})})


def _mend_sums(place: Path, records: _Records, files: Sequence[RepairedFile], *, dry_run: bool) -> list[RepairedFile]:
    """Write SHA256SUMS as the manifest has it, where it is missing, damaged or says something else; not where a file is refused, since
    the one that is wrong may be the manifest."""
    listing, manifest = sums_path(place), records.manifest
    contradicted = any(file.state == "refused" for file in files)
    if manifest is None or manifest.path != manifest_path(place) or listing.name in records.files or contradicted:
        return []
    problem = "missing"
    if present(listing):
        problem = "damaged"
        with suppress(InputError):
            known = {entry.path: entry.digest for entry in read_sums(listing) if entry.algorithm == FILES}
            if all(known.get(name) == entry.sha256 for name, entry in manifest.files.items()):
                return []
            problem = "not what the manifest says"
    data = make_sums(list(manifest.files.values()))
    if not dry_run:
        write_file(listing, data)
    return [RepairedFile(listing.name, "to mend" if dry_run else "mended", problem, nbytes=len(data))]


# --- what is wrong, and how it can be mended ------------------------------------------------------------------------


def _examine(
    place: Path, records: _Records, other: OtherCopy, jobs: int, on_event: Listener
) -> tuple[list[_Work], list[RepairedFile], list[str]]:
    """Read every recorded file: what is to be done, what can't be done, and the files that are right."""
    home = place if place.is_dir() else place.parent
    targets: dict[str, Path] = {}
    refused: list[RepairedFile] = []
    for name in records.files:
        try:
            targets[name] = _target(home, name)
        except InputError as error:
            refused.append(RepairedFile(name, "refused", error.what, error.hint or ""))
    there = {name: target for name, target in targets.items() if target.is_file() and not target.is_symlink()}
    algorithms = {records.files[name].algorithm for name in there}
    algorithms |= {entry.algorithm for name in there for entry in records.others.get(name, ())}
    found = rehash(there, {}, algorithms=tuple(sorted(algorithms)), jobs=jobs, on_event=on_event).files if there else {}
    works, right = [], []
    for name, target in targets.items():
        recorded, digests = records.files[name], found.get(name, {})
        if digests.get(recorded.algorithm) == recorded.digest:
            right.append(name)
            continue
        planned = _contested(recorded, digests, records, other) or _plan(recorded, target, there.get(name), records, other, jobs)
        works += [planned] if isinstance(planned, _Work) else []
        refused += [planned] if isinstance(planned, RepairedFile) else []
    return works, refused, right


def _target(home: Path, name: str) -> Path:
    """The file that is to be replaced for `name`: behind a link that stays in the folder or in the Hub's cache, where the link leads; a
    link to nothing is replaced itself. Raises InputError for one that leads elsewhere, and for what is no file."""
    path = home / name
    inside(home, str(Path(name).parent))
    if path.is_symlink() and not path.exists():
        return Path(os.path.realpath(path.parent)) / path.name
    target = Path(os.path.realpath(inside(home, name)))
    if os.path.lexists(target) and not stat.S_ISREG(os.lstat(target).st_mode):
        raise InputError(f"{shown(name)} is no regular file", hint="move it elsewhere")
    return target


def _contested(recorded: _Recorded, digests: Mapping[str, str], records: _Records, other: OtherCopy) -> RepairedFile | None:
    """The refusal of a file that is not as recorded, but is what another statement says: it is not damaged, one of the two is wrong."""
    for entry in records.others.get(recorded.name, ()):
        if digests.get(entry.algorithm) == entry.digest:
            whose = other.label if entry == other.sums.get(recorded.name) else SUMS
            reason = f"it is the file that {whose} states: see which of the two is right, and make the records anew with `checksum --force`"
            return RepairedFile(recorded.name, "refused", f"not the file of {records.by}", reason, recorded.nbytes or 0)
    return None


def _plan(recorded: _Recorded, target: Path, here: Path | None, records: _Records, other: OtherCopy, jobs: int) -> _Work | RepairedFile:
    """How one file is mended, or why it can't be."""
    name, (twin, why_not) = recorded.name, _twin(recorded, other)
    was = here.stat().st_size if here else 0
    nbytes = recorded.nbytes if recorded.nbytes is not None else twin.size if twin else was
    problem = "missing" if here is None else "damaged" if was == nbytes else f"{counted(was, 'byte')} long, not {nbytes:,}"
    refused = RepairedFile(name, "refused", problem, f"{other.label} has no copy of it: {why_not}", nbytes)
    work = _Work(replace(refused, state="to mend", reason=""), recorded, target, SourceFile.at(here) if here else None, ())
    own = _entries(name, records.manifest)
    hinted = _hinted(recorded, other) if twin and here and not own and name.endswith(WEIGHTS) else {}
    if hinted is None:
        return replace(refused, reason=f"{other.label} has another file of this name, by its manifest")
    rest = _pieces(twin, [(0, nbytes)])
    if (here or not twin) and (own or hinted) and (rounds := _by_tensors(work, own or hinted, twin, other, jobs)):
        found, share, ranges = rounds
        text = problem if here is None or was != nbytes else f"damaged{found}"
        return replace(work, file=replace(work.file, problem=text), right=share).of(*ranges, () if own else rest)
    if twin is None:
        return refused
    likely = _likely(work, twin, jobs) if name.endswith(WEIGHTS) else []
    return work.of(_pieces(twin, likely), rest)


def _by_tensors(
    work: _Work, expected: Mapping[str, TensorEntry], twin: SourceFile | None, other: OtherCopy, jobs: int
) -> tuple[str, float | None, list[tuple[_Span, ...]]] | None:
    """Which tensors are damaged, in words, the share of bytes that are right, and the rounds that take the others from there; None where it
    is not known where they lie, or where one of them is nowhere. What lies between the tensors is believed at first where the header is
    sound, and taken from there or made anew where it is not: the file's digest judges it."""
    nbytes, here, known = work.file.nbytes, work.here, None
    layout = layout_here(Path(here.path), nbytes) if here else None
    sound = _same_kinds(layout, expected)
    if not sound and twin:
        known, layout = other.layout(work.recorded.name)
    if work.recorded.name.endswith(".safetensors") and not (twin and _same_kinds(layout, expected)):
        head, made = _made_header(expected, nbytes)
        if made and (not sound or all(layout and layout[name].offset == tensor.offset for name, tensor in made.items())):
            known, layout = head, made
    if layout is None or not _same_kinds(layout, expected):
        return None
    bad = list(expected)
    if here:
        tensors = {name: replace(tensor, file=here) for name, tensor in layout.items()}
        algorithm = next(iter(expected.values())).algorithm
        read = rehash({work.recorded.name: Path(here.path)}, tensors, tensor_algorithms=(algorithm,), jobs=jobs).tensors
        bad = [name for name, entry in expected.items() if name not in read or not read[name].same_values(entry)]
    spans: dict[int, _Span] = {}
    for name in bad:
        entry, start = expected[name], layout[name].offset
        source = twin or other.tensor(entry)
        if source is None:
            return None
        if entry.nbytes:
            spans[start] = _Span(start, start + entry.nbytes, source, (entry.algorithm, entry.digest))
    gaps = _gaps(layout, nbytes)
    between = _pieces(twin, gaps) if known is None else tuple(_Span(start, stop, known[start:stop]) for start, stop in gaps)
    first = tuple(spans.values())
    if not first and not between:
        return None
    text = f" in {len(bad):,} of {counted(len(expected), 'tensor')}" if bad else " beside its tensors"
    total = sum(entry.nbytes for entry in expected.values())
    share = 1 - sum(expected[name].nbytes for name in bad) / total if here and total else None
    return text, share, [first, between] if sound and first else [(*first, *between)]


def _likely(work: _Work, twin: SourceFile, jobs: int) -> list[tuple[int, int]]:
    """Ranges that are probably all that is wrong: what a file that is cut short lacks, if it begins and ends as there, and records of a
    zip with another CRC-32."""
    here, nbytes = work.here, work.file.nbytes
    if here is None or not SAMPLE_BYTES <= here.size <= nbytes:
        return []
    if here.size < nbytes:
        places = ((0, SAMPLE_BYTES), (here.size - SAMPLE_BYTES, here.size))
        same = all(read_range(here, *place) == read_range(twin, *place) for place in places)
        return [(here.size, nbytes)] if same else []
    layout = layout_here(Path(here.path), nbytes) or {}
    broken = rehash({work.recorded.name: Path(here.path)}, layout, jobs=jobs).broken.get(work.recorded.name, ())
    return sorted({(record.offset, record.offset + record.size) for name in broken if (record := layout[name].record)})


def _twin(recorded: _Recorded, other: OtherCopy) -> tuple[SourceFile | None, str]:
    """The file of this name there, where it may be the recorded one; else why it can't be."""
    file = other.find(recorded.name)
    if file is None:
        return None, "it is not there"
    if recorded.nbytes not in (None, file.size):
        return None, f"it has {file.size:,} bytes there, {recorded.nbytes:,} are recorded"
    stated = other.stated(recorded.name, recorded.algorithm)
    if stated and stated != recorded.digest:
        return None, f"it is another file there, with the {recorded.algorithm} {stated[:12]}..., recorded is {recorded.digest[:12]}..."
    return file, ""


def _entries(name: str, manifest: Manifest | None) -> dict[str, TensorEntry]:
    return {key: entry for key, entry in manifest.tensors.items() if entry.shard == name} if manifest else {}


def _hinted(recorded: _Recorded, other: OtherCopy) -> dict[str, TensorEntry] | None:
    """Digests of its tensors by the manifest there, if that is of the same file; None where it is of another one."""
    entry = other.manifest.files.get(recorded.name) if other.manifest else None
    if entry is None or recorded.algorithm != FILES:
        return {}
    return _entries(recorded.name, other.manifest) if entry.sha256 == recorded.digest else None


def _same_kinds(layout: Layout | None, expected: Mapping[str, TensorEntry]) -> bool:
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in (layout or {}).items()}
    return found == {name: (entry.dtype, entry.shape) for name, entry in expected.items()}


def _made_header(entries: Mapping[str, TensorEntry], nbytes: int) -> tuple[bytes | None, Layout | None]:
    """The header that this library writes for these tensors, and where they then lie; None where the file would have another size."""
    try:
        head, _ = make_header(
            [(name, LazyTensor(dtype=entry.dtype, shape=entry.shape)) for name, entry in entries.items()], {"format": "pt"}
        )
    except ValueError:  # a name that a safetensors file can't hold
        return None, None
    layout = layout_of(head, SourceFile("", nbytes, 0, 0))
    return (head, layout) if layout else (None, None)


def _gaps(layout: Layout, nbytes: int) -> list[tuple[int, int]]:
    """The bytes of a file that are of no tensor."""
    gaps, end = [], 0
    for start, stop in sorted((tensor.offset, tensor.offset + tensor.nbytes) for tensor in layout.values()):
        if start > end:
            gaps.append((end, start))
        end = max(end, stop)
    return [*gaps, (end, nbytes)] if end < nbytes else gaps


def _pieces(twin: SourceFile | None, ranges: Iterable[tuple[int, int]]) -> tuple[_Span, ...]:
    """Spans of at most PIECE_BYTES that take these ranges from the file of the same name; none where there is none."""
    starts = [(first, min(first + PIECE_BYTES, stop)) for start, stop in ranges for first in range(start, stop, PIECE_BYTES)]
    return tuple(_Span(start, stop, twin) for start, stop in starts) if twin else ()


def _check_revision(works: Sequence[_Work], right: Sequence[str], other: OtherCopy, records: _Records) -> None:
    """See that the weights are the recorded ones, damaged, and not a later save over them, nor another model or revision of the Hub.

    A sound file of the recorded tensors with other values is a save. What only the Hub states holds for PATH if a weight file is right,
    or samples of a damaged one are; where no weights are there to look at, if a small file is right. Raises MismatchError.
    """
    damaged = [work for work in works if work.here and work.recorded.name.endswith(WEIGHTS)]
    if saves := [work.recorded.name for work in damaged if _is_a_save(work, other, records)]:
        what = f"{listed(saves)} {'is' if len(saves) == 1 else 'are'} not damaged, but other weights than those of {records.by}"
        keep = "keep a later save by new records (`checksum --force`)" if records.own else "give the revision that it was downloaded from"
        hint = f"{keep}, or move the files away: then those of {records.by} are fetched"
        raise MismatchError(what, facts={"alike": f"less than {ALIKE:.0%} of the values"}, hint=hint)
    if records.own or not works or any(name.endswith(WEIGHTS) for name in right):
        return
    samples = [_alike(work, other) for work in damaged]
    if not any(same >= ALIKE * looked for same, looked in samples if looked) and (any(looked for _, looked in samples) or not right):
        what = f"nothing shows that this is {other.label}, damaged: it may be another revision, or another model"
        hint = "give the revision that it was downloaded from, or move the files away and download it"
        raise MismatchError(what, facts={"files that are the same there": len(right)}, hint=hint)


def _is_a_save(work: _Work, other: OtherCopy, records: _Records) -> bool:
    """Whether a file that is not as recorded has a sound header for the recorded tensors, and mostly other values."""
    if work.here is None or work.here.size != work.file.nbytes or (work.right is not None and work.right >= ALIKE):
        return False
    layout, expected = layout_here(Path(work.here.path), work.file.nbytes), _entries(work.recorded.name, records.manifest)
    if layout is None or (expected and not _same_kinds(layout, expected)):
        return False
    same, looked = _alike(work, other)  # a digest says nothing of a tensor that is nearly right
    return same < ALIKE * looked if looked else work.right is not None


def _alike(work: _Work, other: OtherCopy) -> tuple[int, int]:
    """How many samples of a damaged file are the same in the other copy's, and how many were looked at: those that are not zeros here."""
    here, twin, same, looked = work.here, other.find(work.recorded.name), 0, 0
    if here is None or twin is None:
        return 0, 0
    for number in even(min(here.size, twin.size) // SAMPLE_BYTES, SAMPLES):
        place = number * SAMPLE_BYTES, (number + 1) * SAMPLE_BYTES
        data = read_range(here, *place)
        looked += any(data)
        same += any(data) and data == read_range(twin, *place)
    return same, looked


# --- putting a file together ----------------------------------------------------------------------------------------


class _Meter:
    """Tells how many bytes of all are fetched. Used by many threads."""

    def __init__(self, works: Sequence[_Work], on_event: Listener) -> None:
        self.turn, self.done, self.on_event = threading.Lock(), 0, on_event
        on_event(Started(len(works), sum(work.file.fetched for work in works), what="Fetching"))

    def add(self, nbytes: int, name: str) -> None:
        with self.turn:
            self.done += nbytes
            self.on_event(Progress(self.done, name))


def _sweep(home: Path, right: Iterable[str]) -> None:
    """Delete what an earlier run left of files that are right by now."""
    for name in right:
        path = _part_path(_target(home, name))
        for stray in (path, _list_path(path)):
            if present(stray):
                remove(stray)


def _part_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.repair")


def _list_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.done")


def _carry_out(works: Sequence[_Work], other: OtherCopy, jobs: int, on_event: Listener) -> list[RepairedFile]:
    """Mend one file after the other."""
    meter, done = _Meter(works, on_event), []
    for work in works:
        try:
            make_folder(work.target.parent)
            with _open_part(work) as part:
                done.append(part.make(other, jobs, meter))
        except OSError as error:
            failure = output_error(error, work.target)
            failure.kept = KEPT
            raise failure from error
        except LlavaWeightsError as error:
            error.kept = KEPT
            raise
    return done


class _Part:
    """The file in which another one is put together. Made by `_open_part`. Ranges are taken by many threads."""

    def __init__(self, work: _Work, fd: int, path: Path) -> None:
        self.work, self.fd, self.path, self.listed = work, fd, path, _list_path(path)
        self.known = _read_lines(self.listed)
        self.resumed, self.fetched, self.worth, self.turn = False, 0, bool(self.known), threading.Lock()
        self.list_fd = os.open(self.listed, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def make(self, other: OtherCopy, jobs: int, meter: _Meter) -> RepairedFile:
        """Put the file together and give it its name, unless it does not come out right."""
        right = self._rounds(jobs, meter)
        if not right and self.resumed:  # what was kept may be of another copy
            self.known.clear()
            right = self._rounds(jobs, meter)
        self.worth = False
        if right:
            self._publish()
            return replace(self.work.file, state="mended", fetched=self.fetched)
        reason = f"{other.label} does not hold the bytes that are recorded: is it another revision, or damaged too?"
        return replace(self.work.file, state="refused", reason=reason, fetched=self.fetched)

    def _rounds(self, jobs: int, meter: _Meter) -> bool:
        """Whether the file is right after one of the rounds."""
        in_threads(self._copy, self._own_ranges(), jobs)
        try:
            for spans in self.work.rounds:
                in_threads(lambda span: self._take(span, meter), spans, jobs)
                if self._is_right():
                    return True
        except _Differs:
            return False
        return False

    def _own_ranges(self) -> list[tuple[int, int]]:
        """What is copied from the damaged file, in pieces: all that the first round does not take."""
        end = min(self.work.here.size, self.work.file.nbytes) if self.work.here else 0
        taken = sorted((span.start, span.stop) for span in self.work.rounds[0])
        ranges, at = [], 0
        for start, stop in (*taken, (end, end)):
            ranges += [(first, min(first + PIECE_BYTES, start, end)) for first in range(at, min(start, end), PIECE_BYTES)]
            at = max(at, stop)
        return ranges

    def _copy(self, piece: tuple[int, int]) -> None:
        assert self.work.here is not None
        with closing(Workspace()) as work, work.scratch(min(WINDOW_BYTES, piece[1] - piece[0])) as window:
            for start, data in _windows(self.work.here, *piece, window, work):
                self._write(data, start)

    def _take(self, span: _Span, meter: _Meter) -> None:
        """Take one range, unless it was taken before. Raises _Differs where its values are not those that are recorded."""
        with closing(Workspace()) as work:
            if self.known.get((span.start, span.stop)) == self._sum(span, work):
                self.resumed = True
                meter.add(span.fetched, self.work.recorded.name)
                return
            kept, values, at = new_digest(READ_BACK), new_digest(span.digest[0] if span.digest else READ_BACK), span.start
            for data in _bytes_of(span, work):
                kept.update(data)
                values.update(data)
                self._write(data, at)
                at += len(data)
                if span.fetched:
                    meter.add(len(data), self.work.recorded.name)
                    with self.turn:
                        self.fetched += len(data)
            work.recheck_sources()
        if span.digest and values.hexdigest() != span.digest[1]:
            raise _Differs
        text = json.dumps([span.start, span.stop, kept.hexdigest()]).encode()
        with suppress(OSError):  # a list that can't be written only costs time later
            os.write(self.list_fd, digest_of(text, READ_BACK).encode() + b" " + text + b"\n")
            self.worth = True

    def _sum(self, span: _Span, work: Workspace) -> str:
        """The checksum of the bytes that are there now."""
        found = new_digest(READ_BACK)
        with work.scratch(min(WINDOW_BYTES, span.stop - span.start)) as window:
            for start in range(span.start, span.stop, WINDOW_BYTES):
                got = os.preadv(self.fd, [window[: span.stop - start]], start)
                found.update(window[:got])
        return found.hexdigest()

    def _write(self, data: memoryview | bytes, at: int) -> None:
        with naming(self.path):
            done = 0
            while done < len(data):
                done += os.pwrite(self.fd, data[done:], at + done)

    def _is_right(self) -> bool:
        """Whether the bytes on the disk have the recorded digest."""
        with naming(self.path):
            os.fsync(self.fd)
        drop_cache(self.fd)
        algorithm = self.work.recorded.algorithm
        found = rehash({self.path.name: self.path}, {}, algorithms=(algorithm,)).files
        return found.get(self.path.name, {}).get(algorithm) == self.work.recorded.digest

    def _publish(self) -> None:
        if self.work.target.exists():
            status = self.work.target.stat()
            os.fchmod(self.fd, stat.S_IMODE(status.st_mode))
            with suppress(OSError):  # only root may
                os.fchown(self.fd, status.st_uid, status.st_gid)
        os.rename(self.path, self.work.target)
        sync_folder(self.work.target.parent)

    def close(self) -> None:
        """Both files stay for the next run, unless the work is at its end."""
        os.close(self.list_fd)
        if not self.worth:
            remove(self.listed)
            remove(self.path)


@contextmanager
def _open_part(work: _Work) -> Iterator[_Part]:
    path = _part_path(work.target)
    if present(path) and not (stat.S_ISREG(os.lstat(path).st_mode) and os.lstat(path).st_nlink == 1):
        raise OutputError(f"{shown(path.name)} is not what a repair leaves", facts={"file": path}, hint="move it elsewhere")
    with naming(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        part = _Part(work, fd, path)
        try:
            with naming(path):
                os.ftruncate(fd, work.file.nbytes)
                allocate(fd, work.file.nbytes)
            yield part
        finally:
            part.close()
    finally:
        os.close(fd)


def _bytes_of(span: _Span, work: Workspace) -> Iterator[memoryview | bytes]:
    """The bytes of a range, window by window, from where they are taken."""
    if isinstance(span.source, bytes):
        yield span.source
    elif isinstance(span.source, LazyTensor):
        yield from made_rows(span.source, work)
    else:
        with work.scratch(min(WINDOW_BYTES, span.stop - span.start)) as window:
            yield from (data for _, data in _windows(span.source, span.start, span.stop, window, work))


def _windows(file: SourceFile, start: int, stop: int, window: memoryview, work: Workspace) -> Iterator[tuple[int, memoryview]]:
    """Bytes [start, stop) of a file with their offsets, each window overwritten by the next."""
    for first in range(start, stop, len(window) or 1):
        data = window[: stop - first]
        work.read(file, first, data)
        yield first, data


def _read_lines(path: Path) -> dict[tuple[int, int], str]:
    """The checksum of each range that was taken by an earlier run; lines that are torn, or that no run wrote, are left out."""
    found = {}
    with suppress(OSError):
        for line in path.read_bytes().splitlines():
            check, _, text = line.partition(b" ")
            if digest_of(text, READ_BACK).encode() == check:
                with suppress(ValueError, TypeError, RecursionError):
                    start, stop, taken = json.loads(text)
                    found[int(start), int(stop)] = str(taken)
    return found


def _linked(works: Iterable[_Work]) -> list[str]:
    """The files that have other names."""
    return [work.recorded.name for work in works if work.here and os.path.exists(work.here.path) and os.stat(work.here.path).st_nlink > 1]
