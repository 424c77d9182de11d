"""What the engine tells whoever listens. The library never prints; `cli/console.py` turns these into text or JSON lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Started:
    """The plan is accepted and the work begins; `done_*` were found finished from an earlier run. `shards` are tensors in a diff."""

    shards: int
    nbytes: int
    done_shards: int = 0
    done_nbytes: int = 0
    what: str = "Writing"


@dataclass(frozen=True)
class Progress:
    """`nbytes` of the whole output are written by now, those of earlier runs included; `shard` is the current file."""

    nbytes: int
    shard: str


@dataclass(frozen=True)
class ShardDone:
    """A shard has its name, its digest and its journal line. `index` counts from 1."""

    name: str
    index: int
    shards: int
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ReadingBack:
    """Everything is written; `nbytes` of it are read from the disk again before the output gets its name."""

    nbytes: int


@dataclass(frozen=True)
class Note:
    """A sentence that the user should read: a warning or a fact found on the way."""

    text: str
    warning: bool = False


Event = Started | Progress | ShardDone | ReadingBack | Note
Listener = Callable[[Event], None]  # what `on_event=` takes

_turn = threading.Lock()
_listeners: list[tuple[Listener, dict[str, float]]] = []


@contextmanager
def listening(on_event: Listener) -> Iterator[None]:
    """Inside, `on_event` hears what `tell` says, in whatever thread: what is found or tried again where no listener is handed down."""
    listener: tuple[Listener, dict[str, float]] = (on_event, {})
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(event: Event, *, key: str = "", seconds: float = 0.0) -> None:
    """Hand `event` to the listeners, but of what has the same `key` only one in so many seconds."""
    now = time.monotonic()
    for on_event, told in list(_listeners):
        with _turn:
            fresh = key not in told or now - told[key] >= seconds
            told[key] = now if fresh else told[key]
        if fresh:
            on_event(event)
