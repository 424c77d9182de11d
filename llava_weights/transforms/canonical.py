"""A LLaVA of any layout in canonical form: tensors by canonical name, its tower, and config and tokenizer as the original spells them.

It is checked on the way: every name is known, and every shape is the one that the config gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..checkpoint.added_tokens import without_stale_list
from ..checkpoint.checkpoint import Checkpoint, main_dtype
from ..checkpoint.config import check_structure, decoder_of, quantization_notes, repair_config
from ..checkpoint.diagnose import state
from ..checkpoint.hf_config import STATED, Tokens, flat_config, original_config, select_layer, tower_name
from ..checkpoint.hf_tokenizer import HfTokenizer, hf_tokenizer
from ..checkpoint.images import reads_newline
from ..checkpoint.kinds import ADAPTERS, contradictions, kind_of, refuse_kind
from ..checkpoint.processor import original_vision_settings
from ..checkpoint.rope import check_rope
from ..checkpoint.small_files import RIGHT_CONFIG, small_object
from ..checkpoint.tokenizer import SpecialIds
from ..checkpoint.tower import (
    VIDEO,
    Doubts,
    VisionTower,
    check_kept,
    check_tower,
    named_tower,
    open_tower,
    own_tower,
    recognised,
    tower_hint,
    video_tower,
)
from ..errors import InputError, MismatchError
from ..families.layouts import LAYOUTS, LLAVA_PART, VOCABULARY_TABLES, canonical, spelled
from ..families.originals import ORIGINALS, Original, fitting
from ..families.projectors import (
    LINEAR_NAMES,
    NORM,
    PROJECTOR_ACTIVATION,
    PROJECTOR_NAMES,
    STACK_OF_ONE,
    STACK_OF_ONE_TYPE,
    projector_type,
    projector_weights,
)
from ..families.targets import TARGET_BY_TYPE as TARGETS
from ..families.targets import TOWER_KEYS, Target
from ..storage.reading import Workspace
from ..tensors.lazy import LazyTensor, cast
from ..tensors.sampling import sample_both
from ..text import few, shown, unquoted
from .projector import zero_biases

BIASES = (PROJECTOR_NAMES[1], PROJECTOR_NAMES[3])
TEXT_PART = r"text\.|head\.|newline$"
VIDEO_KEY = "mm_video_tower"  # by which a config of the original layout names the tower for videos
Canonical = dict[str, LazyTensor]  # by canonical name


@dataclass(frozen=True)
class Model:
    """A LLaVA in canonical form. `config` and the tokenizer's files are as the original layout spells them."""

    tensors: Canonical
    tower: VisionTower
    target: Target  # the class of transformers that holds it
    families: tuple[Original, ...]  # those that it fits, all of that target
    config: Mapping[str, Any]
    tokenizer: HfTokenizer
    activation: str  # between the two layers of the projector
    rows: int
    repairs: tuple[str, ...] = ()
    doubts: Doubts = field(default_factory=Doubts)  # about the tower
    bare: bool = False  # the projector has no biases: zeros stand in their place

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding table, and is not stored."""
        return VOCABULARY_TABLES[1] not in self.tensors


def to_canonical(
    checkpoint: Checkpoint, tower: Checkpoint | None, image_token: str | None, dtype: str | None, *, accept_tower: bool = False
) -> Model:
    """`checkpoint` in canonical form, cast to `dtype`, with `tower` where it holds no tower of its own.

    Raises InputError where it is no LLaVA that llava-hf can hold, or its tensors, config and tokens do not agree,
    MismatchError where `tower` is not the one that its config names, unless `accept_tower`.
    """
    _check_kind(checkpoint)
    small, stale = without_stale_list(checkpoint.files)
    checkpoint = replace(checkpoint, files=small)
    tensors = _canonical_tensors(checkpoint, dtype)
    hub = checkpoint.layout == "llava-hf"
    _check_newline(checkpoint, tensors)
    _check_class(checkpoint, tensors)
    bare = checkpoint.config.get("multimodal_projector_bias") is False and not any(name in tensors for name in (*BIASES, LINEAR_NAMES[1]))
    tensors |= zero_biases(tensors) if bare else {}
    given = open_tower(tower) if tower else None
    vision = checkpoint.config.get("vision_config") if hub else None
    own = own_tower(checkpoint.tensors, vision_config=vision, model=checkpoint, reference=given)
    if own is None and given is None:
        raise InputError(
            "the checkpoint holds no vision tower",
            facts={"checkpoint": checkpoint.origin.name, "config names": named_tower(checkpoint.config) or "none"},
            hint=tower_hint(checkpoint.config),
        )
    chosen = own or given
    assert chosen is not None
    doubts = check_tower(checkpoint, chosen, accept=accept_tower) if own is None else Doubts()
    if (hub or checkpoint.folders) and own and given:
        doubts = Doubts(notes=(check_kept(own, given, checkpoint.origin.name),))
    main = dtype or main_dtype(checkpoint.parameters())
    tensors = {
        name: cast(tensor, main) if name.startswith(VIDEO) else tensor for name, tensor in tensors.items() if not name.startswith("tower.")
    }
    tensors |= {f"tower.{name}": cast(tensor, main) for name, tensor in chosen.tensors.items()}
    rows = tensors[VOCABULARY_TABLES[0]].rows if VOCABULARY_TABLES[0] in tensors else 0
    asked = image_token
    if hub:
        image_token = image_token or _image_token(checkpoint, rows)
    _check_image_ids(checkpoint, rows)
    config = _as_original(checkpoint, chosen) if hub else dict(checkpoint.config)
    if doubts.differs:
        known = recognised(chosen.config)
        config[next((key for key in TOWER_KEYS if config.get(key)), TOWER_KEYS[0])] = known.repo if known else None
    hub_target = TARGETS[str(checkpoint.config["model_type"])] if hub else None
    target = hub_target or TARGETS[_families(config, chosen, tensors)[0].target]
    if target.video and target.two_towers:
        video_tower(checkpoint.tensors, chosen.config, name=checkpoint.origin.name, lost="" if hub else target.video.lost)
    limit = config.get("tokenizer_model_max_length") or config.get("max_position_embeddings")
    others = tuple(target.tokens.values())
    first = bool(target.video and target.video.first)
    tokenizer = hf_tokenizer(
        checkpoint.files, rows=rows, image_token=image_token, processor_class=target.processor, model_max_length=limit,
        before=others if first else (), behind=() if first else others,
    )  # fmt: skip
    before = config
    config, repairs = _repaired(before, tensors, tokenizer, main)
    repairs = (*quantization_notes(checkpoint.config), *repairs) if hub else repairs
    if LINEAR_NAMES[0] in tensors and before.get("mm_projector_type") == STACK_OF_ONE_TYPE:  # by which its family is known
        config = {**config, "mm_projector_type": STACK_OF_ONE_TYPE}
        repairs = tuple(text for text in repairs if "`mm_projector_type`" not in text)
    families = _families({**before, **config}, chosen, tensors, hub_target)
    _check_shapes(config, tensors, chosen, target)
    activation = str(checkpoint.config.get("projector_hidden_act", PROJECTOR_ACTIVATION))
    doubts = replace(doubts, warnings=(*doubts.warnings, *_own_head(checkpoint.config, tensors)))
    repairs = (*stale, *(_image_id(checkpoint, tokenizer) if hub and asked is None else ()), *repairs)
    return Model(tensors, chosen, target, families, config, tokenizer, activation, rows, repairs, doubts, bare)


def _families(config: Mapping[str, Any], tower: VisionTower, tensors: Canonical, target: Target | None = None) -> tuple[Original, ...]:
    """The families that these tensors fit, of a llava-hf checkpoint those of its `target`, with any tower where there is none with its own.

    Raises InputError where an original fits none, and as `decoder_of`."""
    decoder = decoder_of(config)
    videos, norm = any(name.startswith(VIDEO) for name in tensors), NORM[0] in tensors
    found = tuple(fitting(config, decoder=decoder.model_type, tower=tower.kind, newline="newline" in tensors, norm=norm, videos=videos))
    if target:
        anyhow = fitting(config, decoder=decoder.model_type, norm=target.layernorm, videos=videos)
        return tuple(x for x in found if x.target == target.model_type) or tuple(x for x in anyhow if x.target == target.model_type)
    if not found and videos:
        known = {decoder for row in ORIGINALS if TARGETS[row.target].two_towers for decoder in row.decoders}
        facts = {"decoder, tower": f"{decoder.model_type}, {tower.kind}"}
        hint = f"one with a tower for videos stands on {' or '.join(sorted(known))} with a CLIP, and its images are whole"
        raise InputError("a tower for videos in a LLaVA of no known family", facts=facts, hint=hint)
    if not found:
        facts = {
            "decoder, tower": f"{decoder.model_type}, {tower.kind}",
            "image_aspect_ratio": unquoted(str(config.get("image_aspect_ratio"))),
            "mm_patch_merge_type": unquoted(str(config.get("mm_patch_merge_type") or "flat")),
            "image_newline": "there" if "newline" in tensors else "missing",
        }
        hint = "`anyres` (LLaVA-NeXT) and `anyres_max_N` on a SigLIP (LLaVA-OneVision) come with `spatial_unpad` and an `image_newline`"
        raise InputError("images in tiles, joined in a way that no known LLaVA does", facts=facts, hint=hint)
    return found


def _check_kind(checkpoint: Checkpoint) -> None:
    if checkpoint.layout not in ADAPTERS:
        refuse_kind(kind_of(checkpoint), checkpoint)
    kind = str(checkpoint.config.get("model_type"))
    if checkpoint.layout == "llava-hf" and kind not in TARGETS:
        what = f"`{checkpoint.origin.name}` is not a LLaVA that can be converted: `model_type` is {shown(kind)} in config.json"
        raise InputError(what, hint=f"known are {', '.join(TARGETS)}")
    if checkpoint.layout not in ("llava", "llava-hf"):
        told = checkpoint.config.get("model_type")
        unknown = "of an unknown kind" + (f", by its config {shown(str(told))}" if told else "")
        title = next((layout.title for layout in LAYOUTS if layout.name == checkpoint.layout), unknown)
        hints = {
            "llama": "a LLaVA has a projector: apply a delta in the same pass, as `convert BASE --delta DELTA --to llava-hf`",
            "clip": "give the LLaVA, and this as `--vision-tower`",
            "projector": "give the base that it was trained on, and this as `--lora`: `convert BASE --lora PROJECTOR --to llava-hf`",
            "adapter": "merge it first, or in the same pass: `convert BASE --lora ADAPTER --to llava-hf`",
        }
        what = f"`{checkpoint.origin.name}` is not a LLaVA that can be converted: {title}"
        raise InputError(what, hint=hints.get(checkpoint.layout, "give a LLaVA in the original or in the llava-hf layout"))
    if not checkpoint.history and state(checkpoint.parameters()).verdict == "delta":
        raise InputError(
            f"`{checkpoint.origin.name}` is an unapplied delta",
            hint=f"convert it in the same pass as it is applied: `convert LLAMA --delta {checkpoint.origin.name} --to llava-hf`",
        )


def _own_head(config: Mapping[str, Any], tensors: Canonical) -> Iterator[str]:
    """A warning where the config ties the head to the embedding, and the head that is stored has other values."""
    text = config.get("text_config")
    tied = True in (config.get("tie_word_embeddings"), text.get("tie_word_embeddings") if isinstance(text, Mapping) else None)
    embed, head = (tensors.get(name) for name in VOCABULARY_TABLES)
    if tied and embed and head and embed.shape == head.shape:
        with closing(Workspace(drop_cache=False)) as work:
            one, other = sample_both(embed, head, work)
        if not np.array_equal(one, other, equal_nan=True):
            yield (
                "`tie_word_embeddings` is true in config.json, but the stored head has values of its own: it is kept and the flag set to "
                "false, where transformers takes the embedding in its place"
            )


def _canonical_tensors(checkpoint: Checkpoint, dtype: str | None) -> Canonical:
    """Every parameter by its canonical name. Raises InputError for an unknown name, and where two names mean one tensor."""
    unknown = [name for name in checkpoint.parameters() if not re.match(LLAVA_PART, canonical(name))]
    if unknown:
        what = f"{len(unknown)} tensors are of no part of a LLaVA: {few(unknown)}"
        raise InputError(what, facts={"checkpoint": checkpoint.origin.name}, hint="give a LLaVA without other weights beside it")
    found = checkpoint.by_canonical_name()
    if checkpoint.layout == "llava" and {name for name in found if name.startswith("projector.")} <= {*STACK_OF_ONE}:
        single = dict(zip(STACK_OF_ONE, LINEAR_NAMES, strict=True))
        found = {single.get(name, name): tensor for name, tensor in found.items()}
    return {name: cast(tensor, dtype) for name, tensor in found.items()} if dtype else found


def _image_token(checkpoint: Checkpoint, rows: int) -> str | None:
    """The text of the token that a llava-hf config names by its id."""
    config = checkpoint.config
    image = config.get("image_token_index", config.get("image_token_id"))
    if type(image) is not int or not 0 <= image < rows:
        what = f"the image token's id is {unquoted(str(image))}, the vocabulary has {rows:,} rows"
        raise InputError(what, facts={"config": "image_token_index"}, hint="give the config.json that belongs to these weights")
    named = small_object(checkpoint.files, "processor_config.json").get("image_token")
    return named if isinstance(named, str) else None


def _image_id(checkpoint: Checkpoint, tokenizer: HfTokenizer) -> Iterator[str]:
    """A sentence where config.json names another id than the one that the image token has."""
    stated = checkpoint.config.get("image_token_index", checkpoint.config.get("image_token_id"))
    if stated != tokenizer.image_id:
        name = shown(tokenizer.image_token)
        by_processor = "image_token" in small_object(checkpoint.files, "processor_config.json")
        why = "which processor_config.json names" if by_processor else "which stands for an image"
        yield f"config: `image_token_index` {stated} -> {tokenizer.image_id}, the id of {name}, {why}"


def _check_newline(checkpoint: Checkpoint, tensors: Canonical) -> None:
    """Raise InputError where the config says that tiles are joined by `image_newline`, and no file holds it."""
    config = checkpoint.config
    if checkpoint.layout == "llava-hf":
        target = TARGETS.get(str(config.get("model_type")))
        reads = target is not None and target.tiles and config.get("use_image_newline_parameter") is not False
    else:
        reads = reads_newline(config)
    if reads and "newline" not in tensors:
        keys = ("model_type", "image_aspect_ratio", "mm_patch_merge_type")
        facts = {key: unquoted(str(config[key])) for key in keys if config.get(key) is not None}
        hint = "give a checkpoint that holds it; where a LoRA was merged, merge it onto the LLaVA that it was trained from, which has it"
        raise InputError("`image_newline` is in no file, and config.json says that images are joined with it", facts=facts, hint=hint)


def _check_class(checkpoint: Checkpoint, tensors: Canonical) -> None:
    """Raise InputError where the class that a llava-hf config names has no place for these tensors, or the tower for videos that a config
    names is in no file."""
    config = checkpoint.config
    if checkpoint.layout == "llava-hf":
        target = TARGETS.get(str(config.get("model_type")))
        if target and (told := contradictions(target, checkpoint.parameters())):
            what = f"`{checkpoint.origin.name}` is not the {target.model_type} that its config.json says: {told[0]}"
            raise InputError(what, facts={"architectures": unquoted(str(config.get("architectures")))}, hint=RIGHT_CONFIG)
    elif config.get(VIDEO_KEY) and not any(name.startswith(VIDEO) for name in tensors):
        facts = {VIDEO_KEY: unquoted(str(config[VIDEO_KEY])), "checkpoint": checkpoint.origin.name}
        hint = "give a checkpoint that holds both of its towers, as its authors published it: no option takes a tower for videos"
        raise InputError("config.json names a tower for videos, and it is in no file", facts=facts, hint=hint)


def _check_image_ids(checkpoint: Checkpoint, rows: int) -> None:
    added = small_object(checkpoint.files, "added_tokens.json")
    beyond = {
        token: i
        for token, i in added.items()
        if token in ("<image>", "<im_patch>", "<im_start>", "<im_end>") and type(i) is int and i >= rows
    }
    if beyond:
        what = f"{', '.join(f'`{token}` has the id {i}' for token, i in beyond.items())}, but the vocabulary has only {rows:,} rows"
        raise InputError(what, hint="give the tokenizer that belongs to these weights")


def _as_original(checkpoint: Checkpoint, tower: VisionTower) -> dict[str, Any]:
    """A llava-hf config as the original layout spells it."""
    config, text = checkpoint.config, flat_config(checkpoint.config)
    if isinstance(nested := config.get("text_config"), Mapping):
        check_rope(nested)
    named, target = tower_name(config, tower) or "", TARGETS[str(config["model_type"])]
    made = original_config(
        config, tower=tower, tokens=Tokens(0, 0, 0, 0, 0), projector=projector_type(PROJECTOR_NAMES), name=named, dtype="F32"
    )
    preprocessor, processor = (small_object(checkpoint.files, name) for name in ("preprocessor_config.json", "processor_config.json"))
    made |= {
        key: value
        for key, value in original_vision_settings(preprocessor, processor).items()
        if key == "image_aspect_ratio" and not target.tiles
    }
    added = small_object(checkpoint.files, "added_tokens.json")
    made |= {"mm_use_im_patch_token": "<im_patch>" in added, "mm_use_im_start_end": "<im_start>" in added}
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "mm_projector_type", "tie_word_embeddings"):
        made.pop(key, None)
    if "vision_feature_layers" in config:  # its name before transformers 5
        made["vision_feature_layer"] = config["vision_feature_layers"]
    made |= {key: config.get(key, made.get(key, target.defaults[key])) for key in STATED if key in target.defaults}
    if isinstance(text.get("eos_token_id"), list):
        made["eos_token_id"] = text["eos_token_id"]
    return made | {"tie_word_embeddings": text.get("tie_word_embeddings", config.get("tie_word_embeddings"))}


def _repaired(config: Mapping[str, Any], tensors: Canonical, tokenizer: HfTokenizer, dtype: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The original's config, repaired and checked against the tensors; and the repairs, without those that only fill in or tidy."""
    shapes = {spelled(name, "llava"): tensor.shape for name, tensor in tensors.items() if not name.startswith(("tower.", VIDEO))}
    ids = SpecialIds(tokenizer.bos, tokenizer.eos, tokenizer.pad, 0, {}, 0)
    repaired, sentences = repair_config(config, shapes=shapes, special_ids=ids, dtype=dtype)
    worth_telling = tuple(text for text in sentences if not re.match("config: (made explicit|dropped|bos/eos/pad)", text))
    return {**repaired, "mm_use_im_start_end": config.get("mm_use_im_start_end", False)}, worth_telling


def _check_shapes(config: Mapping[str, Any], tensors: Canonical, tower: VisionTower, target: Target) -> None:
    """Raise InputError unless the tensors are exactly those of a LLaVA of this config and target."""
    text = {spelled(name, "llava"): tensor.shape for name, tensor in tensors.items() if re.match(TEXT_PART, name)}
    check_structure(config, text, vocabulary_rows=tensors[VOCABULARY_TABLES[0]].rows)
    hidden = tensors[VOCABULARY_TABLES[0]].shape[1]
    projector = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("projector.")}
    layers = select_layer(config, tower, target)
    width = tower.hidden * (len(layers) if isinstance(layers, list) else 1)
    one = {LINEAR_NAMES[0]: (hidden, width), LINEAR_NAMES[1]: (hidden,)}
    two = {
        PROJECTOR_NAMES[0]: (hidden, width),
        PROJECTOR_NAMES[1]: (hidden,),
        PROJECTOR_NAMES[2]: (hidden, hidden),
        PROJECTOR_NAMES[3]: (hidden,),
    }
    if target.layernorm:
        two |= dict.fromkeys(NORM, (width,))
    if projector not in ((two,) if target.layernorm else (one, two)):
        facts = {spelled(name, "llava"): str(list(shape)) for name, shape in projector.items()}
        what = "the projector is not one that llava-hf can hold, or does not fit its tower"
        hint = f"llava-hf has one Linear or two with gelu between them, from the tower's width of {width} to the decoder's of {hidden}"
        if projector in [{name: shape for name, shape in each.items() if not name.endswith("bias")} for each in (one, two)]:
            hint = "if it was trained without biases, say so in config.json: `multimodal_projector_bias` false"
        elif len(projector_weights(projector)) > 2:
            what = f"the projector is `{projector_type(projector)}`, and no class of transformers has one of more than two layers"
            hint = "run it with LLaVA's own code"
        raise InputError(what, facts=facts or None, hint=hint)
    if "newline" in tensors and tensors["newline"].shape != (hidden,):
        what = f"`image_newline` has shape {list(tensors['newline'].shape)}, the decoder is {hidden} wide"
        raise MismatchError(what, hint="give the projector and decoder of one training")
