"""What a checkpoint is, from headers and a few MB of values: layout, family, evidence, sizes, dtypes, vocabulary, and what to do next."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..families.deltas import KnownDelta, known_delta
from ..families.layouts import LAYOUTS, MULTIMODAL, PROJECTOR, VOCABULARY, canonical
from ..families.originals import fitting
from ..families.projectors import projector_type
from ..families.towers import TOWER_BY_TYPE
from ..formats.integer_delta import index_integer_delta, is_integer_delta
from ..tensors.lazy import LazyTensor
from ..text import fold_names, shown
from .checkpoint import Checkpoint
from .config import known_decoder
from .diagnose import State, bf16_damaged, state
from .tokenizer import read_special_ids
from .tower import named_tower, published, row_of


def inspect(checkpoint: Checkpoint, *, given: str = "", tensors: bool = False) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Rows of label and text for people, and a document for programs; `given` is the path or name that the user gave. Reads samples of
    the values of a decoder."""
    if is_integer_delta(checkpoint.metadata):
        described = index_integer_delta(checkpoint.tensors, checkpoint.metadata)
        checkpoint = replace(checkpoint, tensors={name: LazyTensor(dtype=d.dtype, shape=d.shape) for name, d in described.items()})
    kind, evidence, following = _verdict(checkpoint, given)
    dtypes = Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    rows = [
        ("what", kind),
        ("evidence", "; ".join(evidence)),
        ("family", _family(checkpoint)),
        ("weights", _weights(checkpoint, dtypes)),
        ("vocabulary", _vocabulary(checkpoint)),
        ("projector", _projector(checkpoint.tensors)),
        ("tower", _tower(checkpoint)),
        ("tokenizer", ", ".join(name for name in checkpoint.files if "token" in name)),
        *(("note", note) for note in checkpoint.notes),
        ("next", following),
    ]
    rows = [(label, text) for label, text in rows if text]
    document: dict[str, Any] = {
        "name": checkpoint.origin.name,
        "revision": checkpoint.origin.revision,
        "layout": checkpoint.layout,
        "container": checkpoint.origin.container,
        "count": len(checkpoint.tensors),
        "nbytes": checkpoint.nbytes,
        "dtypes": dict(dtypes),
        "files": [{"name": file.name, "size": file.size} for file in checkpoint.origin.files],
        **{label: text for label, text in rows if label != "note"},
        "notes": list(checkpoint.notes),
    }
    if tensors:
        rows += [("", line) for line in _listing(checkpoint.tensors)]
        document["tensors"] = {name: {"dtype": t.dtype, "shape": list(t.shape)} for name, t in checkpoint.tensors.items()}
    return rows, document


def _verdict(checkpoint: Checkpoint, given: str) -> tuple[str, list[str], str]:
    """What it is, the evidence, and the command to run next."""
    layout = checkpoint.layout
    apply = f"llava-weights apply-delta --base {{}} --delta {given or checkpoint.origin.name} -o OUT"
    if is_integer_delta(checkpoint.metadata):
        return "integer-difference delta (lossless)", ["safetensors metadata"], apply.format("BASE")
    title = next((entry.title for entry in LAYOUTS if entry.name == layout), "tensors of an unknown layout")
    if layout not in ("llama", "llava"):
        return title, ["tensor names"], ""
    found = state(checkpoint.parameters())
    evidence = [*_family_evidence(checkpoint), *found.evidence]
    if found.verdict == "delta":
        known = _known(checkpoint)
        base = known.base if known else "BASE"
        evidence += [f"shapes and tokens of {known.repo}"] if known else []
        return f"unapplied delta of a {'LLaVA' if layout == 'llava' else 'LLaMA'}, {checkpoint.size}", evidence, apply.format(base)
    place = " in Meta's layout" if checkpoint.origin.container == "meta" else ""
    return f"{title}{place}, {checkpoint.size}{_damage(checkpoint, found)}", evidence, ""


def _family(checkpoint: Checkpoint) -> str:
    """The families that an original LLaVA fits: more than one where its tower is not known; empty for other checkpoints."""
    config, names = checkpoint.config, set(map(canonical, checkpoint.tensors))
    decoder = known_decoder(config)
    if checkpoint.layout != "llava" or decoder is None or not config:
        return "" if checkpoint.layout != "llava" or not config else f"none that is known: {shown(str(config.get('model_type')))}"
    inside = {name.removeprefix("tower.") for name in names if name.startswith("tower.")}
    named = published(named_tower(config))
    tower = row_of(inside).kind if inside else TOWER_BY_TYPE[named.model_type].kind if named else None
    config = {**config, "mm_projector_type": projector_type(names) or config.get("mm_projector_type")}
    specials = read_special_ids(checkpoint.files, checkpoint.vocabulary).added
    rows = [row for row in fitting(config, decoder=decoder.model_type, tower=tower) if not row.token or row.token in specials]
    if not rows:
        return f"none that is known: {decoder.model_type} with {tower or 'an unknown tower'}, {_images(config)}"
    first = [row for row in rows if row.evidence == rows[0].evidence]
    return f"{' or '.join(row.name for row in first)}: {first[0].evidence}"


def _images(config: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}` {shown(str(config.get(key)))[1:-1]}" for key in ("image_aspect_ratio", "mm_patch_merge_type"))


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


def _vocabulary(checkpoint: Checkpoint) -> str:
    if not checkpoint.vocabulary:
        return ""
    head = checkpoint.tensors.get(VOCABULARY[1])
    text = f"{checkpoint.vocabulary} rows" + ("" if head else ", no lm_head (tied)")
    added = read_special_ids(checkpoint.files, checkpoint.vocabulary).added
    return text + (
        f"; added {', '.join(f'{token} {number}' for token, number in sorted(added.items(), key=lambda x: x[1]))}" if added else ""
    )


def _projector(tensors: Mapping[str, LazyTensor]) -> str:
    found = {name: tensor for name, tensor in tensors.items() if re.fullmatch(PROJECTOR, name)}
    weights = [tensor for name, tensor in found.items() if name.endswith("weight")]
    if not weights:
        return ""
    kind = projector_type(map(canonical, found)) or "of a kind that is not known"
    (*_, narrow), (wide, *_) = weights[0].shape or (1,), weights[-1].shape or (1,)
    return f"{kind}, {narrow} to {wide}"


def _tower(checkpoint: Checkpoint) -> str:
    inside = sum("vision_tower" in name or name.startswith("vision_model.") for name in checkpoint.tensors)
    if inside:
        return f"inside, {inside} tensors"
    named = checkpoint.config.get("mm_vision_tower")
    return f"not inside; config names {named}" if named and any(re.fullmatch(MULTIMODAL, name) for name in checkpoint.tensors) else ""


def _listing(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Names folded over layers, with dtype and shape."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.dtype, tensor.shape), []).append(name)
    return [f"{folded}  {dtype} {list(shape)}" for (dtype, shape), names in groups.items() for folded in fold_names(names)]
