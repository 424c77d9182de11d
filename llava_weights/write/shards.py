"""Where the shards of an output go and are read from again: a folder of this machine, a bucket, or a repository on the Hub.

folder       each is made in the work folder and stays there; the folder gets the output's name
bucket       each is an object that takes its bytes in order while they are made: no copy lies on this machine
repository   each is made in the work folder, committed to the branch of the work, and deleted here: huggingface_hub takes files only.
             hf_xet 1.8 has a stream, but none that its tokens and commits can be had for by public names.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, Protocol

from ..errors import InputError, OutputError
from ..storage.atomic import remove
from ..storage.places import Place
from ..storage.reading import DropBehind
from ..storage.threads import GLANCE, Brake, aside, waited
from ..tensors.dtypes import one_thread
from .destinations import Bucket, Repository
from .plan import Settings, Shard
from .read_back import disk_sum
from .shard import ShardResult, is_integer, stream_shard, write_shard

END_SECONDS = 5.0  # that an interrupted run waits for requests under way to be given up


class Shards(Protocol):
    """The shards of one output."""

    @property
    def place(self) -> Place:
        """The folder that holds them."""

    def task(self, shard: Shard, settings: Settings, **how: Any) -> Callable[[], ShardResult]:
        """A call that makes the shard; picklable without `how`."""

    def reads(self, result: ShardResult) -> bool:
        """Whether `holds` reads its bytes."""

    def holds(self, result: ShardResult, on_bytes: Callable[[int], None] = ...) -> bool:
        """Whether the shard of an earlier run is there, with its bytes. `on_bytes` gets how many were read."""

    def keep(self, result: ShardResult) -> ShardResult:
        """Called once the journal has the shard: what is known of it when it is where it belongs."""


class InFolder:
    """In the work folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def place(self) -> Place:
        return self.folder

    def task(self, shard: Shard, settings: Settings, **how: Any) -> Callable[[], ShardResult]:
        return partial(write_shard, shard, self.folder, settings, **how)

    def reads(self, result: ShardResult) -> bool:
        return True

    def holds(self, result: ShardResult, on_bytes: Callable[[int], None] = lambda nbytes: None) -> bool:
        path = self.folder / result.name
        with suppress(OSError, InputError):  # one that can't be read is made again
            return not path.is_symlink() and path.stat().st_size == result.nbytes and disk_sum(path, on_bytes) == result.read_back
        return False

    def keep(self, result: ShardResult) -> ShardResult:
        return result


class InRepository(InFolder):
    """On the branch of the work; before, one at a time lies in the work folder. With `reread`, it is read back from there first."""

    def __init__(self, folder: Path, destination: Repository, *, reread: bool) -> None:
        super().__init__(folder)
        self.destination, self.reread, self.held = destination, reread, destination.held()

    @property
    def place(self) -> Place:
        return self.destination.folder()

    def reads(self, result: ShardResult) -> bool:
        return not self._is_sent(result)

    def holds(self, result: ShardResult, on_bytes: Callable[[int], None] = lambda nbytes: None) -> bool:
        return self._is_sent(result) or super().holds(result, on_bytes)

    def keep(self, result: ShardResult) -> ShardResult:
        path = self.folder / result.name
        if not self._is_sent(result):
            if self.reread and not super().holds(result):
                hint = "check the disk; the same command writes this shard again"
                raise OutputError(f"`{result.name}` does not come back from the disk as it was written", hint=hint)
            result = replace(result, tag=waited(aside(lambda: self.destination.put(path, result.name))))
            self.held = {**self.held, result.name: (result.nbytes, result.tag)}
        remove(path)
        return result

    def _is_sent(self, result: ShardResult) -> bool:
        return bool(result.tag) and self.held.get(result.name) == (result.nbytes, result.tag)


class InBucket:
    """Objects under an address. An integer delta lies in the work folder first, or in a temporary one where that is on another machine."""

    def __init__(self, folder: Path, destination: Bucket) -> None:
        self.folder, self.destination, self.held = folder, destination, destination.held()

    @property
    def place(self) -> Place:
        return self.destination.folder()

    def task(self, shard: Shard, settings: Settings, **how: Any) -> Callable[[], ShardResult]:
        how = {key: value for key, value in how.items() if key not in ("resume", "on_disk")}  # an object is sent from its first byte on
        return partial(send_shard, shard, self.destination, self.folder, settings, **how)

    def reads(self, result: ShardResult) -> bool:
        return False

    def holds(self, result: ShardResult, on_bytes: Callable[[int], None] = lambda nbytes: None) -> bool:
        return self.held.get(result.name) == (result.nbytes, result.tag)

    def keep(self, result: ShardResult) -> ShardResult:
        return result


# --- into an object -------------------------------------------------------------------------------------------------


@one_thread()
def send_shard(
    shard: Shard,
    bucket: Bucket,
    folder: Path,
    settings: Settings,
    *,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    behind: DropBehind | None = None,
    brake: Brake | None = None,
) -> ShardResult:
    """Write `shard` into `bucket` under its name. Picklable and idempotent, as `write_shard`. Raises InputError as that does, and HubError
    where the network or the other side does not let it be done."""
    if is_integer(shard):  # its header, which comes first, tells the sizes of what stands behind it
        with tempfile.TemporaryDirectory(prefix="integer-", dir=folder if folder.is_dir() else None) as place:
            result = write_shard(shard, Path(place), settings, on_bytes=on_bytes, behind=behind, brake=brake)
            return replace(result, tag=bucket.put(Path(place) / shard.name, shard.name))

    def open_sink(size: int) -> ObjectSink:
        return ObjectSink(bucket, shard.name, size)

    return stream_shard(shard, open_sink, settings, on_bytes=on_bytes, behind=behind, brake=brake)


class ObjectSink:
    """One object, which has its name when it is whole; until then, what was there is there. A thread of its own hands the bytes to obstore,
    which sends some parts at once: these lie in memory (`buckets.PARTS_AT_ONCE`)."""

    def __init__(self, bucket: Bucket, name: str, size: int) -> None:
        self.waiting: Queue[bytes | None] = Queue(1)
        self.stopped = threading.Event()
        self.sent = aside(lambda: bucket.send(self._pieces(), name, size))

    def __enter__(self) -> ObjectSink:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        wait([self.sent], END_SECONDS)

    def stop(self) -> None:
        self.stopped.set()

    def settle(self, offset: int, nbytes: int) -> None:
        return

    def write(self, data: memoryview, offset: int) -> None:
        self._hand_on(bytes(data))  # obstore keeps what it is given, and the buffer is used again

    def finish(self) -> str:
        self._hand_on(None)
        return waited(self.sent)

    def _pieces(self) -> Iterator[memoryview]:
        while not self.stopped.is_set():
            with suppress(Empty):
                if (piece := self.waiting.get(timeout=GLANCE)) is None:
                    return
                yield memoryview(piece)
        raise InterruptedError("the shard is not wanted any more")  # obstore then gives up the parts that it has sent

    def _hand_on(self, piece: bytes | None) -> None:
        while not self.stopped.is_set():
            if self.sent.done():
                self.sent.result()  # raises why it ended early
            with suppress(Full):
                self.waiting.put(piece, timeout=GLANCE)
                return
