"""How far a run is: the rate of the last seconds, the time that is left, the bar as text, and the bar for notebooks and scripts."""

from __future__ import annotations

import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType
from typing import Any

from ..errors import UsageError
from ..events import Event, Note, Progress, ReadingBack, ShardDone, Started
from ..text import _number, _unit, clock_face, redact, shards, size, visible

RATE_SECONDS = 30.0  # seconds that the rate looks back: an average since the start would hide a slow disk until too late
FIRST_SECONDS = 5.0  # of a phase, in which no time left is told: caches and the first files make it ten times too long or short
LEAST_BAR = 8  # cells


@dataclass
class Meter:
    """How far a run is, and how fast over the last RATE_SECONDS; bytes of earlier runs count as done but not as speed.

    Rate, share and time left are of all that is done to bytes: written, read back, and what follows. The amount is that of the phase.
    """

    started: Started
    begun: float  # when the run began, of which this may be a later phase
    since: float  # when this phase began
    nbytes: int
    done_shards: int
    done_nbytes: int
    shard: str = ""
    read_back: int = 0
    reading_back: bool = False  # all is written
    seen: set[str] = field(default_factory=set)
    samples: deque[tuple[float, int]] = field(default_factory=deque)

    @classmethod
    def start(cls, started: Started, now: float, begun: float | None = None) -> Meter:
        done = started.done_nbytes
        return cls(started, now if begun is None else begun, now, done, started.done_shards, done, samples=deque([(now, done)]))

    def update(self, event: Progress, now: float) -> None:
        self.nbytes = min(max(self.nbytes, event.nbytes), self.started.nbytes)  # workers may report out of order
        self.read_back = min(max(self.read_back, event.read_back), self.started.to_read_back)
        self.shard = event.shard
        self.seen.add(event.shard)
        if now - self.samples[-1][0] >= 1:
            self.samples.append((now, self.done))

    def finish(self, event: ShardDone, now: float) -> None:
        """A pool reports no bytes on the way, only finished shards."""
        self.done_shards += 1
        self.done_nbytes += event.nbytes
        self.update(Progress(self.done_nbytes, event.name), now)

    @property
    def what(self) -> str:
        return "Reading back" if self.reading_back else self.started.what

    @property
    def done(self) -> int:
        return self.nbytes + self.read_back

    @property
    def total(self) -> int:
        return self.started.nbytes + self.started.to_read_back + self.started.to_follow

    def rate(self, now: float) -> float | None:
        """Bytes per second, or None in the first second, where there is no measurement."""
        while len(self.samples) > 1 and self.samples[1][0] <= now - RATE_SECONDS:
            self.samples.popleft()
        since, before = self.samples[0]
        return (self.done - before) / (now - since) if now > since and now - self.since >= 1 else None

    def remaining(self, now: float) -> float | None:
        """Seconds left at the present rate; None where that says nothing: at first, and where work of another speed follows."""
        rate = self.rate(now)
        return (self.total - self.done) / rate if rate and now - self.since >= FIRST_SECONDS and not self.started.to_follow else None

    @property
    def finished(self) -> str:
        return f"{self.done_shards} of {shards(self.started.shards)} ({size(self.done_nbytes)})"

    @property
    def percent(self) -> int:
        return 100 * self.done // self.total if self.total else 100

    @property
    def amount(self) -> str:
        back = self.reading_back
        done, of = (self.read_back, self.started.to_read_back) if back else (self.nbytes, self.started.nbytes)
        scale, unit = _unit(of)
        return f"{_number(done, scale)}/{_number(of, scale)} {unit}"

    @property
    def place(self) -> str:
        """`3/6` while the third of six files or tensors is in hand; nothing where there is only one."""
        count = self.started.shards
        return f"{min(max(self.started.done_shards + len(self.seen), 1), count)}/{count}" if count > 1 else ""

    def line(self, now: float) -> str:
        """`[0:30] 9.4/26.0 GB 36% 313 MB/s, about 0:53 left`"""
        rate, remaining = self.rate(now), self.remaining(now)
        text = f"[{clock_face(now - self.begun)}] {'read back ' if self.reading_back else ''}{self.amount} {self.percent}%"
        text += "" if rate is None else f" {size(round(rate))}/s"
        return text if remaining is None else f"{text}, about {clock_face(remaining)} left"

    def document(self, now: float) -> dict[str, object]:
        """`nbytes` of `total` are written, `read_back` of `to_read_back` read again, at `rate` bytes per second of both, `remaining`
        seconds left; null where unknown."""
        known = {"nbytes": self.nbytes, "total": self.started.nbytes, "shard": self.shard}
        known |= {"read_back": self.read_back, "to_read_back": self.started.to_read_back}
        return known | {"rate": self.rate(now), "remaining": self.remaining(now)}

    def bar(self, now: float, columns: int, ascii_only: bool) -> str:
        """One line of `columns` cells. What there is no room for is left out whole, the least important first; the bar takes the rest."""
        from tqdm.std import tqdm

        rate, remaining = self.rate(now), self.remaining(now)
        reports = {
            "amount": self.amount,
            "place": self.place,
            "rate": "" if rate is None else f"{size(round(rate))}/s",
            "elapsed": f"[{clock_face(now - self.begun)}]",
            "left": "" if remaining is None else f"{clock_face(remaining)} left",
            "name": visible(self.shard),
        }
        head, kept = f"{self.what} {self.percent:3d}% |", set[str]()
        room = columns - len(head) - LEAST_BAR + 1
        for key in ("left", "place", "amount", "rate", "elapsed", "name"):
            needed = len(reports[key]) + 2
            if reports[key] and needed <= room:
                kept.add(key)
                room -= needed
        report = "  ".join(reports[key] for key in reports if key in kept)
        form = f"{head}{{bar}}| {{report}}"
        line: str = tqdm.format_meter(
            self.done, self.total, now - self.begun, ncols=columns, ascii=ascii_only, bar_format=form, report=report
        )
        return line.rstrip()


class ProgressBar:
    """A bar for scripts and notebooks: `with lw.ProgressBar() as bar: lw.execute(plan, out, on_event=bar)`.

    Give it as `on_event` to any function that takes one. It shows the bytes done of all, written and read back (a widget in a notebook that
    has `ipywidgets`, else a line on standard error), one bar for each stage, and the notes and warnings above it as lines. Outside a `with`
    the bar of the last stage is closed once it is full; inside, also where an error ends the run. `close` may be called at any time; the
    next stage opens a new bar. May be told from several threads.

    `disable` is tqdm's: True shows no bars, None shows them only where standard error is a terminal. Notes are shown all the same.
    Raises UsageError for another value.
    """

    def __init__(self, *, disable: bool | None = False) -> None:
        if disable is not None and not isinstance(disable, bool):
            raise UsageError(f"`disable` is {disable!r}, it must be True, False or None", hint="leave it out to see the bar")
        self._disable = disable
        self._bar: Any = None  # tqdm's classes are not typed
        self._seen = 0  # bytes of the stage that are done, by the largest report
        self._finished = 0  # bytes of its finished shards
        self._written = self._read_back = 0
        self._turn = threading.RLock()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        """Show what `event` tells."""
        with self._turn:
            match event:
                case Started():
                    self._open(event)
                case Progress():
                    self._reach(event.nbytes, event.read_back)
                case ShardDone():  # all that a pool reports
                    self._finished += event.nbytes
                    self._reach(self._finished)
                case ReadingBack():
                    self._write(f"Reading back {size(event.nbytes)}")
                case Note():
                    self._write(f"warning: {event.text}" if event.warning else event.text)

    def close(self) -> None:
        """Take the bar as it is for finished: a full one stays, one that was cut short shows how far it came."""
        with self._turn:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def _open(self, event: Started) -> None:
        self.close()
        self._seen = self._finished = self._written = event.done_nbytes
        self._read_back = 0
        self._bar = _bar_class()(
            desc=event.what,
            total=event.nbytes + event.to_read_back,
            initial=event.done_nbytes,
            unit="B",
            unit_scale=True,
            disable=self._disable,
        )
        self._reach(self._seen)

    def _reach(self, nbytes: int, read_back: int = 0) -> None:
        if self._bar is None:
            return
        self._written, self._read_back = max(self._written, nbytes), max(self._read_back, read_back)  # workers may report out of order
        new = min(self._written + self._read_back, self._bar.total) - self._seen
        if new > 0:
            self._seen += new
            self._bar.update(new)
        if self._seen >= self._bar.total:
            self.close()

    def _write(self, line: str) -> None:
        _bar_class().write(visible(redact(line)), file=sys.stderr)


@cache
def _bar_class() -> Any:
    """tqdm's bar for wherever this runs, without the thread that watches over slow bars: it would stay when the work is done."""
    from tqdm.auto import tqdm

    return type("Bar", (tqdm,), {"monitor_interval": 0})
