"""What a checkpoint is compared with, and what comes of it: tensors by name and value, files by digest, the published table."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import open_checkpoint
from .config import few
from .errors import InputError
from .events import Event
from .families import DROPPED
from .findings import Finding, Verdict
from .formats import listed, shown
from .formats.folder import SUFFIXES
from .hub import HubSource, parse_source, source_text
from .manifest import TensorEntry
from .naming import Names
from .published import recognise
from .records import Sum, find_manifest, hub_sums, read_manifest, read_sums
from .rehash import Reading, rehash
from .tensors import LazyTensor

PUBLISHED = "published"  # as the name of a reference: the table in published.py
SHOWN = 20  # failures of one level that are listed one by one
DAMAGED = "get the file again, or repeat the command that wrote it"


@dataclass(frozen=True)
class Reference:
    """What the checkpoint is compared with: `tensors`, or digests of files, or neither for the published table."""

    label: str
    tensors: Mapping[str, TensorEntry] | None = None
    sums: tuple[Sum, ...] = ()
    source: Path | None = None  # the list
    complete: bool = True  # a file that is listed must be there

    @property
    def algorithms(self) -> tuple[str, ...]:
        md5 = ("md5",) if self.label == PUBLISHED else ()
        return tuple(dict.fromkeys(("sha256", *md5, *(entry.algorithm for entry in self.sums))))


def find_reference(against: str | Path, *, jobs: int = 2, on_event: Callable[[Event], None] = lambda event: None) -> Reference:
    """What `against` names; a checkpoint without a manifest is read for it.

    Raises InputError where it is nothing to compare with (a bad reference is no failure of the checkpoint), HubError where the Hub
    can't be asked.
    """
    if str(against) == PUBLISHED and not os.path.exists(against):
        return Reference(PUBLISHED)
    source = parse_source(source_text(against))
    if isinstance(source, HubSource):
        commit, sums = hub_sums(source)
        return Reference(f"{source.repo_id}@{commit[:12]}", sums=sums, complete=False)
    path = source.path
    label = shown(path.resolve().name)
    if path.suffix == ".json":
        return Reference(label, read_manifest(path).tensors)
    if manifest := find_manifest(path):
        return Reference(f"the manifest of {label}", manifest.tensors)
    if not path.is_dir() and path.suffix not in SUFFIXES:
        return Reference(label, sums=read_sums(path), source=path.absolute())
    other = open_checkpoint(path)
    reading = rehash({Path(file.path).name: Path(file.path) for file in other.origin.files}, other.tensors, jobs=jobs, on_event=on_event)
    if reading.damaged:
        raise InputError(f"{label} can't be compared with: {next(iter(reading.damaged.values()))}", hint=DAMAGED)
    return Reference(label, reading.tensors)


def compare(
    place: Path, files: Mapping[str, Path], recorded: Mapping[str, TensorEntry], reading: Reading, reference: Reference
) -> list[Finding]:
    """Findings of level "against" or "published" for the checkpoint in `place`; `recorded` stands in for tensors that were not read."""
    if reference.label == PUBLISHED:
        return list(_published(reading))
    if reference.tensors is None:
        return list(_by_files(place, files, reading, reference))
    how = "" if reading.tensors else ", by its manifest"
    return list(_by_tensors(reading.tensors or recorded, reference.tensors, reference.label, how))


def _by_tensors(ours: Mapping[str, TensorEntry], theirs: Mapping[str, TensorEntry], label: str, how: str) -> Iterator[Finding]:
    pairs, alone = Names(theirs).match(ours)
    taken = set(pairs.values())
    there = [name for name in theirs if name not in taken]
    unlike = {name: other for name, other in pairs.items() if kind(ours[name]) != kind(theirs[other])}
    alike = {name: other for name, other in pairs.items() if name not in unlike and not re.fullmatch(DROPPED, name)}
    buffers = dict.fromkeys(name for name in (*alone, *there, *pairs) if re.fullmatch(DROPPED, name))

    def wrong() -> Iterator[Finding]:
        for name, other in unlike.items():
            if name in buffers:
                continue
            yield failed("against", name, f"{shown(name)} is {kind(ours[name])}, in {label} it is {kind(theirs[other])}")
        for names, where in ((alone, f"not in {label}"), (there, f"only in {label}")):
            if lacking := [name for name in names if name not in buffers]:
                yield failed("against", lacking[0], f"{counted(len(lacking), 'tensor')} {where}: {few(lacking)}")
        yield from differing("against", ours, theirs, alike, f"{label} has")

    if buffers:
        yield Finding("against", "unchecked", label, f"buffers that no program reads were left out: {listed(buffers)}")
    text = f"{counted(len(alike), 'tensor')} equal to {label}{how}" if alike else ""
    yield from folded("against", label, wrong(), text)


def _by_files(place: Path, files: Mapping[str, Path], reading: Reading, reference: Reference) -> Iterator[Finding]:
    """File by file: a name in a list counts from this folder, from the list's own, or, with this folder's name in front, from above."""
    folder = Path(os.path.abspath(place if place.is_dir() else place.parent))
    roots = (folder, folder.parent, *((reference.source.parent,) if reference.source else ()))
    names = {os.path.abspath(path): name for name, path in files.items()}
    wrong: list[Finding] = []
    absent: list[str] = []
    elsewhere: list[str] = []
    matched, seen = 0, set()
    for entry in reference.sums:
        name = next((names[where] for root in roots if (where := os.path.abspath(root / entry.path)) in names), None)
        if name is None:
            top, inner, _ = entry.path.partition("/")
            (elsewhere if place.is_file() or (inner and top != roots[0].name) else absent).append(entry.path)
            continue
        seen.add(name)
        found = reading.files.get(name, {}).get(entry.algorithm, "")
        matched += found == entry.digest
        if found != entry.digest:
            text = f"{shown(name)} has the {entry.algorithm} {found[:16]}..., {reference.label} lists {entry.digest[:16]}..."
            wrong.append(failed("against", name, text if found else f"{shown(name)} can't be read"))
    verdict: Verdict = "failed" if reference.complete else "unchecked"
    wrong += [Finding("against", verdict, name, f"{shown(name)} is listed in {reference.label} and is not here") for name in absent]
    yield from folded("against", reference.label, wrong, f"{counted(matched, 'file')} as listed in {reference.label}" if matched else "")
    if unlisted := [name for name, path in files.items() if name not in seen and path != reference.source]:
        yield Finding("against", "unchecked", unlisted[0], f"not listed in {reference.label}: {listed(unlisted)}")
    if elsewhere:
        yield Finding("against", "unchecked", elsewhere[0], f"{reference.label} also lists other files: {listed(elsewhere)}")


def differing(
    level: str, ours: Mapping[str, TensorEntry], theirs: Mapping[str, TensorEntry], pairs: Mapping[str, str], whose: str
) -> Iterator[Finding]:
    """A finding for each pair (our name -> their name) of tensors whose values differ; two that changed places are one finding."""
    wrong = {name: other for name, other in pairs.items() if ours[name].sha256 != theirs[other].sha256}
    owners: dict[str, list[str]] = defaultdict(list)
    for name, other in wrong.items():
        owners[theirs[other].sha256].append(name)
    told: set[str] = set()
    for name, other in wrong.items():
        if name in told:
            continue
        entry, expected, owner = ours[name], theirs[other].sha256, owners[ours[name].sha256]
        partner = next((each for each in owner if ours[each].sha256 == expected and each not in told), None)
        if partner is not None:
            told.add(partner)
            where = listed(dict.fromkeys((entry.shard, ours[partner].shard)))
            yield failed(level, name, f"{shown(name)} and {shown(partner)} in {where} are exchanged: each holds the other's values")
        else:
            holds = f"; it holds those of {shown(owner[0])}" if owner else ""
            yield failed(level, name, f"{shown(name)} in {shown(entry.shard)} does not have the values that {whose}{holds}")


def _published(reading: Reading) -> Iterator[Finding]:
    """Which published file each file is. Most good files were never published, so an unknown one is no failure."""
    known = {name: recognise(sha256=digests["sha256"], md5=digests["md5"]) for name, digests in reading.files.items()}
    for name, found in known.items():
        if found:
            yield Finding(PUBLISHED, "ok", name, f"{shown(name)} is {found.what} ({found.source})")
    if unknown := [name for name, found in known.items() if not found]:
        yield Finding(PUBLISHED, "unchecked", unknown[0], f"not among the published files: {listed(unknown)}")


# --- findings -------------------------------------------------------------------------------------------------------


def failed(level: str, subject: str, text: str, remedy: str = DAMAGED) -> Finding:
    return Finding(level, "failed", subject, text, "" if level == "against" else remedy)


def folded(level: str, subject: str, findings: Iterable[Finding], ok: str) -> list[Finding]:
    """The findings of a level, failures after the first SHOWN as one; where nothing failed, `ok` in one more, unless it is empty."""
    every = list(findings)
    failures = [found for found in every if found.verdict == "failed"]
    more = f"and {len(failures) - SHOWN:,} more, the last of them {shown(failures[-1].subject)}" if len(failures) > SHOWN else ""
    shortened = [found for found in every if found.verdict != "failed" or found in failures[:SHOWN]]
    shortened += [failed(level, failures[-1].subject, more)] if more else []
    return shortened if failures or not ok else [Finding(level, "ok", subject, ok), *shortened]


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def kind(tensor: LazyTensor | TensorEntry) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
