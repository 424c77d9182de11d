"""A vocabulary table with more rows, or with fewer."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np

from ..storage.direct import SPARE_BYTES
from ..storage.reading import Workspace
from .dtypes import ITEMSIZE
from .lazy import LazyTensor, read_rows

SUM_BLOCK_BYTES = 1 << 20  # of the source, summed at once; a part of the rule, since the last bits of a sum depend on the order


@dataclass(frozen=True, kw_only=True)
class Grown(LazyTensor):
    """`source` with new rows behind it: each is the mean of the source's rows, taken in float64.

    Transformers' converters draw them at random, unseeded; this is deterministic. Not zeros: transformers 4.36-4.40 takes an all-zero
    embedding for a place of an image.
    """

    source: LazyTensor

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.source,)

    @property
    def _block(self) -> int:
        unit = self.source.row_unit
        return max(SUM_BLOCK_BYTES // (self.row_nbytes * unit), 1) * unit

    def scratch(self, rows: int) -> int:
        values = self._block * self.numel // max(self.rows, 1)
        mean = self.source.scratch(self._block) + SPARE_BYTES + values * (ITEMSIZE[self.dtype] + 4 + 8)  # beside what the worker keeps
        return self.source.scratch(rows) + mean

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        common = max(0, min(stop, self.source.rows) - start)
        if common:
            self.source.rows_into(out[: common * self.row_nbytes], start, start + common, work)
        if new := stop - start - common:
            out[common * self.row_nbytes :] = work.latest(self, self._mean) * new

    def _mean(self) -> bytes:
        """The mean row as bytes. In a workspace of its own: the source's tallies and checks belong to the pass that writes it."""
        total = np.zeros(self.numel // self.rows, np.float64)
        with closing(Workspace()) as work:
            for start in range(0, self.source.rows, self._block):
                rows = read_rows(self.source, start, min(start + self._block, self.source.rows), work)
                total += rows.sum(axis=0, dtype=np.float64)
        return encoded(total / self.source.rows, self.dtype)


@dataclass(frozen=True, kw_only=True)
class Head(LazyTensor):
    """The first rows of `source`."""

    source: LazyTensor

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.source,)

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        self.source.rows_into(out, start, stop, work)


@dataclass(frozen=True, kw_only=True)
class Tail(LazyTensor):
    """The rows of `source` from `first` on."""

    source: LazyTensor
    first: int

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.source,)

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        self.source.rows_into(out, self.first + start, self.first + stop, work)


def tail(tensor: LazyTensor, first: int) -> LazyTensor:
    """The rows of `tensor` from `first` on."""
    return Tail(dtype=tensor.dtype, shape=(tensor.rows - first, *tensor.shape[1:]), source=tensor, first=first)


@dataclass(frozen=True, kw_only=True)
class Overlaid(LazyTensor):
    """`source` with stretches of its rows taken from `values`: each of `runs` is (row here, row of `values`, number of rows)."""

    source: LazyTensor
    values: LazyTensor
    runs: tuple[tuple[int, int, int], ...]

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.source, self.values)

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        self.source.rows_into(out, start, stop, work)
        for here, there, count in self.runs:
            first, last = max(start, here), min(stop, here + count)
            if first < last:
                at = out[(first - start) * self.row_nbytes : (last - start) * self.row_nbytes]
                self.values.rows_into(at, first - here + there, last - here + there, work)


def overlaid(source: LazyTensor, values: LazyTensor, runs: tuple[tuple[int, int, int], ...]) -> LazyTensor:
    """`source` with stretches of rows of `values`, which have its dtype and width."""
    return Overlaid(dtype=source.dtype, shape=source.shape, source=source, values=values, runs=runs)


def resized(tensor: LazyTensor, rows: int) -> LazyTensor:
    """`tensor` with `rows` rows: as it is, cut, or grown by rows that hold the mean of the others."""
    if rows == tensor.rows:
        return tensor
    return (Grown if rows > tensor.rows else Head)(dtype=tensor.dtype, shape=(rows, *tensor.shape[1:]), source=tensor)


def encoded(values: np.ndarray, dtype: str) -> bytes:
    """Values as bytes of F16, BF16, F32 or F64, rounded to nearest even; BF16 by way of float32, as torch does."""
    if dtype != "BF16":
        return bytes(values.astype(f"<f{ITEMSIZE[dtype]}").tobytes())
    bits = values.astype("<f4").view("<u4")
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return bytes(np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2").tobytes())  # the sum above overflows for some NaNs
