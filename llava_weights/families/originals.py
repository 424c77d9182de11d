"""The published families of LLaVA in its own layout: how each is recognised, and which decoder, tower, target and prompt it has.

Sources: the README, `llava/conversation.py` and the config.json of each release of haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .targets import BY_TYPE as TARGETS


@dataclass(frozen=True)
class Original:
    """A family of LLaVA. It fits a checkpoint whose decoder and tower are of these rows, whose config says what `says` asks for (a pattern
    of the whole value for each key; a key that is left out counts as an empty text) and whose tokenizer has the added token `token`.

    `target` is the row of the class of transformers that holds it, `prompt` that of its conversation; `evidence` says in a sentence why a
    checkpoint that fits is taken for this family and no other.
    """

    name: str
    decoders: tuple[str, ...]
    towers: tuple[str, ...]
    target: str
    prompt: str
    evidence: str
    token: str = ""
    says: Mapping[str, str] = field(default_factory=dict)

    def fits(self, config: Mapping[str, Any], *, decoder: str, tower: str | None, newline: bool | None) -> bool:
        """Whether config, rows and `image_newline` are those of this family. `tower` and `newline` are None where they are not known."""
        if decoder not in self.decoders or (tower is not None and tower not in self.towers):
            return False
        if TARGETS[self.target].tiles and newline is False:
            return False
        return all(re.fullmatch(pattern, _text(config.get(key))) for key, pattern in self.says.items())


def _text(value: Any) -> str:
    return "" if value is None else str(value)


ANY = ("llama", "mistral", "qwen2")
BOTH = ("clip", "siglip")
# Images in tiles, joined with an `image_newline` behind each row: LLaVA-NeXT. `anyres_max_N` is LLaVA-OneVision, another model.
TILES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
CHATML, LLAMA_3 = "<|im_start|>", "<|start_header_id|>"
QWEN = f"the text model is a Qwen and `{CHATML}` one of its tokens"
NO_QWEN = f"`{CHATML}` is one of its tokens and the text model is not a Qwen"
MISTRAL = "the text model is a Mistral"
LLAMA = f"`{LLAMA_3}` is one of its tokens"
LAYERS = {"mm_projector_type": "mlp2x_gelu"}
MARKED = {"mm_projector_type": "(linear)?", "mm_use_im_start_end": "True"}


def _family(
    name: str, decoders: tuple[str, ...], prompt: str, evidence: str, *, token: str = "", says: Mapping[str, str] | None = None
) -> tuple[Original, Original, Original]:
    """The rows of a family that is known with images in tiles, and with whole ones for either tower."""
    told = says or {}
    return (
        Original(f"{name}, images in tiles", decoders, ("clip",), "llava_next", prompt, evidence, token, {**told, **TILES}),
        Original(name, decoders, ("clip",), "llava", prompt, evidence, token, {**told, "image_aspect_ratio": "(?!anyres).*"}),
        # SigLIP has no class token; LLaVA-NeXT-Interleave says `anyres`, but takes whole images.
        Original(
            f"{name}, SigLIP", decoders, ("siglip",), "llava", prompt, evidence, token, {**told, "image_aspect_ratio": "(?!anyres_).*"}
        ),
    )


# Tried in order, the first that fits wins: the more a row asks for, the earlier it stands.
ORIGINALS: tuple[Original, ...] = (
    *_family("LLaVA on Qwen", ("qwen2",), "qwen", QWEN, token=CHATML),
    *_family("LLaVA v1.6 34B", ("llama", "mistral"), "chatml_direct", NO_QWEN, token=CHATML),
    *_family("LLaVA on Mistral", ("mistral",), "mistral_instruct", MISTRAL),
    *_family("LLaVA on Llama 3", ANY, "llama_3", LLAMA, token=LLAMA_3),
    *_family(
        "LLaVA v0",
        ANY,
        "llava_v0",
        "`max_sequence_length` in config.json, a key of the v0 releases alone",
        says={"max_sequence_length": ".+"},
    ),
    *_family(
        "LLaVA v1",
        ANY,
        "llava_v1",
        "its projector is linear and its images stand between `<im_start>` and `<im_end>`",
        says=MARKED,
    ),
    *_family("LLaVA v1.5 and later", ANY, "vicuna_v1", "its projector is `mlp2x_gelu`, which came with v1.5", says=LAYERS),
    Original(
        "LLaVA v1.6",
        ANY,
        ("clip",),
        "llava_next",
        "vicuna_v1",
        "its images are cut into tiles (`anyres`), which came with v1.6",
        says=TILES,
    ),
    Original(
        "LLaVA v1.6, SigLIP",
        ANY,
        ("siglip",),
        "llava",
        "vicuna_v1",
        "its images are cut into tiles (`anyres`), which came with v1.6",
        says={"image_aspect_ratio": "anyres"},
    ),
    Original(
        "LLaVA v1 or v1.1",
        ANY,
        BOTH,
        "llava",
        "llava_v1",
        "nothing in config.json or the tokens speaks for another one",
        says={"image_aspect_ratio": "(?!anyres).*"},
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
    """The families that config and rows fit, the more certain ones first; which one it is, its tokens then tell."""
    return (row for row in (ORIGINALS if rows is None else rows) if row.fits(config, decoder=decoder, tower=tower, newline=newline))


def of_tokens(rows: Sequence[Original], specials: Collection[str]) -> Original | None:
    """The first of `rows` whose token is among the texts of the added tokens, or that asks for none."""
    return next((row for row in rows if not row.token or row.token in specials), None)
