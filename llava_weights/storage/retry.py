"""Retries: which failures of a network may pass, how long to wait, when to give up, and the notes on it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

from ..errors import HubError, InputError
from ..events import Note, tell
from .threads import aside

T = TypeVar("T")
TRIES = 6  # without progress: with these pauses some 20 seconds, or minutes where a server asks for them
PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds; each is twice the one before. The Hub counts requests in windows of 5 minutes
NETWORK = ("httpx", "httpx2", "httpcore", "h11", "requests", "urllib3")
ANSWER_SECONDS = 90.0  # that a server has for an answer's headers, or for an answer of some kB
NOTE_SECONDS = 30.0  # between two notes about one server
CHECK_CONNECTION = "check the connection, then run the same command again"


class Pinned(Protocol):
    """A remote file as it was when it was indexed: `reading.SourceFile` is one."""

    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def etag(self) -> str: ...


class Passing(Exception):
    """A failure that may pass; `wait` is how many seconds the server asks for, `tries` how many attempts it counts for."""

    def __init__(self, reason: str, wait: float = 0.0, tries: int = 1) -> None:
        super().__init__(reason)
        self.wait, self.tries = wait, tries


class Absent(Exception):
    """There is no such file."""


class Attempts:
    """Counts the failures of one request and waits after each: HubError after TRIES without progress, or once `stopping` is set."""

    def __init__(self, address: str, stopping: threading.Event | None = None) -> None:
        self.address, self.stopping, self.failures = address, stopping or threading.Event(), 0

    def after(self, error: Exception) -> None:
        """Return when it is time to try again. Raises `error` itself where another try would change nothing."""
        passing = _passing(error)
        if passing is None:
            raise error
        self.failures += passing.tries
        pause = min(LONGEST_PAUSE, max(passing.wait, PAUSE * 2 ** (self.failures - 1) * random.uniform(0.5, 1)))
        if self.failures < TRIES:
            tell_retry(self.address, str(passing))
        if self.failures >= TRIES or self.stopping.wait(pause):
            facts = {"address": self.address, "tries": self.failures, "reason": passing}
            raise HubError(f"`{name_of(self.address)}` can't be read over the network", facts=facts, hint=CHECK_CONNECTION) from None


def with_retries(address: str, action: Callable[[], T]) -> T:
    """What `action` returns, tried again after failures that may pass. Raises HubError where they do not."""
    attempts = Attempts(address)
    while True:
        try:
            return action()
        except Exception as error:
            attempts.after(error)


def within(seconds: float, action: Callable[[], T], late: Callable[[T], object] = lambda result: None) -> T:
    """What `action` returns. Raises Passing where that takes more than `seconds`: a server that sends a byte now and then could hold a
    request for ever. The request then goes on in a thread of its own; should it end, `late` gets what it returns."""
    result = aside(action)
    try:
        return result.result(seconds)
    except TimeoutError:
        if result.done():
            return result.result()
        result.add_done_callback(lambda ended: None if ended.exception() else late(ended.result()))
        raise Passing(f"no whole answer in {seconds:.0f} seconds", tries=TRIES // 2) from None


def tell_retry(address: str, reason: str) -> None:
    """Send a note that `address` is tried again because of `reason`; for one server, not more than one in NOTE_SECONDS."""
    note = Note(f"no good answer for `{address}` yet ({reason}): trying again, at most {TRIES - 1} times")
    tell(note, key="/".join(address.split("/")[:3]), seconds=NOTE_SECONDS)


def name_of(address: str) -> str:
    return address.rstrip("/").rpartition("/")[2]


def remote_changed(file: Pinned) -> InputError:
    return InputError(
        f"`{name_of(file.path)}` changed while it was being read",
        facts={"address": file.path, "size": f"{file.size:,} bytes when indexed", "etag": file.etag or "none"},
        hint="the inputs must stay as they are; run the same command with `--restart`",
    )


def _passing(error: Exception) -> Passing | None:
    """`error` as one that may pass, None where another attempt would fail too."""
    if isinstance(error, Passing) or type(error).__name__ == "OfflineModeIsEnabled":
        return error if isinstance(error, Passing) else None
    cause: BaseException = error
    while inner := cause.__cause__ or cause.__context__:
        cause = inner
    words = f"{type(error).__name__}: {cause.strerror}" if isinstance(cause, OSError) and cause.strerror else type(error).__name__
    return Passing(words) if isinstance(error, OSError | TimeoutError) or type(error).__module__.split(".")[0] in NETWORK else None
