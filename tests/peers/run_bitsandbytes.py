"""Print the SHA-256 of what bitsandbytes gives back of known matrices, as JSON: run by test_bitsandbytes.py in the environment that has it.

`python tests/peers/run_bitsandbytes.py > fixtures/G-bitsandbytes/digests.json` made the fixture, with bitsandbytes 0.50.2 on the CPU.
"""

from __future__ import annotations

import hashlib
import json
import sys

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.backends.default import ops
from matrices import DTYPES, SHAPES, matrix

ROUNDINGS = ("nf4", "nf4-double", "fp4", "fp4-double", "int8")


def there_and_back(weight: torch.Tensor, rounding: str) -> torch.Tensor:
    if rounding == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        return bnb.int8_vectorwise_dequant(codes, scales)
    kind, double = rounding.removesuffix("-double"), rounding.endswith("-double")
    codes, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    if weight.shape[1] % 64 == 0:
        return bnb.dequantize_4bit(codes, state)
    # The compiled CPU kernel takes one scale for 64 values from the start of a row; the backend in plain torch is right.
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    plain = getattr(ops._dequantize_4bit_compute, "__wrapped__", ops._dequantize_4bit_compute)
    return plain(codes.flatten(), scales, bnb.get_4bit_type(kind, device="cpu"), 64, weight.shape, weight.dtype)


def main() -> None:
    torch.set_num_threads(1)  # the mean of the scales depends on it
    found = {}
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            for rounding in ROUNDINGS:
                back = there_and_back(matrix(shape, dtype), rounding).contiguous()
                key = f"{shape[0]}x{shape[1]} {name} {rounding}"
                found[key] = hashlib.sha256(back.view(torch.uint8).numpy().tobytes()).hexdigest()
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
