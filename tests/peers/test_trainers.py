"""Adapters as seven trainers leave them, onto bases under four styles of names: the bits of PEFT's own merge. Run by `make peer`.

PEFT makes each kind of adapter on a llava-hf model in transformers, merges it, and saves it. What it saved is then written as each trainer
writes it, under the names that the trainer's version of transformers, or LLaVA's own code, has for the same modules.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_weights as lw
from llava_weights.families.layouts import canonical

Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."

pytestmark = [pytest.mark.peer, pytest.mark.timeout(600)]

# How LLaVA's own code and versions of transformers call what transformers 5.23 has in memory; the first that fits counts.
NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "transformers 5": (),
    "transformers 4.52": (("model.vision_tower.", "model.vision_tower.vision_model."),),
    "Hub": (
        ("model.language_model.", "language_model.model."),
        ("lm_head", "language_model.lm_head"),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ),
    "original": (
        ("model.language_model.", "model."),
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ),
}


def renamed(name: str, style: str) -> str:
    """A tensor of the model or of an adapter on it, by the names of another style."""
    bare = name.removeprefix(PREFIX)
    new = next((new + bare.removeprefix(old) for old, new in NAMES[style] if bare.startswith(old)), bare)
    return PREFIX + new if name.startswith(PREFIX) else new


# --- kinds ------------------------------------------------------------------------------------------------------------

DECODER = r".*language_model.*\.(q_proj|k_proj|down_proj)"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": DECODER},
    "rsLoRA": {"target_modules": DECODER, "use_rslora": True},
    "DoRA": {"target_modules": DECODER, "use_dora": True},
    "patterns": {"target_modules": DECODER, "rank_pattern": {"k_proj": 2, r"layers\.1\..*_proj": 6}, "alpha_pattern": {"(q|k)_proj": 5}},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
    "rows": {"target_modules": DECODER, "trainable_token_indices": {"embed_tokens": [7, 290]}},
    "biases": {"target_modules": r".*(vision_tower.*\.q_proj|multi_modal_projector\.linear_1)", "lora_bias": True},
    "every bias": {"target_modules": r".*multi_modal_projector\.linear_\d", "bias": "all"},
    "projector": {"target_modules": DECODER, "modules_to_save": ["multi_modal_projector"]},
    "tower": {"target_modules": r".*(vision_tower|language_model).*\.(q_proj|fc1)"},
    "head": {"target_modules": DECODER, "modules_to_save": ["lm_head"]},
}


@dataclass(frozen=True)
class Trained:
    """An adapter as PEFT saved it, the whole state of its model, and PEFT's merge by canonical names."""

    saved: Path
    state: Tensors
    merged: Tensors


def untied(model: Any) -> Tensors:
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}


def train(hub: Path, folder: Path, dtype: torch.dtype, **options: Any) -> Trained:
    from peft import LoraConfig, get_peft_model
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = LlavaForConditionalGeneration.from_pretrained(hub, dtype=dtype)
        model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder)
        state = untied(model)
        merged = model.merge_and_unload()
    return Trained(folder, state, {canonical(name): tensor for name, tensor in untied(merged).items()})


@pytest.fixture(scope="module")
def trained(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Trained]:
    made: dict[tuple[str, str], Trained] = {}

    def get(kind: str, dtype: str) -> Trained:
        if (kind, dtype) not in made:
            folder = tmp_path_factory.mktemp("peft")
            made[kind, dtype] = train(fixtures / "C-v1.5/hf-by-tf4.47.1", folder, getattr(torch, dtype), **KINDS[kind])
        return made[kind, dtype]

    return get


@pytest.fixture(scope="module")
def bases(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """One model under four styles of names, in two dtypes."""
    from transformers import LlavaForConditionalGeneration

    hub, original = fixtures / "C-v1.5/hf-by-tf4.47.1", fixtures / "C-v1.5/original-with-vision-safetensors"
    found = {}
    for dtype in ("float16", "float32"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = untied(LlavaForConditionalGeneration.from_pretrained(hub, dtype=getattr(torch, dtype)))
        for style in NAMES:
            folder = found[style, dtype] = tmp_path_factory.mktemp("base")
            for path in (original if style == "original" else hub).iterdir():
                if path.suffix in (".json", ".model", ".jinja") and "index" not in path.name:
                    shutil.copy(path, folder)
            save_file({renamed(name, style): tensor for name, tensor in whole.items()}, folder / "model.safetensors", {"format": "pt"})
    return found


# --- trainers ---------------------------------------------------------------------------------------------------------


def config_of(trained: Trained, **more: Any) -> str:
    return json.dumps({**json.loads((trained.saved / "adapter_config.json").read_text()), **more})


def saved_as(trained: Trained, style: str) -> Tensors:
    return {renamed(name, style): tensor for name, tensor in load_file(trained.saved / "adapter_model.safetensors").items()}


def by_peft(trained: Trained, folder: Path, fixtures: Path) -> None:
    shutil.copytree(trained.saved, folder, dirs_exist_ok=True)


def by_llava(trained: Trained, folder: Path, fixtures: Path) -> None:
    """LLaVA's script: names of its own code, what is no LoRA in a second file, the config of the run."""
    tensors = saved_as(trained, "original")
    low = {name: tensor for name, tensor in tensors.items() if "lora_" in name or "token_adapter" in name}
    torch.save(low, folder / "adapter_model.bin")
    torch.save({name: tensor for name, tensor in tensors.items() if name not in low}, folder / "non_lora_trainables.bin")
    modules = json.loads((trained.saved / "adapter_config.json").read_text())["modules_to_save"]
    given = [name.replace("multi_modal_projector", "mm_projector") for name in modules or []] or None
    (folder / "adapter_config.json").write_text(config_of(trained, modules_to_save=given))
    shutil.copy(fixtures / "C-v1.5/original-with-vision-safetensors/config.json", folder)
    shutil.copy(fixtures / "C-v1.5/hf-by-tf4.47.1/added_tokens.json", folder)  # else nothing names the tokens of trained rows


def by_llama_factory(trained: Trained, folder: Path, fixtures: Path) -> None:
    """PEFT's files under transformers 4.52's names, with tokenizer, processor and logs."""
    save_file(saved_as(trained, "transformers 4.52"), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(config_of(trained))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        shutil.copy(fixtures / "C-v1.5/hf-by-tf4.47.1" / name, folder)
    (folder / "all_results.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"a pickle of its own")


def by_swift(trained: Trained, folder: Path, fixtures: Path) -> None:
    """A `checkpoint-N` of ms-swift, under the names of transformers before 4.52, with the Trainer's own state."""
    save_file(saved_as(trained, "Hub"), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(config_of(trained))
    for name in ("args.json", "additional_config.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"state")


def by_axolotl(trained: Trained, folder: Path, fixtures: Path) -> None:
    """A dump under FSDP and activation checkpointing, in torch's container."""
    tensors = saved_as(trained, "transformers 4.52")
    named = {f"_fsdp_wrapped_module.{n}".replace(".layers.", ".layers._checkpoint_wrapped_module."): t for n, t in tensors.items()}
    torch.save(named, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(config_of(trained))


def by_unsloth(trained: Trained, folder: Path, fixtures: Path) -> None:
    """Compiled modules, an expression of look-arounds for the targets, and a setting of its own."""
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in saved_as(trained, "transformers 5").items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:down_proj))"
    (folder / "adapter_config.json").write_text(config_of(trained, target_modules=targets, unsloth_fixed=True))


def by_zero(trained: Trained, folder: Path, fixtures: Path) -> None:
    """zero_to_fp32.py: the whole state in shards, float32, with the base under its wrappers and the adapter's name."""
    names = list(trained.state)
    files = {name: f"pytorch_model-0000{1 + place % 2}-of-00002.bin" for place, name in enumerate(names)}
    for file in sorted(set(files.values())):
        torch.save({name: trained.state[name].float() for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "adapter_config.json").write_text(config_of(trained))


TRAINERS: dict[str, Callable[[Trained, Path, Path], None]] = {
    "PEFT": by_peft,
    "LLaVA": by_llava,
    "LLaMA-Factory": by_llama_factory,
    "ms-swift": by_swift,
    "axolotl": by_axolotl,
    "unsloth": by_unsloth,
    "ZeRO": by_zero,
}


def made(checkpoint: lw.Checkpoint, out: Path) -> Tensors:
    lw.execute(lw.make_plan(checkpoint, accept_values=True), out)
    return {canonical(name): tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}


def different(found: Tensors, expected: Tensors) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in found if found[name].dtype != expected[name].dtype or not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("base", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_bits_are_those_of_peft(
    fixtures: Path, tmp_path: Path, trained: Any, bases: Any, trainer: str, kind: str, base: str, dtype: str
) -> None:
    adapter = trained(kind, dtype)
    (tmp_path / "lora").mkdir()
    TRAINERS[trainer](adapter, tmp_path / "lora", fixtures)
    merged = lw.merge_lora(bases[base, dtype], tmp_path / "lora")
    assert different(made(merged, tmp_path / "out"), adapter.merged) == []


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("base", NAMES)
def test_weighted_adapters_are_their_sum_in_either_order(
    fixtures: Path, tmp_path: Path, bases: Any, base: str, order: tuple[int, int], dtype: str
) -> None:
    """PEFT's `cat` is the weighted sum. The factors are small multiples of 1/8, so that no product or sum is rounded before the last."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlavaForConditionalGeneration

    weights, names = (0.5, 2.0), ("default", "other")
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = LlavaForConditionalGeneration.from_pretrained(fixtures / "C-v1.5/hf-by-tf4.47.1", dtype=getattr(torch, dtype))
        model = get_peft_model(whole, LoraConfig(r=2, lora_alpha=2, target_modules=DECODER))
        model.add_adapter("other", LoraConfig(r=4, lora_alpha=8, target_modules=DECODER))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randint(-3, 4, parameter.shape).to(parameter.dtype) / 8
        model.save_pretrained(tmp_path / "peft", selected_adapters=[*names])
        model.add_weighted_adapter([*names], [*weights], "sum", combination_type="cat")
        model.set_adapter("sum")
        expected = {canonical(name): tensor for name, tensor in untied(model.merge_and_unload(adapter_names=["sum"])).items()}
    run = tmp_path / "peft"
    adapters = [lw.open_adapter(run), lw.open_adapter(run, adapter="other")]
    merged = lw.merge_lora(bases[base, dtype], [(adapters[i], weights[i]) for i in order])
    assert different(made(merged, tmp_path / "out"), expected) == []
