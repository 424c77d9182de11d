"""Quantised weights: what each method stores beside or in place of a weight, and what `quantization_config` calls it.

Sources: bitsandbytes, AutoAWQ, AutoGPTQ and GPTQModel, compressed-tensors (llm-compressor), EETQ, HQQ, AQLM, VPTQ, SpQR, Quanto, torchao
and MXFP4 as transformers 4.37 to 5.23 save and load them, and `mlx.nn.QuantizedLinear`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantisation:
    """A method. `names` is how the name of a tensor ends that only this method stores, `methods` what `quant_method` may say of it."""

    title: str
    names: str
    methods: tuple[str, ...] = ()


# The first whose tensors are there wins; of two that store the same names, what `quantization_config` says decides.
QUANTISATIONS = (
    Quantisation("bitsandbytes, 4 bits", r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state[\w.]*)", ("bitsandbytes",)),
    Quantisation("bitsandbytes, 8 bits", r"\.(SCB|weight_format)", ("bitsandbytes",)),
    Quantisation("MLX", r"\.biases"),
    Quantisation("Quanto", r"\.weight\._(data|scale|shift)", ("quanto",)),
    Quantisation("torchao", r"\._weight_(qdata|scale\w*|zero_point|zero)", ("torchao",)),
    Quantisation("VPTQ", r"\.(res_|outlier_)?(centroids\.weight|indices)", ("vptq",)),
    Quantisation("SpQR", r"\.(dense_weights|row_offsets|col_vals)", ("spqr",)),
    Quantisation("MXFP4", r"_proj_(blocks|scales)", ("mxfp4",)),
    Quantisation("GPTQ", r"\.g_idx", ("gptq",)),
    Quantisation("AWQ", r"\.(qweight|qzeros|scales)", ("awq", "gptq", "auto-round", "intel/auto-round")),
    Quantisation(
        "compressed-tensors", r"\.(weight_packed|weight_shape|weight_scale|weight_zero_point|input_scale)", ("compressed-tensors",)
    ),
    Quantisation("FP8 in blocks", r"\.weight_scale_inv", ("fp8",)),
    Quantisation("EETQ", r"\.weight_scales", ("eetq",)),
    Quantisation("AQLM", r"\.(codebooks|codes)", ("aqlm",)),
    Quantisation("HQQ", r"\.W_q", ("hqq",)),
)
TITLES = {
    "awq": "AWQ", "gptq": "GPTQ", "auto-round": "AutoRound", "intel/auto-round": "AutoRound", "compressed-tensors": "compressed-tensors",
    "fp8": "FP8", "fbgemm_fp8": "FP8", "modelopt": "ModelOpt", "hqq": "HQQ", "aqlm": "AQLM", "vptq": "VPTQ", "eetq": "EETQ",
    "quanto": "Quanto", "torchao": "torchao", "higgs": "HIGGS", "spqr": "SpQR", "mxfp4": "MXFP4", "bitnet": "BitNet",
}  # fmt: skip
# dtypes in which no layer of a model is trained, and what a matrix of them is.
PACKED = {
    "U8": "packed bytes", "I8": "8-bit integers", "I16": "16-bit integers", "I32": "packed integers", "I64": "integers", "U16": "integers",
    "U32": "integers", "U64": "integers", "F8_E4M3": "FP8", "F8_E5M2": "FP8", "F8_E8M0": "FP8 scales", "F4": "FP4",
}  # fmt: skip
PACKED_NAME = re.compile(rf".*(?:{'|'.join(row.names for row in QUANTISATIONS)})", re.DOTALL)
# Each `quant_method` of transformers that stores weights packed, with scales: plain weights do not belong to a `quantization_config` of
# one of these. Others (torchao, quanto, bitnet, compressed-tensors, mxfp4) may quantise while loading.
QUANTIZERS = ("aqlm", "auto-round", "awq", "bitsandbytes", "eetq", "fbgemm_fp8", "fp8", "gptq", "higgs", "hqq", "spqr", "vptq")


def quantisation(dtypes: Mapping[str, str], method: str) -> tuple[str, list[str]] | None:
    """How these tensors (dtype by name) are quantised, and those that tell it; None where all hold plain floats.

    `method` is `quant_method` of their config, empty where it says nothing."""
    named = [name for name in dtypes if PACKED_NAME.fullmatch(name)]
    rows = [row for row in QUANTISATIONS if any(re.fullmatch(rf".*(?:{row.names})", name, re.DOTALL) for name in named)]
    packed = [name for name, dtype in dtypes.items() if dtype in PACKED and re.search(r"(weight|qweight|_packed)$", name)]
    if not rows and not packed:
        return None
    told = [row for row in rows if method in row.methods] or rows
    by_dtype = f"{PACKED[dtypes[packed[0]]]}" if packed else ""
    title = told[0].title if told and (method in ("", "bitsandbytes") or method not in TITLES) else TITLES.get(method, by_dtype)
    return title or by_dtype, [*named, *packed]


# What the codes of bitsandbytes' 4-bit kinds stand for, in units of a block's largest magnitude: NF4 from the QLoRA paper (appendix E), FP4
# with two exponent bits and one of the fraction. Float32 values of `get_4bit_type` in 0.50.2.
CODES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        -1.0, -0.6666666865348816, -0.5, -0.3333333432674408, -0.25, -0.1666666716337204, -0.0052083334885537624, 0.0, 0.0,
        0.0052083334885537624, 0.1666666716337204, 0.25, 0.3333333432674408, 0.5, 0.6666666865348816, 1.0,
    ),
}  # fmt: skip
