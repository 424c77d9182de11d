"""Reading: one `Source` for a file wherever it lies, what a worker holds while it makes rows, and how a local file is opened.

Reads are `pread` into private memory, never a memory map: a mapped file that is truncated kills the process with SIGBUS.
Large reads go past the page cache, and where they can't, it is dropped behind them: keeping three times the model there is what makes `cp`
slow. What lay in the cache before is read from there and stays, since somebody else put it there.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..errors import InputError, LlavaWeightsError, shortage
from ..text import shown
from .direct import SPARE_BYTES, read_direct
from .residency import resident_stretches

if TYPE_CHECKING:
    from .places import Place

T = TypeVar("T")
Scratch = Callable[[int], AbstractContextManager[memoryview]]
"""Gives so many bytes of page-aligned memory for a while (`Workspace.scratch`)."""
DROP_BEHIND = 64 << 10  # bytes; smaller reads stay in the page cache, where read-ahead serves their neighbours
CHECK_DISK = "check its permissions and the disk, then run the same command again"
# Bytes of page cache that are dropped at once. Each call drains lists of every processor, and one for each 8 MiB read doubled the
# kernel's share of a run (6 GB: 3.0 s, with 32 MiB 1.8 s; without dropping, 13 s).
STRETCH = 32 << 20


@dataclass(frozen=True)
class SourceFile:
    """An input file as it was when its header was read; every later read checks that it is still the same.

    `path` is a path of this machine or the address of a file that is read over the network, `size` its bytes, `mtime_ns`, `inode` and
    `ctime_ns` what the system says of it, `etag` what a server says in their place. `header_sha256` is that of the bytes that name the
    tensors, in hexadecimal.
    """

    path: str
    size: int
    mtime_ns: int
    inode: int = field(repr=False)  # no part of a plan's identity: network file systems renumber
    header_sha256: str = ""  # of the bytes that name the tensors: safetensors header, zip directory and data.pkl
    etag: str = ""
    ctime_ns: int = field(default=0, repr=False, compare=False)  # no program can set it back, as it can the mtime

    @classmethod
    def at(cls, path: Path, header_sha256: str = "") -> SourceFile:
        """The file at `path` now. Raises InputError where it can't be read."""
        try:
            return cls.of(path, os.stat(path), header_sha256)
        except OSError as error:
            raise shortage(error) or InputError(
                f"`{path.name}` can't be read: {error.strerror}", facts={"file": path}, hint=CHECK_DISK
            ) from error

    @classmethod
    def of(cls, path: Path, status: os.stat_result, header_sha256: str = "") -> SourceFile:
        """The file at `path`, which had this `status` when it was open."""
        return cls(os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ino, header_sha256, ctime_ns=status.st_ctime_ns)

    @property
    def remote(self) -> bool:
        """Whether it is read over the network."""
        return "://" in self.path

    @property
    def name(self) -> str:
        """The last part of its path."""
        return os.path.basename(self.path)

    @property
    def state(self) -> list[int]:
        """Differs after every change of the file, and after much else: chmod, a hard link, another mount of the same disk."""
        return [self.inode, self.ctime_ns]


class Source(Protocol):
    """An open file, on this machine (`LocalSource`) or over the network (`places.RemoteSource`): headers and values are read through it."""

    @property
    def identity(self) -> SourceFile:
        """The file as it was when it was opened first."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset`. Raises InputError where the file ended early or changed, HubError where the network
        fails."""

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Say which ranges will be read next: one that is far away asks for them together."""

    def check_unchanged(self) -> None:
        """Raise InputError where the file is no longer the one of `identity`."""

    def close(self) -> None:
        """Nothing is read any more."""


def read_bytes(source: Source, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`. Raises as `Source.read_into`."""
    data = bytearray(size)
    source.read_into(offset, memoryview(data))
    return bytes(data)


@dataclass(frozen=True)
class Record:
    """A zip member that holds a tensor's storage: `size` bytes at `offset`, with the CRC-32 that its writer took."""

    offset: int
    size: int
    crc32: int


class DropBehind:
    """Drops the page cache behind the reads of several threads, once they have read a stretch of a file together; not the stretches of
    which the cache held more than half when the file was opened."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.behind: dict[SourceFile, list[tuple[int, int]]] = defaultdict(list)
        self.warm: dict[SourceFile, frozenset[int]] = {}  # numbers of stretches of STRETCH bytes

    def opened(self, file: SourceFile, fd: int) -> None:
        """Note what of `file` the page cache holds before it is read; only the first call for a file looks."""
        with self.turn:
            if file not in self.warm:
                self.warm[file] = resident_stretches(fd, file.size, STRETCH)

    def is_cold(self, file: SourceFile, start: int, stop: int) -> bool:
        """Whether the page cache held little of bytes [start, stop), so that they come from the disk."""
        warm = self.warm.get(file)
        return not warm or warm.isdisjoint(range(start // STRETCH, -(-stop // STRETCH)))

    def passed(self, file: SourceFile, fd: int, start: int, stop: int, least: int = STRETCH) -> None:
        """Note that bytes [start, stop) were read, and drop every range of at least `least` bytes that reads have joined."""
        with self.turn:
            warm = self.warm.get(file, frozenset())
            joined = join_ranges((*self.behind[file], *_without(warm, start, stop)))
            self.behind[file] = [(first, last) for first, last in joined if last - first < least]
        for first, last in joined:
            if last - first >= least:
                drop_cache(fd, first, last - first)


def _without(stretches: frozenset[int], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The ranges of bytes [start, stop) that lie in none of the `stretches`, in order."""
    if not stretches:
        yield start, stop
        return
    for number in range(start // STRETCH, -(-stop // STRETCH)):
        if number not in stretches:
            yield max(start, number * STRETCH), min(stop, (number + 1) * STRETCH)


@dataclass
class LocalSource:
    """A file that is open as `fd`. Where `behind` is given, large reads go past the page cache through memory of `scratch`, or the cache is
    dropped behind them."""

    identity: SourceFile
    fd: int
    behind: DropBehind | None = None
    scratch: Scratch | None = None

    def __post_init__(self) -> None:
        if self.behind:
            self.behind.opened(self.identity, self.fd)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        if self.behind and self.scratch and len(buffer) >= DROP_BEHIND and self.behind.is_cold(self.identity, offset, offset + len(buffer)):
            with self.scratch(SPARE_BYTES) as spare, reading(self.identity):
                done = read_direct(self.fd, offset, buffer, spare)
        while done < len(buffer):
            with reading(self.identity):
                got = os.preadv(self.fd, [buffer[done:]], offset + done)
                status = None if got else os.fstat(self.fd)
            if status:
                raise changed(self.identity, status)
            done += got
        if self.behind and done >= DROP_BEHIND:
            self.behind.passed(self.identity, self.fd, offset, offset + done)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Nothing: a disk reads ahead by itself."""

    def check_unchanged(self) -> None:
        with reading(self.identity):
            status = os.fstat(self.fd)
        if (status.st_size, status.st_mtime_ns) != (self.identity.size, self.identity.mtime_ns):
            raise changed(self.identity, status)

    def close(self) -> None:
        if self.behind:
            self.behind.passed(self.identity, self.fd, 0, 0, least=1)
        os.close(self.fd)


def join_ranges(ranges: Iterable[tuple[int, int]], gap: int = 0) -> list[tuple[int, int]]:
    """Ranges in order, joined where no more than `gap` bytes lie between two."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start - joined[-1][1] <= gap:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined


class Watcher(Protocol):
    """Sees the values that are read (tensors/holes.py)."""

    def look(self, file: SourceFile, offset: int, data: memoryview, work: Workspace) -> None:
        """The bytes of `file` from `offset` on. Raises InputError where they can't be values."""


@dataclass
class Workspace:
    """Open files, scratch buffers, CRC pieces, tallies and cached values of a worker. Not shared between threads."""

    drop_cache: bool = True
    behind: DropBehind = field(default_factory=DropBehind)  # shared by the workers of a file
    stopping: threading.Event = field(default_factory=threading.Event)  # set to end waits for the network
    watch: Watcher | None = None
    tallies: Counter[str] = field(default_factory=Counter)
    crc_pieces: dict[tuple[SourceFile, Record], list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))
    _sources: dict[SourceFile, Source] = field(default_factory=dict)
    _buffers: list[memoryview] = field(default_factory=list)
    _depth: int = 0
    _latest: list[tuple[object, Any]] = field(default_factory=list)

    @contextmanager
    def scratch(self, nbytes: int) -> Iterator[memoryview]:
        """`nbytes` of page-aligned private memory, reused by the next caller at the same depth."""
        if self._depth == len(self._buffers):
            self._buffers.append(private_buffer(nbytes))
        elif len(self._buffers[self._depth]) < nbytes:
            self._buffers[self._depth] = private_buffer(nbytes)
        view = self._buffers[self._depth][:nbytes]
        self._depth += 1
        try:
            yield view
        finally:
            self._depth -= 1

    def latest(self, owner: object, make: Callable[[], T]) -> T:
        """Cache one value, such as the factors that every window of a tensor needs; a new owner evicts all but those of the tensors that
        it is an input of."""
        for known, value in self._latest:
            if known is owner:
                kept: T = value
                return kept
        around = [(known, value) for known, value in self._latest if any(owner is part for part in getattr(known, "inputs", ()))]
        self._latest = around  # the others are freed before the next one is made
        made = make()
        self._latest = [*around, (owner, made)]
        return made

    def read(self, file: SourceFile, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes of `file` from `offset`. Raises as `Source.read_into`."""
        source = self._sources.get(file)
        if source is None:
            source = self._sources[file] = open_source(file, self.behind if self.drop_cache else None, self.scratch, self.stopping)
        source.read_into(offset, out)

    def take_crc(self, file: SourceFile, record: Record, offset: int, data: memoryview) -> None:
        """Take the CRC-32 of a piece of `record`; `crc_errors` joins the pieces."""
        self.crc_pieces[file, record].append((offset - record.offset, len(data), zlib.crc32(data)))

    def recheck_sources(self) -> None:
        """Raise InputError if a file that was read has changed since it was indexed."""
        for source in self._sources.values():
            source.check_unchanged()

    def close(self) -> None:
        for source in self._sources.values():
            source.close()
        self._sources.clear()
        self._buffers.clear()
        self._latest = []


def private_buffer(nbytes: int) -> memoryview:
    """Page-aligned anonymous memory; MAP_PRIVATE because `mmap(-1, n)` alone would count as shared memory."""
    if not nbytes:
        return memoryview(bytearray())
    return memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def drop_cache(fd: int, start: int = 0, size: int = 0) -> None:
    """Drop the page cache of a range, `size` 0: up to the end. Only an advice, which a file system may ignore."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, start, size, os.POSIX_FADV_DONTNEED)


@contextmanager
def reading(file: SourceFile) -> Iterator[None]:
    """Make an InputError that names `file` of an OSError inside."""
    try:
        yield
    except OSError as error:
        raise shortage(error) or InputError(
            f"`{file.name}` can't be read: {error.strerror}", facts={"file": file.path}, hint=CHECK_DISK
        ) from error


def open_source(
    file: SourceFile, behind: DropBehind | None = None, scratch: Scratch | None = None, stopping: threading.Event | None = None
) -> Source:
    """`file`, open. Raises InputError where it is gone or no longer the file that was indexed. `stopping` ends waits for the network."""
    if file.remote:
        from .places import RemoteSource

        source: Source = RemoteSource(file, stopping)
    else:
        with reading(file):
            source = LocalSource(file, os.open(file.path, os.O_RDONLY | os.O_CLOEXEC))
    try:
        source.check_unchanged()
    except BaseException:
        source.close()
        raise
    if isinstance(source, LocalSource) and behind:
        source = LocalSource(file, source.fd, behind, scratch)
    return source


def changed(file: SourceFile, status: os.stat_result) -> InputError:
    return InputError(
        f"`{file.name}` changed while it was being read",
        facts={"file": file.path, "size": f"{file.size:,} bytes when indexed, {status.st_size:,} now"},
        hint="wait until nothing writes to the inputs, then run the same command again",
    )


def touched(files: Iterable[SourceFile]) -> set[SourceFile]:
    """The local files whose inode or change time is no longer the one at indexing."""
    return {file for file in files if not file.remote and SourceFile.at(Path(file.path)).state != file.state}


def steady(read: Callable[[], T], files: Collection[SourceFile], same_header: Callable[[SourceFile], bool]) -> T:
    """What `read` returns of `files`. Where one of them was touched, it is called again and must return the same: the content of a file
    can change while its size and time stay. Raises InputError where it does not."""
    found = read()
    moved = touched(files)
    if moved:
        again = read()
        for file in moved:
            if again != found or not same_header(file):
                raise changed(file, os.stat(file.path))
    return found


def crc_errors(workspaces: list[Workspace]) -> Iterator[tuple[SourceFile, Record]]:
    """The records whose bytes do not have the CRC-32 that the zip's writer took. Records read only in part are not judged."""
    pieces: dict[tuple[SourceFile, Record], list[tuple[int, int, int]]] = defaultdict(list)
    for workspace in workspaces:
        for key, found in workspace.crc_pieces.items():
            pieces[key] += found
    for (file, record), found in pieces.items():
        position = crc = 0
        for offset, size, piece in sorted(set(found)):
            if offset != position:
                break
            crc, position = crc32_combine(crc, piece, size), position + size
        if position == record.size and crc != record.crc32:
            yield file, record


def check_crcs(workspaces: list[Workspace]) -> None:
    """Raise InputError for the first of `crc_errors`."""
    for file, record in crc_errors(workspaces):
        raise InputError(
            f"`{file.name}` is damaged: bytes {record.offset:,} to {record.offset + record.size:,} do not match their CRC-32",
            facts={"file": file.path},
            hint="download or copy the file again",
        )


def crc32_combine(first: int, second: int, second_size: int) -> int:
    """CRC-32 of two byte strings joined, from the CRC-32 of each: zlib's C function of this name, which Python's zlib lacks."""
    # Appending n zero bytes multiplies by x^(8n) modulo the CRC polynomial, in reflected bit order; bit 31 is x^0.
    power, square, exponent = 0x80000000, 0x00800000, second_size  # x^0, x^8
    while exponent:
        if exponent & 1:
            power = _multiply(square, power)
        square, exponent = _multiply(square, square), exponent >> 1
    return _multiply(power, first) ^ second


def _multiply(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = (b >> 1) ^ (0xEDB88320 if b & 1 else 0)
    return product


DOWNLOAD_AGAIN = "download the file again, for example with `hf download`"

# The first bytes of files of other kinds, what they are, and what to do.
DISGUISES = (
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded", "run `git lfs pull` in its repository"),
    (b"<", "an HTML or XML page, not the file that its name promises", DOWNLOAD_AGAIN),
    (b"GGUF", "a GGUF file, whose weights are quantised", "give the unquantised checkpoint that it was made from"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes it", "name it `.bin`, or `.pth`, if it holds a torch checkpoint"),
    (b"\x80\x02", "a bare pickle, as torch.save wrote it before version 1.6", "download the file in safetensors format"),
)


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """A read-only descriptor of a regular file and its status. A pipe, folder or device is an InputError, and so is any OSError
    inside. Opening a pipe does not wait for its writer."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise irregular(path, status)
        yield fd, status
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        os.close(fd)


def unreadable(path: Place, error: OSError) -> LlavaWeightsError:
    """The error for a file that the operating system does not let us read."""
    if known := shortage(error):
        return known
    if error.errno == errno.ENOENT:
        return InputError(f"{shown(path.name)} does not exist", facts={"path": path}, hint="check the path, or download what is missing")
    hint = "check its permissions, its folders' and the disk, then run the same command again"
    return InputError(f"{shown(path.name)} can't be read: {error.strerror}", facts={"path": path}, hint=hint)


def irregular(path: Path, status: os.stat_result) -> InputError:
    """The error for a folder, pipe, socket or device in the place of a file."""
    kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
    return InputError(f"{shown(path.name)} is {kind}, not a file", facts={"path": path}, hint=DOWNLOAD_AGAIN)


def present(path: Place) -> bool:
    """Whether something has this name, a link too. A disk that fails is an InputError, where `os.path.lexists` would return False."""
    if not isinstance(path, Path):
        return path.exists()
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no file can have such a name
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise unreadable(path, error) from error
    return True


def refuse_disguise(path: Place, head: bytes) -> None:
    """Raise InputError naming what the file is, where its first bytes are those of another kind of file."""
    if not head:
        raise InputError(f"{shown(path.name)} is empty", facts={"path": path}, hint=DOWNLOAD_AGAIN)
    for magic, kind, hint in DISGUISES:
        if head.lstrip().startswith(magic):
            raise InputError(f"{shown(path.name)} is {kind}", facts={"path": path}, hint=hint)
