"""Compare the small files of two checkpoints by meaning: writers spell, order and leave out things in different ways.

Where a file leaves out a value, the value that its class assumes counts. Values of both sides must be equal. A key that only one side has
and for which no table has an assumed value can't be compared, and is named. Keys of training, versions and paths are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import SAMPLING, known_decoder
from ..checkpoint.hf_config import flat_config
from ..checkpoint.processor import STEPS
from ..checkpoint.sentencepiece import read_sentencepiece
from ..checkpoint.small_files import small_bytes, small_text
from ..checkpoint.tokenizer import ADDED, FAST, MODEL, MODEL_LIMIT, SPECIAL, TOKENIZER_CONFIG, is_length, token_text
from ..checkpoint.tokenizer_json import added_token, added_tokens
from ..checkpoint.tower import complete_config, lost_tensors, same_widths
from ..errors import InputError, UsageError
from ..families.decoders import DECODERS, LLAVA_DEFAULTS
from ..families.files import CONFIG_FILES, PROCESSOR_FILES, TOKENIZER_FILES
from ..families.layouts import canonical
from ..families.projectors import PROJECTOR_FORMS, STACK_OF_ONE_TYPE, projector_type
from ..families.targets import TARGET_BY_TYPE, TARGET_DEFAULTS
from ..families.towers import TOWER_BY_TYPE, TOWERS
from ..findings import Finding
from ..smoke.probes import table_rows
from ..text import listed, shown
from ..transforms.convert import convert
from .rules import (
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION_CONFIG,
    JINJA,
    PREPROCESSOR,
    PROCESSOR,
    SmallFiles,
    as_json,
    listings,
    read_small_files,
    vision,
)
from .rules_values import STEERING, image_settings

COMPARED_FILES = (*CONFIG_FILES, *TOKENIZER_FILES, *PROCESSOR_FILES)
# Keys that change nothing of what a finished model computes: versions, paths, training, memory.
UNCOMPARED_KEYS = (
    r"transformers_version|_name_or_path|name_or_path|_commit_hash|_from_model_config|use_cache|initializer_(range|factor)|.*dropout|"
    r"pretraining_tp|ignore_index|gradient_checkpointing|output_(attentions|hidden_states)|return_dict|use_return_dict|id2label|label2id|"
    r"(freeze|tune)_.*|.*_lr|projection_dim|vision_use_head|(torch_)?dtype|mm_vision_tower|vision_tower|unpadded_vocab_size"
)
# In tokenizer_config.json: without effect on the ids of a text, or found in other files, which are compared.
UNCOMPARED_TOKENIZER_KEYS = (
    r"(?!add_).*_token|(?!split_).*_tokens|added_tokens_decoder|chat_template|processor_class|special_tokens_map_file|tokenizer_file|name_or_path|"
    r"model_max_length|max_length|(padding|truncation)_side|truncation_strategy|stride|pad_to_multiple_of|backend|is_local|"
    r"clean_up_tokenization_spaces|spaces_between_special_tokens|use_default_system_prompt|sp_model_kwargs|use_fast|model_input_names"
)
BYTE_LEVEL = ("vocab.json", "merges.txt")  # the slow tokenizer of Qwen 2
# Length and side of truncation and padding, and how ids become text: the defaults differ between classes and versions.
COMPARED_WHERE_BOTH = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
    "spaces_between_special_tokens",
)
# Compared only where both sides have them: else the value is the reader's choice.
KEYS_WHERE_BOTH = r"(.*\.)?(architectures|processor_class|feature_extractor_type)"
UNSET_KEYS = {"auto_map": None, "trust_remote_code": None, "_attn_implementation_internal": None, "quantization_config": None}
# What a conversion itself writes into the text model's config: names of classes, rows and the padding token.
WRITTEN = ("architectures", "model_type", "vocab_size", "pad_token_id")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What LLaVA's own code assumes, at c121f04.
ORIGINAL_ASSUMED = {
    **LLAVA_DEFAULTS, "mm_projector_type": "linear", "mm_use_im_start_end": False, "mm_use_im_patch_token": True,
    "mm_patch_merge_type": "flat", "mm_vision_select_layer": -2, "unfreeze_mm_vision_tower": False, "image_grid_pinpoints": None,
}  # fmt: skip
MODEL_TYPES = {"llava_llama": "llava"}  # two names of one class in LLaVA's own code
# GenerationConfig of transformers 4.37 to 5.23.
GENERATION_ASSUMED = {
    **SAMPLING, **dict.fromkeys(STEERING), "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_length": 20,
    "max_new_tokens": None, "min_length": 0, "min_new_tokens": None, "early_stopping": False, "max_time": None, "stop_strings": None,
    "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0,
    "diversity_penalty": 0.0, "num_beam_groups": 1, "num_return_sequences": 1, "penalty_alpha": None, "guidance_scale": None, "min_p": None,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "renormalize_logits": False, "exponential_decay_length_penalty": None, "constraints": None,
    "force_words_ids": None, "watermarking_config": None, "remove_invalid_values": False, "dola_layers": None,
}  # fmt: skip
LLAMA_ROLES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": None}  # of a LLaMA's tokenizer

Values = Mapping[str, Any]


@dataclass
class _Comparison:
    """What is found: sentences on what differs, names of what could not be compared, files that were."""

    label: str
    wrong: list[tuple[str, str]] = field(default_factory=list)  # file, sentence
    open: list[tuple[str, str]] = field(default_factory=list)  # a few words, sentence
    files: list[str] = field(default_factory=list)
    text_only: bool = False  # only the text model's config can be compared

    def values(self, file: str, checked: Values, reference: Values) -> None:
        """Key by key."""
        self.files.append(file)
        for key in dict.fromkeys((*checked, *reference)):
            if key in checked and key in reference:
                if not _same(checked[key], reference[key]):
                    self.wrong.append(
                        (file, f"`{key}` of {shown(file)} is {as_json(checked[key])}, in {self.label} it is {as_json(reference[key])}")
                    )
            elif (checked if key in checked else reference)[key] is not None and not re.fullmatch(KEYS_WHERE_BOTH, key):
                self.open.append((shown(key), f"{shown(key)} of {shown(file)} {'here' if key in checked else f'in {self.label}'} only"))

    def common(self, file: str, checked: Values, reference: Values) -> None:
        """The keys that both sides have."""
        both = checked.keys() & reference.keys()
        self.values(file, *({key: value for key, value in side.items() if key in both} for side in (checked, reference)))

    def there(self, file: str, checked: bool, reference: bool, *, instead: bool = False) -> bool:
        """Whether both sides have the file. `instead`: it may be missing here, since programs find the same in another file."""
        if reference and not checked and not instead:
            self.wrong.append((file, f"{shown(file)} is in {self.label}, and is not here"))
        elif checked != reference:
            self.open.append((shown(file), f"{shown(file)} {'here' if checked else f'in {self.label}'} only"))
        return checked and reference


def compare_files(checked: Checkpoint, reference: Checkpoint, label: str, level: str, *, tower: Checkpoint | None = None) -> list[Finding]:
    """Findings of `level` on the small files of `checked` against those of `reference`, which messages call `label`.

    Across the layouts llava and llava-hf, the original is converted first (`tower` serves it where it holds none). Raises nothing for
    damaged files: the rules on one checkpoint report those.
    """
    if not (checked.config or checked.files) or not (reference.config or reference.files):
        if not (checked.config or checked.files):
            return []
        text = f"the small files were not compared: {label} has none"
        return [Finding(level, "unchecked", label, text, rule="small-files", part="small files not compared")]
    result = _Comparison(label)
    if (checked.layout, reference.layout) == ("llava-hf", "llava"):
        reference = _converted(reference, checked, tower, result)
    elif (checked.layout, reference.layout) == ("llava", "llava-hf"):
        checked = _converted(checked, reference, tower, result)
    try:
        _compare(read_small_files(checked)[0], read_small_files(reference)[0], result)
    except InputError as error:
        result.open.append(("small files", error.what))
    return _findings(result, level)


def _findings(result: _Comparison, level: str) -> list[Finding]:
    findings = [Finding(level, "failed", file, text, rule="small-files") for file, text in result.wrong]
    if not findings and result.files:
        names = list(dict.fromkeys(result.files))
        text = f"small files say the same as {result.label}: {listed(names)}"
        findings.append(Finding(level, "ok", result.label, text, rule="small-files", part=f"small files (by {result.label})"))
    if result.open:
        names, texts = (list(dict.fromkeys(every)) for every in zip(*result.open, strict=True))
        text = f"not compared: {'; '.join(texts[:8])}" + (f"; and {len(texts) - 8} more" if len(texts) > 8 else "")
        what = ", ".join(names[:3]) + (f" and {len(names) - 3} more of small files" if len(names) > 3 else "")
        findings.append(Finding(level, "unchecked", result.label, text, rule="small-files", part=f"unchecked: {what}"))
    return findings


def _converted(original: Checkpoint, like: Checkpoint, tower: Checkpoint | None, result: _Comparison) -> Checkpoint:
    """`original` as a conversion to llava-hf with the options of `like` writes it; itself, for its text config alone, where that fails."""
    name = shown(original.origin.name)
    forms = {act: form for form, act in PROJECTOR_FORMS.items()}
    single = projector_type(map(canonical, original.tensors)) in ("linear", STACK_OF_ONE_TYPE)  # which alone have forms
    options: dict[str, Any] = {"vocab_size": table_rows(like) or None}
    target = TARGET_BY_TYPE.get(str(like.config.get("model_type")))
    options["lossy"] = bool(target and target.video and lost_tensors(original.parameters(), target.video.lost))
    options["projector_form"] = forms.get(str(like.config.get("projector_hidden_act"))) if single else None
    if tower is None and not any(canonical(name).startswith("tower.") for name in original.tensors):
        tower = _tower_of(like)
        text = f"`vision_config` and {shown(PREPROCESSOR)}: {name} holds no vision tower, and none was given"
        result.open.append(("the tower's settings", text))
    try:
        try:
            found = convert(original, "llava-hf", tower=tower, accept_tower=True, **options)
            return _as_deep(found, like, result) if result.open else found
        except InputError:  # the tower that it holds may need a config
            if tower is not None or (tower := _tower_of(like)) is None:
                raise
            found = convert(original, "llava-hf", tower=tower, accept_tower=True, **options)
            result.open.append(("the tower's settings", f"`vision_config`: nothing in {name} tells it"))
            return _as_deep(found, like, result)
    except (InputError, UsageError) as error:
        what = "all but the text model's config"
        result.open.append((what, f"{what}: {name} can't be converted, {error.what}"))
        result.text_only = True
        return original


def _as_deep(found: Checkpoint, like: Checkpoint, result: _Comparison) -> Checkpoint:
    """`found`, which has the tower of `like`, with its feature layer too where nobody knows whether that tower has all of its layers."""
    layer, vision = like.config.get("vision_feature_layer"), found.config["vision_config"]
    if not TOWER_BY_TYPE[vision["model_type"]].select or same_widths(vision["model_type"], vision) or layer not in (-1, -2):
        return found
    result.open.append(("the feature layer", f"`vision_feature_layer`: nothing in {result.label} tells how many layers its tower has"))
    return replace(found, config={**found.config, "vision_feature_layer": layer})


def _tower_of(checkpoint: Checkpoint) -> Checkpoint | None:
    """The vision tower in a llava-hf checkpoint as one of its own."""
    behind = {name: canonical(name).removeprefix("tower.") for name in checkpoint.tensors if canonical(name).startswith("tower.")}
    tensors = {f"vision_model.{short}": checkpoint.tensors[name] for name, short in behind.items()}
    config = checkpoint.config.get("vision_config")
    return replace(checkpoint, tensors=tensors, config=config, files={}, history=()) if tensors and isinstance(config, dict) else None


def _compare(checked: SmallFiles, reference: SmallFiles, result: _Comparison) -> None:
    if result.text_only:
        found, expected = ({k: v for k, v in _text(side).items() if k not in WRITTEN} for side in (checked, reference))
        result.values(
            CONFIG, {key: found[key] for key in found if key in expected}, {key: expected[key] for key in expected if key in found}
        )
        return
    if result.there(CONFIG, bool(checked.of(CONFIG)), bool(reference.of(CONFIG))):
        found, expected = _config(checked), _config(reference)
        if len({any(name.startswith("tower.") for name in side.tensors) for side in (checked, reference)}) > 1:
            for each in (found, expected):  # which tells a reader to keep the tower inside
                each.pop("unfreeze_mm_vision_tower", None)
        result.values(CONFIG, found, expected)
        _names(checked, reference, result)
    result.there(
        GENERATION_CONFIG, checked.has(GENERATION_CONFIG), reference.has(GENERATION_CONFIG), instead=True
    )  # values that are not the defaults differ below
    if checked.has(GENERATION_CONFIG) or reference.has(GENERATION_CONFIG):
        result.values(GENERATION_CONFIG, _generation(checked), _generation(reference))
    beside = reference.checkpoint.folders is not None  # in the tower's folder, where LLaVA's own code takes them from the tower it names
    if result.there(PREPROCESSOR, bool(image_settings(checked)), bool(image_settings(reference)), instead=beside):
        result.values(PREPROCESSOR, _preprocessor(image_settings(checked)), _preprocessor(image_settings(reference)))
    if result.there(PROCESSOR, checked.has(PROCESSOR), reference.has(PROCESSOR)):
        result.values(PROCESSOR, _processor(checked), _processor(reference))
    _templates(checked, reference, result)
    _tokenizer(checked, reference, result)


def _same(one: Any, other: Any) -> bool:
    """Equal JSON values; true is not 1, but 1 is 1.0."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


# --- config.json ----------------------------------------------------------------------------------------------------


def _text(side: SmallFiles) -> dict[str, Any]:
    """The decoder's config, whole."""
    flat = side.of(CONFIG)
    hub = isinstance(flat.get("text_config"), dict)
    given = flat_config(flat if hub else {"text_config": flat})
    decoder = known_decoder(given if hub else flat) or DECODERS[0]  # for what both sides leave out; the rules name an unknown one
    defaults = {**decoder.defaults, **UNSET_KEYS}
    text = {**defaults, **{key: value for key, value in given.items() if value is not None or key in defaults}}
    old = text.pop("max_sequence_length", None)  # its name before transformers 4.28
    if old is not None and given.get("max_position_embeddings") is None:
        text["max_position_embeddings"] = old
    heads = text.get("num_attention_heads")
    if text.get("num_key_value_heads") is None:
        text["num_key_value_heads"] = heads
    if text.get("head_dim") is None and type(heads) is int and type(text.get("hidden_size")) is int and heads > 0:
        text["head_dim"] = text["hidden_size"] // heads
    text["model_type"] = MODEL_TYPES.get(str(given.get("model_type")), given.get("model_type"))
    return {key: value for key, value in text.items() if not re.fullmatch(UNCOMPARED_KEYS, key)}


def _config(side: SmallFiles) -> dict[str, Any]:
    """Every setting, nested ones with the name of their part in front."""
    config = side.of(CONFIG)
    if side.checkpoint.layout != "llava-hf":
        return _text(side) if side.checkpoint.layout != "llava" else _text(side) | _filled(config, ORIGINAL_ASSUMED, keys=ORIGINAL_ASSUMED)
    text = _text(side)
    ids = {key: text[key] for key in IDS}
    defaults = side.target.defaults if side.target else TARGET_DEFAULTS
    top = {**config, "image_token_index": config.get("image_token_index", config.get("image_token_id", defaults["image_token_index"]))}
    top = {key: value for key, value in top.items() if key not in ("text_config", "vision_config", "image_token_id")}
    try:
        tower: dict[str, Any] = complete_config(vision(side.objects))
    except InputError:  # which the rules on one checkpoint say
        tower = dict(vision(side.objects))
    parts = {"text_config": text, "vision_config": tower}
    nested = {
        f"{part}.{key}": value for part, values in parts.items() for key, value in values.items() if not re.fullmatch(UNCOMPARED_KEYS, key)
    }
    return _filled(top, {**defaults, **UNSET_KEYS, **ids, "vocab_size": text["vocab_size"]}) | nested


def _filled(given: Values, defaults: Values, *, keys: Iterable[str] | None = None, ignored: str = UNCOMPARED_KEYS) -> dict[str, Any]:
    """`given` over the defaults, without nulls for keys that have no default; only `keys` if they are given."""
    whole = {**defaults, **{key: value for key, value in given.items() if value is not None or key in defaults}}
    wanted = whole if keys is None else {key: whole[key] for key in keys}
    return {key: value for key, value in wanted.items() if not re.fullmatch(ignored, key)}


def _names(checked: SmallFiles, reference: SmallFiles, result: _Comparison) -> None:
    """Keys that two writers spell differently, where both sides have them: the dtype, the tower by its last name."""

    def written(config: Values) -> dict[str, Any]:
        tower, text = config.get("mm_vision_tower"), config.get("text_config")
        every = {
            "dtype": _dtypes(config),
            "text_config.dtype": _dtypes(text) if isinstance(text, dict) else None,
            "mm_vision_tower": str(tower).rstrip("/").rpartition("/")[2].lower() if tower else None,
        }
        return {key: value for key, value in every.items() if value}

    result.common(CONFIG, written(checked.of(CONFIG)), written(reference.of(CONFIG)))


def _dtypes(config: Values) -> list[str]:
    """The dtype, under the key's name before or since transformers 4.56."""
    return sorted({str(config[key]).removeprefix("torch.") for key in ("dtype", "torch_dtype") if config.get(key)})


def _generation(side: SmallFiles) -> dict[str, Any]:
    """Without the file, programs take the ids of config.json."""
    text = _text(side)
    given = {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in side.of(GENERATION_CONFIG).items()}
    return _filled(given, {**GENERATION_ASSUMED, **{key: text[key] for key in IDS}, **UNSET_KEYS})


# --- the processor --------------------------------------------------------------------------------------------------


def _preprocessor(given: Values) -> dict[str, Any]:
    kind = str(given.get("image_processor_type") or given.get("feature_extractor_type") or "CLIPImageProcessor")
    row = next((row for row in TOWERS if kind.startswith(row.image_processor.removesuffix("ImageProcessor"))), TOWERS[0])
    defaults: dict[str, Any] = {
        **dict.fromkeys((*STEPS, "do_convert_rgb"), True), "do_pad": False, "do_center_crop": row.crops, "resample": 3,
        "rescale_factor": 1 / 255, "image_mean": list(row.pixels[0].mean), "image_std": list(row.pixels[0].std), "size": 224,
        "image_grid_pinpoints": None, **UNSET_KEYS,
    }  # fmt: skip
    whole = {**_filled(given, defaults, ignored=f"{UNCOMPARED_KEYS}|feature_extractor_type"), "image_processor_type": kind}
    whole["image_processor_type"] = re.sub("FeatureExtractor$", "ImageProcessor", kind.removesuffix("Fast"))
    for key in ("size", "crop_size"):  # a number is how 2022 wrote them
        if type(edge := whole.get(key)) is int:
            whole[key] = {"shortest_edge": edge} if key == "size" and row.crops else {"height": edge, "width": edge}
    return whole


def _processor(side: SmallFiles) -> dict[str, Any]:
    defaults = {
        "image_token": "<image>",
        "patch_size": None,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": None,
        **UNSET_KEYS,
    }
    given = {**side.of(PROCESSOR), "image_token": side.image_token}
    return _filled(given, defaults, ignored=f"{UNCOMPARED_KEYS}|image_processor|chat_template")


def _templates(checked: SmallFiles, reference: SmallFiles, result: _Comparison) -> None:
    """Every chat template of `checked` must be one of `reference`."""

    def every(side: SmallFiles) -> set[str]:
        places = [side.of(name).get("chat_template") for name in (CHAT_TEMPLATE, PROCESSOR, TOKENIZER_CONFIG)]
        try:
            places.append(small_text(side.checkpoint.files, JINJA))
        except InputError:  # which the rules on one checkpoint say
            places.append(None)
        return {str(text).rstrip("\n") for text in places if text}

    found, expected = every(checked), every(reference)
    if expected and not found:
        result.wrong.append((CHAT_TEMPLATE, f"there is no chat template, in {result.label} there is one"))
    elif expected and found - expected:
        result.wrong.append((CHAT_TEMPLATE, f"the chat template is not that of {result.label}"))
    elif found != expected:
        text = "a chat template here only" if not expected else f"one more chat template in {result.label}"
        result.open.append(("a chat template", text))
    elif found:
        result.files.append("chat template")
        for name in (CHAT_TEMPLATE, JINJA):
            result.there(name, checked.has(name), reference.has(name), instead=True)


# --- the tokenizer --------------------------------------------------------------------------------------------------


def _tokenizer(checked: SmallFiles, reference: SmallFiles, result: _Comparison) -> None:
    slow = checked.has(MODEL) or all(map(checked.has, BYTE_LEVEL))
    if result.there(FAST, checked.has(FAST), reference.has(FAST), instead=slow):
        derived = checked.checkpoint.layout == reference.checkpoint.layout == "llava" and checked.has(MODEL) and reference.has(MODEL)
        _fast(checked.of(FAST), reference.of(FAST), result, derived=derived)
    # LLaVA's own code asks for the slow tokenizer, transformers takes what there is.
    if result.there(MODEL, checked.has(MODEL), reference.has(MODEL), instead=checked.has(FAST) and checked.checkpoint.layout != "llava"):
        _pieces(checked.checkpoint, reference.checkpoint, result)
    for name in BYTE_LEVEL:
        both = result.there(name, checked.has(name), reference.has(name), instead=checked.has(FAST))
        same = both and (_bytes(checked.checkpoint, name) == _bytes(reference.checkpoint, name) or _is_json_alike(checked, reference, name))
        if both and not same:
            result.wrong.append((name, f"{shown(name)} is not that of {result.label}"))
    if not any(side.has(name) for side in (checked, reference) for name in TOKENIZER_FILES):
        return
    _added(checked, reference, result)
    for name in (ADDED, SPECIAL):  # their tokens are compared from whatever file lists them
        result.there(name, checked.has(name), reference.has(name), instead=True)
    result.values("special tokens", _roles(checked), _roles(reference))
    _more_special(checked, reference, result)
    found, expected = _named_roles(checked), _named_roles(reference)  # programs differ in which file they ask first
    for file in found.keys() & expected.keys():
        result.common(file, found[file], expected[file])
    meta = checked.checkpoint.origin.container == "meta"  # whose programs read none of these
    if result.there(TOKENIZER_CONFIG, checked.has(TOKENIZER_CONFIG), reference.has(TOKENIZER_CONFIG), instead=meta):
        result.values(TOKENIZER_CONFIG, _settings(checked), _settings(reference))
        _flags(TOKENIZER_CONFIG, _decoder(checked, reference), _decoder(reference, checked), result, result.wrong)
        result.common(TOKENIZER_CONFIG, _agreed_settings(checked), _agreed_settings(reference))


def _is_json_alike(checked: SmallFiles, reference: SmallFiles, name: str) -> bool:
    return name in checked.objects and checked.objects[name] == reference.objects.get(name)


def _fast(checked: Values, reference: Values, result: _Comparison, *, derived: bool) -> None:
    """tokenizer.json: vocabulary, merges, and the steps before and after. `derived`: it stands in for tokenizer.model, which LLaVA's own
    code reads, and other programs make other steps of that one."""
    told = result.open if derived else result.wrong
    found, expected = ({**value} if isinstance(value := core.get("model"), dict) else {} for core in (checked, reference))
    vocabularies = [_pairs(model.pop("vocab", None)) for model in (found, expected)]
    if vocabularies[0] != vocabularies[1]:
        result.wrong.append((FAST, f"{_differing(*vocabularies)} in the vocabulary of {shown(FAST)} and in {result.label}"))
    merges = [[tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) if isinstance(pair, list) else pair for pair in each]
              if isinstance(each := model.pop("merges", None), list) else each for model in (found, expected)]  # fmt: skip
    if merges[0] != merges[1]:
        result.wrong.append((FAST, f"the merges of {shown(FAST)} are not those of {result.label}"))
    unset = {"type": "BPE", "dropout": None, "unk_token": None, "ignore_merges": False, "byte_fallback": False, "fuse_unk": False}
    affixes = dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"))
    models = [
        {**unset, **affixes, **{key: value or None if key in affixes else value for key, value in model.items()}}
        for model in (found, expected)
    ]
    result.values(
        FAST, {f"model.{key}": value for key, value in models[0].items()}, {f"model.{key}": value for key, value in models[1].items()}
    )
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"):
        if not _same(checked.get(key), reference.get(key)):
            told.append((FAST, f"`{key}` of {shown(FAST)} is not that of {result.label}"))
    _flags(FAST, added_tokens(dict(checked)), added_tokens(dict(reference)), result, told)


def _flags(
    file: str, checked: Mapping[int, Values], reference: Mapping[int, Values], result: _Comparison, told: list[tuple[str, str]]
) -> None:
    """Added tokens by id, those of `reference`; new ones are for `_added`."""
    if odd := [i for i in reference if checked.get(i) != reference[i]]:
        names = listed(str(reference[i]["content"]) for i in odd)
        told.append((file, f"{names} of {result.label}: missing in {shown(file)}, or with another name or other flags"))


def _pairs(vocabulary: Any) -> Any:
    """A vocabulary as name -> id or score; Unigram models have a list of pairs."""
    if isinstance(vocabulary, list) and all(isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) for row in vocabulary):
        return {name: (i, score) for i, (name, score) in enumerate(vocabulary)}
    return vocabulary


def _differing(checked: Any, reference: Any) -> str:
    if not isinstance(checked, dict) or not isinstance(reference, dict):
        return "other tokens"
    names = [name for name in {**checked, **reference} if checked.get(name) != reference.get(name)]
    first = f"{shown(names[0])} {as_json(checked.get(names[0]))} and {as_json(reference.get(names[0]))}"
    return f"{len(names):,} tokens have other ids, as {first},"


def _pieces(checked: Checkpoint, reference: Checkpoint, result: _Comparison) -> None:
    one, other = _bytes(checked, MODEL), _bytes(reference, MODEL)
    result.files.append(MODEL)
    if one != other:
        try:
            same = read_sentencepiece(one) == read_sentencepiece(other)
        except InputError:  # which the rules on one checkpoint say
            same = False
        if not same:
            result.wrong.append((MODEL, f"the pieces of {shown(MODEL)} are not those of {result.label}"))


def _bytes(checkpoint: Checkpoint, name: str) -> bytes:
    return small_bytes(name, checkpoint.files[name], MODEL_LIMIT)


def _ids(side: SmallFiles) -> Mapping[str, int]:
    """The pieces of tokenizer.model."""
    try:
        return read_sentencepiece(_bytes(side.checkpoint, MODEL)).ids if side.has(MODEL) else {}
    except InputError:  # which the rules on one checkpoint say
        return {}


def _added(checked: SmallFiles, reference: SmallFiles, result: _Comparison) -> None:
    """Tokens behind the vocabulary, from whatever file lists them. One whose row is beyond `reference`'s table is new, and no fault."""
    every = [{**_ids(side), **side.tokens} for side in (checked, reference)]
    found, expected = (dict.fromkeys((name, i) for _, name, i in listings(side.objects)) for side in (checked, reference))
    for name, i in found:
        known = every[1].get(name)
        if known is None and not (reference.rows and i >= reference.rows):
            text = f"the added token {shown(name)} ({i}) is not in {result.label}"
            if reference.has(FAST) or reference.has(ADDED):  # which list such tokens
                result.wrong.append((ADDED, text))
            else:
                result.open.append((shown(name), text))
        elif known not in (None, i):
            result.wrong.append((ADDED, f"the added token {shown(name)} has the id {i}, in {result.label} {known}"))
    for name, i in expected:
        if name not in every[0]:
            result.wrong.append((ADDED, f"the added token {shown(name)} ({i}) of {result.label} is missing"))


def _more_special(checked: SmallFiles, reference: SmallFiles, result: _Comparison) -> None:
    """Tokens that a file calls special, beside those with a role: readers never split them, and leave them out of answers."""
    found, expected = _special(checked), _special(reference)
    for text in (found | expected) - (found & expected):
        side, without = (checked, reference) if text in found else (reference, checked)
        ids = {**_ids(side), **side.tokens}
        places = {file for file, name, _ in listings(without.objects) if name == text}
        if places == {ADDED}:  # which has no flags: the program that loads it may set them
            result.open.append((shown(text), f"whether {shown(text)} is a special token, which {ADDED} does not tell"))
        elif (
            text in expected or places or not (reference.rows and ids.get(text, -1) >= reference.rows)
        ):  # a new one: beyond `reference`'s table
            here, there = ("a special token", "none") if text in found else ("no special token", "one")
            result.wrong.append((SPECIAL, f"{shown(text)} is {here} here, in {result.label} it is {there}"))


def _special(side: SmallFiles) -> set[str]:
    lists: list[Any] = []
    for file in (TOKENIZER_CONFIG, SPECIAL):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            given = side.of(file).get(key)
            lists += given.values() if isinstance(given, dict) else given if isinstance(given, list) else []
    decoder = side.of(TOKENIZER_CONFIG).get("added_tokens_decoder")
    entries = [*(decoder.values() if isinstance(decoder, dict) else ()), *added_tokens(dict(side.of(FAST))).values()]
    lists += [entry for entry in entries if isinstance(entry, dict) and entry.get("special") is True]
    return {text for each in (*lists, *_roles(side).values()) if (text := token_text(each)) is not None}


def _decoder(side: SmallFiles, other: SmallFiles) -> dict[int, Values]:
    """`added_tokens_decoder` with its flags, where both sides have one: transformers before 4.34 wrote none."""
    entries = [each.of(TOKENIZER_CONFIG).get("added_tokens_decoder") for each in (side, other)]
    if not all(isinstance(each, dict) and each for each in entries):
        return {}
    return {
        int(key): added_token(text, entry)
        for key, entry in (entries[0] or {}).items()
        if key.isdecimal() and len(key) < 10 and isinstance(entry, dict) and (text := token_text(entry)) is not None
    }


def _named_roles(side: SmallFiles) -> dict[str, dict[str, str]]:
    """The special tokens that each file names."""
    texts = {
        file: {f"{role}_token": token_text(side.of(file).get(f"{role}_token")) for role in LLAMA_ROLES}
        for file in (TOKENIZER_CONFIG, SPECIAL)
    }
    return {file: {key: text for key, text in named.items() if text is not None} for file, named in texts.items()}


def _roles(side: SmallFiles) -> dict[str, str | None]:
    """The special tokens, from whatever file names them."""
    named = _named_roles(side)
    defaults = {f"{role}_token": text if side.is_llama else None for role, text in LLAMA_ROLES.items()}
    return {**defaults, **named[SPECIAL], **named[TOKENIZER_CONFIG]}


def _agreed_settings(side: SmallFiles) -> dict[str, Any]:
    """Settings that are compared only where both sides have them."""
    given = {key: side.of(TOKENIZER_CONFIG).get(key) for key in COMPARED_WHERE_BOTH}
    return {key: value for key, value in given.items() if value is not None and not (key == "model_max_length" and not is_length(value))}


def _settings(side: SmallFiles) -> dict[str, Any]:
    llama = {"add_bos_token": True, "add_eos_token": False, "add_prefix_space": True, "legacy": True} if side.is_llama else {}
    given = dict(side.of(TOKENIZER_CONFIG))
    if isinstance(given.get("tokenizer_class"), str):
        given["tokenizer_class"] = given["tokenizer_class"].removesuffix("Fast").lower()
    return _filled(given, {"split_special_tokens": False, **llama, **UNSET_KEYS}, ignored=UNCOMPARED_TOKENIZER_KEYS)
