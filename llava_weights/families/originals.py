"""The published families of LLaVA in its own layout: how each is recognised, and which decoder, tower, target and prompt it has.

Sources: the README, `llava/conversation.py` and the config.json of each release of haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .decoders import DECODERS
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

    def __repr__(self) -> str:
        return f"Original({self.name!r})"

    def fits(self, config: Mapping[str, Any], *, decoder: str, tower: str | None, newline: bool | None, norm: bool = False) -> bool:
        """Whether config, rows and `image_newline` are those of this family. `tower` and `newline` are None where they are not known,
        `norm`: whether the projector begins with a LayerNorm."""
        if decoder not in self.decoders or (tower is not None and tower not in self.towers):
            return False
        target = TARGETS[self.target]
        if (target.tiles and newline is False) or target.layernorm != norm:
            return False
        return all(_among(config.get(key), values) for key, values in self.says.items()) and all(config.get(key) for key in self.has)


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    return value in values or any(isinstance(v, re.Pattern) and isinstance(value, str) and v.fullmatch(value) for v in values)


QWEN = ("qwen2", "qwen3")
ANY_DECODER = tuple(row.model_type for row in DECODERS if row.model_type != "mistral")  # which has rows of its own
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
CHATML, LLAMA_3 = "<|im_start|>", "<|start_header_id|>"
MLP_PROJECTOR = {"mm_projector_type": ("mlp2x_gelu",)}
MARKED_IMAGES = {"mm_projector_type": ("linear", None), "mm_use_im_start_end": (True,)}


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
) -> Iterator[Original]:
    """The rows of a family whose images come in tiles or whole, and whose tower is a CLIP or a SigLIP. A Qwen takes tiles of a SigLIP by
    rows of its own."""
    others = tuple(decoder for decoder in decoders if decoder != "qwen2")
    for title, tower, target, images, on in (
        (f"{name}, videos", "clip", "llava_next_video", POOLED, decoders),
        (f"{name}, images in tiles", "clip", "llava_next", TILES, decoders),
        (name, "clip", "llava", WHOLE_IMAGES, decoders),
        (f"{name}, SigLIP, a limited number of tiles", "siglip", "llava_onevision", {**CAPPED, **ONE_NEWLINE}, others),
        (f"{name}, SigLIP, images in tiles", "siglip", "llava_next", TILES, others),
        (f"{name}, SigLIP", "siglip", "llava", SIGLIP_IMAGES, decoders),
    ):
        if not on:
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
        )


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
    Original("ViP-LLaVA", ("llama",), ("clip",), "vipllava", "vicuna_v1", "a LayerNorm in its projector", says=WHOLE_IMAGES),
    *_family("LLaVA on Qwen", QWEN, "qwen", f"the text model is a Qwen and `{CHATML}` one of its tokens", token=CHATML),
    *_family(
        "LLaVA v1.6 34B",
        ("llama", "mistral"),
        "chatml_direct",
        f"`{CHATML}` is one of its tokens and the text model is not a Qwen",
        token=CHATML,
    ),
    *_family("LLaVA on Mistral", ("mistral",), "mistral_instruct", "the text model is a Mistral"),
    *_family("LLaVA on Llama 3", ANY_DECODER, "llama_3", f"`{LLAMA_3}` is one of its tokens", token=LLAMA_3),
    *_family(
        "LLaVA v0",
        ANY_DECODER,
        "llava_v0",
        "`max_sequence_length` in config.json, a key of the v0 releases alone",
        has=("max_sequence_length",),
        projector="linear",
    ),
    *_family(
        "LLaVA v1 with marked images",
        ANY_DECODER,
        "llava_v1",
        "its projector is linear and its images stand between `<im_start>` and `<im_end>`",
        says=MARKED_IMAGES,
        projector="linear",
    ),
    *_family("LLaVA v1.5 and v1.6", ANY_DECODER, "vicuna_v1", "its projector is `mlp2x_gelu`, which came with v1.5", says=MLP_PROJECTOR),
    Original(
        "LLaVA with images in tiles",
        ANY_DECODER,
        ("clip",),
        "llava_next",
        "vicuna_v1",
        "its images are cut into tiles (`anyres`), which came with v1.6",
        says=TILES,
        projector="linear",
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
    ),
    Original(
        "LLaVA v1",
        ANY_DECODER,
        ("clip", "siglip"),
        "llava",
        "llava_v1",
        "nothing in config.json or the tokens speaks for another one",
        says=WHOLE_IMAGES,
        projector="linear",
    ),
)


def fitting(
    config: Mapping[str, Any],
    *,
    decoder: str,
    tower: str | None = None,
    newline: bool | None = None,
    norm: bool = False,
) -> Iterator[Original]:
    """The families that config and rows fit, the more certain ones first, for each tower all of one target; which one it is, its tokens
    then tell."""
    targets: dict[str, str] = {}
    for row in ORIGINALS:
        if not row.fits(config, decoder=decoder, tower=tower, newline=newline, norm=norm):
            continue
        if any(targets.setdefault(kind, row.target) == row.target for kind in row.towers):
            yield row


def of_tokens(rows: Sequence[Original], specials: Collection[str]) -> Original | None:
    """The first of `rows` whose token is among the texts of the added tokens, or that asks for none."""
    return next((row for row in rows if not row.token or row.token in specials), None)
