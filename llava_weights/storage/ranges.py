"""Ranges of bytes of remote files: `hf://`, `https://`, `s3://`, `gs://`. Every answer is checked; failures that may pass are retried.

A file is pinned by its address (on the Hub with the full commit), size and ETag; one that is no longer that file is an InputError.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing

from ..errors import HubError
from . import buckets, http
from .retry import Absent, Attempts, Passing, Pinned, name_of, remote_changed, with_retries

PROGRESS_BYTES = 64 << 10  # after so many, the attempts are counted anew


def read(
    file: Pinned,
    offset: int,
    out: memoryview,
    stopping: threading.Event | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Fill `out` with the bytes of `file` from `offset`; after a failure, go on from where it stopped. `clock` measures the speed.

    Raises InputError where the file changed, HubError where it can't be read or `stopping` was set.
    """
    attempts, done = Attempts(file.path, stopping), 0
    while done < len(out):
        begun = done
        try:
            start, stop = offset + done, offset + len(out)
            came = http.chunks(file, start, stop, clock) if _is_http(file.path) else buckets.chunks(file, start, stop)
            with closing(came):
                for chunk in came:
                    if len(chunk) > len(out) - done:
                        raise Passing("more bytes came than were asked for")
                    out[done : done + len(chunk)] = chunk
                    done += len(chunk)
                    if attempts.stopping.is_set():
                        raise HubError(
                            f"`{name_of(file.path)}` was not read to its end", hint="run the same command again, or download it first"
                        )
            if done < len(out):
                raise Passing("the answer ended early")
        except Absent:
            raise remote_changed(file) from None
        except Exception as error:
            attempts.failures = 0 if done - begun >= PROGRESS_BYTES else attempts.failures
            attempts.after(error)


def check_unchanged(file: Pinned) -> None:
    """Raise InputError if `file` changed. Every answer of HTTP says so by itself; other stores are asked."""
    if not _is_http(file.path) and stat(file.path) != (file.size, file.etag):
        raise remote_changed(file)


def stat(address: str) -> tuple[int, str] | None:
    """Size and ETag of a file, None where there is none."""
    try:
        return with_retries(address, lambda: http.head(address) if _is_http(address) else buckets.stat(address))
    except Absent:
        return None


def _is_http(address: str) -> bool:
    return address.startswith(("hf://", "https://", "http://"))
