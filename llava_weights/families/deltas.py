"""The published deltas."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownDelta:
    """A published delta: its shapes and token ids, the base that it is added to, the prompt of the merged model."""

    repo: str
    base: str
    size: str
    rows: int
    image_patch: int  # id of <im_patch>, -1 where the repository lists no added tokens
    model_type: str
    prompt: str


# haotian-liu/LLaVA README and the Hub pages; every one was made against the original LLaMA-1 in fp16 (LLaVA #27, #51, #111).
KNOWN_DELTAS = (
    KnownDelta("liuhaotian/LLaVA-13b-delta-v0", "LLaMA-13B", "13B", 32003, 32000, "llama", "v0"),
    KnownDelta("liuhaotian/LLaVA-13b-delta-v0-science_qa", "LLaMA-13B", "13B", 32000, -1, "llama", "v0"),
    KnownDelta("liuhaotian/LLaVA-7b-delta-v0", "LLaMA-7B", "7B", 32004, 32001, "llama", "v0"),
    KnownDelta("liuhaotian/LLaVA-13b-delta-v1-1", "LLaMA-13B", "13B", 32003, 32000, "llava", "v1"),
    KnownDelta("liuhaotian/LLaVA-Lightning-7B-delta-v1-1", "LLaMA-7B", "7B", 32003, 32000, "llava", "v1"),
    KnownDelta("microsoft/llava-med-7b-delta", "LLaMA-7B", "7B", 32004, 32001, "llava", "v0"),
    KnownDelta("SALT-NLP/LLaVAR_delta", "LLaMA-13B", "13B", 32003, 32000, "llava", "v1"),
)


def known_delta(size: str, rows: int, image_patch: int, model_type: str) -> KnownDelta | None:
    """The published delta with these shapes and token ids; the first of several that can't be told apart."""
    wanted = (size, rows, image_patch, model_type)
    return next((k for k in KNOWN_DELTAS if (k.size, k.rows, k.image_patch, k.model_type) == wanted), None)
