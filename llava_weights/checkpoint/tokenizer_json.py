"""tokenizer.json, the file of the tokenizers library: LLaMA's made from pieces and scores, Qwen2's from vocabulary and merges.

Written so that tokenizers 0.15 to 0.23 can read it: a merge is one text, since a list is understood only from 0.20 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, Literal

from ..errors import InputError
from ..families.llama_cpp import QWEN2_SPLIT
from ..storage.strict_json import JsonObject
from .sentencepiece import NORMAL, Vocabulary

PUT_MODEL = "put the `tokenizer.model` of the model's base beside it"
BLANK = "\u2581"
Blank = Literal["every", "first", "none"]
# A blank before the first piece of text, also where that begins with blanks: Metaspace puts none before its own sign, so that comes last.
# tokenizers before 0.19 ask for `add_prefix_space`.
FIRST = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Metaspace", "replacement": sign, "add_prefix_space": prefix, "prepend_scheme": scheme, "split": False}
        for sign, prefix, scheme in ((" ", True, "first"), (BLANK, False, "never"))
    ],
}
# How a byte-level tokenizer writes each byte: those that can be seen as themselves, the others from 256 on (GPT-2's bytes_to_unicode).
_SEEN = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTE_LETTERS = {byte: chr(byte) for byte in _SEEN}
BYTE_LETTERS |= {byte: chr(256 + place) for place, byte in enumerate(byte for byte in range(256) if byte not in _SEEN)}
# Limits, since every way to cut each piece in two is tried: characters of a piece (SentencePiece's default is 16), the sum of their
# squares, and merges (LLaMA has two for each piece).
LONGEST_PIECE, MAX_CUTTING, MAX_MERGES = 1024, 1 << 26, 1_000_000


def added_token(name: str, flags: JsonObject | None = None) -> JsonObject:
    """AddedToken's fields for the token `name`; `flags` that are true there are true."""
    fields = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return {"content": name, **{field: (flags or {}).get(field) is True for field in fields}}


def added_tokens(core: JsonObject) -> dict[int, JsonObject]:
    """The added tokens of a tokenizer.json by id, in the form of tokenizer_config.json, without those that can't be read."""
    entries = core.get("added_tokens")
    named = [e for e in entries if isinstance(e, dict) and isinstance(e.get("content"), str)] if isinstance(entries, list) else []
    return {entry["id"]: added_token(entry["content"], entry) for entry in named if type(entry.get("id")) is int}


class NoMerges(InputError):
    """Of this tokenizer.model no tokenizer.json can be made."""


def bpe_merges(vocabulary: Vocabulary) -> list[str]:
    """Every way to join two pieces into a third, by the third's score, then by the length of the first: the order of transformers 4.45
    and later. Control pieces and the like are left out: SentencePiece never merges them, nor into them."""
    ordinary = {name: vocabulary.scores[name] for name, kind in vocabulary.kinds.items() if kind == NORMAL}
    longest = max(map(len, ordinary), default=0)
    if longest > LONGEST_PIECE:
        what = f"a piece of `tokenizer.model` has {longest:,} characters, at most {LONGEST_PIECE:,} are read"
        raise NoMerges(what, hint=PUT_MODEL)
    if sum(len(name) ** 2 for name in ordinary) > MAX_CUTTING:
        raise NoMerges("the pieces of `tokenizer.model` are far longer than those of a tokenizer", hint=PUT_MODEL)
    cuts = (
        (score, cut, len(name) - cut, f"{name[:cut]} {name[cut:]}")
        for name, score in ordinary.items()
        for cut in range(1, len(name))
        if name[:cut] in ordinary and name[cut:] in ordinary
    )
    found = list(islice(cuts, MAX_MERGES + 1))
    if len(found) > MAX_MERGES:
        raise NoMerges(f"the pieces of `tokenizer.model` can be merged in more than {MAX_MERGES:,} ways", hint=PUT_MODEL)
    return [merge for *_, merge in sorted(found, key=lambda item: item[:3], reverse=True)]


def llama_json(
    vocabulary: Mapping[str, int], merges: list[Any], unk: str, *, start: Mapping[str, int], end: Mapping[str, int], blank: Blank
) -> JsonObject:
    """LLaMA's tokenizer.json without added tokens. `start` and `end` are the tokens put around every text, with their ids; `blank` says
    which pieces of text between special tokens get a blank before them."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    blanks = [{"type": "Prepend", "prepend": BLANK}] * (blank == "every") + [replace]
    back: list[JsonObject] = [{"type": "Replace", "pattern": {"String": BLANK}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    back += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * (blank != "none")
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": blanks}, "pre_tokenizer": FIRST if blank == "first" else None,
        "post_processor": _template(start, end), "decoder": {"type": "Sequence", "decoders": back},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unk, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": True, "byte_fallback": True, "vocab": dict(vocabulary), "merges": merges,
        },
    }  # fmt: skip


def taken_as_it_is(core: JsonObject) -> JsonObject:
    """A LLaMA's tokenizer.json with a last step that changes nothing.

    AutoTokenizer of transformers 5.23 and 5.24 makes its own form of every LlamaTokenizer whose config has a `model_type` that it does not
    know, as `llava_mistral`, which puts other blanks; but it takes a file in which this word stands.
    """
    nothing = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {**core, "post_processor": {"type": "Sequence", "processors": [core["post_processor"], nothing]}}


def _template(start: Mapping[str, int], end: Mapping[str, int]) -> JsonObject:
    def one(letter: str, number: int) -> list[JsonObject]:
        before, after = ([{"SpecialToken": {"id": name, "type_id": number}} for name in tokens] for tokens in (start, end))
        return [*before, {"Sequence": {"id": letter, "type_id": number}}, *after]

    special = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in {**start, **end}.items()}
    return {"type": "TemplateProcessing", "single": one("A", 0), "pair": one("A", 0) + one("B", 1), "special_tokens": special}


def qwen2_json(vocabulary: JsonObject, merges: str) -> JsonObject:
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


def bpe_model(core: JsonObject) -> tuple[dict[str, int], list[Any]]:
    """Vocabulary and merges of a tokenizer.json, each merge as one text, or as a list where a half holds a blank. Raises InputError
    unless it holds a BPE model whose ids are 0, 1, 2 and so on."""
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


def template_of(core: JsonObject) -> JsonObject:
    """The step of a tokenizer.json that puts tokens around a text; empty where there is none."""
    return next((step for step in _steps(core.get("post_processor")) if "single" in step), {})


def starts_with_bos(core: JsonObject) -> bool:
    """Whether a tokenizer.json puts a token before each text; True where it does not say."""
    single = template_of(core).get("single")
    return not (isinstance(single, list) and single and isinstance(single[0], dict) and "Sequence" in single[0])


def has_prefix(core: JsonObject) -> bool:
    """Whether LLaMA's tokenizer.json puts a blank before a text, by a normalizer or a Metaspace pre-tokenizer."""
    steps = [step for key in ("normalizer", "pre_tokenizer") for step in _steps(core.get(key))]
    return any(s.get("type") == "Prepend" or (s.get("type") == "Metaspace" and s.get("prepend_scheme") != "never") for s in steps)


def is_llama(core: JsonObject) -> bool:
    """Whether a BPE falls back on bytes, as LLaMA's; False where it is byte-level, as GPT-2's. Raises InputError for any other."""
    llama = core["model"].get("byte_fallback") is True
    if not llama and not any(step.get("type") == "ByteLevel" for step in _steps(core.get("decoder"))):
        raise InputError("`tokenizer.json` holds neither a LLaMA tokenizer nor a byte-level one", hint=PUT_MODEL)
    return llama


def splits_as_qwen2(core: JsonObject) -> bool:
    """Whether a byte-level tokenizer.json cuts a text as Qwen2Tokenizer does."""
    return any(step.get("pattern") == {"Regex": QWEN2_SPLIT} for step in _steps(core.get("pre_tokenizer")))


def _steps(value: Any) -> list[JsonObject]:
    """The steps of a normalizer, pre-tokenizer, post-processor or decoder, which is one step or a sequence of them."""
    if not isinstance(value, dict):
        return []
    inner = next((value[key] for key in ("normalizers", "pretokenizers", "decoders", "processors") if key in value), [value])
    return [step for step in inner if isinstance(step, dict)] if isinstance(inner, list) else []
