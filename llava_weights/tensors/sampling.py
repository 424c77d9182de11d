"""Samples of a tensor's values: evenly spread rows, the same in every run and for every container."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ..storage.reading import Workspace
from .lazy import LazyTensor, read_rows

ROWS, ELEMENTS = 4, 4096  # of a matrix, so many rows at least, and as many as hold so many elements
WHOLE_ELEMENTS = 1 << 15  # a matrix with no more elements is read whole
LARGEST_ROW = 4 << 20  # bytes; no model has longer rows (65B: 44 KB), and a row is the least that can be read


def even(length: int, count: int) -> list[int]:
    """`count` indices spread evenly over `length`, the first and the last among them; every index where there are no more."""
    if count >= length:
        return list(range(length))
    return [int(i) for i in np.unique(np.linspace(0, length - 1, count).round())]


def chosen_rows(length: int, tensor: LazyTensor, least: int = ROWS, times: int = 1) -> list[int]:
    """Which of the first `length` rows of `tensor` to sample."""
    row = math.prod(tensor.shape[1:])
    return even(length, length if length * row <= WHOLE_ELEMENTS else times * max(least, math.ceil(ELEMENTS / row)))


def read_some(tensor: LazyTensor, rows: Iterable[int], work: Workspace) -> np.ndarray:
    """These rows, at least one, in float32 [rows, elements of a row]; in one read where they follow each other."""
    every = list(rows)
    if every[-1] - every[0] + 1 == len(every):
        return read_rows(tensor, every[0], every[-1] + 1, work)
    return np.concatenate([read_rows(tensor, row, row + 1, work) for row in every])


def sample(tensor: LazyTensor, work: Workspace) -> np.ndarray:
    """Values of evenly spread rows, flat."""
    return read_some(tensor, chosen_rows(tensor.rows, tensor), work).ravel()


def sample_both(base: LazyTensor, delta: LazyTensor, work: Workspace, *, times: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Values of the same rows of both, flat."""
    rows = chosen_rows(min(base.rows, delta.rows), delta, ROWS, times)
    return read_some(base, rows, work).ravel(), read_some(delta, rows, work).ravel()


def finite_only(values: np.ndarray) -> np.ndarray:
    return np.extract(np.isfinite(values), values)


def deviation(values: np.ndarray) -> float:
    """The standard deviation, summed in float64; 0 where there are no values."""
    return float(np.std(values, dtype=np.float64)) if values.size else 0.0
