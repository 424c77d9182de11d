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

BEFORE_LAYERS = (Parameter("model.embed_tokens.weight", ("vocab_size", "hidden_size")),)
AFTER_LAYERS = (Parameter("model.norm.weight", ("hidden_size",)),)
HEAD = (Parameter("lm_head.weight", ("vocab_size", "hidden_size")),)  # not stored where it is tied to the embedding table


@dataclass(frozen=True)
class Decoder:
    """A text model. `defaults` are what its config class assumes for a key that is left out; None where it computes the value (`computed`).

    LLaVA's own code writes the first of `original_types` and of `original_architectures`. The type `llava` has been used with every
    decoder, so the architecture decides there; without one it is a LLaMA.

    `layer` are the tensors of each layer, by the name behind `model.layers.N.`, in storage order. `renamed` are keys of the original
    layout that its class in transformers has under another name. Where there is a `mark`, the original's names stand for this decoder only
    in a config that has that key. `plain_rope` are the kinds of rope that its class, in some version, reads under `type` alone.
    `head` are the keys that change logits behind the head, which a LLaVA of transformers leaves out since 4.52, with the values that
    change nothing. `remark` is what its users should know.
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
    after: tuple[Parameter, ...] = AFTER_LAYERS
    renamed: Mapping[str, str] = field(default_factory=dict)
    mark: str = ""
    plain_rope: tuple[str, ...] = ("linear", "dynamic")
    head: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""

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
        found |= shapes(self.after, config)
        return found if config.get("tie_word_embeddings") is True else found | shapes(HEAD, config)


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


def _norms(*names: str, part: str = "weight") -> tuple[Parameter, ...]:
    return tuple(Parameter(f"{name}.{part}", ("hidden_size",)) for name in names)


ATTENTION, FEED_FORWARD = LLAMA_LAYER[:4], LLAMA_LAYER[4:7]
ATTENTION_BIASES = _biases("q_proj", "k_proj", "v_proj", "o_proj", when="attention_bias")
LLAMA_BIASES = (
    *ATTENTION_BIASES,
    Parameter("mlp.gate_proj.bias", ("intermediate_size",), "mlp_bias"),
    Parameter("mlp.up_proj.bias", ("intermediate_size",), "mlp_bias"),
    Parameter("mlp.down_proj.bias", ("hidden_size",), "mlp_bias"),
)
EXPERT = "block_sparse_moe.experts.*"
# transformers 4.38 to 4.57 multiply what enters the layers, 5.x only the rows of the table: 5.23's modeling_gemma.py.
SCALED = (
    "Gemma of transformers up to 4.57 multiplies image features by the root of `hidden_size`, as in training; those of 5.23 and 5.24 do "
    "not, and see images too faintly"
)

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
        layer=(*LLAMA_LAYER, *LLAMA_BIASES),
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
    Decoder(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        config_class="Qwen3Config",
        original_types=("llava_qwen3", "llava"),
        original_architectures=("LlavaQwen3ForCausalLM",),
        layer=(
            *LLAMA_LAYER, *ATTENTION_BIASES,
            Parameter("self_attn.q_norm.weight", ("head_dim",)), Parameter("self_attn.k_norm.weight", ("head_dim",)),
        ),
        defaults={
            **DECODER_DEFAULTS, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128,
            "max_position_embeddings": 32768, "max_window_layers": 28, "sliding_window": 4096, "use_sliding_window": False,
            "attention_bias": False, "bos_token_id": None, "eos_token_id": None,
        },
        tokenizer="byte-level",
    ),
    Decoder(
        model_type="gemma",
        architecture="GemmaForCausalLM",
        config_class="GemmaConfig",
        original_types=("llava_gemma", "llava"),
        original_architectures=("LlavaGemmaForCausalLM",),
        layer=(*LLAMA_LAYER, *ATTENTION_BIASES),
        defaults={
            **DECODER_DEFAULTS, "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": None, "max_position_embeddings": 8192, "attention_bias": False, "tie_word_embeddings": True,
            "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        },
        tokenizer="sentencepiece",
        remark=SCALED,
    ),
    Decoder(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        config_class="Gemma2Config",
        original_types=("llava_gemma2", "llava"),
        original_architectures=("LlavaGemma2ForCausalLM",),
        layer=(
            *ATTENTION, *ATTENTION_BIASES, *FEED_FORWARD,
            *_norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
        defaults={
            **{key: value for key, value in DECODER_DEFAULTS.items() if key != "hidden_act"},
            "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
            "attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4096, "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0, "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        },
        tokenizer="sentencepiece",
        head={"final_logit_softcapping": None},
        remark=SCALED,
    ),
    # `llava_phi` is LLaVA-Phi on Phi-2 too, whose config knows no `rms_norm_eps`.
    Decoder(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        config_class="Phi3Config",
        original_types=("llava_phi", "llava_phi3", "bunny-phi3", "llava"),
        original_architectures=("LlavaPhiForCausalLM", "LlavaPhi3ForCausalLM", "BunnyPhi3ForCausalLM"),
        layer=(
            Parameter("self_attn.qkv_proj.weight", ("num_attention_heads * head_dim + 2 * num_key_value_heads * head_dim", "hidden_size")),
            Parameter("self_attn.o_proj.weight", ("hidden_size", "num_attention_heads * head_dim")),
            Parameter("mlp.gate_up_proj.weight", ("2 * intermediate_size", "hidden_size")),
            Parameter("mlp.down_proj.weight", ("hidden_size", "intermediate_size")),
            *_norms("input_layernorm", "post_attention_layernorm"),
        ),
        defaults={
            **DECODER_DEFAULTS, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0, "sliding_window": None,
            "embd_pdrop": 0.0, "resid_pdrop": 0.0, "eos_token_id": 32000, "pad_token_id": 32000,
        },
        tokenizer="sentencepiece",
        mark="rms_norm_eps",
        plain_rope=("longrope", "su", "yarn"),
    ),
    # transformers 5 computes with the experts of a layer stacked, and reads these names.
    Decoder(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        config_class="MixtralConfig",
        original_types=("llava_mixtral", "llava"),
        original_architectures=("LlavaMixtralForCausalLM",),
        layer=(
            *ATTENTION,
            Parameter("block_sparse_moe.gate.weight", ("num_local_experts", "hidden_size")),
            Parameter(f"{EXPERT}.w1.weight", ("intermediate_size", "hidden_size"), each="num_local_experts"),
            Parameter(f"{EXPERT}.w2.weight", ("hidden_size", "intermediate_size"), each="num_local_experts"),
            Parameter(f"{EXPERT}.w3.weight", ("intermediate_size", "hidden_size"), each="num_local_experts"),
            *_norms("input_layernorm", "post_attention_layernorm"),
        ),
        defaults={
            **DECODER_DEFAULTS, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8,
            "output_router_logits": False, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
        },
        tokenizer="sentencepiece",
        runs=False,
    ),
    # `norm_eps` and `rope_pct` are the names in the code that came with StableLM 3B (`stablelm_epoch`), before transformers had it.
    Decoder(
        model_type="stablelm",
        architecture="StableLmForCausalLM",
        config_class="StableLmConfig",
        original_types=("llava_stablelm_epoch", "llava_stablelm", "stablelm_epoch", "llava"),
        original_architectures=("LlavaStableLMEpochForCausalLM", "LlavaStablelmForCausalLM", "StableLMEpochForCausalLM"),
        layer=(
            *ATTENTION, *_biases("q_proj", "k_proj", "v_proj", when="use_qkv_bias"), *FEED_FORWARD,
            *_norms("input_layernorm", "post_attention_layernorm"), *_norms("input_layernorm", "post_attention_layernorm", part="bias"),
        ),
        after=(*AFTER_LAYERS, *_norms("model.norm", part="bias")),
        defaults={
            **{key: value for key, value in DECODER_DEFAULTS.items() if key != "rms_norm_eps"},
            "vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912, "num_key_value_heads": 32,
            "max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_qkv_bias": False,
            "qk_layernorm": False, "use_parallel_residual": False, "hidden_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0,
        },
        tokenizer="byte-level",
        renamed={"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"},
    ),
    Decoder(
        model_type="granite",
        architecture="GraniteForCausalLM",
        config_class="GraniteConfig",
        original_types=("llava_granite", "llava"),
        original_architectures=("LlavaGraniteForCausalLM",),
        layer=(*LLAMA_LAYER, *LLAMA_BIASES),
        defaults={
            **DECODER_DEFAULTS, "attention_bias": False, "mlp_bias": False, "embedding_multiplier": 1.0, "attention_multiplier": 1.0,
            "residual_multiplier": 1.0, "logits_scaling": 1.0,
        },
        tokenizer="byte-level",
        head={"logits_scaling": 1.0},
    ),
)  # fmt: skip
# Keys of a text config that are written only where one is given, since their classes work them out.
CARRIED = ("layer_types", "partial_rotary_factor", "use_bidirectional_attention")
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


def size_name(hidden: int, layers: int, intermediate: int) -> str:
    """ "13B" for a published LLaMA shape, else "2 layers of 48"."""
    shape = (hidden, layers, intermediate)
    return next((s.name for s in LLAMA_SIZES if (s.hidden, s.layers, s.intermediate) == shape), f"{layers} layers of {hidden}")


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
