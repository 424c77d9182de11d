"""One shard, streamed: rows in, bytes out, digests on the way.

The header is made first, since names, dtypes, shapes and offsets are known without data. The data is cut into windows on row
borders. Workers take windows in order and make the rows into a reused buffer; a thread that writes and two that digest (the file,
each tensor) follow in file order over the same buffers while they are in cache. A buffer is free again when all three are done with
it, so memory is a few windows, whatever the model's size.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from ..errors import InputError
from ..formats.integer_delta import ToInteger, write_integer_shard
from ..storage.atomic import NOT_SUPPORTED, output_error, sync_folder
from ..storage.digests import FILES, READ_BACK, TENSORS, new_digest
from ..storage.direct import BLOCK, set_direct, write_direct
from ..storage.reading import DROP_BEHIND, DropBehind, Workspace, check_crcs, drop_cache, private_buffer
from ..storage.threads import Brake, Shield
from ..tensors.dtypes import one_thread
from ..tensors.holes import Watch
from ..tensors.lazy import wrong_digest
from ..tensors.windows import Window, cut, make
from .plan import BUFFERS_BEYOND_JOBS, Settings, Shard
from .windows_kept import KeptWindows, made_by, open_kept

MOST_HOLES = 64  # that one shard's journal line tells of
SYNC_LAG = 4  # windows between starting write-back of one and waiting for it
OnDisk = Callable[[Path, int], None]
"""Is told of the file that a shard is written to, and how many of its bytes, from the first one on, are on the disk."""


@dataclass(frozen=True)
class ShardResult:
    """What is known of a finished shard: small, picklable, and one line of the journal. `sha256` and `read_back`, an XXH3-128, are those of
    the file: one for others, one for reading it back. `tag` is what the place that it was sent to calls its content, empty on this machine.
    """

    name: str
    nbytes: int
    sha256: str
    read_back: str
    tensors: dict[str, str]  # name -> BLAKE3 of the raw little-endian values
    tallies: dict[str, int]
    holes: tuple[str, ...] | list[str] = ()  # sentences on zeros that were accepted; a list where the journal tells
    tag: str = ""


@one_thread()
def write_shard(
    shard: Shard,
    folder: Path,
    settings: Settings,
    *,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    on_disk: OnDisk | None = None,
    keep: bool = True,
    behind: DropBehind | None = None,
    brake: Brake | None = None,
    resume: bool = False,
) -> ShardResult:
    """Write `shard` into `folder` under its final name: temporary file, fsync, rename, fsync of the folder.

    Picklable and idempotent, so it can be a task of any pool. Raises InputError (exit 3) where an input is damaged or a value
    overflows, OutputError (exit 5) where the file can't be written; the temporary file is gone then. Without `keep` nothing stays: the
    result has the digests of what the inputs hold now. `on_disk` is called by the thread that writes. `behind` is shared with the shards
    that are written at the same time, `brake` stops them all: what it is pulled with is raised. With `resume`, windows that were finished
    when an earlier call was cut off are read and not made (windows_kept.py), and an interruption, a lost connection or a full disk leaves
    those that are finished now.
    """
    if is_integer(shard):
        watch = shard._watch.fresh() if shard._watch else None
        return _write_integer(shard, folder, settings, on_bytes, keep, watch)
    with open_kept(folder, shard.name) if resume and keep else nullcontext() as kept:
        temporary = kept.part if kept else temporary_path(folder, shard.name)

        def open_sink(size: int) -> AbstractContextManager[Sink]:
            return FileSink(temporary, size, settings, on_disk, anew=kept is None) if keep else Nowhere()

        try:
            result = stream_shard(shard, open_sink, settings, on_bytes=on_bytes, behind=behind, brake=brake, kept=kept)
            if keep:
                os.rename(temporary, folder / shard.name)
                sync_folder(folder)
            if kept:
                kept.finished()
        except InputError:
            if kept:
                kept.forget()
            raise
        except OSError as error:
            raise output_error(error, folder / shard.name) from error
        finally:
            if not kept:
                with suppress(OSError):  # the next run deletes it
                    temporary.unlink(missing_ok=True)
    return result


def is_integer(shard: Shard) -> bool:
    """Whether it holds differences that are compressed, so that its size is known at the end only."""
    return any(isinstance(tensor, ToInteger) for _, tensor in shard.tensors)


def stream_shard(
    shard: Shard,
    open_sink: Callable[[int], AbstractContextManager[Sink]],
    settings: Settings,
    *,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    behind: DropBehind | None = None,
    brake: Brake | None = None,
    kept: KeptWindows | None = None,
) -> ShardResult:
    """Make the bytes of `shard` into what `open_sink` returns for their number. Raises InputError as `write_shard`, and what the sink
    raises."""
    settings, watch = settings.of_one_shard, shard._watch.fresh() if shard._watch else None
    header, laid_out = shard.header()
    windows = tuple(cut(((name, tensor) for name, tensor, _ in laid_out), len(header), settings.window))
    size = len(header) + sum(window.nbytes for window in windows)
    with open_sink(size) as sink:
        sink.write(memoryview(header), 0)
        pipeline = Pipeline(header, windows, sink, settings, on_bytes, watch, behind or DropBehind(), brake or Brake(), kept)
        pipeline.run()
        for name, tensor in shard.tensors:
            if tensor.expected_digest and tensor.expected_digest[1] != pipeline.checked.get(name):
                raise wrong_digest(name)
        tag = sink.finish()
    whole, fast = pipeline.file_digest.hexdigest(), pipeline.read_back.hexdigest()
    return ShardResult(shard.name, size, whole, fast, pipeline.tensor_digests, dict(pipeline.tallies), _accepted(watch), tag)


def _accepted(watch: Watch | None) -> tuple[str, ...]:
    return tuple(hole.text for hole in sorted(watch.found)[:MOST_HOLES]) if watch else ()


def temporary_path(folder: Path, name: str) -> Path:
    """A new one for each attempt: where a node was only thought to be lost, two attempts write the same shard at the same time."""
    return folder / f".{name}.{secrets.token_hex(4)}.part"


def _write_integer(
    shard: Shard, folder: Path, settings: Settings, on_bytes: Callable[[int], None], keep: bool, watch: Watch | None
) -> ShardResult:
    items = [(name, tensor) for name, tensor in shard.tensors if isinstance(tensor, ToInteger)]
    temporary = temporary_path(folder, shard.name)
    try:
        result = write_integer_shard(temporary, items, jobs=settings.jobs, on_bytes=on_bytes, watch=watch)
        if keep:
            os.rename(temporary, folder / shard.name)
            sync_folder(folder)
        else:
            temporary.unlink()
    except OSError as error:
        raise output_error(error, folder / shard.name) from error
    tallies = {"raw": result.raw_nbytes, "packed": result.packed_nbytes}
    return ShardResult(shard.name, result.nbytes, result.sha256, result.read_back, result.tensors, tallies, _accepted(watch))


@dataclass
class Pipeline:
    """The threads of one shard. Window numbers are handed out in order, and a worker has a buffer before it takes one,
    so the threads that follow, which wait for the lowest number, always get it."""

    header: bytes
    windows: Sequence[Window]
    sink: Sink
    settings: Settings
    on_bytes: Callable[[int], None]
    watch: Watch | None = None
    behind: DropBehind = field(default_factory=DropBehind)
    brake: Brake = field(default_factory=Brake)
    kept: KeptWindows | None = None
    tensor_digests: dict[str, str] = field(default_factory=dict)
    checked: dict[str, str] = field(default_factory=dict)  # of tensors with an expected digest, by its algorithm
    tallies: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.file_digest, self.read_back = new_digest(FILES), new_digest(READ_BACK)
        for digest in (self.file_digest, self.read_back):
            digest.update(self.header)
        self.failures: list[BaseException] = []
        self.numbers = iter(range(len(self.windows)))
        self.changed = threading.Condition()
        self.made: dict[int, memoryview] = {}
        self.users: dict[int, int] = {}
        self.found: dict[int, tuple[bool, Counter[str], Any]] = {}  # whether a window was there, and what making it counted
        self.free: SimpleQueue[memoryview | None] = SimpleQueue()
        self.stopping = threading.Event()
        self.workspaces = [Workspace(self.settings.drop_cache, self.behind, self.stopping, self.watch) for _ in range(self.settings.jobs)]

    def run(self) -> None:
        """Start the threads, wait for them, then judge what was read. Raises the first failure."""
        largest = max((window.nbytes for window in self.windows), default=0)
        for _ in range(min(self.settings.jobs + BUFFERS_BEYOND_JOBS, len(self.windows))):
            self.free.put(private_buffer(largest + BLOCK))
        tasks: list[tuple[Callable[..., None], tuple[Workspace, ...]]] = [(self._work, (w,)) for w in self.workspaces]
        tasks += [(self._write_file, ()), (self._digest_file, ()), (self._digest_tensors, ())]
        threads = [threading.Thread(target=self._guard, args=(task, args), daemon=True) for task, args in tasks]
        with Shield(self._fail), self.brake.held(self._fail):  # the files are closed when no thread lives
            try:
                for thread in threads:
                    thread.start()
            except RuntimeError as error:  # there can be no more threads
                self._fail(error)
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            self._finish_workspaces()
        if self.failures:
            raise self.failures[0]

    def _finish_workspaces(self) -> None:
        try:
            if self.failures:
                return
            for workspace in self.workspaces:
                workspace.recheck_sources()
                self.tallies.update(workspace.tallies)
            check_crcs(self.workspaces)
        finally:
            for workspace in self.workspaces:
                workspace.close()

    def _guard(self, task: Callable[..., None], args: tuple[Workspace, ...]) -> None:
        try:
            task(*args)
        except BaseException as error:  # handed to the caller's thread
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.failures.append(error)
            self.stopping.set()
            self.changed.notify_all()
        self.free.put(None)
        self.sink.stop()

    def _work(self, workspace: Workspace) -> None:
        while (taken := self._take()) is not None:
            number, buffer = taken
            window = self.windows[number]
            data = _data(window, buffer)
            with made_by(workspace) as (tallies, crcs):
                there = self.kept is not None and self.kept.fill(window, data, workspace)
                if self.kept is None:
                    make(window, data, workspace)
            with self.changed:
                self.found[number] = there, tallies, crcs
                self.made[number], self.users[number] = buffer, 3
                self.changed.notify_all()

    def _take(self) -> tuple[int, memoryview] | None:
        """The next window and a buffer for it; None, passed on to the next worker, when there is no more to do."""
        buffer = self.free.get()
        with self.changed:
            number = None if buffer is None or self.failures else next(self.numbers, None)
        if buffer is None or number is None:
            self.free.put(None)
            return None
        return number, buffer

    def _in_order(self) -> Iterator[tuple[Window, memoryview]]:
        for number, window in enumerate(self.windows):
            with self.changed:
                while number not in self.made:
                    if self.failures:
                        return
                    self.changed.wait()
                buffer = self.made[number]
            yield window, _data(window, buffer)
            self._release(number)

    def _release(self, number: int) -> None:
        with self.changed:
            self.users[number] -= 1
            if self.users[number]:
                return
            del self.users[number]
            buffer = self.made.pop(number)
        self.free.put(buffer)

    def _write_file(self) -> None:
        for number, (window, data) in enumerate(self._in_order()):
            there, tallies, crcs = self.found.pop(number)
            if there:
                self.sink.settle(window.offset, window.nbytes)
            else:
                self.sink.write(data, window.offset)
                if self.kept is not None and not (self.watch and self.watch.found):  # zeros that are accepted are found anew
                    self.kept.add(window, data, tallies, crcs)
            self.on_bytes(window.nbytes)

    def _digest_file(self) -> None:
        for _, data in self._in_order():
            self.file_digest.update(data)
            self.read_back.update(data)

    def _digest_tensors(self) -> None:
        for window, data in self._in_order():
            for piece in window.pieces:
                if not piece.name:  # the zeros that pad a GGUF file
                    continue
                expected = piece.tensor.expected_digest
                if piece.start == 0:
                    digests = {algorithm: new_digest(algorithm) for algorithm in (TENSORS, expected[0] if expected else TENSORS)}
                for digest in digests.values():
                    digest.update(data[piece.at : piece.at + piece.nbytes])
                if piece.stop == piece.tensor.rows:
                    self.tensor_digests[piece.name] = digests[TENSORS].hexdigest()
                    if expected:
                        self.checked[piece.name] = digests[expected[0]].hexdigest()


def _data(window: Window, buffer: memoryview) -> memoryview:
    """The place of a window in its page-aligned buffer: blocks of the file lie at multiples of BLOCK there too."""
    return buffer[window.offset % BLOCK :][: window.nbytes]


class Sink(Protocol):
    """Where the bytes of a shard go, from the first to the last."""

    def write(self, data: memoryview, offset: int) -> None:
        """Take the bytes from `offset` on; `data` may be used again when this returns."""

    def settle(self, offset: int, nbytes: int) -> None:
        """These bytes are there from an earlier run."""

    def finish(self) -> str:
        """Everything is where it belongs when this returns: the tag of what arrived, empty on this machine."""

    def stop(self) -> None:
        """No call of `write` waits any longer."""


class Nowhere:
    """Writes nothing, for a run that only wants the digests."""

    def __enter__(self) -> Nowhere:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def write(self, data: memoryview, offset: int) -> None:
        return

    def settle(self, offset: int, nbytes: int) -> None:
        return

    def finish(self) -> str:
        return ""

    def stop(self) -> None:
        return


class FileSink:
    """The output file: allocated whole, written in order, whole blocks past the page cache where the file system has that. What does go
    through the cache is sent to the disk early and dropped there. `on_disk` is told how far the file is on the disk."""

    def __init__(self, path: Path, size: int, settings: Settings, on_disk: OnDisk | None = None, *, anew: bool = True) -> None:
        self.path, self.on_disk, self.drop_cache = path, on_disk, settings.drop_cache
        self.direct = settings.drop_cache
        self.started: deque[tuple[int, int]] = deque()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC * anew | os.O_CLOEXEC, 0o666)
        self.direct_fd = -1
        try:
            if os.fstat(self.fd).st_size > size:
                os.ftruncate(self.fd, size)
            allocate(self.fd, size)
            self.direct_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self.direct = settings.drop_cache and set_direct(self.direct_fd, True)
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        for fd in (self.fd, self.direct_fd):
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> FileSink:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def write(self, data: memoryview, offset: int) -> None:
        """Write `data` at `offset`; large data lies as `_data` says."""
        first, last = 0, 0  # of the bytes that are written past the cache
        try:
            if self.direct and len(data) >= DROP_BEHIND:
                first, whole = -offset % BLOCK, len(data) - (offset + len(data)) % BLOCK
                last = first + write_direct(self.direct_fd, data[first:whole], offset + first)
                self.direct = last == whole
            self._put(data[:first], offset)
            self._put(data[last:], offset + last)
        except OSError as error:
            raise output_error(error, self.path) from error
        self.settle(offset, len(data))

    def _put(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self.fd, data[done:], offset + done)

    def settle(self, offset: int, nbytes: int) -> None:
        """Bring bytes that are in the file, behind those of the call before, to the disk: begun now, waited for some windows later."""
        if self.drop_cache and _sync_file_range:
            sync_range(self.fd, offset, nbytes, 2)  # SYNC_FILE_RANGE_WRITE: start now, wait for nothing
            self.started.append((offset, nbytes))
            if len(self.started) > SYNC_LAG:
                old, size = self.started.popleft()
                sync_range(self.fd, old, size, 7)  # WAIT_BEFORE | WRITE | WAIT_AFTER
                drop_cache(self.fd, old, size)
                if self.on_disk:
                    self.on_disk(self.path, old + size)

    def finish(self) -> str:
        """Everything is on the disk when this returns; the page cache is given back."""
        os.fsync(self.fd)
        if self.drop_cache:
            drop_cache(self.fd)
        return ""

    def stop(self) -> None:
        return


_libc = ctypes.CDLL(None, use_errno=True)
_sync_file_range = getattr(_libc, "sync_file_range", None)
_fallocate = getattr(_libc, "fallocate", None)
if _sync_file_range:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
if _fallocate:
    _fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def sync_range(fd: int, offset: int, size: int, flags: int) -> None:
    """`sync_file_range`. Its errors must not be ignored: Linux reports lost pages to a descriptor only once, so the fsync at the end would
    succeed (`file_check_and_advance_wb_err`)."""
    if _sync_file_range and _sync_file_range(fd, offset, size, flags) and (code := ctypes.get_errno()) not in NOT_SUPPORTED:
        raise OSError(code, os.strerror(code))


def allocate(fd: int, size: int) -> None:
    """Reserve `size` bytes, so that a full disk shows now. Not `posix_fallocate`: glibc emulates it by writing every block."""
    if size and _fallocate and _fallocate(fd, 0, 0, size) == 0:
        return
    code = ctypes.get_errno() if size and _fallocate else 0
    if code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):  # anything else means that the file system can't reserve
        raise OSError(code, os.strerror(code))
    os.ftruncate(fd, size)
