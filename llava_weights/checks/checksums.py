"""Find what a checkpoint is to be compared with, and compare: tensors by name and value, files by digest, or the published table."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint, Origin, layout_of, open_checkpoint
from ..checkpoint.manifest import GIT, Manifest, Sum, TensorEntry, find_manifest, is_inside, read_manifest, read_sums
from ..checkpoint.rehash import Reading, digest_file, digests, rehash, size_of
from ..checkpoint.tower import open_tower
from ..errors import HubError, InputError, LlavaWeightsError
from ..events import Listener
from ..families.files import CONFIG_FILES, WEIGHT_SUFFIXES
from ..families.layouts import DROPPED, VOCABULARY_TABLES, BaseNames, canonical
from ..families.projectors import LINEAR_NAMES as ONE_LINEAR
from ..families.projectors import PROJECTOR_NAMES, STACK_OF_ONE
from ..families.published import recognise
from ..families.targets import TARGET_BY_TYPE
from ..families.towers import BESIDE_TOWER
from ..findings import Finding, Verdict
from ..formats.folder import member
from ..storage.digests import FILES, TENSORS
from ..storage.http import endpoint
from ..storage.hub import HubSource, hub_error, parse_source, source_text
from ..storage.retry import ANSWER_SECONDS, within
from ..storage.strict_json import load_object
from ..tensors.lazy import LazyTensor, cast
from ..tensors.resize import resized
from ..text import few, listed, shown
from ..transforms.projector import ONE, paired, single
from ..write.plan import LARGEST_SMALL_FILE
from .compare_files import COMPARED_FILES, compare_files


def hub_files(source: HubSource) -> tuple[str, tuple[tuple[Sum, int], ...]]:
    """The commit of a repository, and of each file in its folder the digest that the Hub states (sha256 of large files, git's of small
    ones) and its bytes.

    Raises HubError.
    """
    address = endpoint()
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=address, library_name="llava-weights")
    how: Any = {"revision": source.revision, "files_metadata": True, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
    explained: LlavaWeightsError | None = None
    try:
        info = within(ANSWER_SECONDS, lambda: api.model_info(source.repo_id, **how))
    except Exception as error:
        explained = hub_error(error, source)
        if explained is None:
            raise
    if explained:  # outside of `except`: the library's own message may hold a token, so it must not be the context
        raise explained
    prefix = f"{source.folder}/" if source.folder else ""
    sums = []
    for sibling in info.siblings or ():
        name = sibling.rfilename.removeprefix(prefix)
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if sibling.rfilename.startswith(prefix) and digest and is_inside(name):
            sums.append((Sum(name, "sha256" if sibling.lfs else GIT, digest), int(sibling.size or 0)))
    if not sums:
        raise HubError(f"`{source.repo_id}` has no files there", hint="check the revision and the folder")
    return str(info.sha), tuple(sums)


PUBLISHED_TABLE = "published"  # names the table in families/published.py as a reference
MOST_FAILURES = 20  # failures of one level that are listed one by one
EQUAL_TO = "equal to"  # how the reason of an explained tensor begins, where another comparison found it equal
GET_AGAIN = "`llava-weights repair PATH --from OTHER` takes it from another copy; or repeat the command that wrote it"


@dataclass(frozen=True)
class Reference:
    """What the checkpoint is compared with: the values of `checkpoint`, or digests of `tensors` and `files` in a manifest, or digests of
    files in a list; none of these for the published table."""

    label: str
    tensors: Mapping[str, TensorEntry] | None = None  # of a checkpoint only once `read_reference` has read them
    files: Mapping[str, str] = field(default_factory=dict)  # of a manifest: name -> sha256
    sums: tuple[Sum, ...] = ()
    source: Path | None = None  # the list
    complete: bool = True  # a file that is listed must be there
    checkpoint: Checkpoint | None = None  # beside a manifest: its small files alone, those that are as it lists them
    algorithm: str = TENSORS  # of the digests of `tensors`

    @property
    def algorithms(self) -> tuple[str, ...]:
        """Of the files."""
        md5 = ("md5",) if self.label == PUBLISHED_TABLE else ()
        return tuple(dict.fromkeys((FILES, *md5, *(entry.algorithm for entry in self.sums))))

    @property
    def has_tensors(self) -> bool:
        """Whether it is compared with by tensors, not by files alone."""
        return self.tensors is not None or self.checkpoint is not None

    @property
    def has_values(self) -> bool:
        """Whether its tensors can be read, and are not digests in a manifest."""
        return self.checkpoint is not None and bool(self.checkpoint.origin.files)

    @property
    def nbytes(self) -> int:
        """Bytes of its files that are read."""
        return sum(file.size for file in self.checkpoint.origin.files) if self.checkpoint and self.tensors is None else 0


@dataclass(frozen=True)
class Side:
    """What is compared: its files by name, what was just read of them, and which tensors each weight file holds.

    `explained` are tensors that the reference need not have, with the reason in words.
    """

    place: Path
    checkpoint: Checkpoint | None
    files: Mapping[str, Path]
    reading: Reading
    weights: Mapping[str, Sequence[str]] = field(default_factory=dict)
    explained: Mapping[str, str] = field(default_factory=dict)


def find_reference(against: str | Path) -> Reference:
    """What `against` names. Nothing but headers, a manifest or a list is read.

    Raises InputError where it is nothing to compare with (a bad reference is no failure of the checkpoint), HubError where the Hub
    can't be asked.
    """
    if str(against) == PUBLISHED_TABLE and not os.path.exists(against):
        return Reference(PUBLISHED_TABLE)
    source = parse_source(source_text(against))
    if isinstance(source, HubSource):
        commit, listed_there = hub_files(source)
        sums = tuple(entry for entry, _ in listed_there)
        return Reference(f"{source.repo_id}@{commit[:12]}", sums=sums, complete=False)
    path = source.path
    label = shown(path.resolve().name)
    if path.suffix == ".json":
        manifest = read_manifest(path)
        files = {name: entry.sha256 for name, entry in manifest.files.items()}
        checkpoint = _recorded_checkpoint(manifest)
        return Reference(label, manifest.tensors, files, checkpoint=checkpoint, algorithm=manifest.algorithm)
    if not path.is_dir() and path.suffix not in WEIGHT_SUFFIXES:
        return Reference(label, sums=read_sums(path), source=path.absolute())
    return Reference(label, checkpoint=open_checkpoint(path))


def _recorded_checkpoint(manifest: Manifest) -> Checkpoint | None:
    """The small files that lie beside a manifest and have its digests, so that they can be compared by meaning; None without a config."""
    folder, files = manifest.path.absolute().parent, {}
    try:
        for name, entry in manifest.files.items():
            path = member(folder, name) if name in COMPARED_FILES else folder
            if path.is_file() and size_of(path) == entry.size <= LARGEST_SMALL_FILE and digest_file(path) == entry.sha256:
                files[name] = path
        config = load_object(files[CONFIG_FILES[0]]) if CONFIG_FILES[0] in files else {}
    except (InputError, OSError):  # then the digests alone are compared
        return None
    tensors = {name: LazyTensor(dtype=entry.dtype, shape=entry.shape) for name, entry in manifest.tensors.items()}
    return Checkpoint(tensors, config, Origin(folder.name, folder, "safetensors", ()), files) if config else None


def read_reference(reference: Reference, *, jobs: int = 2, on_event: Listener = lambda event: None) -> tuple[Reference, list[Finding]]:
    """The reference with digests of its values, which are read; and a warning where a manifest beside them says something else.

    Raises InputError where the values can't be read.
    """
    checkpoint = reference.checkpoint
    if checkpoint is None or reference.tensors is not None:
        return reference, []
    files = {name: Path(file.path) for name, file in checkpoint.origin.by_name.items()}
    stale, text, manifest = f"the manifest beside {reference.label}", "", None
    try:
        manifest = find_manifest(checkpoint.origin.path)
    except InputError as error:
        text = f"{stale} was not asked: {error.what}"
    wanted = tuple(dict.fromkeys((reference.algorithm, manifest.algorithm if manifest else reference.algorithm)))
    reading = rehash(files, checkpoint.tensors, tensor_algorithms=wanted, jobs=jobs, on_event=on_event)
    if reading.damaged:
        raise InputError(f"{reference.label} can't be compared with: {next(iter(reading.damaged.values()))}", hint=GET_AGAIN)
    if manifest:
        read = reading.by(manifest.algorithm).tensors
        wrong = [name for name, entry in read.items() if name not in manifest.tensors or not manifest.tensors[name].same_values(entry)]
        text = f"{stale} is not of its values, which were compared: {few(wrong)}" if wrong else ""
    found = [Finding("against", "warning", reference.label, text, "see which of the two is right", "stale-manifest")] if text else []
    return replace(reference, tensors=reading.tensors), found


def compare(subject: Side, reference: Reference, *, tower: Checkpoint | None = None, jobs: int = 2) -> list[Finding]:
    """Findings of level "against" or "published" for what was read of the subject. Raises InputError where it changes meanwhile."""
    if reference.label == PUBLISHED_TABLE:
        return list(_published(subject))
    if reference.tensors is None:
        return list(_by_files(subject, reference))
    subject = replace(subject, reading=subject.reading.by(reference.algorithm))
    findings = list(_by_tensors(subject, reference, jobs))
    if reference.files and (by_files := _by_recorded_files(subject, reference)):
        return findings + by_files
    if reference.checkpoint and subject.checkpoint:
        findings += compare_files(subject.checkpoint, reference.checkpoint, reference.label, "against", tower=tower)
    return findings


def compare_tower(
    checkpoint: Checkpoint, reading: Reading, given: Checkpoint, *, jobs: int = 2, on_event: Listener = lambda event: None
) -> tuple[list[Finding], dict[str, str]]:
    """The tower in `checkpoint` against the one that is given, cast to its dtype; and the tensors that are equal, with the reason."""
    tower, label = open_tower(given), shown(given.origin.name)
    inside = {canonical(name): name for name in reading.tensors}
    pairs = {f"tower.{behind}": tensor for behind, tensor in tower.tensors.items() if f"tower.{behind}" in inside}
    if not pairs:
        text = f"{shown(checkpoint.origin.name)} holds no vision tower to compare with {label}"
        return [Finding("against", "unproved", label, text, rule="vision-tower", part="no vision tower to compare")], {}
    same_dtype = {inside[part]: cast(tensor, reading.tensors[inside[part]].dtype) for part, tensor in pairs.items()}
    expected = digests(same_dtype, algorithm=reading.algorithm, jobs=jobs, on_event=on_event)
    found = {name: (reading.tensors[name].dtype, reading.tensors[name].shape, reading.tensors[name].digest) for name in expected}
    wrong = [failed("against", name, f"{shown(name)} is not that of {label}") for name in expected if expected[name] != found[name]]
    extra = [
        name for part, name in inside.items() if part.startswith("tower.") and name not in expected and not re.fullmatch(DROPPED, name)
    ]
    lacking = [behind for behind in tower.tensors if f"tower.{behind}" not in inside]
    wrong += (
        [failed("against", extra[0], f"{counted(len(extra), 'tensor')} of the tower are not in {label}: {few(extra)}")] if extra else []
    )
    wrong += [failed("against", lacking[0], f"{counted(len(lacking), 'tensor')} of {label} are missing: {few(lacking)}")] if lacking else []
    part = f"the vision tower (by {label})"
    text = f"{counted(len(expected), 'tensor')} of the vision tower equal to {label}"
    findings = [replace(each, rule="vision-tower") for each in folded("against", label, wrong, text, part=part)]
    return findings, {} if wrong else dict.fromkeys(expected, f"{EQUAL_TO} the vision tower {label}")


def _by_tensors(subject: Side, reference: Reference, jobs: int) -> Iterator[Finding]:
    label, expected = reference.label, reference.tensors or {}
    found = _in_form_of(subject, expected, jobs)
    pairs, alone = BaseNames(expected).match(found)
    taken = set(pairs.values())
    there = [name for name in expected if name not in taken]
    unlike = {name: other for name, other in pairs.items() if kind(found[name]) != kind(expected[other])}
    alike = {name: other for name, other in pairs.items() if name not in unlike and not re.fullmatch(DROPPED, name)}
    buffers = dict.fromkeys(name for name in (*alone, *there, *pairs) if re.fullmatch(DROPPED, name))
    grown = {name: other for name, other in unlike.items() if _is_grown(name, found[name], expected[other])}
    layouts = (subject.checkpoint.layout if subject.checkpoint else "", layout_of(expected))
    source = layouts == ("llava", "llava-hf")  # which the reference was converted from
    shorter = {name: other for name, other in unlike.items() if source and _is_grown(name, expected[other], found[name])}
    heads = _heads(subject.checkpoint, found, {name: expected[other].shape[0] for name, other in grown.items()}, jobs)
    rows = {other: found[name].shape[0] for name, other in shorter.items()} if reference.has_values else {}
    expected_heads = _heads(reference.checkpoint, expected, rows, jobs)
    compared = {**alike, **grown, **{name: other for name, other in shorter.items() if other in expected_heads}}
    within = source and not any(canonical(name).startswith("tower.") for name in found)  # named there, and not held
    towers = [name for name in there if within and canonical(name).startswith("tower.") and name not in buffers]
    config = subject.checkpoint.config if subject.checkpoint else {}
    made_of = layouts == ("llava-hf", "llava")
    unread = [name for name in there if made_of and name not in buffers and _has_no_place(canonical(name), config)]

    def wrong() -> Iterator[Finding]:
        for name, other in unlike.items():
            if name not in (*buffers, *grown, *shorter):
                yield failed("against", name, f"{shown(name)} is {kind(found[name])}, in {label} it is {kind(expected[other])}")
        if lacking := [name for name in there if name not in (*buffers, *towers, *unread)]:
            yield failed("against", lacking[0], f"{counted(len(lacking), 'tensor')} only in {label}: {few(lacking)}")
        yield from differing("against", {**found, **heads}, {**expected, **expected_heads}, compared, f"{label} has")

    if buffers:
        yield Finding("against", "unchecked", label, f"buffers that no program reads were left out: {listed(buffers)}")
    lengths = {name: heads[name].shape[0] if name in heads else found[name].shape[0] for name in compared if name not in alike}
    compared_rows = "".join(f", {count:,} rows of {shown(name)}" for name, count in lengths.items())
    text = f"{counted(len(alike), 'tensor')}{compared_rows} equal to {label}" if compared else ""
    yield from folded("against", label, wrong(), text, part=f"values of {counted(len(compared), 'tensor')} (by {label})")
    for name, other in grown.items():
        count = found[name].shape[0] - expected[other].shape[0]
        text = f"{shown(name)} has {counted(count, 'row')} more than in {label}, which were not compared"
        yield Finding("against", "unchecked", name, text, part=f"unchecked: {counted(count, 'row')} of {shown(name)}")
    for name, other in shorter.items():
        count = expected[other].shape[0] - found[name].shape[0]
        if name in compared:
            text = f"{shown(name)} has {counted(count, 'row')} less than in {label}, which a conversion adds"
            yield Finding("against", "unchecked", name, text, part=f"unchecked: {counted(count, 'row')} of {label}")
        else:
            text = f"{shown(name)} has {counted(count, 'row')} less than in {label}, whose digest is of all of them"
            yield Finding("against", "unproved", name, text, part=f"{shown(name)} not compared")
    if towers:
        text = (
            f"the {counted(len(towers), 'tensor')} of a vision tower in {label} were not compared: the original layout only names its tower"
        )
        yield Finding("against", "unchecked", label, text, part=f"unchecked: the vision tower of {label}")
    if unread:
        text = f"{counted(len(unread), 'tensor')} of {label} that the class of a conversion does not read: {few(unread)}"
        yield Finding("against", "unchecked", label, text, part=f"unchecked: {counted(len(unread), 'tensor')} of {label}")
    yield from _without_counterpart([name for name in alone if name not in buffers], subject.explained, label)


def _has_no_place(part: str, config: Mapping[str, Any]) -> bool:
    """Whether the class of a llava-hf `config` does not read the tensor `part`, by its canonical name: the pooling head of a SigLIP, the
    newline of tiles where images are whole, or what a lossy conversion leaves out."""
    target = TARGET_BY_TYPE.get(str(config.get("model_type")))
    whole = target is not None and not target.tiles
    lost = target.video.lost if target and target.video else ""
    return re.fullmatch(rf"tower\.({BESIDE_TOWER})|{lost}", part) is not None or (part == "newline" and whole)


def _in_form_of(subject: Side, expected: Mapping[str, TensorEntry], jobs: int) -> Mapping[str, TensorEntry]:
    """What was read of `subject`, with its projector in the form that `expected` has: one Linear, or the two layers that stand for it in
    llava-hf. As it was read where the forms are the same, or where its layers do not stand for one Linear."""
    read, checkpoint = subject.reading.tensors, subject.checkpoint
    names, expected_names = map(_projector_of, (read, expected))
    if checkpoint is None or not ((_is_single(names) and _is_pair(expected_names)) or (_is_pair(names) and _is_single(expected_names))):
        return read
    projector = {part: checkpoint.tensors[name] for part, name in names.items()}
    if any(each.dtype not in ONE or len(each.shape) != (1 if name.endswith("bias") else 2) for name, each in projector.items()):
        return read
    forms: list[dict[str, LazyTensor]] = []
    try:
        if _is_single(names):
            forms += [paired(projector[ONE_LINEAR[0]], projector[ONE_LINEAR[1]], form) for form in ("identity", "relu")]
        elif linear := single(projector, str(checkpoint.config.get("projector_hidden_act", "gelu"))):
            forms.append(dict(zip(ONE_LINEAR, linear, strict=True)))
    except InputError:  # no such form, or no room for it
        pass
    rest = {name: entry for name, entry in read.items() if name not in names.values()}
    algorithm, shard = subject.reading.algorithm, read[next(iter(names.values()))].shard
    entries = [
        {
            expected_names[part]: TensorEntry(expected_names[part], dtype, shape, form[part].nbytes, digest, shard, algorithm)
            for part, (dtype, shape, digest) in digests(form, algorithm=algorithm, jobs=jobs).items()
        }
        for form in forms
    ]
    if not entries:
        return read
    return rest | max(entries, key=lambda form: sum(entry.same_values(expected[name]) for name, entry in form.items()))


def _projector_of(side: Mapping[str, TensorEntry]) -> dict[str, str]:
    """The projector's names by their canonical ones; those of a stack of one layer, which only the original layout has, as a Linear's."""
    found = {canonical(name): name for name in side if canonical(name).startswith("projector.")}
    if {*found} == {*STACK_OF_ONE} and all(name.startswith("model.mm_projector.") for name in found.values()):
        return {part: found[name] for part, name in zip(ONE_LINEAR, STACK_OF_ONE, strict=True)}
    return found


def _is_single(names: Mapping[str, str]) -> bool:
    return {*names} == {*ONE_LINEAR}


def _is_pair(names: Mapping[str, str]) -> bool:
    return {*names} == {*PROJECTOR_NAMES}


def _is_grown(name: str, longer: TensorEntry, shorter: TensorEntry) -> bool:
    """Whether it is a vocabulary table to which rows were added."""
    same = (longer.dtype, longer.shape[1:]) == (shorter.dtype, shorter.shape[1:])
    return canonical(name) in VOCABULARY_TABLES and same and len(longer.shape) == 2 and longer.shape[0] > shorter.shape[0] > 0


def _heads(checkpoint: Checkpoint | None, entries: Mapping[str, TensorEntry], rows: Mapping[str, int], jobs: int) -> dict[str, TensorEntry]:
    """Digests of the first rows of these tables, as many as `rows` says."""
    tensors = checkpoint.tensors if checkpoint else {}
    heads = {name: resized(tensors[name], count) for name, count in rows.items()}
    algorithm = next((entries[name].algorithm for name in heads), TENSORS)
    return {
        name: replace(entries[name], shape=shape, nbytes=heads[name].nbytes, digest=digest)
        for name, (_, shape, digest) in digests(heads, algorithm=algorithm, jobs=jobs).items()
    }


def _without_counterpart(alone: Sequence[str], explained: Mapping[str, str], label: str) -> Iterator[Finding]:
    """Tensors that nothing was compared with."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for name in alone:
        reasons[explained.get(name, "")].append(name)
    for reason, names in reasons.items():
        count = counted(len(names), "tensor")
        if reason.startswith(EQUAL_TO):
            yield Finding("against", "note", names[0], f"{count} not in {label}, but {reason}")
        elif reason:
            yield Finding("against", "unchecked", names[0], f"{count} not in {label}, {reason}: {few(names)}", part=f"unchecked: {count}")
        else:
            text = f"{count} not in {label}, and nothing explains them: {few(names)}"
            yield Finding("against", "unproved", names[0], text, part=f"{count} without counterpart in {label}")


def _by_recorded_files(subject: Side, reference: Reference) -> list[Finding]:
    """The small files by the digests in a manifest. An empty list where digests differ but the files can be compared by meaning.

    Where the tensors have names of another layout, the small files are of that layout too.
    """
    names = {*(reference.tensors or ())}
    if (names and not names & {*subject.reading.tensors}) or not subject.place.is_dir():
        why = "this is one file of it" if not subject.place.is_dir() else "it is of another layout"
        text = f"the small files were not compared with {reference.label}: {why}"
        return [Finding("against", "unchecked", reference.label, text, rule="small-files", part="small files not compared")]
    listed_names = [name for name in reference.files if name in COMPARED_FILES]
    lacking = [name for name in listed_names if name not in subject.files]
    unlike = [
        name for name in listed_names if subject.reading.files.get(name, {}).get("sha256") != reference.files[name] and name not in lacking
    ]
    other = {*lacking, *unlike}
    if other and subject.checkpoint and reference.checkpoint and other <= {*reference.checkpoint.files}:
        return []
    wrong = [failed("against", name, f"{shown(name)} is listed in {reference.label} and is not here") for name in lacking]
    wrong += [failed("against", name, f"{shown(name)} is not the file that {reference.label} lists") for name in unlike]
    text = f"{counted(len(listed_names), 'small file')} as listed in {reference.label}" if listed_names else ""
    findings = folded("against", reference.label, wrong, text, part=f"small files (by {reference.label})")
    if unlisted := [name for name in subject.files if name in COMPARED_FILES and name not in reference.files]:
        part = f"unchecked: {listed(unlisted)}"
        findings.append(Finding("against", "unchecked", unlisted[0], f"not listed in {reference.label}: {listed(unlisted)}", part=part))
    return [replace(each, rule="small-files") for each in findings]


def _by_files(subject: Side, reference: Reference) -> Iterator[Finding]:
    """File by file. A name in a list is looked up from this folder, from the list's, or, with this folder's name first, from above."""
    place, files, reading = subject.place, subject.files, subject.reading
    folder = Path(os.path.abspath(place if place.is_dir() else place.parent))
    roots = (folder, folder.parent, *((reference.source.parent,) if reference.source else ()))
    names = {os.path.abspath(path): name for name, path in files.items()}
    wrong: list[Finding] = []
    absent: list[str] = []
    others: list[str] = []
    matched, seen = set(), set()
    for entry in reference.sums:
        name = next((names[where] for root in roots if (where := os.path.abspath(root / entry.path)) in names), None)
        if name is None:
            top, inner, _ = entry.path.partition("/")
            (others if place.is_file() or (inner and top != roots[0].name) else absent).append(entry.path)
            continue
        seen.add(name)
        found = reading.files.get(name, {}).get(entry.algorithm, "")
        if found == entry.digest:
            matched.add(name)
        else:
            text = f"{shown(name)} has the {entry.algorithm} {found[:16]}..., {reference.label} lists {entry.digest[:16]}..."
            wrong.append(failed("against", name, text if found else f"{shown(name)} can't be read"))
    verdict: Verdict = "failed" if reference.complete else "unchecked"
    wrong += [Finding("against", verdict, name, f"{shown(name)} is listed in {reference.label} and is not here") for name in absent]
    text = f"{counted(len(matched), 'file')} as listed in {reference.label}" if matched else ""
    yield from folded("against", reference.label, wrong, text, part=f"{_named(matched)} (by {reference.label})")
    weights = {name: tensors for name, tensors in subject.weights.items() if name not in seen}
    small = [name for name, path in files.items() if name not in seen and name not in weights and path != reference.source]
    if small:
        part = f"unchecked: {listed(small)}"
        yield Finding("against", "unchecked", small[0], f"not listed in {reference.label}: {listed(small)}", part=part)
    yield from _unlisted_weights(weights, subject.explained, reference.label)
    if others:
        yield Finding("against", "unchecked", others[0], f"{reference.label} also lists other files: {listed(others)}")


def _named(files: Collection[str]) -> str:
    return f"{len(files):,} files" if len(files) > 3 else listed(sorted(files))


def _unlisted_weights(weights: Mapping[str, Sequence[str]], explained: Mapping[str, str], label: str) -> Iterator[Finding]:
    """Weight files that no digest was compared with."""
    open_files = [name for name, tensors in weights.items() if not tensors or any(tensor not in explained for tensor in tensors)]
    if open_files:
        count = sum(len(weights[name]) for name in open_files)
        text = f"no weights were compared in {listed(open_files)}: {label} does not list them"
        part = f"{counted(count, 'tensor')} in {counted(len(open_files), 'weight file')} without counterpart in {label}"
        yield Finding(
            "against", "unproved", open_files[0], text, "compare with a checkpoint or its manifest, whatever its files", part=part
        )
    yield from _without_counterpart([name for file in weights if file not in open_files for name in weights[file]], explained, label)


def differing(
    level: str, found: Mapping[str, TensorEntry], expected: Mapping[str, TensorEntry], pairs: Mapping[str, str], whose: str
) -> Iterator[Finding]:
    """A finding for each pair (name -> name in `expected`) of tensors whose values differ; two that changed places are one finding."""
    wrong = {name: other for name, other in pairs.items() if not found[name].same_values(expected[other])}
    owners: dict[str, list[str]] = defaultdict(list)
    for name, other in wrong.items():
        owners[expected[other].digest].append(name)
    done: set[str] = set()
    for name, other in wrong.items():
        if name in done:
            continue
        entry, digest, owner = found[name], expected[other].digest, owners[found[name].digest]
        partner = next((each for each in owner if found[each].digest == digest and each not in done), None)
        if partner is not None:
            done.add(partner)
            where = listed(dict.fromkeys((entry.shard, found[partner].shard)))
            yield failed(level, name, f"{shown(name)} and {shown(partner)} in {where} are exchanged: each holds the other's values")
        else:
            holds = f"; it holds those of {shown(owner[0])}" if owner else ""
            yield failed(level, name, f"{shown(name)} in {shown(entry.shard)} does not have the values that {whose}{holds}")


def _published(subject: Side) -> Iterator[Finding]:
    """Which published file each file is. An unknown file is no failure, since most good files were never published, but it is unproved."""
    known = {name: recognise(sha256=digests["sha256"], md5=digests["md5"]) for name, digests in subject.reading.files.items()}
    for name, found in known.items():
        if found:
            yield Finding(
                PUBLISHED_TABLE, "ok", name, f"{shown(name)} is {found.what} ({found.source})", part=f"{shown(name)} (as published)"
            )
    unknown = [name for name, found in known.items() if not found]
    weights, others = ([name for name in unknown if (name in subject.weights) == whether] for whether in (True, False))
    if others:
        yield Finding(
            PUBLISHED_TABLE, "unchecked", others[0], f"not among the published files: {listed(others)}", part=f"unchecked: {listed(others)}"
        )
    if weights:
        text = f"weight files that are not among the published ones: {listed(weights)}"
        yield Finding(PUBLISHED_TABLE, "unproved", weights[0], text, part=f"{counted(len(weights), 'weight file')} that nobody published")


def failed(level: str, subject: str, text: str, remedy: str = GET_AGAIN) -> Finding:
    return Finding(level, "failed", subject, text, "" if level == "against" else remedy)


def folded(level: str, subject: str, findings: Iterable[Finding], ok: str, *, part: str = "") -> list[Finding]:
    """The findings of a level. Failures after the first MOST_FAILURES become one. Where nothing failed, `ok` comes first, unless empty.

    `part` is what the headline then calls verified.
    """
    every = list(findings)
    failures = [found for found in every if found.verdict == "failed"]
    more = (
        f"and {len(failures) - MOST_FAILURES:,} more, the last of them {shown(failures[-1].subject)}"
        if len(failures) > MOST_FAILURES
        else ""
    )
    shortened = [found for found in every if found.verdict != "failed" or found in failures[:MOST_FAILURES]]
    shortened += [failed(level, failures[-1].subject, more)] if more else []
    return shortened if failures or not ok else [Finding(level, "ok", subject, ok, part=part), *shortened]


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def kind(tensor: LazyTensor | TensorEntry) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
