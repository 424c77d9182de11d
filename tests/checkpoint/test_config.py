"""config.json and generation_config.json: the published ones of 2023 repaired, checked against tensors, and hostile ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from llava_weights.checkpoint.config import check_structure, expected_shapes, repair_config, repair_generation_config
from llava_weights.checkpoint.tokenizer import SpecialIds
from llava_weights.errors import InputError
from llava_weights.text import fold_names

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
DATA = FIXTURES / "A-delta-v0"
IMAGE = {"<im_patch>": 32000, "<im_start>": 32001, "<im_end>": 32002}
IDS = SpecialIds(bos=1, eos=2, pad=0, unk=0, added=IMAGE, base_vocabulary=32000)
EMBEDDING = "model.embed_tokens.weight"

# LLaVA-13b-delta-v0's config.json as its page at f50f69d shows it.
V0_13B: dict[str, Any] = {
    "_name_or_path": "./checkpoints/LLaVA-13B-v0", "architectures": ["LlamaForCausalLM"], "bos_token_id": 0, "eos_token_id": 1,
    "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 13824, "max_sequence_length": 2048,
    "mm_hidden_size": 1024, "mm_use_im_start_end": True, "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14", "model_type": "llama", "num_attention_heads": 40, "num_hidden_layers": 40,
    "pad_token_id": -1, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0", "tune_mm_mlp_adapter": False, "use_cache": True, "use_mm_proj": True, "vocab_size": 32003,
}  # fmt: skip
GENERATION_V0 = {
    "_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "transformers_version": "4.28.0.dev0",
}  # fmt: skip


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, "np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def small(rows: int = 307, **changes: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A sound config without projector, and its shapes."""
    sizes = {"vocab_size": rows, "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {**sizes, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "model_type": "llama"}
    return {**config, **changes}, expected_shapes(config)


def repaired(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], ids: SpecialIds = IDS) -> tuple[dict[str, Any], tuple[str, ...]]:
    return repair_config(config, shapes=shapes, special_ids=ids, dtype="F16")


def with_projector(shapes: dict[str, tuple[int, ...]], **weights: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """`shapes` and a projector: its weights by place in the Sequential (`_0`, `_2`), or one Linear as `_`."""
    found = dict(shapes)
    for place, shape in weights.items():
        prefix = f"model.mm_projector.{place[1:]}".rstrip(".")
        found |= {f"{prefix}.weight": shape, f"{prefix}.bias": shape[:1]}
    return found


def test_13b_delta_v0_is_repaired_with_one_sentence_each() -> None:
    shapes = {name: (32003, 5120) if name in (EMBEDDING, "lm_head.weight") else shape for name, shape in expected_shapes(V0_13B).items()}
    shapes = with_projector(shapes, _=(5120, 1024))
    config, notes = repaired(V0_13B, shapes)
    assert config == dict(
        sorted(
            {
                **{key: value for key, value in V0_13B.items() if key not in ("_name_or_path", "max_sequence_length")},
                "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "bos_token_id": 1, "eos_token_id": 2,
                "pad_token_id": 0, "max_position_embeddings": 2048, "num_key_value_heads": 40, "mm_projector_type": "linear",
                "mm_use_im_patch_token": True, "mm_vision_select_feature": "patch", "image_aspect_ratio": "square",
            }.items()
        )
    )  # fmt: skip
    assert notes == (
        "config: dropped `_name_or_path`",
        "config: bos/eos/pad ids 0/1/-1 -> 1/2/0",
        "config: `max_sequence_length` 2048 -> `max_position_embeddings` 2048",
        'config: `model_type` "llama" -> "llava"',
        'config: `architectures` ["LlamaForCausalLM"] -> ["LlavaLlamaForCausalLM"]',
        'config: made explicit `image_aspect_ratio` "square", `mm_vision_select_feature` "patch", `num_key_value_heads` 40, '
        '`mm_use_im_patch_token` true, `mm_projector_type` "linear"',
    )
    assert repaired(config, shapes) == (config, ())
    check_structure(config, shapes)


@pytest.mark.parametrize("folder", ["expected-307-by-main", "delta-307-apr17"])
def test_reference_config_agrees_with_what_the_original_program_wrote(folder: str) -> None:
    shapes = stored_shapes(DATA / "expected-307-by-main/model.safetensors")
    ids = SpecialIds(bos=1, eos=2, pad=0, unk=0, added={"<im_patch>": 304}, base_vocabulary=304)
    new, _ = repaired(json.loads((DATA / folder / "config.json").read_bytes()), shapes, ids)
    expected = json.loads((DATA / "expected-307-by-main/config.json").read_bytes())
    differ = {key for key in expected.keys() & new.keys() if expected[key] != new[key]}
    assert differ <= {"model_type", "transformers_version"}
    assert expected["model_type"] == "llava_llama"  # as this program calls it since 2024; it stays where it was written
    assert new["model_type"] == {"expected-307-by-main": "llava_llama", "delta-307-apr17": "llava"}[folder]
    check_structure(new, shapes)
    check_structure({**new, "vocab_size": 5}, shapes, vocabulary_rows=307)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("folder", ["A-delta-v0/expected-307-by-main", "F-peft/base-fp32"])  # the latter has 2 key heads for 4
def test_expected_shapes_are_those_that_transformers_wrote(folder: str, tied: bool) -> None:
    config = json.loads((FIXTURES / folder / "config.json").read_bytes())
    expected = stored_shapes(FIXTURES / folder / "model.safetensors")
    new = expected_shapes({**config, "tie_word_embeddings": tied})
    assert new == {name: shape for name, shape in expected.items() if "mm_" not in name and not (tied and name == "lm_head.weight")}


def test_repaired_config_loads_in_transformers() -> None:
    from transformers import LlamaConfig

    config, shapes = small(max_sequence_length=512, max_position_embeddings=None, rms_norm_eps=None, num_attention_heads=4)
    config.update(bos_token_id=0, eos_token_id=1, pad_token_id=-1, torch_dtype="bfloat16", dtype="float32")
    new, _ = repaired(config, shapes)
    expected = LlamaConfig.from_dict(new)
    assert (expected.bos_token_id, expected.eos_token_id, expected.pad_token_id) == (1, 2, 0)
    assert (expected.max_position_embeddings, expected.rms_norm_eps, expected.num_key_value_heads) == (512, 1e-6, 4)
    assert (new["torch_dtype"], new["dtype"], str(expected.dtype)) == ("float16", "float16", "torch.float16")


def test_a_vicuna_stays_a_llama() -> None:
    config, shapes = small(mm_vision_tower="openai/clip-vit-large-patch14", model_type="llava")
    new, notes = repaired(config, shapes)
    assert (new["model_type"], new["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "mm_projector_type" not in new
    assert 'config: `model_type` "llava" -> "llama"' in notes


def test_other_families_keep_their_type() -> None:
    config, shapes = small(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=4096)
    new, _ = repaired(config, shapes)
    assert (new["model_type"], new["architectures"], new["sliding_window"]) == ("mistral", ["MistralForCausalLM"], 4096)


@pytest.mark.parametrize(
    ("weights", "kind", "width"),
    [
        ({"_": (48, 24)}, "linear", 24),
        ({"_0": (48, 24)}, "mlp1x_gelu", 24),
        ({"_0": (48, 32), "_2": (48, 48)}, "mlp2x_gelu", 32),
        ({"_0": (48, 32), "_2": (48, 48), "_4": (48, 48)}, "mlp3x_gelu", 32),
        ({"_queries": (7, 24)}, "as it was", 99),
        ({"_0": (48, 32), "_1": (48, 48)}, "as it was", 99),
    ],
)
def test_projector_type_and_width_come_from_its_tensors(weights: dict[str, tuple[int, int]], kind: str, width: int) -> None:
    config, shapes = small(mm_projector_type="as it was", mm_hidden_size=99)
    new, notes = repaired(config, with_projector(shapes, **weights))
    assert (new["mm_projector_type"], new["mm_hidden_size"]) == (kind, width)
    assert any("`mm_projector_type`" in note for note in notes) == (width != 99)


@pytest.mark.parametrize(
    ("config", "added", "result"), [({}, IMAGE, True), ({}, {}, False), ({"mm_use_im_patch_token": False}, IMAGE, False)]
)
def test_the_image_token_flag_says_what_the_vocabulary_has(config: dict[str, Any], added: dict[str, int], result: bool) -> None:
    sound, shapes = small()
    ids = SpecialIds(1, 2, 0, 0, added, 300)
    assert repaired({**sound, **config}, with_projector(shapes, _=(48, 24)), ids)[0]["mm_use_im_patch_token"] is result


@pytest.mark.parametrize(("pad", "result"), [(306, 306), (307, 0), (-1, 0)])
def test_pad_is_inside_the_table(pad: int, result: int) -> None:
    config, shapes = small()
    assert repaired(config, shapes, SpecialIds(1, 2, pad, 0, {}, 304))[0]["pad_token_id"] == result


def test_what_makes_a_reader_run_code_or_load_other_weights_is_dropped() -> None:
    evil = {
        "auto_map": {"AutoConfig": "evil.Config"}, "_attn_implementation_internal": "kernels/evil", "_commit_hash": "0",
        "attn_implementation": "x/y", "trust_remote_code": True, "quantization_config": {"load_in_4bit": True},
        "text_config": {"trust_remote_code": True}, "deep": [[[[1]]]], "huge": 10**30, "_\n": 1,
    }  # fmt: skip
    config, shapes = small(
        **evil, image_grid_pinpoints=[[336, 672], [672, 336]], rope_scaling={"type": "linear", "factor": 2.0}, mm_lr=None
    )
    new, notes = repaired(config, shapes)
    assert not set(evil) & set(new)
    assert new["image_grid_pinpoints"] == [[336, 672], [672, 336]]
    assert new["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert "mm_lr" in new
    assert any(note.startswith("config: dropped `auto_map`") for note in notes)


@pytest.mark.parametrize(
    ("tower", "noted"), [("./checkpoints/clip", True), ("/home/x/clip", True), ("openai/clip-vit-large-patch14", False)]
)
def test_a_tower_on_the_authors_machine_is_kept_and_noted(tower: str, noted: bool) -> None:
    config, shapes = small(mm_vision_tower=tower)
    new, notes = repaired(config, shapes)
    assert new["mm_vision_tower"] == tower
    assert any("author's machine" in note for note in notes) is noted


@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [
        ("hidden_size", 4096, EMBEDDING),
        ("intermediate_size", 11008, "mlp.gate_proj.weight"),
        ("num_attention_heads", 5, "self_attn.q_proj.weight"),
        ("num_key_value_heads", 2, "self_attn.k_proj.weight"),
        ("head_dim", 7, "self_attn.q_proj.weight"),
        ("num_hidden_layers", 3, "2 layers"),
        ("hidden_size", "48", "hidden_size"),
        ("num_hidden_layers", True, "num_hidden_layers"),
        ("num_attention_heads", 0, "num_attention_heads"),
        ("num_attention_heads", None, "no tensor tells it"),
        ("max_position_embeddings", -4, "max_position_embeddings"),
        ("rms_norm_eps", "small", "rms_norm_eps"),
        ("rope_theta", float("nan"), "rope_theta"),
        ("rope_scaling", {"factor": float("inf")}, "rope_scaling"),
    ],
)
def test_contradictions_are_refused_by_name(key: str, value: Any, tensor: str) -> None:
    config, shapes = small()
    with pytest.raises(InputError) as caught:
        repaired({**config, key: value}, shapes)
    assert tensor in caught.value.what
    assert caught.value.exit_code == 3


def test_missing_sizes_are_filled_from_the_tensors() -> None:
    config, shapes = small()
    kept = {"num_attention_heads": 4}
    new, notes = repaired(kept, shapes)
    assert {key: new[key] for key in config} == config
    assert "`hidden_size` 48" in notes[-1]


def test_a_published_size_tells_its_heads() -> None:
    shapes = expected_shapes(V0_13B)
    assert repaired({}, shapes)[0]["num_attention_heads"] == 40


def test_separate_output_rows_untie_the_config() -> None:
    config, shapes = small(tie_word_embeddings=True)
    assert repaired(config, shapes)[0]["tie_word_embeddings"] is False
    del shapes["lm_head.weight"]
    assert repaired(config, shapes)[0]["tie_word_embeddings"] is True


def test_structure_errors_fold_the_names() -> None:
    config, shapes = small()
    shapes["model.layers.1.self_attn.q_proj.weight"] = (48, 47)
    for layer in (0, 1):
        del shapes[f"model.layers.{layer}.mlp.up_proj.weight"]
    shapes |= {
        "model.layers.2.mlp.up_proj.weight": (1,),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (6,),
        "model.mm_projector.bias": (48,),
    }
    with pytest.raises(InputError) as caught:
        check_structure(config, shapes)
    assert caught.value.facts == {
        "missing": "model.layers.{0,1}.mlp.up_proj.weight (2)",
        "unexpected": "model.layers.2.mlp.up_proj.weight",
        "of another shape": "model.layers.1.self_attn.q_proj.weight",
        "`model.layers.1.self_attn.q_proj.weight`": "[48, 47], by config.json [48, 48]",
    }


def test_absurd_sizes_cost_nothing() -> None:
    config, shapes = small()
    with pytest.raises(InputError, match="num_hidden_layers"):
        check_structure({**config, "num_hidden_layers": 10**6}, shapes)
    with pytest.raises(InputError, match="vocab_size"):
        check_structure({**config, "vocab_size": 10**12}, shapes)


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([f"model.layers.{n}.self_attn.q_proj.weight" for n in range(40)], ["model.layers.{0..39}.self_attn.q_proj.weight (40)"]),
        (["a.7.b", "lm_head.weight", "a.3.b", "a.4.b", "a.5.b"], ["a.{3..5,7}.b (4)", "lm_head.weight"]),
        (["p.0.weight", "p.2.weight"], ["p.{0,2}.weight (2)"]),
        (["a.0.b.1", "a.1.b.1", "a.1.b.2"], ["a.{0,1}.b.1 (2)", "a.1.b.2"]),
        (["a.07.b", "a.7.b"], ["a.07.b", "a.7.b"]),
        (["evil\x1b[31m"], ["evil\ufffd[31m"]),
        ([], []),
    ],
)
def test_names_fold_by_their_first_number(names: list[str], folded: list[str]) -> None:
    assert fold_names(names) == folded


def test_a_number_without_end_is_just_a_name() -> None:
    (folded,) = fold_names(["a." + "9" * 10_000 + ".b"])
    assert folded.startswith("a.999")
    assert len(folded) < 5000


# --- generation_config.json -----------------------------------------------------------------------------------------


def test_published_generation_config_is_made_anew() -> None:
    text = json.dumps(GENERATION_V0, indent=2, sort_keys=True) + "\n"
    assert hashlib.md5(text.encode()).hexdigest() == "f64a72a6ddd8f35635606b2863fd6931"  # haotian-liu/LLaVA #48
    new, notes = repair_generation_config(GENERATION_V0, IDS)
    assert new == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert notes == (
        "generation_config: dropped `_from_model_config`, `transformers_version`",
        "generation_config: bos/eos/pad ids 0/1/0 -> 1/2/0",
    )
    assert repair_generation_config(None, IDS) == (new, ("generation_config: written with bos/eos/pad ids 1/2/0",))


def test_sampling_without_do_sample_is_what_transformers_refuses() -> None:
    """Vicuna's file of 2023, which ended LLaVA's merge script (haotian-liu/LLaVA #1406)."""
    from transformers import GenerationConfig

    published = {"max_length": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}
    with pytest.raises(ValueError, match="do_sample"):
        GenerationConfig.from_dict(published).validate(strict=True)
    new, notes = repair_generation_config(published, IDS)
    GenerationConfig.from_dict(new).validate(strict=True)
    assert new == {**published, "do_sample": True}
    assert notes == ("generation_config: `do_sample` -> true, `temperature`, `top_p` means nothing without it",)


VALUES = st.none() | st.booleans() | st.integers(-3, 3000) | st.floats(-2, 3) | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
FIELDS = ["bos_token_id", "eos_token_id", "do_sample", "temperature", "top_k", "top_p", "typical_p", "max_length", "num_beams", "use_cache"]


@settings(max_examples=100)
@given(generation=st.dictionaries(st.sampled_from([*FIELDS, "repetition_penalty", "_x"]), VALUES))
def test_any_generation_config_becomes_a_valid_one(generation: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    new, notes = repair_generation_config(generation, IDS)
    GenerationConfig.from_dict(new).validate(strict=True)
    assert repair_generation_config(new, IDS) == (new, ())
    assert bool(notes) == (json.dumps(new) != json.dumps(dict(sorted(generation.items()))))


NESTED = st.recursive(
    VALUES | st.integers() | st.floats(), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=2)
)
SOUND, SHAPES = small()
KEYS = [*SOUND, "head_dim", "rope_scaling", "architectures", "torch_dtype", "mm_vision_tower", "max_sequence_length", "mm_hidden_size"]


@settings(max_examples=150)
@given(config=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), NESTED, max_size=4), projector=st.booleans())
def test_any_config_is_repaired_once_or_refused(config: dict[str, Any], projector: bool) -> None:
    shapes = with_projector(SHAPES, _=(48, 24)) if projector else SHAPES
    try:
        new, notes = repaired({**SOUND, **config}, shapes)
    except InputError:
        return
    json.dumps(new, allow_nan=False)
    check_structure(new, shapes)
    assert all(note.isprintable() for note in notes)
    again, more = repaired(new, shapes)
    assert again == new
    assert all("author's machine" in note for note in more)
