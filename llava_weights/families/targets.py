"""Classes of transformers that hold a LLaVA: what their configs and processors are called, and which images they take.

Sources: the classes of transformers 4.36 to 5.23 and the checkpoints of llava-hf on the Hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A class that holds a LLaVA. With `tiles`, images are cut into tiles, whose grids `image_grid_pinpoints` lists as (height, width)
    in pixels, with the tensor `image_newline` behind each row; else an image is one square, and no newline is read.

    `image_processor` is for tiles; without tiles it is the tower's, or `padding_processor` where images are padded to squares.
    """

    model_type: str
    architecture: str
    config_class: str
    processor: str
    tiles: bool
    image_processor: str | None = None
    padding_processor: str = "LlavaImageProcessor"
    runs: bool = True  # whether `smoke` can compute with it

    def __repr__(self) -> str:
        return f"Target({self.model_type!r})"


TARGETS = (
    Target(
        model_type="llava",
        architecture="LlavaForConditionalGeneration",
        config_class="LlavaConfig",
        processor="LlavaProcessor",
        tiles=False,
    ),
    Target(
        model_type="llava_next",
        architecture="LlavaNextForConditionalGeneration",
        config_class="LlavaNextConfig",
        processor="LlavaNextProcessor",
        tiles=True,
        image_processor="LlavaNextImageProcessor",
    ),
)
TARGET_BY_TYPE = {row.model_type: row for row in TARGETS}

# `mm_vision_select_feature` of the original -> `vision_feature_select_strategy`: without the class token, or with it.
STRATEGIES = {"patch": "default", "cls_patch": "full"}
# What LlavaConfig and LlavaNextConfig assume for a key that is left out.
TARGET_DEFAULTS: dict[str, Any] = {
    "ignore_index": -100, "image_token_index": 32000, "projector_hidden_act": "gelu", "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "image_seq_length": 576, "multimodal_projector_bias": True,
    "tie_word_embeddings": False, "image_grid_pinpoints": None, "use_image_newline_parameter": True,
}  # fmt: skip
# The parts of a nested config that describe other models, and their `model_type` where they do not say.
DEFAULT_PARTS = {"text_config": "llama", "vision_config": "clip_vision_model"}
# A vocabulary that gets new tokens grows by two rows and is rounded up to a multiple of this, as in transformers' converters.
VOCABULARY_MULTIPLE = 64
