"""The tokenizer files of a LLaMA-family checkpoint: the true ids of special tokens, and repair of the JSON files.

No tokenizer class is involved: `tokenizer.model` (a SentencePiece ModelProto) is read field by field and copied byte for
byte, the JSON files are checked against it and written anew where they are wrong. The published files of 2023 have an empty
or wrong bos/eos/unk, the class `LLaMATokenizer`, and a `[PAD]` without a row (LLaVA #950, #210, #69).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import InputError
from ..storage.strict_json import json_bytes
from ..text import listed, shown
from .sentencepiece import Vocabulary, read_sentencepiece
from .small_files import SmallFiles, small_bytes, small_object
from .tokenizer_json import added_tokens

MODEL, TOKENIZER_CONFIG, SPECIAL, ADDED, FAST = (
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json",
)  # fmt: skip
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# Bytes. LLaMA's own tokenizer.model has 499,723, Llama 3's tokenizer.json 17 million; in memory, text takes up to four bytes a character.
MODEL_LIMIT, FAST_LIMIT = 16 << 20, 20 << 20
# meta-llama/llama PR #87 and llama.cpp's SHA256SUMS; Llama-2 has the same file.
LLAMA_TOKENIZER = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
RIGHT_TOKENIZER = "give the tokenizer that belongs to these weights"
# A table that was padded to a multiple (`resize_token_embeddings(pad_to_multiple_of=64)`) before tokens were added leaves a gap in front
# of them, and the fast tokenizers number the tokens without it. Names for its rows, as Gemma has them, keep the ids.
PADDED_TO, UNUSED = (8, 16, 32, 64, 128), "<unused_{}>"
NO_LIMIT = 10**9  # a larger model_max_length is none: transformers writes 10^30 where it knows no limit

# What is kept of tokenizer_config.json besides the tokens: no paths, no `auto_map`, nothing unknown.
TOKENIZER_SETTINGS = {
    "add_bos_token": bool, "add_eos_token": bool, "add_prefix_space": bool, "chat_template": str, "clean_up_tokenization_spaces": bool,
    "legacy": bool, "model_max_length": int, "original_legacy": bool, "processor_class": str, "spaces_between_special_tokens": bool,
    "tokenizer_class": str, "use_default_system_prompt": bool,
}  # fmt: skip
SIDES = ("padding_side", "truncation_side", "original_padding_side")
# With `legacy: true` there is a blank before every piece of text, as the slow tokenizer of 2023 put it; 5.x adds `<s>` only where asked.
EXPLICIT = {"legacy": True, "add_bos_token": True, "add_eos_token": False}
TOKEN_FIELDS = {"lstrip", "normalized", "rstrip", "single_word", "special"}


@dataclass(frozen=True)
class Repair:
    """The new content of a JSON file, and what changed in it."""

    name: str
    content: Mapping[str, Any]
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class SpecialIds:
    """The true ids: `added` are the tokens behind the `base_vocabulary` pieces of tokenizer.model. All have a row in the table.

    None is an id that no file tells: what a config says of it stands.
    """

    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None
    added: Mapping[str, int]
    base_vocabulary: int


def read_special_ids(files: SmallFiles, rows: int) -> SpecialIds:
    """The true special ids of these files, for a table of `rows` rows. Raises as `repair_tokenizer`."""
    return repair_tokenizer(files, rows=rows)[1]


def repair_tokenizer(
    files: SmallFiles, *, rows: int, fallback: SmallFiles | None = None, model_max_length: object = None
) -> tuple[dict[str, Path | bytes], SpecialIds, tuple[str, ...]]:
    """`files` with repaired tokenizer files, the true special ids, and a sentence for each thing changed or noticed.

    Other files and those without fault are returned as given, tokenizer.json too, which is not looked at but for tokens that no other file
    lists. A missing tokenizer.model is taken from `fallback` (the base's files); `model_max_length` is written where tokenizer_config.json
    gives no usable limit. Raises InputError for damaged files, tokens with two ids, a gap between ids that no padding explains, and a table
    too small for the pieces of tokenizer.model.
    """
    model = files.get(MODEL, (fallback or {}).get(MODEL))
    if model is None:
        return _without_model(files, rows)
    data = small_bytes(MODEL, model, MODEL_LIMIT)
    vocabulary, files = read_sentencepiece(data), with_listed(files)
    added, dropped = _added_tokens(files, vocabulary, rows)
    known = {**vocabulary.ids, **added}
    special, settings = small_object(files, SPECIAL), small_object(files, TOKENIZER_CONFIG)
    tokens = _resolve(special, settings, vocabulary, known)

    notes = [] if MODEL in files else [f"{MODEL}: taken from the base"]
    notes += [f"{MODEL}: LLaMA's own, by its sha256"] if hashlib.sha256(data).hexdigest() == LLAMA_TOKENIZER else []
    notes += [f"tokenizer: {shown(name)} (id {i}) dropped, the table has {rows:,} rows" for name, i in dropped.items()]
    repairs = (
        _repair_added(small_object(files, ADDED), vocabulary, added),
        _repair_map(special, tokens, known),
        _repair_settings(settings, tokens, known, added, model_max_length),
    )
    result: dict[str, Path | bytes] = {**files, MODEL: model}
    for repair in repairs:
        result[repair.name] = _kept_or_new(files, repair)
        notes += repair.sentences if repair.name in files else [f"{repair.name}: written, it was missing"] * bool(repair.content)
    if not added:
        del result[ADDED]
    ids = SpecialIds(**{role: known[token] for role, token in tokens.items()}, added=added, base_vocabulary=len(vocabulary.ids))
    return result, ids, tuple(notes)


def with_listed(files: SmallFiles) -> SmallFiles:
    """The files, with the added tokens of tokenizer.json in tokenizer_config.json where neither that nor added_tokens.json lists any:
    transformers 5 writes no other list of them."""
    settings = small_object(files, TOKENIZER_CONFIG)
    if FAST not in files or ADDED in files or settings.get("added_tokens_decoder"):
        return files
    core = small_object(files, FAST, limit=FAST_LIMIT)
    found, model = added_tokens(core), core.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or all(entry["content"] in vocabulary for entry in found.values()):
        return files
    return {**files, TOKENIZER_CONFIG: json_bytes({**settings, "added_tokens_decoder": {str(i): entry for i, entry in found.items()}})}


def _without_model(files: SmallFiles, rows: int) -> tuple[dict[str, Path | bytes], SpecialIds, tuple[str, ...]]:
    """Without a tokenizer.model to check against: the files as they are, and the ids that they tell."""
    listing = small_object(files, ADDED)
    added = {name: i for name, i in listing.items() if is_token_id(i) and 2 < i < rows}
    roles = named_ids(files, rows)
    ids = SpecialIds(**roles, added=added, base_vocabulary=min(added.values(), default=rows))
    told = "/".join("none" if roles[role] is None else str(roles[role]) for role in ("bos", "eos", "pad"))
    how = f"; bos/eos/pad ids are {told} by them" if any(i is not None for i in roles.values()) else ", and ids stay as the config has them"
    return dict(files), ids, (f"{MODEL}: in neither folder, so the tokenizer files are not checked{how}",)


def named_ids(files: SmallFiles, rows: int) -> dict[str, int | None]:
    """The id of each role that special_tokens_map.json or tokenizer_config.json names, where a file tells it and the table has its row."""
    special, settings, core = (small_object(files, name, limit=FAST_LIMIT) for name in (SPECIAL, TOKENIZER_CONFIG, FAST))
    model = core.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else small_object(files, "vocab.json", limit=FAST_LIMIT)
    entries = core.get("added_tokens")
    listed_ids = {
        **(vocabulary if isinstance(vocabulary, dict) else {}),
        **small_object(files, ADDED),
        **{name: i for i, name in (_decoder(settings) or {}).items()},
        **{name: entry.get("id") for entry in (entries if isinstance(entries, list) else []) if (name := token_text(entry)) is not None},
    }
    ids = {name: i for name, i in listed_ids.items() if is_token_id(i) and i < rows}
    names = {role: [token_text(source.get(f"{role}_token")) for source in (special, settings)] for role in ("bos", "eos", "pad", "unk")}
    return {role: next((ids[name] for name in given if name in ids), None) for role, given in names.items()}


# --- the tokens -----------------------------------------------------------------------------------------------------


def _added_tokens(files: SmallFiles, vocabulary: Vocabulary, rows: int) -> tuple[dict[str, int], dict[str, int]]:
    """The tokens behind the pieces of tokenizer.model, from every file that names some: those with a row, and those without."""
    base = len(vocabulary.ids)
    if base > rows:
        raise InputError(f"`{MODEL}` has {base:,} pieces, but the embedding table only {rows:,} rows", hint=RIGHT_TOKENIZER)
    names: dict[int, str] = {i: name for name, i in vocabulary.ids.items()}
    ids: dict[str, int] = dict(vocabulary.ids)
    listing = small_object(files, ADDED)
    decoder = _decoder(small_object(files, TOKENIZER_CONFIG)) or {}
    for source, tokens in ((ADDED, listing), (TOKENIZER_CONFIG, {name: i for i, name in decoder.items()})):
        for name, i in tokens.items():
            if not is_token_id(i):
                what = f"`{source}` gives {shown(name)} an id that is not a whole number"
                raise InputError(what, facts={"id": shown(repr(i))}, hint=RIGHT_TOKENIZER)
            if ids.setdefault(name, i) != i or names.setdefault(i, name) != name:
                facts = {f"id {i}": shown(names.get(i, name)), shown(name): f"id {ids[name]}"}
                what = f"`{source}` gives {shown(name)} the id {i}, which contradicts the other tokens"
                raise InputError(what, facts=facts, hint=RIGHT_TOKENIZER)
    added = {name: i for name, i in sorted(ids.items()) if base <= i < rows}
    first = min(added.values(), default=base)
    if first in (-(-base // multiple) * multiple for multiple in PADDED_TO):
        added |= {name: i for i in range(base, first) if (name := UNUSED.format(i)) not in ids}
    if sorted(added.values()) != list(range(base, base + len(added))):
        raise InputError(
            f"the added tokens do not follow the {base:,} pieces of `{MODEL}` without a gap",
            facts={"added tokens": listed(f"{name} {i}" for name, i in added.items())},
            hint=RIGHT_TOKENIZER,
        )
    return added, {name: i for name, i in sorted(ids.items()) if i >= rows}


def is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < NO_LIMIT


def _resolve(special: Mapping[str, Any], settings: Mapping[str, Any], vocabulary: Vocabulary, known: Mapping[str, int]) -> dict[str, str]:
    """The token for each role: the first that the files name and that can be right, else tokenizer.model's own.

    special_tokens_map.json goes first, as in transformers 4.28. SentencePiece has one unk. A bos that is tokenizer.model's eos, or an
    eos that is its bos, is wrong: LLaVA's training code of 2023 swapped them. pad falls back on unk, as there.
    """
    tokens = {"unk": vocabulary.unk}
    own = {"bos": vocabulary.bos, "eos": vocabulary.eos, "pad": vocabulary.pad or vocabulary.unk}
    swapped = {"bos": vocabulary.eos, "eos": vocabulary.bos}
    for role, fallback in own.items():
        named = (token_text(source.get(f"{role}_token")) for source in (special, settings))
        fitting = (name for name in named if name is not None and name in known and name != swapped.get(role))
        tokens[role] = next(fitting, fallback)
    return tokens


def token_text(value: Any) -> str | None:
    """The text of a token, which stands in the JSON as a string or as an object with a `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


# --- the JSON files -------------------------------------------------------------------------------------------------


def _repair_added(old: Mapping[str, Any], vocabulary: Vocabulary, added: Mapping[str, int]) -> Repair:
    pieces = [name for name in old if name in vocabulary.ids]
    missing = [name for name, i in added.items() if name not in old and name != UNUSED.format(i)]
    unused = [i for name, i in added.items() if name not in old and name == UNUSED.format(i)]
    sentences = [f"{ADDED}: dropped {listed(pieces)}, already pieces of {MODEL}"] * bool(pieces)
    sentences += [f"{ADDED}: {listed(missing)} taken from {TOKENIZER_CONFIG}"] * bool(missing)
    if unused:
        sentences.append(f"{ADDED}: {UNUSED.format(unused[0])} to {unused[-1]} added, rows of padding in front of the added tokens")
    return Repair(ADDED, added, tuple(sentences))


def _repair_map(old: Mapping[str, Any], tokens: Mapping[str, str], known: Mapping[str, int]) -> Repair:
    new, changes = _roles(old, tokens, typed=False)
    extra = old.get("additional_special_tokens")
    if _all_known(extra, known):
        new["additional_special_tokens"] = extra
    return Repair(SPECIAL, new, _sentences(SPECIAL, changes, old, new))


def _repair_settings(
    old: Mapping[str, Any], tokens: Mapping[str, str], known: Mapping[str, int], added: Mapping[str, int], model_max_length: object
) -> Repair:
    new, changes = _roles(old, tokens, typed=True)
    new |= {key: old[key] for key, kind in TOKENIZER_SETTINGS.items() if type(old.get(key)) is kind}
    new |= {key: old[key] for key in SIDES if old.get(key) in ("left", "right")}
    if _all_known(old.get("additional_special_tokens"), known):
        new["additional_special_tokens"] = old["additional_special_tokens"]
    if old.get("sp_model_kwargs") == {}:
        new["sp_model_kwargs"] = {}
    decoder = _decoder(old)
    if decoder and all(known.get(name) == i for i, name in decoder.items()) and set(added) <= set(decoder.values()):
        new["added_tokens_decoder"] = old["added_tokens_decoder"]  # only if complete: readers that know it ignore added_tokens.json

    if new.get("tokenizer_class") != "LlamaTokenizer":
        changes.append(f"class {_described(old.get('tokenizer_class'))} -> `LlamaTokenizer`")
        new["tokenizer_class"] = "LlamaTokenizer"
    if is_length(model_max_length) and not is_length(new.get("model_max_length")):
        changes.append(f"model_max_length -> {model_max_length}")
        new["model_max_length"] = model_max_length
    missing = {key: value for key, value in EXPLICIT.items() if key not in new}
    if missing:
        changes.append("made explicit " + ", ".join(f"`{key}` {str(value).lower()}" for key, value in missing.items()))
    new |= missing
    return Repair(TOKENIZER_CONFIG, new, _sentences(TOKENIZER_CONFIG, changes, old, new))


def _roles(old: Mapping[str, Any], tokens: Mapping[str, str], *, typed: bool) -> tuple[dict[str, Any], list[str]]:
    new: dict[str, Any] = {}
    changes: list[str] = []
    for role, token in sorted(tokens.items()):
        value = old.get(f"{role}_token")
        new[f"{role}_token"] = value if token_text(value) == token and _well_formed(value, typed=typed) else token
        if new[f"{role}_token"] != value:
            form = " of unknown form" * (token_text(value) == token)
            changes.append(f"{role} {_described(value)}{form} -> {shown(token)}")
    return new, changes


def _well_formed(value: Any, *, typed: bool) -> bool:
    """Whether it is a plain string or AddedToken's fields, with `typed` marked by `__type`, as tokenizer_config.json has them."""
    if not isinstance(value, dict):
        return isinstance(value, str)
    fields = {key: flag for key, flag in value.items() if key not in ("content", "__type")}
    kind = value.get("__type", None if typed else "AddedToken")
    return kind == "AddedToken" and set(fields) <= TOKEN_FIELDS and all(isinstance(flag, bool) for flag in fields.values())


def _described(value: Any) -> str:
    content = token_text(value)
    if content is None:
        return "missing" if value is None else "unreadable"
    return shown(content) if content else "empty"


def _all_known(tokens: Any, known: Mapping[str, int]) -> bool:
    return isinstance(tokens, list) and all(token_text(token) in known and _well_formed(token, typed=False) for token in tokens)


def _decoder(settings: Mapping[str, Any]) -> dict[int, str] | None:
    """`added_tokens_decoder` as id -> token, None where it is not of transformers' form or names a token twice."""
    entries = settings.get("added_tokens_decoder")
    if not isinstance(entries, dict) or not all(key.isascii() and key.isdigit() and len(key) < 10 for key in entries):
        return None
    decoder = {int(key): name for key, value in entries.items() if (name := token_text(value)) and _well_formed(value, typed=False)}
    return decoder if len(set(decoder.values())) == len(entries) else None


def is_length(value: object) -> TypeGuard[int]:
    """Whether a `model_max_length` is a limit."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < NO_LIMIT


def _sentences(name: str, changes: list[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    gone = [key for key in old if key not in new]
    return (f"{name}: {', '.join(changes)}",) * bool(changes) + (f"{name}: dropped {listed(gone)}",) * bool(gone)


def list_at(value: Any, key: str) -> list[Any]:
    """The list under a key of a JSON object, empty where there is none."""
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, list) else []


def _kept_or_new(files: SmallFiles, repair: Repair) -> Path | bytes:
    new = json_bytes(repair.content, sort_keys=True)
    same = repair.name in files and json_bytes(small_object(files, repair.name), sort_keys=True) == new
    return files[repair.name] if same else new
