"""config.json and generation_config.json of a checkpoint in the original layout: repaired, and checked against the tensors.

The published configs of 2023 have wrong ids (bos 0, eos 1, pad -1), old key names and a `model_type` that later code does not
recognise as a LLaVA (LLaVA #213, #15). A config that contradicts the shapes of the tensors is an error, never repaired by guessing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import InputError
from ..families.decoders import DECODER_BY_TYPE, DECODERS, LLAMA_SIZES, LLAVA_DEFAULTS, Decoder
from ..families.layouts import DROPPED, MULTIMODAL, VOCABULARY, canonical
from ..families.projectors import projector_type, projector_weights
from ..families.shapes import MAX_LAYERS, length
from ..tensors.dtypes import TORCH_DTYPE
from ..text import few, listed, shown, unquoted
from .rope import PARAMETERS, check_rope, plain_rope
from .small_files import RIGHT_CONFIG
from .tokenizer import SpecialIds

Shapes = Mapping[str, tuple[int, ...]]

# Keys that make a reader run code, download, or load other weights; and every key that starts with `_`.
REFUSED = r"_.*|auto_map|trust_remote_code|quantization_config|attn_implementation.*"
QUANTIZATION = "quantization_config"
NESTED = ("rope_scaling", "rope_parameters")
# Written where they are missing.
FILLED = ("hidden_act", "hidden_activation", "max_position_embeddings", "rms_norm_eps", "layer_norm_eps", "tie_word_embeddings")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# What generation_config.json may hold besides the ids: type, least value (itself excluded for fractions), greatest.
GENERATION_SETTINGS = {
    "do_sample": (bool, 0, 1), "max_length": (int, 1, 1 << 24), "max_new_tokens": (int, 1, 1 << 24), "num_beams": (int, 1, 1024),
    "repetition_penalty": (float, 0, 100), "temperature": (float, 0, 100), "top_k": (int, 0, 1 << 24), "top_p": (float, 0, 1),
    "typical_p": (float, 0, 1), "use_cache": (bool, 0, 1),
}  # fmt: skip
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0}  # the values at which they need no `do_sample`


def repair_config(
    config: Mapping[str, Any], *, shapes: Shapes, special_ids: SpecialIds, dtype: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config that fits the merged tensors, keys sorted, and a sentence for each thing changed or noticed.

    `shapes` are those of the merged checkpoint in the original layout, `dtype` is spelled as safetensors does. Raises
    InputError where the config contradicts the tensors, or lacks a size that no tensor shows.
    """
    new, notes = _plain(config)
    notes += _repair_ids(new, special_ids, _shape(shapes, VOCABULARY[0], 2)[0])
    if "max_sequence_length" in new:  # its name before transformers 4.28
        old = new.pop("max_sequence_length")
        if new.get("max_position_embeddings") is None:
            new["max_position_embeddings"] = old
        notes.append(f"config: `max_sequence_length` {_text(old)} -> `max_position_embeddings` {_text(new['max_position_embeddings'])}")
    projector = any(canonical(name).startswith("projector.") for name in shapes)
    kind = _kind(new, projector)
    decoder = decoder_of({**new, **kind})
    notes += _older_words(new, decoder)
    changes: dict[str, Any] = {key: decoder.defaults[key] for key in FILLED if decoder.defaults.get(key) is not None}
    changes |= LLAVA_DEFAULTS if projector else {}
    changes = {key: value for key, value in changes.items() if new.get(key) is None}
    changes |= dict.fromkeys(["torch_dtype", "dtype"] if "dtype" in new else ["torch_dtype"], TORCH_DTYPE[dtype])
    changes |= {"tie_word_embeddings": False} if VOCABULARY[1] in shapes else {}
    changes |= _facts(new, shapes, decoder) | kind | (_multimodal(new, shapes, special_ids) if projector else {})
    notes += _apply(new, changes)
    _check_numbers(new)
    tower = new.get("mm_vision_tower")
    if isinstance(tower, str) and re.match(r"[./~\\]|[A-Za-z]:", tower):
        notes.append(f"config: `mm_vision_tower` is a path on its author's machine, {shown(tower)}: kept")
    return dict(sorted(new.items())), tuple(notes)


def repair_generation_config(
    generation: Mapping[str, Any] | None, special_ids: SpecialIds, *, config: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A generation config with the true ids and the valid sampling settings: transformers refuses to save others (LLaVA #1406).

    It has the ids alone where `generation` is None or empty: without a file, transformers 5 never stops at eos. A list of eos that holds
    the true one stays, and so does an id that no tokenizer file tells; `config`, the text model's, tells what is missing.
    """
    given, told = generation or {}, config or {}
    ids = {}
    for key, true in zip(IDS, (special_ids.bos, special_ids.eos, special_ids.pad), strict=True):
        if (value := _true_id(key, true, given, told)) is not None:
            ids[key] = value
    shown_ids = [ids.get(key) for key in IDS]
    if not generation:
        return ids, (f"generation_config: written with bos/eos/pad ids {_joined(shown_ids)}",)
    new = {
        key: value
        for key, value in generation.items()
        if key in ids or (key in GENERATION_SETTINGS and sensible(value, *GENERATION_SETTINGS[key]))
    }
    gone = [key for key in generation if key not in new]
    notes = [f"generation_config: dropped {listed(gone)}"] if gone else []
    if [new.get(key) for key in IDS] != shown_ids:
        notes.append(f"generation_config: bos/eos/pad ids {_joined(new.get(key) for key in IDS)} -> {_joined(shown_ids)}")
    needs = [key for key, default in SAMPLING.items() if new.get(key, default) != default]
    if needs and new.get("do_sample") is not True:
        new["do_sample"] = True
        notes.append(f"generation_config: `do_sample` -> true, {listed(needs)} means nothing without it")
    return dict(sorted({**new, **ids}.items())), tuple(notes)


def _true_id(key: str, true: int | None, *sources: Mapping[str, Any]) -> Any:
    """The id of a role: `true`, or the first list of eos that holds it and whose ids have rows; what the sources say where it is None."""
    said = [value for source in sources if (value := source.get(key)) is not None]
    if true is None:
        return next(iter(said), None)
    rows = next((source["vocab_size"] for source in sources if type(source.get("vocab_size")) is int), 1 << 31)
    if key == "eos_token_id" and said and said[0] != true:
        return next((value for value in said if _holds(value, true, rows)), true)
    return true


def _holds(value: Any, true: int, rows: int) -> bool:
    return isinstance(value, list) and true in value and all(type(i) is int and 0 <= i < rows for i in value)


def decoder_of(config: Mapping[str, Any]) -> Decoder:
    """The decoder that `model_type` and `architectures` name.

    Raises InputError, by name, for a decoder that no row describes, and for a config that names none.
    """
    found = known_decoder(config)
    if found is None:
        facts = {key: shown(str(config[key])) for key in ("model_type", "architectures") if config.get(key) is not None}
        known = ", ".join(row.model_type for row in DECODERS)
        if not _named(config):
            raise InputError("config.json does not say what the decoder is: `model_type` is missing", hint=RIGHT_CONFIG)
        name = next((name for name in _named(config) if not _rows(name)), "several decoders at once")
        raise InputError(f"no decoder is known by the name of {shown(name)}", facts=facts, hint=f"decoders that are known: {known}")
    return found


def known_decoder(config: Mapping[str, Any]) -> Decoder | None:
    """As `decoder_of`, but None where the config names none, or no decoder has all the names that it gives."""
    named = _named(config)
    rows = [_rows(name) for name in named]
    fitting = (row for row in DECODERS if named and all(row in known for known in rows))
    return next((row for row in fitting if not row.mark or row.mark in config or config.get("model_type") == row.model_type), None)


def _named(config: Mapping[str, Any]) -> list[str]:
    """Every name by which a flat config says what its decoder is."""
    given = config.get("architectures")
    named = [config.get("model_type"), *(given if isinstance(given, list) else [given])]
    return [name for name in named if isinstance(name, str) and name]


def _rows(name: str) -> list[Decoder]:
    return [row for row in DECODERS if name in row.types or name in row.architectures]


def sizes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with every size that a shape is made of.

    Raises InputError for a size that is missing or absurd, and as `decoder_of`.
    """
    decoder = decoder_of(config)
    sizes = {
        key: _size(config, key) for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    }
    if (layers := sizes["num_hidden_layers"]) > MAX_LAYERS:
        raise InputError(f"`num_hidden_layers` is {layers:,} in config.json, at most {MAX_LAYERS:,} are read", hint=RIGHT_CONFIG)
    for key, axis in decoder.computed.items():
        sizes[key] = _optional_size({key: decoder.defaults.get(key), **config}, key) or length(axis, sizes)
    return {**decoder.defaults, **config, **sizes}


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the decoder that `config` describes, in storage order. Raises InputError as `sizes_of`."""
    return decoder_of(config).shapes(sizes_of(config))


def check_structure(config: Mapping[str, Any], shapes: Shapes, *, vocabulary_rows: int | None = None) -> None:
    """Raise InputError unless `shapes` are exactly those that `config` describes; projector, vision tower and buffers may be there too.

    `vocabulary_rows` replaces the config's `vocab_size` where tokens were added.
    """
    _check_numbers(config)
    expected = expected_shapes(config if vocabulary_rows is None else {**config, "vocab_size": vocabulary_rows})
    unexpected = [name for name in shapes if name not in expected and not re.fullmatch(f"{DROPPED}|{MULTIMODAL}", name)]
    wrong = [name for name, shape in expected.items() if shapes.get(name, shape) != shape]
    facts = {
        "missing": few(name for name in expected if name not in shapes),
        "unexpected": few(unexpected),
        "of another shape": few(wrong),
    }
    if wrong:
        facts[shown(wrong[0])] = f"{list(shapes[wrong[0]])}, by config.json {list(expected[wrong[0]])}"
    facts = {label: text for label, text in facts.items() if text}
    if facts:
        hint = "check that all of its shards are there and that config.json belongs to them"
        if facts == {"missing": VOCABULARY[1]}:
            hint = "give the shard with the head; or, if the head is the embedding table, set `tie_word_embeddings` to true in config.json"
        raise InputError("the tensors are not those that config.json describes", facts=facts, hint=hint)


# --- parts of repair_config -----------------------------------------------------------------------------------------


def _plain(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The keys that may stay. Raises InputError for NaN and infinity, which are not JSON."""
    new: dict[str, Any] = {}
    for key, value in config.items():
        for number in _numbers(value, 4):
            if not math.isfinite(number):
                raise InputError(f"{shown(key)} holds {number} in config.json", hint="give the config.json that its authors published")
        nested = key in NESTED and isinstance(value, dict) and all(_is_plain(inner, 1) for inner in value.values())
        if not re.fullmatch(REFUSED, key, re.DOTALL) and (nested or _is_plain(value, 3)):
            new[key] = value
    gone = [key for key in config if key not in new and key != QUANTIZATION]
    return new, [*quantization_notes(config), *([f"config: dropped {listed(gone)}"] if gone else [])]


def quantization_notes(config: Mapping[str, Any]) -> list[str]:
    """A sentence for each `quantization_config` in a config whose weights are plain numbers, where it does not belong."""
    notes = []
    for prefix, part in (("", config), *((f"{key}.", config.get(key)) for key in ("text_config", "vision_config"))):
        if isinstance(part, Mapping) and (found := part.get(QUANTIZATION)) is not None:
            method = found.get("quant_method") if isinstance(found, Mapping) else None
            named = f" ({unquoted(method)})" if isinstance(method, str) else ""
            notes.append(f"config: `{prefix}{QUANTIZATION}`{named} left out, the weights are plain numbers")
    return notes


def _is_plain(value: Any, depth: int) -> bool:
    """A string, number, boolean or null, or lists of them up to `depth` levels."""
    if isinstance(value, list):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    return value is None or isinstance(value, (float, str)) or (isinstance(value, int) and abs(value) < 1 << 63)


def _numbers(value: Any, depth: int) -> Iterable[float]:
    if isinstance(value, float):
        yield value
    elif depth and isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item, depth - 1)


def _repair_ids(new: dict[str, Any], ids: SpecialIds, rows: int) -> list[str]:
    pad = ids.pad if ids.pad is None or 0 <= ids.pad < rows else ids.unk
    sized = {**new, "vocab_size": rows}
    true = {key: _true_id(key, i, sized) for key, i in zip(IDS, (ids.bos, ids.eos, pad), strict=True)}
    old = [new.get(key) for key in IDS]
    new |= {key: i for key, i in true.items() if i is not None}
    return [] if old == list(true.values()) else [f"config: bos/eos/pad ids {_joined(old)} -> {_joined(true.values())}"]


def _older_words(new: dict[str, Any], decoder: Decoder) -> list[str]:
    """Keys under names that `decoder` has no more, or not yet, put under those that every version reads."""
    old = dict(new)
    check_rope(new)
    for before, after in decoder.renamed.items():
        if before in new:
            new.setdefault(after, new.pop(before))
    rope = plain_rope(new, decoder)
    new.clear()
    new.update(rope)
    gone = [key for key in (*decoder.renamed, PARAMETERS) if key in old and key not in new]
    made = [f"`{key}` {_text(value)}" for key, value in new.items() if key not in old]
    return [f"config: {listed(gone)} -> {', '.join(made)}"] if made else [f"config: dropped {listed(gone)}, said twice"] * bool(gone)


def _measure(decoder: Decoder, size: str, shapes: Shapes) -> tuple[str, int] | None:
    """A tensor of the first layer, and its axis that has the length `size`; None for a size that no axis has."""
    for row in decoder.layer:
        if size in row.shape and not row.when:
            name = f"model.layers.0.{row.name}".replace("*", "0")
            _shape(shapes, name, len(row.shape))
            return name, row.shape.index(size)
    return None


def _facts(config: Mapping[str, Any], shapes: Shapes, decoder: Decoder) -> dict[str, Any]:
    """What the tensors say about the sizes. Raises InputError where the config says otherwise."""
    rows, hidden = _shape(shapes, VOCABULARY[0], 2)
    wanted = ("num_attention_heads * head_dim", "num_key_value_heads * head_dim", "intermediate_size")
    query_at, key_at, width_at = (_measure(decoder, size, shapes) for size in wanted)
    assert query_at is not None
    assert width_at is not None
    query, intermediate = (shapes[name][axis] for name, axis in (query_at, width_at))
    layers = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"model\.layers\.(\d{1,6})\.", name)))
    _agree(config, "hidden_size", hidden, VOCABULARY[0], shapes)
    _agree(config, "intermediate_size", intermediate, width_at[0], shapes)
    if _optional_size(config, "num_hidden_layers") not in (None, layers):
        what = f"`num_hidden_layers` is {config['num_hidden_layers']} in config.json, but the tensors have {layers} layers"
        raise InputError(what, hint=RIGHT_CONFIG)
    heads = _optional_size(config, "num_attention_heads") or next(
        (s.heads for s in LLAMA_SIZES if (s.hidden, s.layers) == (hidden, layers)), 0
    )
    if not heads:
        raise InputError("`num_attention_heads` is missing in config.json, and no tensor tells it", hint=RIGHT_CONFIG)
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads}
    head = _optional_size(config, "head_dim") or max(hidden // heads, 1)
    if decoder.defaults.get("head_dim") and not config.get("head_dim"):  # free of the width, and told by the tensors
        head = sizes["head_dim"] = max(query // heads, 1)
    _agree({"num_attention_heads": heads}, "num_attention_heads", query / head, query_at[0], shapes)
    if key_at is not None:
        key = shapes[key_at[0]][key_at[1]]
        _agree(config, "num_key_value_heads", key / head, key_at[0], shapes)
        sizes["num_key_value_heads"] = key // head
    else:
        sizes["num_key_value_heads"] = _optional_size(config, "num_key_value_heads") or heads
    for size in dict.fromkeys(row.each for row in decoder.layer if row.each):
        at = _measure(decoder, size, shapes)
        sizes[size] = shapes[at[0]][at[1]] if at else 1
        _agree(config, size, sizes[size], at[0] if at else "", shapes)
    return {**sizes, "vocab_size": rows}


def _agree(config: Mapping[str, Any], key: str, size: float, tensor: str, shapes: Shapes) -> None:
    value = _optional_size(config, key)
    if value not in (None, size) or size != int(size):
        stated = f"`{key}` is {value:,} in config.json" if value else f"config.json has no `{key}`"
        raise InputError(f"{stated}, but `{tensor}` has shape {list(shapes[tensor])}", hint=RIGHT_CONFIG)


def _kind(config: Mapping[str, Any], projector: bool) -> dict[str, Any]:
    """`model_type` and architecture: those of LLaVA where there is a projector, of its text model where not."""
    kind, llama = config.get("model_type"), DECODER_BY_TYPE["llama"]
    if not projector and isinstance(kind, str) and kind.startswith("llava"):
        row = decoder_of(config)
        return {"model_type": row.model_type, "architectures": [row.architecture]}
    if not isinstance(kind, str) or (projector and kind == llama.model_type):
        kind = llama.original_types[0] if projector else llama.model_type
    named = {llama.model_type: llama.architecture, **dict.fromkeys(llama.original_types[:2], llama.original_architectures[0])}
    return {"model_type": kind} | ({"architectures": [named[kind]]} if kind in named else {})


def _multimodal(config: Mapping[str, Any], shapes: Shapes, ids: SpecialIds) -> dict[str, Any]:
    """The settings that the projector's tensors and the vocabulary show. Raises InputError for a projector of another width."""
    found: dict[str, Any] = {}
    if not isinstance(config.get("mm_use_im_patch_token"), bool):  # LLaVA's code takes its absence for true, and adds the token
        found["mm_use_im_patch_token"] = "<im_patch>" in ids.added
    stored = {canonical(name): name for name in shapes}  # ViP-LLaVA's projector has names of its own
    weights = [stored[name] for name in projector_weights(stored)]
    if not weights or not all(len(shapes[name]) == 2 for name in weights):
        return found  # of a kind that no row describes: the config's own settings stay
    hidden = shapes[VOCABULARY[0]][1]
    if shapes[weights[-1]][0] != hidden:
        raise InputError(f"`{weights[-1]}` has shape {list(shapes[weights[-1]])}, but the decoder is {hidden} wide", hint=RIGHT_CONFIG)
    return {**found, "mm_projector_type": projector_type(map(canonical, shapes)), "mm_hidden_size": shapes[weights[0]][1]}


def _apply(new: dict[str, Any], changes: Mapping[str, Any]) -> list[str]:
    """Set `changes` in `new`. Returns a sentence for each key that had another value, and one for all that were missing."""
    missing = [f"`{key}` {_text(value)}" for key, value in changes.items() if new.get(key) is None]
    notes = [
        f"config: `{key}` {_text(new[key])} -> {_text(value)}"
        for key, value in changes.items()
        if new.get(key) is not None and json.dumps(new[key]) != json.dumps(value)
    ]
    new |= changes
    return notes + ([f"config: made explicit {', '.join(missing)}"] if missing else [])


def _check_numbers(config: Mapping[str, Any]) -> None:
    _optional_size(config, "max_position_embeddings")
    for key, most in (("rms_norm_eps", 1), ("rope_theta", 1e12)):
        if config.get(key) is not None and not sensible(config[key], float, 0, most):
            raise InputError(f"`{key}` is {_text(config[key])} in config.json, not a positive number up to {most:g}", hint=RIGHT_CONFIG)


def _shape(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or len(shape) != rank or 0 in shape:
        found = "is missing" if shape is None else f"has shape {list(shape)}"
        raise InputError(f"`{name}` {found}", hint="check that all shards of the model are there")
    return shape


def _size(config: Mapping[str, Any], key: str) -> int:
    size = _optional_size(config, key)
    if size is None:
        raise InputError(f"`{key}` is missing in config.json", hint=RIGHT_CONFIG)
    return size


def _optional_size(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is None or sensible(value, int, 1, 1 << 31):
        return value
    raise InputError(f"`{key}` is {_text(value)} in config.json, not a sensible size", hint=RIGHT_CONFIG)


def sensible(value: Any, kind: type, least: float, most: float) -> bool:
    """Whether a JSON value is of this type and between the two, `least` itself excluded for fractions."""
    if kind is bool:
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        return False
    return (least < value if kind is float else least <= value) and value <= most


def _joined(values: Iterable[Any]) -> str:
    return "/".join("none" if value is None else _text(value) for value in values)


def _text(value: Any) -> str:
    return unquoted(json.dumps(value, ensure_ascii=False))
