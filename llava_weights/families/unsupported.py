"""Models that look like a LLaVA and that nothing here can convert: how each is recognised, and why there is no class for it.

Sources: the config.json and the modelling code that each of these repositories publishes, and the classes of transformers up to 5.24.
A decoder or a tower that no row describes is refused by its own name and needs none here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

OWN_CODE = "run it with the program of its authors"


@dataclass(frozen=True)
class Unsupported:
    """A family without a class that could hold it. One of these is enough to recognise it: `model_type` or a class of `architectures` is as
    one of the patterns, every pattern of `tensors` is the whole name of some tensor, every key of `says` has a value as its pattern.

    `why` says in a sentence what has no place, `hint` what can be done with it. With `unknown` the row counts only where no row describes
    the decoder.
    """

    name: str
    why: str
    model_types: str = ""
    architectures: str = ""
    tensors: tuple[str, ...] = ()
    says: Mapping[str, str] = field(default_factory=dict)
    hint: str = OWN_CODE
    unknown: bool = False

    def evidence(self, config: Mapping[str, Any], names: Iterable[str]) -> str:
        """What speaks for this family, empty where nothing does."""
        given = config.get("architectures")
        named = [str(name) for name in given] if isinstance(given, list) else []
        if self.model_types and re.fullmatch(self.model_types, str(config.get("model_type")), re.IGNORECASE):
            return f"`model_type` {config['model_type']}"
        if self.architectures and (found := next((name for name in named if re.fullmatch(self.architectures, name)), None)):
            return f"the class {found}"
        told = {key: _value(config, key) for key in self.says}
        if self.says and all(re.fullmatch(pattern, str(told[key]), re.IGNORECASE) for key, pattern in self.says.items()):
            return ", ".join(f"`{key}` {told[key]}" for key in self.says)
        first = [next((name for name in names if re.fullmatch(pattern, name)), None) for pattern in self.tensors]
        return f"the tensor `{first[0]}`" if first and all(first) else ""


def _value(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key, or of `part.key` in a nested config."""
    part, _, rest = key.rpartition(".")
    inner = config.get(part, {}) if part else config
    return inner.get(rest) if isinstance(inner, Mapping) else None


TWO_TOWERS = "its two towers have no place in a class that takes one"
NO_LLAVA = "it is no LLaVA"
OWN_CLASS = f"{NO_LLAVA}: its parts are other modules than a LLaVA's"
MERGER = f"{NO_LLAVA}: its tower takes images of any size, and a merger joins their patches"
SHUFFLE = f"{NO_LLAVA}: patches are joined or pooled before they reach its projector"
CROSS = f"{NO_LLAVA}: images enter by cross-attention inside the text model"
RESAMPLER = f"{NO_LLAVA}: learned queries (a Q-Former, a resampler) stand between its tower and its text model"
NO_TOWER = f"{NO_LLAVA}: images enter its text model without a vision tower"
LOAD = "load it as it is with transformers: {}ForConditionalGeneration"


def _others() -> Iterator[Unsupported]:
    """Well-known models for images that are no LLaVA: name, `model_type`, class, why, and what transformers calls it ("" where only the
    code of its authors runs it)."""
    for name, kinds, classes, why, loads in (
        ("Qwen2-VL", "qwen2_vl", "Qwen2VL.*", MERGER, "Qwen2VL"),
        ("Qwen2.5-VL", "qwen2_5_vl", "Qwen2_5_VL.*", MERGER, "Qwen2_5_VL"),
        ("Qwen2.5-Omni", "qwen2_5_omni", "Qwen2_5Omni.*", MERGER, "Qwen2_5Omni"),
        ("Qwen3-VL", "qwen3_vl(_moe)?", "Qwen3VL.*", MERGER, "Qwen3VL"),
        ("GLM-4V", "glm4v(_moe)?", "Glm4v.*", MERGER, "Glm4v"),
        ("Kimi-VL", "kimi_(vl|k25)", "KimiVL.*|KimiK25.*", MERGER, ""),
        ("InternVL", "internvl", "InternVLForConditionalGeneration", SHUFFLE, "InternVL"),
        ("InternVL", "internvl_chat", "InternVLChat.*", SHUFFLE, ""),
        ("Idefics3", "idefics3", "Idefics3.*", SHUFFLE, "Idefics3"),
        ("SmolVLM", "smolvlm", "SmolVLM.*", SHUFFLE, "SmolVLM"),
        ("Aya Vision", "aya_vision", "AyaVision.*", SHUFFLE, "AyaVision"),
        ("Command A Vision", "cohere2_vision", "Cohere2Vision.*", SHUFFLE, "Cohere2Vision"),
        ("Gemma 3", "gemma3", "Gemma3ForConditionalGeneration", SHUFFLE, "Gemma3"),
        ("Gemma 3n", "gemma3n", "Gemma3nForConditionalGeneration", OWN_CLASS, "Gemma3n"),
        ("Mistral Small 3", "mistral3", "Mistral3.*", SHUFFLE, "Mistral3"),
        ("Llama 4", "llama4", "Llama4ForConditionalGeneration", SHUFFLE, "Llama4"),
        ("PerceptionLM", "perception_lm", "PerceptionLM.*", SHUFFLE, "PerceptionLM"),
        ("Molmo", "molmo2?", "Molmo.*", SHUFFLE, ""),
        ("PaliGemma", "paligemma", "PaliGemma.*", f"{NO_LLAVA}: a prompt is read in both directions, behind one Linear", "PaliGemma"),
        ("Idefics", "idefics", "IdeficsFor.*", CROSS, ""),
        ("Flamingo or Otter", "(open)?flamingo|otter", "(Open)?Flamingo.*|Otter.*", CROSS, ""),
        ("CogVLM", "cogvlm.*|cogagent.*", "CogVLM.*|CogAgent.*", f"{NO_LLAVA}: its text model has weights of their own for images", ""),
        ("Idefics2", "idefics2", "Idefics2.*", RESAMPLER, "Idefics2"),
        ("InstructBLIP", "instructblip(video)?", "InstructBlip.*", RESAMPLER, "InstructBlip"),
        ("BLIP-2", "blip[-_]?2", "Blip2.*", RESAMPLER, "Blip2"),
        ("MiniCPM-V", "minicpm(v|o).*", "MiniCPM(V|O).*", RESAMPLER, ""),
        ("mPLUG-Owl", r"mplug_?owl\d?", "(MPLUGOwl|mPLUGOwl|MplugOwl).*", RESAMPLER, ""),
        ("Kosmos-2", r"kosmos-2(\.5)?", "Kosmos2.*", RESAMPLER, "Kosmos2"),
        ("Qwen-VL", "", "", RESAMPLER, ""),
        ("Aria", "aria", "AriaForConditionalGeneration", RESAMPLER, "Aria"),
        ("GIT", "git", "Git(ForCausalLM|Model)", OWN_CLASS, ""),
        ("Phi-3-Vision", "phi3_v", "Phi3V.*", OWN_CLASS, ""),
        ("Phi-4-multimodal", "phi4mm|phi4_multimodal", "Phi4MM.*|Phi4Multimodal.*", OWN_CLASS, ""),
        ("DeepSeek-VL", "deepseek_vl(_hybrid)?", "DeepseekVL(Hybrid)?(ForConditionalGeneration|Model)", OWN_CLASS, "DeepseekVL"),
        ("DeepSeek-VL2", "deepseek_vl_v2", "DeepseekVLV2.*", OWN_CLASS, ""),
        ("DeepSeek-VL or Janus", "multi_modality", "MultiModality.*", OWN_CLASS, ""),
        ("Janus", "janus", "JanusForConditionalGeneration", OWN_CLASS, "Janus"),
        ("Ovis", "ovis.*", "Ovis.*", OWN_CLASS, ""),
        ("Florence-2", "florence2", "Florence2.*", OWN_CLASS, "Florence2"),
        ("GOT-OCR", "got(_ocr2)?", "GOT.*|GotOcr2.*", OWN_CLASS, ""),
        ("InternLM-XComposer", "internlm.*xcomposer.*", "InternLMXComposer.*", OWN_CLASS, ""),
        ("VideoLLaMA", r"video_?llama\d?.*", "Video(LLaMA|llama|Llama).*", OWN_CLASS, ""),
        ("Chat-UniVi", "chat_?univi.*", "ChatUniVi.*", OWN_CLASS, ""),
        ("Oryx", "oryx.*", "Oryx.*", OWN_CLASS, ""),
        ("OpenVLA", "openvla|prismatic", "OpenVLA.*|Prismatic.*", OWN_CLASS, ""),
        ("Fuyu", "fuyu", "Fuyu.*", NO_TOWER, ""),
        ("Chameleon", "chameleon", "Chameleon.*", NO_TOWER, "Chameleon"),
        ("Emu3", "emu3", "Emu3.*", NO_TOWER, "Emu3"),
    ):  # fmt: skip
        says = {} if kinds else {"model_type": "qwen", "visual.image_size": r"\d+"}
        yield Unsupported(name, why, kinds, classes, says=says, hint=LOAD.format(loads) if loads else OWN_CODE)


# Tried in order, the first that fits wins: those that a name tells before those that a part tells.
UNSUPPORTED = (
    *_others(),
    Unsupported(
        "Llama 3.2 Vision (mllama)",
        "images enter by cross-attention inside the text model, not as tokens of a LLaVA",
        model_types="mllama",
        architectures="Mllama.*",
        tensors=(r"(?:model\.)?language_model\.(?:model\.)?layers\.\d+\.cross_attn.*",),
        hint="load it as it is with transformers: MllamaForConditionalGeneration",
    ),
    Unsupported(
        "Pixtral",
        "its tower is neither a CLIP nor a SigLIP: no size, position table or class token of one fits it",
        says={"vision_config.model_type": "pixtral"},
        tensors=(r"(?:model\.)?vision_tower\.patch_conv\.weight", r"(?:model\.)?vision_tower\.ln_pre\.weight"),
        hint="load it as it is with transformers: LlavaForConditionalGeneration",
    ),
    Unsupported(
        "FastVLM",
        "its tower is a FastViT (MobileCLIP), of which no row describes the tensors",
        model_types="fast_?vlm",
        architectures="FastVlm.*",
        says={"mm_vision_tower": ".*mobileclip.*"},
        tensors=(r"model\.vision_tower\.vision_tower\.model\.patch_embed\..*",),
        hint="transformers 5 has a class for it, FastVlmForConditionalGeneration: take the conversion of its authors",
    ),
    Unsupported(
        "MobileVLM",
        "its projector (LDP) has convolutions, which no class holds",
        model_types="mobile_?vlm.*",
        architectures="MobileLlama.*|MobileVLM.*",
        says={"mm_projector_type": "ldpnet.*"},
        tensors=(r"model\.mm_projector\.peg\..*",),
    ),
    Unsupported(
        "Yi-VL",
        "its projector has a LayerNorm behind each Linear, which no class holds",
        model_types="yi_?vl",
        says={"mm_projector_type": "mlp.*norm"},
        tensors=(r"model\.mm_projector\.1\.weight", r"model\.mm_projector\.4\.weight"),
    ),
    Unsupported(
        "a LLaVA without a projector (`identity`)",
        "the features of its tower enter the text model as they are, and every class has a projector",
        says={"mm_projector_type": "identity"},
    ),
    Unsupported(
        "LLaVA with S2 (several scales of an image)",
        "features of several scales are put side by side, which no class computes",
        says={"s2": "True"},
    ),
    Unsupported(
        "LLaVA with S2 (several scales of an image)",
        "features of several scales are put side by side, which no class computes",
        says={"use_s2": "True"},  # Bunny v1.1
    ),
    Unsupported(
        "LLaVA with S2 (several scales of an image)",
        "features of several scales are put side by side, which no class computes",
        says={"s2_scales": r".*\d.*"},
    ),
    Unsupported(
        "LongVA (`unires`)",
        "tiles of `unires` are pooled and joined in a way that no class computes",
        says={"mm_patch_merge_type": "unires.*"},
    ),
    Unsupported(
        "LLaVA with features of several layers in slices",
        "features of several layers, each cut, are put side by side, which no class computes",
        says={"mm_vision_select_feature": "slice.*"},
    ),
    Unsupported(
        "LLaVA-OneVision-1.5",
        "its tower (RICE) and its merger are other modules than those of LLaVA-OneVision",
        model_types=r"llava_?onevision_?1[._]?5.*",
        architectures=r"LLaVAOneVision1_5.*",
        tensors=(r"(?:model\.)?visual\.merger\..*", r"(?:model\.)?visual\.class_(pos_emb|embedding)"),
    ),
    Unsupported(
        "LLaVA-OneVision-2",
        "its tower and its merger are other modules than those of LLaVA-OneVision",
        model_types=r"llava_?onevision_?2.*",
        architectures=r"LLaVAOneVision2.*",
    ),
    Unsupported(
        "Qwen2-VL or one of its followers",
        MERGER,
        tensors=(r"(?:model\.)?visual\.merger\..*", r"(?:model\.)?visual\.blocks\..*"),
    ),
    Unsupported(
        "VILA or NVILA",
        "it keeps text model, tower and projector as three models, whose projectors downsample",
        architectures=r"(LlavaLlama|LlavaMistral|LlavaMixtral|LlavaTopDown.*)Model|VILA.*",
        model_types=r"n?vila.*",
        tensors=(r"llm\..*", r"mm_projector\.layers\..*"),
    ),
    Unsupported(
        "TinyLLaVA",
        "it stands on phi-2 or another small decoder, whose `lm_head.bias` has no place in a class of a LLaVA",
        model_types=r"tiny_?llava.*",
        architectures=r"TinyLlava.*",
        tensors=(r"connector\._connector\..*",),
    ),
    Unsupported(
        "LLaVA-MPT",
        "no class of a LLaVA holds an MPT, whose attention is one fused matrix with ALiBi",
        model_types="llava_mpt",
        architectures="LlavaMPT.*|LlavaMpt.*",
        tensors=(r"transformer\.blocks\.\d+\..*",),
    ),
    Unsupported(
        "MoE-LLaVA",
        "its layers are a mixture of experts of DeepSpeed, which no class holds",
        model_types=r"moe_llava.*",
        architectures=r"MoELLaVA.*",
        tensors=(r"(?:.*\.)?deepspeed_moe\..*",),
    ),
    Unsupported(
        "LISA",
        "its segmentation model (SAM) and the layers in front of it have no place in a class of a LLaVA",
        architectures=r"LISA.*",
        tensors=(r"model\.visual_model\..*", r"model\.text_hidden_fcs\..*"),
    ),
    Unsupported(
        "GLaMM",
        "its grounding encoder and region encoder have no place in a class of a LLaVA",
        architectures=r"GLaMM.*",
        tensors=(r"model\.(grounding_encoder|region_encoder)\..*",),
    ),
    Unsupported(
        "MGM (Mini-Gemini)",
        "a second tower and the attention between the two have no place in a class of a LLaVA",
        model_types=r"(mini_gemini|mgm).*",
        architectures=r"(MiniGemini|MGM).*",
        tensors=(r"model\.vision_tower_aux\..*",),
    ),
    Unsupported(
        "MMVP (features of CLIP and DINOv2 interleaved)",
        TWO_TOWERS,
        tensors=(r"model\.vision_tower_dino.*|model\.dino_tower\..*",),
    ),
    Unsupported(
        "Cambrian",
        "its several towers and the sampler that joins them have no place in a class of a LLaVA",
        model_types="cambrian.*",
        architectures="Cambrian.*",
        tensors=(r"model\.(vision_tower_aux_list|mm_projector_aux_\d+|vision_sampler_.*|vision_query)(\..*)?",),
    ),
    Unsupported(
        "LLaMA-VID",
        "the attention that makes two tokens of an image has no place in a class of a LLaVA",
        tensors=(r"model\.vlm_att_.*",),
    ),
    Unsupported(
        "Ferret",
        "its encoder of regions has no place in a class of a LLaVA",
        model_types="ferret.*",
        architectures="Ferret.*",
        tensors=(r"model\.region_(fea_adapter|geo_sampler)\..*",),
    ),
    Unsupported(
        "LLaVA-Video with `faster_token`",
        "`model.faster_token` stands between the frames of a video, and no class reads it",
        tensors=(r"model\.faster_token",),
    ),
    Unsupported(
        "a LLaVA with two vision towers",
        TWO_TOWERS,
        tensors=(r"(?:model\.)?vision_tower_(?!config).*|(?:model\.)?(?:second|other|aux)_vision_tower\..*",),
    ),
    Unsupported(
        "a LLaVA with two vision towers",
        TWO_TOWERS,
        tensors=(r"(?:model\.)?(?:image_tower\.)+.*", r"(?:model\.)?(?:vision_tower\.)+.*"),
    ),
    Unsupported(
        "a LLaVA on phi-1.5 or phi-2",
        "the bias of its head has no place in a class of a LLaVA",
        model_types=r"bunny-phi",
        architectures="BunnyPhiForCausalLM",
        tensors=(r"(?:language_model\.)?lm_head\.bias", r"(?:.*\.)?layers\.0\.mlp\.fc1\.weight"),
    ),
    Unsupported(
        "a mixture of experts",
        "no row describes its decoder, whose layers hold several experts and a gate",
        tensors=(r"(?!.*(?:vision|visual)).*\.experts\.(?:\d+\.)?.*",),
        unknown=True,
    ),
)


def unsupported(config: Mapping[str, Any], names: Iterable[str], *, known: bool = False) -> tuple[Unsupported, str] | None:
    """The first family that config or tensors are of, with what speaks for it; None where no row fits.

    `known` says whether a row describes the decoder."""
    every = list(names)
    rows = (row for row in UNSUPPORTED if not (row.unknown and known))
    return next(((row, told) for row in rows if (told := row.evidence(config, every))), None)
