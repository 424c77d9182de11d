"""The published families of LLaVA in its own layout: how each is recognised, and which decoder, tower, target and prompt it has.

Sources: the README, `llava/conversation.py` and the config.json of each release of haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .targets import TARGET_BY_TYPE as TARGETS


@dataclass(frozen=True)
class Original:
    """A family of LLaVA. It fits a checkpoint with one of these decoders and towers, whose config has one of the values that `says`
    lists for each key (None: it is left out) and every key of `has`, and whose tokenizer has the added token `token`.

    `target` and `prompt` are names of rows in targets.py and prompts.py, `projector` is what its published checkpoints have; `evidence`
    says in a sentence why a checkpoint that fits is taken for this family and no other.
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

    def __repr__(self) -> str:
        return f"Original({self.name!r})"

    def fits(self, config: Mapping[str, Any], *, decoder: str, tower: str | None, newline: bool | None) -> bool:
        """Whether config, decoder, tower and `image_newline` are those of this family. `tower` and `newline`: None where not known."""
        if decoder not in self.decoders or (tower is not None and tower not in self.towers):
            return False
        if TARGETS[self.target].tiles and newline is False:
            return False
        return all(config.get(key) in values for key, values in self.says.items()) and all(config.get(key) for key in self.has)


ANY_DECODER = ("llama", "qwen2")  # a Mistral has rows of its own
WHOLE_IMAGES = {"image_aspect_ratio": ("pad", "square", None)}
# Images in tiles, joined with an `image_newline` behind each row: LLaVA-NeXT. `anyres_max_N` is LLaVA-OneVision, another model.
TILES = {"image_aspect_ratio": ("anyres",), "mm_patch_merge_type": ("spatial_unpad",)}
SIGLIP_IMAGES = {"image_aspect_ratio": ("pad", "square", "anyres", None)}  # LLaVA-NeXT-Interleave says `anyres`, but takes whole images
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
    """The rows of a family whose images come in tiles or whole, and whose tower is a CLIP or a SigLIP."""
    for title, tower, target, images in (
        (f"{name}, images in tiles", "clip", "llava_next", TILES),
        (name, "clip", "llava", WHOLE_IMAGES),
        (f"{name}, SigLIP", "siglip", "llava", SIGLIP_IMAGES),
    ):
        yield Original(title, decoders, (tower,), target, prompt, evidence, token, {**(says or {}), **images}, has, projector)


# Tried in order, the first that fits wins: the more a row asks for, the earlier it stands.
ORIGINALS: tuple[Original, ...] = (
    *_family("LLaVA on Qwen", ("qwen2",), "qwen", f"the text model is a Qwen and `{CHATML}` one of its tokens", token=CHATML),
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
    rows: Sequence[Original] | None = None,
) -> Iterator[Original]:
    """The families that config, decoder and tower fit, the more certain ones first; `of_tokens` then chooses among them."""
    return (row for row in (ORIGINALS if rows is None else rows) if row.fits(config, decoder=decoder, tower=tower, newline=newline))


def of_tokens(rows: Sequence[Original], specials: Collection[str]) -> Original | None:
    """The first of `rows` whose token is among the texts of the added tokens, or that asks for none."""
    return next((row for row in rows if not row.token or row.token in specials), None)
