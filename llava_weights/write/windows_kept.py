"""The finished windows of a shard that is not finished: a run that is cut off loses some windows and not the shard.

    out/.NAME.part      the shard as far as it is made
    out/.NAME.windows   one line for each window in it, with an XXH3-128 of its bytes and what else making it found

No order on the disk is needed between the two: a window counts where its bytes, read again, have the checksum of its line. What it takes
to make a window once more is a read, a checksum and the digests of file and tensor, which have to see every byte in order.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB
from pathlib import Path
from typing import Any

from ..storage.atomic import naming, remove
from ..storage.digests import READ_BACK, digest_of
from ..storage.reading import Workspace
from ..tensors.windows import Window, make
from .work_folder import is_still, lock

Line = dict[str, Any]


def part_path(folder: Path, name: str) -> Path:
    """The file in which the shard `name` is made, in `folder`."""
    return folder / f".{name}.part"


def windows_path(folder: Path, name: str) -> Path:
    """The list of what is in `part_path`."""
    return folder / f".{name}.windows"


def shard_of(stray: str) -> str:
    """The shard that a file of these names belongs to; "" for another file."""
    stem, dot, kind = stray.rpartition(".")
    return stem[1:] if dot and stem.startswith(".") and kind in ("part", "windows") else ""


class KeptWindows:
    """The windows of one shard that were finished before, and those that are finished now. Used by many threads.

    `fd` is the open part file. Made by `open_kept`, which holds a lock on it.
    """

    def __init__(self, fd: int, part: Path, listed: Path) -> None:
        self.fd, self.part, self.listed = fd, part, listed
        self.known = _read_lines(listed) if os.fstat(fd).st_size else {}
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if self.known else os.O_TRUNC)
        self.list_fd = os.open(listed, flags, 0o666)
        self.worth = bool(self.known)  # whether anything would be lost with the files

    def fill(self, window: Window, data: memoryview, work: Workspace) -> bool:
        """Fill `data` with the window: True where it was finished before and its bytes are still those, else it is made now, and has to be
        written and added. Raises as `make`."""
        records = {
            (leaf.file.path, leaf.record.offset): (leaf.file, leaf.record)
            for piece in window.pieces
            for leaf in piece.tensor.leaves()
            if leaf.record is not None
        }
        line = self.known.get(window.offset)
        if line is not None and self._read(window, data, line) and {(path, offset) for path, offset, *_ in line["crcs"]} <= records.keys():
            work.tallies.update(line["tallies"])
            for path, offset, *piece in line["crcs"]:
                work.crc_pieces[records[path, offset]].append((piece[0], piece[1], piece[2]))
            return True
        make(window, data, work)
        return False

    def _read(self, window: Window, data: memoryview, line: Line) -> bool:
        """Read the window, of any cut and of any state, and say whether it is the one of this line."""
        with suppress(OSError):  # then it is made again
            whole: bool = line["nbytes"] == window.nbytes == os.preadv(self.fd, [data], window.offset)
            return whole and _checksum(data) == line["sum"]
        return False

    def add(self, window: Window, data: memoryview, tallies: Counter[str], crcs: Any) -> None:
        """Note a window that is made and written. A list that can't be written only costs time later."""
        pieces = [[file.path, record.offset, *piece] for (file, record), found in crcs.items() for piece in found]
        line = {"offset": window.offset, "nbytes": window.nbytes, "sum": _checksum(data), "tallies": dict(tallies), "crcs": pieces}
        text = json.dumps(line).encode()
        with suppress(OSError):
            os.write(self.list_fd, _checksum(text).encode() + b" " + text + b"\n")
            self.worth = True

    def finished(self) -> None:
        """Delete the list: the part file has got the shard's name."""
        self.worth = True
        with suppress(OSError):  # the next run deletes it
            remove(self.listed)

    def forget(self) -> None:
        """Delete both files when they are closed: what the shard was made of is not to be used."""
        self.worth = False

    def close(self) -> None:
        """Give up both files; they stay where any window is finished."""
        os.close(self.list_fd)
        if not self.worth:
            with suppress(OSError):
                remove(self.listed)
                remove(self.part)


@contextmanager
def made_by(work: Workspace) -> Iterator[tuple[Counter[str], Any]]:
    """What reading and arithmetic inside add to the tallies and CRC pieces of a worker, by itself."""
    before = work.tallies, work.crc_pieces
    work.tallies, work.crc_pieces = Counter(), defaultdict(list)
    try:
        yield work.tallies, work.crc_pieces
    finally:
        for key, count in work.tallies.items():
            before[0][key] += count
        for record, pieces in work.crc_pieces.items():
            before[1][record] += pieces
        work.tallies, work.crc_pieces = before


@contextmanager
def open_kept(folder: Path, name: str) -> Iterator[KeptWindows | None]:
    """The kept windows of the shard `name`; None where another process is at it, or where there are no locks."""
    part = part_path(folder, name)
    with naming(folder / name):
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        with naming(folder / name):
            kept = KeptWindows(fd, part, windows_path(folder, name)) if _locked(fd, part) else None
        if kept is None:
            yield None
            return
        try:
            yield kept
        finally:
            kept.close()
    finally:
        os.close(fd)


def _locked(fd: int, part: Path) -> bool:
    with suppress(BlockingIOError):
        return lock(fd, LOCK_EX | LOCK_NB) and is_still(fd, part)
    return False


def _checksum(data: memoryview | bytes) -> str:
    return digest_of(data, READ_BACK)


def _read_lines(path: Path) -> dict[int, Line]:
    """The lines by offset, the latest of each; what is torn, or what no run wrote, is left out."""
    found: dict[int, Line] = {}
    with suppress(OSError):
        for written in path.read_bytes().splitlines():
            check, _, text = written.partition(b" ")
            if _checksum(text).encode() == check:
                line: Line = json.loads(text)
                found[line["offset"]] = line
    return found
