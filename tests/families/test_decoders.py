"""A LLaVA on each decoder as transformers saves it: every value of its config stays, and what it computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlavaConfig, LlavaForConditionalGeneration

import llava_weights as lw
from llava_weights.cli.toy import make_llava
from llava_weights.families.decoders import DECODER_BY_TYPE
from llava_weights.families.originals import ORIGINALS

FREE = {"head_dim": 32}
GRANITE = {"embedding_multiplier": 12.0, "attention_multiplier": 0.0156, "residual_multiplier": 0.22, "logits_scaling": 8.0}
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 3e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
PART = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
# What no class has by default.
UNUSUAL: dict[str, dict[str, Any]] = {
    "llama": {**FREE, "rope_parameters": {"rope_type": "linear", "rope_theta": 3e5, "factor": 2.0}, "attention_bias": True},
    "mistral": {**FREE, "sliding_window": None, "rms_norm_eps": 1e-3},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4},
    "qwen3": {**FREE, "attention_bias": True, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
    "gemma": FREE,
    "gemma2": {**FREE, "query_pre_attn_scalar": 24, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "sliding_window": 4},
    "phi3": {"rope_parameters": LONG, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096},
    "mixtral": {**FREE, "num_local_experts": 4, "rope_theta": 5e5},
    "stablelm": {"use_qkv_bias": True, "layer_norm_eps": 1e-3, "rope_parameters": PART},
    "granite": {**GRANITE, "mlp_bias": True, "attention_bias": True, "rope_parameters": LLAMA_3},
}
LIST = [1, 2]
WORKED_OUT = ("rope_theta", "rope_scaling", "architectures", "head_dim")


def write(checkpoint: lw.Checkpoint, folder: Path) -> Path:
    lw.execute(lw.make_plan(checkpoint), folder)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def saved(folder: Path, decoder: str) -> Path:
    """A LLaVA on `decoder` with unusual settings, saved by transformers itself, its tokenizer beside it."""
    row = next(row for row in ORIGINALS if decoder in row.decoders and row.target == "llava")
    make_llava(folder, row, decoder=decoder, tower="clip")
    made = write(lw.convert(folder / "llava", "llava-hf"), folder / "hf")
    config = config_of(made)
    plain = {
        key: value for key, value in config["text_config"].items() if key not in ("rope_theta", "rope_scaling", "architectures", "head_dim")
    }
    config["text_config"] = {**plain, **UNUSUAL[decoder], "eos_token_id": [*LIST, plain["eos_token_id"]]}
    torch.manual_seed(5)
    model = LlavaForConditionalGeneration(LlavaConfig(**{key: value for key, value in config.items() if key != "dtype"}))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (1.2 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.3)
    model.half().save_pretrained(made)
    for name in ("SHA256SUMS", "llava-weights.manifest.json", "README.md"):
        (made / name).unlink()
    return made


def logits(folder: Path) -> torch.Tensor:
    model, told = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    image = model.config.image_token_id
    ids = torch.tensor([[5, 9, image, image, image, image, 7, 11]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, pixel_values=pixels).logits
    return found


@pytest.mark.parametrize("decoder", DECODER_BY_TYPE)
def test_every_value_stays(tmp_path: Path, decoder: str) -> None:
    source = saved(tmp_path, decoder)
    there = write(lw.convert(source, "llava-hf"), tmp_path / "there")
    given, made = config_of(source), config_of(there)
    assert {**made, **given}.keys() - {"transformers_version"} == made.keys()
    assert {key: made[key] for key in given if not isinstance(given[key], dict) and key != "transformers_version"}.items() <= given.items()
    for part in ("text_config", "vision_config"):
        kept = {key: value for key, value in given[part].items() if key != "rope_parameters"}
        assert {key: made[part].get(key) for key in kept} == kept
    classes = [getattr(transformers, DECODER_BY_TYPE[decoder].config_class)(**config["text_config"]) for config in (given, made)]
    ropes = [{key: value for key, value in each.rope_parameters.items() if key != "type"} for each in classes]
    assert ropes[0] == ropes[1]
    generation = json.loads((there / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == given["text_config"]["eos_token_id"]
    back = write(lw.convert(there, "llava"), tmp_path / "back")
    tower = tmp_path / "tower"
    again = write(lw.convert(back, "llava-hf", tower=tower), tmp_path / "again")
    expected, rows = logits(source), config_of(back)["vocab_size"]
    assert torch.equal(logits(there), expected)
    assert torch.equal(logits(again)[..., :rows], expected[..., :rows])  # those behind them are new
    assert lw.diff(back, write(lw.convert(again, "llava"), tmp_path / "back-again")).equal


def test_what_a_config_leaves_out_is_the_default_of_its_class_and_said(tmp_path: Path) -> None:
    for decoder, positions in (("qwen2", 32768), ("mistral", 131072), ("phi3", 4096), ("gemma", 8192)):
        folder = tmp_path / decoder
        source = saved(folder, decoder)
        config = config_of(source)
        del config["text_config"]["max_position_embeddings"]
        (source / "config.json").write_text(json.dumps(config))
        for layout in ("llava-hf", "llava"):
            made = lw.convert(source, layout)
            text = made.config.get("text_config", made.config)
            assert text["max_position_embeddings"] == positions
            assert any(f"`max_position_embeddings` {positions}" in note for note in made.history[-1].notes)


def test_a_quantization_config_of_plain_weights_is_left_out_and_said(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama")
    config = config_of(source)
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config["text_config"]["quantization_config"] = {"quant_method": "awq"}
    (source / "config.json").write_text(json.dumps(config))
    made = lw.convert(source, "llava-hf")
    assert "quantization_config" not in {**made.config, **made.config["text_config"]}
    assert sum("quantization_config" in repair for repair in made.history[-1].repairs) == 2


def test_a_rope_for_each_kind_of_layer_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen2")
    config = config_of(source)
    config["text_config"]["rope_parameters"] = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    (source / "config.json").write_text(json.dumps(config))
    for layout in ("llava-hf", "llava"):
        with pytest.raises(lw.InputError, match="differs from layer to layer"):
            lw.convert(source, layout)


def test_a_value_that_tensors_or_tokens_contradict_is_replaced_and_said(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama")
    config = config_of(source)
    config["image_seq_length"] = 576
    config["text_config"]["eos_token_id"] = 7
    (source / "config.json").write_text(json.dumps(config))
    made = lw.convert(source, "llava-hf")
    (said,) = (repair for repair in made.history[-1].repairs if repair.startswith("config: "))
    assert "`image_seq_length` 576 -> 4" in said
    assert "`text_config.eos_token_id` 7 -> 2" in said


def test_a_decoder_that_smoke_cannot_run_is_named(tmp_path: Path) -> None:
    source = saved(tmp_path, "mixtral")
    with pytest.raises(lw.InputError, match="no forward pass is known for a `mixtral`"):
        lw.smoke_test(source, original=tmp_path / "llava")
