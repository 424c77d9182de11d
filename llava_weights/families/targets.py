"""Classes of transformers that hold a LLaVA: what their configs and processors are called, and which images they take.

Sources: the classes of transformers 4.36 to 5.24 and the checkpoints of llava-hf on the Hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What LlavaConfig and LlavaNextConfig assume for a key that is left out.
TARGET_DEFAULTS: dict[str, Any] = {
    "ignore_index": -100, "image_token_index": 32000, "projector_hidden_act": "gelu", "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "image_seq_length": 576, "multimodal_projector_bias": True,
    "tie_word_embeddings": False, "image_grid_pinpoints": None, "use_image_newline_parameter": True,
}  # fmt: skip
ANYRES_MAX = r"anyres_max_([1-9]\d{0,3})"  # `image_aspect_ratio` of LLaVA-OneVision: no more features than so many tiles have
DEFAULT_RATIO = "anyres_max_9"  # what LlavaOnevisionConfig and LlavaOnevisionProcessor assume
VIP_LAYERS = (-2, -5, -8, -11, 6)
NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass(frozen=True)
class Video:
    """How a class takes videos: the token that stands for one in a prompt, `first`: whether its id comes before that of an image, and the
    class that makes pixels of it. The patches of each frame are pooled, `stride` along each edge; `pooled_first`: before the projector;
    `newline`: whether the tensor `image_newline` ends it. `features`: how many the config counts, by the `patches` of an image.

    `tower`: frames go through a tower of their own, which has the config of that for images, and nothing is pooled. `lost` is a pattern of
    the canonical names of those tensors that an original's tower has and the class has no place for, `lost_names` what people read of it,
    and `loss` what a conversion without them means: one is made only where the user asks for it.
    """

    token: str
    first: bool
    processor: str
    pooled_first: bool = False
    newline: bool = False
    stride: int = 2
    tower: bool = False
    lost: str = ""
    lost_names: str = ""
    loss: str = ""
    features: str = ""


@dataclass(frozen=True)
class Target:
    """A class that holds a LLaVA. `tiles`: images are cut into tiles, whose grids `image_grid_pinpoints` lists as (height, width) in
    pixels, with the tensor `image_newline` behind each row; else an image is one square, and nothing reads a newline. `capped`: a picture
    of more tiles than `vision_aspect_ratio` says (`ANYRES_MAX`) is shrunk to their features.

    `image_processor` is the one for its images, where it has its own; else it is the tower's, or `padding_processor` where images are
    padded to squares.
    `words`: what keys of the original are called in its config, where they are kept for the way back at the least, and what they are
    there if nobody says.
    """

    model_type: str
    architecture: str
    config_class: str
    processor: str
    tiles: bool
    since: str  # the first version of transformers that has it
    image_processor: str | None = None
    padding_processor: str = "LlavaImageProcessor"  # "" where its processor takes no padded ones
    tested: str = "5.24.0"  # the newest version of transformers with which `make peer` ran it
    runs: bool = True  # whether `smoke` can compute with it
    video: Video | None = None
    capped: bool = False
    counts: bool = False  # whether its processor is told how many features an image has, in place of the size of a patch
    crops: bool = True  # whether its image processor crops tiles, else it squeezes an image into one
    new_rows: int = 2  # how many more the vocabulary gets where there are new tokens, before it is rounded up
    pads: bool = True  # whether it gets them also where there are rows enough
    layernorm: bool = False  # whether its projector begins with one
    layers: tuple[int, ...] = ()  # hidden states of the tower that an original has one behind the other, where its code leaves no choice
    spelling: str = "llava"  # whose names an original of it has, of `layouts.SPELLINGS`
    hub_spelling: str = "llava-hf"  # and those of its own layout
    part: str = "vision_tower"  # what its own names and configs call the tower for images
    tower_key: str = "mm_vision_tower"  # the key by which an original's config names that tower
    lacks: tuple[str, ...] = ()  # keys of `TARGET_DEFAULTS` that its config does not have
    words: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)  # keys with the only value that its processor can work with
    pinpoints: tuple[tuple[int, int], ...] = ()  # that it and its image processor assume
    defaults: Mapping[str, Any] = field(default_factory=lambda: TARGET_DEFAULTS)  # what its config assumes for keys that are left out

    @property
    def two_towers(self) -> bool:
        """Whether frames of videos have a tower of their own."""
        return self.video is not None and self.video.tower

    @property
    def tokens(self) -> Mapping[str, str]:
        """The texts that stand for something else than text beside an image, by the key of the config that names their ids."""
        return {"video_token_index": self.video.token} if self.video else {}

    def __repr__(self) -> str:
        return f"Target({self.model_type!r})"


TARGETS = (
    Target(
        model_type="llava",
        architecture="LlavaForConditionalGeneration",
        config_class="LlavaConfig",
        processor="LlavaProcessor",
        tiles=False,
        since="4.36",
    ),
    Target(
        model_type="llava_next",
        architecture="LlavaNextForConditionalGeneration",
        config_class="LlavaNextConfig",
        processor="LlavaNextProcessor",
        tiles=True,
        since="4.39",
        image_processor="LlavaNextImageProcessor",
        pinpoints=NEXT_PINPOINTS,
        pads=False,
        words={key: (key, None) for key in ("mm_spatial_pool_mode", "mm_spatial_pool_stride")},  # of videos, which it does not take
    ),
    # convert_llava_onevision_weights_to_hf.py of 4.47.1, and the class's own config.
    Target(
        model_type="llava_onevision",
        architecture="LlavaOnevisionForConditionalGeneration",
        config_class="LlavaOnevisionConfig",
        processor="LlavaOnevisionProcessor",
        tiles=True,
        since="4.45",
        image_processor="LlavaOnevisionImageProcessor",
        pinpoints=tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)),
        video=Video("<video>", first=False, processor="LlavaOnevisionVideoProcessor", newline=True),
        capped=True,
        counts=True,
        crops=False,
        lacks=("ignore_index", "image_seq_length"),
        words={
            "mm_newline_position": ("mm_newline_position", "one_token"), "mm_spatial_pool_mode": ("mm_spatial_pool_mode", "bilinear"),
            "mm_spatial_pool_stride": ("mm_spatial_pool_stride", None),
        },
        defaults={
            **TARGET_DEFAULTS, "image_token_index": 151646, "video_token_index": 151647, "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full", "vision_aspect_ratio": DEFAULT_RATIO,
        },
    ),
    # convert_llava_next_video_weights_to_hf.py of 4.47.1. The original's demo pools each frame by 2 whatever its config says, and
    # LlavaNextVideoProcessor counts a quarter of its patches.
    Target(
        model_type="llava_next_video",
        architecture="LlavaNextVideoForConditionalGeneration",
        config_class="LlavaNextVideoConfig",
        processor="LlavaNextVideoProcessor",
        tiles=True,
        since="4.42",
        image_processor="LlavaNextImageProcessor",
        pinpoints=NEXT_PINPOINTS,
        video=Video("<video>", first=True, processor="LlavaNextVideoVideoProcessor", pooled_first=True, features="patches // 2"),
        new_rows=3,
        lacks=("ignore_index",),
        words={
            "mm_spatial_pool_mode": ("spatial_pool_mode", "average"), "mm_spatial_pool_stride": ("mm_spatial_pool_stride", 2),
            "mm_spatial_pool_out_channels": ("mm_spatial_pool_out_channels", None),
            "mm_resampler_type": ("mm_resampler_type", "spatial_pool"),
        },
        fixed={"spatial_pool_stride": 2},
        defaults={
            **TARGET_DEFAULTS, "image_token_index": 32001, "video_token_index": 32000, "spatial_pool_mode": "average",
            "spatial_pool_stride": 2,
            "video_seq_length": 288,
        },
    ),
    # convert_vipllava_weights_to_hf.py of 4.47.1. Configs name their tower by what the original's code does with openai's ViT-L-336.
    Target(
        model_type="vipllava",
        architecture="VipLlavaForConditionalGeneration",
        config_class="VipLlavaConfig",
        processor="LlavaProcessor",
        tiles=False,
        since="4.37",
        layernorm=True,
        layers=VIP_LAYERS,
        spelling="vip-llava",
        lacks=("vision_feature_select_strategy", "multimodal_projector_bias"),
        words={"mm_vision_tower": ("mm_vision_tower", "clip_4layers_336")},
        defaults={**TARGET_DEFAULTS, "vision_feature_layer": list(VIP_LAYERS), "projector_layernorm_eps": 1e-5},
    ),
    # convert_video_llava_weights_to_hf.py of 4.47.1, which loads with `strict=False`, and modeling_video_llava.py: one `vision_config` for
    # both towers, of which that for videos counts the class token of each of eight frames. VideoLlavaImageProcessor can't pad.
    Target(
        model_type="video_llava",
        architecture="VideoLlavaForConditionalGeneration",
        config_class="VideoLlavaConfig",
        processor="VideoLlavaProcessor",
        tiles=False,
        since="4.41",
        image_processor="VideoLlavaImageProcessor",
        padding_processor="",
        video=Video(
            "<video>",
            first=False,
            processor="VideoLlavaVideoProcessor",
            tower=True,
            lost=r"video_tower\.encoder\.layers\.\d+\.temporal_.+",
            lost_names="model.video_tower.video_tower.encoder.layers.*.temporal_*",
            loss="images are exact, but the frames of a video no longer attend to each other as in training: answers on videos differ",
            features="8 * (patches + 1)",
        ),
        new_rows=3,
        spelling="two-towers",
        hub_spelling="two-towers-hf",
        part="image_tower",
        tower_key="mm_image_tower",
        lacks=("ignore_index",),
        defaults={**TARGET_DEFAULTS, "video_token_index": 32001, "image_seq_length": 256, "video_seq_length": 2056},
    ),
)  # fmt: skip
TARGET_BY_TYPE = {row.model_type: row for row in TARGETS}
TOWER_KEYS = tuple(dict.fromkeys(row.tower_key for row in TARGETS))  # by which originals name their tower, and are known as LLaVAs

# `mm_vision_select_feature` of the original -> `vision_feature_select_strategy`: without the class token, or with it.
STRATEGIES = {"patch": "default", "cls_patch": "full"}
# The parts of a nested config that describe other models, and what class they are where they do not say.
DEFAULT_PARTS = {"text_config": "llama", "vision_config": "clip_vision_model"}
# The vocabulary of a target with new tokens gets `new_rows` more and is rounded up to this (transformers' converters, for speed).
VOCABULARY_MULTIPLE = 64
