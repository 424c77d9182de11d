"""What llama.cpp calls the parts of a LLaVA in its two files, by decoder and tower, and what it can run.

Sources: convert_hf_to_gguf.py with conversion/base.py, llama.py, qwen.py, phi.py and gemma.py,
legacy-models/convert_image_encoder_to_gguf.py, clip.cpp and models/llava.cpp of llama.cpp at 0c1e570 (2026-10-01).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Tensors of a decoder by canonical name, without `.weight` or `.bias`; those of a layer behind `text.layers.N.` and `blk.N.`.
TEXT_NAMES = {"text.embed_tokens": "token_embd", "text.norm": "output_norm", "head": "output"}
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
FUSED_NAMES = {
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
ROPE_FACTORS = "rope_freqs.weight"  # the factors of Llama 3.1's rope, one for each pair of a head
PERMUTED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}  # with the config key of the number of heads

HEAD_KEYS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}  # and the key of a file that has it


# Keys of a text model by their names behind the architecture: kind, and the key of the config, or `head width` and `rotary width`, which
# are computed. `rope.scaling` stands for all of ROPE_KEYS, `file_type` for that of `general`.
TEXT_KEYS = {
    "block_count": ("u32", "num_hidden_layers"), "context_length": ("u32", "max_position_embeddings"),
    "embedding_length": ("u32", "hidden_size"), "feed_forward_length": ("u32", "intermediate_size"),
    "attention.head_count": ("u32", "num_attention_heads"), "attention.head_count_kv": ("u32", "num_key_value_heads"),
    "rope.freq_base": ("f32", "rope_theta"), "attention.layer_norm_rms_epsilon": ("f32", "rms_norm_eps"),
    "attention.key_length": ("u32", "head width"), "attention.value_length": ("u32", "head width"), "vocab_size": ("u32", "vocab_size"),
    "rope.dimension_count": ("u32", "rotary width"), "rope.scaling.original_context_length": ("u32", "original_max_position_embeddings"),
    "attention.sliding_window": ("u32", "sliding_window"),
}  # fmt: skip
SIZES = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
)  # fmt: skip
HEAD_WIDTHS = ("attention.key_length", "attention.value_length")
USUAL_KEYS = (*SIZES, "rope.scaling", "rope.freq_base", "attention.layer_norm_rms_epsilon", *HEAD_WIDTHS, "file_type")
SILU = {"hidden_act": ("silu",)}


@dataclass(frozen=True)
class GgufDecoder:
    """A decoder as llama.cpp has it. `arch` is its architecture there and the first word of its keys, `layer` the names in a layer, `keys`
    those of its file in order, of which the width of a head is left out where the config does not say it and `key_length` is false.

    `permuted`: rows of the queries and keys stand in Meta's order, pairs side by side. `plus_one`: norms hold what is multiplied with, one
    more than the model's. `head`: whether llama.cpp has an output of its own beside the embedding. `scalings`: kinds of rope scaling that
    its converter writes. `fixed`: keys of the config with the values that llama.cpp computes with, which its file has no word for; None
    stands for a key that is left out. `blank`: whether the file says first that a blank is put before a text ("said"), or last that none
    is ("none"). `tokens` are ids that its converter writes of every model. `own_tokens`: added tokens keep their type, whatever they look
    like, and are read from tokenizer.json too.
    """

    model_type: str
    arch: str
    layer: Mapping[str, str] = field(default_factory=lambda: LAYER_NAMES)
    keys: tuple[str, ...] = USUAL_KEYS
    permuted: bool = False
    key_length: bool = False
    plus_one: bool = False
    head: bool = True
    scalings: tuple[str, ...] = ("default", "linear", "yarn", "dynamic")
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: {**SILU, "partial_rotary_factor": (None, 1.0)})
    blank: str = ""
    tokens: Mapping[str, int] = field(default_factory=dict)
    own_tokens: bool = False

    def __repr__(self) -> str:
        return f"GgufDecoder({self.model_type!r})"


LLAMA_KEYS = (*USUAL_KEYS, "vocab_size", "rope.dimension_count")
LLAMA_SCALINGS = ("default", "linear", "yarn", "dynamic", "llama3")
# Mistral is a Llama there. Phi-3's converter writes keys of its own, with the long rope as tensors, which are not built here; Gemma's
# writes no base of the rope, and its graph has ggml's gelu, the one by tanh.
GGUF_DECODERS = {
    row.model_type: row
    for row in (
        GgufDecoder("llama", "llama", keys=LLAMA_KEYS, permuted=True, key_length=True, scalings=LLAMA_SCALINGS, blank="said"),
        GgufDecoder("mistral", "llama", keys=LLAMA_KEYS, permuted=True, key_length=True, scalings=LLAMA_SCALINGS, blank="said"),
        GgufDecoder("qwen2", "qwen2"),
        GgufDecoder("qwen3", "qwen3", layer={**LAYER_NAMES, **HEAD_NORMS}, key_length=True),
        GgufDecoder(
            "phi3",
            "phi3",
            layer=FUSED_NAMES,
            keys=(
                "context_length", "rope.scaling.original_context_length", "embedding_length", "feed_forward_length", "block_count",
                "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.dimension_count",
                "rope.freq_base", "file_type", "attention.sliding_window",
            ),
            scalings=("default",),
            fixed=SILU,
            own_tokens=True,
        ),
        GgufDecoder(
            "gemma",
            "gemma",
            keys=(
                "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
                "attention.head_count_kv", "attention.layer_norm_rms_epsilon", *HEAD_WIDTHS, "file_type",
            ),
            key_length=True,
            plus_one=True,
            head=False,
            scalings=("default",),
            fixed={
                "hidden_act": ("gelu_pytorch_tanh", "gelu"), "hidden_activation": (None, "gelu_pytorch_tanh"), "rope_theta": (10000.0,),
                "tie_word_embeddings": (True,), "partial_rotary_factor": (None, 1.0),
            },
            blank="none",
            tokens={"eot": 107},
        ),
    )
}  # fmt: skip
# Kinds of rope scaling: keys behind `rope.scaling.` in order, kind, and the words of the config, the first that is there. `type` is the
# name itself. None: nothing is written, since llama.cpp has no such scaling.
ROPE_KEYS: dict[str, tuple[tuple[str, str, tuple[str, ...]], ...] | None] = {
    "default": (),
    "llama3": (),
    "linear": (("factor", "f32", ("factor",)),),
    "yarn": (
        ("factor", "f32", ("factor",)), ("original_context_length", "u32", ("original_max_position_embeddings",)),
        ("yarn_ext_factor", "f32", ("extrapolation_factor",)), ("yarn_attn_factor", "f32", ("attention_factor", "attn_factor")),
        ("yarn_beta_fast", "f32", ("beta_fast",)), ("yarn_beta_slow", "f32", ("beta_slow",)),
    ),
    "dynamic": None,
}  # fmt: skip
# What generation_config.json says of sampling, and what it is called.
SAMPLING_KEYS = (
    ("general.sampling.top_k", "i32", "top_k"), ("general.sampling.top_p", "f32", "top_p"), ("general.sampling.min_p", "f32", "min_p"),
    ("general.sampling.temp", "f32", "temperature"), ("general.sampling.penalty_repeat", "f32", "repetition_penalty"),
)  # fmt: skip
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # general.file_type by the dtype of most tensors
QUANTISATION_VERSION = 2
QUANTISED = ("Q8_0", "Q4_0")
# Under Q4_0 `llama-quantize` takes a K-quant for these, which can't be made here: they get the dtype that loses less.
TABLES, TABLES_OF_Q4 = ("token_embd.weight", "output.weight"), "Q8_0"

# Token types (llama.cpp's llama_token_type), by SentencePiece's kinds: any other kind is normal.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
OWN_KINDS = (2, 3, 5, 6)  # unknown, control, unused, byte: the same numbers in both
ADDED_SCORE, NO_TOKEN_SCORE = -1000.0, -10000.0
SPECIAL_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
ROLE_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls", "mask": "mask"}  # spelled so there
LOOKS_SPECIAL = (
    ("<|", "|>"),
    ("<\uff5c", "\uff5c>"),
    ("<unused", ">"),
)  # first and last characters of added tokens that are control tokens
SPECIAL_TEXTS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")

# How a byte-level tokenizer cuts a text before merges, by the regular expression in its tokenizer.json, and whether a word that is a token
# is taken whole; and llama.cpp's name for both.
# transformers' Qwen2Tokenizer, the same in 4.37 and 5.23
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
PRE_TOKENIZERS = {(QWEN2_SPLIT, False): "qwen2", (LLAMA3_SPLIT, True): "llama-bpe", (LLAMA3_SPLIT, False): "smaug-bpe"}
# But llama.cpp's script goes by a hash of the ids that the whole tokenizer makes of this text, and what it says of a published tokenizer
# stands: `get_vocab_base_pre` of conversion/base.py, with the models that it names. smaug-bpe is Llama 3's own tokenizer where no
# <|begin_of_text|> is put before a text.
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= "  # noqa: RUF001
    "нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, "
    "'D you like some tea? We'Ve a'lL"
)
PRE_TOKENIZER_HASHES = {
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",  # Qwen/Qwen1.5-7B
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",  # Qwen/Qwen3-Embedding-0.6B
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",  # deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # meta-llama/Meta-Llama-3-8B
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",  # abacusai/Smaug-Llama-3-70B-Instruct
}

# The tower and projector. Both feed-forward names are swapped there, and clip.cpp swaps them back. A last norm would be applied.
PROJECTOR_TENSORS = {
    "projector.0.weight": "mm.0.weight", "projector.0.bias": "mm.0.bias", "projector.2.weight": "mm.2.weight",
    "projector.2.bias": "mm.2.bias", "newline": "model.image_newline",
}  # fmt: skip
TOWER_TENSORS = {
    "embeddings.class_embedding": "v.class_embd", "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight", "pre_layrnorm.bias": "v.pre_ln.bias",
}  # fmt: skip
TOWER_LAYER = {
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.q_proj": "attn_q", "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1", "mlp.fc1": "ffn_down", "mlp.fc2": "ffn_up", "layer_norm2": "ln2",
}  # fmt: skip
TOWER_KEYS = (
    ("image_size", "u32", "image_size"), ("patch_size", "u32", "patch_size"), ("embedding_length", "u32", "hidden_size"),
    ("feed_forward_length", "u32", "intermediate_size"), ("projection_dim", "u32", "projection_dim"),
    ("attention.head_count", "u32", "num_attention_heads"), ("attention.layer_norm_epsilon", "f32", "layer_norm_eps"),
)  # fmt: skip
# Activations of a tower by the value of `clip.use_gelu`. ggml's gelu is the one by tanh, and differs from the exact one by 5e-4 at most.
TOWER_ACTIVATIONS = {"quick_gelu": False, "gelu": True}
# Classes of transformers whose images llama.cpp makes, and what it gets wrong of them today.
GGUF_TARGETS = {
    "llava": "the class token is put behind the patches in place of before them (llama.cpp #25814), so that image features are off",
    "llava_next": (
        "the class token is put behind the patches in place of before them (llama.cpp #25814), and images in tiles get no newlines and no "
        "unpadding, so that image features are off"
    ),
}
GGUF_TOWERS = ("clip_vision_model",)  # SigLIP in the graph of LLaVA is not proved
