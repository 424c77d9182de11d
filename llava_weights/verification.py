"""Is this checkpoint whole, and is it what was recorded? Structure from headers (L0), files (L2) and tensors (L3) from one reading.

What could not be checked is a finding of its own, so that silence never looks like success. Levels: facts, verify 1.4.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .against import DAMAGED, PUBLISHED, compare, counted, differing, failed, find_reference, folded, kind
from .checkpoint import Checkpoint, need_files, open_checkpoint
from .config import check_structure
from .errors import InputError, OutputError
from .events import Event
from .findings import Finding, exit_code
from .formats import listed, shown
from .formats.folder import META_FILE, META_SIZE, SUFFIXES, WEIGHTS, member
from .formats.strict_json import json_bytes
from .health import health, watch_over
from .hub import HubSource, parse_source
from .job import write_file
from .manifest import MANIFEST, SUMS, FileEntry, TensorEntry, make_manifest, make_sums, root_of_content, root_of_tensors
from .plan import Plan
from .records import Manifest, find_manifest, manifest_path, read_manifest, read_sums, sums_path
from .rehash import Reading, rehash, size_of
from .stream import output_error
from .wording import size

SMALL = 64 << 20  # bytes of a file that is no weight file, up to which it is always read; a tokenizer.json has 2 MB, optimizer.pt 100 GB
CHECKED_STRUCTURE = ("llama", "llava")  # layouts for which config.py has the rule
WRITE_SUMS = "run `llava-weights checksum` now to find any later change"
Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Verification:
    """`findings` in the order of their levels; those about `against` have the level "against", or "published".

    `facts` is plain data: counts, bytes, and the roots where the values were read (`root.tensors` names the model, whatever its files).
    """

    name: str
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any]
    against: str = ""

    @property
    def exit_code(self) -> int:
        """That of the findings; 3 where nothing recorded could be compared, however sound the rest is: not checked is not fine."""
        levels = ("against", PUBLISHED) if self.against else ("L2", "against", PUBLISHED)
        return max(exit_code(self.findings), exit_code(found for found in self.findings if found.level in levels))


@dataclass(frozen=True)
class Subject:
    """What is verified. `checkpoint` is None where it can't be opened, and `problems` say why."""

    place: Path
    checkpoint: Checkpoint | None
    manifest: Manifest | None
    sums: Mapping[str, str]  # name -> sha256, of the manifest or of SHA256SUMS beside the weights
    files: Mapping[str, Path]
    problems: tuple[Finding, ...] = ()

    @property
    def tensors(self) -> Mapping[str, Any]:
        return self.checkpoint.tensors if self.checkpoint else {}

    def is_weights(self, name: str) -> bool:
        own = {file.path for file in self.checkpoint.origin.files} if self.checkpoint else set()
        return os.path.abspath(self.files[name]) in own or bool(re.fullmatch(WEIGHTS, name) and not name.endswith(".json"))


def verify(
    path: str | Path,
    *,
    against: str | Path | None = None,
    deep: bool = False,
    jobs: int = 2,
    on_event: Listener = lambda event: None,
) -> Verification:
    """Check a folder, a weight file or a repository of the Hub, reading headers, small files and samples only unless `deep`.

    `against` is a manifest or a checkpoint (compared by tensors), a list as `sha256sum` or `md5sum` write it, `owner/name[@revision]`
    (the Hub's digests, nothing is downloaded) or "published" (the table in published.py); then the values are read where needed.
    Raises InputError where there is nothing that could be verified, HubError where the Hub can't be asked.
    """
    subject = open_subject(path)
    reference = find_reference(against, jobs=jobs, on_event=on_event) if against is not None else None
    recorded = subject.manifest.tensors if subject.manifest else {}
    everything = deep or bool(reference and (reference.tensors is None or not recorded))
    chosen = {name: file for name, file in subject.files.items() if everything or _is_read_always(subject, name)}
    algorithms, tensors = reference.algorithms if reference else ("sha256",), subject.tensors if everything else {}
    watch = watch_over(subject.checkpoint) if tensors and subject.checkpoint else None
    reading = rehash(chosen, tensors, algorithms=algorithms, jobs=jobs, on_event=on_event, watch=watch)
    findings = folded("L0", subject.place.name, _structure(subject), _structure_text(subject)) + _files(subject, reading)
    findings += [] if reference else _health(subject)  # compared with OTHER, the question is whether it is the same
    findings += _tensors(subject, reading) if everything else [_unread(subject)]
    if reference:
        findings += compare(subject.place, subject.files, recorded, reading, reference)
    return Verification(subject.place.resolve().name, tuple(findings), _facts(subject, reading), reference.label if reference else "")


def checksum(path: str | Path, *, force: bool = False, jobs: int = 2, on_event: Listener = lambda event: None) -> list[Path]:
    """Write `SHA256SUMS` and the manifest into a checkpoint's folder, or `FILE.sha256` and `FILE.manifest.json` beside a file.

    Returns what was written; what is there and says the same is left as it is. Raises OutputError where it says something else,
    unless `force`, and InputError where the checkpoint is damaged or is on the Hub.
    """
    if isinstance(parse_source(str(path)), HubSource):
        raise InputError(f"`{path}` is on the Hub, which keeps checksums itself", hint=f"run `llava-weights verify PATH --against {path}`")
    checkpoint = need_files(open_checkpoint(path), "`checksum`")
    place = checkpoint.origin.path
    problems: list[Finding] = []
    files = _regular_files(place, checkpoint, problems)
    if problems:
        raise InputError(problems[0].text, hint=problems[0].remedy)
    reading = rehash(files, checkpoint.tensors, jobs=jobs, on_event=on_event)
    for name, why in (*reading.damaged.items(), *((name, "its zip records do not match their CRC-32") for name in reading.broken)):
        raise InputError(f"{shown(name)} is damaged, so nothing was written: {why}", hint=DAMAGED)
    entries = [FileEntry(name, size_of(files[name]), digests["sha256"]) for name, digests in reading.files.items()]
    tensors = tuple(reading.tensors.values())
    manifest = make_manifest(Plan((), {}, {}, ()), entries, tensors, {})
    outputs = {sums_path(place): make_sums(entries), manifest_path(place): json_bytes(manifest)}
    wanted = {target: data for target, data in outputs.items() if not _says_the_same(target, entries, tensors, data)}
    if not force and (taken := [target for target in wanted if os.path.lexists(target)]):
        hint = "run `llava-weights verify` to see what changed, or pass `--force` to replace it"
        raise OutputError(f"{shown(taken[0].name)} exists and records something else", facts={"file": taken[0]}, hint=hint)
    for target, data in wanted.items():
        try:
            write_file(target, data)
        except OSError as error:
            raise output_error(error, target) from error
    return list(wanted)


def _says_the_same(target: Path, files: list[FileEntry], tensors: Iterable[TensorEntry], data: bytes) -> bool:
    """Whether a manifest or list is there and right. Another recipe or environment is no difference: it may tell more than we know."""
    if not target.is_file():
        return False
    if not target.name.endswith(".json"):
        return target.read_bytes() == data
    try:
        found = read_manifest(target)
    except InputError:
        return False
    digests = {entry.name: entry.sha256 for entry in tensors}
    same_tensors = {entry.name: entry.sha256 for entry in found.tensors.values()} == digests
    return same_tensors and found.files == {entry.path: entry for entry in files}


# --- the subject ----------------------------------------------------------------------------------------------------


def open_subject(path: str | Path) -> Subject:
    """What lies at `path`. A checkpoint that is there but broken is a subject with problems. Raises InputError where there is none."""
    problems: list[Finding] = []
    checkpoint, manifest, sums = None, None, {}
    try:
        checkpoint = need_files(open_checkpoint(path, whole=True), "`verify`")
        place = checkpoint.origin.path
    except InputError as error:
        place = Path(path).expanduser().absolute()
        if not _holds_a_checkpoint(place):
            raise
        problems.append(_refused(error, place.name))
    try:
        manifest = find_manifest(place)
        if not manifest and sums_path(place).is_file():
            sums = {entry.path: entry.digest for entry in read_sums(sums_path(place)) if entry.algorithm == "sha256"}
    except InputError as error:
        problems.append(_refused(error, MANIFEST))
    if manifest:
        sums = {name: entry.sha256 for name, entry in manifest.files.items()}
    files = _regular_files(place, checkpoint, problems, sums)
    return Subject(place, checkpoint, manifest, sums, files, tuple(problems))


def _holds_a_checkpoint(place: Path) -> bool:
    if not place.is_dir():
        return place.is_file() and place.suffix in SUFFIXES
    with suppress(OSError):
        names = os.listdir(place)
        below = [inner for name in names if re.fullmatch(META_SIZE, name) and (place / name).is_dir() for inner in os.listdir(place / name)]
        weights = any(re.fullmatch(f"{WEIGHTS}|{re.escape(MANIFEST)}", name) for name in names)
        return weights or any(re.fullmatch(META_FILE, name) for name in below)
    return False


def _regular_files(place: Path, checkpoint: Checkpoint | None, problems: list[Finding], recorded: Iterable[str] = ()) -> dict[str, Path]:
    """The files of the subject by name: those beside its weights, in its own folder, and recorded ones. Hidden ones are not."""
    weights = [Path(file.path) for file in checkpoint.origin.files] if checkpoint else []
    if not place.is_dir():
        return {path.name: path for path in weights or [place]}
    folder = Path(os.path.abspath(place))
    weights = [path for path in weights if path.is_relative_to(folder)]
    homes = {folder, *(path.parent for path in weights)}
    paths = [home / name for home in homes for name in os.listdir(home) if name not in (MANIFEST, SUMS) and not name.startswith(".")]
    files = {}
    for name in sorted({*(path.relative_to(folder).as_posix() for path in (*paths, *weights)), *recorded}):
        try:
            if (path := member(folder / Path(name).parent, Path(name).name)).is_file():
                files[name] = path
        except InputError as error:
            problems.append(_refused(error, name))
    return files


def _is_read_always(subject: Subject, name: str) -> bool:
    return name in subject.sums and not subject.is_weights(name) and size_of(subject.files[name]) <= SMALL


# --- L0: structure --------------------------------------------------------------------------------------------------


def _structure(subject: Subject) -> Iterator[Finding]:
    yield from subject.problems
    yield from _listed_files(subject)
    if not subject.checkpoint:
        return
    if subject.manifest:
        yield from _headers(subject.tensors, subject.manifest.tensors)
    yield from (Finding("L0", "unchecked", subject.place.name, note) for note in subject.checkpoint.notes)
    yield from _config(subject.checkpoint)


def _listed_files(subject: Subject) -> Iterator[Finding]:
    for name in subject.sums:
        entry = subject.manifest.files.get(name) if subject.manifest else None
        if name not in subject.files:
            yield failed("L0", name, f"{shown(name)} is listed and is missing, or is no regular file")
        elif entry and (found := size_of(subject.files[name])) != entry.size:
            yield failed("L0", name, f"{shown(name)} has {found:,} bytes, its manifest says {entry.size:,}")
    if subject.sums and subject.place.is_dir():
        entries = {path.name for path in subject.place.iterdir() if not path.name.startswith(".")} - {MANIFEST, SUMS}
        folders = {name.partition("/")[0] for name in subject.sums}
        for name in sorted(entries - folders):
            yield Finding("L0", "warning", name, f"{shown(name)} is not listed in {_record(subject)}", "remove it if you do not know it")


def _headers(ours: Mapping[str, Any], recorded: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    """Names, dtypes and shapes."""
    for name, entry in recorded.items():
        if name not in ours:
            yield failed("L0", name, f"{shown(name)} is in the manifest, but in no weight file")
        elif (ours[name].dtype, ours[name].shape) != (entry.dtype, entry.shape):
            yield failed("L0", name, f"{shown(name)} is {kind(ours[name])}, its manifest says {kind(entry)}")
    for name in ours:
        if name not in recorded:
            yield failed("L0", name, f"{shown(name)} is in a weight file, but not in the manifest")


def _config(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Whether the tensors are those that config.json describes."""
    if checkpoint.layout in CHECKED_STRUCTURE and checkpoint.config:
        try:
            check_structure(checkpoint.config, {name: tensor.shape for name, tensor in checkpoint.tensors.items()})
        except InputError as error:
            yield _refused(error, "config.json")
    elif checkpoint.layout != "llava-hf":  # health.py has the rules of that one
        why = f"there is no rule for this layout ({checkpoint.layout})" if checkpoint.config else "there is no config.json"
        yield Finding("L0", "unchecked", "config.json", f"shapes were not compared with a config: {why}")


def _structure_text(subject: Subject) -> str:
    if not subject.checkpoint:
        return ""
    count = len(subject.checkpoint.origin.files)
    files = f"{count} weight {'file' if count == 1 else 'files'}, {size(sum(file.size for file in subject.checkpoint.origin.files))}"
    manifest = ", as in the manifest" if subject.manifest else ""
    return f"{len(subject.tensors):,} tensors in {files}: names, shapes, sizes and index agree{manifest}"


def _health(subject: Subject) -> list[Finding]:
    """What the files and a few MB of values say by themselves."""
    folder = subject.place if subject.place.is_dir() else None
    return list(health(subject.checkpoint, folder)) if subject.checkpoint else []


# --- L2: files, L3: tensors -----------------------------------------------------------------------------------------


def _files(subject: Subject, reading: Reading) -> list[Finding]:
    if not subject.sums:
        return [Finding("L2", "unchecked", subject.place.name, "no checksums are there: neither manifest nor SHA256SUMS", WRITE_SUMS)]

    def wrong() -> Iterator[Finding]:
        yield from (failed("L2", name, f"{shown(name)} can't be read: {why}") for name, why in reading.damaged.items())
        for name, digests in reading.files.items():
            if (recorded := subject.sums.get(name)) and digests["sha256"] != recorded:
                yield failed(
                    "L2", name, f"{shown(name)} changed: its sha256 is {digests['sha256'][:12]}..., recorded was {recorded[:12]}..."
                )

    matched = sum(digests["sha256"] == subject.sums.get(name) for name, digests in reading.files.items())
    return folded("L2", subject.place.name, wrong(), f"{counted(matched, 'file')} as recorded in {_record(subject)}" if matched else "")


def _unread(subject: Subject) -> Finding:
    return Finding("L3", "unchecked", subject.place.name, "the values of the tensors were not read", "pass `--deep` to read everything")


def _tensors(subject: Subject, reading: Reading) -> list[Finding]:
    recorded = subject.manifest.tensors if subject.manifest else {}

    def wrong() -> Iterator[Finding]:
        if not subject.sums:
            yield from (failed("L3", name, f"{shown(name)} can't be read: {why}") for name, why in reading.damaged.items())
        for file, names in reading.broken.items():
            yield failed("L3", file, f"{shown(file)} is damaged: the values of {listed(names)} do not match their CRC-32")
        yield from (failed("L3", subject.place.name, text) for text in reading.holes)
        for name, count in reading.non_finite.items():
            yield failed("L3", name, f"{shown(name)} in {shown(reading.tensors[name].shard)} holds {counted(count, 'value')} inf or NaN")
        same = {name: name for name, entry in reading.tensors.items() if name in recorded and kind(entry) == kind(recorded[name])}
        yield from differing("L3", reading.tensors, recorded, same, "the manifest records")

    missing = [name for name in subject.tensors if name not in reading.tensors and not reading.damaged]
    unread = [Finding("L3", "unchecked", missing[0], f"not read: {listed(missing)}")] if missing else []
    as_recorded = ", every digest as in the manifest" if recorded else ""
    text = f"{counted(len(reading.tensors), 'tensor')} read, none with inf or NaN{as_recorded}" if reading.tensors else ""
    return folded("L3", subject.place.name, wrong(), text) + unread


def _refused(error: InputError, otherwise: str) -> Finding:
    """What a reader refuses, as a finding: the file that it names, and the facts that are not this machine's paths."""
    path = error.facts.get("path") or error.facts.get("link")
    facts = "".join(f"; {label}: {text}" for label, text in error.facts.items() if label not in ("path", "folder", "link", "leads to"))
    return failed("L0", Path(path).name if path else otherwise, error.what + facts, error.hint or DAMAGED)


def _record(subject: Subject) -> str:
    return shown(subject.manifest.path.name if subject.manifest else sums_path(subject.place).name)


def _facts(subject: Subject, reading: Reading) -> dict[str, Any]:
    """`root` and `content` are those of the values that were read, empty where they were not."""
    entries = list(reading.tensors.values())
    complete = len(entries) == len(subject.tensors) > 0
    return {
        "files": len(subject.files),
        "tensors": len(subject.tensors),
        "nbytes": sum(map(size_of, subject.files.values())),
        "read": reading.nbytes,
        "root": root_of_tensors(entries) if complete else "",
        "content": root_of_content(entries) if complete else "",
    }
