"""The names that tensors have in a file, as those of a model: without the prefixes of what a model was wrapped in, the one table of a tied
pair under the embedding's name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..families.layouts import BASE_LAYER, PEFT_PREFIX, WRAPPERS, canonical
from ..tensors.lazy import LazyTensor
from ..text import listed

Tensors = Mapping[str, LazyTensor]
ADAPTED = re.compile(r"\.lora_|\.(hada|lokr|vera|ia3|oft|boft)_")


def model_names(tensors: Tensors, config: Mapping[str, Any]) -> tuple[Tensors, str, tuple[str, ...]]:
    """The tensors by the names of their model, what was taken off the stored names ("" for nothing), and a note on each change.

    Raises InputError where two names become one."""
    found, taken = _unwrapped(tensors)
    notes = [f"names are read without {taken}, which a wrapper of the model put there when it was saved"] if taken else []
    found, tied = _with_embedding(found, config)
    notes += [f"only {tied} is stored of the tied pair: it is the embedding table too"] if tied else []
    return found, taken, tuple(notes)


def _unwrapped(tensors: Tensors) -> tuple[Tensors, str]:
    """Without `module.`, `_orig_mod.` and the like, as an adapter's names are read; not where an adapter is among them."""
    if any(ADAPTED.search(name) for name in tensors):
        return tensors, ""
    names = {name: WRAPPERS.sub("", name) for name in tensors}
    peft = all(name.startswith(PEFT_PREFIX) for name in names.values())
    short = {name: BASE_LAYER.sub("", now.removeprefix(PEFT_PREFIX) if peft else now) for name, now in names.items()}
    if peft and all(re.match(r"model\.mm_projector\.", now) for now in short.values()):
        return tensors, ""  # a projector's file, which has a layout of its own
    if all(name == now for name, now in short.items()):
        return tensors, ""
    if twice := [now for now, count in Counter(short.values()).items() if count > 1]:
        facts = {"names": listed(name for name, now in short.items() if now == twice[0])}
        raise InputError(
            f"{len(twice):,} tensors are there with the prefix of a wrapper and without", facts=facts, hint="keep one of the two"
        )
    gone = {found[0] for name in tensors for found in WRAPPERS.finditer(name)}
    gone |= ({PEFT_PREFIX} if peft else set()) | {found[0] for name in tensors for found in BASE_LAYER.finditer(name)}
    return {short[name]: tensor for name, tensor in tensors.items()}, listed(sorted(gone))


def _with_embedding(tensors: Tensors, config: Mapping[str, Any]) -> tuple[Tensors, str]:
    """A tied pair of which only the head is stored, under the name of the embedding: which of the two a save keeps is chance."""
    text = config.get("text_config")
    parts = (config, text if isinstance(text, Mapping) else {})
    if not any(part.get("tie_word_embeddings") is True for part in parts):
        return tensors, ""
    by_part = {canonical(name): name for name in tensors}
    head, first = by_part.get("head.weight"), by_part.get("text.layers.0.input_layernorm.weight")
    if head is None or first is None or "text.embed_tokens.weight" in by_part:
        return tensors, ""
    embedding = first.removesuffix("layers.0.input_layernorm.weight") + "embed_tokens.weight"
    return {embedding if name == head else name: tensor for name, tensor in tensors.items()}, f"`{head}`"
