"""A checkpoint: tensors, config, small files and history together, and how one is opened.

Opening reads headers and small JSON files only. Tensor names, shapes and config decide what a folder holds, never its name.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, UsageError
from ..families.decoders import size_name
from ..families.files import CONFIG_FILES, LICENSE_PREFIXES, PROCESSOR_FILES, TOKENIZER_FILES, WEIGHT_SUFFIXES
from ..families.layouts import DROPPED, LAYOUTS, VOCABULARY, canonical
from ..families.unsupported import unsupported
from ..formats.folder import index_file, index_folder, index_ggufs, member, optional
from ..formats.gguf import GgufFile
from ..storage.hub import HubSource, fetch, parse_source, source_text
from ..storage.places import Place, names_in, whole
from ..storage.reading import SourceFile, present, unreadable
from ..storage.remote import is_remote, open_remote
from ..storage.strict_json import load_object
from ..tensors.lazy import LazyTensor
from ..text import brief, legible, listed, redact, redacted, scheme_of, shown, size
from .part_folders import PartFolders, find_parts, join_parts
from .stored_names import model_names

LARGEST_OBJECT = 1 << 20  # bytes of a small file, where no other limit is given


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint came from: `name` is the folder's, the file's or the repository's, `place` where it lies:
    a path, or what stands for one over the network. `container` is "safetensors", "torch", "meta" or
    "gguf", `files` are the weight files, `revision` the commit on the Hub, None for anything else. Manifest and card show `name`, never
    `place`.
    """

    name: str
    place: Place
    container: str
    files: tuple[SourceFile, ...]
    revision: str | None = None

    def __repr__(self) -> str:
        return f"Origin({brief(self.name)}, {self.container!r}, {len(self.files)} {'file' if len(self.files) == 1 else 'files'})"

    @property
    def remote(self) -> bool:
        """Whether the weights are read over the network."""
        return any(file.remote for file in self.files)

    @property
    def path(self) -> Path:
        """Where it lies on this machine. Raises InputError where it does not."""
        if isinstance(self.place, Path):
            return self.place
        what = f"`{self.name}` is read over the network, and whole files are needed"
        raise InputError(what, facts={"address": self.place}, hint="copy it to this machine first")

    @property
    def by_name(self) -> dict[str, SourceFile]:
        """The weight files by name; by their paths in `path` where they lie in several folders, in which names repeat."""
        several = not self.remote and len({os.path.dirname(file.path) for file in self.files}) > 1
        return {os.path.relpath(file.path, self.path) if several else file.name: file for file in self.files}


@dataclass(frozen=True)
class Step:
    """One thing that was done to make a checkpoint, as the manifest and the card record it.

    `operation` is the command ("apply-delta"), `inputs` are its inputs, each with its role ("base", "delta", "lora", "source", "tower"),
    `options` those that change the output. `summary` holds the rows of the printed plan ("add": "363 tensors"), `repairs`, `notes` and
    `warnings` are sentences, and so are `cautions`: warnings of what other programs would make of it, which say nothing against the
    checkpoint. `checks` are measurements of the inputs as plain data.
    """

    operation: str
    inputs: tuple[tuple[str, Origin], ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, str] = field(default_factory=dict)  # rows of the printed plan: "add" -> "363 tensors"
    repairs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    checks: Mapping[str, Any] = field(default_factory=dict)
    cautions: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Step({self.operation!r}, {', '.join(f'{role} {brief(origin.name, 30)}' for role, origin in self.inputs[:3])})"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is described, and not in memory: what every transform takes and returns.

    `tensors` are the tensors by name, in the order of the output. `config` is config.json, empty where there is none. `files` are the small
    files (tokenizer, processor, generation config, licence), each as its path or its bytes. `history` is what was done to make it, first
    step first, empty for a checkpoint that was only opened. `metadata` is `__metadata__` of each safetensors file, by file name, and
    `notes` are sentences on what was found when it was opened.
    """

    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any]
    origin: Origin
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    history: tuple[Step, ...] = ()
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # of each safetensors file, by file name
    notes: tuple[str, ...] = ()
    wrapped: str = ""  # what a wrapper put into the names in its files, which `tensors` leaves out
    gguf: tuple[GgufFile, ...] = ()  # of one that is to be written as GGUF: its files, with their keys and the names of their tensors
    folders: PartFolders | None = None  # of a checkpoint that lies in folders of its parts, as xtuner's do

    def __repr__(self) -> str:
        done = f", by {brief(', '.join(step.operation for step in self.history))}" if self.history else ""
        return f"Checkpoint({brief(self.origin.name)}, {self.layout!r}, {len(self.tensors)} tensors, {size(self.nbytes)}{done})"

    @property
    def nbytes(self) -> int:
        """Bytes of all values, without headers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def layout(self) -> str:
        """ "llava", "llava-hf", "llama", "clip", "projector", "mpt", "adapter" or "loha", by the names of the tensors, else "unknown"."""
        return layout_of(self.tensors)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table, 0 where there is none."""
        table = self.tensors.get(VOCABULARY[0])
        return table.rows if table else 0

    @property
    def size(self) -> str:
        """ "13B" for a published LLaMA shape, else the number of layers and their width; empty without a decoder."""
        norm = self.tensors.get("model.norm.weight") or self.tensors.get("model.layers.0.input_layernorm.weight")
        gate = self.tensors.get("model.layers.0.mlp.gate_proj.weight")
        return size_name(norm.shape[0], layer_count(self.tensors), gate.rows if gate else 0) if norm and norm.shape else ""

    def parameters(self) -> dict[str, LazyTensor]:
        """The tensors without the buffers that no program reads, such as `rotary_emb.inv_freq`."""
        return {name: tensor for name, tensor in self.tensors.items() if not re.fullmatch(DROPPED, name)}

    def by_canonical_name(self) -> dict[str, LazyTensor]:
        """The parameters by their canonical names. Raises InputError where two names mean one tensor."""
        found: dict[str, LazyTensor] = {}
        for name, tensor in self.parameters().items():
            if canonical(name) in found:
                what, facts = f"{shown(name)} is there twice, under the names of two layouts", {"checkpoint": self.origin.name}
                raise InputError(what, facts=facts, hint="remove one of the two, or make the checkpoint again")
            found[canonical(name)] = tensor
        return found


def layout_of(tensors: Iterable[str]) -> str:
    """The name of the first row of `LAYOUTS` that fits these names, or "unknown"."""

    def some(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in tensors)

    return next((x.name for x in LAYOUTS if all(map(some, x.needs)) and not any(map(some, x.lacks))), "unknown")


def main_dtype(tensors: Mapping[str, LazyTensor]) -> str:
    """The dtype that most tensors have."""
    return Counter(tensor.dtype for tensor in tensors.values()).most_common(1)[0][0]


def layer_count(tensors: Mapping[str, LazyTensor]) -> int:
    """How many decoder layers there are, by the highest number in `model.layers.N.`."""
    numbers = [int(found[1]) for name in tensors if (found := re.match(r"model\.layers\.(\d{1,6})\.", name))]
    return max(numbers, default=-1) + 1


CheckpointSource = Checkpoint | str | Path  # what public functions take as a checkpoint: an open one, or its path, Hub name or address


def opened(source: CheckpointSource, role: str, *, whole: bool = False, unmerged: bool = False, gguf: bool = False) -> Checkpoint:
    """`source` as a checkpoint, opened if it is not open yet.

    Raises UsageError for what is no source, InputError unless `unmerged` where a part is missing or adapters in its folders are still to
    be merged, unless `gguf` for files of llama.cpp, and as `open_checkpoint`."""
    found = source if isinstance(source, Checkpoint) else open_checkpoint(to_place(source, role), whole=whole)
    if found.origin.container == "gguf" and not gguf:
        what = f"the {role} {shown(found.origin.name)} is GGUF, which can be looked at, verified and compared, and not used as an input"
        raise InputError(what, hint="give the checkpoint that it was made from")
    if found.folders and not unmerged:
        found.folders.refuse(found.origin.name)
        if found.folders.adapters:
            what = f"the {role} {shown(found.origin.name)} has adapters that are still to be merged: {listed(found.folders.adapters)}"
            raise InputError(what, hint=f"merge them first, as `convert {found.origin.name} --to llava-hf -o OUT` does")
    return found


def to_place(source: object, role: str) -> str | Path:
    """`source` if it is a path or a text. Raises UsageError for anything else."""
    if not isinstance(source, str | os.PathLike) or not isinstance(os.fspath(source), str) or not os.fspath(source):
        hint = "give a path, `owner/name` of the Hub, or what `open_checkpoint` returned"
        raise UsageError(f"the {role} is {_kind_of(source)}, no path", hint=hint)
    if "\0" in os.fspath(source):
        raise UsageError(f"the {role} has a NUL in its path", facts={"given": repr(source)}, hint="give a path without it")
    return source if isinstance(source, str) else Path(source)


def place_of(source: CheckpointSource, role: str) -> str | Path:
    """Where the files of `source` are. Raises UsageError for a checkpoint that was not written yet, and as `to_place`."""
    if not isinstance(source, Checkpoint):
        return to_place(source, role)
    if source.history:
        raise UsageError(f"the {role} was not written yet", hint="`execute(make_plan(checkpoint), folder)` writes it")
    return need_files(source, f"the {role}").origin.path


def _kind_of(value: object) -> str:
    return "an empty text" if value in ("", b"") else f"of the type `{type(value).__name__}`"


def open_checkpoint(source: str | Path, *, revision: str | None = None, progress: bool | None = None, whole: bool = False) -> Checkpoint:
    """Open a checkpoint. Reads headers and small JSON files only.

    `source` is a folder, a file, `owner/name[@revision]` on the Hub (downloaded first), or an address:
    `hf://owner/name[@revision][/folder]`, `s3://`, `gs://`, `https://` (values are read over the network when they are needed). A local
    path that exists wins. `revision` is a branch, tag or commit of a repository. `progress` shows the bars of a download: None only on a
    terminal, False never. With `whole`, `hf://` is downloaded first too, which is better where everything is read more than once.

    Raises UsageError for what is no path or name, InputError for what is missing, damaged, hostile or of an unknown kind, HubError where
    the Hub can't serve it.
    """
    text = source_text(to_place(source, "source"))
    if revision is not None and not isinstance(revision, str):
        raise UsageError(f"the revision is {_kind_of(revision)}, no text", hint="give a branch, a tag or a commit")
    if is_remote(text) and not (whole and scheme_of(text) == "hf"):
        found = open_remote(text, revision)
        return _open(found.place, name=found.name, revision=found.revision)
    parsed = parse_source(text)
    if isinstance(parsed, HubSource):
        repo = fetch(parsed, revision=revision, progress=progress)
        opened = _open(repo.folder, name=repo.repo_id, revision=repo.revision)
        return replace(opened, notes=(*opened.notes, f"{repo.repo_id} comes from the cache")) if repo.from_cache else opened
    if revision is not None:
        raise InputError(f"`{source}` is a local path, so it has no revision `{revision}`", hint="leave out `--revision`")
    try:
        return _open(parsed.path, name=parsed.path.resolve().name, revision=None)
    except OSError as error:
        raise unreadable(parsed.path, error) from error


def need_files(checkpoint: Checkpoint, purpose: str) -> Checkpoint:
    """`checkpoint` itself. Raises InputError, naming the `purpose`, where its files are not on this machine."""
    if checkpoint.origin.remote:
        hub = checkpoint.origin.revision and f"give `{checkpoint.origin.name}@{checkpoint.origin.revision}`, which is downloaded first"
        what = f"{purpose} needs whole files, and `{checkpoint.origin.name}` is read over the network"
        raise InputError(what, hint=hub or "copy it to this machine first")
    return checkpoint


def _open(path: Place, *, name: str, revision: str | None) -> Checkpoint:
    folder = path if path.is_dir() else path.parent
    if isinstance(path, Path) and path.is_dir() and (parts := find_parts(path, layout_of)):
        return _open_parts(path, parts, name=name, revision=revision)
    try:
        found = index_ggufs(path) or (index_folder(path) if path.is_dir() else index_file(path))
    except InputError as error:
        if (told := _of_parts(path, name, error)) is error:
            raise
        raise told from error
    config = found.config or _read_config(folder if path.is_dir() else None)
    home = Path(found.files[0].path).parent if isinstance(path, Path) else path
    files, notes = _small_files(home) if path.is_dir() else ({}, ())
    tensors, wrapped, renamed = model_names(found.tensors, config)
    return Checkpoint(
        tensors=tensors,
        config=config,
        origin=Origin(redact(legible(name)), path.absolute(), found.container, found.files, revision),
        files=files,
        metadata=found.metadata,
        notes=(*found.notes, *renamed, *notes),
        wrapped=wrapped,
    )


def _open_parts(path: Path, parts: tuple[str, ...], *, name: str, revision: str | None) -> Checkpoint:
    """The checkpoint in folders of its parts: tokenizer and generation config of the text model, image processor of the tower."""
    joined = join_parts(path, parts)
    tensors, wrapped, renamed = model_names(joined.weights.tensors, joined.config)
    files, notes = _small_files(path)
    for place, kinds in ((joined.text_place, (*TOKENIZER_FILES, *CONFIG_FILES[1:])), (joined.tower_place, PROCESSOR_FILES)):
        if place is not None and place != path:
            more, others = _small_files(place)
            files |= {file: found for file, found in more.items() if file in kinds or (file not in files and file not in PROCESSOR_FILES)}
            notes = (*notes, *others)
    return Checkpoint(
        tensors=tensors,
        config=joined.config,
        origin=Origin(redact(legible(name)), path.absolute(), joined.weights.container, joined.weights.files, revision),
        files=files,
        metadata=joined.weights.metadata,
        notes=(*joined.weights.notes, *renamed, *notes),
        wrapped=wrapped,
        folders=joined.folders,
    )


def _of_parts(path: Place, name: str, error: InputError) -> InputError:
    """The error for a folder whose weights lie in folders below it, where its config tells a family for which there is no class."""
    with suppress(InputError, OSError):
        weights = path.is_dir() and any(entry.endswith(tuple(WEIGHT_SUFFIXES)) for entry in names_in(path))
        if path.is_dir() and not weights and (found := unsupported(_read_config(path), ())):
            row, evidence = found
            facts = {"why it can't be used": row.why, "recognised by": evidence, **error.facts}
            return InputError(f"`{name}` is {row.name}", facts=facts, hint=row.hint)
    return error


def _read_config(folder: Place | None) -> Mapping[str, Any]:
    if folder is None or "config.json" not in names_in(folder):  # on a disk that fails, `lexists` would return False
        return {}
    return load_object(member(folder, "config.json"))


def _small_files(folder: Place) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    """Tokenizer, processor, generation config and licence files by name, and a note on folders, pipes and devices with such names.

    Meta keeps `tokenizer.model` beside the size folders.
    """
    small = (*TOKENIZER_FILES, *PROCESSOR_FILES, *CONFIG_FILES[1:])
    names = [name for name in names_in(folder) if name in small or name.startswith(LICENSE_PREFIXES)]
    there = {name: place for name in names if (place := optional(folder, name))}
    files: dict[str, Path | bytes] = {name: place if isinstance(place, Path) else whole(place) for name, place in there.items()}
    others = [name for name in names if name not in files]
    if (
        isinstance(folder, Path)
        and "tokenizer.model" not in names
        and present(folder / "params.json")
        and (above := optional(folder.parent, "tokenizer.model"))
    ):
        files["tokenizer.model"] = above
    return files, (f"not read, since no regular files: {listed(others)}",) if others else ()


def describe(step: Step) -> dict[str, Any]:
    """A step as plain data for the manifest and `--json`: its inputs by name and header digest, without paths of this machine."""
    data = asdict(step)
    data["inputs"] = {
        _numbered(role, [other for other, _ in step.inputs[:position]]): {
            "name": origin.name,
            "revision": origin.revision,
            "container": origin.container,
            "files": [{"name": legible(f.name), "size": f.size, "header_sha256": f.header_sha256} for f in origin.files],
        }
        for position, (role, origin) in enumerate(step.inputs)
    }
    return {key: redacted(value) for key, value in data.items() if value}


def _numbered(role: str, before: list[str]) -> str:
    """A key for each of several inputs in one role: `lora`, `lora (2)`, `lora (3)`."""
    return f"{role} ({before.count(role) + 1})" if role in before else role
