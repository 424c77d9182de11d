"""Which files make a checkpoint, by name. Everything else in a folder stays behind."""

from __future__ import annotations

from typing import Literal

# Small files that travel with the weights.
CONFIG_FILES = ("config.json", "generation_config.json")
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja", "video_preprocessor_config.json",
)  # fmt: skip
SMALL_FILES = (*CONFIG_FILES, ADAPTER_CONFIG, *TOKENIZER_FILES, *PROCESSOR_FILES)
# In the card of an output: its tags, and the pipeline_tag of one with a projector.
CARD_TAGS = ("llava", "llava-weights")
IMAGE_TASK = "image-text-to-text"
LICENSE_PREFIXES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "NOTICE")  # what a place without a listing is asked for

# Weight files by container, and what training leaves beside or instead of a model.
Container = Literal["safetensors", "torch", "meta", "gguf"]
STANDARD: dict[Container, tuple[str, str]] = {"safetensors": ("model", ".safetensors"), "torch": ("pytorch_model", ".bin")}  # stem, suffix
SINGLE_FILES = tuple(stem + suffix for stem, suffix in STANDARD.values())
INDEXES = tuple(f"{name}.index.json" for name in SINGLE_FILES)
# A whole training state, as transformers, `zero_to_fp32.py` and accelerate's FSDP write it.
STATES = (*INDEXES, *SINGLE_FILES, "pytorch_model_fsdp.bin")
WEIGHT_SUFFIXES: dict[str, Container] = {".safetensors": "safetensors", ".bin": "torch", ".pth": "torch", ".pt": "torch"}
GGUF_SUFFIX = ".gguf"  # llama.cpp's files, which are looked at and never converted
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED_BESIDE = "non_lora_trainables.bin"  # what LLaVA's training saves beside an adapter
TRAINED_FILES = (TRAINED_BESIDE, "non_lora_state_dict.bin")  # the second is what trainers of other models took over from LLaVA's
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
# Rows of added tokens, which vLLM and mergekit keep beside an adapter, to be put behind the base's.
NEW_ROWS = ("new_embeddings.safetensors", "new_embeddings.bin")
MLX_FILES = ("adapters.safetensors", "adapters.npz")  # an adapter of mlx-lm or mlx-vlm
MLX_STEPS = r"\d+_adapters\.safetensors"  # the same adapter at earlier steps
BESIDE_ADAPTER = (*TRAINED_FILES, *PROJECTOR_FILES, *NEW_ROWS)
SIDE_FILES = (*ADAPTER_FILES, *PROJECTOR_FILES, *TRAINED_FILES, *NEW_ROWS)
# What a Trainer leaves of its own state: no part of a model, though some have the suffix of weights.
TRAINER_STATE = r"(optimizer|scheduler|scaler|sampler|rng_state.*|random_states.*|training_args|.*_optim_states)\.(pt|pth|bin|pkl)"
META_PARAMS, META_FILE, META_MOST = "params.json", r"consolidated\.\d+\.pth", 8  # Meta's own layout: files of one model at most
META_FILES = tuple(f"consolidated.{number:02}.pth" for number in range(META_MOST))

# Of a repository, the first line whose first pattern matches a file is downloaded: no weights in two formats, no projector beside a model.
DOWNLOADS = (
    *((name, *BESIDE_ADAPTER) for name in ADAPTER_FILES),
    ("model.safetensors",),
    ("model-*-of-*.safetensors", "model.safetensors.index.json"),
    ("*.safetensors", "*.safetensors.index.json"),
    ("pytorch_model.bin",),
    ("pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
    ("consolidated.*.pth", META_PARAMS),
    *((name,) for name in PROJECTOR_FILES),
)
