"""What was written is read from the disk again, while the rest is made: a disk may have kept other bytes than it was given.

It is read past the page cache (O_DIRECT) where the file system has that, a large shard while it is still being written, as far as its bytes
are on the disk. Elsewhere a shard is read when it is finished and its pages are dropped. The bytes are compared by a checksum that was
taken of them on their way to the disk.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from ..errors import InputError, OutputError
from ..storage.digests import READ_BACK, new_digest
from ..storage.direct import set_direct
from ..storage.reading import drop_cache, open_regular, private_buffer
from ..storage.threads import GLANCE, Shield
from ..text import shown
from .executors import unwrapped
from .plan import READ_BACK_BYTES
from .shard import ShardResult


class Written:
    """How far a file that is being written is on the disk."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reach, self._whole = 0, False

    def reach(self, nbytes: int) -> None:
        """So many bytes, from the first one on, are there."""
        with self._changed:
            self._reach = max(self._reach, nbytes)
            self._changed.notify_all()

    def end(self) -> None:
        """All are there, or no more will come."""
        with self._changed:
            self._whole = True
            self._changed.notify_all()

    def wait(self, nbytes: int | None = None) -> None:
        """Until so many are there, or all."""
        with self._changed:
            self._changed.wait_for(lambda: self._whole or (nbytes is not None and self._reach >= nbytes))


def disk_sum(path: Path, on_bytes: Callable[[int], None] = lambda nbytes: None, stopping: threading.Event | None = None) -> str:
    """The XXH3-128 of a file as the disk has it, in READ_BACK_BYTES of memory; of a part of it where `stopping` was set. `on_bytes` gets
    the bytes of each read. Raises InputError where it can't be read."""
    with open_regular(path) as (fd, status):
        os.set_blocking(fd, True)
        return _sum(fd, status.st_size, on_bytes, stopping)


def _sum(
    fd: int, size: int, on_bytes: Callable[[int], None], stopping: threading.Event | None = None, written: Written | None = None
) -> str:
    """`disk_sum` of an open file, which may still be `written`, in its whole length."""
    digest, buffer = new_digest(READ_BACK), private_buffer(READ_BACK_BYTES)
    drop_cache(fd)
    direct, done = set_direct(fd, True), 0
    while done < size and not (stopping and stopping.is_set()):
        if written and direct:
            written.wait(done + len(buffer))
        elif written:  # the cache would take in what is not there yet
            written.wait()
            drop_cache(fd)
            written = None
            continue
        try:
            count = os.preadv(fd, [buffer], done)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            direct = set_direct(fd, False)  # this file system, or a read that ended between two blocks
            continue
        if not count:  # it became shorter
            break
        digest.update(buffer[:count])
        if not direct:
            drop_cache(fd, done, count)
        done += count
        on_bytes(count)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Growing:
    """A file that is read while it is written."""

    written: Written
    inode: int
    future: Future[str]


class ReadBack:
    """Shards that are read again: by `threads` of this process, from while they are written, or by the `pool` that wrote them.

    No thread reads any more when its `with` ends. `on_bytes` is called with what was read of which shard, from any thread.
    """

    def __init__(
        self,
        folder: Path,
        results: dict[str, ShardResult],
        pool: Executor | None,
        on_bytes: Callable[[int, str], None],
        threads: int = 1,
    ) -> None:
        self.folder, self.results, self.pool, self.on_bytes = folder, results, pool, on_bytes
        self.waiting: dict[Future[str], ShardResult] = {}
        self.growing: dict[str, _Growing] = {}
        self.turn = threading.Lock()
        self.read: Counter[str] = Counter()
        self.stopping = threading.Event()
        self.own = ThreadPoolExecutor(threads) if pool is None else None

    def __enter__(self) -> ReadBack:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stopping.set()
        for growing in self.growing.values():
            growing.written.end()
        with Shield():
            for future in self.waiting:
                future.cancel()
            wait(self.waiting)
            if self.own is not None:
                self.own.shutdown(cancel_futures=True)

    def follow(self, name: str, path: Path, nbytes: int) -> None:
        """Read the shard `name`, which is being written to `path`; its first `nbytes` are on the disk. Called by any thread."""
        with self.turn:
            growing = self.growing.get(name)
            if growing is None and self.own is not None and nbytes >= READ_BACK_BYTES:
                written, fd = Written(), os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                status = os.fstat(fd)
                future = self.own.submit(_read_open, path, fd, status.st_size, partial(self._count, name), self.stopping, written)
                future.add_done_callback(lambda _: os.close(fd))
                growing = self.growing[name] = _Growing(written, status.st_ino, future)
        if growing is not None:
            growing.written.reach(nbytes)

    def _count(self, name: str, nbytes: int) -> None:
        self.read[name] += nbytes
        self.on_bytes(nbytes, name)

    def add(self, result: ShardResult) -> None:
        """Read the shard, which is finished, to its end."""
        path, growing = self.folder / result.name, self.growing.pop(result.name, None)
        if growing is not None:
            growing.written.end()
        if growing is not None and _is(path, growing.inode):
            future = growing.future
        elif self.own is not None:
            self.read[result.name] = 0
            future = self.own.submit(_read, path, partial(self._count, result.name), self.stopping)
        else:
            assert self.pool is not None
            try:
                future = self.pool.submit(partial(_read, path))
            except BrokenExecutor as error:
                raise unwrapped(error) from error
        self.waiting[future] = result

    def check(self) -> None:
        """Compare those that are read. Raises OutputError for one that differs, and takes each that does out of `results`, so that the next
        run makes it again."""
        self._judge([future for future in self.waiting if future.done()])

    @property
    def left(self) -> int:
        """Bytes of the shards that are not read yet."""
        return sum(result.nbytes - self.read[result.name] for future, result in self.waiting.items() if not future.done())

    def finish(self) -> None:
        """Wait until all are read. Raises as `check`, or an interruption."""
        with Shield() as shield:
            while wait(self.waiting, GLANCE).not_done:
                shield.check()
        self.check()

    def _judge(self, read: Sequence[Future[str]]) -> None:
        wrong: list[tuple[ShardResult, str]] = []
        for future in read:
            result = self.waiting.pop(future)
            if (error := future.exception()) is not None:
                raise unwrapped(error)
            if self.own is None:
                self.on_bytes(result.nbytes, result.name)
            if (found := future.result()) != result.read_back:
                wrong.append((self.results.pop(result.name), found))
        for result, found in wrong:
            facts = {"written": result.read_back, "read": found}
            hint = "check the disk, or choose another `-o`; the same command writes this shard again"
            raise OutputError(f"`{result.name}` does not come back from the disk as it was written", facts=facts, hint=hint)


def _read(path: Path, on_bytes: Callable[[int], None] = lambda nbytes: None, stopping: threading.Event | None = None) -> str:
    """The checksum of a written file, or why it has none."""
    try:
        return disk_sum(path, on_bytes, stopping)
    except InputError as error:
        return error.what


def _read_open(path: Path, fd: int, size: int, on_bytes: Callable[[int], None], stopping: threading.Event, written: Written) -> str:
    """The same of a file that is open and being written."""
    try:
        return _sum(fd, size, on_bytes, stopping, written)
    except OSError as error:
        return f"{shown(path.name)} can't be read: {error.strerror}"


def _is(path: Path, inode: int) -> bool:
    """Whether the file of this name is that one."""
    with suppress(OSError):
        return path.stat().st_ino == inode
    return False
