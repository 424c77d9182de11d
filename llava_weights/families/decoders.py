"""Text models that a LLaVA can stand on: their tensors, the keys of their configs with each class's own defaults, their names.

Sources: the configuration and modelling files of transformers 4.28 to 5.23; for the original layout those of haotian-liu/LLaVA,
LLaVA-VL/LLaVA-NeXT, and of ShareGPT4V, GeoChat, Bunny, nanoLLaVA and HuatuoGPT-Vision, which took over that code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .shapes import Parameter, shapes
from .targets import TARGETS
from .towers import TOWERS

TokenizerKind = Literal["sentencepiece", "byte-level"]


@dataclass(frozen=True)
class Decoder:
    """A text model. `defaults` are what its config class assumes for a key that is left out; None where it computes the value (`computed`).

    LLaVA's own code writes the first of `original_types` and of `original_architectures`. The type `llava` has been used with every
    decoder, so the architecture decides there; without one it is a LLaMA.

    `layer` are the tensors of each layer, by the name behind `model.layers.N.`, in storage order.
    """

    model_type: str
    architecture: str
    config_class: str
    original_types: tuple[str, ...]
    original_architectures: tuple[str, ...]
    layer: tuple[Parameter, ...]
    defaults: Mapping[str, Any]
    tokenizer: TokenizerKind
    runs: bool = True  # whether `smoke` can compute with it
    computed: Mapping[str, str] = field(
        default_factory=lambda: {"num_key_value_heads": "num_attention_heads", "head_dim": "hidden_size // num_attention_heads"}
    )

    def __repr__(self) -> str:
        return f"Decoder({self.model_type!r})"

    @property
    def types(self) -> frozenset[str]:
        """Every `model_type` that a config of this decoder, or of a LLaVA on it, has."""
        return frozenset((self.model_type, *self.original_types))

    @property
    def architectures(self) -> frozenset[str]:
        """Every class that `architectures` names."""
        return frozenset((self.architecture, *self.original_architectures))

    def shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the decoder by name, in storage order; no head where it is tied. `config` has every size."""
        found = shapes(BEFORE_LAYERS, config)
        for number in range(config["num_hidden_layers"]):
            found |= shapes(self.layer, config, before=f"model.layers.{number}.")
        found |= shapes(AFTER_LAYERS, config)
        return found if config.get("tie_word_embeddings") is True else found | shapes(HEAD, config)


BEFORE_LAYERS = (Parameter("model.embed_tokens.weight", ("vocab_size", "hidden_size")),)
AFTER_LAYERS = (Parameter("model.norm.weight", ("hidden_size",)),)
HEAD = (Parameter("lm_head.weight", ("vocab_size", "hidden_size")),)  # not stored where it is tied to the embedding table
LLAMA_LAYER = (
    Parameter("self_attn.q_proj.weight", ("num_attention_heads * head_dim", "hidden_size")),
    Parameter("self_attn.k_proj.weight", ("num_key_value_heads * head_dim", "hidden_size")),
    Parameter("self_attn.v_proj.weight", ("num_key_value_heads * head_dim", "hidden_size")),
    Parameter("self_attn.o_proj.weight", ("hidden_size", "num_attention_heads * head_dim")),
    Parameter("mlp.gate_proj.weight", ("intermediate_size", "hidden_size")),
    Parameter("mlp.up_proj.weight", ("intermediate_size", "hidden_size")),
    Parameter("mlp.down_proj.weight", ("hidden_size", "intermediate_size")),
    Parameter("input_layernorm.weight", ("hidden_size",)),
    Parameter("post_attention_layernorm.weight", ("hidden_size",)),
)


def _biases(*projections: str, when: str = "") -> tuple[Parameter, ...]:
    """Biases of projections of the attention: as many values as their weight has rows."""
    rows = {row.name: row.shape[:1] for row in LLAMA_LAYER}
    return tuple(Parameter(f"self_attn.{name}.bias", rows[f"self_attn.{name}.weight"], when) for name in projections)


# The keys that any reader of a text config asks for; readers differ in what they take where one is left out.
SIZE_KEYS = (
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps",
)  # fmt: skip
DECODER_DEFAULTS = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "rope_scaling": None, "rope_theta": 10000.0,
    "use_cache": True, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip

DECODERS = (
    Decoder(
        model_type="llama",
        architecture="LlamaForCausalLM",
        config_class="LlamaConfig",
        original_types=("llava", "llava_llama", "share4v", "geochat", "bunny-llama"),
        original_architectures=(
            "LlavaLlamaForCausalLM", "LLaMAForCausalLM", "Share4VLlamaForCausalLM", "GeoChatLlamaForCausalLM", "BunnyLlamaForCausalLM",
        ),
        layer=(
            *LLAMA_LAYER, *_biases("q_proj", "k_proj", "v_proj", "o_proj", when="attention_bias"),
            Parameter("mlp.gate_proj.bias", ("intermediate_size",), "mlp_bias"),
            Parameter("mlp.up_proj.bias", ("intermediate_size",), "mlp_bias"),
            Parameter("mlp.down_proj.bias", ("hidden_size",), "mlp_bias"),
        ),
        defaults={**DECODER_DEFAULTS, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
        tokenizer="sentencepiece",
    ),
    # A missing window means 4096 to transformers; Mistral 0.2 says null.
    Decoder(
        model_type="mistral",
        architecture="MistralForCausalLM",
        config_class="MistralConfig",
        original_types=("llava_mistral", "llava"),
        original_architectures=("LlavaMistralForCausalLM",),
        layer=LLAMA_LAYER,
        defaults={
            **DECODER_DEFAULTS, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        tokenizer="sentencepiece",
    ),
    Decoder(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        config_class="Qwen2Config",
        original_types=("llava_qwen", "llava_qwen2", "llava-qwen2", "bunny-qwen", "bunny-qwen2", "llava"),
        original_architectures=("LlavaQwenForCausalLM", "LlavaQwen2ForCausalLM", "BunnyQwenForCausalLM", "BunnyQwen2ForCausalLM"),
        layer=(*LLAMA_LAYER, *_biases("q_proj", "k_proj", "v_proj")),
        defaults={
            **DECODER_DEFAULTS, "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768, "max_window_layers": 28,
            "sliding_window": 4096, "use_sliding_window": False, "bos_token_id": None, "eos_token_id": None,
        },
        tokenizer="byte-level",
    ),
)  # fmt: skip
DECODER_BY_TYPE = {row.model_type: row for row in DECODERS}

# transformers.activations.ACT2FN of 4.37 and 4.57. `identity` is not among them.
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh", "laplace",
    "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh", "xielu",
)  # fmt: skip
# ROPE_INIT_FUNCTIONS of transformers 4.43 to 5.23, and the names that models brought along.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "su", "mrope", "ntk")
EPS = (1e-5, 1e-6)  # rms_norm_eps of every published LLaMA, Mistral, Qwen2, Phi-3 and Gemma


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
LONGEST_LLAMA = 4096  # positions of LLaMA 2; Code Llama has the shapes of LLaMA 2, another rope_theta, and 16,384


def size_name(hidden: int, layers: int) -> str:
    """ "13B" for a published LLaMA shape, else "2 layers of 48"."""
    return next((s.name for s in LLAMA_SIZES if (s.hidden, s.layers) == (hidden, layers)), f"{layers} layers of {hidden}")


# What LLaVA's code of 2023 did before these keys existed: CLS dropped, images resized and cropped to a square.
LLAVA_DEFAULTS = {"image_aspect_ratio": "square", "mm_vision_select_feature": "patch", "use_mm_proj": True}

# model_type -> configuration and model class of transformers. An Auto class would let an input's config choose the class.
CLASSES = {
    **{row.model_type: (row.config_class, row.architecture) for row in DECODERS if row.runs},
    **{row.model_type: (row.config_class, row.architecture) for row in TARGETS if row.runs},
    **{row.model_type: (row.config_class, row.model_class) for row in TOWERS if row.runs},
}
# What `model_type` may say for `smoke` to run the model: by layout, and by the part of a nested config.
_RUNNABLE = {part: tuple(row.model_type for row in rows if row.runs) for part, rows in (("text", DECODERS), ("vision", TOWERS))}
RUNNABLE_TYPES = {"llama": _RUNNABLE["text"], "llava-hf": tuple(row.model_type for row in TARGETS if row.runs)}
RUNNABLE_PART_TYPES = {"text_config": _RUNNABLE["text"], "vision_config": _RUNNABLE["vision"]}
