"""Arithmetic that gives the same bits on every machine: products, sums and roundings of float64 tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def exact_slices(values: torch.Tensor, axis: int) -> list[torch.Tensor]:
    """Slices of float64 `values`, the largest first, that sum to them and whose products along `axis` are exact. Overwrites `values`.

    Along `axis`, a slice holds integers of some 22 bits times one power of two, so that a product summed over all of them needs 53
    bits at most, in any order, fused or not: every BLAS on every machine gives the same (Ozaki et al., Numerical Algorithms 59,
    2012). Adding and subtracting a large number rounds to such integers.
    """
    import torch

    bits = (53 - (values.shape[axis] - 1).bit_length()) // 2
    slices = []
    while torch.isfinite(values).all() and values.any():
        exponent = np.frexp(values.abs().amax(axis, keepdim=True).numpy())[1]
        shift = torch.from_numpy(np.ldexp(1.5, exponent + (52 - bits)))
        slices.append((values + shift).sub_(shift))
        values -= slices[-1]
    return slices or [values]


def row_sums(values: torch.Tensor) -> torch.Tensor:
    """The sum of each row in an order that is the same on every machine: halves are added until one column is left."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        folded = values[:, :half] + values[:, half : 2 * half]
        folded[:, : values.shape[1] - 2 * half] += values[:, 2 * half :]
        values = folded
    return values.sum(1)


def round_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` in `dtype`, rounded to nearest even once. torch narrows float64 by way of float32, which rounds twice.

    So the float32 in between is rounded to odd: truncated, and its last bit set where that lost something, which the second rounding
    then takes into account (Boldo and Melquiond, IEEE Transactions on Computers 57, 2008).
    """
    import torch

    if values.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return values.to(dtype)
    wide = values.numpy()
    with np.errstate(over="ignore"):
        near = wide.astype(np.float32)
    bits, back = near.view(np.int32), near.astype(np.float64)
    bits -= np.abs(back) > np.abs(wide)
    bits |= back != wide
    return torch.from_numpy(near).to(dtype)
