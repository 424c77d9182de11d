"""The base of a QLoRA as it was in training: what `quantization_config` records of it, and its matrices after the same rounding.

By default an update goes into the weights as they are stored, to which it was not fitted; `round_base` first gives them the values that
bitsandbytes made of them. Only matrices of the decoder's layers are rounded: never the head, embeddings, norms, projector or tower, nor
what `llm_int8_skip_modules` names. Source: `BitsAndBytesConfig` and `should_convert_module` of transformers 4.31-5.23, LLaVA's train.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from typing import cast as cast_type

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import QUANTIZATION
from ..errors import InputError, MismatchError, one_of
from ..families.layouts import PEFT_PREFIX, placed
from ..families.quantised import TITLES
from ..tensors.lazy import LazyTensor
from ..tensors.round_trip import Rounding, round_trip
from ..text import listed, shown
from .adapter import Adapter

DOUBLE = "-double"
ROUNDINGS = ("nf4", "nf4-double", "fp4", "fp4-double", "int8")  # "-double": the scales of the blocks were quantised too
DECODER_MATRIX = r"text\.layers\.\d+\..+\.weight"


@dataclass(frozen=True)
class Training:
    """How a base was quantised while an adapter was trained on it. `rounding` is one of `ROUNDINGS`, or empty where it was not by
    bitsandbytes; `title` is that in words, `evidence` says which file tells, `skipped` are the modules that were left alone."""

    rounding: str
    title: str
    evidence: str
    skipped: tuple[str, ...] = ()


def recorded_training(base: Checkpoint, adapters: Iterable[Adapter]) -> Training | None:
    """What the adapters' config.json, or else the base's, record of a quantised base; None where they record none."""
    for origin, config in (*((adapter.origin, adapter.config) for adapter in adapters), (base.origin, base.config)):
        text = config.get("text_config")
        for part in (config, text if isinstance(text, Mapping) else {}):
            if isinstance(found := part.get(QUANTIZATION), Mapping):
                return _training(found, f"`{QUANTIZATION}` in config.json of {shown(origin.name)}")
    return None


def _training(settings: Mapping[str, Any], evidence: str) -> Training:
    skipped = settings.get("llm_int8_skip_modules")
    names = tuple(map(str, skipped)) if isinstance(skipped, list) else ()
    bits = next((bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit") is True or settings.get(f"_load_in_{bits}bit") is True), 0)
    method = str(settings.get("quant_method") or "")
    kind = str(settings.get("bnb_4bit_quant_type") or "fp4")
    if method not in ("", "bitsandbytes") or not bits or (bits == 4 and kind not in ROUNDINGS):
        return Training("", TITLES.get(method, shown(method or "an unknown method")), evidence, names)
    rounding = "int8" if bits == 8 else kind + (DOUBLE if settings.get("bnb_4bit_use_double_quant") is True else "")
    return Training(rounding, title_of(rounding), evidence, names)


def title_of(rounding: str) -> str:
    """One of `ROUNDINGS` in words."""
    kind = rounding.removesuffix(DOUBLE)
    return f"bitsandbytes' {kind}" + (" with double quantisation" if kind != rounding else "")


def to_rounding(text: str | None) -> str | None:
    """The rounding called `text`. Raises UsageError for others."""
    return None if text is None else one_of("base-quantized", text, ROUNDINGS)


def settled(given: str, recorded: Training | None) -> Training:
    """The rounding to apply: the one that was given, "nf4" and "fp4" with double quantisation where that is recorded.

    Raises MismatchError where another one is recorded."""
    if recorded is None:
        return Training(given, title_of(given), "the option")
    if recorded.rounding.removesuffix(DOUBLE) == given:
        return recorded
    if recorded.rounding == given:
        return recorded
    facts = {"given": title_of(given), "recorded": recorded.title, "where": recorded.evidence}
    known = recorded.rounding and f"give `{recorded.rounding}`, or take that entry out if it is not the training's"
    hint = known or "leave the option out, to merge into the weights as they are stored"
    raise MismatchError("the adapter was trained on a base that was quantised in another way", facts=facts, hint=hint)


def round_base(tensors: Mapping[str, LazyTensor], training: Training) -> dict[str, LazyTensor]:
    """The matrices of `tensors` that bitsandbytes quantised in training, by name, as it gave them back: in their own dtype, but float32
    for 8 bits, so that the update is added before the result is rounded.

    Raises InputError for a skipped module that is an expression, MismatchError where the base has no such matrices."""
    if strange := [key for key in training.skipped if re.search(r"[*+?\[\](){}|^$\\]", key)]:
        what = f"`llm_int8_skip_modules` holds {listed(strange)}, an expression in place of a module's name"
        raise InputError(what, facts={"where": training.evidence}, hint="write the names of the modules that were not quantised")
    kind, double = training.rounding.removesuffix(DOUBLE), training.rounding.endswith(DOUBLE)
    found = {
        name: round_trip(tensor, cast_type(Rounding, kind), double=double)
        for name, tensor in tensors.items()
        if re.fullmatch(DECODER_MATRIX, placed(name)) and len(tensor.shape) == 2 and not _skipped(name, training.skipped)
    }
    if not found:
        what = "the base has no matrix in a decoder's layers that bitsandbytes would have quantised"
        raise MismatchError(what, facts={"skipped": listed(training.skipped) or "nothing"}, hint="leave `--base-quantized` out")
    return dict(found)


def _skipped(name: str, keys: Iterable[str]) -> bool:
    """Whether one of the names of skipped modules means this weight: from the start up to a dot, in any layout, or as an ending."""
    module = name.removesuffix(".weight")
    for key in (key.removeprefix(PEFT_PREFIX) for key in keys):
        starts = f"{module}.".startswith(f"{key}.") or f"{placed(module)}.".startswith(f"{placed(key)}.")
        if starts or module.endswith(key):
            return True
    return False
