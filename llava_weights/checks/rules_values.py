"""A table of rules: can the values in config.json, generation_config.json and preprocessor_config.json be right?

What contradicts the weights or another file, or what a program refuses, is `failed`. What is only unlike every published model of its kind
is a `warning`: somebody may have trained it so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..checkpoint.checkpoint import main_dtype
from ..checkpoint.config import GENERATION_SETTINGS as SAMPLING
from ..checkpoint.config import known_decoder, sensible
from ..checkpoint.processor import LARGEST_SETTING, stored_settings
from ..checkpoint.tokenizer import TOKENIZER_CONFIG
from ..checkpoint.tower import row_of
from ..families.decoders import ACTIVATIONS, EPS, LLAMA_SIZES, LONGEST_LLAMA, ROPE_TYPES
from ..families.quantised import PACKED_NAME, QUANTIZERS
from ..families.targets import TARGETS
from ..families.towers import KNOWN_TOWERS, TOWER_ACTIVATIONS, TOWERS, KnownTower, Pixels, Tower
from ..families.towers import TOWER_BY_TYPE as TOWERS_BY_TYPE
from ..storage.strict_json import JsonObject
from ..tensors.dtypes import TORCH_DTYPE
from ..tensors.lazy import FLOATS
from ..text import shown
from .rules import CONFIG, CORRECT, GENERATION_CONFIG, PREPROCESSOR, PROCESSOR, Rule, SmallFiles, as_json, vision

STEERING = (
    "bad_words_ids", "begin_suppress_tokens", "forced_bos_token_id", "forced_decoder_ids", "forced_eos_token_id", "sequence_bias",
    "suppress_tokens",
)  # fmt: skip
BY_HAND = "see that the file is the one that these weights were made with"


# --- config.json ----------------------------------------------------------------------------------------------------


def _text(s: SmallFiles) -> JsonObject:
    """The text model's part of any config."""
    return s.text if s.checkpoint.layout == "llava-hf" else dict(s.of(CONFIG))


def _nested(config: Mapping[str, Any]) -> Iterator[tuple[str, JsonObject]]:
    """(prefix, config) of a config and of the two inside it."""
    yield "", dict(config)
    for key in ("text_config", "vision_config"):
        if isinstance(inner := config.get(key), dict):
            yield f"{key}.", inner


def _quantizers(s: SmallFiles) -> Iterator[tuple[str, str]]:
    """(key, method) of every `quantization_config`, where all tensors are plain numbers of 16 bits or more."""
    names = s.checkpoint.tensors
    if any(t.dtype not in FLOATS or t.dtype.startswith("F8") for t in names.values()) or any(map(PACKED_NAME.fullmatch, names)):
        return
    for prefix, config in _nested(s.of(CONFIG)):
        if (found := config.get("quantization_config")) is not None:
            inner = found if isinstance(found, dict) else {}
            method = str(inner.get("quant_method") or "bitsandbytes") if inner else "of no known form"
            yield f"{prefix}quantization_config", method


def _quantized(s: SmallFiles) -> Iterator[str]:
    for key, method in _quantizers(s):
        if method in QUANTIZERS:
            kind = main_dtype(s.checkpoint.parameters())
            yield f"`{key}` says {shown(method)}, but every tensor is plain ({kind}): transformers refuses them or leaves layers random"


def _quantized_otherwise(s: SmallFiles) -> Iterator[str]:
    for key, method in _quantizers(s):
        if method not in QUANTIZERS:
            yield f"`{key}` says {shown(method)}, but every tensor is plain ({main_dtype(s.checkpoint.parameters())})"


def _rope(s: SmallFiles) -> Iterator[str]:
    """One rope in one config: transformers 4 reads `rope_theta` and `rope_scaling`, 5 reads `rope_parameters`."""
    if known_decoder(_text(s)) is None:
        return
    for prefix, config in _nested(s.of(CONFIG)):
        if prefix == "vision_config.":
            continue
        scaling, rope = config.get("rope_scaling"), config.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in config and rope.get("rope_theta", config["rope_theta"]) != config["rope_theta"]:
            yield (
                f"`{prefix}rope_theta` is {as_json(config['rope_theta'])}, but {as_json(rope['rope_theta'])} in `rope_parameters`: "
                "transformers 4 reads one, 5 the other"
            )
        for key, found in (("rope_scaling", scaling), ("rope_parameters", rope)):
            rope_type = found.get("rope_type", found.get("type", "default")) if isinstance(found, dict) else ""
            per_layer = isinstance(found, dict) and any(isinstance(value, dict) for value in found.values())
            if found is not None and rope_type not in ROPE_TYPES and not per_layer:
                yield f"`{prefix}{key}` is {as_json(found)}, which transformers does not know"


def _family_rope(s: SmallFiles) -> Iterator[str]:
    """LLaMA 1 and 2 have one theta; Code Llama has the same shapes and another, and 16,384 positions."""
    text = _text(s)
    sizes = tuple(text.get(key) for key in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    known = next((size for size in LLAMA_SIZES if (size.hidden, size.layers, size.intermediate) == sizes), None)
    if known is None or not 32000 <= s.rows < 32128:
        return
    if (heads := text.get("num_attention_heads")) not in (None, known.heads):
        yield f"`num_attention_heads` is {as_json(heads)}, a LLaMA of these sizes ({known.name}) has {known.heads}"
    positions, theta = text.get("max_position_embeddings"), text.get("rope_theta", 10000.0)
    if type(positions) is int and positions <= LONGEST_LLAMA and theta != 10000:
        yield f"`rope_theta` is {as_json(theta)}, LLaMA 1 and 2, which have these sizes and positions, were trained with 10000"


def _activation(s: SmallFiles) -> Iterator[str]:
    for key in ("hidden_act", "hidden_activation"):
        if (act := _text(s).get(key)) is not None and act not in ACTIVATIONS:
            yield f"`{key}` is {as_json(act)}, which transformers does not know"


def _family_values(s: SmallFiles) -> Iterator[str]:
    text = _text(s)
    decoder, act = known_decoder(text), text.get("hidden_act")
    usual = decoder.defaults.get("hidden_act", act) if decoder else act
    same = {"swish": "silu"}  # two names of one function
    if usual == "gelu_pytorch_tanh":
        same["gelu"] = usual  # Gemma's first configs, of which transformers takes one for the other
    if act in ACTIVATIONS and same.get(act, act) != usual:
        yield f"`hidden_act` is {as_json(act)}, every published {decoder.model_type if decoder else ''} has {usual}"
    eps = text.get("rms_norm_eps")
    if isinstance(eps, float) and not any(math.isclose(eps, usual, rel_tol=1e-3) for usual in EPS):
        yield f"`rms_norm_eps` is {as_json(eps)}, published models have 1e-05 or 1e-06"


def _dtype(s: SmallFiles) -> Iterator[str]:
    """A declared dtype in which a reader loses bits of the stored values."""
    stored = TORCH_DTYPE.get(main_dtype(s.checkpoint.parameters()), "")
    for prefix, config in _nested(s.of(CONFIG)):
        for key in ("torch_dtype", "dtype"):
            declared = str(config.get(key)).removeprefix("torch.")
            if prefix != "vision_config." and {declared, stored} == {"float16", "bfloat16"}:
                yield f"`{prefix}{key}` is {as_json(config[key])}, but the tensors are {stored}: readers that go by it change the values"


def _text_ids(s: SmallFiles) -> Iterator[str]:
    """bos and eos in the text model's config of llava-hf, against the tokenizer."""
    for role in ("bos", "eos") if s.checkpoint.layout == "llava-hf" else ():
        value, true = s.text.get(f"{role}_token_id"), s.ids.get(role)
        given = value if isinstance(value, list) else [value]
        if value is not None and true is not None and true not in given:
            yield f"`text_config.{role}_token_id` is {as_json(value)}, but the tokenizer's {role} is id {true}"


def _projector_bias(s: SmallFiles) -> Iterator[str]:
    if s.of(CONFIG).get("multimodal_projector_bias") is False and (
        names := [n for n in s.tensors if re.fullmatch(r"projector\.\d\.bias", n)]
    ):
        yield f"`multimodal_projector_bias` is false, but {len(names)} biases are there: transformers 4.48 and later leave them out"


def _features(s: SmallFiles) -> Iterator[str]:
    """Which features of the tower LLaVA's own code takes; it stops without these."""
    config = s.of(CONFIG)
    if type(layer := config.get("mm_vision_select_layer")) is not int:
        yield f"`mm_vision_select_layer` is {as_json(layer)}, not the number of a layer"
    if (feature := config.get("mm_vision_select_feature", "patch")) not in SELECTED:
        yield f"`mm_vision_select_feature` is {as_json(feature)}, which LLaVA's code does not know"


SELECTED = ("patch", "cls_patch", "slicefour_patch", "slicefour_cls_patch", "slice_m25811_f6_patch", "slice_m25811_f6_cls_patch")


# --- the vision tower, and images for it -----------------------------------------------------------------------------


def _row(s: SmallFiles) -> Tower | None:
    """The row of the tower's kind, by its tensors or the name of a published tower; None where neither tells it."""
    if inside := {name.removeprefix("tower.") for name in s.tensors if name.startswith("tower.embeddings.")}:
        return row_of(inside)
    known = _named(s)
    return TOWERS_BY_TYPE[known.model_type] if known else None


def _named(s: SmallFiles) -> KnownTower | None:
    """The published tower that config.json names."""
    name = s.of(CONFIG).get("mm_vision_tower") or vision(s.objects).get("_name_or_path")
    return next((known for known in KNOWN_TOWERS if known.repo == name), None)


def _tower_values(s: SmallFiles) -> Iterator[str]:
    """Values of a tower that no shape shows, against those of its kind or of the published tower of its widths."""
    config, row = vision(s.objects), _row(s)
    if not row or not config:
        return
    defaults = row.defaults
    eps = config.get("layer_norm_eps", defaults["layer_norm_eps"])
    if eps != defaults["layer_norm_eps"]:
        yield f"`vision_config.layer_norm_eps` is {as_json(eps)}, every {row.title} has {defaults['layer_norm_eps']}"
    widths = (config.get("hidden_size"), config.get("intermediate_size"))
    fitting = [known for known in KNOWN_TOWERS if (known.model_type, known.hidden, known.intermediate) == (row.model_type, *widths)]
    named = _named(s)
    fitting = [named] if named in fitting else fitting
    if not fitting:
        return
    heads, act = config.get("num_attention_heads", defaults["num_attention_heads"]), config.get("hidden_act", defaults["hidden_act"])
    if heads not in [known.heads for known in fitting]:
        yield f"`vision_config.num_attention_heads` is {as_json(heads)}, {fitting[0].repo} of the same widths has {fitting[0].heads}"
    if act not in [known.activation for known in fitting] and act in TOWER_ACTIVATIONS:
        yield f"`vision_config.hidden_act` is {as_json(act)}, {fitting[0].repo} of the same widths has {fitting[0].activation}"


def image_settings(s: SmallFiles) -> Mapping[str, Any]:
    """What an image processor reads."""
    return stored_settings(s.of(PREPROCESSOR), s.of(PROCESSOR))


def _colours(s: SmallFiles) -> Iterator[tuple[bool, str]]:
    """(certain, sentence) for mean and deviation of the pixels. It is certain where they are another tower's, or of no range of pixels."""
    settings, row = image_settings(s), _row(s)
    if not row or not settings:
        return
    rescale = settings.get("rescale_factor", 1 / 255)
    scale = 255 * rescale if type(rescale) in (int, float) and 0 < rescale <= LARGEST_SETTING else 1.0
    usual = [_pair(pixels) for pixels in row.pixels if pixels.activation in ("", vision(s.objects).get("hidden_act", ""))]
    foreign = [(other, _pair(pixels)) for other in TOWERS if other is not row for pixels in other.pixels]
    usable = 0
    for place, key in enumerate(("image_mean", "image_std")):
        given = settings.get(key)
        if not isinstance(given, list) or len(given) != 3 or not all(type(x) in (int, float) and abs(x) <= LARGEST_SETTING for x in given):
            continue  # missing, or refused by `read_image_settings`
        values = [x / scale for x in given]
        usable += 1
        if any(_close(values, pair[place]) for pair in usual):
            continue
        other = next((tower.title for tower, pair in foreign if _close(values, pair[place])), "")
        outside = not all(0 <= x <= 1 for x in values)
        what = f"those of {other}" if other else "of no range of pixels" if outside else "of no known tower"
        scaled = "" if math.isclose(scale, 1, rel_tol=1e-3) else f" with a `rescale_factor` of {as_json(rescale)}"
        wanted = f"the tower is a {row.title}, which takes {as_json(list(usual[0][place]))}"
        yield bool(other or outside or scaled), f"`{key}` is {as_json(given)}{scaled}, {what}; {wanted}"
    if not usable and not math.isclose(scale, 1, rel_tol=1e-3):
        yield True, f"`rescale_factor` is {as_json(rescale)}, not 1/255: pixels leave the range that the tower was trained with"


def _pair(pixels: Pixels) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return pixels.mean, pixels.std


def _close(one: list[float], other: tuple[float, ...]) -> bool:
    return all(math.isclose(x, y, abs_tol=2e-3) for x, y in zip(one, other, strict=True))


def _image_values(s: SmallFiles) -> Iterator[str]:
    yield from (text for certain, text in _colours(s) if certain)


def _image_unusual(s: SmallFiles) -> Iterator[str]:
    settings, row = image_settings(s), _row(s)
    yield from (text for certain, text in _colours(s) if not certain)
    if settings.get("do_convert_rgb") is False:
        yield "`do_convert_rgb` is false: grey images and those with transparency are no input then"
    if row and row.resample is not None and settings.get("resample", row.resample) != row.resample:
        yield f"`resample` is {as_json(settings['resample'])}, every {row.title} was trained with {row.resample} (PIL's bicubic)"

    named = settings.get("image_processor_type")
    if isinstance(named, str) and not named.startswith(PROCESSORS):
        yield f"`image_processor_type` is {as_json(named)}: no published LLaVA has it, and it may resize and crop in another way"


def _image_class(s: SmallFiles) -> Iterator[str]:
    """The image processor's class and its crop, against the model's."""
    settings, named = image_settings(s), str(image_settings(s).get("image_processor_type", ""))
    tiles = named.startswith(TILING)
    if named and s.checkpoint.layout == "llava-hf" and s.target and s.tiles != tiles:
        why = "images come without their sizes" if s.tiles else "images come in tiles, which it does not take"
        yield f"`image_processor_type` is {as_json(named)}, but the model is a {s.target.model_type}: {why}"
    square = isinstance(size := settings.get("size"), dict) and "shortest_edge" not in size
    if settings.get("do_center_crop") is False and not square and named.startswith("CLIP"):
        yield "`do_center_crop` is false: images that are not square become inputs that the tower does not take"


# What the names of image processors begin with, `CLIPFeatureExtractor` and those that end in `Fast` too.
PROCESSORS = tuple(
    str(name).removesuffix("ImageProcessor")
    for name in (
        *(row.image_processor for row in TOWERS),
        *(each for row in TARGETS for each in (row.padding_processor, row.image_processor)),
    )
    if name
)
# What the names of image processors that cut tiles begin with: `LlavaNextImageProcessorFast`, `LlavaNextVideoImageProcessor` too.
TILING = tuple(str(row.image_processor).removesuffix("ImageProcessor") for row in TARGETS if row.tiles)


def _sampling(s: SmallFiles) -> Iterator[str]:
    for key, (kind, least, most) in SAMPLING.items():
        if (value := s.of(GENERATION_CONFIG).get(key)) is not None and not sensible(value, kind, least, most):
            yield f"`{key}` is {as_json(value)}, which generation refuses"


def _steering(s: SmallFiles) -> Iterator[str]:
    if found := [key for key in STEERING if s.of(GENERATION_CONFIG).get(key)]:
        yield f"`{found[0]}` is {as_json(s.of(GENERATION_CONFIG)[found[0]])}: the model's own text is changed whatever it says"


def _padding_side(s: SmallFiles) -> Iterator[str]:
    if s.checkpoint.layout == "llava-hf" and s.of(TOKENIZER_CONFIG).get("padding_side") == "right":
        yield "`padding_side` is right: answers to several prompts at once begin behind their padding"


ANY_CONFIG = (
    Rule(CONFIG, "no quantisation", _quantized, remedy="remove the key, or take the quantised tensors"),
    Rule(CONFIG, "no quantisation", _quantized_otherwise, "warning", "remove the key, or take the quantised tensors"),
    Rule(CONFIG, "rope", _rope),
    Rule(CONFIG, "values of the family", _family_rope, "warning", BY_HAND),
    Rule(CONFIG, "activation", _activation),
    Rule(CONFIG, "values of the family", _family_values, "warning", BY_HAND),
    Rule(CONFIG, "dtype", _dtype, "warning", "name the dtype of the tensors there"),
)
ORIGINAL_CONFIG = (Rule(CONFIG, "features", _features),)
LLAVA_HF_CONFIG = (
    Rule(CONFIG, "projector", _projector_bias),
    Rule(CONFIG, "special ids", _text_ids, "note"),
    Rule(CONFIG, "vision tower", _tower_values, "warning", BY_HAND),
)
GENERATING = (
    Rule(GENERATION_CONFIG, "sampling", _sampling),
    Rule(GENERATION_CONFIG, "nothing forced or suppressed", _steering, "warning", BY_HAND),
)
IMAGES = (
    Rule(PREPROCESSOR, "mean, deviation and scale of the tower's pixels", _image_values, remedy=CORRECT),
    Rule(PREPROCESSOR, "class and crop", _image_class, remedy=CORRECT),
    Rule(PREPROCESSOR, "mean, deviation and scale of the tower's pixels", _image_unusual, "warning", BY_HAND),
)
PADDING = (Rule(TOKENIZER_CONFIG, "padding", _padding_side, "note"),)
