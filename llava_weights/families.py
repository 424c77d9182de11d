"""What is known about the checkpoints of this world, as tables. Code elsewhere holds the mechanism, never a model's name.

Sources: haotian-liu/LLaVA at 8959d5c, 74f8877 and c121f04, transformers 4.28-5.23, the Hub pages of the published files.
"""

from __future__ import annotations

from dataclasses import dataclass

# Buffers that transformers <= 4.31 stored with the weights; never parameters, dropped on output.
DROPPED = r".*\.rotary_emb\.inv_freq|.*\.embeddings\.position_ids"
# What LLaVA adds to a LLaMA. These exist in no base, so a delta holds them whole.
MULTIMODAL = r"model\.mm_projector\..*|model\.image_newline|model\.vision_tower\..*"
PROJECTOR = r"model\.mm_projector\..*"
# The only tensors that may have more rows in a delta than in its base (LLaVA `apply_delta`: "dimension mismatch" otherwise).
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
# Tables by any layout's name of which rows may be zero, since no training touched them: tokens and positions that were never seen.
TABLE_ROWS = (
    r"output\.weight|(?:.*\.)?(?:embed_tokens|tok_embeddings|word_embeddings|token_embedding|wte|wpe|lm_head|embed_out"
    r"|position_embeddings?|pos_embed)(?:\.weight)?"
)


@dataclass(frozen=True)
class Layout:
    """A way of naming tensors. It fits where every pattern of `needs` matches some name and none of `lacks` matches any."""

    name: str
    title: str
    needs: tuple[str, ...]
    lacks: tuple[str, ...] = ()


# Tried in order, the first that fits wins.
LAYOUTS = (
    Layout("adapter", "LoRA adapter", (r".*\.lora_(A|B|embedding_A|embedding_B)\b.*",)),
    Layout("loha", "PEFT adapter that is not a LoRA", (r"base_model\..*\.(hada_|lokr_|vera_|ia3_|oft_|boft_).*",)),
    Layout("mpt", "LLaVA-MPT", (r"transformer\.blocks\..*",)),
    Layout("llava-hf", "LLaVA in the llava-hf layout", (r"(model\.)?language_model\..*", r"(model\.)?multi_modal_projector\..*")),
    Layout("llava", "LLaVA in the original layout", (r"model\.layers\.\d+\.self_attn\.q_proj\.weight", PROJECTOR)),
    Layout("llama", "LLaMA", (r"model\.layers\.\d+\.self_attn\.q_proj\.weight",)),
    Layout("projector", "LLaVA projector only", (r"(base_model\.model\.)?model\.mm_projector\..*",), (r".*self_attn.*",)),
    Layout("clip", "CLIP", (r"(vision_model\.|vision_tower\.).*",)),
)


@dataclass(frozen=True)
class Size:
    """A published LLaMA shape: hidden size, layers, attention heads, feed-forward width."""

    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int


LLAMA_SIZES = (
    Size("7B", 4096, 32, 32, 11008),
    Size("13B", 5120, 40, 40, 13824),
    Size("30B", 6656, 60, 52, 17920),
    Size("65B", 8192, 80, 64, 22016),
)


@dataclass(frozen=True)
class KnownDelta:
    """A published delta: what its shapes and token ids look like, what it goes on, how the merged model is prompted."""

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

# Small files that travel with the weights, by exact name or prefix; everything else in an input folder stays behind.
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
CONFIG_FILES = ("config.json", "generation_config.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja")
LICENSE_PREFIXES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


LONGEST_LLAMA = 4096  # positions of LLaMA 2; Code Llama has the shapes of LLaMA 2, another rope_theta, and 16,384
# quant_method of transformers whose weights are stored packed, with scales: a `quantization_config` that names one and plain
# weights do not belong together. Others (torchao, quanto, bitnet, compressed-tensors, mxfp4) may quantise while loading.
QUANTIZERS = ("aqlm", "auto-round", "awq", "bitsandbytes", "eetq", "fbgemm_fp8", "fp8", "gptq", "higgs", "hqq", "spqr", "vptq")
# What they store beside or in place of a weight.
QUANTIZED_NAMES = (
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|quant_state[\w.]*|weight_scale(_inv)?|weight_packed|codebooks|codes)$"
)


@dataclass(frozen=True)
class Colours:
    """Mean and standard deviation of the pixels, from 0 to 1, that towers of a kind were trained with; `activation` where only those
    with that one were."""

    kind: str
    values: tuple[tuple[float, float, float], tuple[float, float, float]]
    activation: str = ""


# preprocessor_config.json of the published towers. Of LAION's (gelu), ViT-L-14 laion2B-s32B-b82K has 0.5 (open_clip, INCEPTION_MEAN).
COLOURS = (
    Colours("clip", ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))),
    Colours("siglip", ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
    Colours("clip", ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), "gelu"),
)


def size_name(hidden: int, layers: int) -> str:
    """ "13B" for a published LLaMA shape, else "2 layers of 48"."""
    return next((s.name for s in LLAMA_SIZES if (s.hidden, s.layers) == (hidden, layers)), f"{layers} layers of {hidden}")


def known_delta(size: str, rows: int, image_patch: int, model_type: str) -> KnownDelta | None:
    """The published delta with these shapes and token ids; the first of several that can't be told apart."""
    wanted = (size, rows, image_patch, model_type)
    return next((k for k in KNOWN_DELTAS if (k.size, k.rows, k.image_patch, k.model_type) == wanted), None)


# Towers that LLaVA's code names by their Hub id: kind, width, image size in pixels.
HUB_TOWERS = {
    ("clip", 1024, 224): "openai/clip-vit-large-patch14",
    ("clip", 1024, 336): "openai/clip-vit-large-patch14-336",
    ("siglip", 1152, 384): "google/siglip-so400m-patch14-384",
}


# What transformers assumes where a vision config lacks the key: CLIPVisionConfig of 4.28, SiglipVisionConfig of 4.37 (its first),
# unchanged up to 5.23. `vision_use_head` is our own False: a LLaVA never uses SigLIP's pooling head, and its tensors are left out.
TOWER_DEFAULTS: dict[str, dict[str, int | float | str]] = {
    "clip_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0, "initializer_range": 0.02, "initializer_factor": 1.0,
    },
    "siglip_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_channels": 3, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0, "vision_use_head": False,
    },
}  # fmt: skip
# The `model_type` of a repository that holds a tower -> the tower's own.
TOWER_TYPES = {
    "clip": "clip_vision_model",
    "clip_vision_model": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip_vision_model": "siglip_vision_model",
}
# What else lies in such a repository: the text half, the way into the shared space, and SigLIP's pooling head.
BESIDE_TOWER = r"text_model\..*|(visual|text)_projection\..*|logit_(scale|bias)|(vision_model\.)?head\..*"


@dataclass(frozen=True)
class KnownTower:
    """A published vision tower: what its shapes tell, and what no tensor tells. `image` and `patch` are sides in pixels."""

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
    KnownTower("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "clip_vision_model", 1280, 5120, 16, 1024, "gelu", 14, 224, 32),
    KnownTower("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "clip_vision_model", 1664, 8192, 16, 1280, "gelu", 14, 224, 48),
    KnownTower("google/siglip-base-patch16-224", "siglip_vision_model", 768, 3072, 12, 0, "gelu_pytorch_tanh", 16, 224, 12),
    KnownTower("google/siglip-large-patch16-256", "siglip_vision_model", 1024, 4096, 16, 0, "gelu_pytorch_tanh", 16, 256, 24),
    KnownTower("google/siglip-large-patch16-384", "siglip_vision_model", 1024, 4096, 16, 0, "gelu_pytorch_tanh", 16, 384, 24),
    KnownTower("google/siglip-so400m-patch14-384", "siglip_vision_model", 1152, 4304, 16, 0, "gelu_pytorch_tanh", 14, 384, 27),
    KnownTower("google/siglip-so400m-patch14-224", "siglip_vision_model", 1152, 4304, 16, 0, "gelu_pytorch_tanh", 14, 224, 27),
)
