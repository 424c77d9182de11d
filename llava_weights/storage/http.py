"""Ranges over HTTP: every answer is checked, redirects are followed only to safe places, signed addresses are renewed.

They go through huggingface_hub's own session, so its proxies and certificates hold; its token goes to the Hub and nowhere else.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from ..errors import HubError
from . import retry
from .retry import Absent, Passing, Pinned, name_of, remote_changed, within

TIMEOUT = 30.0  # seconds without a byte
HOPS = 5
MAX_SIZE = 1 << 42
WINDOW_SECONDS, SLOWEST_BYTES = 30.0, 64 << 10  # at least so many bytes in so many seconds: 2 kB/s, or a shard of 5 GB takes a month
NO_ADDRESS = ("InvalidURL", "UnsupportedProtocol", "LocalProtocolError")  # httpx's errors for an address or a header that can't be sent
PASSING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1")


@dataclass(frozen=True)
class Signed:
    """Where a file of the Hub, or one behind a redirect, is served for a while: a signed address, and the file's ETag there."""

    address: str
    etag: str


_signed: dict[str, Signed] = {}


def chunks(file: Pinned, start: int, stop: int, clock: Callable[[], float] = time.monotonic) -> Generator[bytes]:
    """Bytes [start, stop) of `file` as they come. Raises InputError where it changed, Passing where another try may help: also where
    fewer than SLOWEST_BYTES come in WINDOW_SECONDS of `clock`."""
    with _answer(file.path, start, stop) as (answer, place):
        _check_range(file, answer, place, start, stop)
        begun, came = clock(), 0
        for chunk in answer.iter_raw():
            came += len(chunk)
            if (passed := clock() - begun) >= WINDOW_SECONDS:
                if came < SLOWEST_BYTES:
                    raise Passing(f"only {came:,} bytes came in {passed:.0f} seconds")
                begun, came = clock(), 0
            yield chunk


@contextmanager
def _answer(address: str, start: int, stop: int) -> Iterator[tuple[Any, str]]:
    """The answer to a request for a range, its body unread, and the address that gave it after all redirects."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    known = _signed.get(address)
    first, headers = _first(address)
    place, headers = (known.address, {}) if known else (first, headers)
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    for _ in range(HOPS):
        with ExitStack() as stack:
            try:
                request = get_session().stream("GET", place, headers=headers, follow_redirects=False, timeout=TIMEOUT)
                answer = within(retry.ANSWER_SECONDS, request.__enter__, lambda answer: answer.close())
                stack.push(request)
            except OfflineModeIsEnabled:
                raise HubError(f"`{name_of(address)}` can't be read: `HF_HUB_OFFLINE` is set", hint="unset it") from None
            except Exception as error:
                if isinstance(error, ValueError) or type(error).__name__ in NO_ADDRESS:
                    raise _no_address(address, place, error) from None
                raise
            _check_pin(address, answer)
            if not answer.has_redirect_location:
                _check_status(address, answer, place != first)
                yield answer, place
                return
            location = answer.headers["location"]
        try:
            target = urljoin(place, location)
            follow = _may_follow(place, target)
        except ValueError as error:
            raise _no_address(address, location, error) from None
        if not follow:
            what = f"`{name_of(address)}` is redirected to where no file is read from"
            raise HubError(what, facts={"to": _bare(target)}, hint="check the address, or download the file first")
        if _origin(place) != _origin(target):
            headers = {name: value for name, value in headers.items() if name in ("Range", "Accept-Encoding")}
        place = target
    raise HubError(
        f"`{name_of(address)}` is redirected without end", facts={"address": address}, hint="check the address, or download the file first"
    )


def _no_address(address: str, place: str, error: Exception) -> HubError:
    facts = {"asked for": address, "leads to": repr(place[:200]), "reason": error}
    hint = "check the address, and those of proxies in the environment"
    return HubError(f"`{name_of(address)}` can't be read: where it should lie is no address", facts=facts, hint=hint)


def _first(address: str) -> tuple[str, dict[str, str]]:
    """Where to ask first, and with which headers: the Hub's token is for the Hub alone."""
    if not address.startswith("hf://"):
        return address, {}
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    repo, _, rest = address.removeprefix("hf://").partition("@")
    commit, _, path = rest.partition("/")
    return f"{endpoint()}/{repo}/resolve/{commit}/{quote(path)}", build_hf_headers(library_name="llava-weights")


def _check_status(address: str, answer: Any, signed: bool) -> None:
    """Raise what an answer's status means, unless it is success."""
    status = answer.status_code
    if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
        return
    if signed and 400 <= status < 500 and status not in PASSING:  # the signature has expired: ask for another
        _signed.pop(address, None)
        raise Passing(f"status {status} from a signed address")
    if status in PASSING or status >= 500:
        asked = re.search(r"^\d{1,6}$|\bt=\d{1,6}", answer.headers.get("retry-after") or answer.headers.get("ratelimit", ""))
        raise Passing(f"status {status}", float(asked[0].removeprefix("t=")) if asked else 0.0)
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        raise Absent(address)
    hint = "log in with `hf auth login`, accept the licence on the model's page" if address.startswith("hf://") else "check the address"
    raise HubError(f"`{name_of(address)}` is refused by its server", facts={"address": address, "status": status}, hint=hint)


def _check_pin(address: str, answer: Any) -> None:
    """Raise HubError where the Hub sends another commit than the one that was asked for."""
    commit = answer.headers.get("x-repo-commit")
    if address.startswith("hf://") and commit and f"@{commit}/" not in address:
        raise HubError(
            f"the Hub answers with another commit of `{name_of(address)}`",
            facts={"address": address, "commit": commit},
            hint="run the same command again",
        )


def _check_range(file: Pinned, answer: Any, place: str, start: int, stop: int) -> None:
    """Raise unless the body is bytes [start, stop) of the file that was indexed: InputError where it changed, else Passing."""
    size = _size(answer)
    whole = answer.status_code == HTTPStatus.OK
    if whole and (start, stop) != (0, file.size):
        raise Passing("the server sends the whole file in place of a range")
    if size not in (None, file.size):
        raise remote_changed(file)
    wanted, etag = f"bytes {start}-{stop - 1}/{file.size}", _etag(answer)
    if not whole and answer.headers.get("content-range") != wanted:
        raise Passing("the server sends another range than was asked for")
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise Passing("the server sends the range compressed")
    if not file.path.startswith("hf://"):
        pinned = file.etag
    else:  # a commit never changes, and its files have one ETag on the Hub and another at each place that stores them
        known = _signed.get(file.path)
        pinned = known.etag if known and known.address == place else etag
    if etag != pinned:
        raise remote_changed(file)
    if _origin(place) != _origin(_first(file.path)[0]):
        _signed[file.path] = Signed(place, etag)


def head(address: str) -> tuple[int, str]:
    """Size and ETag, by asking for one byte: signed addresses refuse HEAD. Raises Absent."""
    with _answer(address, 0, 1) as (answer, _):
        size = _size(answer)
        if size is None or not 0 <= size < MAX_SIZE:
            raise HubError(
                f"`{name_of(address)}` has no size that can be believed", facts={"address": address}, hint="download the file first"
            )
        return size, _etag(answer)


def _size(answer: Any) -> int | None:
    """The size of the whole file by the headers of an answer, None where they do not say."""
    if answer.status_code == HTTPStatus.OK:
        text = answer.headers.get("content-length", "")
    else:
        text = answer.headers.get("content-range", "").rpartition("/")[2]
    return int(text) if re.fullmatch(r"\d{1,15}", text) else None


def _etag(answer: Any) -> str:
    return str(answer.headers.get("etag") or answer.headers.get("last-modified") or "")[:200]


def _may_follow(source: str, target: str) -> bool:
    """Redirects lead to https, or stay where they are: on the same server, or on this machine."""
    here, there = urlsplit(source), urlsplit(target)
    if there.port == 0:  # also raises ValueError for what is no port
        return False
    local = all(LOOPBACK.fullmatch(place.hostname or "") for place in (here, there))
    return there.scheme == "https" or (there.scheme == "http" and (local or _origin(source) == _origin(target)))


def _origin(address: str) -> tuple[str, str]:
    return urlsplit(address).scheme, urlsplit(address).netloc


def _bare(address: str) -> str:
    """An address without user, password and signature."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.hostname}{parts.path}"


def endpoint() -> str:
    """Where the Hub is: `HF_ENDPOINT`, or huggingface.co. Raises HubError for no address: importing huggingface_hub would fail."""
    given = os.environ.get("HF_ENDPOINT") or ""
    try:
        parts = urlsplit(given)
        sound = parts.scheme.lower() in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if given and not sound:
        raise HubError("`HF_ENDPOINT` is no address", facts={"HF_ENDPOINT": given}, hint="set it as `https://hub.example`, or unset it")
    from huggingface_hub import constants

    return (given or constants.ENDPOINT).rstrip("/")
