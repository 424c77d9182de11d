"""Lazy tensors: a leaf that names a byte range of a file, and operations on it.

A lazy tensor knows its dtype and shape and writes any range of its rows into a buffer of the caller. Nothing is read until then.
As frozen dataclasses they can be printed in a dry run, compared when a run resumes, and pickled to a worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ..errors import MismatchError
from ..storage.reading import Record, SourceFile, Workspace
from ..storage.threads import in_threads
from ..text import brief
from .dtypes import ITEMSIZE, as_rows, as_torch, bytes_of, count_non_finite, one_thread, raw_bits, to_float32

FLOATS = ("F64", "F32", "F16", "BF16")
SAMPLES_AT_ONCE = 16  # of remote tensors
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor that is described and not in memory. It knows what values it is made of and can make any range of its rows; until then
    nothing is read. `dtype` is spelled as safetensors does ("F16", "BF16", "F32"), `shape` is in elements.

    `str` of it is short. `repr` shows everything that it is made of, since that is how a run that continues knows that the work is the
    same.
    """

    dtype: str
    shape: tuple[int, ...]

    def __init_subclass__(cls) -> None:
        cls._repr_pretty_ = LazyTensor._repr_pretty_  # type: ignore[method-assign]  # IPython would take the `__repr__` of the subclass

    def __str__(self) -> str:
        """Short, beside the whole `repr`, which is part of a plan's identity."""
        leaves = self.leaves()
        names = [brief(leaf.name or leaf.file.name, 80) for leaf in leaves[:1]]
        more = [f"{len(leaves) - 1} more"] if len(leaves) > 1 else []
        made = f" of {' and '.join([*names, *more])}" if leaves else ""
        return f"{type(self).__name__}({self.dtype} {list(self.shape)}{made})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython and notebooks show."""
        printer.text(str(self))

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        """Write rows [start, stop) into `out`, `(stop - start) * row_nbytes` bytes, row-major and little-endian."""
        raise NotImplementedError

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        """The tensors that it is made of, one step back; empty where it is stored in a file."""
        return ()

    def scratch(self, rows: int) -> int:
        """Bytes of scratch memory alive while `rows` rows are made, `out` not counted."""
        return max((tensor.scratch(rows) for tensor in self.inputs), default=0)

    @property
    def row_unit(self) -> int:
        """Rows are cheapest in multiples of this many."""
        return math.lcm(1, *(tensor.row_unit for tensor in self.inputs))

    @property
    def uses_torch(self) -> bool:
        """Whether making rows imports torch, which costs seconds and 200 MB; moving bytes does not."""
        return any(tensor.uses_torch for tensor in self.inputs)

    @property
    def expected_digest(self) -> tuple[str, str] | None:
        """The digest that its finished values must have, where an input records it: algorithm, and hexadecimal digits."""
        return None

    @property
    def rows(self) -> int:
        """Length of the first axis; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def numel(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all its values."""
        return bytes_of(self.dtype, self.numel)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return bytes_of(self.dtype, math.prod(self.shape[1:]))

    def leaves(self) -> tuple[Stored, ...]:
        """Every stored tensor that this one is made of."""
        return tuple(leaf for tensor in self.inputs for leaf in tensor.leaves())


@dataclass(frozen=True, kw_only=True)
class Stored(LazyTensor):
    """The only leaf: contiguous row-major values at `offset` in a file, whatever its format.

    `record` is the zip member that the range lies in, if any: its CRC-32 is checked on the way. `name` is what the file calls it.
    """

    file: SourceFile
    offset: int
    record: Record | None = None
    name: str = field(default="", repr=False, compare=False)

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        at = self.offset + start * self.row_nbytes
        work.read(self.file, at, out)
        if work.watch is not None:
            work.watch.look(self.file, at, out, work)
        if self.record is not None:
            work.take_crc(self.file, self.record, at, out)

    def leaves(self) -> tuple[Stored, ...]:
        return (self,)


@dataclass(frozen=True, kw_only=True)
class FromRows(LazyTensor):
    """What is made of the same rows of `source`, read into scratch memory first."""

    source: LazyTensor

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.source,)

    def scratch(self, rows: int) -> int:
        return rows * self.source.row_nbytes + self.source.scratch(rows)


@dataclass(frozen=True, kw_only=True)
class Cast(FromRows):
    """`source` in another float dtype, rounded to nearest even."""

    @property
    def uses_torch(self) -> bool:
        return True

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        with work.scratch((stop - start) * self.source.row_nbytes) as raw:
            self.source.rows_into(raw, start, stop, work)
            as_torch(out, self.dtype).copy_(as_torch(raw, self.source.dtype))


@dataclass(frozen=True, kw_only=True)
class Add(LazyTensor):
    """`delta`, plus `base` on the rows that `base` has; rows past them are the delta's own, untouched.

    Both have this dtype; the sum is rounded once. The rule of LLaVA's `apply_delta` (haotian-liu/LLaVA 8959d5c).
    """

    base: LazyTensor
    delta: LazyTensor

    @property
    def uses_torch(self) -> bool:
        return True

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.base, self.delta)

    def scratch(self, rows: int) -> int:
        return max(self.delta.scratch(rows), rows * self.base.row_nbytes + self.base.scratch(rows))

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        self.delta.rows_into(out, start, stop, work)
        common = max(0, min(stop, self.base.rows) - start) * self.row_nbytes
        if not common:
            return
        with work.scratch(common) as raw:
            self.base.rows_into(raw, start, min(stop, self.base.rows), work)
            total = as_torch(out[:common], self.dtype)
            total.add_(as_torch(raw, self.dtype))
        work.tallies["non_finite"] += count_non_finite(out[:common], self.dtype, work)


@dataclass(frozen=True, kw_only=True)
class Subtract(LazyTensor):
    """`tuned - base` on the rows that `base` has, rounded once; rows past them are the tuned model's own.

    The rule of LLaVA's `make_delta`. Adding the base again does not always give `tuned` back: the elements that come back
    different are counted in the tallies `elements` and `lost`.
    """

    tuned: LazyTensor
    base: LazyTensor

    @property
    def uses_torch(self) -> bool:
        return True

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.tuned, self.base)

    def scratch(self, rows: int) -> int:
        return max(self.tuned.scratch(rows), rows * self.base.row_nbytes + max(self.base.scratch(rows), rows * self.row_nbytes))

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        self.tuned.rows_into(out, start, stop, work)
        common = max(0, min(stop, self.base.rows) - start) * self.row_nbytes
        if not common:
            return
        with work.scratch(common) as raw:
            self.base.rows_into(raw, start, min(stop, self.base.rows), work)
            tuned, base = as_torch(out[:common], self.dtype), as_torch(raw, self.dtype)
            with work.scratch(common) as copy:
                copy[:] = out[:common]
                tuned.sub_(base)
                back = base.add_(tuned)
                work.tallies["lost"] += int((back != as_torch(copy, self.dtype)).sum())
        work.tallies["elements"] += common // ITEMSIZE[self.dtype]
        work.tallies["non_finite"] += count_non_finite(out[:common], self.dtype, work)


@dataclass(frozen=True, kw_only=True)
class ConcatRows(LazyTensor):
    """The parts one below the other."""

    parts: tuple[LazyTensor, ...]

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return self.parts

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        first = position = 0
        for part in self.parts:
            lo, hi = max(start - first, 0), min(stop - first, part.rows)
            if lo < hi:
                end = position + (hi - lo) * self.row_nbytes
                part.rows_into(out[position:end], lo, hi, work)
                position = end
            first += part.rows


@dataclass(frozen=True, kw_only=True)
class ConcatColumns(LazyTensor):
    """The parts side by side: how Meta cut the embedding, `wo` and `w2` across its model-parallel files."""

    parts: tuple[LazyTensor, ...]

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return self.parts

    def scratch(self, rows: int) -> int:
        return max(rows * part.row_nbytes + part.scratch(rows) for part in self.parts)

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        joined = as_rows(out, stop - start)
        left = 0
        for part in self.parts:
            with work.scratch((stop - start) * part.row_nbytes) as raw:
                part.rows_into(raw, start, stop, work)
                joined[:, left : left + part.row_nbytes] = as_rows(raw, stop - start)
            left += part.row_nbytes


@dataclass(frozen=True, kw_only=True)
class PermuteRope(FromRows):
    """Rows of each head from Meta's interleaved rotary order (pairs 2i, 2i+1) to HF's halves (i, i + head_dim/2).

    Source: `permute` in transformers' convert_llama_weights_to_hf.py: view (heads, head_dim/2, 2, columns), swap axes 1 and 2.
    """

    heads: int

    @property
    def row_unit(self) -> int:
        return self.rows // self.heads

    @property
    def _axes(self) -> tuple[int, int]:
        """Of the view of a head in `source`, which are swapped."""
        return self.row_unit // 2, 2

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        head, (outer, inner) = self.row_unit, self._axes
        if start % head or stop % head:  # only samples ask for a part of a head: read row by row
            for i in range(start, stop):
                here = out[(i - start) * self.row_nbytes : (i - start + 1) * self.row_nbytes]
                second, first = divmod(i % head, outer)
                row = i - i % head + inner * first + second
                self.source.rows_into(here, row, row + 1, work)
            return
        with work.scratch(len(out)) as raw:
            self.source.rows_into(raw, start, stop, work)
            view = as_rows(raw, stop - start).reshape(-1, outer, inner, self.row_nbytes)
            as_rows(out, stop - start).reshape(-1, inner, outer, self.row_nbytes)[:] = view.swapaxes(1, 2)


@dataclass(frozen=True, kw_only=True)
class UnpermuteRope(PermuteRope):
    """The inverse of `PermuteRope`: from halves to pairs."""

    @property
    def _axes(self) -> tuple[int, int]:
        return 2, self.row_unit // 2


@dataclass(frozen=True, kw_only=True)
class ReplaceRows(LazyTensor):
    """`source` with the rows `indices`, counted from the end where negative, taken from `values`, one after another."""

    source: LazyTensor
    values: LazyTensor
    indices: tuple[int, ...]

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.source, self.values)

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        self.source.rows_into(out, start, stop, work)
        for number, index in enumerate(self.indices):
            row = index % self.rows
            if start <= row < stop:
                at = (row - start) * self.row_nbytes
                self.values.rows_into(out[at : at + self.row_nbytes], number, number + 1, work)


@dataclass(frozen=True, kw_only=True)
class Transposed(LazyTensor):
    """The matrix `source` on its side. All of it is read for any row: only for small ones, such as the factors of an adapter."""

    source: LazyTensor

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.source,)

    def scratch(self, rows: int) -> int:
        return self.source.nbytes + self.source.scratch(self.source.rows)

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        with work.scratch(self.source.nbytes) as raw:
            self.source.rows_into(raw, 0, self.source.rows, work)
            values = raw_bits(raw, self.dtype).reshape(self.source.shape)
            raw_bits(out, self.dtype).reshape(stop - start, self.source.rows)[:] = values[:, start:stop].T


def transposed(tensor: LazyTensor) -> LazyTensor:
    """The matrix `tensor` on its side."""
    return Transposed(dtype=tensor.dtype, shape=tensor.shape[::-1], source=tensor)


def cast(tensor: LazyTensor, dtype: str) -> LazyTensor:
    """`tensor` in `dtype`; itself where it already is."""
    return tensor if tensor.dtype == dtype else Cast(dtype=dtype, shape=tensor.shape, source=tensor)


def concat(parts: tuple[LazyTensor, ...], axis: int) -> LazyTensor:
    """The parts joined along axis 0 (rows) or 1 (columns). Raises ValueError where dtypes or the other axis differ."""
    if len(parts) == 1:
        return parts[0]
    shapes = [part.shape for part in parts]
    if len({part.dtype for part in parts}) > 1 or len({shape[:axis] + shape[axis + 1 :] for shape in shapes}) > 1:
        raise ValueError(f"parts do not fit together: {[(part.dtype, part.shape) for part in parts]}")
    shape = list(shapes[0])
    shape[axis] = sum(part[axis] for part in shapes)
    return (ConcatRows, ConcatColumns)[axis](dtype=parts[0].dtype, shape=tuple(shape), parts=parts)


def read_rows(tensor: LazyTensor, start: int, stop: int, work: Workspace) -> np.ndarray:
    """Rows [start, stop) as float32 (integers as they are), each flat: for samples, not for the stream."""
    raw = bytearray((stop - start) * tensor.row_nbytes)
    tensor.rows_into(memoryview(raw), start, stop, work)
    return to_float32(raw, tensor.dtype).reshape(stop - start, -1)


def wrong_digest(name: str) -> MismatchError:
    """The error for a tensor whose values do not have its `expected_digest`."""
    return MismatchError(
        f"`{name}` does not come out as the delta's maker recorded: the base is not the one that the delta was made against",
        hint="give exactly the base that the maker used, in the same dtype",
    )


def each(function: Callable[[str, Workspace], T], names: Iterable[str], *sources: Mapping[str, LazyTensor]) -> dict[str, T]:
    """What `function` returns for each name, in order; many at once where tensors are remote, since that is mostly waiting."""
    wanted = list(names)
    if not any(leaf.file.remote for source in sources for name in wanted for leaf in source[name].leaves()):
        with one_thread(), closing(Workspace(drop_cache=False)) as work:
            return {name: function(name, work) for name in wanted}

    def one(name: str) -> T:
        with closing(Workspace(drop_cache=False)) as work, np.errstate(all="ignore"):
            return function(name, work)

    with one_thread():
        return dict(zip(wanted, in_threads(one, wanted, SAMPLES_AT_ONCE), strict=True))
