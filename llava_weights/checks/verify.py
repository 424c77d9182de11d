"""Is this checkpoint whole, and is it what was recorded? Structure from headers (L0), files (L2) and tensors (L3) from one reading.

What could not be checked is a finding of its own, so that silence never looks like success. findings.py explains the levels.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint, CheckpointSource, need_files, open_checkpoint, opened, place_of
from ..checkpoint.config import check_structure, known_decoder
from ..checkpoint.kinds import kind_of
from ..checkpoint.manifest import (
    MANIFEST,
    SUMS,
    FileEntry,
    Manifest,
    TensorEntry,
    find_manifest,
    make_manifest,
    make_sums,
    manifest_path,
    read_manifest,
    read_sums,
    root_of_content,
    root_of_tensors,
    sums_path,
)
from ..checkpoint.rehash import Reading, rehash, size_of
from ..errors import MOST_JOBS, InputError, OutputError, UsageError, whole_number
from ..events import Listener, Note, check_listener
from ..families.files import ADAPTER_CONFIG, META_FILE, WEIGHT_SUFFIXES
from ..families.layouts import VOCABULARY, canonical
from ..findings import OTHER_RULES, STATE_RULES, Finding, exit_code
from ..formats.folder import META_SIZE, WEIGHTS, member, optional
from ..formats.integer_delta import is_integer_delta
from ..storage.atomic import output_error, write_file
from ..storage.digests import FILES, TENSORS
from ..storage.hub import HubSource, parse_source, source_text
from ..storage.output_file import check_file
from ..storage.reading import present
from ..storage.strict_json import json_bytes
from ..text import brief, is_text, listed, shown, size
from ..transforms.adapter import open_adapter
from ..transforms.lora import Adapters
from ..write.plan import LARGEST_SMALL_FILE
from .checksums import (
    GET_AGAIN,
    PUBLISHED_TABLE,
    Reference,
    Side,
    compare,
    compare_tower,
    counted,
    differing,
    failed,
    find_reference,
    folded,
    kind,
    read_reference,
)
from .compare_files import compare_files
from .health import APPLY, RULES_OF_LAYOUT, health, watch_over
from .published import check_published
from .remake import compare_remade, remake
from .rules import refused
from .rules_gguf import check_gguf
from .share import Share, share_of, to_part

CHECKED_STRUCTURE = ("llama", "llava")  # layouts whose shapes checkpoint/config.py checks
DEEP = "pass `--deep` to read everything"
LONGEST_WARNING = 500  # characters of a recorded warning that are shown
WRITE_SUMS = "run `llava-weights checksum` now to find any later change"


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `name` is that of the checkpoint. `findings` are in the order of their levels. `facts` is plain data: counts,
    bytes, and where values were read their roots (`root` is the digest of all tensors, however they are cut into files, with the name of
    its algorithm: "blake3:..."). `against` names what was compared with, "" where nothing was.
    """

    name: str
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any]
    against: str = ""

    def __repr__(self) -> str:
        counts = Counter(finding.verdict for finding in self.findings)
        found = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        return f"Verification({brief(self.name)}, exit code {self.exit_code}, findings: {found or 'none'})"

    @property
    def exit_code(self) -> int:
        """4 where something failed, 3 where what was asked for could not be told or nothing proves the values, else 0."""
        return exit_code(self.findings)


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

    @property
    def packed(self) -> bool:
        """Whether it is a delta of the integer codec."""
        return self.checkpoint is not None and is_integer_delta(self.checkpoint.metadata)

    @property
    def by_file(self) -> dict[str, list[str]]:
        """The names of the tensors in each weight file, those that lie in several with each."""
        names = {os.path.abspath(path): name for name, path in self.files.items()}
        found: dict[str, list[str]] = {}
        for name, tensor in self.tensors.items():
            for path in dict.fromkeys(leaf.file.path for leaf in tensor.leaves()):
                if path in names:
                    found.setdefault(names[path], []).append(name)
        return found

    def is_weights(self, name: str) -> bool:
        own = {file.path for file in self.checkpoint.origin.files} if self.checkpoint else set()
        return os.path.abspath(self.files[name]) in own or bool(re.fullmatch(WEIGHTS, name) and not name.endswith(".json"))


def verify(
    path: CheckpointSource,
    *,
    against: CheckpointSource | None = None,
    deep: bool = False,
    part: str | None = None,
    base: CheckpointSource | None = None,
    delta: CheckpointSource | None = None,
    lora: Adapters = (),
    vision_tower: CheckpointSource | None = None,
    strict: bool = False,
    allow: Sequence[str] = (),
    accept_tower: bool = False,
    jobs: int = 2,
    on_event: Listener = lambda event: None,
) -> Verification:
    """Check a checkpoint: is it whole, do its files agree, is it what was recorded? Nothing is written.

    `path` is a folder, a weight file, a repository of the Hub, or a checkpoint that was opened. Headers, small files and samples of the
    values are read, unless more is asked for. `deep` reads every byte; with `part`, as "3/7", the third of seven equal shares of them: the
    same in every run, by tensor where a manifest records all tensors, else by whole file.

    `against` is what it should be: a checkpoint or a manifest (compared by tensors), a list as `sha256sum` or `md5sum` write it,
    `owner/name[@revision]` (by the Hub's digests, nothing is downloaded), or "published" (the authors' own checksums; with `delta`, of
    their merged files). `base`, with `delta` and `lora` (adapters as `merge_lora` takes them), makes every tensor again and compares. In
    these modes every value is read, of both sides: no manifest beside them is believed. `vision_tower` is the tower that goes with `base`,
    or that proves the one that `against` lacks; with `accept_tower` it may be another one than the config names.

    `strict` makes warnings failures, but those of the rules in `allow`, which are named as `rule` of a Finding is. `jobs` is the number of
    threads, from 1 to 64. `on_event` is called with each Event, such as a ProgressBar.

    What is wrong with the checkpoint is a finding, and raises nothing. Raises UsageError for options that mean nothing together or have no
    such value, InputError where there is nothing that could be verified, HubError where the Hub can't be asked.
    """
    check_listener(on_event)
    path, against = place_of(path, "checkpoint"), place_of(against, "reference") if against is not None else None
    whole_number("jobs", jobs, most=MOST_JOBS)
    _check_options(against, base, delta, lora, vision_tower, accept_tower, strict, allow)
    numbers = _check_part(part, deep, against, base)
    subject = open_subject(path)
    share = _share(subject, numbers) if numbers else None
    predicted = against == PUBLISHED_TABLE and delta is not None
    reference = find_reference(against) if against is not None and not predicted else None
    given = {"vision tower": vision_tower, "delta": delta, "base": base}
    tower, given_delta, given_base = (opened(source, role) if source is not None else None for role, source in given.items())
    sources = None
    if given_base and not predicted and subject.checkpoint:
        sources = remake(subject.checkpoint, given_base, delta=given_delta, lora=lora, tower=tower, accept_tower=accept_tower)
    everything = deep or reference is not None or base is not None
    if everything and (reference or sources):
        on_event(Note(_announced(subject, reference, sources, tower)))
    findings, reading = _itself(subject, reference, everything, share, jobs, on_event)
    asked: list[Finding] = []
    if reference:
        asked += _against(subject, reading, reference, tower, jobs, on_event)
    if sources and subject.checkpoint:
        asked += compare_remade(subject.checkpoint, sources, entries=reading.tensors, jobs=jobs, on_event=on_event)
        asked += compare_files(subject.checkpoint, sources, "the sources", "L4")
    if predicted and given_delta and subject.checkpoint:
        asked += check_published(subject.checkpoint, given_delta, given_base, on_event=on_event)
    every = _settled([*findings, *asked], asked, bool(reference or sources or predicted))
    label = reference.label if reference else ""
    return Verification(subject.place.resolve().name, tuple(_judged(every, strict, allow)), _facts(subject, reading, share), label)


def rules() -> list[str]:
    """The names of all rules, which `allow` takes."""
    return sorted({*OTHER_RULES, *(rule.name for table in RULES_OF_LAYOUT.values() for rule in table)})


def _check_options(
    against: str | Path | None,
    base: CheckpointSource | None,
    delta: CheckpointSource | None,
    lora: Adapters,
    tower: CheckpointSource | None,
    accept_tower: bool,
    strict: bool,
    allow: Sequence[str],
) -> None:
    published = str(against) == PUBLISHED_TABLE
    if (delta or lora) and not base and not (published and delta):
        raise UsageError("what was made again needs its base", hint="pass `--base` too, or `--published --delta DELTA`")
    if tower and not base and (against is None or published):
        raise UsageError("the vision tower serves what was made again, or a comparison", hint="pass `--base` or `--against` too")
    if accept_tower and not (tower and base):
        raise UsageError("`--accept-tower` belongs to `--base` and `--vision-tower`", hint="pass both, or leave it out")
    if isinstance(allow, str) or not isinstance(allow, Iterable):
        raise UsageError(f"`allow` is {allow!r}, no list of rules", hint='give it as `allow=["weight-files"]`')
    if unknown := sorted(str(rule) for rule in allow if rule not in rules()):
        raise UsageError(f"there is no rule {listed(unknown)}", hint=f"the rules are {', '.join(rules())}")
    if allow and not strict:
        raise UsageError("`--allow` takes a rule out of `--strict`", hint="pass `--strict` too")


def _check_part(part: str | None, deep: bool, against: str | Path | None, base: CheckpointSource | None) -> tuple[int, int] | None:
    if part is None:
        return None
    numbers = to_part(part)
    if not deep or against is not None or base is not None:
        hint = "pass `--deep` too" if not deep else "leave it out: what is compared is read as a whole"
        raise UsageError("`--part` is a part of what `--deep` reads", hint=hint)
    return numbers


def _share(subject: Subject, numbers: tuple[int, int]) -> Share:
    """What a part reads: of the tensors where a manifest records all of them, and of the files that are not read in every part."""
    recorded = subject.manifest.tensors if subject.manifest else {}
    by_tensor = bool(subject.tensors) and all(name in recorded for name in subject.tensors)
    inside = subject.by_file if by_tensor else {}
    files = {name: size_of(file) for name, file in subject.files.items() if name not in inside and not _is_read_always(subject, name)}
    return share_of(numbers, {name: tensor.nbytes for name, tensor in subject.tensors.items()} if by_tensor else {}, files)


def _announced(subject: Subject, reference: Reference | None, sources: Checkpoint | None, tower: Checkpoint | None) -> str:
    """How much will be read of what."""
    sizes = [(sum(map(size_of, subject.files.values())), shown(subject.place.resolve().name))]
    if reference and reference.nbytes:
        sizes.append((reference.nbytes, reference.label))
    if sources:
        leaves = {leaf for tensor in sources.parameters().values() for leaf in tensor.leaves()}
        sizes.append((sum(leaf.nbytes for leaf in leaves), "the sources"))
    if tower and reference:
        sizes.append((tower.nbytes, shown(tower.origin.name)))
    return f"{size(sum(count for count, _ in sizes))} will be read: {', '.join(f'{size(count)} of {name}' for count, name in sizes)}"


def _itself(
    subject: Subject, reference: Reference | None, everything: bool, share: Share | None, jobs: int, on_event: Listener
) -> tuple[list[Finding], Reading]:
    """Findings by itself and by its own records: the part that all modes share."""
    whole: Collection[str] = subject.files if everything else ()
    if share:  # a file whose tensors are all of this part is read as a whole, which proves its header too
        whole = {*share.files, *(file for file, names in subject.by_file.items() if share.tensors.issuperset(names))}
    chosen = {name: file for name, file in subject.files.items() if name in whole or _is_read_always(subject, name)}
    algorithms, tensors = reference.algorithms if reference else (FILES,), subject.tensors if everything else {}
    if share:
        read = {os.path.abspath(file) for file in chosen.values()}
        tensors = {name: t for name, t in tensors.items() if name in share.tensors or {leaf.file.path for leaf in t.leaves()} <= read}
    own = subject.manifest.algorithm if subject.manifest else TENSORS
    each = tuple(dict.fromkeys((own, reference.algorithm if reference and reference.has_tensors else own)))
    watch = watch_over(subject.checkpoint) if tensors and subject.checkpoint else None
    reading = rehash(chosen, tensors, algorithms=algorithms, tensor_algorithms=each, jobs=jobs, on_event=on_event, watch=watch)
    findings = folded("L0", subject.place.name, _structure(subject), _structure_text(subject), part="structure")
    findings += _files(subject, reading, everything, share) + list(_recorded(subject)) + _health(subject)
    findings += _tensors(subject, reading, share) if everything else [_unread(subject)]
    return findings, reading


def _against(
    subject: Subject, reading: Reading, reference: Reference, tower: Checkpoint | None, jobs: int, on_event: Listener
) -> list[Finding]:
    read, findings = read_reference(reference, jobs=jobs, on_event=on_event)
    explained = _added(subject)
    if tower and subject.checkpoint:
        found, equal = compare_tower(subject.checkpoint, reading, tower, jobs=jobs, on_event=on_event)
        findings += found
        explained |= equal
    weights: dict[str, list[str]] = {name: [] for name in subject.files if subject.is_weights(name)} | subject.by_file
    compared = Side(subject.place, subject.checkpoint, subject.files, reading, weights, explained)
    return findings + compare(compared, read, tower=tower, jobs=jobs)


def _added(subject: Subject) -> dict[str, str]:
    """Tensors that were added to the source, by the recipe in the manifest, with that as the reason. Says nothing of their values."""
    found: dict[str, str] = {}
    reason = "which its manifest records as added"
    for step in subject.manifest.recipe if subject.manifest else ():
        given = {"tower.": "tower" in step.get("inputs", {}), "projector.2.": bool(step.get("options", {}).get("projector_form"))}
        prefixes = tuple(prefix for prefix, added in given.items() if added)
        found |= {name: reason for name in subject.tensors if canonical(name).startswith(prefixes)}
    return found


def _settled(findings: list[Finding], asked: list[Finding], more: bool) -> list[Finding]:
    """The findings, with verdicts changed that depend on other findings.

    Where a reference or the sources prove the values, missing records leave nothing unproved, and a rule on the kind of checkpoint finds
    no fault, since the reference is of the same kind. Where nothing was compared, that is a finding.
    """
    if not more:
        return findings
    if not any(each.verdict in ("ok", "failed", "unproved") for each in asked):
        findings = [*findings, Finding("against", "unproved", "values", "nothing was compared", part="nothing was compared")]
    proved = not any(each.verdict in ("failed", "unproved") and each.rule != "small-files" for each in asked)

    def settled(each: Finding) -> Finding:
        if each.verdict == "unproved" and each.level in ("L2", "L3"):
            return replace(each, verdict="unchecked", part="")
        if proved and each.rule in STATE_RULES and each.verdict in ("failed", "warning"):
            return replace(each, verdict="note", text=f"{each.text}; so is what it was compared with")
        return each

    return list(map(settled, findings))


def _judged(findings: Iterable[Finding], strict: bool, allow: Sequence[str]) -> Iterator[Finding]:
    """With `--strict`, warnings are failures, unless their rule is allowed, which the headline then says."""
    for each in findings:
        if not strict or each.verdict != "warning":
            yield each
        elif each.rule in allow:
            yield replace(each, text=f"{each.text} (allowed)", part=f"allowed: {each.rule}")
        else:
            yield replace(each, verdict="failed", text=f"{each.text} (a warning of the rule {each.rule}, with --strict)")


def checksum(path: CheckpointSource, *, force: bool = False, jobs: int = 2, on_event: Listener = lambda event: None) -> list[Path]:
    """Write checksums beside a checkpoint: `SHA256SUMS` and the manifest in its folder, or `FILE.sha256` and `FILE.manifest.json` beside a
    file. Every byte is read.

    `path` is a folder or a file of this machine, or a checkpoint that was opened there. Returns the files that were written: one that is
    there and says the same is left as it is. `force` replaces one that says something else. `jobs` is the number of threads, from 1 to 64.
    `on_event` is called with each Event, such as a ProgressBar.

    Raises UsageError for a value that an option can't have, OutputError where a file says something else or can't be written, InputError
    where the checkpoint is damaged or is not on this machine.
    """
    check_listener(on_event)
    path = place_of(path, "checkpoint")
    whole_number("jobs", jobs, most=MOST_JOBS)
    if isinstance(parse_source(source_text(path)), HubSource):
        raise InputError(f"`{path}` is on the Hub, which keeps checksums itself", hint=f"run `llava-weights verify PATH --against {path}`")
    checkpoint = need_files(open_checkpoint(path), "`checksum`")
    place = checkpoint.origin.path
    problems: list[Finding] = []
    files = _regular_files(place, checkpoint, problems)
    if problems:
        raise InputError(problems[0].text, hint=problems[0].remedy)
    if odd := [name for name in files if not is_text(name)]:
        hint = "rename it, or move it elsewhere; a manifest holds text only"
        raise InputError(f"the name {shown(odd[0])} is not UTF-8", facts={"folder": place}, hint=hint)
    for target in (sums_path(place), manifest_path(place)):
        if not target.is_file():  # what is there already is compared first
            check_file(target)
    earlier = _earlier(manifest_path(place))
    each = tuple(dict.fromkeys((TENSORS, earlier.algorithm if earlier else TENSORS)))
    reading = rehash(files, checkpoint.tensors, tensor_algorithms=each, jobs=jobs, on_event=on_event)
    for name, why in (*reading.damaged.items(), *((name, "its zip records do not match their CRC-32") for name in reading.broken)):
        raise InputError(f"{shown(name)} is damaged, so nothing was written: {why}", hint=GET_AGAIN)
    entries = [FileEntry(name, size_of(files[name]), digests[FILES]) for name, digests in reading.files.items()]
    sums = make_sums(entries)
    wanted = {} if _holds(sums_path(place), sums) else {sums_path(place): sums}
    if not earlier or not _says_the_same(earlier, entries, reading):
        wanted[manifest_path(place)] = json_bytes(make_manifest((), {}, entries, tuple(reading.tensors.values()), {}))
    if not force and (taken := [target for target in wanted if os.path.lexists(target)]):
        hint = "run `llava-weights verify` to see what changed, or pass `--force` to replace it"
        raise OutputError(f"{shown(taken[0].name)} exists and records something else", facts={"file": taken[0]}, hint=hint)
    for target, data in wanted.items():
        try:
            write_file(target, data)
        except OSError as error:
            raise output_error(error, target) from error
    return list(wanted)


def _holds(target: Path, data: bytes) -> bool:
    """Whether a file is there, with these bytes."""
    return not target.is_symlink() and target.is_file() and size_of(target) == len(data) and target.read_bytes() == data


def _earlier(target: Path) -> Manifest | None:
    """The manifest that is there already, where it can be read."""
    if target.is_symlink() or not target.is_file():
        return None
    try:
        return read_manifest(target)
    except InputError:
        return None


def _says_the_same(earlier: Manifest, files: list[FileEntry], reading: Reading) -> bool:
    """Whether a manifest is right. Another schema, recipe or environment is no difference: the recorded one may tell more."""
    digests = {name: entry.digest for name, entry in reading.by(earlier.algorithm).tensors.items()}
    same_tensors = {entry.name: entry.digest for entry in earlier.tensors.values()} == digests
    return same_tensors and earlier.files == {entry.path: entry for entry in files}


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
        if not manifest and present(listing := sums_path(place)):
            listing = member(listing.parent, listing.name)
            sums = {entry.path: entry.digest for entry in read_sums(listing) if entry.algorithm == FILES}
    except InputError as error:
        problems.append(_refused(error, MANIFEST))
    if manifest:
        sums = {name: entry.sha256 for name, entry in manifest.files.items()}
    files = _regular_files(place, checkpoint, problems, sums)
    return Subject(place, checkpoint, manifest, sums, files, tuple(problems))


def _holds_a_checkpoint(place: Path) -> bool:
    if not os.path.isdir(place):
        return os.path.isfile(place) and place.suffix in WEIGHT_SUFFIXES
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
            if path := optional(folder, name):
                files[name] = path
        except InputError as error:
            problems.append(_refused(error, name))
    return files


def _is_read_always(subject: Subject, name: str) -> bool:
    return name in subject.sums and not subject.is_weights(name) and size_of(subject.files[name]) <= LARGEST_SMALL_FILE


# --- L0: structure --------------------------------------------------------------------------------------------------


def _structure(subject: Subject) -> Iterator[Finding]:
    yield from subject.problems
    yield from _listed_files(subject)
    if not subject.checkpoint:
        return
    if subject.manifest:
        yield from _headers(subject.tensors, subject.manifest.tensors)
    yield from (Finding("L0", "unchecked", subject.place.name, note) for note in subject.checkpoint.notes)
    if subject.checkpoint.wrapped:
        text = f"the names in its files have {subject.checkpoint.wrapped} in them: no program finds a tensor of the model by these names"
        remedy = "`llava-weights convert PATH --to llava-hf -o OUT`, or `--to llava`, writes the model's own names"
        yield Finding("L0", "failed", subject.place.name, text, remedy)
    if not subject.packed:
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
            text = f"{shown(name)} is not listed in {_record(subject)}"
            yield Finding("L0", "warning", name, text, "remove it if you do not know it", "unlisted-file")


def _headers(found: Mapping[str, Any], recorded: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    """Names, dtypes and shapes."""
    for name, entry in recorded.items():
        if name not in found:
            yield failed("L0", name, f"{shown(name)} is in the manifest, but in no weight file")
        elif (found[name].dtype, found[name].shape) != (entry.dtype, entry.shape):
            yield failed("L0", name, f"{shown(name)} is {kind(found[name])}, its manifest says {kind(entry)}")
    for name in found:
        if name not in recorded:
            yield failed("L0", name, f"{shown(name)} is in a weight file, but not in the manifest")


def _config(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Whether the tensors are those that config.json describes."""
    if kind := kind_of(checkpoint):
        part = "a family that is not known" if not kind.quantised else "shapes of quantised weights"
        text = f"it is {kind.name}, by {kind.evidence}: {kind.why}; names and shapes were not compared with a config"
        yield Finding("L0", "unchecked", "config.json", text, kind.hint, part=f"{part} (nothing to compare them with)")
    elif checkpoint.layout in CHECKED_STRUCTURE and checkpoint.config and known_decoder(checkpoint.config) is None:
        why = f"no decoder is known by `model_type` {shown(str(checkpoint.config.get('model_type')))}"
        yield Finding("L0", "unchecked", "config.json", f"shapes were not compared with a config: {why}")
    elif checkpoint.layout in CHECKED_STRUCTURE and checkpoint.config:
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        stored = {"tie_word_embeddings": False} if VOCABULARY[1] in shapes else {}  # a tied head may be: health.py looks at its values
        try:
            check_structure({**checkpoint.config, **stored}, shapes)
        except InputError as error:
            yield _refused(error, "config.json")
    elif checkpoint.layout == "adapter":
        yield _adapter(checkpoint)
    elif checkpoint.layout == "gguf":
        yield from check_gguf(checkpoint)
    elif checkpoint.layout != "llava-hf":  # health.py has the rules of that one
        why = f"there is no rule for this layout ({checkpoint.layout})" if checkpoint.config else "there is no config.json"
        yield Finding("L0", "unchecked", "config.json", f"shapes were not compared with a config: {why}")


def _adapter(checkpoint: Checkpoint) -> Finding:
    """Whether the tensors of an adapter are those that adapter_config.json describes."""
    try:
        found = open_adapter(checkpoint.origin.path)
    except InputError as error:
        return Finding(
            "L0", "warning", ADAPTER_CONFIG, f"it is an adapter that can't be merged or converted: {error.what}", error.hint or ""
        )
    beside = len(found.replacements) + len(found.rows)
    more = f", and {beside} tensors that were trained whole" if beside else ""
    text = f"a LoRA adapter of {len(found.modules)} modules, each with both factors, of the rank that adapter_config.json says{more}"
    return Finding("L0", "ok", ADAPTER_CONFIG, text)


def _structure_text(subject: Subject) -> str:
    if not subject.checkpoint:
        return ""
    count = len(subject.checkpoint.origin.files)
    files = f"{count} weight {'file' if count == 1 else 'files'}, {size(sum(file.size for file in subject.checkpoint.origin.files))}"
    manifest = ", as in the manifest" if subject.manifest else ""
    return f"{len(subject.tensors):,} tensors in {files}: names, shapes, sizes and index agree{manifest}"


def _health(subject: Subject) -> list[Finding]:
    """What the files and a few MB of values say by themselves. An integer delta holds packed differences: no rule on a model fits it."""
    folder = subject.place if subject.place.is_dir() else None
    findings = list(health(subject.checkpoint, folder)) if subject.checkpoint else []
    if not folder:  # a weight file has no small files that could be missing
        findings = [each for each in findings if "/" not in each.rule or each.rule.startswith("tensors/")]
    if not subject.packed:
        return findings
    text = "this is an integer delta that was never applied"
    return [*(each for each in findings if each.rule == "code"), Finding("L1", "failed", subject.place.name, text, APPLY, "state")]


# --- L2: files, L3: tensors -----------------------------------------------------------------------------------------


def _files(subject: Subject, reading: Reading, everything: bool, share: Share | None = None) -> list[Finding]:
    """Digests of the files against the recorded ones; and the weights of which none is recorded."""
    if not subject.sums:
        text, part = "no checksums are there: neither manifest nor SHA256SUMS", "nothing is recorded to compare with"
        return [Finding("L2", "unproved", subject.place.name, text, WRITE_SUMS, part=part)]

    def wrong() -> Iterator[Finding]:
        yield from (failed("L2", name, f"{shown(name)} can't be read: {why}") for name, why in reading.damaged.items())
        for name, digests in reading.files.items():
            if (recorded := subject.sums.get(name)) and digests["sha256"] != recorded:
                yield failed(
                    "L2", name, f"{shown(name)} changed: its sha256 is {digests['sha256'][:12]}..., recorded was {recorded[:12]}..."
                )

    matched = sum(digests["sha256"] == subject.sums.get(name) for name, digests in reading.files.items())
    text = f"{counted(matched, 'file')} as recorded in {_record(subject)}" if matched else ""
    what = f"{matched:,} of {counted(len(subject.sums), 'file')}" if share else "files" if everything else "small files"
    part = f"{what} (by {_recorder(subject)})"
    findings = folded("L2", subject.place.name, wrong(), text, part=part)
    tensors = subject.manifest.tensors if subject.manifest else {}
    by_file = subject.by_file
    weights = [name for name in subject.files if subject.is_weights(name) and name not in subject.sums]
    if lacking := [name for name in weights if not by_file.get(name) or any(tensor not in tensors for tensor in by_file[name])]:
        text = f"{_record(subject)} records nothing of the weights in {listed(lacking)}"
        part = f"nothing recorded of {counted(len(lacking), 'weight file')}"
        findings.append(Finding("L2", "unproved", lacking[0], text, WRITE_SUMS, part=part))
    if not matched and not findings and not share:
        text = f"{_record(subject)} lists weights only, which were not read"
        findings.append(Finding("L2", "unproved", subject.place.name, text, DEEP, part="no recorded file was read"))
    return findings


def _recorded(subject: Subject) -> Iterator[Finding]:
    """The warnings that each step recorded when this was made."""
    manifest = subject.manifest
    if manifest and manifest.doubt:
        yield Finding("recorded", "unchecked", manifest.path.name, f"{manifest.doubt}: its warnings are not known")
    for step in manifest.recipe if manifest else ():
        for warning in step.get("warnings", ()):
            text = f"recorded when it was made, by {shown(str(step.get('operation', '?')))}: {warning[:LONGEST_WARNING]}"
            yield Finding("recorded", "warning", MANIFEST, text, "see whether it was meant so: the result is only as good as its inputs")


def _unread(subject: Subject) -> Finding:
    count = counted(len(subject.tensors), "tensor") if subject.tensors else "the weights"
    part = f"values of {count} not read (--deep reads them)"
    return Finding("L3", "unchecked", subject.place.name, f"the values of {count} were not read", DEEP, part=part)


def _tensors(subject: Subject, reading: Reading, share: Share | None) -> list[Finding]:
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
    count = counted(len(reading.tensors), "tensor")
    if share:
        count = f"{len(reading.tensors):,} of {counted(len(subject.tensors), 'tensor')}"
        unread = [_rest(subject, share)] if share.count > 1 else []
    as_recorded = ", every digest as in the manifest" if recorded else ""
    text = f"{count} read, none with inf or NaN{as_recorded}" if reading.tensors else ""
    part = f"values of {count} (by {_recorder(subject)})" if recorded else ""
    return folded("L3", subject.place.name, wrong(), text, part=part) + unread


def _rest(subject: Subject, share: Share) -> Finding:
    """What the other parts are for."""
    text = f"{share} was read, {share.amount} of what is read in parts"
    remedy = f"the other parts are `--part 1/{share.count}` to `--part {share.count}/{share.count}`"
    return Finding("L3", "unchecked", subject.place.name, text, remedy, part=f"{share} alone was read ({share.amount})")


def _refused(error: InputError, otherwise: str) -> Finding:
    """What a reader refuses, as a finding on the file that it names."""
    path = error.facts.get("path") or error.facts.get("link")
    return refused(error, Path(path).name if path else otherwise, GET_AGAIN)


def _record(subject: Subject) -> str:
    return shown(subject.manifest.path.name if subject.manifest else sums_path(subject.place).name)


def _recorder(subject: Subject) -> str:
    return "its manifest" if subject.manifest else _record(subject)


def _facts(subject: Subject, reading: Reading, share: Share | None) -> dict[str, Any]:
    """`root` and `content` are those of the values that were read, by the algorithm of its manifest; empty where they were not."""
    entries, algorithm = list(reading.tensors.values()), reading.algorithm
    complete = len(entries) == len(subject.tensors) > 0
    return {
        "files": len(subject.files),
        "tensors": len(subject.tensors),
        "nbytes": sum(map(size_of, subject.files.values())),
        "read": reading.nbytes,
        "root": root_of_tensors(entries, algorithm) if complete else "",
        "content": root_of_content(entries, algorithm) if complete else "",
        **({"part": {"number": share.number, "count": share.count, "nbytes": share.nbytes, "total": share.total}} if share else {}),
    }
