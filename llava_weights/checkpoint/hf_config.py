"""config.json of the llava-hf layout from the original's, and back. Every key is written, since readers have other defaults:
mlx-vlm takes rms_norm_eps 1e-6 where it is missing, candle needs pad_token_id. Configs of the original layout are repaired first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..families.decoders import CARRIED, DECODER_BY_TYPE, SIZE_KEYS, Decoder
from ..families.shapes import length
from ..families.targets import DEFAULT_PARTS, STRATEGIES, Target
from ..families.targets import TARGET_BY_TYPE as TARGETS
from ..families.towers import HUB_TOWERS
from ..tensors.dtypes import TORCH_DTYPE
from ..text import listed, shown, unquoted
from .config import REFUSED, decoder_of, known_decoder
from .images import read_pinpoints
from .rope import plain_rope
from .small_files import RIGHT_CONFIG
from .tower import VisionTower

# What a llava-hf config says of the features of its tower, and the original's can't say in full: it stands beside the words of the latter.
STATED = ("vision_feature_layer", "vision_feature_select_strategy", "projector_layernorm_eps")
# And of its projector, for which the original's code leaves no choice.
PROJECTOR_STATED = ("projector_hidden_act", "multimodal_projector_bias")

REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"  # a name on the Hub, no path
# Keys of the original alone that its code reads: a llava-hf config keeps them for the way back.
KEPT_BACK = ("image_crop_resolution", "image_split_resolution", "tokenizer_model_max_length", "tokenizer_padding_side")
# What a family of its own names calls itself in the original layout, where LLaVA's code on that decoder says something else.
OWN_NAMES = {"original_model_type": "model_type", "original_architectures": "architectures"}
USUAL_LAYER = -2  # `mm_vision_select_layer` of every published one, also where the code takes several


@dataclass(frozen=True)
class Tokens:
    """The ids that a config names, and the row count of the vocabulary tables."""

    image: int
    bos: int
    eos: int
    pad: int
    rows: int
    others: Mapping[str, int] = field(default_factory=dict)  # of a video, by the key that names it


def pinpoints(config: Mapping[str, Any], size: int) -> list[list[int]]:
    """`image_grid_pinpoints` with each pair swapped: (width, height) in the original, (height, width) in transformers.

    Without the swap, transformers would choose another grid where two fit an image equally well, and so other image tokens and logits.
    Raises InputError where they are not pairs of multiples of `size`, in pixels.
    """
    found = read_pinpoints(config.get("image_grid_pinpoints"), size)
    pairs = isinstance(found, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in found)
    if not found or not pairs or not all(type(side) is int and 0 < side <= 1 << 16 and side % size == 0 for pair in found for side in pair):
        facts = {"image_grid_pinpoints": str(config.get("image_grid_pinpoints"))[:200], "image size": size}
        raise InputError(
            "`image_grid_pinpoints` is not a list of (width, height) in multiples of the tower's image size", facts=facts, hint=RIGHT_CONFIG
        )
    return [[height, width] for width, height in found]


def llava_hf_config(
    config: Mapping[str, Any],
    *,
    target: Target,
    tower: VisionTower,
    tokens: Tokens,
    activation: str,
    dtype: str,
    tiles: Sequence[Sequence[int]] | None,
) -> dict[str, Any]:
    """The config of the llava-hf layout for the class `target`; `tiles` are its grid pinpoints in transformers' order."""
    name = TORCH_DTYPE[dtype]
    select = tower.row.select
    told = config.get("vision_feature_select_strategy")  # of a llava-hf config: its word stands
    strategy = told or (select[1] if select else STRATEGIES.get(str(config.get("mm_vision_select_feature", "patch"))))
    if strategy is None:
        what = f"`mm_vision_select_feature` is {shown(str(config['mm_vision_select_feature']))} in config.json, not patch or cls_patch"
        raise InputError(what, hint=RIGHT_CONFIG)
    vision = dict(tower.config)
    if isinstance(given := config.get(target.tower_key), str) and re.fullmatch(REPOSITORY, given):
        vision["_name_or_path"] = given  # `original_config` writes it back as `mm_vision_tower`
    made: dict[str, Any] = {
        "architectures": [target.architecture],
        "dtype": name,
        "ignore_index": -100,
        "image_seq_length": tower.patches + (tower.class_token and strategy == "full"),
        "image_token_index": tokens.image,  # the only name for it before 4.52
        "model_type": target.model_type,
        "multimodal_projector_bias": True,
        "pad_token_id": tokens.pad,
        "projector_hidden_act": activation,
        "text_config": text_config(config, tokens=tokens, dtype=dtype),
        "tie_word_embeddings": config["tie_word_embeddings"],
        "torch_dtype": name,
        "vision_config": dict(sorted(vision.items())),
        "vision_feature_layer": select_layer(config, tower, target),
        "vision_feature_select_strategy": strategy,
        "vocab_size": tokens.rows,
    }
    if tiles:
        made |= {"image_grid_pinpoints": [list(pair) for pair in tiles], "use_image_newline_parameter": True}
    made |= {**tokens.others, **target.fixed}
    if target.video and target.video.features:
        made["video_seq_length"] = length(target.video.features, {"patches": tower.patches})
    for word, (key, usual) in target.words.items():
        if word in config and (key != word or config[word] != usual):  # a key of the original's own is kept for the way back
            made[key] = config[word]
    if target.layernorm:
        made["projector_layernorm_eps"] = config.get("projector_layernorm_eps", target.defaults["projector_layernorm_eps"])
        made["vision_feature_layers"] = made["vision_feature_layer"]  # its name before transformers 5
    if target.capped:
        made["vision_aspect_ratio"] = config["image_aspect_ratio"]
    return {key: value for key, value in sorted(made.items()) if key not in target.lacks}


def select_layer(config: Mapping[str, Any], tower: VisionTower, target: Target) -> Any:
    """Which hidden state of the tower is taken, or a list of several: what a llava-hf config says; else of an original what the row of its
    target says, or that of its tower, for which the layers that the checkpoint leaves away are counted, else what its config does.

    Of a tower of unknown widths nobody knows whether layers were left away: LLaVA-NeXT's code stores them without the last.
    """
    if "vision_feature_layer" in config:
        return config["vision_feature_layer"]
    if target.layers:
        count = int(tower.config["num_hidden_layers"])
        if not all(-count - 1 <= number <= count for number in target.layers):
            what = f"the vision tower has {count} layers, too few for a {target.model_type}, which takes {listed(map(str, target.layers))}"
            raise InputError(what, hint="give the tower that it was trained with")
        return list(target.layers)
    if tower.row.select:
        count = int(tower.config["num_hidden_layers"])
        whole = tower.whole_layers or count + 1
        if (layer := whole - count + tower.row.select[0]) >= 0:
            what = f"the vision tower has {count} layers, LLaVA's code takes what layer {whole + 1 + tower.row.select[0]} of {whole} gives"
            raise InputError(what, hint="give a checkpoint whose vision tower is whole")
        return layer
    layer, count = config.get("mm_vision_select_layer", -2), int(tower.config["num_hidden_layers"])
    if type(layer) is not int or not -count - 1 <= layer <= count:
        what = f"`mm_vision_select_layer` is {shown(str(layer))} in config.json, the tower has {count} layers"
        raise InputError(what, hint=RIGHT_CONFIG)
    return layer


def text_config(config: Mapping[str, Any], *, tokens: Tokens, dtype: str) -> dict[str, Any]:
    """The `text_config`, from a flat config, with every key that any reader asks for."""
    decoder = decoder_of(config)
    made = {key: config.get(key, default) for key, default in decoder.defaults.items()}
    made |= {key: config[key] for key in SIZE_KEYS if key in decoder.defaults} | {key: config[key] for key in CARRIED if key in config}
    made |= {
        "architectures": [decoder.architecture],
        "bos_token_id": tokens.bos,
        "dtype": TORCH_DTYPE[dtype],
        "eos_token_id": config["eos_token_id"] if isinstance(config.get("eos_token_id"), list) else tokens.eos,
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "model_type": decoder.model_type,
        "pad_token_id": tokens.pad,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "torch_dtype": TORCH_DTYPE[dtype],
        "vocab_size": tokens.rows,
    }
    return dict(sorted(made.items()))


# Of a llava-hf config's own keys, those that tensors, tokenizer and options tell: written anew where llava-hf is made of llava-hf.
TOLD = r"architectures|model_type|(torch_)?dtype|\w+_token_(index|id)|vocab_size|tie_word_embeddings|image_seq_length|projector_hidden_act"
# Those under names that are not written, and those that only transformers' own save needs.
RENAMED = r"(image|video)_token_id|rope_parameters|transformers_version"
SAID_ELSEWHERE = r"(torch_)?dtype|vocab_size|projector_hidden_act|tie_word_embeddings"  # by options, and with the rows of the tables
# What a text config may leave out and no tensor tells, without a change of what is computed.
HARMLESS = (
    r"\w+_token_id|\w+_dropout|\w+_pdrop|initializer_range|use_cache|pretraining_tp|output_router_logits|router_\w+|max_window_layers"
)


def kept_config(given: Mapping[str, Any], made: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`made`, the llava-hf config that follows from the llava-hf config `given`, with every value of the latter that is not to change.

    Also a sentence on the values that others replace: ids of tokens, and what tensors tell otherwise.
    """
    new = _merged(given, made, TOLD)
    replaced = list(_replaced("", given, new))
    for key, part in made.items():
        if isinstance(part, Mapping):
            inner = given[key] if isinstance(given.get(key), Mapping) else {}
            new[key] = _merged(inner, part, r".*")
            replaced += _replaced(f"{key}.", inner, new[key])
    return new, (f"config: {', '.join(replaced)}, by tokenizer and tensors",) if replaced else ()


def _merged(given: Mapping[str, Any], made: Mapping[str, Any], told: str) -> dict[str, Any]:
    """Both, the value of `made` for a key in both that `told` matches, else that of `given`."""
    own = _may_stay(given)
    return dict(sorted({**own, **made, **{key: value for key, value in own.items() if not re.fullmatch(told, key)}}.items()))


def _replaced(prefix: str, given: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for key, value in _may_stay(given).items():
        if value is not None and new[key] != value and not re.fullmatch(SAID_ELSEWHERE, key):
            before, after = (unquoted(json.dumps(each, ensure_ascii=False)) for each in (value, new[key]))
            yield f"`{prefix}{key}` {before} -> {after}"


def _may_stay(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not re.fullmatch(f"{REFUSED}|{RENAMED}", key, re.DOTALL)}


def left_out(config: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence on what the text config of a llava-hf config leaves out, and its class therefore takes; none where that is nothing."""
    text = flat_config(config)
    if (decoder := DECODER_BY_TYPE.get(str(text["model_type"]))) is None:
        return ()
    given = plain_rope(config["text_config"], decoder) if isinstance(config.get("text_config"), Mapping) else {}
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", *decoder.computed)
    missing = {
        key: value
        for key, value in decoder.defaults.items()
        if key not in given and value not in (None, False) and key not in sizes and not re.fullmatch(HARMLESS, key)
    }
    told = ", ".join(f"`{key}` {value}" for key, value in missing.items())
    return (f"`text_config` leaves out what {decoder.config_class} takes by default: {told}",) if missing else ()


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `text_config` of a llava-hf config as a flat one, by the keys that every version knows.

    transformers 5 writes `rope_parameters` where `rope_theta` and `rope_scaling` were; 4.x would take its own theta.
    """
    text = {**config["text_config"]} if isinstance(config.get("text_config"), Mapping) else {}
    text.setdefault("model_type", DEFAULT_PARTS["text_config"])
    decoder = DECODER_BY_TYPE.get(str(text["model_type"]))
    text = plain_rope(text, decoder)
    if decoder and "rms_norm_eps" in decoder.defaults:  # which transformers' own saved configs leave out
        text.setdefault("rms_norm_eps", decoder.defaults["rms_norm_eps"])
    return text


def _even_head(text: Mapping[str, Any]) -> int | None:
    """The width of a head that shares out the hidden size, None where the config does not tell it."""
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    return hidden // heads if type(hidden) is int and type(heads) is int and heads > 0 else None


def original_config(
    config: Mapping[str, Any], *, tower: VisionTower, tokens: Tokens, projector: str, name: str, dtype: str
) -> dict[str, Any]:
    """The flat config of the original layout from a llava-hf one: the keys that LLaVA's code and SGLang read.

    `name` is written as `mm_vision_tower`; the checkpoint holds the tower's tensors, and `unfreeze_mm_vision_tower` makes LLaVA's code
    keep them (LLaVA #902). `projector` is `mm_projector_type`.
    """
    text = flat_config(config)
    decoder = decoder_of(text)
    kept = {key: text.get(key, default) for key, default in decoder.defaults.items() if key in text or key not in SIZE_KEYS}
    kept |= {key: text[key] for key in CARRIED if key in text}
    if text.get("head_dim") and text["head_dim"] != _even_head(text):  # else every class works it out
        kept["head_dim"] = text["head_dim"]
    target = TARGETS[str(config["model_type"])]
    strategy = config.get("vision_feature_select_strategy", target.defaults["vision_feature_select_strategy"])
    feature = next((name for name, told in STRATEGIES.items() if told == strategy and tower.class_token), "patch")
    stated = config.get("vision_feature_layer", target.defaults["vision_feature_layer"])
    layer = USUAL_LAYER if isinstance(stated, list) else stated if tower.row.original_layer is None else tower.row.original_layer
    made: dict[str, Any] = {
        **kept,
        "architectures": [decoder.original_architectures[0]],
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": tower.hidden * (len(stated) if isinstance(stated, list) else 1),
        "mm_projector_type": projector,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": feature,
        "mm_vision_select_layer": layer,
        target.tower_key: name,
        "model_type": decoder.original_types[0],
        "pad_token_id": tokens.pad,
        "tie_word_embeddings": False,
        "torch_dtype": TORCH_DTYPE[dtype],
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
        "vocab_size": tokens.rows,
    }
    told = {word: config.get(key, usual) for word, (key, usual) in target.words.items()}
    made |= {word: value for word, value in told.items() if value is not None}
    if config.get("image_grid_pinpoints"):
        size = tower.image_size
        ratio = config.get("vision_aspect_ratio", target.defaults["vision_aspect_ratio"]) if target.capped else "anyres"
        made |= {"image_aspect_ratio": ratio, "image_grid_pinpoints": pinpoints(config, size)}
        made |= {"image_crop_resolution": size, "image_split_resolution": size, "mm_patch_merge_type": "spatial_unpad"}
    made |= {key: config[key] for key in KEPT_BACK if key in config} | _restored_names(config, kept, decoder)
    return dict(sorted(made.items()))


def own_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a llava-hf config keeps of the names that the original layout's `config` goes by, for the way back."""
    decoder = decoder_of(config)
    usual = {"model_type": decoder.original_types[0], "architectures": [decoder.original_architectures[0]]}
    return {key: config[word] for key, word in OWN_NAMES.items() if config.get(word, usual[word]) != usual[word]}


def _restored_names(config: Mapping[str, Any], text: Mapping[str, Any], decoder: Decoder) -> dict[str, Any]:
    """Those that `own_names` kept, where with the settings `text` they still name the same decoder."""
    found = {word: config[key] for key, word in OWN_NAMES.items() if key in config}
    return found if found and known_decoder({**text, **found}) is decoder else {}


def tower_name(config: Mapping[str, Any], tower: VisionTower) -> str | None:
    """The Hub id of the tower by the config, else by its shapes; None where neither is known."""
    vision = config.get("vision_config")
    recorded = vision.get("_name_or_path") if isinstance(vision, Mapping) else None
    return str(recorded) if recorded else HUB_TOWERS.get((tower.kind, tower.hidden, tower.image_size))
