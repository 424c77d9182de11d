"""The data of a shard cut into windows, the pieces of work: a few MiB each, on row borders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import InputError
from ..storage.reading import Workspace
from .lazy import LazyTensor

MiB = 1 << 20
WINDOW_BYTES = 8 * MiB  # measured: 4 to 8 MiB are the fastest, 16 and more leave the processor's cache


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a tensor, at byte `at` of its window."""

    name: str
    tensor: LazyTensor
    start: int
    stop: int
    at: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.tensor.row_nbytes


@dataclass(frozen=True)
class Window:
    """A contiguous range of the output file, made in one go."""

    offset: int
    nbytes: int
    pieces: tuple[Piece, ...]


def cut(tensors: Iterable[tuple[str, LazyTensor]], start: int, size: int) -> Iterator[Window]:
    """Cut tensors that lie end to end from file offset `start` into windows of about `size` bytes.

    Small neighbours share a window, large tensors are split.
    """
    pieces: list[Piece] = []
    filled = 0
    for name, tensor in tensors:
        for first, last in row_ranges(tensor, size):
            nbytes = (last - first) * tensor.row_nbytes
            if pieces and filled + nbytes > size:
                yield Window(start, filled, tuple(pieces))
                start, pieces, filled = start + filled, [], 0
            pieces.append(Piece(name, tensor, first, last, filled))
            filled += nbytes
    if pieces:
        yield Window(start, filled, tuple(pieces))


def row_ranges(tensor: LazyTensor, size: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about `size` bytes, in multiples of the tensor's row unit; (0, 0) for a tensor without rows.

    The last range is never less than a unit, nor a single row: such a rest belongs to the range before it, since low_rank.py makes it
    together with the last whole unit (a product of few rows uses another kernel and gets other bits).
    """
    unit = tensor.row_unit
    step = max(size // max(tensor.row_nbytes * unit, 1) * unit, unit, 2)
    start = stop = 0
    while start < tensor.rows or stop == start == tensor.rows == 0:
        stop = min(start + step, tensor.rows)
        if tensor.rows - stop < max(unit, 2):
            stop = tensor.rows
        yield start, stop
        if stop == tensor.rows:
            return
        start = stop


def make(window: Window, out: memoryview, workspace: Workspace) -> None:
    """Fill `out` with the window's rows. Raises InputError naming the tensor where arithmetic made an inf or a NaN."""
    for piece in window.pieces:
        piece.tensor.rows_into(out[piece.at : piece.at + piece.nbytes], piece.start, piece.stop, workspace)
        if workspace.tallies["non_finite"]:
            raise InputError(
                f"`{piece.name}` would hold inf or NaN",
                facts={"rows": f"{piece.start} to {piece.stop}", "dtype": piece.tensor.dtype},
                hint="an input is damaged or does not belong to the others: check both with `llava-weights inspect`",
            )
