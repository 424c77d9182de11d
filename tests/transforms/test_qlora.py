"""Adapters that were trained on a quantised base: which rounding is recorded, where it is applied, and what is said of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_weights as lw
from llava_weights.errors import InputError, MismatchError, UsageError

Tensors = dict[str, torch.Tensor]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["mm_projector"]}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(fixtures: Path) -> Path:
    return fixtures / "B-lora/base-vicuna-tiny"


@pytest.fixture
def lora(fixtures: Path, tmp_path: Path) -> Path:
    """An adapter of LLaVA that may be changed."""
    return Path(shutil.copytree(fixtures / "B-lora/llava-v1.5-tiny-lora", tmp_path / "lora"))


def quantised(folder: Path, **settings: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


def made(checkpoint: lw.Checkpoint, out: Path) -> Tensors:
    lw.execute(lw.make_plan(checkpoint), out)
    return load_file(out / "model.safetensors")


def tensors_of(folder: Path) -> Tensors:
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return found or {name: tensor for path in folder.glob("pytorch_model*.bin") for name, tensor in torch.load(path).items()}


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """There and back with 64 values a block, by the definition: the nearest entry of the table times the block's largest magnitude."""
    from llava_weights.families.quantised import CODES

    table = torch.tensor(CODES["nf4"])
    blocks = weight.float().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scale)[..., None] - table).abs().argmin(-1)
    return (table[nearest] * scale).reshape(weight.shape).to(weight.dtype)


def test_the_update_goes_into_the_rounded_weight(base: Path, lora: Path, tmp_path: Path) -> None:
    merged = made(lw.merge_lora(base, lora, base_quantized="nf4"), tmp_path / "out")
    weights, factors = tensors_of(base), load_file(lora / "adapter_model.safetensors")
    config = json.loads((lora / "adapter_config.json").read_text())
    for name, weight in weights.items():
        start = f"base_model.model.{name.removesuffix('.weight')}.lora"
        expected = weight
        if ".layers." in name and weight.dim() == 2:
            expected = nf4(weight)
            if f"{start}_A.weight" in factors:
                update = factors[f"{start}_B.weight"].float() @ factors[f"{start}_A.weight"].float()
                expected = (expected.float() + update * (config["lora_alpha"] / config["r"])).to(weight.dtype)
        assert torch.equal(merged[name], expected), name


def test_eight_bits_are_rounded_once_with_the_update(base: Path, lora: Path, tmp_path: Path) -> None:
    merged = made(lw.merge_lora(base, lora, base_quantized="int8"), tmp_path / "out")
    weight, factors = tensors_of(base)[f"{Q}.weight"], load_file(lora / "adapter_model.safetensors")
    config = json.loads((lora / "adapter_config.json").read_text())
    scale = weight.half().abs().amax(1).float()[:, None]
    back = torch.round(weight.half() * (127.0 / scale)) * scale * 7.874015718698502e-3
    update = factors[f"base_model.model.{Q}.lora_B.weight"].float() @ factors[f"base_model.model.{Q}.lora_A.weight"].float()
    assert torch.equal(merged[f"{Q}.weight"], (back + update * (config["lora_alpha"] / config["r"])).half())


def test_what_is_no_matrix_of_the_decoder_stays(fixtures: Path, tmp_path: Path) -> None:
    """A whole llava-hf model: tower, projector, head and embeddings keep every bit."""
    hub = fixtures / "C-v1.5/hf-by-tf4.47.1"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.language_model.model.layers.1.self_attn.v_proj"
    weight = tensors_of(hub)["language_model.model.layers.1.self_attn.v_proj.weight"]
    factors = {f"{name}.lora_A.weight": torch.zeros(1, weight.shape[1]), f"{name}.lora_B.weight": torch.zeros(weight.shape[0], 1)}
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    before = tensors_of(hub)
    after = made(lw.merge_lora(hub, adapter, base_quantized="fp4"), tmp_path / "out")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if ".layers." in key and "language_model" in key and before[key].dim() == 2}


def test_double_quantisation_is_taken_from_the_record(base: Path, lora: Path, tmp_path: Path) -> None:
    plain = made(lw.merge_lora(base, lora, base_quantized="nf4"), tmp_path / "plain")
    merged = lw.merge_lora(base, quantised(lora, **NF4), base_quantized="nf4")
    assert merged.history[-1].options["base_quantized"] == "nf4-double"
    assert "double quantisation" in merged.history[-1].summary["round"]
    told = made(merged, tmp_path / "told")
    given = made(lw.merge_lora(base, lora, base_quantized="nf4-double"), tmp_path / "given")
    assert all(torch.equal(told[name], given[name]) for name in told)
    assert not torch.equal(told[f"{Q}.weight"], plain[f"{Q}.weight"])


@pytest.mark.parametrize(
    "key", ["model.layers.0", "self_attn.q_proj", "base_model.model.model.layers.0.self_attn", "language_model.model.layers.0"]
)
def test_skipped_modules_stay(base: Path, lora: Path, tmp_path: Path, key: str) -> None:
    (lora / "adapter_model.safetensors").unlink()
    size = tensors_of(base)[f"{Q}.weight"].shape
    factors = {
        f"base_model.model.{Q}.lora_A.weight": torch.zeros(4, size[1]),
        f"base_model.model.{Q}.lora_B.weight": torch.zeros(size[0], 4),
    }
    save_file(factors, lora / "adapter_model.safetensors")
    merged = made(lw.merge_lora(base, quantised(lora, **{**NF4, "llm_int8_skip_modules": [key]}), base_quantized="nf4"), tmp_path / "out")
    weights = tensors_of(base)
    assert torch.equal(merged[f"{Q}.weight"], weights[f"{Q}.weight"])
    assert not torch.equal(merged["model.layers.1.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"])


def test_a_skipped_expression_is_refused(base: Path, lora: Path) -> None:
    settings = {**NF4, "llm_int8_skip_modules": [r"layers\.\d+\.mlp"]}
    with pytest.raises(InputError, match="an expression"):
        lw.merge_lora(base, quantised(lora, **settings), base_quantized="nf4")


def test_by_default_the_plan_says_how_it_was_merged(base: Path, lora: Path, cli: Any) -> None:
    quantised(lora, **NF4)
    note = next(note for note in lw.merge_lora(base, lora).history[-1].notes if "quantised (" in note)
    assert "--base-quantized nf4-double" in note
    code, _, _ = cli("merge-lora", "--base", base, "--lora", lora, "-o", "out")
    assert code == 0
    assert "--base-quantized nf4-double" in Path(lora.parent / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "given", "named"),
    [
        (NF4, "fp4", "`nf4-double`"),
        ({"load_in_8bit": True}, "nf4", "`int8`"),
        ({"load_in_4bit": True}, "nf4", "`fp4`"),
        ({"quant_method": "gptq", "bits": 4}, "nf4", "GPTQ"),
    ],
)
def test_another_rounding_than_the_recorded_one_is_refused(
    base: Path, lora: Path, settings: dict[str, Any], given: str, named: str
) -> None:
    with pytest.raises(MismatchError) as refused:
        lw.merge_lora(base, quantised(lora, **settings), base_quantized=given)
    assert named in str(refused.value)


def test_a_record_beside_the_base_counts_too(base: Path, lora: Path, tmp_path: Path) -> None:
    copy = quantised(Path(shutil.copytree(base, tmp_path / "base")), **NF4)
    assert any("--base-quantized nf4-double" in note for note in lw.merge_lora(copy, lora).history[-1].notes)


def test_a_base_that_is_quantised_by_its_name_is_told_of(base: Path, lora: Path) -> None:
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit"}))
    assert any("not equal" in note and "--base-quantized" in note for note in lw.merge_lora(base, lora).history[-1].notes)
    assert lw.merge_lora(base, lora, base_quantized="fp4").history[-1].options["base_quantized"] == "fp4"


def test_a_rounding_that_does_not_exist_is_refused(base: Path, lora: Path) -> None:
    with pytest.raises(UsageError, match="nf4, nf4-double, fp4, fp4-double, int8"):
        lw.merge_lora(base, lora, base_quantized="4bit")


def test_verify_makes_it_again(base: Path, lora: Path, tmp_path: Path) -> None:
    made(lw.merge_lora(base, quantised(lora, **NF4), base_quantized="nf4"), tmp_path / "out")
    found = [each for each in lw.verify(tmp_path / "out", base=base, lora=lora).findings if each.level == "L4"]
    assert {each.verdict for each in found} == {"ok"}
    assert any("base_quantized nf4-double" in each.text for each in found)
