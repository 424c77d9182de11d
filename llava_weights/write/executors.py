"""Pools that shards can be sent to: any `concurrent.futures.Executor`, and Ray behind the same interface.

The pool carries tasks and results, both a few kB; the weights go from and to a file system that every node sees.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from .. import __version__
from ..errors import HubError, LlavaWeightsError, OutputError, UsageError
from ..storage.threads import GLANCE, interruption

T = TypeVar("T")
IN_FLIGHT = 256  # tasks handed to a pool at a time: some MB of pickles, and more than a large cluster works on
RETRIES = 3  # lost workers that one task may survive; a task that kills its worker must not go round for ever
ANSWER_SECONDS = 10  # seconds that a cluster has to take up the connection


def completed(
    pool: Executor,
    calls: Iterable[Callable[[], T]],
    *,
    in_flight: int = IN_FLIGHT,
    stop: Callable[[BaseException], None] = lambda error: None,
) -> Iterator[T]:
    """Results of the calls, as they finish. After a failure no call begins; those that can't be stopped are waited for, and their results
    given too; then the first failure is raised. So nothing is written after this returns, and nothing that was finished is lost.

    The pool has at most `in_flight` of the calls at a time. `stop` is called with the first failure, for those that run to end soon. An
    interruption ends it too, where a `Shield` is open.

    Raises what a call raised, also where the pool wrapped it; OutputError where the pool itself broke.
    """
    left, running = deque(calls), set[Future[T]]()
    failure: BaseException | None = None
    stopped = False
    try:
        while left or running:
            while left and len(running) < in_flight:
                running.add(pool.submit(left.popleft()))
            done, running = wait(running, GLANCE, FIRST_COMPLETED)
            for future in done:
                if future.cancelled():
                    continue
                error = future.exception()
                if error is None:
                    yield future.result()
                    continue
                failure = failure or unwrapped(error)
            failure = failure or interruption()
            if failure is not None and not stopped:
                stopped = True
                left.clear()
                for other in running:
                    other.cancel()
                stop(failure)
        if failure is not None:
            raise failure
    finally:
        for future in running:
            future.cancel()
        if running:
            stop(CancelledError())
        wait(running)


def unwrapped(error: BaseException) -> BaseException:
    """The error that a task raised, without what a pool wrapped around it; OutputError for a worker that died."""
    seen: BaseException | None = error
    while seen is not None:
        inner = getattr(seen, "cause", None)  # Ray: RayTaskError also is a subclass of what it wraps, but without its attributes
        seen, known = inner if isinstance(inner, BaseException) else seen.__cause__, seen
        if isinstance(known, LlavaWeightsError) and not isinstance(inner, BaseException):
            return known
    return worker_lost(error) if isinstance(error, BrokenExecutor) else error


def worker_lost(error: BaseException) -> OutputError:
    """A worker ended before its task did."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    hint = "the same command continues; if it happens again, look at the worker's memory"
    return OutputError("a worker died, and its shard with it", facts={"reason": reason[:300]}, hint=hint)


@contextmanager
def open_executor(name: str | None, address: str | None = None, *, cpus: int = 1) -> Iterator[Executor | None]:
    """The pool that `--executor` names: None for none (threads of this process), `ray` for a Ray cluster.

    `cpus` is what one task uses: the plan's `settings.jobs`. `address` is Ray's: `auto` for the cluster that this machine belongs to,
    `HOST:PORT`; None takes `$RAY_ADDRESS`, a running cluster, or starts Ray on this machine. Raises UsageError for another name, where
    Ray is not installed, or where no node has `cpus` processors; HubError where no cluster answers.
    """
    if name is None:
        yield None
    elif name == "ray":
        with _connected(address):
            pool = RayExecutor(cpus)
            try:
                yield pool
            finally:
                pool.shutdown(cancel_futures=True)
    else:
        raise UsageError(f"`--executor {name}` does not exist", hint="`--executor ray` is the only one")


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """A connection to Ray, ended if it was made here. The handler of SIGTERM stays: Ray would replace it, and exit with 15."""
    ray = _ray()
    if ray.is_initialized():
        yield
        return
    _probe(address)
    main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGTERM) if main else None
    try:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:  # ConnectionError is an OSError
            raise _unreachable(address, error) from error
        finally:
            if main:
                signal.signal(signal.SIGTERM, previous)
        yield
    finally:
        ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UsageError("`--executor ray` needs Ray, which is not installed", hint="pip install 'llava-weights[ray]'") from error
    return ray


def _probe(address: str | None) -> None:
    """Ray itself tries for a minute to reach a host that does not answer."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _unreachable(address, error) from error


def _unreachable(address: str | None, error: BaseException) -> HubError:
    reasons = str(error).splitlines()
    what, facts = f"no Ray cluster answers at `{address or 'auto'}`", {"reason": reasons[0][:300] if reasons else type(error).__name__}
    return HubError(what, facts=facts, hint="start one with `ray start --head`, or give `--ray-address HOST:6379`")


class RayExecutor(Executor):
    """`concurrent.futures.Executor` over the connected Ray: one Ray task for each call, each with `cpus` processors of a node.

    A task whose worker or node is lost is begun again by Ray on another. Exceptions arrive as they were raised. `cancel` also
    interrupts a task that runs (KeyboardInterrupt); `wait` then waits for its end. Raises UsageError where no node is large enough.
    """

    def __init__(self, cpus: int = 1) -> None:
        self._ray = _ray()
        largest = max((node["Resources"].get("CPU", 0) for node in self._ray.nodes() if node["Alive"]), default=0)
        if 0 < largest < cpus:  # nodes without processors are a head that waits for others
            hint = f"pass `-j {largest:.0f}` or less"
            raise UsageError(f"no node of the Ray cluster has {cpus} processors", facts={"largest": f"{largest:.0f}"}, hint=hint)
        self._task = self._ray.remote(num_cpus=cpus, max_retries=RETRIES, retry_exceptions=False)(run_task)
        self._futures: set[_RayFuture] = set()
        self._turn = threading.Lock()
        self._closed = False

    def submit(self, function: Callable[..., T], /, *arguments: Any, **options: Any) -> Future[T]:
        with self._turn:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            future = _RayFuture(self._task.remote(__version__, function, arguments, options), self._ray)
            self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        future.listen()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._turn:
            self._closed = True
            futures = set(self._futures)
        if cancel_futures:
            for future in futures:
                future.cancel()
        if wait:
            for future in futures:
                future.ended.wait()


class _RayFuture(Future[Any]):
    """A Ray task as a Future. It is pending until its end: Ray does not say when a task begins."""

    def __init__(self, reference: Any, ray: Any) -> None:
        super().__init__()
        self.reference, self.ray = reference, ray
        self.ended = threading.Event()

    def listen(self) -> None:
        self.reference.future().add_done_callback(self._end)

    def cancel(self) -> bool:
        if super().cancel():
            self.ray.cancel(self.reference)
        return self.cancelled()

    def _end(self, ended: Future[Any]) -> None:
        try:
            if not self.set_running_or_notify_cancel():
                return
            error = ended.exception()
            if error is None:
                self.set_result(ended.result())
            else:
                self.set_exception(_from_ray(error, self.ray))
        finally:
            self.ended.set()


def _from_ray(error: BaseException, ray: Any) -> BaseException:
    """What the task raised, or what became of its worker."""
    cause = getattr(error, "cause", None)
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(cause, BaseException):
        return cause
    return worker_lost(error) if isinstance(error, ray.exceptions.RayError) else error


def run_task(version: str, function: Callable[..., T], arguments: tuple[Any, ...], options: dict[str, Any]) -> T:
    """What runs on a node. Raises UsageError where another version of this package is installed there: its bytes may differ."""
    if version != __version__:
        where = f"{socket.gethostname()} has llava-weights {__version__}"
        raise UsageError(f"a node has another version of llava-weights than the {version} here", facts={"node": where}, hint="update it")
    return function(*arguments, **options)
