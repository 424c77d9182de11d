"""The original LLaVA layout to llava-hf and back, and any key style of llava-hf to that of the Hub. A pure renaming where it can be.

Everything is decided from tensors and config. The checkpoint is brought into canonical form (canonical.py) and checked against its config,
then its tensors get the names of the other layout, in one fixed order: how the input was stored does not matter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint.added_tokens import listed_tokens, without_stale_list
from ..checkpoint.chat_template import chat_template, choose, example
from ..checkpoint.checkpoint import Checkpoint, CheckpointSource, Origin, Step, main_dtype, opened
from ..checkpoint.config import decoder_of, expected_shapes, repair_generation_config
from ..checkpoint.hf_config import (
    KEPT_BACK,
    PROJECTOR_STATED,
    REPOSITORY,
    STATED,
    Tokens,
    kept_config,
    left_out,
    llava_hf_config,
    own_names,
    pinpoints,
    select_layer,
)
from ..checkpoint.hf_tokenizer import original_tokenizer
from ..checkpoint.processor import VIDEO_PREPROCESSOR, processor_files, read_image_settings, stored_settings
from ..checkpoint.prompt import likely_prompt, own_template
from ..checkpoint.small_files import small_object
from ..checkpoint.tokenizer import SpecialIds, read_special_ids
from ..checkpoint.tower import VIDEO, check_tower, lost_tensors, tower_shapes
from ..errors import InputError, UsageError, one_of, whole_number
from ..families.files import PROCESSOR_FILES
from ..families.layouts import VOCABULARY_TABLES, canonical, spelled
from ..families.llama_cpp import QUANTISED
from ..families.originals import of_tokens
from ..families.projectors import (
    LINEAR_NAMES,
    NORM,
    PROJECTOR_ACTIVATION,
    PROJECTOR_FORMS,
    PROJECTOR_NAMES,
    STACK_OF_ONE,
    STACK_OF_ONE_TYPE,
    projector_type,
)
from ..families.prompts import CONVERSATIONS
from ..families.targets import VOCABULARY_MULTIPLE
from ..storage.strict_json import json_bytes
from ..tensors.dtypes import TORCH_DTYPE, to_dtype
from ..tensors.resize import resized
from ..text import is_text, shown
from .canonical import BIASES, Canonical, Model, to_canonical
from .gguf import gguf_checkpoint
from .lora import with_own_adapters
from .projector import paired, single

TO_LAYOUTS = ("llava-hf", "llava", "gguf")
ADAPTER_LAYOUTS = TO_LAYOUTS[:2]  # that an adapter can have the names of
# The options of llava-hf, with the values of those that have a few; those of the original layout.
CHOICES: dict[str, tuple[str, ...]] = {
    "projector_form": tuple(PROJECTOR_FORMS), "image_aspect": ("square", "pad"), "conv_mode": tuple(CONVERSATIONS),
    "image_token": (), "vocab_size": (), "lossy": (), "quantize": QUANTISED,
}  # fmt: skip
KIND = "mm_projector_type"
HUB_OPTIONS = set(CHOICES) - {"quantize"}
NOT_OF_GGUF = {"image_aspect", "lossy"}  # llama.cpp pads every image, and has no class that would lose tensors
ZERO_BIASES = "the projector has no biases, which LLaVA's code needs: zeros are written, which compute the same"
PADDED = (
    "images are padded to squares in the mean colour, as the original does it (`image_aspect_ratio` pad): by LlavaImageProcessor, which "
    "transformers has from 4.49 on, where older ones refuse the processor; `--image-aspect square` crops them instead, in every version"
)
CROPPED = (
    "images are cropped to squares, where the original pads them (`image_aspect_ratio` pad): pictures that are not square give other pixels"
)
UNGATED = (
    "`projector_hidden_act` is `{}`, which transformers computes; llama.cpp and MLX put a gelu into every projector and would compute "
    "wrong images"
)
NAMELESS = "nothing names the tower: LLaVA's code needs its config, pass `--vision-tower NAME`"


def convert(
    checkpoint: CheckpointSource,
    to: str,
    *,
    tower: CheckpointSource | None = None,
    dtype: str | None = None,
    projector_form: str | None = None,
    image_token: str | None = None,
    vocab_size: int | None = None,
    conv_mode: str | None = None,
    image_aspect: str | None = None,
    tower_name: str | None = None,
    accept_tower: bool = False,
    lossy: bool = False,
    quantize: str | None = None,
) -> Checkpoint:
    """`checkpoint` in the layout `to`: "llava-hf", as transformers reads it, "llava", as haotian-liu's code and SGLang do, or "gguf", as
    llama.cpp does. Nothing is written.

    `tower` is the vision tower of a checkpoint that holds none; with `accept_tower` it may be another published one than the config names.
    `dtype` is that of the output ("F16", "BF16", "F32"), by default that of each tensor. Only with "llava-hf": `projector_form` is how a
    projector of one layer becomes one of two, "identity" (exact in transformers, the default), "relu" (for vLLM) or "gelu" (for llama.cpp
    and MLX); `image_token` is the text of the image token; `vocab_size` is the number of rows of the vocabulary tables, the new ones being
    the mean of the old; `image_aspect` is "square" (cropped) or "pad", how an image becomes a square, by default as in the checkpoint;
    `lossy` leaves out tensors that the class has no place for, and the step says which. Only with "llava": `tower_name` is the tower that
    the config names then. `conv_mode` is LLaVA's name of the prompt that the model was trained with, such as "llava_v1": the chat template
    of llava-hf and GGUF writes it, and config.json records it. Only with "gguf": `quantize` is "Q8_0" or "Q4_0", the dtype of the text
    model's matrices; a projector of one layer gets the form "gelu", the only one that llama.cpp computes right.

    Raises UsageError for a value that an option can't have and for an option that changes nothing of this checkpoint, InputError for
    tensors that are unknown or missing, or that would be lost without `lossy`, for shapes that contradict the config and for an image token
    without a row, MismatchError where `tower` is another published one than the config names, HubError where the Hub can't serve an input.
    """
    hub = {
        "projector_form": projector_form,
        "image_token": image_token,
        "vocab_size": vocab_size,
        "conv_mode": conv_mode,
        "image_aspect": image_aspect,
        "lossy": lossy or None,
    }
    given = {key: value for key, value in hub.items() if value is not None}
    dtype = check_conversion(to, dtype=dtype, **given, tower_name=tower_name, quantize=quantize)
    model, clip = opened(checkpoint, "checkpoint", unmerged=True), opened(tower, "tower") if tower is not None else None
    model, clip = with_own_adapters(model, clip)
    if to == "gguf":
        return to_gguf(model, tower=clip, dtype=dtype, quantize=quantize, accept_tower=accept_tower, **given)  # type: ignore[arg-type]
    if to == "llava-hf":
        return to_llava_hf(model, tower=clip, dtype=dtype, accept_tower=accept_tower, **given)  # type: ignore[arg-type]
    return to_llava(model, tower=clip, tower_name=tower_name, conv_mode=conv_mode, dtype=dtype, accept_tower=accept_tower)


def check_conversion(to: str, *, dtype: str | None = None, **given: Any) -> str | None:
    """`dtype` as safetensors spells it. Raises UsageError where `convert` could not take these options, without a look at a checkpoint."""
    one_of("layout", to, TO_LAYOUTS)
    own = {"llava-hf": HUB_OPTIONS, "llava": {"tower_name", "conv_mode"}, "gguf": {*HUB_OPTIONS, "quantize"} - NOT_OF_GGUF}[to]
    given = {key: value for key, value in given.items() if value is not None}
    if foreign := sorted(given.keys() - own):
        names = ", ".join(f"`--{key.replace('_', '-')}`" for key in foreign)
        raise UsageError(f"a conversion to `{to}` takes no {names}", hint="leave it out")
    for key, value in given.items():
        if choices := CHOICES.get(key):
            one_of(key.replace("_", " "), value, choices)
        elif key == "vocab_size":
            whole_number("vocab_size", value)
        elif key == "lossy":
            if value is not True:
                raise UsageError(f"`lossy` is {shown(str(value))}, not true or false", hint="give True, or leave it out")
        elif not isinstance(value, str) or not value or not is_text(value):
            raise UsageError(f"`{key}` must be a text that is not empty", facts={"given": repr(value)}, hint="give it, or leave it out")
    return to_dtype(dtype)


def to_llava_hf(
    checkpoint: Checkpoint,
    *,
    tower: Checkpoint | None = None,
    projector_form: str | None = None,
    image_token: str | None = None,
    vocab_size: int | None = None,
    conv_mode: str | None = None,
    image_aspect: str | None = None,
    dtype: str | None = None,
    accept_tower: bool = False,
    lossy: bool = False,
    gated: bool = False,
) -> Checkpoint:
    """`checkpoint`, in the original layout or any key style of llava-hf, as the Hub's llava-hf checkpoints are.

    `tower` serves where the checkpoint has no vision tower of its own. New vocabulary rows hold the mean of the old ones. A projector
    that is a single Linear becomes two by `projector_form`, "identity" by default. With `lossy`, tensors without a place are left out.
    `gated`: it is for a reader that puts a gelu between the layers of every projector, so that a single Linear, in whichever form it is
    stored, gets the form "gelu".

    Raises InputError for unknown or missing tensors, for those without a place unless `lossy`, shapes that contradict the config, an image
    token without a row, MismatchError for a published tower that is not the published one that the config names, unless `accept_tower`,
    UsageError for an option that can change nothing of this checkpoint.
    """
    model = to_canonical(checkpoint, tower, image_token, dtype, accept_tower=accept_tower)
    tiles = pinpoints(model.config, model.tower.image_size) if model.target.tiles else None
    tensors, activation, form = _two_layers(model, projector_form, gated=gated)
    tensors, loss = _without_lost(checkpoint, model, tensors, lossy)
    notes = list(model.tower.notes)
    if tiles and checkpoint.layout == "llava" and not gated:
        notes.append("image_grid_pinpoints: each pair swapped, since the original reads (width, height) and transformers (height, width)")
    elif not tiles and tensors.pop("newline", None) is not None:
        notes.append("`image_newline` is dropped: images are not cut into tiles, so nothing reads it")
    bare = model.bare and not form
    tensors = {name: tensor for name, tensor in tensors.items() if not (bare and name in BIASES)}
    rows = _rows(checkpoint, model, vocab_size)
    tensors |= {name: resized(tensors[name], rows) for name in VOCABULARY_TABLES if name in tensors}
    others = {key: model.tokenizer.others[token] for key, token in model.target.tokens.items()}
    tokens = Tokens(model.tokenizer.image_id, model.tokenizer.bos, model.tokenizer.eos, model.tokenizer.pad, rows, others)
    config = llava_hf_config(
        model.config, target=model.target, tower=model.tower, tokens=tokens, activation=activation, dtype=main_dtype(tensors), tiles=tiles
    )
    changed: tuple[str, ...] = ()
    if checkpoint.layout == "llava-hf":
        config, changed = kept_config(checkpoint.config, config)
        config.pop("unpadded_vocab_size", None)
    else:
        config |= {key: model.config[key] for key in KEPT_BACK if key in model.config} | own_names(model.config)
        if model.config.get(KIND) == STACK_OF_ONE_TYPE:
            config[KIND] = STACK_OF_ONE_TYPE  # whose single Linear has other names in the original
        config = dict(sorted(config.items()))
    if bare:
        config["multimodal_projector_bias"] = False
    if unpadded := _unpadded(checkpoint, model, rows):
        config = dict(sorted({**config, "unpadded_vocab_size": unpadded}.items()))
    prompt = _prompt(checkpoint, model, conv_mode)
    files = dict(model.tokenizer.files) | _generation(
        checkpoint, tokens, config["text_config"], listed_tokens(model.tokenizer.files).get(prompt.stop)
    )
    names = tuple(spelled(name, model.target.hub_spelling) for name in tensors)
    retold = _retold(prompt.name, config, names, model.tokenizer.specials)
    if prompt.name and not prompt.doubts and (conv_mode or not retold):
        config = dict(sorted({**config, "conv_mode": prompt.name}.items()))
    aspect, squares = _aspect(checkpoint, model, image_aspect)
    squares = () if gated else squares  # that reader has a way of its own
    files |= _processor(checkpoint, model, config, aspect, prompt.template)
    step = Step(
        "convert",
        _inputs(checkpoint, model),
        _given(
            to="llava-hf",
            projector_form=form,
            dtype=dtype,
            conv_mode=prompt.name,
            image_token=image_token,
            image_aspect=image_aspect,
            lossy=lossy,
        ),
        _given(convert=f"{_layout_of(checkpoint)} to llava-hf", **_summary(model, rows), prompt=prompt.evidence),
        repairs=(*model.repairs, *changed, *model.tokenizer.notes),
        notes=(
            *_first_notes(checkpoint),
            *_left_out(checkpoint),
            *notes,
            *squares,
            *model.doubts.notes,
            *_remarks(model),
            *(() if retold else prompt.doubts),
        ),
        warnings=(*loss, *model.doubts.warnings, *prompt.warnings, *(prompt.doubts if retold else ())),
        cautions=_ungated(tensors, activation, form),
        checks=_given(prompt_text=prompt.example, stop=prompt.stop, prompt_doubt=" ".join(prompt.doubts), projector_form=form),
    )
    return _assembled(checkpoint, model, tensors, "llava-hf", config, files, step)


def _ungated(tensors: Canonical, activation: str, form: str) -> tuple[str, ...]:
    """What becomes of images in programs that read no `projector_hidden_act`. `form` is that of a single Linear, empty for two layers. In
    the form "relu" it is the same matrices as in the form "gelu"."""
    if activation == PROJECTOR_ACTIVATION or (activation == "relu" and (form or single(tensors, activation))):
        return ()
    return (UNGATED.format(activation) + ("; `--projector-form gelu` is for them" if form else ""),)


def to_gguf(
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    projector_form: str | None = None,
    **options: Any,
) -> Checkpoint:
    """`checkpoint` as llama.cpp's two files. `options` and errors are those of `to_llava_hf` and `gguf_checkpoint`; a single Linear gets
    the form "gelu", and any other is refused."""
    if projector_form not in (None, "gelu"):
        what = f"llama.cpp puts a gelu between the layers of every projector, which is not the form `{projector_form}`"
        raise UsageError(what, hint="leave out `--projector-form`: a single Linear gets the form `gelu`")
    hub = to_llava_hf(checkpoint, projector_form=projector_form, gated=True, **options)
    return gguf_checkpoint(hub, dtype=dtype, quantize=quantize)


def to_llava(
    checkpoint: Checkpoint,
    *,
    tower: Checkpoint | None = None,
    tower_name: str | None = None,
    conv_mode: str | None = None,
    dtype: str | None = None,
    accept_tower: bool = False,
) -> Checkpoint:
    """`checkpoint` (llava-hf in any key style, or already original) in the original layout, as haotian-liu's code and SGLang read it.

    The linear projector of v0 and v1 is recovered from any of its three forms, padded vocabulary rows are dropped. The config then names
    the tower `tower_name`, `tower` serves where the checkpoint has no vision tower of its own. Raises as `to_llava_hf`.
    """
    model = to_canonical(checkpoint, tower, None, dtype, accept_tower=accept_tower)
    _check_way_back(checkpoint, model)
    place = _folder_of(model, tower) if tower and not tower_name else None
    tower_name = tower_name or place
    doubts = check_tower(checkpoint, model.tower, name=tower_name, accept=accept_tower) if tower_name else model.doubts
    doubts = replace(doubts, notes=tuple(dict.fromkeys((*model.doubts.notes, *doubts.notes)))) if place else doubts
    tensors = dict(model.tensors)
    if PROJECTOR_NAMES[0] in tensors and (one := single(tensors, model.activation)) is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in PROJECTOR_NAMES} | dict(
            zip(LINEAR_NAMES, one, strict=True)
        )
    if LINEAR_NAMES[0] in tensors and STACK_OF_ONE_TYPE in (model.config.get(KIND), checkpoint.config.get(KIND)):
        stack = dict(zip(LINEAR_NAMES, STACK_OF_ONE, strict=True))
        tensors = {stack.get(name, name): tensor for name, tensor in tensors.items()}
    projector = projector_type(tensors)
    small, _ = without_stale_list(checkpoint.files)
    others = model.target.tokens.values()
    files, rows, notes = original_tokenizer(small, rows=model.rows, image_id=model.tokenizer.image_id, others=others)
    notes = (*notes, *([ZERO_BIASES] if model.bare else ()))
    rows = _unpadded(checkpoint, model, model.rows) or rows
    tensors |= {name: resized(tensors[name], rows) for name in VOCABULARY_TABLES if name in tensors}
    files = {name: data for name, data in files.items() if name not in PROCESSOR_FILES}
    config = _back_config(model, tower_name, projector, rows, main_dtype(tensors), pad=read_special_ids(files, rows).pad)
    if recorded := conv_mode or checkpoint.config.get("conv_mode"):
        config = dict(sorted({**config, "conv_mode": recorded}.items()))
    pad = config["pad_token_id"]
    files |= _generation(checkpoint, Tokens(model.tokenizer.image_id, model.tokenizer.bos, model.tokenizer.eos, pad, rows), config)
    named = config.get(model.target.tower_key)
    step = Step(
        "convert",
        _inputs(checkpoint, model),
        _given(to="llava", dtype=dtype, tower_name=tower_name, conv_mode=conv_mode),
        _given(convert=f"{_layout_of(checkpoint)} to llava", projector=projector, **_summary(model, rows)),
        repairs=model.repairs,
        notes=(*_first_notes(checkpoint), *_left_out(checkpoint), *model.tower.notes, *notes, *_named(model, named, place), *doubts.notes),
        warnings=(*doubts.warnings, *(() if named else (NAMELESS,)), *_other_layer(model, config)),
    )
    return _assembled(checkpoint, model, tensors, "llava", config, files, step)


def _without_lost(checkpoint: Checkpoint, model: Model, tensors: Canonical, lossy: bool) -> tuple[Canonical, tuple[str, ...]]:
    """`tensors` without those that the class has no place for, and a sentence on them.

    Raises InputError where there are some, unless `lossy`, UsageError for `lossy` where there are none."""
    video = model.target.video
    lost = lost_tensors(checkpoint.parameters(), video.lost) if video and checkpoint.layout != "llava-hf" else []
    if not lost or video is None:
        if lossy:
            raise UsageError("nothing of this model would be lost, so `--lossy` can change nothing", hint="leave it out")
        return tensors, ()
    if not lossy:
        what = f"{model.target.architecture} has no place for {len(lost):,} tensors of `{checkpoint.origin.name}`"
        facts = {"lost": video.lost_names, "what that means": video.loss}
        raise InputError(what, facts=facts, hint="pass `--lossy` to convert it without them")
    kept = {name: tensor for name, tensor in tensors.items() if not re.fullmatch(video.lost, name)}
    text = f"{len(lost):,} tensors are lost, for which {model.target.architecture} has no place (`{video.lost_names}`): {video.loss}"
    return kept, (text,)


def _check_way_back(checkpoint: Checkpoint, model: Model) -> None:
    """Raise InputError for a llava-hf model whose original has tensors that no llava-hf one holds."""
    video = model.target.video
    if checkpoint.layout == "llava-hf" and video and video.lost:
        what = f"`{checkpoint.origin.name}` can't go back to the original layout, whose tower for videos has tensors that it does not hold"
        facts = {"missing": video.lost_names, "model_type": model.target.model_type}
        raise InputError(what, facts=facts, hint="take the original checkpoint; `--to llava-hf` renames this one")


def _two_layers(model: Model, form: str | None, *, gated: bool) -> tuple[Canonical, str, str]:
    """The tensors with a projector of two layers, its activation, and the form that was chosen for a single Linear.

    Raises UsageError for a form where the projector has two layers of its own."""
    tensors = dict(model.tensors)
    if LINEAR_NAMES[0] not in tensors and form is None and not gated:
        return tensors, model.activation, ""
    if LINEAR_NAMES[0] in tensors:
        weight, bias = (tensors.pop(name) for name in LINEAR_NAMES)
    elif (one := single(tensors, model.activation)) is not None:
        weight, bias = one
    elif form is None:
        return tensors, model.activation, ""
    else:
        raise UsageError("the projector has two layers of its own, so `--projector-form` can change nothing", hint="leave it out")
    form = form or ("gelu" if gated else "identity")
    return {**tensors, **paired(weight, bias, form)}, PROJECTOR_FORMS[form], form


def _rows(checkpoint: Checkpoint, model: Model, wanted: int | None) -> int:
    """How many rows the tables get: a few more, rounded up to 64, where tokens are new, as transformers' converters do it."""
    used, rows = model.tokenizer.used, model.rows
    if wanted is not None:
        if wanted < used:
            raise InputError(
                f"`--vocab-size {wanted}` is too small: the tokenizer's highest id is {used - 1}", hint="pass a larger one, or leave it out"
            )
        return wanted
    if not model.tokenizer.grew or (used <= rows and (checkpoint.layout == "llava-hf" or not model.target.pads)):
        return max(rows, used)
    return -(-max(rows + model.target.new_rows, used) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _unpadded(checkpoint: Checkpoint, model: Model, rows: int) -> int | None:
    """The rows of the original's tables, where its tokenizer does not tell them once there are `rows`. A llava-hf config records them for
    the way back."""
    if checkpoint.layout == "llava-hf":
        recorded = checkpoint.config.get("unpadded_vocab_size")
        return recorded if type(recorded) is int and 0 < recorded <= model.rows else None
    others = model.target.tokens.values()
    told = original_tokenizer(model.tokenizer.files, rows=rows, image_id=model.tokenizer.image_id, others=others)[1]
    return model.rows if told != model.rows else None


@dataclass(frozen=True)
class Prompt:
    """The chat template, where its text comes from, and what the card shows of it."""

    name: str
    template: str
    evidence: str
    example: str = ""
    stop: str = ""
    warnings: tuple[str, ...] = ()  # of the family that it is
    doubts: tuple[str, ...] = ()  # what else was possible


def _prompt(checkpoint: Checkpoint, model: Model, conv_mode: str | None) -> Prompt:
    if checkpoint.layout == "llava-hf" and conv_mode is None and (kept := own_template(checkpoint.files)):
        return Prompt("", kept, "its own chat template")
    config = {**model.config, "conv_mode": checkpoint.config.get("conv_mode")}
    choice = choose(config, model.tokenizer.specials, model.families, name=conv_mode)
    conversation = choice.conversation
    token = model.tokenizer.image_token
    image = f"<im_start>{token}<im_end>" if model.config.get("mm_use_im_start_end") else token
    video = model.target.video.token if model.target.video else ""
    template = chat_template(conversation, image, video)
    family = of_tokens(model.families, model.tokenizer.specials)
    warnings = (family.warning,) if family and family.warning else ()
    doubts = (f"{choice.doubt}: `--conv-mode` settles it",) if choice.rivals else ()
    return Prompt(conversation.name, template, str(choice), example(conversation, image), conversation.stop, warnings, doubts)


def _retold(name: str, config: Mapping[str, Any], names: tuple[str, ...], specials: Collection[str]) -> bool:
    """Whether a llava-hf checkpoint of this config says by itself, for certain, that its prompt is `name`."""
    choice = likely_prompt("llava-hf", {key: value for key, value in config.items() if key != "conv_mode"}, names, specials)
    return choice is not None and (choice.conversation.name, choice.rivals) == (name, ())


def _aspect(checkpoint: Checkpoint, model: Model, wished: str | None) -> tuple[str, tuple[str, ...]]:
    """How images become squares: as the option says, else as they do in the checkpoint; and a sentence on it where the original pads.

    Raises UsageError for an option that can change nothing."""
    if model.target.tiles:
        if wished is not None:
            raise UsageError("images of this model are cut into tiles, so `--image-aspect` can change nothing", hint="leave it out")
        return "square", ()
    if wished == "pad" and not model.target.padding_processor:
        what = f"{model.target.processor} takes no padded images, so `--image-aspect pad` can't be written"
        raise UsageError(what, hint="leave it out: images are cropped to squares")
    if checkpoint.layout == "llava-hf":
        own = _image_processor(checkpoint)
        if not model.target.padding_processor:
            return "square", ()
        pads = own.get("do_pad") is True and str(own.get("image_processor_type")).startswith(model.target.padding_processor)
        return wished or ("pad" if pads else "square"), ()
    if not model.target.padding_processor:
        return "square", (CROPPED,) if model.config.get("image_aspect_ratio") == "pad" else ()
    if model.config.get("image_aspect_ratio") != "pad":
        return wished or "square", ()
    return (wished, (CROPPED,)) if wished == "square" else ("pad", (PADDED,))


def _image_processor(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return stored_settings(*(small_object(checkpoint.files, name) for name in ("preprocessor_config.json", "processor_config.json")))


def _processor(checkpoint: Checkpoint, model: Model, config: Mapping[str, Any], aspect: str, template: str) -> dict[str, bytes]:
    tower, own = model.tower, _image_processor(checkpoint)
    settings = read_image_settings(tower.preprocessor or own, tower=tower.row, size=tower.image_size, patch=tower.patch_size)
    made = processor_files(
        settings,
        target=model.target,
        image_token=model.tokenizer.image_token,
        select_strategy=config.get("vision_feature_select_strategy", model.target.defaults["vision_feature_select_strategy"]),
        aspect=aspect,
        pads=model.config.get("image_aspect_ratio") == "pad",
        pinpoints=config.get("image_grid_pinpoints"),
        template=template,
        vision_aspect_ratio=config.get("vision_aspect_ratio"),
    )
    kept = {VIDEO_PREPROCESSOR} if checkpoint.layout == "llava-hf" and VIDEO_PREPROCESSOR in checkpoint.files else set()
    return {name: data for name, data in made.items() if name not in kept}


def _summary(model: Model, rows: int) -> dict[str, str]:
    source = f"`{model.tower.origin.name}`" if model.tower.origin else "the checkpoint itself"
    grown = f"{model.rows} to {rows} rows" + ("; each new one is the mean of the old ones" if rows > model.rows else "")
    return {
        "tower": f"{model.tower.kind}, {len(model.tower.tensors)} tensors from {source}",
        "vocabulary": f"{rows} rows as before" if rows == model.rows else grown,
    }


def _ordered(tensors: Canonical, model: Model) -> Iterator[str]:
    """The same order for every input: decoder, head, tower, projector."""
    text = expected_shapes({**model.config, "vocab_size": model.rows, "tie_word_embeddings": model.tied})
    order = [
        *map(canonical, text),
        *(f"tower.{name}" for name in tower_shapes(model.tower.config)),
        *(f"{VIDEO}{name}" for name in tower_shapes(model.tower.config)),
        *sorted(name for name in tensors if model.target.video and re.fullmatch(model.target.video.lost, name)),
        *LINEAR_NAMES,
        *NORM,
        *PROJECTOR_NAMES,
        "newline",
    ]
    return (name for name in order if name in tensors)


def _other_layer(model: Model, config: Mapping[str, Any]) -> Iterator[str]:
    """A warning where LLaVA's code takes another hidden state of the tower than the llava-hf config says. Raises InputError where it takes
    another number of them, so that the projector does not fit."""
    layer, count = model.config.get(STATED[0]), model.tower.config["num_hidden_layers"]
    if model.tower.row.select and model.tower.whole_layers is None and layer in (-1, -2):
        return  # nobody knows how many layers this tower has elsewhere: one more than here, or as many
    own = select_layer(config, model.tower, model.target)
    layers, wanted = (
        [number % (count + 1) for number in (x if isinstance(x, list) else [x])] for x in (own if layer is None else layer, own)
    )
    if len(layers) != len(wanted):
        what = (
            f"`vision_feature_layer` is {layer} in config.json, and LLaVA's own code takes {own}: the original layout can't hold this model"
        )
        raise InputError(what, hint="keep it as llava-hf, which `--to llava-hf` renames")
    if layers != wanted:
        yield f"`vision_feature_layer` is {layer} in config.json, LLaVA's own code takes {own} of this tower: it computes something else"


def _folder_of(model: Model, tower: Checkpoint) -> str | None:
    """Where LLaVA's code finds the config of the tower that was given: its repository, else the absolute path of its folder. None where the
    model's own config names a repository, which every machine finds, or what only that code knows."""
    named = str(model.config.get(model.target.tower_key))
    if re.fullmatch(REPOSITORY, named) or named in {usual for _, usual in model.target.words.values()}:
        return None
    place = tower.origin.place
    return tower.origin.name if tower.origin.revision or tower.origin.remote else str(place if place.is_dir() else place.parent)


def _named(model: Model, named: object, place: str | None) -> Iterator[str]:
    """A sentence on what LLaVA's code takes from the tower that the config names."""
    if named:
        given = ", the folder given, which another machine does not have" if place and os.path.isabs(place) else ""
        key = model.target.tower_key
        yield f"`{key}` is {shown(str(named))}{given}: LLaVA's code takes the tower's config from there, its values from here"


def _back_config(model: Model, name: str | None, projector: str, rows: int, dtype: str, *, pad: int | None) -> dict[str, Any]:
    """The original's config with the values that changed; a tower that it named keeps its name."""
    config = {key: value for key, value in model.config.items() if key not in (*STATED, *PROJECTOR_STATED)}
    key = model.target.tower_key
    config |= {"mm_projector_type": projector, key: name or config.get(key), "unfreeze_mm_vision_tower": True, "vocab_size": rows}
    config |= {"tie_word_embeddings": model.tied, "torch_dtype": TORCH_DTYPE[dtype]}
    if pad is not None or config["pad_token_id"] >= rows:
        config["pad_token_id"] = pad or 0
    return dict(sorted(config.items()))


def _generation(checkpoint: Checkpoint, tokens: Tokens, text: Mapping[str, Any], stop: int | None = None) -> dict[str, bytes]:
    """generation_config.json for a decoder whose config is `text`. An answer ends with the token `stop` too."""
    ids, name = SpecialIds(tokens.bos, tokens.eos, tokens.pad, 0, {}, 0), "generation_config.json"
    made = repair_generation_config(small_object(checkpoint.files, name), ids, config=text)[0]
    ends = made["eos_token_id"] if isinstance(made.get("eos_token_id"), list) else [made.get("eos_token_id", tokens.eos)]
    if stop is not None and stop not in ends:
        made["eos_token_id"] = [*ends, stop]
    return {name: json_bytes(made)}


def _inputs(checkpoint: Checkpoint, model: Model) -> tuple[tuple[str, Origin], ...]:
    given = (("tower", model.tower.origin),) if model.tower.origin else ()
    return given if checkpoint.history else (("source", checkpoint.origin), *given)


def _remarks(model: Model) -> Iterator[str]:
    """What users of this decoder should know."""
    decoder = decoder_of(model.config)
    if decoder.remark:
        yield decoder.remark
    for key, plain in decoder.head.items():
        if (value := model.config.get(key, plain)) != plain:
            yield f"`{key}` {value} changes what the head gives, and a LLaVA of transformers 4.52 and later leaves it out: the order stays"


def _left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    return left_out(checkpoint.config) if checkpoint.layout == "llava-hf" else ()


def _first_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    return () if checkpoint.history else checkpoint.notes


def _layout_of(checkpoint: Checkpoint) -> str:
    return "xtuner's folders" if checkpoint.folders else checkpoint.layout


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value}


def _assembled(
    checkpoint: Checkpoint, model: Model, tensors: Canonical, layout: str, config: dict[str, Any], files: Mapping[str, Any], step: Step
) -> Checkpoint:
    spelling = model.target.spelling if layout == "llava" else model.target.hub_spelling
    tensors = {spelled(name, spelling): tensors[name] for name in _ordered(tensors, model)}
    assert len(tensors) == len(tensors)
    return Checkpoint(tensors, config, checkpoint.origin, files, (*checkpoint.history, step))
