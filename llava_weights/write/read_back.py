"""What was written is read from the disk again, while the next shards are made: a disk may have kept other bytes than it was given.

It is read past the page cache (O_DIRECT) where the file system has that, else after its pages were dropped, and compared by a checksum that
was taken of the bytes on their way to the disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import TracebackType

from ..errors import InputError, OutputError
from ..storage.digests import READ_BACK, new_digest
from ..storage.reading import drop_cache, open_regular, private_buffer
from ..storage.threads import GLANCE, Shield
from .executors import unwrapped
from .plan import READ_BACK_BYTES
from .shard import ShardResult


def disk_sum(path: Path, on_bytes: Callable[[int], None] = lambda nbytes: None, stopping: threading.Event | None = None) -> str:
    """The XXH3-128 of a file as the disk has it, in READ_BACK_BYTES of memory; of a part of it where `stopping` was set. `on_bytes` gets
    the bytes of each read. Raises InputError where it can't be read."""
    digest, buffer = new_digest(READ_BACK), private_buffer(READ_BACK_BYTES)
    with open_regular(path) as (fd, status):
        os.set_blocking(fd, True)
        drop_cache(fd)
        direct, done = _set_direct(fd, True), 0
        while done < status.st_size and not (stopping and stopping.is_set()):
            try:
                count = os.preadv(fd, [buffer], done)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                direct = _set_direct(fd, False)  # this file system, or a read that ended between two blocks
                continue
            if not count:  # it became shorter
                break
            digest.update(buffer[:count])
            if not direct:
                drop_cache(fd, done, count)
            done += count
            on_bytes(count)
    return digest.hexdigest()


def _set_direct(fd: int, direct: bool) -> bool:
    """Read past the page cache from here on, or not; whether it is so."""
    flag: int = getattr(os, "O_DIRECT", 0)  # only Linux has it
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~flag
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | flag if direct else flags)
    except OSError:  # a file system that has no such reads
        return False
    return direct and bool(flag)


class ReadBack:
    """Finished shards, each read again in its turn: by a thread of this process, or by the `pool` that wrote them.

    No thread reads any more when its `with` ends. `on_bytes` is called with what was read of which shard, from any thread.
    """

    def __init__(self, folder: Path, results: dict[str, ShardResult], pool: Executor | None, on_bytes: Callable[[int, str], None]) -> None:
        self.folder, self.results, self.pool, self.on_bytes = folder, results, pool, on_bytes
        self.waiting: dict[Future[tuple[str, str]], ShardResult] = {}
        self.stopping = threading.Event()
        self.own = ThreadPoolExecutor(1) if pool is None else None

    def __enter__(self) -> ReadBack:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stopping.set()
        with Shield():
            for future in self.waiting:
                future.cancel()
            wait(self.waiting)
            if self.own is not None:
                self.own.shutdown()

    def add(self, result: ShardResult) -> None:
        """Read the shard, once those before are read."""
        path = self.folder / result.name
        if self.own is not None:
            future = self.own.submit(_read, path, lambda nbytes: self.on_bytes(nbytes, result.name), self.stopping)
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
        return sum(result.nbytes for future, result in self.waiting.items() if not future.done())

    def finish(self) -> None:
        """Wait until all are read. Raises as `check`, or an interruption."""
        with Shield() as shield:
            while wait(self.waiting, GLANCE).not_done:
                shield.check()
        self.check()

    def _judge(self, read: Sequence[Future[tuple[str, str]]]) -> None:
        wrong: list[tuple[ShardResult, str]] = []
        for future in read:
            result = self.waiting.pop(future)
            if (error := future.exception()) is not None:
                raise unwrapped(error)
            name, found = future.result()
            if self.own is None:
                self.on_bytes(result.nbytes, name)
            if found != result.read_back:
                wrong.append((self.results.pop(name), found))
        for result, found in wrong:
            facts = {"written": result.read_back, "read": found}
            hint = "check the disk, or choose another `-o`; the same command writes this shard again"
            raise OutputError(f"`{result.name}` does not come back from the disk as it was written", facts=facts, hint=hint)


def _read(path: Path, on_bytes: Callable[[int], None] = lambda nbytes: None, stopping: threading.Event | None = None) -> tuple[str, str]:
    """The name of a written file and its checksum, or why it has none."""
    try:
        return path.name, disk_sum(path, on_bytes, stopping)
    except InputError as error:
        return path.name, error.what
