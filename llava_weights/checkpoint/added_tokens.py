"""The tokens that a checkpoint's files name, by every file that lists them; and a list that is left from another save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..text import shown
from . import tokenizer_json
from .sentencepiece import read_sentencepiece
from .small_files import small_bytes, small_object
from .tokenizer import ADDED, FAST, FAST_LIMIT, MODEL, MODEL_LIMIT, TOKENIZER_CONFIG, is_token_id, token_text

VOCABULARY_FILE = "vocab.json"
Files = Mapping[str, "Path | bytes"]


def listed_tokens(files: Files) -> dict[str, int]:
    """Ids by text of the added tokens, as tokenizer.json, tokenizer_config.json and added_tokens.json list them."""
    return _known(_core(files), small_object(files, TOKENIZER_CONFIG)) | {
        name: i for name, i in small_object(files, ADDED).items() if is_token_id(i)
    }


def every_token(files: Files) -> dict[str, int]:
    """Ids by text of the whole vocabulary and of the added tokens. Raises InputError for damaged files."""
    return ordinary_tokens(files) | listed_tokens(files)


def ordinary_tokens(files: Files) -> dict[str, int]:
    """Ids by text of the vocabulary without what was added to it. Raises InputError for damaged files."""
    model = _core(files).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if MODEL in files:
        vocabulary = read_sentencepiece(small_bytes(MODEL, files[MODEL], MODEL_LIMIT)).ids
    elif not isinstance(vocabulary, Mapping):
        vocabulary = small_object(files, VOCABULARY_FILE, limit=FAST_LIMIT)
    return {name: i for name, i in vocabulary.items() if is_token_id(i)}


def without_stale_list(files: Files) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    """The files without an added_tokens.json that contradicts the tokenizer.json beside it, and a sentence on it.

    transformers reads such a list only where neither tokenizer.json nor tokenizer_config.json names added tokens. Beside a tokenizer.model
    it is one of the slow tokenizer's own files, and stays."""
    kept = dict(files)
    if ADDED not in files or FAST not in files or MODEL in files:
        return kept, ()
    core = _core(files)
    model = core.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else {}
    known = {**(vocabulary if isinstance(vocabulary, dict) else {}), **_known(core, small_object(files, TOKENIZER_CONFIG))}
    names = {i: name for name, i in known.items() if is_token_id(i)}
    odd = [
        name for name, i in small_object(files, ADDED).items() if known.get(name, i) != i or (is_token_id(i) and names.get(i, name) != name)
    ]
    if not odd:
        return kept, ()
    del kept[ADDED]
    return kept, (f"{ADDED}: left out, it contradicts {FAST} about {shown(odd[0])}: it is of another save",)


def _core(files: Files) -> dict[str, Any]:
    return small_object(files, FAST, limit=FAST_LIMIT)


def _known(core: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, int]:
    found = {entry["content"]: i for i, entry in tokenizer_json.added_tokens(core).items()}
    decoder = settings.get("added_tokens_decoder")
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        if key.isdecimal() and len(key) < 10 and (name := token_text(entry)):
            found.setdefault(name, int(key))
    return found
