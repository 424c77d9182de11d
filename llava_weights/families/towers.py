"""Vision towers: their tensors, the keys of their configs with each class's defaults, how images are made for them, published ones.

Sources: `modeling_clip.py` and `modeling_siglip.py` of transformers 4.28 to 5.23, and the repositories of the published towers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .shapes import Parameter

PATCH, POSITION, CLASS = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight", "embeddings.class_embedding"
FEED_FORWARD = "mlp.fc1.weight"


@dataclass(frozen=True)
class Pixels:
    """Mean and standard deviation of the pixels, from 0 to 1, that towers were trained with: all of a kind, or those with `activation`."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    activation: str = ""


@dataclass(frozen=True)
class Tower:
    """A kind of vision tower. `repository_types` are what `model_type` says in a repository that holds one.

    `layer` are the tensors of each layer, by the name behind `encoder.layers.N.`. `select` is which hidden state of the whole published
    tower LLaVA's code takes, from its end, and the strategy of a llava-hf config that goes with it, where that code leaves no choice; else
    the original's config says both.
    """

    kind: str
    title: str
    model_type: str
    config_class: str
    model_class: str
    repository_types: tuple[str, ...]
    before: tuple[Parameter, ...]
    layer: tuple[Parameter, ...]
    after: tuple[Parameter, ...]
    defaults: Mapping[str, int | float | str | bool]
    class_token: bool
    pixels: tuple[Pixels, ...]  # the usual one first
    image_processor: str
    resample: int | None  # PIL's number of the filter that every published one uses, None: any filter
    crops: bool  # whether an image is resized by its shorter side and cropped to a square; else it is squeezed into one
    select: tuple[int, str] | None = None
    original_layer: int | None = None  # `mm_vision_select_layer` in the original layout, None: as the llava-hf config says
    runs: bool = True  # whether `smoke` can compute with it

    def __repr__(self) -> str:
        return f"Tower({self.kind!r})"


HIDDEN = "hidden_size"
PROJECTIONS = ("k_proj", "v_proj", "q_proj", "out_proj")
TOWER_LAYER = (
    *(Parameter(f"self_attn.{name}.weight", (HIDDEN, HIDDEN)) for name in PROJECTIONS),
    *(Parameter(f"self_attn.{name}.bias", (HIDDEN,)) for name in PROJECTIONS),
    *(Parameter(f"layer_norm{number}.{part}", (HIDDEN,)) for number in (1, 2) for part in ("weight", "bias")),
    Parameter(FEED_FORWARD, ("intermediate_size", HIDDEN)),
    Parameter("mlp.fc1.bias", ("intermediate_size",)),
    Parameter("mlp.fc2.weight", (HIDDEN, "intermediate_size")),
    Parameter("mlp.fc2.bias", (HIDDEN,)),
)
PATCHES = Parameter(PATCH, (HIDDEN, "num_channels", "patch_size", "patch_size"))
TOWER_AFTER = tuple(Parameter(f"post_layernorm.{part}", (HIDDEN,)) for part in ("weight", "bias"))
HALF = (0.5, 0.5, 0.5)

# The defaults are those of CLIPVisionConfig of 4.28 and SiglipVisionConfig of 4.37 (its first), unchanged up to 5.23.
TOWERS = (
    Tower(
        kind="clip",
        title="CLIP",
        model_type="clip_vision_model",
        config_class="CLIPVisionConfig",
        model_class="CLIPVisionModel",
        repository_types=("clip", "clip_vision_model", "LanguageBindImage"),
        before=(
            Parameter(CLASS, (HIDDEN,)),
            PATCHES,
            Parameter(POSITION, ("(image_size // patch_size) * (image_size // patch_size) + 1", HIDDEN)),
            *(Parameter(f"pre_layrnorm.{part}", (HIDDEN,)) for part in ("weight", "bias")),  # spelled so in transformers
        ),
        layer=TOWER_LAYER,
        after=TOWER_AFTER,
        defaults={
            "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512, "num_hidden_layers": 12, "num_attention_heads": 12,
            "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
            "attention_dropout": 0.0, "initializer_range": 0.02, "initializer_factor": 1.0,
        },
        class_token=True,
        # preprocessor_config.json of the published towers. Of LAION's (gelu), ViT-L-14 laion2B-s32B-b82K has 0.5 (open_clip,
        # INCEPTION_MEAN).
        pixels=(
            Pixels((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
            Pixels(HALF, HALF, "gelu"),
        ),
        image_processor="CLIPImageProcessor",
        resample=3,
        crops=True,
    ),
    # `vision_use_head` is our own False: a LLaVA never uses SigLIP's pooling head, and its tensors are left out. LLaVA-NeXT's encoder
    # deletes the last layer and takes the last state, Bunny's and nanoLLaVA's take the last state but one: the same state of the published
    # tower. It is all patches, since SigLIP has no class token.
    Tower(
        kind="siglip",
        title="SigLIP",
        model_type="siglip_vision_model",
        config_class="SiglipVisionConfig",
        model_class="SiglipVisionModel",
        repository_types=("siglip", "siglip_vision_model"),
        before=(
            PATCHES,
            Parameter("embeddings.patch_embedding.bias", (HIDDEN,)),
            Parameter(POSITION, ("(image_size // patch_size) * (image_size // patch_size)", HIDDEN)),
        ),
        layer=TOWER_LAYER,
        after=TOWER_AFTER,
        defaults={
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "num_channels": 3, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
            "attention_dropout": 0.0, "vision_use_head": False,
        },
        class_token=False,
        pixels=(Pixels(HALF, HALF),),
        image_processor="SiglipImageProcessor",
        resample=None,
        crops=False,
        select=(-2, "full"),
        original_layer=-2,
    ),
)  # fmt: skip
TOWER_BY_TYPE = {row.model_type: row for row in TOWERS}
TOWER_BY_KIND = {row.kind: row for row in TOWERS}
TOWER_BY_REPOSITORY = {name: row for row in TOWERS for name in row.repository_types}
# What else lies in such a repository: the text half, the way into the shared space, and SigLIP's pooling head.
BESIDE_TOWER = r"text_model\..*|(visual|text)_projection\..*|logit_(scale|bias)|(vision_model\.)?head\..*"
TOWER_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")  # of ACT2FN
# Where each size is read: tensor and axis.
MEASURES = {
    "hidden_size": (PATCH, 0), "num_channels": (PATCH, 1), "patch_size": (PATCH, 2),
    "intermediate_size": (f"encoder.layers.0.{FEED_FORWARD}", 0),
}  # fmt: skip
RANKS = {PATCH: 4, POSITION: 2, f"encoder.layers.0.{FEED_FORWARD}": 2}
# Towers that LLaVA's code names by their Hub id: kind, width, image size in pixels.
HUB_TOWERS = {
    ("clip", 1024, 224): "openai/clip-vit-large-patch14",
    ("clip", 1024, 336): "openai/clip-vit-large-patch14-336",
    ("siglip", 1152, 384): "google/siglip-so400m-patch14-384",
}
# Names in configs that are none of a repository: the code of ViP-LLaVA (clip_4layer_encoder.py) knows which it loads for them.
TOWER_NAMES = {"clip_4layers_336": "openai/clip-vit-large-patch14-336"}


@dataclass(frozen=True)
class KnownTower:
    """A published vision tower: the sizes that its tensors show, and those that only its config has. `image`, `patch`: sides in pixels.
    `with_videos`: that of the published LLaVAs with another tower for videos."""

    repo: str
    model_type: str
    hidden: int
    intermediate: int
    heads: int
    projection: int
    activation: str
    patch: int
    image: int
    layers: int
    with_videos: bool = False


# The config.json of each repository on the Hub. The first with the right widths wins, unless the checkpoint's config names another
# publisher. OpenAI trained with quick_gelu, LAION with gelu (transformers PR #25787), in the same shapes. SigLIP so400m reads
# 27 x 27 patches of 14 out of 384 pixels.
KNOWN_TOWERS = (
    KnownTower("openai/clip-vit-base-patch32", "clip_vision_model", 768, 3072, 12, 512, "quick_gelu", 32, 224, 12),
    KnownTower("openai/clip-vit-base-patch16", "clip_vision_model", 768, 3072, 12, 512, "quick_gelu", 16, 224, 12),
    KnownTower("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "clip_vision_model", 768, 3072, 12, 512, "gelu", 32, 224, 12),
    KnownTower("openai/clip-vit-large-patch14", "clip_vision_model", 1024, 4096, 16, 768, "quick_gelu", 14, 224, 24),
    KnownTower("openai/clip-vit-large-patch14-336", "clip_vision_model", 1024, 4096, 16, 768, "quick_gelu", 14, 336, 24),
    KnownTower("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "clip_vision_model", 1024, 4096, 16, 768, "gelu", 14, 224, 24),
    KnownTower("LanguageBind/LanguageBind_Image", "clip_vision_model", 1024, 4096, 16, 768, "gelu", 14, 224, 24, with_videos=True),
    KnownTower("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "clip_vision_model", 1280, 5120, 16, 1024, "gelu", 14, 224, 32),
    KnownTower("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "clip_vision_model", 1664, 8192, 16, 1280, "gelu", 14, 224, 48),
    KnownTower("google/siglip-base-patch16-224", "siglip_vision_model", 768, 3072, 12, 0, "gelu_pytorch_tanh", 16, 224, 12),
    KnownTower("google/siglip-large-patch16-256", "siglip_vision_model", 1024, 4096, 16, 0, "gelu_pytorch_tanh", 16, 256, 24),
    KnownTower("google/siglip-large-patch16-384", "siglip_vision_model", 1024, 4096, 16, 0, "gelu_pytorch_tanh", 16, 384, 24),
    KnownTower("google/siglip-so400m-patch14-384", "siglip_vision_model", 1152, 4304, 16, 0, "gelu_pytorch_tanh", 14, 384, 27),
    KnownTower("google/siglip-so400m-patch14-224", "siglip_vision_model", 1152, 4304, 16, 0, "gelu_pytorch_tanh", 14, 224, 27),
)
