"""Events that a run reports. The library never prints; `cli/console.py` turns them into text or JSON lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .errors import UsageError


@dataclass(frozen=True)
class Started:
    """Work begins: `shards` output files (of `what` "Comparing" tensors, of "Reading" input files) with `nbytes` bytes. `done_shards` and
    `done_nbytes` of them were finished by an earlier run; `to_read_back` bytes are read from the disk again beside the writing, and
    `to_follow` bytes of work come after all this, at another speed. `what` is a word for people: "Writing", "Checking" what an earlier run
    wrote, "Reading", "Making", "Comparing", "Running" a model.
    """

    shards: int
    nbytes: int
    done_shards: int = 0
    done_nbytes: int = 0
    what: str = "Writing"
    to_read_back: int = 0
    to_follow: int = 0


@dataclass(frozen=True)
class Progress:
    """`nbytes` bytes of all are done by now, those of earlier runs included, and `read_back` of the bytes `to_read_back` are read again;
    `shard` is the current file or tensor.
    """

    nbytes: int
    shard: str
    read_back: int = 0


@dataclass(frozen=True)
class ShardDone:
    """The output file `name` is finished, number `index` (from 1) of `shards`, with `nbytes` bytes of values; `sha256` is that of the file,
    in hexadecimal.
    """

    name: str
    index: int
    shards: int
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ReadingBack:
    """Everything is written; `nbytes` bytes of it are still to be read from the disk again before the output gets its name."""

    nbytes: int


@dataclass(frozen=True)
class Note:
    """A sentence, `text`, that the user should read: with `warning` something that may be wrong, else a fact found on the way."""

    text: str
    warning: bool = False


Event = Started | Progress | ShardDone | ReadingBack | Note
Listener = Callable[[Event], None]  # what `on_event=` takes


def check_listener(on_event: object) -> None:
    """Raise UsageError where `on_event` can't be called."""
    if not callable(on_event):
        raise UsageError(f"`on_event` is of the type `{type(on_event).__name__}`, no function", hint="give a function that takes an Event")


_turn = threading.Lock()
_listeners: list[tuple[Listener, dict[str, float]]] = []  # each with the time of the latest event of each key


@contextmanager
def listening(on_event: Listener) -> Iterator[None]:
    """Inside, `on_event` gets what `tell` sends, from any thread: retries and notes of code that has no `on_event` parameter."""
    listener: tuple[Listener, dict[str, float]] = (on_event, {})
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(event: Event, *, key: str = "", seconds: float = 0.0) -> None:
    """Send `event` to the listeners; of events with the same `key`, only one in so many seconds."""
    now = time.monotonic()
    for on_event, latest in list(_listeners):
        with _turn:
            fresh = key not in latest or now - latest[key] >= seconds
            latest[key] = now if fresh else latest[key]
        if fresh:
            on_event(event)


def silent(event: Event) -> None:
    """Nobody listens."""
