"""Families without a class and quantised weights: each is told by its name, in every command, before anything else is missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_weights as lw
from llava_weights.errors import InputError
from llava_weights.families.quantised import quantisation
from llava_weights.families.unsupported import UNSUPPORTED, unsupported
from llava_weights.smoke.forward import load_forward

HUB = "C-v1.5/hf-by-tf4.47.1"

# (name, config, tensors) as such a repository publishes them.
SEEN: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "mllama": ("mllama", {"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"]}, ()),
    "pixtral": ("Pixtral", {"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, ()),
    "pixtral by tensors": ("Pixtral", {}, ("vision_tower.patch_conv.weight", "vision_tower.ln_pre.weight")),
    "fastvlm": ("FastVLM", {"model_type": "llava_qwen2", "mm_vision_tower": "mobileclip_l_1024"}, ()),
    "mobilevlm": ("MobileVLM", {"model_type": "mobilevlm", "mm_projector_type": "ldpnetv2"}, ()),
    "yi-vl": ("Yi-VL", {"model_type": "llava", "mm_projector_type": "mlp2x_gelu_Norm"}, ()),
    "s2": ("S2", {"model_type": "llava", "s2": True}, ()),
    "s2 of bunny": ("S2", {"model_type": "bunny-llama", "use_s2": True}, ()),
    "longva": ("LongVA", {"model_type": "llava_qwen", "mm_patch_merge_type": "unires"}, ()),
    "onevision 1.5 by tensors": ("OneVision-1.5", {}, ("model.visual.merger.mlp.0.weight", "model.visual.class_embedding")),
    "onevision 2": ("OneVision-2", {"model_type": "llava_onevision2"}, ("model.visual.merger.mlp.0.weight", "model.visual.blocks.0.x")),
    "qwen2-vl": ("Qwen2-VL", {"model_type": "qwen2_vl"}, ("visual.merger.mlp.0.weight", "visual.blocks.0.attn.qkv.weight")),
    "qwen2-vl by tensors": ("Qwen2-VL", {}, ("visual.merger.mlp.0.weight", "visual.blocks.0.attn.qkv.weight")),
    "qwen2.5-vl": ("Qwen2.5-VL", {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}, ()),
    "qwen-vl": ("Qwen-VL", {"model_type": "qwen", "visual": {"image_size": 448}}, ()),
    "internvl": ("InternVL", {"model_type": "internvl_chat"}, ()),
    "internvl of transformers": ("InternVL", {"model_type": "internvl"}, ()),
    "idefics": ("Idefics", {"architectures": ["IdeficsForVisionText2Text"]}, ()),
    "idefics2": ("Idefics2", {"model_type": "idefics2"}, ()),
    "smolvlm": ("SmolVLM", {"model_type": "smolvlm"}, ()),
    "paligemma": ("PaliGemma", {"model_type": "paligemma"}, ()),
    "blip-2": ("BLIP-2", {"model_type": "blip-2"}, ()),
    "instructblip": ("InstructBLIP", {"model_type": "instructblip"}, ()),
    "phi-3-vision": ("Phi-3-Vision", {"model_type": "phi3_v"}, ()),
    "minicpm-v": ("MiniCPM-V", {"architectures": ["MiniCPMV"]}, ()),
    "deepseek-vl": ("DeepSeek-VL", {"model_type": "multi_modality"}, ()),
    "molmo": ("Molmo", {"model_type": "molmo"}, ()),
    "kosmos-2": ("Kosmos-2", {"model_type": "kosmos-2"}, ()),
    "git": ("GIT", {"model_type": "git"}, ()),
    "gemma 3": ("Gemma 3", {"model_type": "gemma3"}, ()),
    "aya vision": ("Aya Vision", {"model_type": "aya_vision"}, ()),
    "mistral 3": ("Mistral Small 3", {"model_type": "mistral3", "vision_config": {"model_type": "pixtral"}}, ()),
    "mplug-owl2": ("mPLUG-Owl", {"model_type": "mplug_owl2"}, ()),
    "onevision 1.5": ("OneVision-1.5", {"architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"]}, ()),
    "vila": ("VILA", {"model_type": "llava_llama", "architectures": ["LlavaLlamaModel"]}, ()),
    "tinyllava": ("TinyLLaVA", {"model_type": "tinyllava"}, ()),
    "tinyllava by tensors": ("TinyLLaVA", {}, ("connector._connector.0.weight",)),
    "mpt": ("MPT", {"model_type": "llava_mpt"}, ("transformer.blocks.0.attn.Wqkv.weight",)),
    "moe": ("MoE-LLaVA", {"model_type": "moe_llava_qwen"}, ()),
    "lisa": ("LISA", {"model_type": "llava", "architectures": ["LISAForCausalLM"]}, ()),
    "mgm": ("MGM", {"model_type": "mini_gemini"}, ()),
    "mmvp": ("MMVP", {"model_type": "llava"}, ("model.vision_tower_dino.embeddings.cls_token",)),
    "cambrian": ("Cambrian", {"model_type": "cambrian_llama"}, ()),
    "faster token": ("faster_token", {"model_type": "llava_qwen"}, ("model.faster_token",)),
    "two towers": ("two vision towers", {"model_type": "llava"}, ("model.vision_tower_2.x.weight",)),
    "phi-2": ("phi-2", {"model_type": "bunny-phi"}, ()),
}


@pytest.mark.parametrize("case", SEEN)
def test_each_family_is_recognised(case: str) -> None:
    name, config, tensors = SEEN[case]
    found = unsupported(config, tensors)
    assert found is not None
    assert name in found[0].name
    assert found[1]


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": "mlp2x_gelu", "s2": False}, ()),
        ({"model_type": "llava_qwen", "mm_patch_merge_type": "spatial_unpad", "mm_vision_select_feature": "patch"}, ()),
        ({"model_type": "llava_onevision", "architectures": ["LlavaOnevisionForConditionalGeneration"]}, ("image_newline",)),
        ({"model_type": "llava"}, tuple(f"model.mm_projector.{place}.weight" for place in (0, 2, 4))),
        ({"model_type": "llama"}, ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight")),
        ({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}, ()),
        ({"model_type": "qwen", "architectures": ["QWenLMHeadModel"]}, ()),
        ({"model_type": "llava", "mm_image_tower": "a", "mm_video_tower": "b"}, ("model.image_tower.image_tower.x", "model.video_tower.x")),
    ],
)
def test_those_that_have_a_class_are_not(config: dict[str, Any], tensors: tuple[str, ...]) -> None:
    assert unsupported(config, tensors) is None


def test_every_row_says_why_and_how_it_is_recognised() -> None:
    for row in UNSUPPORTED:
        assert row.why[0].islower() or row.why.startswith("`")
        assert row.model_types or row.architectures or row.tensors or row.says
    experts = ("model.layers.0.mlp.experts.0.w1.weight",)
    assert unsupported({}, experts)
    assert unsupported({}, experts, known=True) is None  # a decoder that a row describes has its experts there


@pytest.mark.parametrize(
    ("title", "dtypes", "method"),
    [
        ("bitsandbytes, 4 bits", {"a.weight": "U8", "a.weight.absmax": "F32"}, "bitsandbytes"),
        ("bitsandbytes, 8 bits", {"a.weight": "I8", "a.SCB": "F32"}, ""),
        ("GPTQ", {"a.qweight": "I32", "a.scales": "F16", "a.g_idx": "I32"}, ""),
        ("GPTQ", {"a.qweight": "I32", "a.scales": "F16"}, "gptq"),
        ("AWQ", {"a.qweight": "I32", "a.qzeros": "I32", "a.scales": "F16"}, "awq"),
        ("compressed-tensors", {"a.weight_packed": "I32", "a.weight_scale": "BF16"}, "compressed-tensors"),
        ("FP8 in blocks", {"a.weight": "F8_E4M3", "a.weight_scale_inv": "F32"}, ""),
        ("FP8", {"a.weight": "F8_E4M3"}, ""),
        ("8-bit integers", {"a.weight": "I8"}, ""),
        ("MLX", {"a.weight": "U32", "a.scales": "F16", "a.biases": "F16"}, ""),
        ("Quanto", {"a.weight._data": "I8", "a.weight._scale": "F16", "a.input_scale": "F16"}, "quanto"),
        ("torchao", {"a._weight_qdata": "I8", "a._weight_scale": "F16"}, "torchao"),
        ("VPTQ", {"a.centroids.weight": "F16", "a.indices": "I32"}, "vptq"),
        ("AQLM", {"a.codebooks": "F16", "a.codes": "I16", "a.scales": "F16"}, "aqlm"),
        ("HQQ", {"a.W_q": "U8", "a.scale": "F16", "a.zero": "F16"}, "hqq"),
        ("EETQ", {"a.weight": "I8", "a.weight_scales": "F16"}, "eetq"),
        ("MXFP4", {"a.gate_up_proj_blocks": "U8", "a.gate_up_proj_scales": "U8"}, ""),
        ("BitNet", {"a.weight": "U8", "a.weight_scale": "F16"}, "bitnet"),
    ],
)
def test_methods_are_told_by_tensors_and_config(title: str, dtypes: dict[str, str], method: str) -> None:
    found = quantisation({**dtypes, "norm.weight": "F16"}, method)
    assert found is not None
    assert found[0] == title


def test_plain_weights_with_a_left_over_config_are_not_quantised() -> None:
    assert quantisation({"a.weight": "F16", "position_ids": "I64"}, "bitsandbytes") is None


# --- in every command ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, fixtures: Path) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    for path in (fixtures / HUB).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def configured(folder: Path, **keys: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


def with_tensors(folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    path = next(folder.glob("*.safetensors"))
    tensors: dict[str, Any] = {**load_file(path), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})
    return folder


def packed(folder: Path) -> Path:
    """As bitsandbytes saves 4 bits."""
    name = "language_model.model.layers.0.mlp.gate_proj.weight"
    tensor = load_file(next(folder.glob("*.safetensors")))[name]
    half = torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8)
    configured(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    return with_tensors(folder, {name: half, f"{name}.absmax": torch.ones(8), f"{name}.quant_map": torch.ones(16)})


def findings(folder: Path) -> list[Any]:
    return [each for each in lw.verify(folder).findings if each.verdict in ("failed", "unchecked")]


def test_quantised_weights_are_called_so_by_convert_merge_and_verify(hub: Path, tmp_path: Path) -> None:
    packed(hub)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    module = "base_model.model.language_model.model.layers.0.mlp.gate_proj.lora_"
    save_file({f"{module}A.weight": torch.ones(1, 64), f"{module}B.weight": torch.ones(112, 1)}, lora / "adapter_model.safetensors")
    for act in (lambda: lw.convert(hub, "llava-hf"), lambda: lw.convert(hub, "llava"), lambda: lw.merge_lora(hub, lora)):
        with pytest.raises(InputError, match=r"is quantised \(bitsandbytes, 4 bits\)"):
            act()
    with pytest.raises(InputError, match="bitsandbytes, 4 bits"):
        load_forward(lw.open_checkpoint(hub))
    told = findings(hub)
    assert any("bitsandbytes, 4 bits" in each.text and each.verdict == "unchecked" for each in told)
    assert not any(each.rule in ("config/structure", "state", "constant") for each in told)


@pytest.mark.parametrize("command", ["convert", "apply-delta", "merge-lora", "smoke", "inspect"])
@pytest.mark.parametrize("kind", ["aya_vision", "mllama", "paligemma"])
def test_every_command_says_the_name_of_what_is_no_llava(
    hub: Path, tmp_path: Path, fixtures: Path, cli: Any, kind: str, command: str
) -> None:
    """Their tensors have the names of a LLaVA, and no adapter or delta fits them: that is not what is told."""
    name = {"aya_vision": "Aya Vision", "mllama": "mllama", "paligemma": "PaliGemma"}[kind]
    configured(hub, model_type=kind, architectures=["OtherForConditionalGeneration"])
    lora = fixtures / "F-peft"
    given = {
        "convert": [hub, "--to", "llava", "-o", "out"],
        "apply-delta": ["--base", fixtures / "A-delta-v0/base-hf-bin", "--delta", hub, "-o", "out"],
        "merge-lora": ["--base", hub, "--lora", next(path.parent for path in lora.rglob("adapter_config.json")), "-o", "out"],
    }.get(command, [hub])
    done = cli(command, *given)
    assert name in done.stdout + done.stderr
    assert "shards" not in done.stdout + done.stderr
    assert done.code == (0 if command == "inspect" else 3)
    assert not (tmp_path / "out").exists()


def test_inspect_finds_the_parts_of_a_model_that_no_row_describes(tmp_path: Path) -> None:
    names = {
        "llm.model.embed_tokens.weight": (320, 64), "llm.model.layers.0.mlp.up_proj.weight": (96, 64),
        "llm.model.layers.1.mlp.up_proj.weight": (96, 64), "vpm.encoder.layers.7.mlp.fc1.weight": (64, 32), "resampler.query": (8, 64),
    }  # fmt: skip
    save_file({name: torch.ones(shape).half() for name, shape in names.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "minicpmv", "architectures": ["MiniCPMV"], "num_attention_heads": 4}))
    found = lw.inspect(tmp_path)
    assert found.what.startswith("MiniCPM-V")
    assert found.model_class == "MiniCPMV, model_type minicpmv"
    assert found.decoder == "minicpmv, 2 layers of 64, 4 heads"
    assert found.vocabulary == "320 rows"
    assert "resampler.query" in found.projector
    assert found.tower == "of a kind that is not known; inside, 1 tensors"
    assert found.next


def test_a_left_over_config_is_no_quantisation(hub: Path) -> None:
    configured(hub, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    made = lw.convert(hub, "llava-hf")
    assert "quantization_config" not in made.config
    assert any(each.rule == "config/quantized" for each in findings(hub))


def test_a_family_without_a_class_is_unchecked_and_never_failed_for_another_cause(hub: Path) -> None:
    configured(hub, model_type="mllama", architectures=["MllamaForConditionalGeneration"])
    with pytest.raises(InputError, match="mllama") as refused:
        lw.convert(hub, "llava-hf")
    assert "MllamaForConditionalGeneration" in (refused.value.hint or "")
    told = findings(hub)
    assert any("mllama" in each.text and each.verdict == "unchecked" for each in told)
    assert not any(each.rule.startswith("config/") for each in told)


def test_a_folder_of_folders_is_named_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "llm/model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_llama", "architectures": ["LlavaLlamaModel"]}))
    with pytest.raises(InputError, match="VILA"):
        lw.open_checkpoint(tmp_path)
