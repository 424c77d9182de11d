"""The vision tower of a LLaVA: its tensors, by names without the tower's prefix, and a complete `vision_config` for llava-hf.

A tower comes from a repository of its own, a CLIP or a SigLIP (`open_tower`), or from inside a LLaVA (`own_tower`). Its config is checked
against the shapes of its tensors; what no shape shows (heads, activation) is looked up, and `notes` say where.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, MismatchError
from ..families.layouts import DROPPED, canonical
from ..families.shapes import MAX_LAYERS, shapes
from ..families.targets import DEFAULT_PARTS, TOWER_KEYS
from ..families.towers import (
    BESIDE_TOWER,
    KNOWN_TOWERS,
    MEASURES,
    PATCH,
    POSITION,
    RANKS,
    TOWER_ACTIVATIONS,
    TOWER_BY_REPOSITORY,
    TOWER_BY_TYPE,
    TOWER_NAMES,
    TOWERS,
    KnownTower,
    Tower,
)
from ..formats.folder import member
from ..storage.places import names_in
from ..storage.reading import present, unreadable
from ..storage.strict_json import load_object
from ..tensors.lazy import FLOATS, LazyTensor
from ..text import listed, shown, unquoted
from .checkpoint import Checkpoint, Origin
from .small_files import RIGHT_CONFIG

TOWER_TITLES = " or ".join(row.title for row in TOWERS)
WHOLE_TOWER = "give a checkpoint whose vision tower is whole: llava-hf needs every tensor of it"
NO_HEAD = "SigLIP's pooling head is left out: a LLaVA does not use it"

# The config keys in which two different towers differ.
COMPARED = ("model_type", "hidden_size", "intermediate_size", "patch_size", "image_size", "num_hidden_layers", "hidden_act")
USUAL, VIDEO = "vision tower", "video_tower."  # what the first is called in messages; how canonical names of the second begin
INTO_PROJECTOR = ("projector.weight", "projector.0.weight")


@dataclass(frozen=True)
class VisionTower:
    """A complete vision tower, whose tensors and config agree."""

    tensors: Mapping[str, LazyTensor]  # "embeddings.class_embedding", "encoder.layers.0.self_attn.q_proj.weight"...
    config: Mapping[str, Any]  # the vision_config of llava-hf, every key explicit
    preprocessor: Mapping[str, Any] | None  # its preprocessor_config.json, where there is one
    origin: Origin | None  # None: it lies inside the LLaVA
    notes: tuple[str, ...]
    whole_layers: int | None = None  # how many the published tower has, of which a LLaVA may hold the first; None: nobody knows

    @property
    def row(self) -> Tower:
        """What is known of its kind."""
        return TOWER_BY_TYPE[self.config["model_type"]]

    @property
    def kind(self) -> str:
        """ "clip" or "siglip"."""
        return self.row.kind

    @property
    def patches(self) -> int:
        """Patches of one image, the class token not counted."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_size(self) -> int:
        """Pixels along each side of an image."""
        return int(self.config["image_size"])

    @property
    def patch_size(self) -> int:
        """Pixels along each side of a patch."""
        return int(self.config["patch_size"])

    @property
    def hidden(self) -> int:
        """Length of a patch's features, the input of the projector."""
        return int(self.config["hidden_size"])

    @property
    def class_token(self) -> bool:
        """Whether a class token stands before the patches."""
        return self.row.class_token


@dataclass(frozen=True)
class TowerSizes:
    """What the shapes of a tower show: its kind, sizes by config key, and patches along each side of an image."""

    model_type: str
    sizes: Mapping[str, int]
    side: int


def open_tower(checkpoint: Checkpoint) -> VisionTower:
    """The tower of a CLIP or SigLIP repository, saved by any version of transformers (5.6 and later leave out the prefix `vision_model.`).

    Raises InputError where there is none, or where config.json and tensors disagree.
    """
    name = checkpoint.origin.name
    beside = re.compile(f"{BESIDE_TOWER}|{DROPPED}")
    named = _unique((full.removeprefix("vision_model."), x) for full, x in checkpoint.tensors.items() if not beside.fullmatch(full))
    if PATCH not in named:
        facts = {"layout": checkpoint.layout, "model_type": shown(str(checkpoint.config.get("model_type"))), "lacks": f"`{PATCH}`"}
        hint = f"give the repository or folder of the {TOWER_TITLES} that the model was trained with"
        raise InputError(f"{shown(name)} is no vision tower", facts=facts, hint=hint)
    config = complete_config(vision_part(checkpoint.config, name), source=f"the config.json of {shown(name)}")
    _check_sizes(config, _measure(named, name), source=f"the config.json of {shown(name)}")
    notes = (NO_HEAD,) if any(map(_is_head, checkpoint.tensors)) else ()
    known = same_widths(config["model_type"], config)
    layers = known[0].layers if known else config["num_hidden_layers"]
    return VisionTower(_fitted(named, config, name), config, _preprocessor(checkpoint), checkpoint.origin, notes, layers)


def own_tower(
    tensors: Mapping[str, LazyTensor],
    *,
    vision_config: Mapping[str, Any] | None,
    model: Checkpoint | None,
    reference: VisionTower | None = None,
) -> VisionTower | None:
    """The tower among the tensors of a LLaVA in any layout, None where there is none.

    `vision_config` is that of a llava-hf config.json; of a `model` in folders of its parts it is that of the tower's folder. Without one
    the sizes come from the shapes, and the heads from the config of
    `reference` (whose tensors are not used), from the config.json of the local folder that `model`'s config names, from a published
    tower of the same widths, or from 64 channels a head, in this order. Raises InputError where the heads stay unknown, a tensor is
    missing or unknown, or `vision_config` disagrees; MismatchError where another config does.
    """
    name = model.origin.name if model else "the checkpoint"
    every = ((canonical(full), tensor) for full, tensor in tensors.items())
    inside = _unique((x.removeprefix("tower."), tensor) for x, tensor in every if x.startswith("tower.") and not re.fullmatch(DROPPED, x))
    own = {behind: tensor for behind, tensor in inside.items() if not _is_head(behind)}
    if not own:
        return None
    sizes = _measure(own, name)
    if vision_config is None and model and model.folders and model.folders.vision_config is not None:
        vision_config = vision_part(model.folders.vision_config, name)
    if vision_config is None:
        config, note, layers = _look_up(sizes, model, reference)
    else:
        config, note, layers = complete_config(vision_config, source=f"the `vision_config` of {shown(name)}"), "", None
        if known := same_widths(config["model_type"], config):
            layers = known[0].layers
        _check_sizes(config, sizes, source=f"the `vision_config` of {shown(name)}")
    notes = (f"vision tower: the checkpoint's own, {len(own):,} tensors", note, NO_HEAD if len(own) < len(inside) else "")
    preprocessor = reference.preprocessor if reference else _preprocessor(model) if model else None
    return VisionTower(_fitted(own, config, name), config, preprocessor, None, tuple(filter(None, notes)), layers)


def video_tower(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], *, name: str, lost: str = "") -> dict[str, LazyTensor]:
    """The tower for videos among the tensors of a LLaVA in any layout, by names without its prefix, which has the complete config of the
    tower for images. Those whose canonical names the pattern `lost` matches are left out.

    Raises InputError where there is none, where a tensor is missing or unknown, or has another shape than in the tower for images."""
    every = ((canonical(full), tensor) for full, tensor in tensors.items() if not re.fullmatch(DROPPED, full))
    found = _unique((x.removeprefix(VIDEO), y) for x, y in every if x.startswith(VIDEO) and not re.fullmatch(lost, x))
    if not found:
        hint = "give a checkpoint that holds both of its towers, as its authors published it"
        raise InputError(f"the tower for videos of {shown(name)} is in no file", hint=hint)
    return _fitted(found, config, name, title="tower for videos")


def lost_tensors(tensors: Iterable[str], lost: str) -> list[str]:
    """The names, in any layout, of tensors whose canonical names the pattern `lost` of a target matches."""
    return [name for name in tensors if lost and re.fullmatch(lost, canonical(name))]


def holds_tower(checkpoint: Checkpoint) -> bool:
    """Whether a LLaVA, in any layout, has a vision tower of its own."""
    return any(canonical(name).startswith("tower.") for name in checkpoint.tensors)


def named_tower(config: Mapping[str, Any]) -> str:
    """The tower that an original LLaVA's config.json names, empty where it names none."""
    return next((str(config[key]) for key in (*TOWER_KEYS, "vision_tower") if isinstance(config.get(key), str)), "")


def tower_place(config: Mapping[str, Any]) -> str:
    """The repository or folder of the tower that an original LLaVA's config.json names, empty where it names none."""
    named = named_tower(config)
    return TOWER_NAMES.get(named, named)


def tower_hint(config: Mapping[str, Any]) -> str:
    """What to do where an original LLaVA holds no tower: give the one that its config names."""
    named = tower_place(config)
    if not named:
        return f"give the {TOWER_TITLES} that it was trained with as `--vision-tower`: its repository or folder"
    return f"give the tower that it was trained with, by its config {shown(named)}: `--vision-tower` with that repository, or its folder"


def published(name: str) -> KnownTower | None:
    """The published tower of this repository; None for a folder, and for a repository that families/towers.py does not list."""
    name = TOWER_NAMES.get(name, name)
    repo = name.strip().removeprefix("hf://").partition("@")[0].rstrip("/").lower()
    return next((known for known in KNOWN_TOWERS if known.repo.lower() == repo), None)


def recognised(config: Mapping[str, Any]) -> KnownTower | None:
    """The published tower that a complete config describes, by kind, widths, patches, layers and activation; None for others."""
    found = tuple(config[key] for key in COMPARED)
    return next((known for known in KNOWN_TOWERS if _facts(known) == found), None)


def _facts(known: KnownTower) -> tuple[str | int, ...]:
    return (known.model_type, known.hidden, known.intermediate, known.patch, known.image, known.layers, known.activation)


@dataclass(frozen=True)
class Doubts:
    """How a tower differs from the one that a config names: in sizes or activation (a warning), or only by name (a note)."""

    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    differs: bool = False  # in sizes or activation, so it can't be the tower that is named


def check_tower(model: Checkpoint, given: VisionTower, *, name: str = "", accept: bool = False) -> Doubts:
    """How `given` differs from the tower `name`, else from the one that the config of the original LLaVA `model` names.

    They are compared by shapes and configs, never by a folder's name. Raises MismatchError where two published towers differ, unless
    `accept`; then, and where one of them is not a published one, a difference is a warning.
    """
    named = name or named_tower(model.config)
    label = given.origin.name if given.origin else model.origin.name
    doubts = Doubts(warnings=_lost_training(model, given))
    near = model.origin.path if not model.origin.remote else None
    wanted, is_known = _wanted(named, near)
    if not named or wanted is None or not _may_be_named(model, wanted):
        same = {text.rstrip("/").rpartition("/")[2].lower() for text in (named, label)}
        text = f"the config names the vision tower {shown(named)}, the one given is {shown(label)}"
        return replace(doubts, notes=(text,)) if named and given.origin and len(same) > 1 else doubts
    differing = [key for key in COMPARED if wanted[key] != given.config[key]]
    if not differing:
        return doubts
    known = recognised(given.config)
    facts = {f"{shown(named)}, as named": _described(wanted), f"{shown(label)}, as given": _described(given.config)}
    if known and is_known and not accept:
        what = f"{shown(label)} is not the vision tower that the model was trained with: it is {known.repo}, named is {shown(named)}"
        wished = published(named)
        right = known.repo if given.origin is None else wished.repo if wished else unquoted(named)
        hint = f"give `--vision-tower {right}`, its repository or folder; `--accept-tower` goes on with this one"
        raise MismatchError(what, facts=facts, hint=hint)
    text = f"the vision tower is not the one that the config names: {'; '.join(f'{label} {text}' for label, text in facts.items())}"
    return replace(doubts, warnings=(*doubts.warnings, text), differs=True)


def _wanted(named: str, near: Path | None) -> tuple[Mapping[str, Any] | None, bool]:
    """The config of the tower that is named, None where it is not known; and whether it is a published one."""
    if known := published(named):
        return dict(zip(COMPARED, _facts(known), strict=True)), True
    with suppress(InputError):  # a folder of that name may be no tower
        if local := _local_config(named, near):
            config = complete_config(vision_part(local, named), source=shown(named))
            return config, recognised(config) is not None
    return None, False


def _may_be_named(model: Checkpoint, wanted: Mapping[str, Any]) -> bool:
    """Whether the projector fits the width of the named tower's features, of one layer or several; if not, the model was trained
    with another tower."""
    widths = {tensor.shape[1] for full, tensor in model.tensors.items() if canonical(full) in INTO_PROJECTOR and len(tensor.shape) == 2}
    return not widths or any(width % wanted["hidden_size"] == 0 for width in widths)


def _lost_training(model: Checkpoint, given: VisionTower) -> tuple[str, ...]:
    """A warning where the tower was trained with its model, but is missing there and another one was given."""
    if given.origin is None or model.config.get("unfreeze_mm_vision_tower") is not True:
        return ()
    return ("`unfreeze_mm_vision_tower` is true in config.json, so the vision tower was trained too, and the given one was not",)


def check_kept(own: VisionTower, given: VisionTower, holder: str) -> str:
    """A note that the tower inside `holder` is kept, though one was given. Raises MismatchError where that one has another config."""
    label = shown(given.origin.name if given.origin else holder)
    if any(own.config[key] != given.config[key] for key in COMPARED):
        facts = {f"inside {shown(holder)}": _described(own.config), f"{label}, as given": _described(given.config)}
        what = f"{shown(holder)} holds its own vision tower, and the one given is another"
        raise MismatchError(what, facts=facts, hint="leave `--vision-tower` out: the one inside was trained with the model")
    return f"the vision tower inside is kept; {label} is of the same kind and sizes, its values are not used"


def _described(config: Mapping[str, Any]) -> str:
    kind, hidden, _, patch, image, layers, activation = (config[key] for key in COMPARED)
    return f"{str(kind).partition('_')[0]}, {image} pixels in patches of {patch}, {layers} layers of {hidden}, {activation}"


def complete_config(config: Mapping[str, Any], *, source: str = "the vision config") -> dict[str, Any]:
    """`model_type` and every key for which its row has a default, from `config` or else the default; without all other keys.

    Raises InputError, naming `source`, for a kind of tower that is unknown or a value that is no size, fraction or activation.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"{source} is {shown(str(config))}, not an object", hint=RIGHT_CONFIG)
    model_type = DEFAULT_PARTS["vision_config"] if config.get("model_type") is None else config["model_type"]
    if not isinstance(model_type, str) or model_type not in TOWER_BY_TYPE:
        raise InputError(f"`model_type` is {shown(str(model_type))} in {source}, known are {', '.join(TOWER_BY_TYPE)}", hint=RIGHT_CONFIG)
    complete: dict[str, Any] = {"model_type": model_type}
    for key, default in TOWER_BY_TYPE[model_type].defaults.items():
        value: Any = default if config.get(key) is None or isinstance(default, bool) else config[key]
        if not _valid(value, default) or (key == "num_hidden_layers" and value > MAX_LAYERS):
            raise InputError(f"`{key}` is {shown(str(value))} in {source}, which can't be", hint=RIGHT_CONFIG)
        complete[key] = float(value) if isinstance(default, float) else value
    hidden, heads, image, patch = (complete[key] for key in ("hidden_size", "num_attention_heads", "image_size", "patch_size"))
    if hidden % heads:
        raise InputError(f"`hidden_size` {hidden:,} is no multiple of `num_attention_heads` {heads:,} in {source}", hint=RIGHT_CONFIG)
    if image < patch:
        raise InputError(f"`image_size` {image:,} is less than `patch_size` {patch:,} in {source}", hint=RIGHT_CONFIG)
    return complete


def tower_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the tower that a `vision_config` describes, without SigLIP's pooling head. Missing keys have
    transformers' defaults. Raises InputError as `complete_config`."""
    known = complete_config(config)
    row = TOWER_BY_TYPE[known["model_type"]]
    layers = (shapes(row.layer, known, before=f"encoder.layers.{number}.") for number in range(known["num_hidden_layers"]))
    return shapes(row.before, known) | {name: shape for layer in layers for name, shape in layer.items()} | shapes(row.after, known)


def _unique(pairs: Iterable[tuple[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """The pairs as a mapping. Raises InputError where two have the same name."""
    found: dict[str, LazyTensor] = {}
    for name, tensor in pairs:
        if name in found:
            raise InputError(f"the vision tower holds {shown(name)} twice, under names of two layouts", hint=WHOLE_TOWER)
        found[name] = tensor
    return found


def _is_head(name: str) -> bool:
    return name.removeprefix("vision_model.").startswith("head.")


def row_of(names: Container[str]) -> Tower:
    """The kind of tower that has most of these names, without the tower's prefix, and lacks the fewest."""
    return max(TOWERS, key=lambda row: sum(1 if parameter.name in names else -1 for parameter in row.before))


def _measure(tensors: Mapping[str, LazyTensor], name: str) -> TowerSizes:
    """Kind and sizes from the shapes. Raises InputError where a tensor that shows one is missing or has no such shape."""
    for needed, rank in RANKS.items():
        if needed not in tensors:
            raise InputError(f"the vision tower of {shown(name)} lacks `{needed}`", hint=WHOLE_TOWER)
        shape = list(tensors[needed].shape)
        if len(shape) != rank or 0 in shape:
            raise InputError(f"`{needed}` of {shown(name)} has shape {shape}, expected {rank} axes that are not empty", hint=WHOLE_TOWER)
    row = row_of(tensors)
    rows = tensors[POSITION].shape[0] - row.class_token
    if rows < 1 or math.isqrt(rows) ** 2 != rows:
        raise InputError(f"`{POSITION}` of {shown(name)} has {rows:,} rows for patches, which make no square", hint=WHOLE_TOWER)
    numbers = (re.match(r"encoder\.layers\.(\d{1,6})\.", behind) for behind in tensors)
    layers = max(int(found[1]) for found in numbers if found) + 1
    if layers > MAX_LAYERS:
        raise InputError(f"the vision tower of {shown(name)} has {layers:,} layers, at most {MAX_LAYERS:,} are read", hint=WHOLE_TOWER)
    sizes = {key: tensors[tensor].shape[axis] for key, (tensor, axis) in MEASURES.items()}
    return TowerSizes(row.model_type, {**sizes, "num_hidden_layers": layers}, math.isqrt(rows))


def _check_sizes(config: Mapping[str, Any], found: TowerSizes, *, source: str, error: type[InputError] = InputError) -> None:
    """Raise `error`, naming key and tensor, where a complete config does not describe these tensors."""
    hint = RIGHT_CONFIG
    if config["model_type"] != found.model_type:
        own, other = ({parameter.name for parameter in TOWER_BY_TYPE[kind].before} for kind in (found.model_type, config["model_type"]))
        what = f"`model_type` is `{config['model_type']}` in {source}, but the vision tower is a {TOWER_BY_TYPE[found.model_type].title}"
        facts = {"has": listed(sorted(own - other)), "lacks": listed(sorted(other - own))}
        raise error(what, facts={label: names for label, names in facts.items() if names}, hint=hint)
    for key, size in found.sizes.items():
        if config[key] != size:
            tensor = MEASURES[key][0] if key in MEASURES else f"encoder.layers.{size - 1}"
            raise error(f"`{key}` is {config[key]:,} in {source}, but {size:,} by `{tensor}`", hint=hint)
    side = config["image_size"] // config["patch_size"]
    if side != found.side:
        what = f"`image_size` is {config['image_size']:,} in {source}, {side} patches a side, but {found.side} by `{POSITION}`"
        raise error(what, hint=hint)


def _fitted(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], name: str, *, title: str = USUAL) -> dict[str, LazyTensor]:
    """The tensors in the order of `tower_shapes`. Raises InputError unless they are exactly those, in floating point."""
    expected = tower_shapes(config)
    if missing := expected.keys() - tensors.keys():
        names = listed(behind for behind in expected if behind in missing)
        raise InputError(f"the {title} of {shown(name)} lacks {names}", hint=WHOLE_TOWER)
    if unknown := [behind for behind in tensors if behind not in expected]:
        facts = {"known kinds": ", ".join(TOWER_BY_TYPE)}
        raise InputError(
            f"the {title} of {shown(name)} has tensors that no rule knows: {listed(unknown)}",
            facts=facts,
            hint=f"give a {TOWER_TITLES} as its authors published it",
        )
    for behind, shape in expected.items():
        tensor = tensors[behind]
        if tensor.shape != shape:
            facts = {"in": f"the {title}"} if title != USUAL else {}
            what = f"`{behind}` of {shown(name)} has shape {list(tensor.shape)}, expected {list(shape)}"
            raise InputError(what, facts=facts, hint=WHOLE_TOWER)
        if tensor.dtype not in FLOATS:
            raise InputError(f"`{behind}` of {shown(name)} is stored as {tensor.dtype}", hint="give a tower that is not quantised")
    return {behind: tensors[behind] for behind in expected}


def _look_up(found: TowerSizes, model: Checkpoint | None, reference: VisionTower | None) -> tuple[dict[str, Any], str, int | None]:
    """A complete config for measured sizes, a sentence on where heads and activation are from, and how many layers the tower there has."""
    model_config = model.config if model else {}
    near = model.origin.path if model and not model.origin.remote else None
    named = named_tower(model_config)
    if reference is not None:
        source = shown(reference.origin.name) if reference.origin else "the given tower"
        return *_borrowed(reference.config, found, source), reference.whole_layers
    if local := _local_config(named, near):
        config = complete_config(vision_part(local, named), source=shown(named))
        return *_borrowed(config, found, shown(named)), config["num_hidden_layers"]
    hidden = found.sizes["hidden_size"]
    measured = {"model_type": found.model_type, **found.sizes, "image_size": found.side * found.sizes["patch_size"]}
    videos = model is not None and any(canonical(full).startswith(VIDEO) for full in model.tensors)
    known = _known(found, named, videos=videos)
    if known:
        measured |= {"num_attention_heads": known.heads, "projection_dim": known.projection, "hidden_act": known.activation}
        if known.image // found.sizes["patch_size"] == found.side:  # 27 patches of 14 are so400m's 384 pixels
            measured["image_size"] = known.image
        note = f"{known.heads} heads and {known.activation} as in {known.repo}, which has the same widths"
    elif hidden >= 512 and hidden % 64 == 0:  # so in every published tower but ViT-H, bigG and so400m, which are known
        measured["num_attention_heads"] = hidden // 64
        note = f"{hidden // 64} heads, guessed as 64 channels each, and the usual activation: no published tower has these widths"
    else:
        facts = {"hidden_size": hidden, "mm_vision_tower": shown(named) if named else "not in config.json"}
        hint = "give the repository that the tower was trained from with `--vision-tower`, for its config"
        raise InputError("nothing says how many attention heads the vision tower has", facts=facts, hint=hint)
    return complete_config(measured), f"vision_config: {note}", known.layers if known else None


def _borrowed(config: Mapping[str, Any], found: TowerSizes, source: str) -> tuple[dict[str, Any], str]:
    """Another tower's config for these tensors, which may have fewer layers: some LLaVAs drop the last ones."""
    layers = min(config["num_hidden_layers"], found.sizes["num_hidden_layers"])
    fitting = {**config, "num_hidden_layers": layers}
    _check_sizes(fitting, found, source=source, error=MismatchError)
    cut = f", of whose {config['num_hidden_layers']} layers the checkpoint has the first {layers}"
    return fitting, f"vision_config: from {source}" + (cut if layers < config["num_hidden_layers"] else "")


def _known(found: TowerSizes, named: str, *, videos: bool) -> KnownTower | None:
    """The published tower with these widths, of the publisher that the checkpoint names if it has one; `videos`: of those that stand beside
    a tower for videos."""
    fitting = [known for known in same_widths(found.model_type, found.sizes) if known.with_videos >= videos]
    theirs = (known for known in fitting if known.repo.partition("/")[0] == named.partition("/")[0])
    return next(theirs, fitting[0] if fitting else None)


def same_widths(model_type: str, sizes: Mapping[str, Any]) -> list[KnownTower]:
    """The published towers of these widths, which have the same number of layers."""
    wanted = (model_type, sizes["hidden_size"], sizes["intermediate_size"])
    return [known for known in KNOWN_TOWERS if (known.model_type, known.hidden, known.intermediate) == wanted]


def _local_config(named: str, near: Path | None) -> Mapping[str, Any] | None:
    """config.json of the folder `named`, relative to the working directory or to one of the three folders above the checkpoint `near`;
    None where there is none."""
    above = list(near.parents)[:3] if near else []
    folders = (folder / named for folder in (Path(), *above)) if named else ()
    return next((load_object(member(folder, "config.json")) for folder in folders if present(folder / "config.json")), None)


def vision_part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The vision tower's config in a repository's config.json. Raises InputError where that describes no CLIP or SigLIP."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in TOWER_BY_REPOSITORY:
        facts = {"model_type": "missing" if model_type is None else shown(str(model_type)), "known": ", ".join(TOWER_BY_REPOSITORY)}
        raise InputError(f"{shown(name)} has no config.json of a {TOWER_TITLES}", facts=facts, hint="give the tower's whole folder")
    if model_type in TOWER_BY_TYPE:
        return config
    nested = config.get("vision_config") or config.get("vision_config_dict") or {}  # the second was its name in 2022
    if not isinstance(nested, Mapping):
        raise InputError(f"`vision_config` is not an object in the config.json of {shown(name)}", hint=RIGHT_CONFIG)
    return {**nested, "model_type": nested.get("model_type") or TOWER_BY_REPOSITORY[model_type].model_type}


def _preprocessor(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """preprocessor_config.json of the folder that a checkpoint was opened from."""
    folder = checkpoint.origin.place
    try:
        if not folder.is_dir() or "preprocessor_config.json" not in names_in(folder):
            return None
    except OSError as error:
        raise unreadable(folder, error) from error
    return load_object(member(folder, "preprocessor_config.json"))


def _valid(value: Any, default: int | float | str) -> bool:
    """Whether a config value has its default's type and is within bounds."""
    if isinstance(default, bool):
        return value is default
    if isinstance(default, str):
        return value in TOWER_ACTIVATIONS
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (isinstance(value, int) and 0 < value <= 1 << 16 if isinstance(default, int) else 0 <= value <= 100)
