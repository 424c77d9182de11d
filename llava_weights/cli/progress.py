"""How far a run is: the rate of the last seconds, the time that is left, and the bar as text."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..events import Progress, ShardDone, Started
from ..text import _number, _unit, clock_face, shards, size, visible

RATE_SECONDS = 30.0  # seconds that the rate looks back: an average since the start would hide a slow disk until too late


@dataclass
class Meter:
    """How far a run is, and how fast over the last RATE_SECONDS; bytes of earlier runs count as done but not as speed."""

    started: Started
    begun: float
    nbytes: int
    done_shards: int
    done_nbytes: int
    shard: str = ""
    samples: deque[tuple[float, int]] = field(default_factory=deque)

    @classmethod
    def start(cls, started: Started, now: float) -> Meter:
        done = started.done_nbytes
        return cls(started, now, done, started.done_shards, done, samples=deque([(now, done)]))

    def update(self, event: Progress, now: float) -> None:
        self.nbytes = min(max(self.nbytes, event.nbytes), self.started.nbytes)  # workers may report out of order
        self.shard = event.shard
        if now - self.samples[-1][0] >= 1:
            self.samples.append((now, self.nbytes))

    def finish(self, event: ShardDone, now: float) -> None:
        """A pool reports no bytes on the way, only finished shards."""
        self.done_shards += 1
        self.done_nbytes += event.nbytes
        self.update(Progress(self.done_nbytes, event.name), now)

    def rate(self, now: float) -> float | None:
        """Bytes per second, or None before there is a measurement."""
        while len(self.samples) > 1 and self.samples[1][0] <= now - RATE_SECONDS:
            self.samples.popleft()
        since, before = self.samples[0]
        return (self.nbytes - before) / (now - since) if now > since else None

    def remaining(self, now: float) -> float | None:
        """Seconds left at the present rate."""
        rate = self.rate(now)
        return (self.started.nbytes - self.nbytes) / rate if rate else None

    @property
    def finished(self) -> str:
        return f"{self.done_shards} of {shards(self.started.shards)} ({size(self.done_nbytes)})"

    @property
    def percent(self) -> int:
        return 100 * self.nbytes // self.started.nbytes if self.started.nbytes else 100

    @property
    def amount(self) -> str:
        scale, unit = _unit(self.started.nbytes)
        return f"{_number(self.nbytes, scale)}/{_number(self.started.nbytes, scale)} {unit}"

    def line(self, now: float) -> str:
        """`[0:30] 9.4/26.0 GB 36% 313 MB/s, about 0:53 left`"""
        rate, remaining = self.rate(now), self.remaining(now)
        text = f"[{clock_face(now - self.begun)}] {self.amount} {self.percent}%"
        text += "" if rate is None else f" {size(round(rate))}/s"
        return text if remaining is None else f"{text}, about {clock_face(remaining)} left"

    def document(self, now: float) -> dict[str, object]:
        """`nbytes` of `total` are written, at `rate` bytes per second, `remaining` seconds left; null where unknown."""
        known = {"nbytes": self.nbytes, "total": self.started.nbytes, "shard": self.shard}
        return known | {"rate": self.rate(now), "remaining": self.remaining(now)}

    def bar(self, now: float, columns: int, ascii_only: bool) -> str:
        """One line of at most `columns` cells; the shard's name is last, since it may be cut without loss."""
        from tqdm.std import tqdm

        rate, remaining = self.rate(now), self.remaining(now)
        speed = "" if rate is None else f"  {size(round(rate))}/s"
        left = "" if remaining is None else f"  {clock_face(remaining)} left"
        line: str = tqdm.format_meter(
            self.nbytes,
            self.started.nbytes,
            now - self.begun,
            ncols=columns,
            ascii=ascii_only,
            bar_format=f"{self.started.what} {self.percent:3d}% |{{bar:{20 if columns > 70 else 10}}}| {{report}}",
            report=f"{self.amount}{speed}{left}  {visible(self.shard)}",
        )
        return line
