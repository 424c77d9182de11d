"""Threads that never outlive their caller: it returns, or raises, when none of them is at work any more.

A thread that is left behind would use descriptors and buffers that its caller has closed, and that somebody else may have by then.
One Ctrl-C breaks off any wait, and a second one the wait for the threads' end, so inside a `Shield` no signal does. Only requests, which no
client can break off, may end by themselves later (`aside`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar, TypeVar

A = TypeVar("A")
B = TypeVar("B")
GLANCE = 0.1  # seconds between two looks for an interruption while a future is waited for


def usable_cores(system: Path = Path("/")) -> int:
    """The processors that this process may use: those of its affinity, as far as the quotas of its cgroups (v1 and v2) and of those above
    allow, rounded up, and at least one. `system` holds `proc` and `sys`."""
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # only Linux tells it
        cores = os.cpu_count() or 1
    quotas = []
    for line in _text(system / "proc/self/cgroup").splitlines():
        _, controllers, inside = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = system / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = root / inside.lstrip("/")
        for folder in (group, *group.parents):
            words = _text(folder / "cpu.max") or f"{_text(folder / 'cpu.cfs_quota_us')} {_text(folder / 'cpu.cfs_period_us')}"
            quota, period = ([int(word) for word in words.split() if word.isdigit()] + [0, 0])[:2]
            if quota and period:
                quotas.append(-(-quota // period))
            if folder == root:
                break
    return max(1, min([cores, *quotas]))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


class Brake:
    """Stops work in other threads, that which has begun and that which would begin later. `pull` calls what each gave to `held`, once, with
    the error that it is to end with."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._stops: list[Callable[[BaseException], None]] = []
        self._error: BaseException | None = None

    def pull(self, error: BaseException) -> None:
        """Stop all."""
        with self._turn:
            stops, self._stops, self._error = self._stops, [], error
        for stop in stops:
            stop(error)

    @contextmanager
    def held(self, stop: Callable[[BaseException], None]) -> Iterator[None]:
        """Inside, `stop` is called where the brake is pulled, or was pulled before."""
        with self._turn:
            error = self._error
            if error is None:
                self._stops.append(stop)
        if error is not None:
            stop(error)
        try:
            yield
        finally:
            with self._turn, suppress(ValueError):
                self._stops.remove(stop)


class Shield:
    """Inside, what the handler of a signal raises (KeyboardInterrupt) interrupts nothing: it is kept in `caught`, `stop` is called with
    it, and it is raised when the shield is closed. Outside of the main thread, where no handler runs, it does nothing.

    `stop` runs in the main thread at any moment, so it must take no lock that this thread may hold.
    """

    _open: ClassVar[list[Shield]] = []
    _handlers: ClassVar[dict[int, Any]] = {}

    def __init__(self, stop: Callable[[BaseException], None] = lambda error: None) -> None:
        self.caught: BaseException | None = None
        self._stop = stop

    def __enter__(self) -> Shield:
        if threading.current_thread() is threading.main_thread():
            try:
                if not Shield._open:
                    _take_over(Shield._handlers)
            except BaseException:
                _give_back(Shield._handlers)
                raise
            Shield._open.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self in Shield._open:
            Shield._open.remove(self)
            if not Shield._open:
                _give_back(Shield._handlers)
        if self.caught is not None and self.caught is not error:
            raise self.caught

    def check(self) -> None:
        """Raise what was caught."""
        if self.caught is not None:
            raise self.caught

    def _catch(self, error: BaseException) -> None:
        if self.caught is None:
            self.caught = error
            self._stop(error)


def interruption() -> BaseException | None:
    """What the open shields caught, in the main thread: for a loop that would otherwise go on."""
    main = threading.current_thread() is threading.main_thread()
    return next((shield.caught for shield in Shield._open if shield.caught), None) if main else None


def _take_over(handlers: dict[int, Any]) -> None:
    for number in signal.valid_signals():
        if callable(handler := signal.getsignal(number)) and handler is not _handle:
            handlers[number] = handler
            signal.signal(number, _handle)


def _give_back(handlers: dict[int, Any]) -> None:
    try:
        for number, handler in list(handlers.items()):
            if signal.getsignal(number) is _handle:  # else another one was set meanwhile
                signal.signal(number, handler)
    except BaseException:  # a signal whose handler is its own again
        _give_back(handlers)
        raise


def _forked() -> None:
    """A process that was forked inside a shield has none."""
    Shield._open.clear()
    with suppress(ValueError):  # forked by another thread: it is not asked for signals
        _give_back(Shield._handlers)


os.register_at_fork(after_in_child=_forked)


def _handle(number: int, frame: FrameType | None) -> None:
    try:
        Shield._handlers[number](number, frame)
    except BaseException as error:
        if not Shield._open:
            raise
        for shield in Shield._open:
            shield._catch(error)


def aside(action: Callable[[], B]) -> Future[B]:
    """What `action` will return, in a thread that may outlive its caller: it uses nothing that anybody closes."""
    result: Future[B] = Future()

    def run() -> None:
        try:
            result.set_result(action())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result


def waited(result: Future[B]) -> B:
    """What is in `result` once it is there. Raises what the open shields caught meanwhile."""
    while not wait([result], GLANCE).done:
        if (stopped := interruption()) is not None:
            raise stopped
    return result.result()


def in_threads(
    function: Callable[[A], B],
    items: Iterable[A],
    jobs: int,
    *,
    then: Callable[[B], None] = lambda result: None,
    stop: Callable[[], None] = lambda: None,
) -> list[B]:
    """What `function` returns for each of `items`, `jobs` at a time, in their order; `then` gets each in this thread, in order too.

    After a failure or an interruption nothing new begins, and `stop` is called so that running work ends soon. Raises the first failure
    in the order of `items`, or the interruption.
    """
    results: list[B] = []
    with Shield() as shield, ThreadPoolExecutor(jobs) as pool:
        futures: list[Future[B]] = []
        try:
            futures += [pool.submit(function, item) for item in items]
            for future in futures:
                while not wait([future], GLANCE).done:
                    shield.check()
                shield.check()
                results.append(future.result())
                then(results[-1])
        except BaseException:
            stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results
