"""tokenizer.json, the file of the tokenizers library: a LLaMA's made from pieces and scores, Qwen2's from vocabulary and merges.

Written as tokenizers 0.15 to 0.23 reads it: a merge is one text, since lists are understood from 0.20 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from ..errors import InputError
from .sentencepiece import NORMAL, Vocabulary

Json = dict[str, Any]

PUT_MODEL = "put the `tokenizer.model` of the model's base beside it"
BLANK = "\u2581"
# Every way to cut a piece is looked up, and each that is found is kept: characters of a piece (SentencePiece's default is 16), squares of
# them in all, and merges (two for each piece of LLaMA's).
LONGEST_PIECE, MAX_CUTTING, MAX_MERGES = 1024, 1 << 26, 1_000_000
# transformers' Qwen2Tokenizer, the same in 4.37 and 5.23
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def added_token(name: str, flags: Json | None = None) -> Json:
    """AddedToken's fields for a token that is found inside a text, with the `flags` that something else gives it."""
    fields = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return {"content": name, **{field: (flags or {}).get(field) is True for field in fields}}


def added_tokens(core: Json) -> dict[int, Json]:
    """The added tokens of a tokenizer.json by id, in the form of tokenizer_config.json; what is unreadable is left out."""
    entries = core.get("added_tokens")
    named = [e for e in entries if isinstance(e, dict) and isinstance(e.get("content"), str)] if isinstance(entries, list) else []
    return {entry["id"]: added_token(entry["content"], entry) for entry in named if type(entry.get("id")) is int}


def bpe_merges(vocabulary: Vocabulary) -> list[str]:
    """Every way to put a piece together from two others, best score first, then longest first half: transformers >= 4.45's order.

    Pieces that are no ordinary text take no part, since SentencePiece never merges into or from them.
    """
    ordinary = {name: vocabulary.scores[name] for name, kind in vocabulary.kinds.items() if kind == NORMAL}
    longest = max(map(len, ordinary), default=0)
    if longest > LONGEST_PIECE:
        what = f"a piece of `tokenizer.model` has {longest:,} characters, at most {LONGEST_PIECE:,} are read"
        raise InputError(what, hint=PUT_MODEL)
    if sum(len(name) ** 2 for name in ordinary) > MAX_CUTTING:
        raise InputError("the pieces of `tokenizer.model` are far longer than those of a tokenizer", hint=PUT_MODEL)
    cuts = (
        (score, cut, len(name) - cut, f"{name[:cut]} {name[cut:]}")
        for name, score in ordinary.items()
        for cut in range(1, len(name))
        if name[:cut] in ordinary and name[cut:] in ordinary
    )
    found = list(islice(cuts, MAX_MERGES + 1))
    if len(found) > MAX_MERGES:
        raise InputError(f"the pieces of `tokenizer.model` can be merged in more than {MAX_MERGES:,} ways", hint=PUT_MODEL)
    return [merge for *_, merge in sorted(found, key=lambda item: item[:3], reverse=True)]


def llama_json(
    vocabulary: Mapping[str, int], merges: list[Any], unk: str, *, start: Mapping[str, int], end: Mapping[str, int], prefix: bool
) -> Json:
    """A LLaMA's tokenizer.json without added tokens. `start` and `end` are the tokens put around every text, with their ids;
    `prefix` puts a blank before every piece of text."""
    blanks = [{"type": "Prepend", "prepend": BLANK}] * prefix + [{"type": "Replace", "pattern": {"String": " "}, "content": BLANK}]
    back: list[Json] = [{"type": "Replace", "pattern": {"String": BLANK}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    back += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": blanks}, "pre_tokenizer": None,
        "post_processor": _template(start, end), "decoder": {"type": "Sequence", "decoders": back},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unk, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": True, "byte_fallback": True, "vocab": dict(vocabulary), "merges": merges,
        },
    }  # fmt: skip


def _template(start: Mapping[str, int], end: Mapping[str, int]) -> Json:
    def one(letter: str, number: int) -> list[Json]:
        before, after = ([{"SpecialToken": {"id": name, "type_id": number}} for name in tokens] for tokens in (start, end))
        return [*before, {"Sequence": {"id": letter, "type_id": number}}, *after]

    special = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in {**start, **end}.items()}
    return {"type": "TemplateProcessing", "single": one("A", 0), "pair": one("A", 0) + one("B", 1), "special_tokens": special}


def qwen2_json(vocabulary: Json, merges: str) -> Json:
    """What transformers makes of Qwen2's vocab.json and merges.txt."""
    lines = merges.split("\n")
    pairs = [line.strip() for line in lines[lines[0].startswith("#version:") :] if line.strip()]
    after = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    whole = {**after, "add_prefix_space": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, whole]},
        "post_processor": {**after, "trim_offsets": False}, "decoder": after,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
            "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary, "merges": pairs,
        },
    }  # fmt: skip


def bpe_model(core: Json) -> tuple[dict[str, int], list[Any]]:
    """Vocabulary and merges of a tokenizer.json, a merge as text where its parts hold no blank. Raises InputError unless it holds a
    BPE model whose ids are 0, 1, 2 and so on."""
    model = found if isinstance(found := core.get("model"), dict) else {}
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list) or model.get("type", "BPE") != "BPE":
        raise InputError("`tokenizer.json` does not hold a BPE model", hint=PUT_MODEL)
    if not all(type(i) is int for i in vocabulary.values()) or sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise InputError(f"the ids of `tokenizer.json` are not 0 to {len(vocabulary) - 1:,}", hint=PUT_MODEL)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in pairs):
        raise InputError("a merge of `tokenizer.json` is not a pair of texts", hint=PUT_MODEL)
    return vocabulary, [pair if any(" " in part for part in pair) else " ".join(pair) for pair in pairs]


def starts_with_bos(core: Json) -> bool:
    """Whether a tokenizer.json puts a token before each text; True where it does not say."""
    processor = core.get("post_processor")
    single = processor.get("single") if isinstance(processor, dict) else None
    return not (isinstance(single, list) and single and isinstance(single[0], dict) and "Sequence" in single[0])


def has_prefix(core: Json) -> bool:
    """Whether a LLaMA's tokenizer.json puts a blank before a text: by a normalizer, or by a Metaspace pre-tokenizer."""
    steps = [step for key in ("normalizer", "pre_tokenizer") for step in _steps(core.get(key))]
    return any(s.get("type") == "Prepend" or (s.get("type") == "Metaspace" and s.get("prepend_scheme") != "never") for s in steps)


def is_llama(core: Json) -> bool:
    """Whether a BPE falls back on bytes, as LLaMA's, or has tokens of bytes written as letters, as GPT-2's. Others are an InputError."""
    llama = core["model"].get("byte_fallback") is True
    if not llama and not any(step.get("type") == "ByteLevel" for step in _steps(core.get("decoder"))):
        raise InputError("`tokenizer.json` holds neither a LLaMA tokenizer nor a byte-level one", hint=PUT_MODEL)
    return llama


def splits_as_qwen2(core: Json) -> bool:
    """Whether a byte-level tokenizer.json cuts a text as Qwen2Tokenizer does."""
    return any(step.get("pattern") == {"Regex": QWEN2_SPLIT} for step in _steps(core.get("pre_tokenizer")))


def _steps(value: Any) -> list[Json]:
    """The steps of a normalizer, pre-tokenizer or decoder, which is one step or a sequence of them."""
    inner = (
        next((value[key] for key in ("normalizers", "pretokenizers", "decoders") if key in value), [value])
        if isinstance(value, dict)
        else []
    )
    return [step for step in inner if isinstance(step, dict)] if isinstance(inner, list) else []
