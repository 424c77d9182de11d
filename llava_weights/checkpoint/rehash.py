"""Files read once, front to back, in little memory: digests of the file and of each tensor in it, zip CRC-32s, inf and NaN.

A file is read in windows of 8 MiB into two buffers in turn: while one is filled from the disk, the other is digested. Each digest and
each scan is a lane, which gets the windows in file order; lanes run in parallel, since digests, zlib and numpy release the GIL.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..events import Listener, Progress, Started, silent
from ..formats.folder import same_header
from ..storage.digests import FILES, TENSORS, Digest, new_digest
from ..storage.reading import CHECK_DISK, Record, SourceFile, Workspace, check_crcs, crc_errors, steady, touched
from ..storage.threads import Shield, in_threads
from ..tensors.dtypes import ITEMSIZE, one_thread, raw_bits
from ..tensors.holes import Watch, hole_sentences
from ..tensors.lazy import LazyTensor, Stored
from ..tensors.windows import WINDOW_BYTES, row_ranges
from .manifest import GIT, TensorEntry

SCAN_VALUES = 1 << 17  # scanned at once: with their copy they stay in the processor's cache

Values = tuple[str, tuple[int, ...], str]  # dtype, shape, digest

# The bits that are all ones in every inf and NaN and in no other value. F8_E4M3 has no inf.
NOT_FINITE = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7, "F8_E5M2": 0x7C, "F8_E4M3": 0x7F}


@dataclass(frozen=True)
class Reading:
    """Digests and findings of the files that were read. A file that could not be read to its end has no digest, nor have its tensors.

    `tensors` have digests by `algorithm`; `by` gives them with those of another one that was asked for.
    """

    files: Mapping[str, Mapping[str, str]]  # name -> algorithm -> hex digest
    tensors: Mapping[str, TensorEntry]
    non_finite: Mapping[str, int]  # tensor -> how many values are inf or NaN, where there are any
    damaged: Mapping[str, str]  # file -> why it could not be read
    broken: Mapping[str, list[str]]  # .bin file -> tensors whose zip record does not have the CRC-32 that its writer took
    nbytes: int
    holes: tuple[str, ...] = ()  # sentences on zeros where values should be
    algorithm: str = TENSORS
    digests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # tensor -> algorithm -> hex digest

    def by(self, algorithm: str) -> Reading:
        """The same with the tensors' digests by `algorithm`. Raises KeyError where they were not asked for when it was read."""
        if algorithm == self.algorithm:
            return self
        entries = {name: replace(entry, digest=self.digests[name][algorithm], algorithm=algorithm) for name, entry in self.tensors.items()}
        return replace(self, tensors=entries, algorithm=algorithm)


@dataclass
class _Range:
    """The digests and the count of inf and NaN of a tensor, while its bytes are read."""

    dtype: str
    digests: Mapping[str, Digest]
    non_finite: int = 0
    tail: bytes = b""

    @property
    def found(self) -> dict[str, str]:
        """algorithm -> hex digest"""
        return {algorithm: digest.hexdigest() for algorithm, digest in self.digests.items()}

    def scan(self, piece: memoryview) -> None:
        """Count inf and NaN; a value that two windows share is joined first."""
        size = ITEMSIZE[self.dtype]
        missing = -len(self.tail) % size
        self.tail += bytes(piece[:missing])
        if len(self.tail) == size:
            self.non_finite += inf_and_nan(self.tail, self.dtype)
            self.tail = b""
        whole = len(piece[missing:]) // size * size
        self.non_finite += inf_and_nan(piece[missing : missing + whole], self.dtype)
        self.tail += bytes(piece[missing + whole :])


@dataclass
class _Crc:
    value: int = 0

    def add(self, piece: memoryview) -> None:
        self.value = zlib.crc32(piece, self.value)


class _Lane:
    """Gives each taker the part of every window that lies in its range of bytes. Windows come in file order."""

    def __init__(self, takers: Iterable[tuple[tuple[int, int], Callable[[memoryview], None]]]) -> None:
        self.waiting = sorted(takers, key=lambda taker: taker[0], reverse=True)
        self.active: list[tuple[tuple[int, int], Callable[[memoryview], None]]] = []

    def feed(self, start: int, data: memoryview) -> None:
        stop = start + len(data)
        while self.waiting and self.waiting[-1][0][0] < stop:
            self.active.append(self.waiting.pop())
        for (begin, end), take in self.active:
            take(data[max(begin - start, 0) : min(end, stop) - start])
        self.active = [taker for taker in self.active if taker[0][1] > stop]


def inf_and_nan(raw: bytes | memoryview, dtype: str) -> int:
    """How many of these values are inf or NaN, counted on the integers of their bits; 0 for dtypes that have neither."""
    if dtype not in NOT_FINITE:
        return 0
    values, count = raw_bits(raw, dtype), 0
    ones = values.dtype.type(NOT_FINITE[dtype])
    for first in range(0, len(values), SCAN_VALUES):
        bits = values[first : first + SCAN_VALUES] & ones
        if bits.max() == ones:
            count += int(np.count_nonzero(bits == ones))
    return count


class Rehash:
    """One run over a set of files. An interrupt ends `read` after the current windows."""

    def __init__(
        self,
        algorithms: Sequence[str],
        jobs: int,
        on_event: Listener = silent,
        watch: Watch | None = None,
        window: int = WINDOW_BYTES,
        tensor_algorithms: Sequence[str] = (TENSORS,),
    ) -> None:
        self.algorithms, self.jobs, self.on_event, self.watch, self.window = algorithms, jobs, on_event, watch, window
        self.tensor_algorithms = tensor_algorithms
        self.stop, self.turn, self.nbytes = threading.Event(), threading.Lock(), 0
        self.entries: dict[str, TensorEntry] = {}
        self.digests: dict[str, Mapping[str, str]] = {}
        self.non_finite: dict[str, int] = {}
        self.damaged: dict[str, str] = {}
        self.broken: dict[str, list[str]] = defaultdict(list)
        self.names: dict[str, str] = {}

    def read(self, files: Mapping[str, Path], tensors: Mapping[str, LazyTensor]) -> Reading:
        self.names = {os.path.abspath(path): name for name, path in files.items()}
        inside: dict[str, dict[str, Stored]] = {path: {} for path in self.names}
        made = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, Stored) and tensor.file.path in inside:
                inside[tensor.file.path][name] = tensor
            else:
                made[name] = tensor
        sizes = {name: size_of(path) for name, path in files.items()}
        largest_first = sorted(files, key=lambda name: -sizes[name])
        if total := sum(sizes.values()) + sum(tensor.nbytes for tensor in made.values()):
            self.on_event(Started(len(files), total, what="Reading"))

        def one(name: str) -> dict[str, str]:
            return self._file(name, files[name], inside[os.path.abspath(files[name])], lanes)

        with one_thread(), Shield(), ThreadPoolExecutor(2 * self.jobs) as lanes:
            found = dict(zip(largest_first, in_threads(one, largest_first, self.jobs, stop=self.stop.set), strict=True))
            in_threads(self._made, made.items(), self.jobs, stop=self.stop.set)
        ordered = {name: self.entries[name] for name in tensors if name in self.entries}
        known = {name: found[name] for name in files if name not in self.damaged}
        holes = hole_sentences(hole.text for hole in sorted(self.watch.found)) if self.watch else ()
        first = self.tensor_algorithms[0]
        return Reading(known, ordered, self.non_finite, self.damaged, self.broken, self.nbytes, holes, first, self.digests)

    def _range(self, tensor: LazyTensor) -> _Range:
        return _Range(tensor.dtype, {algorithm: new_digest(algorithm) for algorithm in self.tensor_algorithms})

    def _file(self, name: str, path: Path, tensors: Mapping[str, Stored], lanes: Executor) -> dict[str, str]:
        """Digests of one file by algorithm; what is found of its tensors is kept in this object."""
        ranges: dict[tuple[int, int], _Range] = {}
        records: dict[Record, _Crc] = {}
        for tensor in tensors.values():
            ranges.setdefault(_place(tensor), self._range(tensor))
            if tensor.record:
                records.setdefault(tensor.record, _Crc())
        try:
            file = next((tensor.file for tensor in tensors.values()), None) or SourceFile.at(path)
            whole = {algorithm: _new(algorithm, file.size) for algorithm in self.algorithms}
            work = [_Lane([((0, file.size), digest.update)]) for digest in whole.values()]
            for algorithm in self.tensor_algorithms:
                work += [_Lane([(place, found.digests[algorithm].update) for place, found in ranges.items()])]
            work += [_Lane([(place, found.scan) for place, found in ranges.items() if found.dtype in NOT_FINITE])]
            work += [_Lane([((record.offset, record.offset + record.size), crc.add) for record, crc in records.items()])]
            self._pass(file, name, work, lanes)
        except InputError as error:
            self.damaged[name] = error.what
            return {}
        for tensor_name, tensor in tensors.items():
            found = ranges[_place(tensor)]
            self._found(tensor_name, tensor, found, name)
        bad = {record for record, crc in records.items() if crc.value != record.crc32}
        if bad:
            self.broken[name] = [tensor_name for tensor_name, tensor in tensors.items() if tensor.record in bad]
        return {algorithm: digest.hexdigest() for algorithm, digest in whole.items()}

    def _pass(self, file: SourceFile, name: str, work: Sequence[_Lane], lanes: Executor) -> None:
        """Feed every window of the file to every lane; the next window is read while the lanes work on the one before."""
        size = min(self.window, file.size)
        with closing(Workspace()) as workspace, workspace.scratch(size) as one, workspace.scratch(size) as other:
            busy: list[Future[None]] = []
            try:
                for number, start in enumerate(range(0, file.size, self.window)):
                    window = (one, other)[number % 2][: min(self.window, file.size - start)]
                    workspace.read(file, start, window)
                    if self.watch:
                        self.watch.look(file, start, window, workspace)
                    _wait(busy)
                    if self.stop.is_set():
                        break
                    busy = [lanes.submit(lane.feed, start, window) for lane in work]
                    self._advance(len(window), name)
            finally:
                _wait(busy)
            workspace.recheck_sources()

    def _made(self, item: tuple[str, LazyTensor]) -> None:
        """Digest a tensor that is joined or reordered (Meta's layout), or whose file is not read as a whole: its rows are made, which reads
        its own bytes."""
        name, tensor = item
        found, first = self._range(tensor), tensor.leaves()[0].file
        shard = self.names.get(first.path, first.name)
        with closing(Workspace(watch=self.watch)) as workspace:
            try:
                for rows in made_rows(tensor, workspace):
                    for digest in found.digests.values():
                        digest.update(rows)
                    found.non_finite += inf_and_nan(rows, tensor.dtype)
                    self._advance(len(rows), shard)
                    if self.stop.is_set():
                        return
            except InputError as error:
                self.damaged[shard] = error.what
                return
            with self.turn:
                for file, _ in crc_errors([workspace]):
                    self.broken[self.names.get(file.path, file.name)].append(name)
        self._found(name, tensor, found, shard)

    def _found(self, name: str, tensor: LazyTensor, found: _Range, file: str) -> None:
        first, self.digests[name] = self.tensor_algorithms[0], found.found
        self.entries[name] = TensorEntry(name, tensor.dtype, tensor.shape, tensor.nbytes, found.found[first], file, first)
        if found.non_finite:
            self.non_finite[name] = found.non_finite

    def _advance(self, nbytes: int, name: str) -> None:
        with self.turn:
            self.nbytes += nbytes
            self.on_event(Progress(self.nbytes, name))


def rehash(
    files: Mapping[str, Path],
    tensors: Mapping[str, LazyTensor],
    *,
    algorithms: Sequence[str] = (FILES,),
    tensor_algorithms: Sequence[str] = (TENSORS,),
    jobs: int = 2,
    on_event: Listener = silent,
    watch: Watch | None = None,
) -> Reading:
    """Read `files` (by their names in messages) once, `jobs` at a time, and digest them and the `tensors` that lie in them.

    `algorithms` are of the files, `tensor_algorithms` of the tensors, the first of them that of `Reading.tensors`. A tensor whose file is
    not among `files` is read alone. Takes 16 MiB of memory a job. A file that can't be read, or changes meanwhile, is in `damaged`.
    `watch`, which must accept holes, sees every byte.
    """
    begun = {name: SourceFile.at(path) for name, path in files.items() if path.exists()}
    indexed = {leaf.file for tensor in tensors.values() for leaf in tensor.leaves()}

    def read() -> Reading:
        return Rehash(algorithms, jobs, on_event, watch, tensor_algorithms=tensor_algorithms).read(files, tensors)

    found = read()
    there = [file for file in (*begun.values(), *indexed) if file.remote or os.path.exists(file.path)]  # others are in `damaged`
    if not (moved := touched(there)):
        return found
    again = read()
    if again == found and all(map(same_header, moved)):
        return again
    names = {name for name, path in files.items() if os.path.abspath(path) in {file.path for file in moved}}
    damaged = {name: f"`{name}` changed while it was being read, in size and time the same" for name in names}
    kept = {name: digests for name, digests in again.files.items() if name not in names}
    return replace(again, files=kept, damaged={**damaged, **again.damaged})


def digests(
    tensors: Mapping[str, LazyTensor], *, algorithm: str = TENSORS, jobs: int = 2, on_event: Listener = silent
) -> dict[str, Values]:
    """dtype, shape and digest by `algorithm` of the values of each tensor, made `jobs` at a time in windows of rows."""
    on_event(Started(len(tensors), sum(tensor.nbytes for tensor in tensors.values()), what="Making"))
    done, turn = [0], threading.Lock()

    def digest(item: tuple[str, LazyTensor]) -> Values:
        name, tensor = item
        found = new_digest(algorithm)
        with closing(Workspace()) as work:
            for rows in made_rows(tensor, work):
                found.update(rows)
            work.recheck_sources()
            check_crcs([work])
        with turn:
            done[0] += tensor.nbytes
            on_event(Progress(done[0], name))
        return tensor.dtype, tensor.shape, found.hexdigest()

    leaves = {leaf.file for tensor in tensors.values() for leaf in tensor.leaves()}
    with one_thread():
        return steady(lambda: dict(zip(tensors, in_threads(digest, tensors.items(), jobs), strict=True)), leaves, same_header)


def made_rows(tensor: LazyTensor, work: Workspace) -> Iterator[memoryview]:
    """The values of a tensor, window by window; each is overwritten by the next."""
    for start, stop in row_ranges(tensor, WINDOW_BYTES):
        with work.scratch((stop - start) * tensor.row_nbytes) as rows:
            tensor.rows_into(rows, start, stop, work)
            yield rows


def digest_file(path: Path) -> str:
    """The sha256 of a file, in 8 MiB of memory. Raises InputError where it can't be read, or changes meanwhile."""
    found = Rehash((FILES,), 1, window=WINDOW_BYTES // 2).read({path.name: path}, {})
    for what in found.damaged.values():
        raise InputError(what, facts={"file": path}, hint=CHECK_DISK)
    return found.files[path.name][FILES]


def size_of(path: Path) -> int:
    """The bytes of a file, 0 where it is gone meanwhile, which reading it will report."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _place(tensor: Stored) -> tuple[int, int]:
    return tensor.offset, tensor.offset + tensor.nbytes


def _new(algorithm: str, size: int) -> Digest:
    digest = new_digest("sha1" if algorithm == GIT else algorithm)
    if algorithm == GIT:
        digest.update(b"blob %d\0" % size)
    return digest


def _wait(busy: Iterable[Future[None]]) -> None:
    for future in busy:
        future.result()
