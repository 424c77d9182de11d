"""A table of rules: do the files of a text model, or of a LLaVA in the original layout, agree with its tensors and with each other?

Sources: published configs and tokenizers of 2023, and how LLaVA's own code (c121f04) finds its vision tower.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..checkpoint.images import reads_newline
from ..checkpoint.tokenizer import FAST, MODEL, RIGHT_TOKENIZER, SPECIAL, TOKENIZER_CONFIG, token_text
from ..checkpoint.tower import named_tower
from ..families.layouts import VOCABULARY
from ..families.projectors import projector_type, projector_weights
from ..families.targets import TOWER_KEYS
from ..text import shown
from . import rules_tokenizer, rules_values
from .rules import CONFIG, GENERATION_CONFIG, Rule, SmallFiles, as_json, listings

REPAIR = "`llava-weights convert PATH --to llava-hf -o OUT` writes this anew"
SETTLE = "convert it with the right `--conv-mode`, which config.json then records"
REPAIR_ORIGINAL = "`llava-weights convert PATH --to llava -o OUT` repairs this"


def ids_in_table(s: SmallFiles) -> Iterator[str]:
    """Special ids that have no row in the embedding table."""
    text = s.of(CONFIG).get("text_config")
    for prefix, config in (("", s.of(CONFIG)), ("text_config.", text if isinstance(text, dict) else {})):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if type(value := config.get(key)) is int and value >= s.rows:
                yield f"`{prefix}{key}` is {value}, the embedding table has {s.rows:,} rows"


def misnamed_pad(s: SmallFiles) -> Iterator[str]:
    """A pad id of llava-hf that is not the tokenizer's."""
    pad = s.of(CONFIG).get("pad_token_id")
    if pad is not None and "pad" in s.ids and pad != s.ids["pad"]:
        yield f"`pad_token_id` is {as_json(pad)}, but the tokenizer pads with id {s.ids['pad']}"


def generation_ids(s: SmallFiles) -> Iterator[str]:
    """What generation_config.json says about special ids, against the tokenizer."""
    yield from _wrong_ids(s, GENERATION_CONFIG, ("bos", "eos", "pad"), needed=("eos",)) if s.has(GENERATION_CONFIG) else ()


def _wrong_ids(s: SmallFiles, file: str, roles: tuple[str, ...], needed: tuple[str, ...] = ()) -> Iterator[str]:
    for role in roles:
        value, true = s.of(file).get(f"{role}_token_id"), s.ids.get(role)
        right = {true, s.ids.get("unk")} if role == "pad" and s.checkpoint.layout != "llava-hf" else {true}
        given = value if isinstance(value, list) else [value]
        if true is not None and not right & {x for x in given if type(x) is int} and (value is not None or role in needed):
            yield f"`{role}_token_id` is {as_json(value)}, but the tokenizer's {role} is id {true}"


def tokenizer_missing(s: SmallFiles) -> Iterator[str]:
    """Nothing to make tokens with."""
    if not any(s.has(name) for name in (MODEL, FAST, "vocab.json")):
        yield f"there is no tokenizer: neither `{MODEL}` nor `{FAST}`"


def _beyond_table(s: SmallFiles) -> Iterator[str]:
    for name, i in sorted({(name, i) for _, name, i in listings(s.objects)}, key=lambda pair: pair[1]):
        if s.rows and i >= s.rows:
            yield f"{shown(name)} has the id {i}, but the embedding table has {s.rows:,} rows"


def _contradictions(s: SmallFiles) -> Iterator[str]:
    seen: dict[str, tuple[str, int]] = {}
    for file, name, i in listings(s.objects):
        first, known = seen.setdefault(name, (file, i))
        if known != i:
            yield f"{shown(name)} has the id {known} in `{first}`, but {i} in `{file}`"


def _role_names(s: SmallFiles) -> Iterator[str]:
    for file in (TOKENIZER_CONFIG, SPECIAL):
        bos, eos = (token_text(s.of(file).get(f"{role}_token")) for role in ("bos", "eos"))
        if "" in (bos, eos) or (bos == eos and bos is not None and s.ids.get("bos") != s.ids.get("eos")):
            yield f"`{file}` names {as_json(bos)} as bos and {as_json(eos)} as eos"


SHARED_RULES = (
    Rule("tokenizer", "every id has a row", _beyond_table, remedy=f"{RIGHT_TOKENIZER}; convert drops tokens without a row"),
    Rule("tokenizer", "one id for each token", _contradictions, remedy=RIGHT_TOKENIZER),
    Rule("tokenizer", "names of bos and eos", _role_names, "warning", "every llava-weights command that writes a model repairs this"),
    *rules_tokenizer.TOKENIZER_RULES,
)


# --- config.json of the original layout and of text models ----------------------------------------------------------


def _vocabulary(s: SmallFiles) -> Iterator[str]:
    rows = {
        name: s.tensors[part].rows
        for name, part in zip(VOCABULARY, ("text.embed_tokens.weight", "head.weight"), strict=True)
        if part in s.tensors
    }
    for name, count in rows.items():
        if s.of(CONFIG).get("vocab_size") != count:
            yield f"`vocab_size` is {as_json(s.of(CONFIG).get('vocab_size'))}, but `{name}` has {count:,} rows"


def _special_ids(s: SmallFiles) -> Iterator[str]:
    yield from _wrong_ids(s, CONFIG, ("bos", "eos", "pad"))


def _model_type(s: SmallFiles) -> Iterator[str]:
    kind, named = s.of(CONFIG).get("model_type"), s.of(CONFIG).get("architectures")
    if not str(kind).startswith("llava"):
        yield f"`model_type` is {as_json(kind)}: LLaVA's code after May 2023, and transformers, load it without projector and images"
    elif not any(str(name).startswith("Llava") for name in (named if isinstance(named, list) else ())):
        yield f"`architectures` is {as_json(named)}, no class of LLaVA"


def _projector(s: SmallFiles) -> Iterator[str]:
    weights, kind = projector_weights(s.tensors), projector_type(s.tensors)
    if not weights:
        return
    if (taken := s.of(CONFIG).get("mm_projector_type", "linear")) != kind:
        yield f"`mm_projector_type` is {as_json(s.of(CONFIG).get('mm_projector_type'))}, taken for {as_json(taken)}: the tensors are {kind}"
    *_, width = s.tensors[weights[0]].shape or (0,)
    if (size := s.of(CONFIG).get("mm_hidden_size")) != width:
        yield f"`mm_hidden_size` is {as_json(size)}, but the projector takes features of {width}"


def _tower_name(s: SmallFiles) -> Iterator[str]:
    beside = s.checkpoint.folders and s.checkpoint.folders.vision_config  # the tower has a folder of its own, and no code asks for a name
    if not beside and not any(isinstance(s.of(CONFIG).get(key), str) for key in TOWER_KEYS):
        yield "`mm_vision_tower` is missing: LLaVA's code then loads a text model without images"


def _tower_path(s: SmallFiles) -> Iterator[str]:
    key, named = next(((key, s.of(CONFIG)[key]) for key in TOWER_KEYS if isinstance(s.of(CONFIG).get(key), str)), ("", ""))
    if re.match(r"[./~\\]|[A-Za-z]:", named):
        yield f"`{key}` is a path on its author's machine, {shown(named)}"


def _tower_replaced(s: SmallFiles) -> Iterator[str]:
    count = sum(name.startswith("tower.") for name in s.tensors)
    if count and s.of(CONFIG).get("unfreeze_mm_vision_tower") is not True:
        yield (
            f"the checkpoint holds {count} tensors of a vision tower, but `unfreeze_mm_vision_tower` is not true: "
            f"LLaVA replaces them by {as_json(named_tower(s.of(CONFIG)) or None)} without a word, which is wrong if they were tuned"
        )


def _newline(s: SmallFiles) -> Iterator[str]:
    if reads_newline(s.of(CONFIG)) and "newline" not in s.tensors:
        kinds = ", ".join(f"`{key}` {as_json(s.of(CONFIG).get(key))}" for key in ("image_aspect_ratio", "mm_patch_merge_type"))
        yield f"{kinds}: LLaVA's code joins the tiles of an image with `model.image_newline`, which is in no file, and makes a random one"


def _old_keys(s: SmallFiles) -> Iterator[str]:
    if "max_sequence_length" in s.of(CONFIG) and "max_position_embeddings" not in s.of(CONFIG):
        yield "`max_sequence_length` is the name before transformers 4.28 of `max_position_embeddings`, which is missing"
    if "mm_use_im_patch_token" not in s.of(CONFIG) and "<im_patch>" not in s.tokens:
        yield "`mm_use_im_patch_token` is missing, which LLaVA's code takes for true: it adds a token and a row"


def _prompt(s: SmallFiles) -> Iterator[str]:
    """Other published families have a config like this one, and other prompts."""
    if (choice := s.prompt) and choice.rivals:
        yield choice.doubt


LLAMA_RULES = (
    Rule(CONFIG, "vocabulary", _vocabulary),
    Rule(CONFIG, "special ids", ids_in_table),
    Rule(CONFIG, "special ids", _special_ids),
    *rules_values.ANY_CONFIG,
    Rule(GENERATION_CONFIG, "special ids", generation_ids),
    *rules_values.GENERATING,
    Rule("tokenizer", "there", tokenizer_missing, "warning", RIGHT_TOKENIZER),
    *SHARED_RULES,
)
LLAVA_RULES = (
    Rule(CONFIG, "vocabulary", _vocabulary, remedy=REPAIR_ORIGINAL),
    Rule(CONFIG, "special ids", ids_in_table, remedy=REPAIR_ORIGINAL),
    Rule(CONFIG, "special ids", _special_ids, remedy=REPAIR_ORIGINAL),
    Rule(CONFIG, "model type", _model_type, "warning", REPAIR_ORIGINAL),
    Rule(CONFIG, "projector", _projector, remedy=REPAIR_ORIGINAL),
    Rule(CONFIG, "vision tower", _tower_name, remedy="name the CLIP that it was trained with in `mm_vision_tower`"),
    Rule(CONFIG, "vision tower", _tower_path, "warning", "convert with `--vision-tower`, or name the CLIP's repository there"),
    Rule(CONFIG, "vision tower", _tower_replaced, "warning", REPAIR_ORIGINAL),
    Rule(CONFIG, "image_newline", _newline, remedy="take the weights with it, or merge a LoRA onto the LLaVA that it was trained from"),
    Rule(CONFIG, "keys of 2023", _old_keys, "warning", REPAIR_ORIGINAL),
    Rule(CONFIG, "prompt", _prompt, "warning", SETTLE),
    *rules_values.ANY_CONFIG,
    *rules_values.ORIGINAL_CONFIG,
    Rule(GENERATION_CONFIG, "special ids", generation_ids, remedy=REPAIR_ORIGINAL),
    *rules_values.GENERATING,
    Rule("tokenizer", "there", tokenizer_missing, "warning", RIGHT_TOKENIZER),
    *SHARED_RULES,
    rules_tokenizer.BLANKS,
    *rules_values.IMAGES,
)
