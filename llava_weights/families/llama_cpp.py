"""What llama.cpp calls the parts of a LLaVA in its two files, by decoder and tower, and what it can run.

Sources: convert_hf_to_gguf.py with conversion/base.py, llama.py and qwen.py, legacy-models/convert_image_encoder_to_gguf.py, clip.cpp and
models/llava.cpp of llama.cpp at 0c1e570 (2026-10-01).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Tensors of a decoder by canonical name, without `.weight` or `.bias`; those of a layer behind `text.layers.N.` and `blk.N.`.
TEXT_NAMES = {"text.embed_tokens": "token_embd", "text.norm": "output_norm", "head": "output"}
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
ROPE_FACTORS = "rope_freqs.weight"  # the factors of Llama 3.1's rope, one for each pair of a head
PERMUTED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}  # with the config key of the number of heads

HEAD_KEYS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}  # and the key of a file that has it


@dataclass(frozen=True)
class GgufDecoder:
    """A decoder as llama.cpp has it. `arch` is its architecture there and the first word of its keys, `layer` the names in a layer.

    `permuted`: rows of the queries and keys stand in Meta's order, pairs side by side. `key_length`: the keys say how wide a head is,
    whether or not the config does. `more`: the size of the vocabulary and the width of the rope come after the other keys, and before the
    tokenizer whether a blank is put before a text.
    """

    model_type: str
    arch: str
    layer: Mapping[str, str] = field(default_factory=lambda: LAYER_NAMES)
    permuted: bool = False
    key_length: bool = False
    more: bool = False

    def __repr__(self) -> str:
        return f"GgufDecoder({self.model_type!r})"


# Mistral is a Llama there. Gemma (norms plus one), Phi-3 (its own order of keys) and Qwen 1 have no row.
GGUF_DECODERS = {
    row.model_type: row
    for row in (
        GgufDecoder("llama", "llama", permuted=True, key_length=True, more=True),
        GgufDecoder("mistral", "llama", permuted=True, key_length=True, more=True),
        GgufDecoder("qwen2", "qwen2"),
        GgufDecoder("qwen3", "qwen3", layer={**LAYER_NAMES, **HEAD_NORMS}, key_length=True),
    )
}
# Keys of every decoder in order: name behind the architecture, kind, key of the config. Rope and the width of a head come between.
TEXT_KEYS = (
    ("block_count", "u32", "num_hidden_layers"), ("context_length", "u32", "max_position_embeddings"),
    ("embedding_length", "u32", "hidden_size"), ("feed_forward_length", "u32", "intermediate_size"),
    ("attention.head_count", "u32", "num_attention_heads"), ("attention.head_count_kv", "u32", "num_key_value_heads"),
)  # fmt: skip
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

# How a byte-level tokenizer cuts a text before merges, by the regular expression in its tokenizer.json, and llama.cpp's name of it.
# llama.cpp's script knows it by a hash of what the whole tokenizer makes of a test text; the name stands for this expression.
# transformers' Qwen2Tokenizer, the same in 4.37 and 5.23
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {QWEN2_SPLIT: "qwen2", QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|"): "llama-bpe"}

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
