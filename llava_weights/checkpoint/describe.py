"""The lines of `inspect` on the parts of a checkpoint (class, decoder, vocabulary, projector, tower, adapter), and the next command."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..errors import InputError
from ..families.files import ADAPTER_CONFIG, ADAPTER_FILES, BESIDE_ADAPTER, WEIGHT_SUFFIXES
from ..families.layouts import MULTIMODAL, PEFT_PREFIX, VOCABULARY_TABLES, canonical
from ..families.projectors import NORM, PROJECTOR_ACTIVATION, projector_type
from ..families.targets import TARGETS
from ..families.towers import PATCH, TOWER_BY_TYPE
from ..formats.folder import member
from ..storage.places import Place, names_in
from ..storage.strict_json import load_object
from ..tensors.lazy import LazyTensor
from ..text import few, listed, unquoted
from .checkpoint import Checkpoint
from .config import known_decoder
from .hf_config import flat_config
from .kinds import ADAPTERS
from .tokenizer import read_special_ids
from .tower import VIDEO, lost_tensors, named_tower, row_of, tower_place

UNKNOWN = "of a kind that is not known"
# What projectors and towers are called in any layout, where no row gives their canonical names.
ANY_PROJECTOR = (
    r"(?:.*\.)?(?:mm_projector|multi_modal_projector|\w*connector|mlp1|merger|\w*abstractor|\w*aligner|\w*resampler|qformer|img_projection|image_projector"
    r"|(?:language|visual|modality|image_to_text|image)_projection)\..*"
)
ANY_TOWER = (
    r"(?:.*\.)?(?:vision_tower\w*|image_tower|video_tower|vision_model|visual|(?:vision|image)_encoder|vit|vpm|vision_backbone"
    r"|vision_embed_tokens)\..*"
)
# The text model of a family that no row describes: the keys that hold its config, its embedding table, and numbers of its layers.
TEXT_PARTS = ("text_config", "llm_config", "language_config", "llm_cfg")
ANY_TABLE = r"(?:.*\.)?(?:(?:embed_tokens|tok_embeddings|word_embeddings|wte)\.weight|wte\.embedding)"
ANY_LAYER = r"(?:.*\.)?(?:layers|blocks|layer|h)\.(\d{1,6})\..*"
Parts = Mapping[str, LazyTensor]


def parts_of(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """The parameters by canonical name, those of a training state without PEFT's prefix."""
    return {canonical(name.removeprefix(PEFT_PREFIX)): tensor for name, tensor in checkpoint.parameters().items()}


def model_class(config: Mapping[str, Any]) -> str:
    """The class that config.json names, and its model_type."""
    given, kind = config.get("architectures"), config.get("model_type")
    named = [str(name) for name in given] if isinstance(given, list) else []
    texts = [", ".join(named), f"model_type {kind}" if kind else ""]
    return ", ".join(unquoted(text) for text in texts if text)


def decoder(checkpoint: Checkpoint, parts: Parts, *, foreign: bool = False) -> str:
    """Kind and sizes of the text model, from its config and, where that says nothing, from its tensors; `foreign`: of a family that no row
    describes."""
    keys = TEXT_PARTS if foreign else TEXT_PARTS[:1]
    nested = next((part for key in keys if isinstance(part := checkpoint.config.get(key), Mapping)), None)
    config: Mapping[str, Any] = checkpoint.config if nested is None else nested
    there = foreign or any(name.startswith("text.") for name in parts) or nested is not None
    if checkpoint.layout in ADAPTERS or (checkpoint.layout == "clip" and not foreign) or not there:
        return ""
    table = _table(parts, foreign)
    numbers = [int(found[1]) for name in parts if (found := re.match(r"text\.layers\.(\d{1,6})\.", name))]
    if foreign and not numbers:
        names = (name for name in checkpoint.parameters() if not re.fullmatch(f"{ANY_TOWER}|{ANY_PROJECTOR}", name))
        numbers = [int(found[1]) for name in names if (found := re.fullmatch(ANY_LAYER, name))]
    layers = config.get("num_hidden_layers") or (max(numbers) + 1 if numbers else None)
    hidden = config.get("hidden_size") or (table.shape[-1] if table and table.shape else None)
    known = known_decoder(flat_config({"text_config": nested}) if nested is not None else config)
    kind = known.model_type if known else config.get("model_type")
    heads, grouped, wide = (config.get(key) for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"))
    texts = [
        unquoted(str(kind)) if kind else "",
        f"{layers} layers of {hidden}" if layers and hidden else "",
        f"{heads} heads" + (f" ({grouped} of keys and values)" if grouped and grouped != heads else "") if heads else "",
        f"{wide} wide inside" if wide else "",
    ]
    return ", ".join(unquoted(text) for text in texts if text)


def _table(parts: Parts, foreign: bool) -> LazyTensor | None:
    """The embedding table; of a `foreign` family what is called like one."""
    if not foreign or VOCABULARY_TABLES[0] in parts:
        return parts.get(VOCABULARY_TABLES[0])
    return next((tensor for name, tensor in parts.items() if re.fullmatch(ANY_TABLE, name) and len(tensor.shape) == 2), None)


def vocabulary(checkpoint: Checkpoint, parts: Parts, *, foreign: bool = False) -> str:
    """Rows of the tables, whether they are tied, and the tokens behind the pieces of tokenizer.model."""
    embed, head = _table(parts, foreign), parts.get(VOCABULARY_TABLES[1])
    if embed is None or not embed.shape:
        return ""
    text = f"{embed.rows} rows" + ("" if head or (foreign and VOCABULARY_TABLES[0] not in parts) else ", no lm_head (tied)")
    try:
        added = read_special_ids(checkpoint.files, embed.rows).added
    except InputError as error:
        return f"{text}; its tokenizer: {error.what}"
    names = ", ".join(f"{token} {number}" for token, number in sorted(added.items(), key=lambda pair: pair[1]))
    return f"{text}; added {names}" if added else text


def projector(checkpoint: Checkpoint, parts: Parts) -> str:
    """Kind and widths."""
    found = {name: tensor for name, tensor in parts.items() if name.startswith("projector.")}
    if not found:
        found = {name: tensor for name, tensor in checkpoint.parameters().items() if re.fullmatch(ANY_PROJECTOR, name)}
    weights = [tensor for name, tensor in sorted(found.items()) if name.endswith("weight") and len(tensor.shape) == 2]
    if not found:
        return ""
    kind = projector_type(parts) or f"{UNKNOWN}: {few(found)}"
    kind += " behind a LayerNorm" if NORM[0] in parts else ""
    act = str(checkpoint.config.get("projector_hidden_act", PROJECTOR_ACTIVATION))
    bias = "" if any(name.endswith("bias") for name in found) else ", without biases"
    between = f" with {unquoted(act)} between the layers" if act != PROJECTOR_ACTIVATION and checkpoint.layout == "llava-hf" else ""
    widths = f", {weights[0].shape[1]} to {weights[-1].shape[0]}" if weights else ""
    return f"{kind}{widths}{between}{bias}"


def tower(checkpoint: Checkpoint, parts: Parts, *, foreign: bool = False) -> str:
    """Kind and sizes of the vision tower inside, or the one that config.json names; `foreign`: of a family that no row describes."""
    inside = {name.removeprefix("tower."): tensor for name, tensor in parts.items() if name.startswith("tower.")}
    if checkpoint.layout == "clip" and not foreign:
        inside = {name.removeprefix("vision_model."): tensor for name, tensor in checkpoint.parameters().items()}
    others = {name: tensor for name, tensor in checkpoint.parameters().items() if re.fullmatch(ANY_TOWER, name)}
    if inside or others:
        frames = sum(name.startswith(VIDEO) for name in parts)
        more = f", and one for videos, {frames} tensors" if frames else ""
        return f"{_tower_kind(checkpoint, inside)}; inside, {len(inside) or len(others)} tensors{more}"
    named = named_tower(checkpoint.config)
    multimodal = checkpoint.layout in ("adapter", "llava-hf") or any(re.fullmatch(MULTIMODAL, name) for name in checkpoint.tensors)
    return f"not inside; config names {named}" if named and multimodal else ""


def _tower_kind(checkpoint: Checkpoint, inside: Parts) -> str:
    vision = checkpoint.config.get("vision_config")
    config = vision if isinstance(vision, Mapping) else {}
    kind = config.get("model_type")
    if PATCH not in inside or (kind is not None and kind not in TOWER_BY_TYPE):
        return f"{UNKNOWN}" + (f" ({unquoted(str(kind))})" if kind else "")
    patches = inside[PATCH].shape
    numbers = [int(found[1]) for name in inside if (found := re.match(r"encoder\.layers\.(\d{1,6})\.", name))]
    sizes = f"{max(numbers, default=-1) + 1} layers of {patches[0]}, patches of {patches[-1]}" if patches else ""
    image = f", images of {config['image_size']}" if type(config.get("image_size")) is int else ""
    return f"{row_of(inside).title}, {sizes}{image} pixels"


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """adapter_config.json beside an adapter, empty where there is none that can be read."""
    folder = _folder(checkpoint)
    with suppress(InputError, OSError):
        if folder and ADAPTER_CONFIG in names_in(folder):
            return load_object(member(folder, ADAPTER_CONFIG))
    return {}


def adapter(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str:
    """Rank, what is adapted, and the base, as far as names and adapter_config.json tell."""
    if checkpoint.layout not in ("adapter", "loha", "mlx-adapter"):
        return ""
    low = r"(?P<module>.+)\.lora_(?:embedding_)?(?:A|a)(?:\..*)?"
    found = {name: match["module"] for name in checkpoint.tensors if (match := re.fullmatch(low, name))}
    ranks = sorted({_rank(name, checkpoint.tensors[name]) for name in found})
    kinds = sorted({module.rpartition(".")[2] for module in found.values()})
    texts = [
        f"rank {', '.join(map(str, ranks))}" if ranks else "",
        f"alpha {config['lora_alpha']}" if config.get("lora_alpha") is not None else "",
        f"{len(found)} modules ({', '.join(kinds[:8])}{', …' if len(kinds) > 8 else ''})" if found else "",
        unquoted(str(config["peft_type"])) if config.get("peft_type") not in (None, "LORA") else "",
        *(key for key in ("use_dora", "use_rslora") if config.get(key) is True),
        f"for {unquoted(base_name(config))}" if base_name(config) else f"no {ADAPTER_CONFIG} says for which base" * (not config),
    ]
    return ", ".join(text for text in texts if text)


def beside(checkpoint: Checkpoint) -> str:
    """Weight files beside an adapter, which belong to it or are refused with it."""
    folder = _folder(checkpoint)
    if folder is None or checkpoint.layout != "adapter":
        return ""
    own = {file.name for file in checkpoint.origin.files}
    with suppress(OSError):
        names = [name for name in names_in(folder) if name.endswith(tuple(WEIGHT_SUFFIXES)) and name not in own]
        return listed(name for name in names if name in (*BESIDE_ADAPTER, *ADAPTER_FILES) or "model" in name)
    return ""


def base_name(config: Mapping[str, Any]) -> str:
    """The base that adapter_config.json records: `owner/name` of the Hub, or the last part of a path on its author's machine."""
    recorded = str(config.get("base_model_name_or_path") or config.get("model") or "")  # the second is MLX's
    if re.fullmatch(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?", recorded):
        return recorded
    return re.split(r"[/\\]+", recorded.rstrip("/\\"))[-1]


def _rank(name: str, tensor: LazyTensor) -> int:
    """Of MLX's `lora_a`, which is stored the other way round, the last axis."""
    return (tensor.shape or (0,))[-1 if name.endswith("lora_a") else 0]


def _folder(checkpoint: Checkpoint) -> Place | None:
    path = checkpoint.origin.place
    return None if checkpoint.history else path if path.is_dir() else path.parent


# --- what comes next --------------------------------------------------------------------------------------------------


def next_command(checkpoint: Checkpoint, given: str) -> str:
    """The command that usually follows for a checkpoint of this kind, empty where nothing can be done with it."""
    base = base_name(adapter_config(checkpoint)) or "BASE"
    named = tower_place(checkpoint.config)
    whole = any(canonical(name).startswith("tower.") for name in checkpoint.tensors)
    lossy = any(row.video and lost_tensors(checkpoint.tensors, row.video.lost) for row in TARGETS)
    to_hub = f"llava-weights convert {given} --to llava-hf{' --lossy' if lossy else ''} -o OUT"
    merge = f"llava-weights merge-lora --base {base} --lora {given} -o OUT"
    commands = {
        "llava": to_hub if whole else f"{to_hub} --vision-tower {named or 'TOWER'}",
        "llava-hf": f"llava-weights verify {given}",
        "llama": f"llava-weights apply-delta --base {given} --delta DELTA -o OUT, or merge-lora --base {given} --lora ADAPTER -o OUT",
        "adapter": merge,
        "projector": merge,
        "clip": f"llava-weights convert LLAVA --to llava-hf --vision-tower {given} -o OUT",
        "loha": "merge it with PEFT, the library that trained it",
        "mlx-adapter": merge,
    }
    return commands.get(checkpoint.layout, "")
