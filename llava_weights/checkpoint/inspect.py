"""What a checkpoint is, from headers and a few MB of values: layout, family, evidence, sizes, dtypes, vocabulary, and what to do next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError, UsageError
from ..families.deltas import KnownDelta, known_delta
from ..families.layouts import LAYOUTS
from ..families.targets import TARGET_BY_TYPE
from ..families.xtuner import PART_TITLES, TITLE
from ..formats.integer_delta import index_integer_delta, is_integer_delta
from ..storage.reading import SourceFile
from ..tensors.lazy import LazyTensor
from ..text import brief, fold_names, listed, redact, shown, size, two_columns, unquoted, visible
from . import describe
from .chat_template import written_as
from .checkpoint import Checkpoint, CheckpointSource, opened, to_place
from .config import known_decoder
from .diagnose import State, bf16_damaged, state
from .hf_config import flat_config
from .kinds import Kind, kind_of
from .part_folders import PartFolders
from .prompt import likely_families, likely_prompt, own_template, special_texts, tower_kind
from .tokenizer import read_special_ids


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is. `str` of it is the report that `llava-weights inspect` prints.

    `what` says it in a sentence, `evidence` why, `next` the command that comes next, "" where nothing has to be done. `family` is the
    published family of an original LLaVA, with the reason, or of a model for which there is no class; `prompt` says how a LLaVA is prompted
    and whether that is certain; `model_class` is the class that config.json names. `decoder`, `weights`, `vocabulary`, `projector`,
    `tower` and `tokenizer` are a line of the report each, and so are `adapter` (rank, modules, base) and `beside` (weight files beside an
    adapter), "" where the checkpoint has no such thing. `notes` are what opening it found worth knowing.

    `layout` is "llava", "llava-hf", "llama", "clip", "projector", "mpt", "adapter", "mlx-adapter", "loha", "gguf" or "unknown", `container`
    the form of its files: "safetensors", "torch", "meta" or "gguf". `nbytes` counts the bytes of all values, without headers; `dtypes` says
    how many tensors have each dtype, spelled as safetensors and llama.cpp do ("F16", "Q8_0"). `tensors` are in the order of the files; of a
    lossless delta they are those that it packs.
    """

    name: str
    revision: str | None
    layout: str
    container: str
    what: str
    is_delta: bool
    evidence: tuple[str, ...]
    family: str
    prompt: str
    model_class: str
    decoder: str
    adapter: str
    beside: str
    weights: str
    vocabulary: str
    projector: str
    tower: str
    tokenizer: str
    notes: tuple[str, ...]
    next: str
    nbytes: int
    dtypes: Mapping[str, int]
    files: tuple[SourceFile, ...]
    tensors: Mapping[str, LazyTensor]

    def __str__(self) -> str:
        return "\n".join(map(visible, self.lines()))

    def __repr__(self) -> str:
        return f"Inspection({brief(self.name)}, {brief(self.what)}, {len(self.tensors)} tensors, {size(self.nbytes)})"

    def lines(self, *, tensors: bool = False) -> list[str]:
        """The report, line by line; with `tensors` a line for each tensor too, those of equal layers folded into one."""
        rows = [*self._texts().items(), *(("note", note) for note in self.notes), ("next", self.next)]
        rows = [(label, text) for label, text in rows if text]
        rows += [("", line) for line in _listing(self.tensors)] if tensors else []
        return [self.name, *two_columns(rows)]

    def document(self, *, tensors: bool = False) -> dict[str, Any]:
        """The same as plain data: what `llava-weights inspect --json` prints, with `tensors` their dtypes and shapes too."""
        found: dict[str, Any] = {
            "name": self.name,
            "revision": self.revision,
            "layout": self.layout,
            "container": self.container,
            "count": len(self.tensors),
            "nbytes": self.nbytes,
            "dtypes": dict(self.dtypes),
            "files": [{"name": file.name, "size": file.size} for file in self.files],
            **{label: text for label, text in (self._texts() | {"next": self.next}).items() if text},
            "notes": list(self.notes),
        }
        if tensors:
            found["tensors"] = {name: {"dtype": tensor.dtype, "shape": list(tensor.shape)} for name, tensor in self.tensors.items()}
        return found

    def _texts(self) -> dict[str, str]:
        return {
            "what": self.what,
            "evidence": "; ".join(self.evidence),
            "family": self.family,
            "prompt": self.prompt,
            "class": self.model_class,
            "decoder": self.decoder,
            "adapter": self.adapter,
            "beside": self.beside,
            "weights": self.weights,
            "vocabulary": self.vocabulary,
            "projector": self.projector,
            "tower": self.tower,
            "tokenizer": self.tokenizer,
        }


def inspect(checkpoint: CheckpointSource, *, given: str | None = None) -> Inspection:
    """Say what `checkpoint` is, why, and what to do with it. Nothing is written.

    `checkpoint` is what `open_checkpoint` returned, or a path, a name on the Hub or an address. Reads headers, small files and, where
    there is a decoder, samples of a few MB of its values. `given` is what the command in `next` calls the checkpoint: by default the
    path that was given, else its name.

    Raises UsageError for what is no path or name, InputError for a checkpoint that is missing, damaged or hostile, HubError where the Hub
    can't serve it.
    """
    if given is not None and not isinstance(given, str):
        raise UsageError(f"`given` is of the type `{type(given).__name__}`, no text", hint="give a text, or leave it out")
    if given is None:
        given = "" if isinstance(checkpoint, Checkpoint) else str(to_place(checkpoint, "checkpoint"))
    checkpoint = opened(checkpoint, "checkpoint", unmerged=True, gguf=True)
    if is_integer_delta(checkpoint.metadata):
        described = index_integer_delta(checkpoint.tensors, checkpoint.metadata)
        checkpoint = replace(checkpoint, tensors={name: LazyTensor(dtype=d.dtype, shape=d.shape) for name, d in described.items()})
    kind = kind_of(checkpoint)
    what, is_delta, evidence, following = _verdict(checkpoint, redact(given), kind)
    parts, specials = describe.parts_of(checkpoint), _specials(checkpoint)
    foreign = kind is not None and not kind.quantised
    dtypes = dict(Counter(tensor.dtype for tensor in checkpoint.tensors.values()))
    return Inspection(
        name=checkpoint.origin.name,
        revision=checkpoint.origin.revision,
        layout=checkpoint.layout,
        container=checkpoint.origin.container,
        what=what,
        is_delta=is_delta,
        evidence=tuple(evidence),
        family=f"{kind.name}: {kind.why}" if kind and not kind.quantised else _family(checkpoint, specials),
        model_class=describe.model_class(checkpoint.config),
        decoder=describe.decoder(checkpoint, parts, foreign=foreign),
        adapter=describe.adapter(checkpoint, describe.adapter_config(checkpoint)),
        beside=describe.beside(checkpoint),
        weights=_weights(checkpoint, dtypes),
        vocabulary=describe.vocabulary(checkpoint, parts, foreign=foreign),
        prompt="" if kind else _prompt(checkpoint, specials),
        projector=describe.projector(checkpoint, parts),
        tower=describe.tower(checkpoint, parts, foreign=foreign),
        tokenizer=", ".join(name for name in checkpoint.files if "token" in name),
        notes=checkpoint.notes,
        next=following,
        nbytes=checkpoint.nbytes,
        dtypes=dtypes,
        files=checkpoint.origin.files,
        tensors=checkpoint.tensors,
    )


def _verdict(checkpoint: Checkpoint, given: str, kind: Kind | None) -> tuple[str, bool, list[str], str]:
    """What it is in a sentence, whether that is an unapplied delta, why, and the command that comes next."""
    layout = checkpoint.layout
    apply = f"llava-weights apply-delta --base {{}} --delta {given or checkpoint.origin.name} -o OUT"
    if is_integer_delta(checkpoint.metadata):
        return "integer-difference delta (lossless)", True, ["safetensors metadata"], apply.format("BASE")
    title = next((entry.title for entry in LAYOUTS if entry.name == layout), "tensors of an unknown layout")
    if kind:
        what = f"{title}, {kind.name}" if kind.quantised else f"{kind.name}, which nothing here converts"
        return what, False, [kind.evidence], kind.hint
    following = describe.next_command(checkpoint, given or checkpoint.origin.name)
    if folders := checkpoint.folders:
        title = f"{TITLE}{', with adapters to be merged' if folders.adapters else ''}"
        try:
            folders.refuse(checkpoint.origin.name)
        except InputError as error:
            return (
                f"{title}, without its {' and its '.join(PART_TITLES[part] for part in folders.missing)}",
                False,
                _told(folders),
                error.hint or "",
            )
        if layout != "llava":
            return title, False, _told(folders), following
    if layout not in ("llama", "llava"):
        return title, False, ["tensor names"], following
    found = state(checkpoint.parameters())
    evidence = [*(_told(checkpoint.folders) if checkpoint.folders else ()), *_family_evidence(checkpoint), *found.evidence]
    if found.verdict == "delta":
        known = _known(checkpoint)
        base = known.base if known else "BASE"
        evidence += [f"shapes and tokens of {known.repo}"] if known else []
        return f"unapplied delta of a {'LLaVA' if layout == 'llava' else 'LLaMA'}, {checkpoint.size}", True, evidence, apply.format(base)
    place = " in Meta's layout" if checkpoint.origin.container == "meta" else ""
    return f"{title}{place}, {checkpoint.size}{_damage(checkpoint, found)}", False, evidence, following


def _told(folders: PartFolders) -> list[str]:
    return [f"the folders {listed(folders.names)}"]


def _family(checkpoint: Checkpoint, specials: Collection[str]) -> str:
    """The families that an original LLaVA fits: more than one where its tower is not known; the classes that a llava-hf is of; empty for
    other checkpoints."""
    config = checkpoint.config
    if checkpoint.layout == "llava-hf":
        return _hub_family(config)
    decoder = known_decoder(config)
    if checkpoint.layout != "llava" or decoder is None or not config:
        return "" if checkpoint.layout != "llava" or not config else f"none that is known: {shown(str(config.get('model_type')))}"
    rows = [row for row in likely_families("llava", config, checkpoint.tensors) if not row.token or row.token in specials]
    if not rows:
        tower = tower_kind(checkpoint.tensors, config)
        return f"none that is known: {decoder.model_type} with {tower or 'an unknown tower'}, {_images(config)}"
    first = [row for row in rows if row.evidence == rows[0].evidence]
    return f"{' or '.join(row.name for row in first)}: {first[0].evidence}"


def _specials(checkpoint: Checkpoint) -> frozenset[str]:
    """The texts of a LLaVA's added tokens; none of other checkpoints."""
    if checkpoint.layout not in ("llava", "llava-hf"):
        return frozenset()
    try:
        return special_texts(checkpoint.files)
    except InputError:  # what the line on the vocabulary says
        return frozenset()


def _prompt(checkpoint: Checkpoint, specials: Collection[str]) -> str:
    """How a LLaVA is prompted, and whether that is certain; empty for other checkpoints."""
    if checkpoint.layout not in ("llava", "llava-hf"):
        return ""
    try:
        choice = likely_prompt(checkpoint.layout, checkpoint.config, checkpoint.tensors, specials)
        template = own_template(checkpoint.files) if checkpoint.layout == "llava-hf" else ""
    except InputError as error:
        return error.what
    written = written_as(template)
    if template and not written:
        return "its own chat template"
    if choice is None:
        return ""
    told = choice.doubt or f"{choice.conversation.name}, {choice}"
    return f"its chat template is that of `{written.name}`; {told}" if written and written != choice.conversation else told


def _hub_family(config: Mapping[str, Any]) -> str:
    """The class of a llava-hf checkpoint with what stands in it, as far as rows describe them."""
    kind, decoder = str(config.get("model_type")), known_decoder(flat_config(config))
    if kind not in TARGET_BY_TYPE:
        return f"none that is known: {shown(kind)}"
    text = decoder.model_type if decoder else f"a decoder that is not known, {shown(str(flat_config(config)['model_type']))}"
    return f"{kind} on {text}"


def _images(config: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}` {unquoted(str(config.get(key)))}" for key in ("image_aspect_ratio", "mm_patch_merge_type"))


def _known(checkpoint: Checkpoint) -> KnownDelta | None:
    patch = read_special_ids(checkpoint.files, checkpoint.vocabulary).added.get("<im_patch>", -1)
    return known_delta(checkpoint.size, checkpoint.vocabulary, patch, str(checkpoint.config.get("model_type", "")))


def _damage(checkpoint: Checkpoint, found: State) -> str:
    if found.verdict != "weights" or checkpoint.layout != "llama":
        return ""
    damage = bf16_damaged(checkpoint.parameters())
    return f", values of bfloat16 precision ({damage.share:.0%} of the samples): no base for an fp16 delta" if damage.damaged else ""


def _family_evidence(checkpoint: Checkpoint) -> list[str]:
    evidence = [f"{checkpoint.size}, tensor names of {'LLaVA' if checkpoint.layout == 'llava' else 'LLaMA'}"]
    if kind := checkpoint.config.get("model_type"):
        evidence.append(f"config says model_type {kind}")
    return evidence


def _weights(checkpoint: Checkpoint, dtypes: Mapping[str, int]) -> str:
    count = len(checkpoint.origin.files)
    files = f"{count} {'file' if count == 1 else 'files'} ({checkpoint.origin.container})"
    kinds = ", ".join(f"{dtype} x {number}" for dtype, number in dtypes.items())
    return f"{len(checkpoint.tensors)} tensors, {checkpoint.nbytes:,} bytes in {files}; {kinds}"


def _listing(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Names folded over layers, with dtype and shape."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.dtype, tensor.shape), []).append(name)
    return [f"{folded}  {dtype} {list(shape)}" for (dtype, shape), names in groups.items() for folded in fold_names(names)]
