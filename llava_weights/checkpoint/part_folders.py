"""A LLaVA in folders of its parts, as xtuner writes it, read as one checkpoint of the original layout.

`llm` (or the folder itself) holds the text model, `projector` the projector, `visual_encoder` the tower; `llm_adapter` and
`visual_encoder_adapter` hold PEFT adapters, which are not merged here: `transforms.lora.with_own_adapters` does it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..families.decoders import DECODER_BY_TYPE
from ..families.files import ADAPTER_CONFIG, TRAINER_STATE, WEIGHT_SUFFIXES
from ..families.layouts import DROPPED, canonical, spelled
from ..families.projectors import PROJECTOR_ACTIVATION, projector_type
from ..families.towers import BESIDE_TOWER, HUB_TOWERS, TOWER_BY_TYPE
from ..families.xtuner import (
    ADAPTERS,
    FOLDERS,
    LLM,
    PART_TITLES,
    PROJECTOR,
    PROJECTOR_DEFAULTS,
    PROJECTOR_NAME,
    SELECT,
    SELECT_KEY,
    SETTINGS,
    TELLING,
    TITLE,
    TOWER,
)
from ..formats.folder import WeightFiles, holds_weights, index_folder, inside, optional
from ..storage.hub import REPO
from ..storage.reading import SourceFile, unreadable
from ..storage.strict_json import load_object
from ..tensors.lazy import LazyTensor
from ..text import few, listed, shown, unquoted

WHOLE = "give the folder that xtuner's `convert pth_to_hf` wrote, with every file in it"


@dataclass(frozen=True)
class PartFolders:
    """What a checkpoint in folders of its parts has beside its tensors: which folders there are, `adapters` that are still to be merged,
    by the folder's name, and the config of its tower, None without one."""

    names: tuple[str, ...]
    adapters: Mapping[str, Path] = field(default_factory=dict)
    vision_config: Mapping[str, Any] | None = None
    missing: tuple[str, ...] = ()  # parts without which it is no LLaVA
    base: str = ""  # what its adapter of the text model was trained on

    def refuse(self, name: str) -> None:
        """Raise InputError where a part is missing, by its name."""
        if not self.missing:
            return
        part = self.missing[0]
        wanted = unquoted(self.base) if self.base and part == LLM else f"the {PART_TITLES[part]}"
        what = f"{shown(name)} is a {TITLE} without its {PART_TITLES[part]}"
        place = f"`{part}`, with weights, config.json" + (" and tokenizer" if part == LLM else "")
        raise InputError(what, facts={"folders": listed(self.names)}, hint=f"put {wanted} there, as the folder {place}")


@dataclass(frozen=True)
class Joined:
    """The parts as one checkpoint of the original layout. `places` are the folders of the text model and of the tower, None for a part that
    is not there; of their small files the tokenizer and the image processor are the checkpoint's."""

    weights: WeightFiles
    config: Mapping[str, Any]
    folders: PartFolders
    text_place: Path | None
    tower_place: Path | None


def find_parts(folder: Path, layout_of: Callable[[Mapping[str, LazyTensor]], str]) -> tuple[str, ...]:
    """The folders of parts that hold weights in `folder`, none where it is no checkpoint of this kind: `llm` alone is not enough, and a
    LLaVA beside such folders is read as it is.

    Raises InputError for links that lead out of it, for a part whose weights are missing, and for two text models."""
    there = _listing(folder)
    names = [name for name in FOLDERS if name in there and holds_weights(inside(folder, name))]
    if not set(names) & set(TELLING):
        return ()
    for name in FOLDERS:
        if name in there and name not in names and {"config.json", ADAPTER_CONFIG} & set(_listing(folder / name)):
            hint = "download its weights too, or move the folder elsewhere to go on without them"
            raise InputError(f"`{name}` holds a config and no weights", facts={"folder": folder / name}, hint=hint)
    if holds_weights(folder):
        if layout_of(index_folder(folder).tensors) not in ("llama", "unknown", "mpt"):
            return ()
        if LLM in names:
            what, facts = f"{shown(folder.name)} holds two text models: in the folder itself, and in `{LLM}`", {"folder": folder}
            raise InputError(what, facts=facts, hint="keep only the one that its projector was trained with")
    return tuple(names)


def join_parts(folder: Path, names: tuple[str, ...]) -> Joined:
    """The checkpoint in the folders `names` of `folder`, from headers and small JSON files.

    Raises InputError where a file is missing or damaged, weights are of no part, or a config contradicts the tensors.
    """
    text_place = folder / LLM if LLM in names else folder if holds_weights(folder) else None
    tower_place = folder / TOWER if TOWER in names else None
    text = index_folder(text_place) if text_place else None
    projector = index_folder(folder / PROJECTOR) if PROJECTOR in names else None
    tower = index_folder(tower_place) if tower_place else None
    places = {folder: None, text_place: text, folder / PROJECTOR if projector else None: projector, tower_place: tower}
    for place, found in places.items():
        if place is not None:
            _check_used(place, found)
    tensors = dict(text.tensors) if text else {}
    settings: dict[str, Any] = {}
    if projector:
        width = _width(tensors, _config(text_place) if text_place else {})
        more, settings = _projector(projector, _config(folder / PROJECTOR), width)
        _add(tensors, more)
    if tower:
        _add(tensors, _tower(tower))
    vision = _config(tower_place) if tower_place else None
    bases = {part: _base(folder / name) for name, part in ADAPTERS.items() if name in names}
    weights = [found for found in (text, projector, tower) if found]
    if not weights:
        raise InputError(f"{shown(folder.name)} holds adapters of a LLaVA alone", facts={"folders": listed(names)}, hint=WHOLE)
    config = _llava_config(_config(text_place) if text_place else {}, vision or {}, bases.get(TOWER, ""))
    config |= settings | {"unfreeze_mm_vision_tower": tower is not None or TOWER in bases}
    merging = tuple(
        f"`{name}` is an adapter of the {PART_TITLES[ADAPTERS[name]]}, which is merged when it is converted"
        for name in ADAPTERS
        if name in names
    )
    folders = PartFolders(
        names,
        adapters={name: folder / name for name in ADAPTERS if name in names},
        vision_config=vision,
        missing=tuple(part for part, found in ((LLM, text), (PROJECTOR, projector)) if found is None),
        base=bases.get(LLM, ""),
    )
    whole = _together(weights, tensors, folder)
    return Joined(replace(whole, notes=(*whole.notes, *merging)), dict(sorted(config.items())), folders, text_place, tower_place)


def _together(weights: list[WeightFiles], tensors: Mapping[str, LazyTensor], folder: Path) -> WeightFiles:
    """The files of all parts; what is said of one of them stands under its path in the folder."""
    files: tuple[SourceFile, ...] = tuple(file for found in weights for file in found.files)
    metadata = {
        os.path.relpath(file.path, folder): found.metadata[file.name]
        for found in weights
        for file in found.files
        if file.name in found.metadata
    }
    return WeightFiles(tensors, weights[0].container, files, metadata, tuple(note for found in weights for note in found.notes))


def _listing(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from error


def _check_used(folder: Path, found: WeightFiles | None) -> None:
    """Raise InputError naming the weight files of a folder that are read by nothing."""
    used = {file.name for file in found.files} if found else set()
    names = [name for name in _listing(folder) if name.endswith(tuple(WEIGHT_SUFFIXES)) and name not in used]
    if names := [name for name in names if not re.fullmatch(TRAINER_STATE, name) and (folder / name).is_file()]:
        what = f"{shown(folder.name)} holds weight files that are of no part of a LLaVA, or that nothing reads: {listed(names)}"
        raise InputError(what, facts={"folder": folder, "read": listed(sorted(used)) or "nothing"}, hint="move them elsewhere")


def _config(folder: Path) -> Mapping[str, Any]:
    """config.json of a part. Raises InputError where there is none."""
    path = optional(folder, "config.json")
    if path is None:
        raise InputError(f"there is no `config.json` in {shown(folder.name)}", facts={"folder": folder}, hint=WHOLE)
    return load_object(path)


def _base(folder: Path) -> str:
    """What the adapter in `folder` was trained on: `owner/name` of the Hub, or empty."""
    path = optional(folder, ADAPTER_CONFIG)
    named = load_object(path).get("base_model_name_or_path") if path else None
    return named if isinstance(named, str) and REPO.fullmatch(named) else ""


def _add(tensors: dict[str, LazyTensor], more: Mapping[str, LazyTensor]) -> None:
    if twice := [name for name in more if name in tensors]:
        raise InputError(f"two parts hold the same tensors: {few(twice)}", hint=WHOLE)
    tensors.update(more)


def _width(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> int | None:
    """How wide the text model is, None where nothing says it."""
    table = tensors.get("model.embed_tokens.weight")
    width = table.shape[1] if table and len(table.shape) == 2 else config.get("hidden_size")
    return width if type(width) is int else None


def _projector(found: WeightFiles, config: Mapping[str, Any], width: int | None) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """The projector's tensors by the original's names, and what its config says that the original's words can't.

    Raises InputError where the tensors are not those of its config, or it does not lead into a text model of this `width`."""
    told = {key: config.get(key, default) for key, default in PROJECTOR_DEFAULTS.items()}
    depth, bias = told["depth"], told["bias"]
    if unknown := [name for name in found.tensors if not re.fullmatch(PROJECTOR_NAME, name)]:
        raise InputError(f"`{PROJECTOR}` holds tensors of no projector of xtuner: {few(unknown)}", hint=WHOLE)
    kinds = ("weight", "bias") if bias is True else ("weight",)
    wanted = {f"model.{2 * place}.{kind}" for place in range(depth if type(depth) is int and 0 < depth < 6 else 0) for kind in kinds}
    if found.tensors.keys() != wanted or type(bias) is not bool:
        facts = {"depth, bias": f"{shown(str(depth))}, {shown(str(bias))}", "tensors": few(found.tensors)}
        raise InputError(f"the tensors of `{PROJECTOR}` are not those that its config.json describes", facts=facts, hint=WHOLE)
    last = found.tensors[f"model.{2 * depth - 2}.weight"]
    if odd := [name for name in wanted if len(found.tensors[name].shape) != (2 if name.endswith("weight") else 1)]:
        raise InputError(f"`{PROJECTOR}` holds tensors of no Linear: {few(odd)}", hint=WHOLE)
    if width is not None and last.shape[0] != width:
        facts = {"projector": f"{list(last.shape)}", "text model": f"{width} wide"}
        raise InputError(
            "the projector does not lead into this text model", facts=facts, hint="give the projector and text model of one training"
        )
    tensors = {}
    for name, tensor in found.tensors.items():
        place, kind = name.split(".")[1:]
        tensors[spelled(f"projector.{kind}" if depth == 1 else f"projector.{place}.{kind}", "llava")] = tensor
    layer = config.get(SELECT_KEY, SELECT)
    if type(layer) is not int:
        raise InputError(f"`{SELECT_KEY}` is {shown(str(layer))} in the config.json of `{PROJECTOR}`, no number of a layer", hint=WHOLE)
    settings: dict[str, Any] = {"mm_vision_select_layer": layer, "vision_feature_layer": layer}
    if told["hidden_act"] != PROJECTOR_ACTIVATION and depth > 1:
        settings["projector_hidden_act"] = told["hidden_act"]
    settings |= {"mm_projector_type": projector_type(map(canonical, tensors)), "mm_hidden_size": found.tensors["model.0.weight"].shape[-1]}
    return tensors, settings | ({} if bias else {"multimodal_projector_bias": False})


def _tower(found: WeightFiles) -> dict[str, LazyTensor]:
    """The tower's tensors by the original's names, without what a repository of a CLIP or a SigLIP holds besides."""
    own = {name: tensor for name, tensor in found.tensors.items() if not re.fullmatch(f"{BESIDE_TOWER}|{DROPPED}", name)}
    return {spelled(f"tower.{name.removeprefix('vision_model.')}", "llava"): tensor for name, tensor in own.items()}


def _published(vision: Mapping[str, Any]) -> str:
    """The published tower of this kind, width and image size, empty where there is none."""
    row = TOWER_BY_TYPE.get(str(vision.get("model_type")))
    return HUB_TOWERS.get((row.kind, vision.get("hidden_size", 0), vision.get("image_size", 0)), "") if row else ""


def _llava_config(text: Mapping[str, Any], vision: Mapping[str, Any], base: str) -> dict[str, Any]:
    """The text model's config as LLaVA's own code would write it for such a LLaVA."""
    decoder = DECODER_BY_TYPE.get(str(text.get("model_type")))
    named = vision.get("_name_or_path")
    tower = named if isinstance(named, str) and REPO.fullmatch(named) else base or _published(vision)
    kind = {"model_type": decoder.original_types[0], "architectures": [decoder.original_architectures[0]]} if decoder else {}
    return {**text, **SETTINGS, **kind, **({"mm_vision_tower": tower} if tower else {})}
