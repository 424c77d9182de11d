"""Where a reader finds files: in a folder of this machine, or in one over the network, by the same few calls.

A `RemotePath` answers as a `Path` does, from the listing that remote.py made. Small files stay in memory; of a weight file that is open, so
does what was read, so that a header costs one or two requests.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ..errors import InputError
from .reading import DOWNLOAD_AGAIN, LocalSource, Source, SourceFile, join_ranges, open_regular, read_bytes, unreadable
from .threads import in_threads

MAX_HEADERS = 64 << 20  # bytes of one weight file that are read only to tell what it holds; the header of a 13B model has 100 kB
HEAD, TAIL = 32 << 10, (64 << 10) + 22  # bytes that most safetensors headers fit into; the longest end of a zip, comment included
JOIN = 16 << 10  # bytes between two ranges that cost less than another request
REQUESTS_AT_ONCE = 8

Pieces = list[tuple[int, bytes]]  # what is known of a file: offset and bytes


@dataclass(frozen=True)
class RemoteFolder:
    """The files of a folder over the network, by bare name. `kept` holds what was read of them ahead of their readers."""

    address: str
    files: Mapping[str, SourceFile] = field(hash=False, repr=False)
    kept: dict[str, Pieces] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class RemotePath:
    """A folder over the network, or the file `name` in it, which need not exist. Its text is the address."""

    _folder: RemoteFolder
    file: str = ""

    def __str__(self) -> str:
        return f"{self._folder.address}/{self.file}".rstrip("/")

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._folder, f"{self.file}/{name}".lstrip("/"))

    @property
    def name(self) -> str:
        """The last part of the address."""
        return str(self).rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of the name, from its last dot on."""
        return Path(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder of a file; above the folder nothing is looked for."""
        return RemotePath(self._folder) if self.file else RemotePath(RemoteFolder(self._folder.address.rpartition("/")[0], {}))

    def absolute(self) -> RemotePath:
        """The same: an address always is."""
        return self

    resolve = absolute

    def is_dir(self) -> bool:
        """Whether it is the folder itself."""
        return not self.file

    def is_file(self) -> bool:
        """Whether the listing has this file."""
        return self.file in self._folder.files

    def exists(self) -> bool:
        """Whether it is the folder, or a file of the listing."""
        return self.is_dir() or self.is_file()

    @property
    def identity(self) -> SourceFile:
        """The file. Raises InputError where there is none."""
        if not self.is_file():
            raise unreadable(self, FileNotFoundError(2, "there is no such file", str(self)))
        return self._folder.files[self.file]


Place = Path | RemotePath
AnyPlace = TypeVar("AnyPlace", Path, Path | RemotePath)


def names_in(folder: Place) -> list[str]:
    """The names in a folder, sorted. Raises OSError where it can't be read, or is none."""
    if isinstance(folder, Path):
        return sorted(os.listdir(folder))
    if not folder.is_dir():
        raise NotADirectoryError(20, "no folder", str(folder))
    return sorted(folder._folder.files)


def identity_of(place: Place) -> SourceFile:
    """The file at `place` as it is now. Raises InputError where it can't be read."""
    return SourceFile.at(place) if isinstance(place, Path) else place.identity


@contextmanager
def open_place(place: Place) -> Iterator[Source]:
    """The open file at `place`, for reading its header. Raises InputError where it is no regular file, for any OSError inside, and where a
    remote one asks for too much; HubError where the network fails."""
    if isinstance(place, Path):
        with open_regular(place) as (fd, status):
            yield LocalSource(SourceFile.of(place, status), fd)
        return
    file, kept = place.identity, place._folder.kept
    pieces = kept.get(place.file, [])
    if [len(data) for _, data in pieces] != [file.size]:  # a weight file, whose header is read once
        kept.pop(place.file, None)
    yield HeaderSource(file, kept=list(pieces))


def whole(place: Place) -> bytes:
    """All bytes of a small file. Raises as `open_place`."""
    with open_place(place) as source:
        return read_bytes(source, 0, source.identity.size)


@dataclass
class RemoteSource:
    """A file over the network; each read is a request, tried again after failures that may pass, until `stopping` is set."""

    identity: SourceFile
    stopping: threading.Event | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        from .ranges import read

        read(self.identity, offset, buffer, self.stopping)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Nothing: values are read in large pieces."""

    def check_unchanged(self) -> None:
        from .ranges import check_unchanged

        check_unchanged(self.identity)

    def close(self) -> None:
        """Nothing is open between two requests."""


@dataclass
class HeaderSource(RemoteSource):
    """A remote file whose header is read: some kB are asked for at once, and what came is kept. Raises InputError where a hostile file
    asks for more than MAX_HEADERS."""

    kept: Pieces = field(default_factory=list)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        stop, size = offset + len(buffer), self.identity.size
        known = self._known(offset, stop)
        if known is None:
            first = max(0, min(offset, size - TAIL)) if stop > size - TAIL else offset
            self._fetch(first, min(size, max(stop, offset + HEAD)))
            known = self._known(offset, stop)
        if known is None:
            what = f"`{self.identity.name}` is shorter than its header says"
            raise InputError(what, facts={"address": self.identity.path}, hint=DOWNLOAD_AGAIN)
        buffer[:] = known

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Ask for ranges of a file together, those that lie close by in one request."""
        size = self.identity.size
        inside = [(max(0, start), min(stop, size)) for start, stop in ranges if start < size]
        wanted = [(start, stop) for start, stop in inside if start < stop and self._known(start, stop) is None]
        in_threads(lambda place: self._fetch(*place), join_ranges(wanted, gap=JOIN), REQUESTS_AT_ONCE)

    def _known(self, start: int, stop: int) -> memoryview | None:
        found = ((at, data) for at, data in self.kept if at <= start and stop <= at + len(data))
        return next((memoryview(data)[start - at : stop - at] for at, data in found), None)

    def _fetch(self, start: int, stop: int) -> None:
        if sum(len(data) for _, data in self.kept) + stop - start > MAX_HEADERS:
            what = f"`{self.identity.name}` would need more than {MAX_HEADERS:,} bytes only to tell what it holds"
            raise InputError(what, facts={"address": self.identity.path}, hint="download it first")
        data = bytearray(stop - start)
        super().read_into(start, memoryview(data))
        self.kept.append((start, bytes(data)))
