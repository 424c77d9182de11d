"""The matrices that bitsandbytes and this package round: the same in both environments."""

from __future__ import annotations

import torch

SHAPES = ((1, 64), (64, 64), (48, 192), (33, 77), (100, 7), (5, 3), (128, 512), (17, 160), (7, 130), (300, 704), (1, 1), (600, 1024))
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def matrix(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Values of about the size of weights, by integers alone; one row of zeros and one of large values."""
    count = shape[0] * shape[1]
    values = (torch.arange(count, dtype=torch.int64) * 2654435761 + 12345) % 1048573
    found = ((values - 524286).double() / 2**24).to(dtype).view(shape)
    if shape[0] > 3:
        found[1] = 0
        found[2] *= 100
    return found
