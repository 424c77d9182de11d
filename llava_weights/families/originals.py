"""The published families of LLaVA in its own layout: how each is recognised, and which decoder, tower, target and prompt it has.

Sources: the README, `llava/conversation.py` and the config.json of each release of haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT; training
scripts of BAAI-DCAI/Bunny, SkunkworksAI/BakLLaVA (scripts/finetune.sh) and mbzuai-oryx/LLaVA-pp; xtuner/configs/llava of InternLM/xtuner.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .decoders import DECODERS
from .projectors import STACK_OF_ONE_TYPE
from .prompts import CONVERSATIONS
from .targets import ANYRES_MAX
from .targets import TARGET_BY_TYPE as TARGETS


@dataclass(frozen=True)
class Original:
    """A family of LLaVA. It fits a checkpoint whose decoder and tower are of these rows, whose config has one of the values that `says`
    lists for each key (None: it is left out; a pattern: all that match it whole) and every key of `has`, and whose tokenizer has the
    added token `token`.

    `target` is the row of the class of transformers that holds it, `prompt` that of its conversation, `projector` what its published
    checkpoints have; `evidence` says in a sentence why a checkpoint that fits is taken for this family and no other, `warning` what its
    target can't hold.

    `rivals` are the prompts of other published families whose checkpoints have the same decoder, tower and config: where there are any,
    nothing but a recorded `conv_mode` makes `prompt` certain. `ANY_PROMPT` stands where no family is published that is like this one.
    """

    name: str
    decoders: tuple[str, ...]
    towers: tuple[str, ...]
    target: str
    prompt: str
    evidence: str
    token: str = ""
    says: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    has: tuple[str, ...] = ()
    projector: str = "mlp2x_gelu"
    warning: str = ""
    rivals: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Original({self.name!r})"

    def fits(
        self, config: Mapping[str, Any], *, decoder: str, tower: str | None, newline: bool | None, norm: bool = False, videos: bool = False
    ) -> bool:
        """Whether config, rows and `image_newline` are those of this family. `tower` and `newline` are None where they are not known,
        `norm`: whether the projector begins with a LayerNorm, `videos`: whether videos have a tower of their own."""
        if decoder not in self.decoders or (tower is not None and tower not in self.towers):
            return False
        target = TARGETS[self.target]
        if (target.tiles and newline is False) or (target.layernorm, target.two_towers) != (norm, videos):
            return False
        return all(_among(config.get(key), values) for key, values in self.says.items()) and all(config.get(key) for key in self.has)


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    return value in values or any(isinstance(v, re.Pattern) and isinstance(value, str) and v.fullmatch(value) for v in values)


QWEN = ("qwen2", "qwen3")
ANY_DECODER = tuple(row.model_type for row in DECODERS if row.model_type != "mistral")  # which has rows of its own
OTHER_DECODERS = tuple(name for name in ANY_DECODER if name != "llama")  # those of no LLaVA on Vicuna
ANY_PROMPT = tuple(CONVERSATIONS)
WHOLE_IMAGES = {"image_aspect_ratio": ("pad", "square", None)}
# Images in tiles, joined with an `image_newline` behind each row: LLaVA-NeXT. With `anyres_max_N`, of which many tiles are shrunk to
# the features of N: LLaVA-OneVision, which has one newline at the end of a video (`one_token`, what its code does without the key).
JOINED = {"mm_patch_merge_type": ("spatial_unpad",)}
TILES = {"image_aspect_ratio": ("anyres",), **JOINED}
# Frames of videos, whose patches are pooled before the projector. Configs of images alone have one of the two keys at most.
POOLED = {**TILES, "mm_spatial_pool_mode": ("average", "max")}
POOLED_KEYS = ("mm_spatial_pool_stride",)
CAPPED = {"image_aspect_ratio": ("anyres_max_9", re.compile(ANYRES_MAX)), **JOINED}
ONE_NEWLINE = {"mm_newline_position": ("one_token", None)}
GRID = (
    "videos will be read wrongly: LLaVA-Video was trained with a newline behind each row of every frame (`mm_newline_position`), and no "
    "class of transformers has these: images are right"
)
SIGLIP_IMAGES = {
    "image_aspect_ratio": ("pad", "square", "anyres", None)
}  # LLaVA-NeXT-Interleave, a Qwen, says `anyres`, but takes whole images
CHATML, LLAMA_3, PHI_3 = "<|im_start|>", "<|start_header_id|>", "<|end|>"
MLP_PROJECTOR = {"mm_projector_type": ("mlp2x_gelu", STACK_OF_ONE_TYPE)}
LINEAR_PROJECTOR = {"mm_projector_type": ("linear", None)}
MARKED_IMAGES = {**LINEAR_PROJECTOR, "mm_use_im_start_end": (True,)}


def _family(
    name: str,
    decoders: tuple[str, ...],
    prompt: str,
    evidence: str,
    *,
    token: str = "",
    says: Mapping[str, tuple[Any, ...]] | None = None,
    has: tuple[str, ...] = (),
    projector: str = "mlp2x_gelu",
    whole: tuple[str, ...] = ("clip", "siglip"),
    rivals: tuple[str, ...] = (),
    tiled_rivals: tuple[str, ...] = (),
) -> Iterator[Original]:
    """The rows of a family whose images come in tiles or whole, and whose tower is a CLIP or a SigLIP. A Qwen takes tiles of a SigLIP by
    rows of its own; those of whole images are left out for a tower that is not in `whole`. `rivals` are of these, `tiled_rivals` of the
    others."""
    others = tuple(decoder for decoder in decoders if decoder != "qwen2")
    for title, tower, target, images, on in (
        (f"{name}, videos", "clip", "llava_next_video", POOLED, decoders),
        (f"{name}, images in tiles", "clip", "llava_next", TILES, decoders),
        (name, "clip", "llava", WHOLE_IMAGES, decoders),
        (f"{name}, SigLIP, a limited number of tiles", "siglip", "llava_onevision", {**CAPPED, **ONE_NEWLINE}, others),
        (f"{name}, SigLIP, images in tiles", "siglip", "llava_next", TILES, others),
        (f"{name}, SigLIP", "siglip", "llava", SIGLIP_IMAGES, decoders),
    ):
        if not on or (target == "llava" and tower not in whole):
            continue
        yield Original(
            title,
            on,
            (tower,),
            target,
            prompt,
            evidence,
            token,
            {**(says or {}), **images},
            (*has, *(POOLED_KEYS if images is POOLED else ())),
            projector,
            rivals=tuple(name for name in (rivals if target == "llava" else tiled_rivals) if name != prompt),
        )


def _bunny(decoder: str, prompt: str, *types: str) -> Original:
    """Its own code writes these `model_type`s and nobody else's; its end of text goes by the decoder."""
    evidence = f"`model_type` {' or '.join(types)} in config.json, which Bunny's code alone writes"
    says: dict[str, tuple[Any, ...]] = {"model_type": types, **WHOLE_IMAGES}
    return Original(f"Bunny on {decoder}", (decoder,), ("siglip",), "llava", prompt, evidence, says=says)


# What `checkpoint/part_folders.py` notes of a LLaVA in xtuner's folders.
FOLDERS = {"trained_with": ("xtuner",), **WHOLE_IMAGES}
EVERY_TOWER = ("clip", "siglip")

# Tried in order, the first that fits wins: the more a row asks for, the earlier it stands.
ORIGINALS: tuple[Original, ...] = (
    *(
        Original(
            name,
            ("qwen2",),
            ("siglip",),
            "llava_onevision",
            "llava_onevision",
            evidence,
            CHATML,
            {**CAPPED, **newlines},
            warning=warning,
        )
        for name, newlines, evidence, warning in (
            ("LLaVA-OneVision", ONE_NEWLINE, f"a Qwen with a limited number of tiles (`anyres_max`), and `{CHATML}` one of its tokens", ""),
            (
                "LLaVA-Video",
                {"mm_newline_position": ("grid", "frame", "no_token")},
                "`mm_newline_position` in config.json is not `one_token`",
                GRID,
            ),
        )
    ),
    Original(
        "ViP-LLaVA on Llama 3",
        ("llama",),
        ("clip",),
        "vipllava",
        "llama_3",
        f"a LayerNorm in its projector, and `{LLAMA_3}` one of its tokens",
        LLAMA_3,
        WHOLE_IMAGES,
    ),
    # Its scripts train and evaluate with `vicuna_v1`, transformers documents the class with the prompt of v0.
    Original(
        "ViP-LLaVA",
        ("llama",),
        ("clip",),
        "vipllava",
        "vicuna_v1",
        "a LayerNorm in its projector",
        says=WHOLE_IMAGES,
        rivals=("llava_v0",),
    ),
    # scripts/v1_5/finetune.sh of PKU-YuanGroup/Video-LLaVA at 1d28d6e trains with `--version v1`, which is `vicuna_v1`.
    Original(
        "Video-LLaVA",
        ("llama",),
        ("clip",),
        "video_llava",
        "vicuna_v1",
        "a tower for videos beside that for images",
        says=WHOLE_IMAGES,
    ),
    # Of its folders the layout tells who trained it, the tokens of which model: its templates of Phi-3, Llama 3 and Qwen have a system
    # text only where the data has one. That of Vicuna has line breaks between turns, which no row has.
    Original(
        "xtuner's folders, on Phi-3",
        ("phi3", "llama"),
        EVERY_TOWER,
        "llava",
        "phi3_chat",
        f"it was trained with xtuner, by its folders, and `{PHI_3}` is one of its tokens",
        PHI_3,
        FOLDERS,
        rivals=("phi3_instruct",),
    ),
    Original(
        "xtuner's folders, on Llama 3",
        ("llama",),
        EVERY_TOWER,
        "llava",
        "llama3_chat",
        f"it was trained with xtuner, by its folders, and `{LLAMA_3}` is one of its tokens",
        LLAMA_3,
        FOLDERS,
        rivals=("llama3", "llama_3"),
    ),
    Original(
        "xtuner's folders, on Qwen",
        QWEN,
        EVERY_TOWER,
        "llava",
        "llava_onevision",
        f"it was trained with xtuner, by its folders, and `{CHATML}` is one of its tokens",
        CHATML,
        FOLDERS,
        rivals=("qwen",),
    ),
    Original(
        "xtuner's folders, on another decoder",
        (*ANY_DECODER, "mistral"),
        EVERY_TOWER,
        "llava",
        "vicuna_v1",
        "it was trained with xtuner, by its folders",
        says=FOLDERS,
        rivals=ANY_PROMPT,
    ),
    _bunny("llama", "bunny_llama", "bunny-llama"),
    _bunny("qwen2", "bunny", "bunny-qwen2", "bunny-qwen"),
    _bunny("phi3", "bunny", "bunny-phi3"),
    # Its card writes "Answer the question", the fork of Bunny that it came from LLaVA's `chatml_direct`.
    Original(
        "nanoLLaVA",
        ("qwen2",),
        ("siglip",),
        "llava",
        "nanollava",
        "`model_type` llava-qwen2 in config.json, as nanoLLaVA has it",
        CHATML,
        {"model_type": ("llava-qwen2",), **WHOLE_IMAGES},
        rivals=("chatml_direct",),
    ),
    # LLaVA-NeXT's code writes llava_qwen. Others have taken this name too, FastVLM among them.
    Original(
        "HuatuoGPT-Vision",
        ("qwen2",),
        ("clip",),
        "llava",
        "huatuo",
        "`model_type` llava_qwen2 in config.json and whole images of a CLIP, as HuatuoGPT-Vision has them",
        CHATML,
        {"model_type": ("llava_qwen2",), **WHOLE_IMAGES},
        rivals=("qwen",),
    ),
    *_family("LLaVA on Qwen", QWEN, "qwen", f"the text model is a Qwen and `{CHATML}` one of its tokens", token=CHATML),
    # With whole images there is HuatuoGPT-Vision-34B.
    *_family(
        "LLaVA v1.6 34B",
        ("llama", "mistral"),
        "chatml_direct",
        f"`{CHATML}` is one of its tokens and the text model is not a Qwen",
        token=CHATML,
        rivals=("huatuo",),
    ),
    # xtuner's script rewrites Phi-3's fused tensors in Llama's form. Its prompt and that of LLaVA++ differ by a system text.
    Original(
        "xtuner on Phi-3",
        ("llama",),
        ("clip", "siglip"),
        "llava",
        "phi3_chat",
        f"`{PHI_3}` is one of its tokens and the text model is in Llama's form, as xtuner writes it",
        PHI_3,
        WHOLE_IMAGES,
        rivals=("phi3_instruct",),
    ),
    Original(
        "LLaVA++ on Phi-3",
        ("phi3",),
        ("clip", "siglip"),
        "llava",
        "phi3_instruct",
        f"the text model is a Phi-3 and `{PHI_3}` one of its tokens",
        PHI_3,
        WHOLE_IMAGES,
        rivals=("phi3_chat",),
    ),
    # LLaVA-Med v1.5 stands on Mistral 0.2, which has no sliding window, BakLLaVA-1 on 0.1, which has.
    Original(
        "LLaVA on Mistral",
        ("mistral",),
        ("clip",),
        "llava",
        "mistral_instruct",
        "the text model is a Mistral without a sliding window",
        says={"sliding_window": (None,), **WHOLE_IMAGES},
    ),
    Original(
        "BakLLaVA-1",
        ("mistral",),
        ("clip",),
        "llava",
        "vicuna_v1",
        "the text model is a Mistral with a sliding window, and its images are whole, as those of BakLLaVA-1",
        says=WHOLE_IMAGES,
        rivals=("mistral_instruct",),
    ),
    *_family(
        "LLaVA on Mistral",
        ("mistral",),
        "mistral_instruct",
        "the text model is a Mistral",
        whole=("siglip",),
        rivals=("vicuna_v1",),
    ),
    # LLaVA-NeXT's Llama 3 takes tiles. xtuner's script for LLaVA's layout sets the flag for its tuned tower, LLaVA++ leaves it false.
    Original(
        "xtuner on Llama 3",
        ("llama",),
        ("clip",),
        "llava",
        "llama3_chat",
        f"`{LLAMA_3}` is one of its tokens, its images are whole and its tower is tuned (`unfreeze_mm_vision_tower`), as xtuner's",
        LLAMA_3,
        {"unfreeze_mm_vision_tower": (True,), **WHOLE_IMAGES},
        rivals=("llama3", "llama_3"),
    ),
    Original(
        "LLaVA++ on Llama 3",
        ("llama",),
        ("clip",),
        "llava",
        "llama3",
        f"`{LLAMA_3}` is one of its tokens and its images are whole, as those of LLaVA++",
        LLAMA_3,
        {"unfreeze_mm_vision_tower": (False, None), **WHOLE_IMAGES},
        rivals=("llama3_chat", "llama_3"),
    ),
    *_family(
        "LLaVA on Llama 3",
        ("llama",),
        "llama_3",
        f"`{LLAMA_3}` is one of its tokens",
        token=LLAMA_3,
        whole=("siglip",),
        rivals=("llama3_chat", "llama3", "bunny_llama"),
    ),
    *_family(
        "LLaVA v0",
        ("llama",),
        "llava_v0",
        "`max_sequence_length` in config.json, a key of the v0 releases alone",
        has=("max_sequence_length",),
        projector="linear",
    ),
    *_family(
        "LLaVA v1 with marked images",
        ("llama",),
        "llava_v1",
        "its projector is linear and its images stand between `<im_start>` and `<im_end>`",
        says=MARKED_IMAGES,
        projector="linear",
    ),
    # Every published LLaVA of this kind is on Vicuna: LLaVA v1.5 and v1.6, ShareGPT4V, RLAIF-V, GeoChat, Table-LLaVA.
    *_family("LLaVA v1.5 and v1.6", ("llama",), "vicuna_v1", "its projector is `mlp2x_gelu`, which came with v1.5", says=MLP_PROJECTOR),
    Original(
        "LLaVA on Gemma",
        ("gemma", "gemma2"),
        ("clip", "siglip"),
        "llava",
        "gemma_instruct",
        "the text model is a Gemma",
        says={**MLP_PROJECTOR, **WHOLE_IMAGES},
        rivals=("vicuna_v1",),
    ),
    *_family(
        "LLaVA on another decoder",
        OTHER_DECODERS,
        "vicuna_v1",
        "its projector is `mlp2x_gelu`, which came with v1.5",
        says=MLP_PROJECTOR,
        whole=(),
        tiled_rivals=ANY_PROMPT,
    ),
    Original(
        "LLaVA on another decoder",
        tuple(name for name in OTHER_DECODERS if not name.startswith("gemma")),
        ("clip", "siglip"),
        "llava",
        "vicuna_v1",
        "its projector is `mlp2x_gelu`, which came with v1.5",
        says={**MLP_PROJECTOR, **WHOLE_IMAGES},
        rivals=ANY_PROMPT,
    ),
    Original(
        "LLaVA with images in tiles",
        ANY_DECODER,
        ("clip",),
        "llava_next",
        "vicuna_v1",
        "its images are cut into tiles (`anyres`), which came with v1.6",
        says=TILES,
        projector="linear",
        rivals=ANY_PROMPT,
    ),
    Original(
        "LLaVA with images in tiles, SigLIP",
        ANY_DECODER,
        ("siglip",),
        "llava",
        "vicuna_v1",
        "its images are cut into tiles (`anyres`), which came with v1.6",
        says={"image_aspect_ratio": ("anyres",)},
        projector="linear",
        rivals=ANY_PROMPT,
    ),
    # LLaVA Lightning on Llama 2 chat has the config of LLaVA v1, but for the base that its trainer noted.
    Original(
        "LLaVA on Llama 2 chat",
        ("llama",),
        ("clip",),
        "llava",
        "llava_llama_2",
        "`_name_or_path` in config.json names Llama 2 chat as what it was trained from",
        says={
            "_name_or_path": ("meta-llama/Llama-2-13b-chat-hf", re.compile(r"(?i).*llama-?_?2\b.*chat.*")),
            **LINEAR_PROJECTOR,
            **WHOLE_IMAGES,
        },
        projector="linear",
        rivals=("llava_v1",),
    ),
    Original(
        "LLaVA v1",
        ("llama",),
        ("clip", "siglip"),
        "llava",
        "llava_v1",
        "nothing in config.json or the tokens speaks for another one",
        says=WHOLE_IMAGES,
        projector="linear",
        rivals=("llava_llama_2",),
    ),
    Original(
        "LLaVA v1 on another decoder",
        OTHER_DECODERS,
        ("clip", "siglip"),
        "llava",
        "llava_v1",
        "nothing in config.json or the tokens speaks for another one",
        says=WHOLE_IMAGES,
        projector="linear",
        rivals=ANY_PROMPT,
    ),
)


def fitting(
    config: Mapping[str, Any],
    *,
    decoder: str,
    tower: str | None = None,
    newline: bool | None = None,
    norm: bool = False,
    videos: bool = False,
) -> Iterator[Original]:
    """The families that config and rows fit, the more certain ones first, for each tower all of one target; which one it is, its tokens
    then tell."""
    targets: dict[str, str] = {}
    for row in ORIGINALS:
        if not row.fits(config, decoder=decoder, tower=tower, newline=newline, norm=norm, videos=videos):
            continue
        if any(targets.setdefault(kind, row.target) == row.target for kind in row.towers):
            yield row


def of_tokens(rows: Sequence[Original], specials: Collection[str]) -> Original | None:
    """The first of `rows` whose token is among the texts of the added tokens, or that asks for none."""
    return next((row for row in rows if not row.token or row.token in specials), None)
