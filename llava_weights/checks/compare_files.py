"""The small files of two checkpoints, by what they mean: two writers spell, order and leave out other things, and compute the same.

What a file leaves out is what its class assumes. A value that both sides say, or that one says and the other's class assumes, must be
the same; what only one side says and no table knows can't be compared, and is named. Keys of training, versions and paths are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
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
from ..checkpoint.tower import complete_config
from ..errors import InputError, UsageError
from ..families.decoders import DECODERS, LLAVA_DEFAULTS
from ..families.files import CONFIG_FILES, PROCESSOR_FILES, TOKENIZER_FILES
from ..families.layouts import canonical
from ..families.projectors import PROJECTOR_FORMS
from ..families.targets import TARGET_DEFAULTS
from ..families.towers import TOWERS
from ..findings import Finding
from ..text import listed, shown
from ..transforms.convert import convert
from .rules import CONFIG, PROCESSOR, Sidecars, listings, read_sidecars, said, vision
from .rules_llava_hf import JINJA, TEMPLATE
from .rules_original import GENERATION
from .rules_values import PREPROCESSOR, STEERING, image_settings

KNOWN = (*CONFIG_FILES, *TOKENIZER_FILES, *PROCESSOR_FILES)
# Keys that change nothing of what a finished model computes: versions, paths, training, memory.
IGNORED = (
    r"transformers_version|_name_or_path|name_or_path|_commit_hash|_from_model_config|use_cache|initializer_(range|factor)|.*dropout|"
    r"pretraining_tp|ignore_index|gradient_checkpointing|output_(attentions|hidden_states)|return_dict|use_return_dict|id2label|label2id|"
    r"(freeze|tune)_.*|.*_lr|projection_dim|vision_use_head|(torch_)?dtype|mm_vision_tower|vision_tower|unpadded_vocab_size"
)
# In tokenizer_config.json: of no effect on the ids of a text, or told by other files, which are compared.
TOKENIZER_IGNORED = (
    r"(?!add_).*_token|(?!split_).*_tokens|added_tokens_decoder|chat_template|processor_class|special_tokens_map_file|tokenizer_file|name_or_path|"
    r"model_max_length|max_length|(padding|truncation)_side|truncation_strategy|stride|pad_to_multiple_of|backend|is_local|"
    r"clean_up_tokenization_spaces|spaces_between_special_tokens|use_default_system_prompt|sp_model_kwargs|use_fast|model_input_names"
)
BYTE_LEVEL = ("vocab.json", "merges.txt")  # the slow tokenizer of Qwen 2
# How much of a text is read, on which side it is padded, how ids become text again: the default is another in each class and version.
HABITS = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "spaces_between_special_tokens")
# Compared where both sides say them: what stands there where one does not is the reader's choice.
BOTH = r"(.*\.)?(architectures|processor_class|feature_extractor_type)"
CODE = {"auto_map": None, "trust_remote_code": None, "_attn_implementation_internal": None, "quantization_config": None}
# What a conversion itself writes into the text model's config: names of classes, rows and the padding token.
WRITTEN = ("architectures", "model_type", "vocab_size", "pad_token_id")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What the classes assume (LlavaConfig and LlavaNextConfig of transformers 4.37 to 5.23; LLaVA's own code at c121f04).
HUB = {**TARGET_DEFAULTS, **CODE}
FLAT = {
    **LLAVA_DEFAULTS, "mm_projector_type": "linear", "mm_use_im_start_end": False, "mm_use_im_patch_token": True,
    "mm_patch_merge_type": "flat", "mm_vision_select_layer": -2, "unfreeze_mm_vision_tower": False, "image_grid_pinpoints": None,
}  # fmt: skip
MODEL_TYPES = {"llava_llama": "llava"}  # two names of one class in LLaVA's own code
# GenerationConfig of transformers 4.37 to 5.23.
SAMPLED = {
    **SAMPLING, **dict.fromkeys(STEERING), "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_length": 20,
    "max_new_tokens": None, "min_length": 0, "min_new_tokens": None, "early_stopping": False, "max_time": None, "stop_strings": None,
    "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0,
    "diversity_penalty": 0.0, "num_beam_groups": 1, "num_return_sequences": 1, "penalty_alpha": None, "guidance_scale": None, "min_p": None,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "renormalize_logits": False, "exponential_decay_length_penalty": None, "constraints": None,
    "force_words_ids": None, "watermarking_config": None, "remove_invalid_values": False, "dola_layers": None,
}  # fmt: skip
ROLES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": None}  # of a LLaMA's tokenizer

Said = Mapping[str, Any]


@dataclass
class _Compared:
    """What is found: sentences on what differs, names of what could not be compared, files that were."""

    label: str
    wrong: list[tuple[str, str]] = field(default_factory=list)  # file, sentence
    open: list[tuple[str, str]] = field(default_factory=list)  # in a word, sentence
    files: list[str] = field(default_factory=list)
    text_only: bool = False  # of the other side nothing but the text model's config is known

    def values(self, file: str, ours: Said, theirs: Said, told: Callable[[Any], str] = said) -> None:
        """Key by key."""
        self.files.append(file)
        for key in dict.fromkeys((*ours, *theirs)):
            if key in ours and key in theirs:
                if not _same(ours[key], theirs[key]):
                    self.wrong.append((file, f"`{key}` of {shown(file)} is {told(ours[key])}, in {self.label} it is {told(theirs[key])}"))
            elif (ours if key in ours else theirs)[key] is not None and not re.fullmatch(BOTH, key):
                self.open.append((shown(key), f"{shown(key)} of {shown(file)} {'here' if key in ours else f'in {self.label}'} only"))

    def there(self, file: str, ours: bool, theirs: bool, *, instead: bool = False) -> bool:
        """Whether both sides have the file. `instead`: its programs do without it, since another file here tells the same."""
        if theirs and not ours and not instead:
            self.wrong.append((file, f"{shown(file)} is in {self.label}, and is not here"))
        elif ours != theirs:
            self.open.append((shown(file), f"{shown(file)} {'here' if ours else f'in {self.label}'} only"))
        return ours and theirs


def compare_files(ours: Checkpoint, theirs: Checkpoint, label: str, level: str, *, tower: Checkpoint | None = None) -> list[Finding]:
    """Findings of `level` on the small files of `ours` beside those of `theirs`, which messages call `label`.

    Across the layouts llava and llava-hf, the original is converted first (`tower` serves it where it holds none). Raises nothing for
    what is damaged: the rules on one checkpoint say that.
    """
    if not (ours.config or ours.files) or not (theirs.config or theirs.files):
        if not (ours.config or ours.files):
            return []
        text = f"the small files were not compared: {label} has none"
        return [Finding(level, "unchecked", label, text, rule="small-files", part="small files not compared")]
    found = _Compared(label)
    if (ours.layout, theirs.layout) == ("llava-hf", "llava"):
        theirs = _converted(theirs, ours, tower, found)
    elif (ours.layout, theirs.layout) == ("llava", "llava-hf"):
        ours = _converted(ours, theirs, tower, found)
    mine, other = read_sidecars(ours)[0], read_sidecars(theirs)[0]
    try:
        _compare(mine, other, found)
    except InputError as error:
        found.open.append(("small files", error.what))
    return _findings(found, level)


def _findings(found: _Compared, level: str) -> list[Finding]:
    findings = [Finding(level, "failed", file, text, rule="small-files") for file, text in found.wrong]
    if not findings and found.files:
        names = list(dict.fromkeys(found.files))
        text = f"small files say the same as {found.label}: {listed(names)}"
        findings.append(Finding(level, "ok", found.label, text, rule="small-files", part=f"small files (by {found.label})"))
    if found.open:
        names, texts = (list(dict.fromkeys(every)) for every in zip(*found.open, strict=True))
        text = f"not compared: {'; '.join(texts[:8])}" + (f"; and {len(texts) - 8} more" if len(texts) > 8 else "")
        what = ", ".join(names[:3]) + (f" and {len(names) - 3} more of small files" if len(names) > 3 else "")
        findings.append(Finding(level, "unchecked", found.label, text, rule="small-files", part=f"unchecked: {what}"))
    return findings


def _converted(original: Checkpoint, like: Checkpoint, tower: Checkpoint | None, found: _Compared) -> Checkpoint:
    """`original` as the converter would write it for llava-hf, with the options of `like`; cut to the text model's config if it can't."""
    name = shown(original.origin.name)
    forms = {act: form for form, act in PROJECTOR_FORMS.items()}
    rows = next((tensor.rows for name, tensor in like.tensors.items() if canonical(name) == "text.embed_tokens.weight"), None)
    single = any(canonical(name) == "projector.weight" for name in original.tensors)  # which alone has forms
    options: dict[str, Any] = {"vocab_size": rows}
    options["projector_form"] = forms.get(str(like.config.get("projector_hidden_act"))) if single else None
    if tower is None and not any(canonical(name).startswith("tower.") for name in original.tensors):
        tower = _tower_of(like)
        text = f"`vision_config` and {shown(PREPROCESSOR)}: {name} holds no vision tower, and none was given"
        found.open.append(("the tower's settings", text))
    try:
        try:
            return convert(original, "llava-hf", tower=tower, accept_tower=True, **options)
        except InputError:  # the tower that it holds may need a config
            if tower is not None or (tower := _tower_of(like)) is None:
                raise
            result = convert(original, "llava-hf", tower=tower, accept_tower=True, **options)
            found.open.append(("the tower's settings", f"`vision_config`: nothing in {name} tells it"))
            return result
    except (InputError, UsageError) as error:
        what = "all but the text model's config"
        found.open.append((what, f"{what}: {name} can't be converted, {error.what}"))
        found.text_only = True
        return original


def _tower_of(checkpoint: Checkpoint) -> Checkpoint | None:
    """The vision tower in a llava-hf checkpoint as one of its own."""
    behind = {name: canonical(name).removeprefix("tower.") for name in checkpoint.tensors if canonical(name).startswith("tower.")}
    tensors = {f"vision_model.{short}": checkpoint.tensors[name] for name, short in behind.items()}
    config = checkpoint.config.get("vision_config")
    return replace(checkpoint, tensors=tensors, config=config, files={}, history=()) if tensors and isinstance(config, dict) else None


def _compare(ours: Sidecars, theirs: Sidecars, found: _Compared) -> None:
    if found.text_only:
        mine, other = ({k: v for k, v in _text(side).items() if k not in WRITTEN} for side in (ours, theirs))
        found.values(CONFIG, {key: mine[key] for key in mine if key in other}, {key: other[key] for key in other if key in mine})
        return
    if found.there(CONFIG, bool(ours.of(CONFIG)), bool(theirs.of(CONFIG))):
        mine, other = _config(ours), _config(theirs)
        if len({any(name.startswith("tower.") for name in side.parts) for side in (ours, theirs)}) > 1:
            for each in (mine, other):  # which says whether the tower inside is to be kept
                each.pop("unfreeze_mm_vision_tower", None)
        found.values(CONFIG, mine, other)
        _names(ours, theirs, found)
    found.there(GENERATION, ours.has(GENERATION), theirs.has(GENERATION), instead=True)  # values that are not the defaults differ below
    if ours.has(GENERATION) or theirs.has(GENERATION):
        found.values(GENERATION, _generation(ours), _generation(theirs))
    if found.there(PREPROCESSOR, bool(image_settings(ours)), bool(image_settings(theirs))):
        found.values(PREPROCESSOR, _preprocessor(image_settings(ours)), _preprocessor(image_settings(theirs)))
    if found.there(PROCESSOR, ours.has(PROCESSOR), theirs.has(PROCESSOR)):
        found.values(PROCESSOR, _processor(ours), _processor(theirs))
    _templates(ours, theirs, found)
    _tokenizer(ours, theirs, found)


def _same(one: Any, other: Any) -> bool:
    """Equal JSON values; true is not 1, but 1 is 1.0."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


# --- config.json ----------------------------------------------------------------------------------------------------


def _text(side: Sidecars) -> dict[str, Any]:
    """The decoder's config, whole."""
    flat = side.of(CONFIG)
    hub = isinstance(flat.get("text_config"), dict)
    given = flat_config(flat if hub else {"text_config": flat})
    decoder = known_decoder(given if hub else flat) or DECODERS[0]  # for what both sides leave out; the rules name an unknown one
    defaults = {**decoder.defaults, **CODE}
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
    return {key: value for key, value in text.items() if not re.fullmatch(IGNORED, key)}


def _config(side: Sidecars) -> dict[str, Any]:
    """Every setting, nested ones with the name of their part in front."""
    config = side.of(CONFIG)
    if side.checkpoint.layout != "llava-hf":
        return _text(side) if side.checkpoint.layout != "llava" else _text(side) | _filled(config, FLAT, keys=FLAT)
    text = _text(side)
    ids = {key: text[key] for key in IDS}
    top = {
        **config,
        "image_token_index": config.get("image_token_index", config.get("image_token_id", TARGET_DEFAULTS["image_token_index"])),
    }
    top = {key: value for key, value in top.items() if key not in ("text_config", "vision_config", "image_token_id")}
    try:
        tower: dict[str, Any] = complete_config(vision(side.objects))
    except InputError:  # which the rules on one checkpoint say
        tower = dict(vision(side.objects))
    parts = {"text_config": text, "vision_config": tower}
    nested = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items() if not re.fullmatch(IGNORED, key)}
    return _filled(top, {**HUB, **ids, "vocab_size": text["vocab_size"]}) | nested


def _filled(given: Said, defaults: Said, *, keys: Iterable[str] | None = None, ignored: str = IGNORED) -> dict[str, Any]:
    """`given` over the defaults, a null that no default knows left out, and cut to `keys` if they are given."""
    whole = {**defaults, **{key: value for key, value in given.items() if value is not None or key in defaults}}
    wanted = whole if keys is None else {key: whole[key] for key in keys}
    return {key: value for key, value in wanted.items() if not re.fullmatch(ignored, key)}


def _names(ours: Sidecars, theirs: Sidecars, found: _Compared) -> None:
    """Keys that two writers spell differently, where both sides have them: the dtype, the tower by its last name."""

    def told(config: Said) -> dict[str, Any]:
        tower, text = config.get("mm_vision_tower"), config.get("text_config")
        every = {
            "dtype": _dtypes(config),
            "text_config.dtype": _dtypes(text) if isinstance(text, dict) else None,
            "mm_vision_tower": str(tower).rstrip("/").rpartition("/")[2].lower() if tower else None,
        }
        return {key: value for key, value in every.items() if value}

    mine, other = told(ours.of(CONFIG)), told(theirs.of(CONFIG))
    both = mine.keys() & other.keys()
    found.values(CONFIG, {key: mine[key] for key in mine if key in both}, {key: other[key] for key in both})


def _dtypes(config: Said) -> list[str]:
    """What the key says, under its name before and since transformers 4.56."""
    return sorted({str(config[key]).removeprefix("torch.") for key in ("dtype", "torch_dtype") if config.get(key)})


def _generation(side: Sidecars) -> dict[str, Any]:
    """Without the file, programs take the ids of config.json."""
    text = _text(side)
    given = {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in side.of(GENERATION).items()}
    return _filled(given, {**SAMPLED, **{key: text[key] for key in IDS}, **CODE})


# --- the processor --------------------------------------------------------------------------------------------------


def _preprocessor(given: Said) -> dict[str, Any]:
    kind = str(given.get("image_processor_type") or given.get("feature_extractor_type") or "CLIPImageProcessor")
    row = next((row for row in TOWERS if kind.startswith(row.image_processor.removesuffix("ImageProcessor"))), TOWERS[0])
    defaults: dict[str, Any] = {
        **dict.fromkeys((*STEPS, "do_convert_rgb"), True), "do_pad": False, "do_center_crop": row.crops, "resample": 3,
        "rescale_factor": 1 / 255, "image_mean": list(row.pixels[0].mean), "image_std": list(row.pixels[0].std), "size": 224,
        "image_grid_pinpoints": None, **CODE,
    }  # fmt: skip
    whole = {**_filled(given, defaults, ignored=f"{IGNORED}|feature_extractor_type"), "image_processor_type": kind}
    whole["image_processor_type"] = re.sub("FeatureExtractor$", "ImageProcessor", kind.removesuffix("Fast"))
    for key in ("size", "crop_size"):  # a number is how 2022 wrote them
        if type(edge := whole.get(key)) is int:
            whole[key] = {"shortest_edge": edge} if key == "size" and row.crops else {"height": edge, "width": edge}
    return whole


def _processor(side: Sidecars) -> dict[str, Any]:
    defaults = {
        "image_token": "<image>",
        "patch_size": None,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": None,
        **CODE,
    }
    given = {**side.of(PROCESSOR), "image_token": side.image_token}
    return _filled(given, defaults, ignored=f"{IGNORED}|image_processor|chat_template")


def _templates(ours: Sidecars, theirs: Sidecars, found: _Compared) -> None:
    """Every chat template of ours must be one of theirs."""

    def every(side: Sidecars) -> set[str]:
        places = [side.of(name).get("chat_template") for name in (TEMPLATE, PROCESSOR, TOKENIZER_CONFIG)]
        try:
            places.append(small_text(side.checkpoint.files, JINJA))
        except InputError:  # which the rules on one checkpoint say
            places.append(None)
        return {str(text).rstrip("\n") for text in places if text}

    mine, other = every(ours), every(theirs)
    if other and not mine:
        found.wrong.append((TEMPLATE, f"there is no chat template, in {found.label} there is one"))
    elif other and mine - other:
        found.wrong.append((TEMPLATE, f"the chat template is not that of {found.label}"))
    elif mine != other:
        text = "a chat template here only" if not other else f"one more chat template in {found.label}"
        found.open.append(("a chat template", text))
    elif mine:
        found.files.append("chat template")
        for name in (TEMPLATE, JINJA):
            found.there(name, ours.has(name), theirs.has(name), instead=True)


# --- the tokenizer --------------------------------------------------------------------------------------------------


def _tokenizer(ours: Sidecars, theirs: Sidecars, found: _Compared) -> None:
    slow = ours.has(MODEL) or all(map(ours.has, BYTE_LEVEL))
    if found.there(FAST, ours.has(FAST), theirs.has(FAST), instead=slow):
        _fast(ours.of(FAST), theirs.of(FAST), found)
    # LLaVA's own code asks for the slow tokenizer, transformers takes what there is.
    if found.there(MODEL, ours.has(MODEL), theirs.has(MODEL), instead=ours.has(FAST) and ours.checkpoint.layout != "llava"):
        _pieces(ours.checkpoint, theirs.checkpoint, found)
    for name in BYTE_LEVEL:
        both = found.there(name, ours.has(name), theirs.has(name), instead=ours.has(FAST))
        same = both and (_bytes(ours.checkpoint, name) == _bytes(theirs.checkpoint, name) or _is_json_alike(ours, theirs, name))
        if both and not same:
            found.wrong.append((name, f"{shown(name)} is not that of {found.label}"))
    if not any(side.has(name) for side in (ours, theirs) for name in TOKENIZER_FILES):
        return
    _added(ours, theirs, found)
    for name in (ADDED, SPECIAL):  # what they tell is compared from whatever file tells it
        found.there(name, ours.has(name), theirs.has(name), instead=True)
    found.values("special tokens", _roles(ours), _roles(theirs))
    _more_special(ours, theirs, found)
    mine, other = _named_roles(ours), _named_roles(theirs)  # programs differ in which file they ask first
    for file in mine.keys() & other.keys():
        found.values(file, {key: mine[file][key] for key in mine[file] if key in other[file]},
                     {key: other[file][key] for key in other[file] if key in mine[file]})  # fmt: skip
    meta = ours.checkpoint.origin.container == "meta"  # whose programs read none of these
    if found.there(TOKENIZER_CONFIG, ours.has(TOKENIZER_CONFIG), theirs.has(TOKENIZER_CONFIG), instead=meta):
        found.values(TOKENIZER_CONFIG, _settings(ours), _settings(theirs))
        _flags(TOKENIZER_CONFIG, _decoder(ours, theirs), _decoder(theirs, ours), found)
        mine, other = _habits(ours), _habits(theirs)
        found.values(TOKENIZER_CONFIG, {key: mine[key] for key in mine if key in other}, {key: other[key] for key in other if key in mine})


def _is_json_alike(ours: Sidecars, theirs: Sidecars, name: str) -> bool:
    return name in ours.objects and ours.objects[name] == theirs.objects.get(name)


def _fast(ours: Said, theirs: Said, found: _Compared) -> None:
    """tokenizer.json: vocabulary, merges, and the steps before and after."""
    mine, other = ({**value} if isinstance(value := core.get("model"), dict) else {} for core in (ours, theirs))
    vocabularies = [_pairs(model.pop("vocab", None)) for model in (mine, other)]
    if vocabularies[0] != vocabularies[1]:
        found.wrong.append((FAST, f"{_differing(*vocabularies)} in the vocabulary of {shown(FAST)} and in {found.label}"))
    merges = [[tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) if isinstance(pair, list) else pair for pair in each]
              if isinstance(each := model.pop("merges", None), list) else each for model in (mine, other)]  # fmt: skip
    if merges[0] != merges[1]:
        found.wrong.append((FAST, f"the merges of {shown(FAST)} are not those of {found.label}"))
    unset = {"type": "BPE", "dropout": None, "unk_token": None, "ignore_merges": False, "byte_fallback": False, "fuse_unk": False}
    affixes = dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"))
    models = [
        {**unset, **affixes, **{key: value or None if key in affixes else value for key, value in model.items()}} for model in (mine, other)
    ]
    found.values(
        FAST, {f"model.{key}": value for key, value in models[0].items()}, {f"model.{key}": value for key, value in models[1].items()}
    )
    steps = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    for key in steps:
        if not _same(ours.get(key), theirs.get(key)):
            found.wrong.append((FAST, f"`{key}` of {shown(FAST)} is not that of {found.label}"))
    _flags(FAST, added_tokens(dict(ours)), added_tokens(dict(theirs)), found)


def _flags(file: str, ours: Mapping[int, Said], theirs: Mapping[int, Said], found: _Compared) -> None:
    """Added tokens by id; new ones are judged elsewhere."""
    if odd := [i for i in theirs if ours.get(i) != theirs[i]]:
        names = listed(str(theirs[i]["content"]) for i in odd)
        found.wrong.append((file, f"{names} of {found.label}: missing in {shown(file)}, or with another name or other flags"))


def _pairs(vocabulary: Any) -> Any:
    """A vocabulary as name -> id or score; Unigram models have a list of pairs."""
    if isinstance(vocabulary, list) and all(isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) for row in vocabulary):
        return {name: (i, score) for i, (name, score) in enumerate(vocabulary)}
    return vocabulary


def _differing(ours: Any, theirs: Any) -> str:
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return "other tokens"
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    first = f"{shown(names[0])} {said(ours.get(names[0]))} and {said(theirs.get(names[0]))}"
    return f"{len(names):,} tokens have other ids, as {first},"


def _pieces(ours: Checkpoint, theirs: Checkpoint, found: _Compared) -> None:
    one, other = _bytes(ours, MODEL), _bytes(theirs, MODEL)
    found.files.append(MODEL)
    if one != other:
        try:
            same = read_sentencepiece(one) == read_sentencepiece(other)
        except InputError:  # which the rules on one checkpoint say
            same = False
        if not same:
            found.wrong.append((MODEL, f"the pieces of {shown(MODEL)} are not those of {found.label}"))


def _bytes(checkpoint: Checkpoint, name: str) -> bytes:
    return small_bytes(name, checkpoint.files[name], MODEL_LIMIT)


def _ids(side: Sidecars) -> Mapping[str, int]:
    """The pieces of tokenizer.model."""
    try:
        return read_sentencepiece(_bytes(side.checkpoint, MODEL)).ids if side.has(MODEL) else {}
    except InputError:  # which the rules on one checkpoint say
        return {}


def _added(ours: Sidecars, theirs: Sidecars, found: _Compared) -> None:
    """Tokens behind the vocabulary, from whatever file lists them. A new one is no fault where it has a row that theirs lacks."""
    every = [{**_ids(side), **side.tokens} for side in (ours, theirs)]
    mine, other = (dict.fromkeys((name, i) for _, name, i in listings(side.objects)) for side in (ours, theirs))
    for name, i in mine:
        known = every[1].get(name)
        if known is None and not (theirs.rows and i >= theirs.rows):
            text = f"the added token {shown(name)} ({i}) is not in {found.label}"
            if theirs.has(FAST) or theirs.has(ADDED):  # which list such tokens
                found.wrong.append((ADDED, text))
            else:
                found.open.append((shown(name), text))
        elif known not in (None, i):
            found.wrong.append((ADDED, f"the added token {shown(name)} has the id {i}, in {found.label} {known}"))
    for name, i in other:
        if name not in every[0]:
            found.wrong.append((ADDED, f"the added token {shown(name)} ({i}) of {found.label} is missing"))


def _more_special(ours: Sidecars, theirs: Sidecars, found: _Compared) -> None:
    """Tokens that a file calls special beside those with a role: cut out of every text before it is split, and left out of answers."""
    mine, other = _special(ours), _special(theirs)
    for text in (mine | other) - (mine & other):
        side, without = (ours, theirs) if text in mine else (theirs, ours)
        ids = {**_ids(side), **side.tokens}
        places = {file for file, name, _ in listings(without.objects) if name == text}
        if places == {ADDED}:  # which has no flags: the program that loads it may set them
            found.open.append((shown(text), f"whether {shown(text)} is a special token, which {ADDED} does not tell"))
        elif text in other or places or not (theirs.rows and ids.get(text, -1) >= theirs.rows):  # a new one has a row that theirs lacks
            here, there = ("a special token", "none") if text in mine else ("no special token", "one")
            found.wrong.append((SPECIAL, f"{shown(text)} is {here} here, in {found.label} it is {there}"))


def _special(side: Sidecars) -> set[str]:
    lists: list[Any] = []
    for file in (TOKENIZER_CONFIG, SPECIAL):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            given = side.of(file).get(key)
            lists += given.values() if isinstance(given, dict) else given if isinstance(given, list) else []
    decoder = side.of(TOKENIZER_CONFIG).get("added_tokens_decoder")
    entries = [*(decoder.values() if isinstance(decoder, dict) else ()), *added_tokens(dict(side.of(FAST))).values()]
    lists += [entry for entry in entries if isinstance(entry, dict) and entry.get("special") is True]
    return {text for each in (*lists, *_roles(side).values()) if (text := token_text(each)) is not None}


def _decoder(side: Sidecars, other: Sidecars) -> dict[int, Said]:
    """`added_tokens_decoder` with its flags, where both sides have one: transformers before 4.34 wrote none."""
    entries = [each.of(TOKENIZER_CONFIG).get("added_tokens_decoder") for each in (side, other)]
    if not all(isinstance(each, dict) and each for each in entries):
        return {}
    return {
        int(key): added_token(text, entry)
        for key, entry in (entries[0] or {}).items()
        if key.isdecimal() and len(key) < 10 and isinstance(entry, dict) and (text := token_text(entry)) is not None
    }


def _named_roles(side: Sidecars) -> dict[str, dict[str, str]]:
    """The special tokens that each file names."""
    texts = {
        file: {f"{role}_token": token_text(side.of(file).get(f"{role}_token")) for role in ROLES} for file in (TOKENIZER_CONFIG, SPECIAL)
    }
    return {file: {key: text for key, text in named.items() if text is not None} for file, named in texts.items()}


def _roles(side: Sidecars) -> dict[str, str | None]:
    """The special tokens, from whatever file names them."""
    named = _named_roles(side)
    defaults = {f"{role}_token": text if side.is_llama else None for role, text in ROLES.items()}
    return {**defaults, **named[SPECIAL], **named[TOKENIZER_CONFIG]}


def _habits(side: Sidecars) -> dict[str, Any]:
    """Settings that are compared where both sides say them."""
    given = {key: side.of(TOKENIZER_CONFIG).get(key) for key in HABITS}
    return {key: value for key, value in given.items() if value is not None and not (key == "model_max_length" and not is_length(value))}


def _settings(side: Sidecars) -> dict[str, Any]:
    llama = {"add_bos_token": True, "add_eos_token": False, "add_prefix_space": True, "legacy": True} if side.is_llama else {}
    given = dict(side.of(TOKENIZER_CONFIG))
    if isinstance(given.get("tokenizer_class"), str):
        given["tokenizer_class"] = given["tokenizer_class"].removesuffix("Fast").lower()
    return _filled(given, {"split_special_tokens": False, **llama, **CODE}, ignored=TOKENIZER_IGNORED)
