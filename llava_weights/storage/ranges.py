"""Ranges of bytes of remote files: `hf://`, `https://`, `s3://`, `gs://`. Every answer is checked; failures that may pass are retried.

A file is pinned by its address (on the Hub with the full commit), size and ETag; one that is no longer that file is an InputError.
Ranges are plain requests: the block caches of fsspec's file objects read megabytes that nobody asked for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from typing import Any

from ..errors import HubError, UsageError
from . import http
from .retry import Absent, Attempts, Passing, Pinned, name_of, remote_changed, with_retries

PROGRESS_BYTES = 64 << 10  # after so many, the attempts are counted anew
PIECE_BYTES = 4 << 20  # what fsspec is asked for at once: it keeps an answer whole in memory
INSTALL_REMOTE = "run `pip install 'llava-weights[remote]'`"

_filesystems: dict[tuple[str, int], Any] = {}
_turn = threading.Lock()


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
            with closing(_chunks(file, offset + done, offset + len(out), clock)) as chunks:
                for chunk in chunks:
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
        return with_retries(address, lambda: http.head(address) if _is_http(address) else _stat(address))
    except Absent:
        return None


def filesystem(address: str, tries: int = 1) -> Any:
    """fsspec's file system for `s3://` or `gs://`, with its own number of tries. Raises UsageError where its package is missing."""
    scheme = address.partition(":")[0]
    with _turn:
        if (scheme, tries) not in _filesystems:
            once = {"config_kwargs": {"retries": {"total_max_attempts": 1}}} if scheme == "s3" else {}
            try:
                import fsspec  # type: ignore[import-untyped]

                made = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **once)
            except ImportError as error:
                raise UsageError(
                    f"`{scheme}://` needs a package that is not installed", facts={"reason": error}, hint=INSTALL_REMOTE
                ) from None
            made.retries = tries
            _filesystems[scheme, tries] = made
        return _filesystems[scheme, tries]


def _is_http(address: str) -> bool:
    return address.startswith(("hf://", "https://", "http://"))


def _chunks(file: Pinned, start: int, stop: int, clock: Callable[[], float]) -> Generator[bytes]:
    """Bytes [start, stop) as they come."""
    if not _is_http(file.path):
        for first in range(start, stop, PIECE_BYTES):
            yield stored(file.path, partial(_cat, start=first, stop=min(first + PIECE_BYTES, stop)))
    else:
        yield from http.chunks(file, start, stop, clock)


def _cat(store: Any, path: str, start: int, stop: int) -> bytes:
    return bytes(store.cat_file(path, start=start, end=stop))


def _stat(address: str) -> tuple[int, str]:
    found = stored(address, lambda store, path: store.info(path))
    return int(found["size"]), etag_of(found)


def etag_of(found: Any) -> str:
    """What tells two versions of an object apart, in what fsspec says of it."""
    return str(found.get("ETag") or found.get("generation") or found.get("etag") or found.get("LastModified") or "")


def stored(address: str, action: Callable[[Any, str], Any], tries: int = 1) -> Any:
    """What `action` returns for fsspec's file system and the path in it. Raises Absent, or HubError where access is refused."""
    store = filesystem(address, tries)
    try:
        return action(store, address.partition("://")[2])
    except FileNotFoundError:
        raise Absent(address) from None
    except PermissionError as error:
        what = f"access to `{name_of(address)}` is refused"
        raise HubError(what, facts={"address": address, "reason": error}, hint="check the credentials") from None
    except Exception as error:
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            hint = "log in, or set `FSSPEC_S3_ANON=true` for a public bucket"
            raise HubError(f"there are no credentials for `{address}`", hint=hint) from None
        raise
