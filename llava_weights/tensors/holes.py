"""Zeros where values should be: what a preallocated, half-downloaded file or a lost block of a disk leaves.

A hole is a run of zero bytes over whole rows of matrices that is one of these:
- it ends inside a row, and the zeros in that row are more than chance allows, by the zeros in the rest of the tensor;
- it has several rows and ends on a 4 KiB border of the file;
- it covers a matrix and goes on in another;
- it is a whole matrix, and the matrices of the same name in other layers are not zero.
Zero rows that end on row borders are else no hole: padding and never-seen tokens of a vocabulary, frozen modules in a delta.

`Watch.survey` looks at local files before anything is written: holes of the file system, 256 samples a file, one row of each matrix;
files up to 16 MiB whole. `Watch.look` sees every byte while it streams, and costs one comparison a row.
"""

from __future__ import annotations

import errno
import math
import os
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..errors import InputError
from ..families.layouts import TABLE_ROWS
from ..storage.reading import Record, SourceFile, Workspace, check_crcs
from .dtypes import ITEMSIZE, raw_bits
from .lazy import FLOATS, Stored

PAGE = 4096  # bytes: what file systems, block devices and downloaders write at once
# log10 of the chance below which the ends of a run are not those of values: a delta of a 13B may have 1e6 runs of zero rows, a model 1000.
TELLING_DELTA, TELLING = -9.0, -6.0
NEAR = 16 << 10  # bytes, or three rows if they are more, that are read around a run to find its ends
WHOLE_FILE_BYTES = 16 << 20  # a file with no more bytes of tensors than this is read whole beforehand
SAMPLES = 256  # of a larger file: a contiguous hole of 1 % is hit at least twice
SEGMENTS = 1000  # holes of the file system that are looked at, in one file
LOOK_BYTES = 1 << 20
NARROW = 16  # bytes: zero rows shorter than this say nothing
TEXTURE_ROWS, TEXTURE_BYTES = 256, 1 << 20
MORE_ROWS, BEGINNING = 16, 512  # rows, and bytes of each, that are looked at before a matrix is read whole
LISTED, MORE = 8, "more ranges of zeros where values should be"
DOWNLOAD_OR_ACCEPT = "download or copy the file again; if the zeros are meant, pass `--accept-values`"


@dataclass(frozen=True, order=True)
class Hole:
    """Zero bytes [start, stop) of a file, the tensors and rows that they cover, and why they are no values."""

    path: str
    start: int
    stop: int
    where: str
    why: str

    @property
    def text(self) -> str:
        return f"`{os.path.basename(self.path)}` holds zeros in bytes {self.start:,} to {self.stop:,}, {self.where}: {self.why}"

    def error(self) -> InputError:
        facts = {"file": self.path, "bytes": f"{self.start:,} to {self.stop:,}", "evidence": self.why}
        return InputError(
            f"`{os.path.basename(self.path)}` holds zeros where values should be, {self.where}", facts=facts, hint=DOWNLOAD_OR_ACCEPT
        )


@dataclass(frozen=True)
class _Texture:
    """Sampled rows of a tensor that are not zero as a whole: how many of their elements are zero, and how many zeros at each end."""

    zeros: int
    elements: int
    sparse: float  # share of rows with more zeros than values
    leading: np.ndarray
    trailing: np.ndarray


class Watch:
    """Looks for holes in the inputs of a piece of work, knowing which tensors lie where. Picklable, used by many threads.

    `roles` gives "delta" or "lora" for the files that hold differences, by path; others hold values. `look` and `survey` raise
    InputError for a hole; with `accept` they add it to `found`.
    """

    def __init__(self, leaves: Iterable[tuple[str, Stored]], roles: Mapping[str, str] | None = None, *, accept: bool = False) -> None:
        self.accept, self.roles = accept, dict(roles or {})
        inside: defaultdict[SourceFile, dict[tuple[int, int], tuple[str, Stored]]] = defaultdict(dict)
        for name, leaf in leaves:
            if leaf.nbytes:
                inside[leaf.file].setdefault((leaf.offset, leaf.nbytes), (leaf.name or name, leaf))
        self.places = {file: [found[key] for key in sorted(found)] for file, found in inside.items()}
        self.found: set[Hole] = set()
        self.starts = {file: [leaf.offset for _, leaf in leaves] for file, leaves in self.places.items()}
        self.siblings: defaultdict[tuple[str, str], list[Stored]] = defaultdict(list)
        for file, leaves in self.places.items():
            for name, leaf in leaves:
                if is_matrix(leaf):
                    self.siblings[self.roles.get(file.path, ""), numberless(name)].append(leaf)
        self._textures: dict[tuple[SourceFile, int], _Texture] = {}
        self._wholes: dict[tuple[SourceFile, int], Hole | None] = {}
        self._seeming: dict[tuple[SourceFile, int], bool] = {}

    def within(self, files: Container[SourceFile]) -> Watch:
        """The same for these files only."""
        leaves = (pair for file, pairs in self.places.items() if file in files for pair in pairs)
        return Watch(leaves, {file.path: self.roles.get(file.path, "") for file in self.places if file in files}, accept=self.accept)

    def __reduce__(self) -> tuple[object, ...]:
        leaves = [pair for pairs in self.places.values() for pair in pairs]
        return partial(Watch, accept=self.accept), (leaves, self.roles)

    def holds_values(self, file: SourceFile) -> bool:
        """Whether zero rows are strange in this file: it holds no differences."""
        role = self.roles.get(file.path, "")
        return role != "delta" and not role.startswith("lora")

    def _least(self, file: SourceFile) -> int:
        """Whole rows in a run that is judged: of differences, single rows are zero too often."""
        return 1 if self.holds_values(file) else 2

    def fresh(self) -> Watch:
        """The same with nothing found, for another piece of the work."""
        other = copy(self)
        other.found = set()
        return other

    # --- every byte ---------------------------------------------------------------------------------------------------

    def look(self, file: SourceFile, offset: int, data: memoryview, work: Workspace) -> None:
        """See the bytes of `file` from `offset` on. Raises InputError for a hole that begins, ends or lies in them."""
        at = max(bisect_right(self.starts.get(file, []), offset) - 1, 0)
        for name, leaf in self.places.get(file, [])[at:]:
            if leaf.offset >= offset + len(data):
                return
            if is_matrix(leaf):
                self._look_at(name, leaf, offset, data, work)

    def _look_at(self, name: str, leaf: Stored, offset: int, data: memoryview, work: Workspace) -> None:
        width = row_width(leaf)
        first = max(-(-(offset - leaf.offset) // width), 0)
        count = min(leaf.nbytes, offset + len(data) - leaf.offset) // width - first
        if count <= 0:
            return
        at = leaf.offset + first * width - offset
        zero = np.ndarray((count,), "<u8", data, at, (width,)) == 0  # the first eight bytes of each row
        if not zero.any():
            return
        rows = np.frombuffer(data, np.uint8, count * width, at).reshape(count, width)
        least = self._least(leaf.file)
        for begin, end in _groups(zero):
            if end - begin >= least or begin == 0 or end == count:
                for low, high in _groups(rows[begin:end].max(axis=1) == 0):
                    low, high = begin + low, begin + high
                    if high - low >= least or low == 0 or high == count:
                        self._weigh(name, leaf, first + low, first + high, offset, data, work)

    def _weigh(self, name: str, leaf: Stored, low: int, high: int, offset: int, data: memoryview, work: Workspace) -> None:
        """Rows [low, high) are zero. Judge them, unless `data` shows that both ends are row borders."""
        start, stop = (leaf.offset + row * row_width(leaf) for row in (low, high))
        if low == 0 and self.holds_values(leaf.file):
            self._judge_whole(name, leaf, work)
        size, pages = ITEMSIZE[leaf.dtype], self.holds_values(leaf.file) and not is_table(name)
        left = data[start - size - offset : start - offset] if start - size >= max(offset, leaf.offset) else b""
        right = data[stop - offset : stop + size - offset] if stop < leaf.offset + leaf.nbytes else b""
        clean = any(left) and any(right)
        if not clean or (pages and not (start % PAGE and stop % PAGE)):
            self._judge(leaf.file, start, stop, work)

    # --- before the first byte ----------------------------------------------------------------------------------------

    def survey(self) -> None:
        """Look for holes in the local files, as far as that is cheap. Raises InputError for one, or a damaged zip record."""
        with closing(Workspace(drop_cache=False)) as work:
            for file, leaves in self.places.items():
                if file.remote:
                    continue
                low, high = leaves[0][1].offset, max(leaf.offset + leaf.nbytes for _, leaf in leaves)
                if high - low <= WHOLE_FILE_BYTES:
                    self._read_whole(file, low, high, work)
                else:
                    self._seek(file, low, high, work)
                    self._sample(file, low, high, work)
                for name, leaf in leaves:
                    if is_matrix(leaf) and self.holds_values(file) and (self.accept or high - low > WHOLE_FILE_BYTES):
                        self._judge_whole(name, leaf, work)

    def _read_whole(self, file: SourceFile, low: int, high: int, work: Workspace) -> None:
        buffer = memoryview(bytearray(min(LOOK_BYTES, high - low)))
        for at in range(low, high, LOOK_BYTES):
            data = buffer[: min(LOOK_BYTES, high - at)]
            work.read(file, at, data)
            self.look(file, at, data, work)
        records: set[Record] = {leaf.record for _, leaf in self.places[file] if leaf.record and leaf.record.size <= WHOLE_FILE_BYTES}
        for record in records:
            with work.scratch(record.size) as data:
                work.read(file, record.offset, data)
                work.take_crc(file, record, record.offset, data)
        check_crcs([work])
        work.crc_pieces.clear()

    def _seek(self, file: SourceFile, low: int, high: int, work: Workspace) -> None:
        """The holes of the file system: ranges that were never written."""
        for number, (start, stop) in enumerate(_never_written(file, low, high)):
            if number == SEGMENTS:
                return
            for at in {start, max(start, stop - PAGE)}:
                self._judge(file, at, min(at + PAGE, stop), work)

    def _sample(self, file: SourceFile, low: int, high: int, work: Workspace) -> None:
        """Read 4 KiB at even distances. Where one of two neighbours is zero, find the border between them by halving the distance."""
        places = [low + (high - low - PAGE) * number // (SAMPLES - 1) for number in range(SAMPLES)]
        zero = [_is_zero(file, place, place + PAGE, work) for place in places]
        for one, other in zip(range(SAMPLES - 1), range(1, SAMPLES), strict=True):
            if zero[one] != zero[other]:
                filled, empty = (places[other], places[one]) if zero[one] else (places[one], places[other])
                while abs(empty - filled) > 1024:
                    middle = (filled + empty) // 2
                    filled, empty = (filled, middle) if _is_zero(file, middle, middle + PAGE, work) else (middle, empty)
                self._judge(file, empty, empty + PAGE, work)

    # --- judgement ----------------------------------------------------------------------------------------------------

    def _judge(self, file: SourceFile, start: int, stop: int, work: Workspace) -> None:
        """Bytes [start, stop) are zero: find the ends of their run, if they are near, and see whether it is a hole.

        An end that is far from here is judged by whoever looks at the rows there.
        """
        if self._known(file, start, stop):
            return
        width = max((row_width(leaf) for _, leaf in self._around(file, start, stop) if is_matrix(leaf)), default=0)
        least = self._least(file)
        enough = sum(high - low for *_, low, high in self._rows_in(file, start, stop)) >= least
        reach = width if file.remote and enough else max(NEAR, 3 * width)
        start, begun = _backward(file, start, reach, work)
        stop, ended = _forward(file, stop, reach, work)
        count = sum(high - low for *_, low, high in self._rows_in(file, start, stop))
        if count < least:
            return
        left, page_before = self._end(file, start, False, work) if begun else (0.0, False)
        right, page_after = self._end(file, stop, True, work) if ended else (0.0, False)
        if left + right <= (TELLING if self.holds_values(file) else TELLING_DELTA):
            why = "they end inside a row"
        elif count > 1 and (page_before or page_after):
            why = "they end on a 4 KiB border of the file"
        elif self.holds_values(file) and self._runs_over(file, start, stop):
            why = "they cover one matrix and end in another"
        else:
            return
        self._report(self._hole(file, start, stop, why, work))

    def _runs_over(self, file: SourceFile, start: int, stop: int) -> bool:
        """Whether the zeros cover a matrix from its first row to its last, and a part of another one that is no vocabulary table."""
        covered = [
            (name, leaf, (low, high) == (0, leaf.nbytes // row_width(leaf))) for name, leaf, low, high in self._rows_in(file, start, stop)
        ]
        return any(whole for *_, whole in covered) and any(not whole and not is_table(name) for name, _, whole in covered)

    def _known(self, file: SourceFile, start: int, stop: int) -> bool:
        return any(hole.path == file.path and hole.start <= start and stop <= hole.stop for hole in self.found)

    def _hole(self, file: SourceFile, start: int, stop: int, why: str, work: Workspace) -> Hole:
        """The hole that zero bytes [start, stop) are part of, from its first byte to its last; of a remote file, as far as it was read."""
        for low, high in _never_written(file, 0, file.size):
            if low < stop and start < high:
                start, stop = min(start, low), max(stop, high)
        if not file.remote:
            start, stop = _backward(file, start, file.size, work)[0], _forward(file, stop, file.size, work)[0]
        rows = [f"rows {low:,} to {high:,} of `{name}`" for name, _, low, high in self._rows_in(file, start, stop)]
        more = f" and in {len(rows) - 3:,} more tensors" if len(rows) > 3 else ""
        return Hole(file.path, start, stop, "in " + ", ".join(rows[:3]) + more, why)

    def _end(self, file: SourceFile, at: int, right: bool, work: Workspace) -> tuple[float, bool]:
        """The right or left end of a run, at byte `at`: log10 of the chance that values end there, and whether it lies on a 4 KiB border
        where none is expected."""
        inside = self._at(file, at if right else at - 1)
        if inside is None:
            return 0.0, False
        name, leaf = inside
        size, width = ITEMSIZE[leaf.dtype], row_width(leaf)
        if leaf.dtype not in FLOATS or at in (leaf.offset, leaf.offset + leaf.nbytes):
            return 0.0, False
        beyond = at % PAGE if right else -at % PAGE  # the value behind a border may begin with a zero byte
        page = beyond < size and is_matrix(leaf) and self.holds_values(file) and not is_table(name)
        row = (at if right else at - 1) - leaf.offset
        row -= row % width
        count = (at - leaf.offset - row if right else leaf.offset + row + width - at) // size
        return (self._chance(name, leaf, row, count, right, work) if count else 0.0), page

    def _chance(self, name: str, leaf: Stored, row: int, count: int, leading: bool, work: Workspace) -> float:
        """log10 of the chance that the row at byte `row` of a tensor has `count` zeros at this end, by the zeros among its other elements
        and in other rows. 0 where another row has them in the same place: padded columns, blocks of zeros."""
        raw = bytearray(row_width(leaf))
        work.read(leaf.file, leaf.offset + row, memoryview(raw))
        values = raw_bits(raw, leaf.dtype)
        rest, filled = len(values) - count, int(np.count_nonzero(values))
        zeros, seen = rest - filled, rest
        if not is_matrix(leaf):
            return count * math.log10((zeros + 1) / (seen + 1))
        texture = self._texture(leaf, work)
        if np.count_nonzero((texture.leading if leading else texture.trailing) >= count) > 1:  # one may be this row
            return 0.0
        shares = [(zeros + texture.zeros + 1) / (seen + texture.elements + 1)]
        if zeros:
            shares.append((zeros + 1) / (seen + 1))
        chance = count * math.log10(max(shares))
        if filled * 2 < len(values) and (is_table(name) or not self.holds_values(leaf.file)):
            # Or it is the row of a token that was seldom seen, with few values, and all of them happen to stand at its other end.
            chance = max(chance, math.log10(texture.sparse) + _log_choices(rest, filled) - _log_choices(len(values), filled))
        return chance

    def _texture(self, leaf: Stored, work: Workspace) -> _Texture:
        """The texture of evenly spaced rows, without zero ones. The two with the most zeros, which a hole may have cut, do not count
        among the elements."""
        key = leaf.file, leaf.offset
        if key not in self._textures:
            width = row_width(leaf)
            rows = leaf.nbytes // width
            wanted = max(min(rows, TEXTURE_ROWS, TEXTURE_BYTES // width), min(rows, 8))
            raw, zeros, leading, trailing, elements = bytearray(width), [], [], [], width // ITEMSIZE[leaf.dtype]
            for row in sorted({number * (rows - 1) // max(wanted - 1, 1) for number in range(wanted)}):
                work.read(leaf.file, leaf.offset + row * width, memoryview(raw))
                filled = np.flatnonzero(raw_bits(raw, leaf.dtype))  # -0.0 counts as a value: it has a bit set, which a hole has not
                if len(filled):
                    zeros.append(elements - len(filled))
                    leading.append(int(filled[0]))
                    trailing.append(elements - 1 - int(filled[-1]))
            counted = sorted(zeros)[:-2]
            sparse = (sum(2 * found > elements for found in zeros) + 1) / (len(zeros) + 1)
            ends = np.array(leading), np.array(trailing)
            self._textures[key] = _Texture(sum(counted), len(counted) * elements, sparse, *ends)
        return self._textures[key]

    def _judge_whole(self, name: str, leaf: Stored, work: Workspace) -> None:
        """Report a matrix that is zero as a whole and should not be."""
        key, stop = (leaf.file, leaf.offset), leaf.offset + leaf.nbytes
        if self._known(leaf.file, leaf.offset, stop):
            return
        if key not in self._wholes:
            why = self._whole(name, leaf, work)
            self._wholes[key] = self._hole(leaf.file, leaf.offset, stop, why, work) if why else None
        if hole := self._wholes[key]:
            self._report(hole)

    def _whole(self, name: str, leaf: Stored, work: Workspace) -> str:
        """Why a matrix is a hole as a whole; empty where it is not zero, or may be."""
        if not self._is_zero(leaf, work):
            return ""
        role = self.roles.get(leaf.file.path, "")
        others = [other for other in self.siblings[role, numberless(name)] if other is not leaf]
        filled = [other for other in others if not self._seems_zero(other, work)]
        if filled:
            return f"`{name}` is zero as a whole, and {len(filled):,} of the same name in other layers or files are not"
        if is_table(name):
            return f"the table `{name}` is zero as a whole"
        every = (other for (kind, _), group in self.siblings.items() if kind == role for other in group)
        return "every matrix is zero" if all(self._seems_zero(other, work) for other in every) else ""

    def _is_zero(self, leaf: Stored, work: Workspace) -> bool:
        """Whether a tensor is zero; of a remote one by samples, not to read it twice."""
        start, stop = leaf.offset, leaf.offset + leaf.nbytes
        if not self._seems_zero(leaf, work) or leaf.file.remote:
            return self._seems_zero(leaf, work)
        unwritten = list(_never_written(leaf.file, start, stop))
        return [(start, stop)] == unwritten or _is_zero(leaf.file, start, stop, work)

    def _seems_zero(self, leaf: Stored, work: Workspace) -> bool:
        """Whether the beginnings of its middle, first and last row are zero, and of some more."""
        key = leaf.file, leaf.offset
        if key not in self._seeming:
            width = row_width(leaf)
            rows = leaf.nbytes // width
            chosen = dict.fromkeys((rows // 2, 0, rows - 1, *((rows - 1) * number // MORE_ROWS for number in range(MORE_ROWS))))
            starts = [leaf.offset + row * width for row in chosen]
            self._seeming[key] = all(_is_zero(leaf.file, start, start + min(width, BEGINNING), work) for start in starts)
        return self._seeming[key]

    def _report(self, hole: Hole) -> None:
        if not self.accept:
            raise hole.error()
        self.found.add(hole)

    # --- places -------------------------------------------------------------------------------------------------------

    def _at(self, file: SourceFile, position: int) -> tuple[str, Stored] | None:
        """The tensor that byte `position` belongs to."""
        number = bisect_right(self.starts[file], position) - 1
        name, leaf = self.places[file][max(number, 0)]
        return (name, leaf) if leaf.offset <= position < leaf.offset + leaf.nbytes else None

    def _around(self, file: SourceFile, start: int, stop: int) -> Iterator[tuple[str, Stored]]:
        """The tensors in a range, and those beside it."""
        first = max(bisect_right(self.starts[file], start) - 2, 0)
        for name, leaf in self.places[file][first:]:
            yield name, leaf
            if leaf.offset > stop:
                return

    def _rows_in(self, file: SourceFile, start: int, stop: int) -> Iterator[tuple[str, Stored, int, int]]:
        """The matrices of which whole rows lie in [start, stop), with the first such row and the one behind the last."""
        for name, leaf in self._around(file, start, stop):
            width = row_width(leaf)
            low = max(-(-(start - leaf.offset) // width), 0)
            high = min(stop - leaf.offset, leaf.nbytes) // width
            if is_matrix(leaf) and high > low:
                yield name, leaf, low, high


def hole_sentences(texts: Iterable[str]) -> tuple[str, ...]:
    """The first LISTED of these sentences on holes, and one that counts the others."""
    every = tuple(texts)
    return (*every[:LISTED], f"{len(every) - LISTED:,} {MORE}") if len(every) > LISTED else every


def is_matrix(leaf: Stored) -> bool:
    """Whether a tensor has rows of floats that are wide enough to be judged."""
    return leaf.dtype in FLOATS and len(leaf.shape) > 1 and NARROW <= row_width(leaf) < leaf.nbytes


def is_table(name: str) -> bool:
    """Whether a tensor is a table that may have rows of zeros."""
    return bool(re.fullmatch(TABLE_ROWS, name))


def row_width(leaf: Stored) -> int:
    """Bytes of a row: of a vector, all of it; of experts in one tensor, a row of one of them."""
    if len(leaf.shape) == 3:
        return leaf.shape[-1] * ITEMSIZE[leaf.dtype]
    return leaf.row_nbytes if len(leaf.shape) > 1 else leaf.nbytes


def numberless(name: str) -> str:
    """The name without the numbers of layers and experts."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _groups(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges [begin, end) of neighbours that are true."""
    borders = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    yield from zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True)


def _log_choices(places: int, values: int) -> float:
    """log10 of the number of ways to put so many values into so many places."""
    return (math.lgamma(places + 1) - math.lgamma(values + 1) - math.lgamma(places - values + 1)) / math.log(10)


def _read(file: SourceFile, start: int, stop: int, work: Workspace) -> np.ndarray:
    raw = bytearray(stop - start)
    work.read(file, start, memoryview(raw))
    return np.frombuffer(raw, np.uint8)


def _first_piece(file: SourceFile, reach: int) -> int:
    """Bytes that are first read beyond a run: most ends are near, but of a remote file each read is a request."""
    return min(reach, LOOK_BYTES) if file.remote else PAGE


def _forward(file: SourceFile, at: int, reach: int, work: Workspace) -> tuple[int, bool]:
    """Where the zeros that go on at byte `at` end, and whether they do so within `reach` bytes."""
    limit, piece = min(file.size, at + reach), _first_piece(file, reach)
    while at < limit:
        filled = _read(file, at, min(at + piece, limit), work) != 0
        if filled.any():
            return at + int(filled.argmax()), True
        at, piece = min(at + piece, limit), min(piece * 4, LOOK_BYTES)
    return at, at == file.size


def _backward(file: SourceFile, at: int, reach: int, work: Workspace) -> tuple[int, bool]:
    limit, piece = max(0, at - reach), _first_piece(file, reach)
    while at > limit:
        low = max(at - piece, limit)
        filled = _read(file, low, at, work)[::-1] != 0
        if filled.any():
            return at - int(filled.argmax()), True
        at, piece = low, min(piece * 4, LOOK_BYTES)
    return at, at == 0


def _is_zero(file: SourceFile, start: int, stop: int, work: Workspace) -> bool:
    return all(not _read(file, at, min(at + LOOK_BYTES, stop), work).any() for at in range(start, stop, LOOK_BYTES))


def _never_written(file: SourceFile, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Ranges within [low, high) for which the file system keeps no data; none where it can't say."""
    if file.remote or not hasattr(os, "SEEK_HOLE"):
        return
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # reading will raise it
        return
    try:
        while low < high and (start := os.lseek(fd, low, os.SEEK_HOLE)) < high:
            try:
                low = os.lseek(fd, start, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # no data behind it
                    raise
                low = high
            yield start, min(low, high)
    except OSError:  # a file system without this call
        return
    finally:
        os.close(fd)
