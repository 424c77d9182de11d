"""Fuse adapters with mlx-lm's own classes: run by test_mlx.py in the environment that has it.

`python tests/peers/run_mlx.py IN OUT`: IN holds, by case, `CASE.weight`, `CASE.lora_a`, `CASE.lora_b` and perhaps `CASE.m`; OUT gets what
`fuse` makes of each weight. The scale is 3.
"""

from __future__ import annotations

import sys

import mlx.core as mx
from mlx import nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

SCALE, RANK = 3.0, 4


def fused(case: str, weight: mx.array, parts: dict[str, mx.array]) -> mx.array:
    if case.startswith("embedding"):
        table = nn.Embedding(*weight.shape)
        table.weight = weight
        layer = LoRAEmbedding.from_base(table, r=RANK, scale=SCALE)
    else:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = weight
        layer = (DoRALinear if "m" in parts else LoRALinear).from_base(linear, r=RANK, scale=SCALE)
    for name, value in parts.items():
        setattr(layer, name, value)
    return layer.fuse().weight


def main() -> None:
    given = mx.load(sys.argv[1])
    cases = sorted({name.rpartition(".")[0] for name in given})
    found = {}
    for case in cases:
        parts = {name.rpartition(".")[2]: value for name, value in given.items() if name.startswith(f"{case}.")}
        found[case] = fused(case, parts.pop("weight"), parts)
    mx.save_safetensors(sys.argv[2], found)


if __name__ == "__main__":
    main()
