"""What the engine tells whoever listens. The library never prints; `console.py` turns these into text or JSON lines."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
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

# Who hears what is found before any work begins, such as where an input comes from.
listener: ContextVar[Callable[[Event], None]] = ContextVar("listener", default=lambda event: None)
