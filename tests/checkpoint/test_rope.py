"""Every spelling of a rope gives the same words, and what transformers' own config class makes of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers

from llava_weights.checkpoint.config import repair_config
from llava_weights.checkpoint.hf_config import flat_config
from llava_weights.checkpoint.rope import check_rope, plain_rope
from llava_weights.checkpoint.tokenizer import SpecialIds
from llava_weights.errors import InputError
from llava_weights.families.decoders import DECODER_BY_TYPE

LLAMA_3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64}
LONG = {"long_factor": [1.0, 2.0], "short_factor": [1.0, 1.5]}
PLAIN = {"rope_theta": 5e5, "rope_scaling": None}
KINDS = ("full_attention", "sliding_attention")
# model_type, what a config says, what is written
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "older words": ("llama", PLAIN, PLAIN),
    "default": ("llama", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, PLAIN),
    "theta in `rope_scaling`": ("llama", {"rope_scaling": {"rope_theta": 5e5, "rope_type": "default"}}, PLAIN),
    "no theta": ("mixtral", {"rope_parameters": {"rope_type": "default"}}, {"rope_theta": 1e6, "rope_scaling": None}),
    "kinds of layers": ("qwen2", {"rope_parameters": {kind: {"rope_theta": 5e5} for kind in KINDS}}, PLAIN),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"factor": 2.0, "type": "linear"}},
    ),
    "llama3": (
        "granite",
        {"rope_parameters": {**LLAMA_3, "rope_theta": 5e5, "rope_type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA_3, "rope_type": "llama3"}},
    ),
    "llama3 as `type`": (
        "llama",
        {"rope_parameters": {**LLAMA_3, "rope_theta": 5e5, "type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA_3, "rope_type": "llama3"}},
    ),
    "longrope": (
        "phi3",
        {"rope_parameters": {**LONG, "rope_theta": 5e5, "rope_type": "longrope", "original_max_position_embeddings": 4096}},
        {"rope_theta": 5e5, "rope_scaling": {**LONG, "type": "longrope"}, "original_max_position_embeddings": 4096},
    ),
    "a part of each head": (
        "stablelm",
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 0.25}},
        {**PLAIN, "partial_rotary_factor": 0.25},
    ),
    "the whole of each head": ("llama", {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0}}, PLAIN),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "written"), CASES.values(), ids=CASES)
def test_every_spelling_is_read(kind: str, given: dict[str, Any], written: dict[str, Any]) -> None:
    decoder = DECODER_BY_TYPE[kind]
    assert plain_rope(given, decoder) == written
    assert plain_rope(written, decoder) == written
    check_rope(given)
    nested = flat_config({"text_config": {"model_type": kind, **given}})
    assert {key: nested[key] for key in written} == written
    sizes = {"hidden_size": 16, "num_attention_heads": 4}
    both = [getattr(transformers, decoder.config_class)(**sizes, **words).rope_parameters for words in (given, written)]
    plain = [{key: value for key, value in (rope.get("full_attention") or rope).items() if key != "type"} for rope in both]
    for key in ("rope_theta", *plain[1]) if kind != "qwen2" else ("rope_theta",):  # Qwen2's class has no kinds of layers
        default = {"partial_rotary_factor": 1.0, "rope_type": "default", "original_max_position_embeddings": None}.get(key)
        assert plain[0].get(key, default) == plain[1][key] or "type" in str(given), key


SCALINGS: tuple[dict[str, Any], ...] = (
    {}, {"rope_type": "default"}, {"type": "default"}, {"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0, "type": "dynamic"}, {**LLAMA_3, "rope_type": "llama3"}, {**LONG, "rope_type": "longrope"},
    {**LONG, "type": "su"}, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
)  # fmt: skip


def _told(decoder: Any, config: dict[str, Any]) -> Any:
    """The rope that its class makes of a config, or what the class says of it."""
    try:
        kind = getattr(transformers, decoder.config_class)
        rope = kind(hidden_size=16, num_attention_heads=4, max_position_embeddings=256, **copy.deepcopy(config)).rope_parameters
    except Exception as error:
        return type(error)
    plain = {key: value for key, value in rope.items() if key != "type" and value is not None}
    return {key: value for key, value in plain.items() if (key, value) != ("partial_rotary_factor", 1.0)}


@pytest.mark.parametrize("decoder", DECODER_BY_TYPE.values(), ids=str)
def test_every_class_takes_what_is_written_for_what_was_given(decoder: Any) -> None:
    for scaling in SCALINGS:
        both = {**scaling, "rope_theta": 5e5}
        spellings = ({"rope_parameters": both}, {"rope_parameters": {**both, "partial_rotary_factor": 0.5}}, {"rope_scaling": both},
                     {"rope_theta": 5e5, "rope_scaling": scaling}, {"rope_theta": 5e5, "rope_parameters": scaling},
                     {"rope_scaling": scaling}, {"rope_parameters": scaling})  # fmt: skip
        for given in spellings:
            check_rope(given)
            assert _told(decoder, plain_rope(given, decoder)) == _told(decoder, given), given


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": None}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
        {"rope_scaling": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    ],
)
def test_two_ropes_in_one_config_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="rope_"):
        check_rope(config)


def test_an_original_config_of_transformers_5_keeps_its_theta() -> None:
    config = {
        "model_type": "llava_llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    }  # fmt: skip
    shapes = DECODER_BY_TYPE["llama"].shapes({**config, "num_key_value_heads": 4, "head_dim": 4, "vocab_size": 10})
    made, notes = repair_config(config, shapes=shapes, special_ids=SpecialIds(1, 2, 0, 0, {}, 0), dtype="F16")
    assert (made["rope_theta"], made["rope_scaling"], "rope_parameters" in made) == (5e5, None, False)
    assert any("`rope_theta` 500000.0" in note for note in notes)
