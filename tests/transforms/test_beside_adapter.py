"""Weight files beside an adapter: each is used, or named and refused; none is left out without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llava_weights.errors import InputError
from llava_weights.transforms.adapter import open_adapter

Tensors = dict[str, torch.Tensor]
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
LLAVA = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}


def lora(name: str = MODULE, between: str = "") -> Tensors:
    return {f"{name}.lora_A{between}.weight": torch.rand(2, 4), f"{name}.lora_B{between}.weight": torch.rand(6, 2)}


def projector(prefix: str = "base_model.model.model.mm_projector.", value: float = 1.0) -> Tensors:
    shapes = {"0.weight": (6, 4), "0.bias": (6,), "2.weight": (6, 6), "2.bias": (6,)}
    return {f"{prefix}{name}": torch.full(shape, value) for name, shape in shapes.items()}


def folder(path: Path, tensors: Tensors | None = None, *, llava: bool = True) -> Path:
    path.mkdir(parents=True)
    if tensors is None:
        save_file(lora(), path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    if llava:
        (path / "config.json").write_text(json.dumps(LLAVA))
    return path


def state() -> Tensors:
    """What zero_to_fp32.py makes of a PEFT model: factors with the adapter's name, the base under its wrappers, the projector."""
    return lora(between=".default") | projector() | {f"{MODULE}.base_layer.weight": torch.rand(6, 4)}


def in_shards(path: Path, tensors: Tensors) -> Path:
    names = list(tensors)
    files = {name: f"pytorch_model-0000{1 + (place % 2)}-of-00002.bin" for place, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, path / file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return path


def text_of(source: Path, **more: Any) -> str:
    with pytest.raises(InputError) as refused:
        open_adapter(source, **more)
    return str(refused.value)


REPLACED = {f"model.mm_projector.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")}


@pytest.mark.parametrize("file", ["non_lora_trainables.bin", "non_lora_state_dict.bin"])
def test_what_was_trained_beside_is_used_under_either_name(tmp_path: Path, file: str) -> None:
    torch.save(projector(), folder(tmp_path / "lora") / file)
    assert open_adapter(tmp_path / "lora").replacements.keys() == REPLACED


@pytest.mark.parametrize("llava", [True, False])
def test_a_projector_beside_an_adapter_is_used(tmp_path: Path, llava: bool) -> None:
    torch.save(projector("model.mm_projector."), folder(tmp_path / "lora", llava=llava) / "mm_projector.bin")
    assert open_adapter(tmp_path / "lora").replacements.keys() == REPLACED


def test_two_projectors_are_refused_unless_they_are_one(tmp_path: Path) -> None:
    path = folder(tmp_path / "lora")
    torch.save(projector(), path / "non_lora_trainables.bin")
    torch.save(projector("model.mm_projector."), path / "mm_projector.bin")
    assert open_adapter(path).replacements.keys() == REPLACED
    torch.save(projector("model.mm_projector.", value=2.0), path / "mm_projector.bin")
    told = text_of(path)
    assert "mm_projector.bin" in told
    assert "non_lora_trainables.bin" in told


@pytest.mark.parametrize("chosen", [True, False])
def test_rows_of_added_tokens_in_a_file_of_their_own_are_refused(tmp_path: Path, chosen: bool) -> None:
    path = folder(tmp_path / "lora", llava=False)
    save_file({"input_embeddings": torch.rand(2, 4)}, path / "new_embeddings.safetensors")
    assert "`new_embeddings.safetensors`" in text_of(path / "adapter_model.safetensors" if chosen else path)


def test_other_weights_are_refused_in_a_folder_and_named_beside_a_file(tmp_path: Path) -> None:
    path = folder(tmp_path / "lora", llava=False)
    save_file({"x": torch.rand(2)}, path / "trained_head.safetensors")
    (path / "optimizer.pt").write_bytes(b"state of the training")
    told = text_of(path)
    assert "`trained_head.safetensors`" in told
    assert "optimizer" not in told
    assert any("trained_head" in note for note in open_adapter(path / "adapter_model.safetensors").notes)


def test_two_containers_of_one_adapter_must_say_the_same(tmp_path: Path) -> None:
    path = folder(tmp_path / "lora", {}, llava=False)
    tensors = lora()
    save_file(tensors, path / "adapter_model.safetensors")
    torch.save(tensors, path / "adapter_model.bin")
    assert len(open_adapter(path).modules) == 1
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, path / "adapter_model.bin")
    told = text_of(path)
    assert "`adapter_model.safetensors`" in told
    assert "`adapter_model.bin`" in told


@pytest.mark.parametrize("way", ["folder", "index"])
def test_a_training_state_in_shards_is_an_adapter_with_its_projector(tmp_path: Path, way: str) -> None:
    path = in_shards(folder(tmp_path / "run", {}), state())
    adapter = open_adapter(path if way == "folder" else path / "pytorch_model.bin.index.json")
    assert [module.name for module in adapter.modules] == ["model.layers.0.self_attn.q_proj"]
    assert adapter.replacements.keys() == REPLACED | {"model.layers.0.self_attn.q_proj.weight"}
    assert len(adapter.origin.files) == 2


def test_a_training_state_in_one_file_needs_nothing_beside(tmp_path: Path) -> None:
    path = folder(tmp_path / "run", {})
    torch.save(state(), path / "pytorch_model.bin")
    for source in (path, path / "pytorch_model.bin"):
        assert open_adapter(source).replacements.keys() >= REPLACED


@pytest.mark.parametrize("way", ["folder", "index", "file"])
def test_non_lora_may_be_a_folder_an_index_or_a_file(tmp_path: Path, way: str) -> None:
    beside = tmp_path / "state"
    beside.mkdir()
    if way == "file":
        torch.save(state(), beside / "pytorch_model.bin")
    else:
        in_shards(beside, state())
    given = {"folder": beside, "index": beside / "pytorch_model.bin.index.json", "file": beside / "pytorch_model.bin"}[way]
    assert open_adapter(folder(tmp_path / "lora"), non_lora=given).replacements.keys() >= REPLACED


def test_one_shard_of_several_is_refused(tmp_path: Path) -> None:
    path = in_shards(folder(tmp_path / "run", {}), state())
    shard = path / "pytorch_model-00001-of-00002.bin"
    assert "one of 2 shards" in text_of(shard)
    assert "one of 2 shards" in text_of(folder(tmp_path / "lora"), non_lora=shard)


def test_a_state_beside_an_adapter_is_named_with_the_way_to_use_it(tmp_path: Path) -> None:
    path = folder(tmp_path / "lora")
    torch.save(state(), path / "pytorch_model.bin")
    told = text_of(path)
    assert "`pytorch_model.bin`" in told
    assert f"--non-lora {path / 'pytorch_model.bin'}" in told
    assert open_adapter(path, non_lora=path / "pytorch_model.bin").replacements.keys() >= REPLACED


def test_several_adapters_in_one_file_are_called_so(tmp_path: Path) -> None:
    path = folder(tmp_path / "two", {}, llava=False)
    torch.save(lora(between=".default") | lora(between=".reference"), path / "adapter_model.bin")
    told = text_of(path)
    assert "several adapters" in told
    assert "`default`" in told


def test_buffers_of_a_training_state_are_no_part_of_it(tmp_path: Path) -> None:
    path = folder(tmp_path / "run", {})
    buffers = {"base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4), "a.embeddings.position_ids": torch.arange(4)}
    torch.save({**state(), **buffers}, path / "pytorch_model.bin")
    assert not any("inv_freq" in name or "position_ids" in name for name in open_adapter(path).replacements)


@pytest.mark.parametrize("holds", ["nothing", "the tables"])
def test_a_given_file_without_the_trained_projector_is_refused(tmp_path: Path, holds: str) -> None:
    path = folder(tmp_path / "lora")
    tensors = {} if holds == "nothing" else {"base_model.model.lm_head.weight": torch.rand(6, 4)}
    torch.save(tensors, tmp_path / "beside.bin")
    told = text_of(path, non_lora=tmp_path / "beside.bin")
    assert "lacks the projector" in told
    assert "`beside.bin`" in told
    (path / "config.json").write_text(json.dumps({**LLAVA, "freeze_mm_mlp_adapter": True}))
    assert open_adapter(path, non_lora=tmp_path / "beside.bin").modules
    torch.save(projector(), tmp_path / "other-name.bin")
    (path / "config.json").write_text(json.dumps(LLAVA))
    assert open_adapter(path, non_lora=tmp_path / "other-name.bin").replacements.keys() == REPLACED


def test_a_projector_with_its_two_rows_is_read_under_any_name(tmp_path: Path) -> None:
    tensors = {**projector("model.mm_projector."), "model.embed_tokens.weight": torch.rand(2, 6)}
    torch.save(tensors, tmp_path / "checkpoint-projector.bin")
    adapter = open_adapter(folder(tmp_path / "lora"), non_lora=tmp_path / "checkpoint-projector.bin")
    assert adapter.replacements.keys() == REPLACED
    assert adapter.rows["model.embed_tokens.weight"][0] == (-2, -1)


def test_a_whole_state_of_fsdp_is_an_adapter_with_its_projector(tmp_path: Path) -> None:
    path = folder(tmp_path / "run", {})
    torch.save({f"_fsdp_wrapped_module.{name}": tensor for name, tensor in state().items()}, path / "pytorch_model_fsdp.bin")
    assert open_adapter(path).replacements.keys() >= REPLACED
