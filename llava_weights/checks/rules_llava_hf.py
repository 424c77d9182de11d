"""A table of rules: do the files of a llava-hf folder agree with its tensors and with each other?

What each value must be, and which program fails otherwise, was tested with transformers 4.36 to 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..checkpoint.chat_template import written_as
from ..checkpoint.config import check_structure
from ..checkpoint.hf_config import pinpoints
from ..checkpoint.kinds import contradictions
from ..checkpoint.processor import VIDEO_PREPROCESSOR, read_image_settings
from ..checkpoint.prompt import own_template
from ..checkpoint.small_files import small_text
from ..checkpoint.tokenizer import FAST, RIGHT_TOKENIZER, TOKENIZER_CONFIG
from ..checkpoint.tower import own_tower, video_tower
from ..families.decoders import ACTIVATIONS
from ..families.decoders import DECODER_BY_TYPE as DECODERS
from ..families.layouts import DROPPED, LLAVA_PART, STYLES, canonical, spelled
from ..families.projectors import PROJECTOR_ACTIVATION
from ..families.prompts import CONVERSATIONS, marks
from ..families.targets import ANYRES_MAX, DEFAULT_RATIO, STRATEGIES
from ..families.targets import TARGET_BY_TYPE as TARGETS
from ..text import few, listed, shown
from . import rules_values
from .rules import CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG, JINJA, PREPROCESSOR, PROCESSOR, Rule, SmallFiles, as_json, vision
from .rules_original import REPAIR, SETTLE, SHARED_RULES, generation_ids, ids_in_table, misnamed_pad, tokenizer_missing
from .rules_tokenizer import odd_form
from .rules_values import image_settings

IMAGE_KEYS = (
    "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad", "image_mean", "image_std", "rescale_factor",
    "resample", "image_grid_pinpoints",
)  # fmt: skip


def _vocabulary(s: SmallFiles) -> Iterator[str]:
    decoder = DECODERS.get(s.text["model_type"])
    inner = s.text.get("vocab_size", decoder.defaults["vocab_size"] if decoder else None)
    config = {"vocab_size": s.of(CONFIG).get("vocab_size", inner), "text_config.vocab_size": inner}
    given = {key: rows for key, rows in config.items() if rows is not None}
    yield from (f"`{key}` is {as_json(rows)}, but the embedding table has {s.rows:,} rows" for key, rows in given.items() if rows != s.rows)


def _structure(s: SmallFiles) -> Iterator[str]:
    if unknown := [name for name in s.checkpoint.parameters() if not re.match(LLAVA_PART, canonical(name))]:
        yield f"{len(unknown):,} tensors are of no part of a LLaVA: {few(unknown)}"
    if len(s.tensors) < len(s.checkpoint.parameters()):
        yield "some tensors are there twice, under names of two key styles"
    if decoder := DECODERS.get(s.text["model_type"]):
        tied = (s.text.get("tie_word_embeddings") or s.of(CONFIG).get("tie_word_embeddings")) and "head.weight" not in s.tensors
        given = {key: value for key, value in s.text.items() if key != "architectures"}  # which no reader of a nested config asks for
        text = {**decoder.defaults, **given, "vocab_size": s.rows, "tie_word_embeddings": tied is True}
        check_structure(text, {spelled(x, "llava"): t.shape for x, t in s.tensors.items() if x.startswith(("text.", "head."))})


def _tower(s: SmallFiles) -> Iterator[str]:
    if own_tower(s.checkpoint.tensors, vision_config=vision(s.objects), model=None) is None:
        yield "there are no tensors of a vision tower"
    elif s.target and s.target.two_towers and s.tower:
        video_tower(s.checkpoint.tensors, s.tower.config, name=s.checkpoint.origin.name)


def _projector(s: SmallFiles) -> Iterator[str]:
    if (act := s.of(CONFIG).get("projector_hidden_act", PROJECTOR_ACTIVATION)) not in ACTIVATIONS:
        yield f"`projector_hidden_act` is {as_json(act)}, which transformers does not know"
    if not s.tower or not s.rows:
        return
    *_, hidden = s.tensors["text.embed_tokens.weight"].shape or (0,)
    layers = s.told("vision_feature_layer")
    width = s.tower.hidden * (len(layers) if isinstance(layers, list) else 1)
    expected = {"0.weight": (hidden, width), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    if s.target and s.target.layernorm:
        expected |= {"norm.weight": (width,), "norm.bias": (width,)}
    found = {name.removeprefix("projector."): tensor.shape for name, tensor in s.tensors.items() if name.startswith("projector.")}
    if s.of(CONFIG).get("multimodal_projector_bias") is False and not any(name.endswith("bias") for name in found):
        expected = {name: shape for name, shape in expected.items() if not name.endswith("bias")}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            full = spelled(f"projector.{name}", "llava-hf") if name in expected else f"projector.{name}"
            yield f"{shown(full)} has shape {as_json(found.get(name))}, expected {as_json(expected.get(name))}"


def _image_id(s: SmallFiles) -> Iterator[str]:
    config = s.of(CONFIG)
    image = config.get("image_token_index", config.get("image_token_id", s.told("image_token_index")))
    wanted = s.tokens.get(s.image_token)
    if config.get("image_token_id", image) != image:
        yield f"`image_token_index` is {as_json(image)}, `image_token_id` {as_json(config['image_token_id'])}"
    if type(image) is not int or not 0 <= image < s.rows:
        yield f"`image_token_index` is {as_json(image)}, the embedding table has {s.rows:,} rows"
    elif wanted is not None and image != wanted:
        yield f"`image_token_index` is {image}, but {shown(s.image_token)} has the id {wanted} in the tokenizer"


def _video_id(s: SmallFiles) -> Iterator[str]:
    """Of a class that takes videos."""
    for key, token in s.target.tokens.items() if s.target else ():
        name = s.of(PROCESSOR).get(key.replace("_index", "")) or token
        value, wanted = s.of(CONFIG).get(key, s.of(CONFIG).get(key.replace("_index", "_id"), s.told(key))), s.tokens.get(name)
        if type(value) is not int or not 0 <= value < s.rows:
            yield f"`{key}` is {as_json(value)}, the embedding table has {s.rows:,} rows"
        elif wanted is not None and value != wanted:
            yield f"`{key}` is {value}, but {shown(name)} has the id {wanted} in the tokenizer"


def _image_id_name(s: SmallFiles) -> Iterator[str]:
    if "image_token_index" not in s.of(CONFIG) and "image_token_id" in s.of(CONFIG):
        yield "there is only `image_token_id`: transformers before 4.52 read `image_token_index`, and take 32000 here"


def _image_length(s: SmallFiles) -> Iterator[str]:
    if not s.tower or (s.target and "image_seq_length" in s.target.lacks) or _counts_nothing(s):
        return  # where the processor puts one token an image, any length is right
    whole = s.tower.class_token and s.told("vision_feature_select_strategy") == "full"
    length, wanted = s.told("image_seq_length"), s.tower.patches + whole
    if length != wanted:
        yield (
            f"`image_seq_length` is {as_json(s.of(CONFIG).get('image_seq_length'))}, but an image of {s.tower.image_size} pixels in "
            f"patches of {s.tower.patch_size} gives {wanted} features: transformers 4.45 to 4.47 stop or merge them wrongly"
        )


def _layer(s: SmallFiles) -> Iterator[str]:
    layer = s.told("vision_feature_layer")
    count = int(s.tower.config["num_hidden_layers"]) if s.tower else 0
    for number in layer if isinstance(layer, list) else [layer]:
        if type(number) is not int or (count and not -count - 1 <= number <= count):
            yield f"`vision_feature_layer` is {as_json(layer)}, the vision tower has {count} layers"
    if layer != (older := s.of(CONFIG).get("vision_feature_layers", layer)):
        yield f"`vision_feature_layer` is {as_json(layer)}, `vision_feature_layers` {as_json(older)}: readers take one or the other"
    if (strategy := s.told("vision_feature_select_strategy")) not in STRATEGIES.values():
        yield f"`vision_feature_select_strategy` is {as_json(strategy)}, not {' or '.join(STRATEGIES.values())}"


def _kind(s: SmallFiles) -> Iterator[str]:
    kind, named = str(s.of(CONFIG).get("model_type")), s.of(CONFIG).get("architectures")
    if kind not in TARGETS:
        yield f"`model_type` is {as_json(s.of(CONFIG).get('model_type'))}, not {' or '.join(TARGETS)}"
    elif named != [TARGETS[kind].architecture]:
        right = TARGETS[kind].architecture
        yield f"`architectures` is {as_json(named)}, but `{right}` belongs to `{kind}`: vLLM and llama.cpp choose by it"


def _contradictions(s: SmallFiles) -> Iterator[str]:
    for told in contradictions(s.target, s.checkpoint.parameters()) if s.target else ():
        yield f"`model_type` is {s.target.model_type if s.target else ''}, but {told}"


def _newline(s: SmallFiles) -> Iterator[str]:
    if not (target := s.target):
        return
    if target.tiles and "newline" not in s.tensors and s.of(CONFIG).get("use_image_newline_parameter") is not False:
        yield f"`model_type` is {target.model_type}, but there is no tensor `image_newline`"


def _ratio(s: SmallFiles) -> Iterator[str]:
    if s.target and s.target.capped and not re.fullmatch(ANYRES_MAX, str(ratio := s.told("vision_aspect_ratio"))):
        yield f"`vision_aspect_ratio` is {as_json(ratio)}, not `anyres_max_` and the number of tiles whose features an image may have"


def _pinpoints(s: SmallFiles) -> Iterator[str]:
    if s.tiles and not s.of(CONFIG).get("image_grid_pinpoints"):
        yield "`image_grid_pinpoints` is missing: transformers then takes those for 336 pixels"
    elif s.tiles and s.tower:
        pinpoints(s.of(CONFIG), s.tower.image_size)


def _style(s: SmallFiles) -> Iterator[str]:
    names = s.checkpoint.tensors
    if style := next((who for pattern, who in STYLES if any(re.fullmatch(pattern, name) for name in names)), None):
        yield f"the tensors, such as {shown(next(iter(names)))}, are named as by {style}"


def _buffers(s: SmallFiles) -> Iterator[str]:
    if stray := [name for name in s.checkpoint.tensors if re.fullmatch(DROPPED, name)]:
        yield f"{len(stray):,} tensors are buffers that no model reads: {few(stray)}"


def _generation_missing(s: SmallFiles) -> Iterator[str]:
    if not s.has(GENERATION_CONFIG):
        yield "it is missing: transformers 5 then knows no end of text and never stops"


def _legacy(s: SmallFiles) -> Iterator[str]:
    if not s.has(TOKENIZER_CONFIG):
        yield "it is missing: readers guess the tokenizer's class and settings"
    elif s.is_llama and s.of(TOKENIZER_CONFIG).get("legacy") is not True:
        yield (
            f"`legacy` is {as_json(s.of(TOKENIZER_CONFIG).get('legacy'))}, not true: slow tokenizers, and transformers 5 without a "
            "config.json beside it, leave out the blank behind an image that LLaVA was trained with"
        )
    if s.is_llama and s.of(TOKENIZER_CONFIG).get("add_prefix_space", True) is None:
        yield "`add_prefix_space` is null: transformers 4.45 and later then lose the blank before a text"


def _class(s: SmallFiles) -> Iterator[str]:
    if (named := s.of(TOKENIZER_CONFIG).get("tokenizer_class")) in ("TokenizersBackend", "LLaMATokenizer"):
        yield f"`tokenizer_class` is {named}, which transformers 4 does not know"


def _fast(s: SmallFiles) -> Iterator[str]:
    """The one form that gives LLaVA's own ids in every version."""
    if not s.is_llama:
        return
    if not s.has(FAST):
        yield "it is missing: each version of transformers makes its own, and 4.45 and later another than LLaVA's"
        return
    if form := odd_form(s):
        yield (
            f"its form is {form}, not the normalizers Prepend and Replace without a pre_tokenizer: "
            "it leaves out the blank behind an image, and transformers 4.37 can't read some of these forms"
        )


def _image_token(s: SmallFiles) -> Iterator[str]:
    if s.has(FAST) and s.image_token not in s.tokens:
        yield f"{shown(s.image_token)}, which stands for an image, is not one token"


def _image_tokens(s: SmallFiles) -> Iterator[str]:
    """Two files that name different image tokens."""
    if isinstance(named := s.of(PROCESSOR).get("image_token"), str) and named != s.image_token:
        yield f"it names {shown(s.image_token)} as the image token, processor_config.json {shown(named)}: processors take the tokenizer's"


def _split(s: SmallFiles) -> Iterator[str]:
    if s.of(TOKENIZER_CONFIG).get("split_special_tokens") is True:
        yield "`split_special_tokens` is true: special tokens in a text, as that of an image, are cut into pieces"


def _image_special(s: SmallFiles) -> Iterator[str]:
    entries = s.of(FAST).get("added_tokens")
    named = [e for e in entries if isinstance(e, dict) and e.get("content") == s.image_token] if isinstance(entries, list) else []
    if s.has(FAST) and s.image_token in s.tokens and not any(entry.get("special") is True for entry in named):
        yield f"{shown(s.image_token)}, which stands for an image, is no special token"


def _processor_missing(s: SmallFiles) -> Iterator[str]:
    if not s.has(PROCESSOR):
        yield "it is missing: transformers 4.48 and later stop at the first prompt with an image"


def _counts_nothing(s: SmallFiles) -> bool:
    """Whether the processor leaves it to the model to count the features of an image, as transformers' own converters wrote it."""
    silent = all(s.of(PROCESSOR).get(key) is None for key in ("patch_size", "vision_feature_select_strategy"))
    return silent and not (s.target and s.target.counts)


def _processor_empty(s: SmallFiles) -> Iterator[str]:
    if s.has(PROCESSOR) and _counts_nothing(s):
        what = "`patch_size` and `vision_feature_select_strategy` are missing"
        yield f"{what}: transformers 4.48 and later stop at the first prompt with an image"


def _counted(s: SmallFiles) -> dict[str, Any]:
    """By what a processor counts the features of an image."""
    wanted = {"vision_feature_select_strategy": s.told("vision_feature_select_strategy")}
    if s.tower and s.target and s.target.counts:
        wanted |= {"num_image_tokens": s.tower.patches + s.tower.class_token}
    elif s.tower:
        wanted |= {"num_additional_image_tokens": int(s.tower.class_token), "patch_size": s.tower.patch_size}
    return wanted | ({"vision_aspect_ratio": s.told("vision_aspect_ratio")} if s.target and s.target.capped else {})


def _processor(s: SmallFiles) -> Iterator[str]:
    if not s.has(PROCESSOR):
        return
    wanted = {} if _counts_nothing(s) else _counted(s)
    wanted |= {"processor_class": s.target.processor} if s.target else {}
    assumed = {"vision_aspect_ratio": DEFAULT_RATIO}  # by the processor, where the file does not say
    for key, value in wanted.items():
        if (found := s.of(PROCESSOR).get(key, assumed.get(key))) != value:
            yield f"`{key}` is {as_json(found)}, the model needs {as_json(value)}: image tokens in the prompt do not fit its features then"


def _nested(s: SmallFiles) -> Iterator[str]:
    if not s.has(PREPROCESSOR) and "image_processor" in s.of(PROCESSOR):
        yield "it is missing: the settings stand in processor_config.json, where transformers 4 does not look for them"


def _two_processors(s: SmallFiles) -> Iterator[str]:
    """transformers 5 reads the settings inside processor_config.json, 4 the file beside it."""
    nested, beside = s.of(PROCESSOR).get("image_processor"), s.of(PREPROCESSOR)
    if isinstance(nested, dict):
        for key in IMAGE_KEYS:
            if key in nested and key in beside and nested[key] != beside[key]:
                where = f"in {PREPROCESSOR} it is {as_json(beside[key])}"
                yield f"`image_processor.{key}` is {as_json(nested[key])}, {where}: transformers 5 reads one, 4 the other"


def _preprocessor(s: SmallFiles) -> Iterator[str]:
    if not (settings := image_settings(s)):
        yield "it is missing: nothing says how an image becomes pixels"
        return
    if s.tower:
        read_image_settings(settings, tower=s.tower.row, size=s.tower.image_size, patch=s.tower.patch_size)
    model_grids, processor_grids = s.of(CONFIG).get("image_grid_pinpoints"), settings.get("image_grid_pinpoints")
    assumed = [list(pair) for pair in s.target.pinpoints] if s.target else []
    if s.tiles and model_grids and model_grids != (processor_grids or assumed):
        differ = "is missing" if processor_grids is None else f"is {as_json(processor_grids)}, in config.json {as_json(model_grids)}"
        yield f"`image_grid_pinpoints` {differ}: the processor and the model cut images differently"


def _video_pixels(s: SmallFiles) -> Iterator[str]:
    """Frames of a video go through the same tower as images."""
    frames, images = s.of(VIDEO_PREPROCESSOR), image_settings(s)
    if s.tower and frames:
        read_image_settings(frames, tower=s.tower.row, size=s.tower.image_size, patch=s.tower.patch_size)
    for key in ("image_mean", "image_std", "rescale_factor"):
        if key in frames and key in images and frames[key] != images[key]:
            yield f"`{key}` is {as_json(frames[key])}, for images it is {as_json(images[key])}"


def _template(s: SmallFiles) -> Iterator[str]:
    inside = s.of(TOKENIZER_CONFIG).get("chat_template")
    if not s.has(CHAT_TEMPLATE):
        other = "; 4.47 and later read chat_template.jinja" if s.has(JINJA) else "" if inside else " at all"
        yield f"it is missing: transformers 4.43 to 4.46 find no chat template{other}"
    text = s.of(CHAT_TEMPLATE).get("chat_template") or small_text(s.checkpoint.files, JINJA)
    if isinstance(text, str) and s.image_token not in text:
        yield f"the chat template never writes {shown(s.image_token)}, which stands for an image"


def _templates_differ(s: SmallFiles) -> Iterator[str]:
    jinja, text = small_text(s.checkpoint.files, JINJA), s.of(CHAT_TEMPLATE).get("chat_template")
    if s.has(CHAT_TEMPLATE) and not isinstance(text, str):
        yield "it holds no `chat_template`"
    elif jinja is not None and text is not None and jinja.rstrip("\n") != text.rstrip("\n"):
        yield "it differs from chat_template.jinja: the processor reads one, the tokenizer the other"


def _prompt(s: SmallFiles) -> Iterator[str]:
    """The template beside the prompts that a model like this one is trained with. One that another program wrote is believed, if it has
    their turns at least; one of this tool is as certain as config and tokens are. No template is rendered."""
    template, choice = own_template(s.checkpoint.files), s.prompt
    if choice is None:
        return
    written, names = written_as(template), (choice.conversation.name, *choice.rivals)
    there, turns = marks(template), {mark for name in names for mark in CONVERSATIONS[name].marks}
    if "conv_mode" in s.of(CONFIG):
        if (template and (written or choice.conversation) != choice.conversation) or (there and not there & turns):
            other = f"that of `{written.name}`" if written else f"one with {listed(sorted(there))}"
            yield f"`conv_mode` is {choice.conversation.name} in config.json, but the chat template is {other}"
    elif written and names != (written.name,):
        others = listed(name for name in names if name != written.name)
        yield f"prompt not certain: the chat template is that of `{written.name}`, but config and tokens fit {others} as well"
    elif choice.rivals and not template:
        yield choice.doubt
    elif there and not there & turns:
        yield f"the chat template has {listed(sorted(there))}, but {choice.evidence}, which speaks for {listed(names)}"


def _third_template(s: SmallFiles) -> Iterator[str]:
    text, inside = (
        s.of(CHAT_TEMPLATE).get("chat_template") or small_text(s.checkpoint.files, JINJA),
        s.of(TOKENIZER_CONFIG).get("chat_template"),
    )
    if isinstance(text, str) and isinstance(inside, str) and text.rstrip("\n") != inside.rstrip("\n"):
        yield "its `chat_template` is another than the one beside it: tokenizers read this one where they find no chat_template.jinja"


LLAVA_HF_RULES = (
    Rule(CONFIG, "vocabulary", _vocabulary, remedy=REPAIR),
    Rule(
        CONFIG,
        "names and shapes of the text model",
        _structure,
        remedy="check that all shards are there and that config.json is processor_grids",
    ),
    Rule(
        CONFIG, "vision tower", _tower, remedy="give the tower with `llava-weights convert PATH --to llava-hf --vision-tower CLIP -o OUT`"
    ),
    Rule(CONFIG, "projector", _projector),
    Rule(CONFIG, "image token", _image_id),
    Rule(CONFIG, "video token", _video_id),
    Rule(CONFIG, "image token", _image_id_name, "warning", REPAIR),
    Rule(CONFIG, "image_seq_length", _image_length, remedy=REPAIR),
    Rule(CONFIG, "features", _layer),
    Rule(CONFIG, "special ids", ids_in_table, remedy=REPAIR),
    Rule(CONFIG, "special ids", misnamed_pad, "warning", REPAIR),
    Rule(CONFIG, "model type", _kind, "warning", REPAIR),
    Rule(CONFIG, "model type", _contradictions),
    Rule(CONFIG, "image_newline", _newline, remedy=REPAIR),
    Rule(CONFIG, "image_grid_pinpoints", _pinpoints),
    Rule(CONFIG, "vision_aspect_ratio", _ratio),
    *rules_values.ANY_CONFIG,
    *rules_values.LLAVA_HF_CONFIG,
    Rule(GENERATION_CONFIG, "there", _generation_missing, remedy=REPAIR),
    Rule(GENERATION_CONFIG, "bos, eos and pad as in the tokenizer", generation_ids, remedy=REPAIR),
    *rules_values.GENERATING,
    Rule("tokenizer", "there", tokenizer_missing, remedy=RIGHT_TOKENIZER),
    *SHARED_RULES,
    Rule(TOKENIZER_CONFIG, "legacy", _legacy, "warning", REPAIR),
    Rule(TOKENIZER_CONFIG, "class", _class, remedy=REPAIR),
    *rules_values.PADDING,
    Rule(TOKENIZER_CONFIG, "image token", _image_tokens, remedy=REPAIR),
    Rule(TOKENIZER_CONFIG, "special tokens", _split),
    Rule(FAST, "form", _fast, "warning", REPAIR),
    Rule(FAST, "image token", _image_token, remedy=REPAIR),
    Rule(FAST, "image token", _image_special, "warning", REPAIR),
    Rule(PROCESSOR, "there", _processor_missing, remedy=REPAIR),
    Rule(PROCESSOR, "patch size and strategy", _processor_empty, "warning", REPAIR),
    Rule(PROCESSOR, f"as {PREPROCESSOR}", _two_processors, remedy=REPAIR),
    Rule(PROCESSOR, "patches, class token and strategy of the tower", _processor, remedy=REPAIR),
    Rule(PREPROCESSOR, "image size and pinpoints of the model", _preprocessor, remedy=REPAIR),
    *rules_values.IMAGES,
    Rule(VIDEO_PREPROCESSOR, "mean, deviation and scale of images", _video_pixels, remedy=REPAIR),
    Rule(PREPROCESSOR, "place", _nested, "warning", REPAIR),
    Rule(CHAT_TEMPLATE, "there, with the image token", _template, "warning", REPAIR),
    Rule(CHAT_TEMPLATE, "the same as chat_template.jinja", _templates_differ, remedy=REPAIR),
    Rule(TOKENIZER_CONFIG, "chat template", _third_template, "warning", REPAIR),
    Rule(CONFIG, "prompt", _prompt, "warning", SETTLE),
    Rule("tensors", "key style", _style, "warning", REPAIR),
    Rule("tensors", "no stray buffers", _buffers, "warning", REPAIR),
)
