"""The tokenizer of a llava-hf folder as keys of a GGUF file: tokens, scores and types, merges, special ids, the chat template.

What llama.cpp's convert_hf_to_gguf.py reads from the same files, in its order.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any

from ..checkpoint.sentencepiece import read_sentencepiece
from ..checkpoint.small_files import SmallFiles, small_bytes, small_object, small_text
from ..checkpoint.tokenizer import ADDED, FAST, FAST_LIMIT, MODEL, MODEL_LIMIT, TOKENIZER_CONFIG, token_text
from ..checkpoint.tokenizer_json import BYTE_LETTERS, added_tokens, bpe_model, is_llama, template_of
from ..errors import InputError
from ..families.llama_cpp import (
    ADDED_SCORE,
    CONTROL,
    LOOKS_SPECIAL,
    NO_TOKEN_SCORE,
    NORMAL,
    OWN_KINDS,
    PRE_TOKENIZER_HASHES,
    PRE_TOKENIZERS,
    PROBE,
    ROLE_KEYS,
    SPECIAL_ROLES,
    SPECIAL_TEXTS,
    UNUSED,
    USER_DEFINED,
    GgufDecoder,
)
from ..formats.gguf import GgufKey
from ..storage.strict_json import JsonObject
from ..text import few

BLANK = "\u2581"  # SentencePiece's sign for a blank
BYTE_BLANK = chr(256 + ord(" "))  # a blank in a byte-level token
TOKENIZER = "tokenizer.ggml."


def tokenizer_keys(files: SmallFiles, config: Mapping[str, Any], rows: int, decoder: GgufDecoder) -> list[GgufKey]:
    """The keys of the tokenizer in `files` for a vocabulary of `rows` rows of a `decoder`. `config` is config.json.

    Raises InputError for a tokenizer that llama.cpp can't have by its files: a LLaMA's without tokenizer.model, whose scores it needs, a
    byte-level one that cuts a text in an unknown way, and damaged ones.
    """
    settings, core = small_object(files, TOKENIZER_CONFIG), small_object(files, FAST, limit=FAST_LIMIT)
    before = settings.get("add_prefix_space") if decoder.blank == "said" else None
    keys = [] if before is None else [_key("add_space_prefix", "bool", bool(before))]
    limit = None
    if MODEL in files:
        tokens, scores, types = _pieces(files, settings, core, rows, own=decoder.own_tokens)
        keys += [_key("model", "text", "llama"), _key("pre", "text", "default"), _key("tokens", "text", tuple(tokens))]
        keys += [_key("scores", "f32", tuple(scores)), _key("token_type", "i32", tuple(types))]
        limit = rows
    elif is_llama(core):
        what, hint = "the tokenizer has no tokenizer.model, whose scores llama.cpp needs", "put the tokenizer.model of the model beside it"
        raise InputError(what, facts={"there": few(sorted(files))}, hint=hint)
    else:
        tokens, types, merges = _byte_level(core, rows)
        pre = _pre_tokenizer(core, settings)
        keys += [_key("model", "text", "gpt2"), _key("pre", "text", pre), _key("tokens", "text", tuple(tokens))]
        keys.append(_key("token_type", "i32", tuple(types)))
        keys.append(_key("merges", "text", tuple(merges)))
    keys += _special(files, settings, core, config, limit)
    keys += [_key(f"{role}_token_id", "u32", number) for role, number in decoder.tokens.items()]
    return [*keys, *([_key("add_space_prefix", "bool", False)] if decoder.blank == "none" else [])]


def _key(name: str, kind: str, value: Any) -> GgufKey:
    return GgufKey(TOKENIZER + name, kind, value)


def _pieces(files: SmallFiles, settings: JsonObject, core: JsonObject, rows: int, *, own: bool) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a SentencePiece vocabulary with added tokens. `own`: these keep the type that they have, and their text,
    and those of tokenizer.json, `core`, are among them."""
    vocabulary = read_sentencepiece(small_bytes(MODEL, files[MODEL], MODEL_LIMIT))
    tokens = [f"[PAD{number}]" for number in range(rows)]
    scores, types = [NO_TOKEN_SCORE] * rows, [UNUSED] * rows
    for piece, number in vocabulary.ids.items():
        if number < rows:
            kind = vocabulary.kinds[piece]
            tokens[number], scores[number], types[number] = piece, vocabulary.scores[piece], kind if kind in OWN_KINDS else NORMAL
    for text, number in small_object(files, ADDED).items():
        if type(number) is int and 0 <= number < rows:
            tokens[number], scores[number], types[number] = text, ADDED_SCORE, USER_DEFINED
    decoder = settings.get("added_tokens_decoder")
    for text_id, entry in (decoder if isinstance(decoder, dict) else {}).items():
        content = token_text(entry)
        if content is not None and text_id.isascii() and text_id.isdigit() and int(text_id) < rows:
            number, special = int(text_id), entry.get("special") is True
            types[number] = (CONTROL if special else USER_DEFINED) if own else _type_of(content, special)
            tokens[number], scores[number] = content if own or types[number] == CONTROL else content.replace(BLANK, " "), ADDED_SCORE
    for number, token in added_tokens(core).items() if own else ():
        if 0 <= number < rows:
            tokens[number], scores[number], types[number] = token["content"], ADDED_SCORE, CONTROL if token["special"] else USER_DEFINED
    return tokens, scores, types


def _type_of(text: str, special: bool) -> int:
    """The type of an added token: that of a control token also where its text has the form of one."""
    formed = text in SPECIAL_TEXTS or any(text.startswith(first) and text.endswith(last) for first, last in LOOKS_SPECIAL)
    return CONTROL if special or formed else USER_DEFINED


def _byte_level(core: JsonObject, rows: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges of a byte-level tokenizer.json; a merge is two texts with a blank between them."""
    vocabulary, merges = bpe_model(core)
    if not merges:
        what, hint = "the tokenizer has no merges, and llama.cpp loads no byte-level one without", "give the tokenizer of the model"
        raise InputError(what, hint=hint)
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    for text, number in vocabulary.items():
        if number < rows:
            tokens[number], types[number] = text, NORMAL
    for number, entry in added_tokens(core).items():
        if 0 <= number < rows:
            types[number] = _type_of(entry["content"], entry["special"])
            tokens[number] = entry["content"] if types[number] == CONTROL else entry["content"].replace(BLANK, " ")
    return (
        tokens,
        types,
        [merge if isinstance(merge, str) else " ".join(part.replace(" ", BYTE_BLANK) for part in merge) for merge in merges],
    )


def _pre_tokenizer(core: JsonObject, settings: JsonObject) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts a text: by its hash where that is known, else by its rule. Raises InputError
    where no row describes it."""
    steps, model = core.get("pre_tokenizer"), core.get("model")
    inner = steps.get("pretokenizers", [steps]) if isinstance(steps, dict) else []
    patterns = [step["pattern"].get("Regex") for step in inner if isinstance(step, dict) and isinstance(step.get("pattern"), dict)]
    whole = isinstance(model, dict) and model.get("ignore_merges") is True
    name = PRE_TOKENIZERS.get((patterns[0], whole)) if len(patterns) == 1 and isinstance(patterns[0], str) else None
    if name is None:
        what = "llama.cpp has no known name for how this tokenizer.json cuts a text"
        facts = {
            "its regular expression": str(patterns[0])[:200] if patterns else "none",
            "takes words that are tokens whole": "yes" if whole else "no",
            "known": ", ".join(PRE_TOKENIZERS.values()),
        }
        raise InputError(what, facts=facts, hint="convert it to llava-hf, and that with llama.cpp's own convert_hf_to_gguf.py")
    return PRE_TOKENIZER_HASHES.get(_hash(core, settings, str(patterns[0]), whole=whole), name)


def _hash(core: JsonObject, settings: JsonObject, pattern: str, *, whole: bool) -> str:
    """SHA-256 of the ids of PROBE, written as Python writes a list. A `whole` word that is a token is not made of merges."""
    vocabulary, merges = bpe_model(core)
    ranks = {tuple(merge.split(" ") if isinstance(merge, str) else merge): rank for rank, merge in enumerate(merges)}
    around = {role: _ids_around(core, settings, role) for role in ("bos", "eos")}
    ids = around["bos"]
    normal = core.get("normalizer")
    text = unicodedata.normalize("NFC", PROBE) if isinstance(normal, dict) and normal.get("type") == "NFC" else PROBE
    for word in re.findall(_of_this_text(pattern, text), text):
        pieces = [BYTE_LETTERS[byte] for byte in word.encode()]
        if whole and "".join(pieces) in vocabulary:
            pieces = ["".join(pieces)]
        while len(pieces) > 1:
            rank, place = min((ranks.get((pieces[i], pieces[i + 1]), len(ranks)), i) for i in range(len(pieces) - 1))
            if rank == len(ranks):
                break
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        ids += [vocabulary.get(piece) for piece in pieces]
    return sha256(str([*ids, *around["eos"]]).encode()).hexdigest()


def _ids_around(core: JsonObject, settings: JsonObject, role: str) -> list[int | None]:
    """The id of the token that a template puts before (`bos`) or behind (`eos`) a text, as a list of one or none."""
    text = token_text(settings.get(f"{role}_token"))
    put = template_of(core) and _added(settings, core).get(role)
    return [number for number, token in added_tokens(core).items() if token["content"] == text] if put else []


def _of_this_text(pattern: str, text: str) -> str:
    """A regular expression of Unicode's classes of letters and numbers, which Python's has no names for, by those in `text`."""
    for kind in "LN":
        there, named = "".join(sorted({sign for sign in text if unicodedata.category(sign)[0] == kind})), rf"\p{{{kind}}}"
        pattern = re.sub(rf"(\[[^\]]*){re.escape(named)}", rf"\g<1>{there}", pattern).replace(named, f"[{there}]")
    return pattern


def _special(files: SmallFiles, settings: JsonObject, core: JsonObject, config: Mapping[str, Any], rows: int | None) -> Iterator[GgufKey]:
    """The ids of special tokens, which of them are put around a text, and the chat template. Ids are below `rows`, if that is given."""
    entries = core.get("added_tokens")
    known: dict[str, int] = {}
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int:
            known.setdefault(entry["content"], entry["id"])
    text_config = config.get("text_config")
    nested = text_config if isinstance(text_config, Mapping) else {}
    ids: dict[str, int] = {}
    for place in (
        {role: known.get(token_text(settings.get(f"{role}_token")) or "") for role in SPECIAL_ROLES},
        {role: config.get(f"{role}_token_id", nested.get(f"{role}_token_id")) for role in SPECIAL_ROLES},
    ):
        for role, number in place.items():
            if type(number) is int and number >= 0 and (rows is None or number < rows):
                ids.setdefault(role, number)
    for role, number in ids.items():
        yield _key(f"{ROLE_KEYS.get(role, role)}_token_id", "u32", number)
    for role, flag in _added(settings, core).items():
        yield _key(f"add_{role}_token", "bool", flag)
    template = settings.get("chat_template", small_text(files, "chat_template.jinja"))
    if isinstance(template, str):
        yield GgufKey("tokenizer.chat_template", "text", template)


def _added(settings: JsonObject, core: JsonObject) -> dict[str, bool]:
    """Whether a text gets a token in front (`bos`), behind (`eos`) and between two parts (`sep`), in the order in which files tell it."""
    found: dict[str, bool] = {}
    processor = core.get("post_processor")
    steps = processor.get("processors", [processor]) if isinstance(processor, dict) else []
    bos, eos, sep = (token_text(settings.get(f"{role}_token")) for role in ("bos", "eos", "sep"))
    for step in (step for step in steps if isinstance(step, dict)):
        if step.get("type") == "ByteLevel":
            found.setdefault("bos", False)
            found.setdefault("eos", False)
        elif step.get("type") == "TemplateProcessing":
            single, pair = _words(step.get("single")), _words(step.get("pair"))
            first = last = None
            if len(single) > 1:
                first, last = single[0], single[-1]
                if first:
                    found["bos"] = first == bos
                if last:
                    found["eos"] = last == eos
            inner = pair[1 if first and pair[:1] == [first] else 0 : -1 if last and pair[-1:] == [last] else None][1:-1]
            if inner:
                found["sep"] = (inner[0] in (sep, eos) and not last) or (len(inner) == 2 and inner[1] in (sep, eos))
    for role in ("bos", "eos", "sep"):
        flag = settings.get(f"add_{role}_token")
        if isinstance(flag, bool):
            found.setdefault(role, flag)
    return found


def _words(template: Any) -> list[str | None]:
    """The special tokens of a template in order, None for each text."""
    parts = [part for part in template if isinstance(part, dict)] if isinstance(template, list) else []
    return [special.get("id") if isinstance(special := part.get("SpecialToken"), dict) else None for part in parts]
