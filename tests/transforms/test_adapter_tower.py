"""Adapters that change the vision tower, onto a base that holds none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_weights as lw
from llava_weights.errors import MismatchError

Tensors = dict[str, torch.Tensor]
PREFIX = "model.vision_tower.vision_tower."
OUT = "vision_model.encoder.layers.0.self_attn.out_proj"
WHOLE = "vision_model.post_layernorm.weight"


@pytest.fixture
def clip(fixtures: Path) -> Path:
    return fixtures / "common/clip-tiny-28px"


@pytest.fixture
def base(fixtures: Path) -> Path:
    return fixtures / "B-lora/base-vicuna-tiny"


def tower_of(clip: Path) -> Tensors:
    found: Tensors = {}
    for path in clip.iterdir():
        found |= load_file(path) if path.suffix == ".safetensors" else torch.load(path) if path.suffix == ".bin" else {}
    return {name: tensor for name, tensor in found.items() if name.startswith("vision_model.") and "position_ids" not in name}


@pytest.fixture
def lora(fixtures: Path, tmp_path: Path, clip: Path) -> Path:
    """LLaVA's adapter, with LoRA on a layer of the tower and one tuned tensor of it beside."""
    folder = Path(shutil.copytree(fixtures / "B-lora/llava-v1.5-tiny-lora", tmp_path / "lora"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "unfreeze_mm_vision_tower": False}))
    weight = tower_of(clip)[f"{OUT}.weight"]
    factors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    factors[f"base_model.model.{PREFIX}{OUT}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator)
    factors[f"base_model.model.{PREFIX}{OUT}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=generator) / 50
    save_file(factors, folder / "adapter_model.safetensors")
    beside = torch.load(folder / "non_lora_trainables.bin")
    torch.save({**beside, f"base_model.model.{PREFIX}{WHOLE}": tower_of(clip)[WHOLE] * 2}, folder / "non_lora_trainables.bin")
    return folder


def test_a_changed_tower_is_merged_in_one_pass(base: Path, lora: Path, clip: Path, tmp_path: Path, cli: Any) -> None:
    code, _, error = cli("merge-lora", "--base", base, "--lora", lora, "--vision-tower", clip, "-o", "out")
    assert code == 0, error
    found, before = load_file(tmp_path / "out/model.safetensors"), tower_of(clip)
    factors = load_file(lora / "adapter_model.safetensors")
    scale = json.loads((lora / "adapter_config.json").read_text())
    update = factors[f"base_model.model.{PREFIX}{OUT}.lora_B.weight"] @ factors[f"base_model.model.{PREFIX}{OUT}.lora_A.weight"]
    expected = {name: tensor.half() for name, tensor in before.items()}
    expected[f"{OUT}.weight"] = (expected[f"{OUT}.weight"].float() + update * (scale["lora_alpha"] / scale["r"])).half()
    expected[WHOLE] = (before[WHOLE] * 2).half()
    inside = {name.removeprefix(PREFIX): tensor for name, tensor in found.items() if name.startswith(PREFIX)}
    assert inside.keys() == expected.keys()
    assert [name for name in inside if not torch.equal(inside[name], expected[name])] == []
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["unfreeze_mm_vision_tower"] is True
    assert config["mm_vision_tower"] == json.loads((lora / "config.json").read_text())["mm_vision_tower"]


def test_without_the_tower_it_is_refused_with_the_flag(base: Path, lora: Path) -> None:
    with pytest.raises(MismatchError, match="belong to the vision tower") as refused:
        lw.merge_lora(base, lora)
    assert "--vision-tower" in (refused.value.hint or "")


def test_a_part_of_a_tuned_tower_needs_the_rest(base: Path, fixtures: Path, clip: Path, tmp_path: Path) -> None:
    lora = Path(shutil.copytree(fixtures / "B-lora/llava-v1.5-tiny-lora", tmp_path / "part"))
    beside = torch.load(lora / "non_lora_trainables.bin")
    torch.save({**beside, f"base_model.model.{PREFIX}{WHOLE}": tower_of(clip)[WHOLE]}, lora / "non_lora_trainables.bin")
    with pytest.raises(MismatchError, match="belong to the vision tower"):
        lw.merge_lora(base, lora)
    merged = lw.merge_lora(base, lora, tower=clip)
    assert sum(name.startswith(PREFIX) for name in merged.tensors) == len(tower_of(clip))
    assert ("tower", clip.name) in [(role, origin.name) for role, origin in merged.history[-1].inputs]


def test_one_pass_to_llava_hf_is_step_by_step(base: Path, lora: Path, clip: Path, tmp_path: Path, cli: Any) -> None:
    code, _, error = cli("merge-lora", "--base", base, "--lora", lora, "--vision-tower", clip, "--to", "llava-hf", "-o", "one")
    assert code == 0, error
    lw.execute(lw.make_plan(lw.merge_lora(base, lora, tower=clip)), tmp_path / "first")
    lw.execute(lw.make_plan(lw.convert(tmp_path / "first", "llava-hf", tower=clip)), tmp_path / "second")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "second"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_verify_makes_it_again(base: Path, lora: Path, clip: Path, tmp_path: Path) -> None:
    lw.execute(lw.make_plan(lw.merge_lora(base, lora, tower=clip)), tmp_path / "out")
    found = lw.verify(tmp_path / "out", base=base, lora=lora, vision_tower=clip)
    assert {each.verdict for each in found.findings if each.level == "L4"} == {"ok"}


def test_a_tower_that_nothing_uses_is_refused(base: Path, fixtures: Path, clip: Path, cli: Any) -> None:
    plain = fixtures / "B-lora/llava-v1.5-tiny-lora"
    code, _, error = cli("merge-lora", "--base", base, "--lora", plain, "--vision-tower", clip, "-o", "out")
    assert code == 2
    assert "--to llava-hf" in error
