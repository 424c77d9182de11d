"""Objects of `s3://` and `gs://`, through obstore: it signs, sends parts at once and tries them again; a range is asked for by the ETag
that was pinned, and what reads it tries again (ranges.py). No credential is seen here.

Measured before it was taken (0.12.1, two packages, 16 MB; s3fs with gcsfs: 49 packages, 116 MB): an answer of another range is refused, the
token stays behind at a redirect to another host, and an answer that drips ends with its time. Its client for plain HTTP follows redirects
to any host and sends no signed address as it was given, so addresses of the web and of the Hub are read by http.py.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HubError, UsageError
from .reading import SourceFile
from .retry import Absent, Passing, Pinned, name_of, remote_changed

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs")
REQUEST_SECONDS, SILENCE_SECONDS = 300, 30  # of a whole request, and without a byte: 8 MiB in that time are 28 kB/s
PART_TRIES, PART_RETRY_SECONDS = 8, 180  # of each part that is sent: obstore pauses between them, at first 0.1 s
PART_BYTES, PARTS_AT_ONCE, MOST_PARTS = 8 << 20, 4, 10_000  # S3 takes at most 10,000 parts; those at once lie in memory
CHUNK_BYTES = 1 << 20
INSTALL_REMOTE = "run `pip install 'llava-weights[remote]'`"
AWS_HINT = (
    "set `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, or `AWS_SKIP_SIGNATURE=true` for a public bucket; for `~/.aws` install boto3"
)
GOOGLE_HINT = "set `GOOGLE_APPLICATION_CREDENTIALS`, or log in with `gcloud auth application-default login`"

_stores: dict[tuple[str, str, int], ObjectStore] = {}
_turn = threading.Lock()
_process: list[int] = []  # that began to use obstore: in a fork of it, its threads do not exist, and a call would wait for ever


def list_folder(address: str) -> tuple[dict[str, SourceFile], list[str]]:
    """The objects directly under `address/` by bare name, and the names of its folders. Raises Absent where the bucket does not exist."""
    store, key = _open(address)
    import obstore

    with _asking(address):
        found = obstore.list_with_delimiter(store, key)
    home = address.removesuffix(key).rstrip("/")
    files = [SourceFile(f"{home}/{each['path']}", int(each["size"]), 0, 0, etag=str(each["e_tag"] or "")) for each in found["objects"]]
    return {file.name: file for file in files}, [name_of(prefix) for prefix in found["common_prefixes"]]


def stat(address: str) -> tuple[int, str]:
    """Size and ETag of an object. Raises Absent."""
    store, key = _open(address)
    import obstore

    with _asking(address):
        found = obstore.head(store, key)
    return int(found["size"]), str(found["e_tag"] or "")


def chunks(file: Pinned, start: int, stop: int) -> Generator[bytes]:
    """Bytes [start, stop) of `file` as they come. Raises InputError where it changed, Passing where another try may help."""
    store, key = _open(file.path)
    import obstore

    with _asking(file.path, file):
        answer = obstore.get(store, key, options={"range": (start, stop), "if_match": file.etag or None})
        if (int(answer.meta["size"]), str(answer.meta["e_tag"] or "")) != (file.size, file.etag):
            raise remote_changed(file)
        if answer.attributes.get("Content-Encoding", "identity") not in ("identity", "aws-chunked"):
            raise Passing("the server sends the range compressed")
        for chunk in answer.stream(min_chunk_size=CHUNK_BYTES):
            yield bytes(chunk)


def put(address: str, data: Path | Iterator[memoryview], size: int) -> str:
    """Send an object of `size` bytes, in parts where it is large; returns its ETag. After any error, what was there is there still."""
    store, key = _open(address, PART_TRIES)
    import obstore

    part = max(PART_BYTES, -(-size // MOST_PARTS))
    with _asking(address):
        done = obstore.put(store, key, data, use_multipart=size > part, chunk_size=part, max_concurrency=PARTS_AT_ONCE)
    return str(done["e_tag"] or "")


def delete(address: str) -> None:
    """Delete an object; nothing happens where there is none."""
    store, key = _open(address, PART_TRIES)
    import obstore

    with _asking(address):
        obstore.delete(store, key)


def _open(address: str, tries: int = 1) -> tuple[ObjectStore, str]:
    """The store of a bucket, and the key in it. Raises UsageError where the package is missing, and in a fork of a process that used it."""
    if _process and _process != [os.getpid()]:
        what = f"`{address.partition(':')[0]}://` can't be used in a process that was forked from one that used it"
        raise UsageError(what, hint="make the pool with `multiprocessing.get_context('spawn')`")
    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    with _turn:
        if (found := _stores.get((scheme, bucket, tries))) is None:
            found = _stores[scheme, bucket, tries] = _made(scheme, bucket, tries)
    return found, key.rstrip("/")


def forget() -> None:
    """Read the environment anew when a bucket is opened next."""
    with _turn:
        _stores.clear()


def _made(scheme: str, bucket: str, tries: int) -> ObjectStore:
    try:
        from obstore.store import GCSStore, S3Store
    except ImportError as error:
        what = f"`{scheme}://` needs a package that is not installed"
        raise UsageError(what, facts={"reason": error}, hint=INSTALL_REMOTE) from None
    own = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    _process[:] = [os.getpid()]
    how: Any = {
        "client_options": {
            "timeout": timedelta(seconds=REQUEST_SECONDS),
            "read_timeout": timedelta(seconds=SILENCE_SECONDS),
            "connect_timeout": timedelta(seconds=SILENCE_SECONDS),
            "allow_http": own.startswith("http://"),
        },
        "retry_config": {"max_retries": tries - 1, "retry_timeout": timedelta(seconds=PART_RETRY_SECONDS)},
    }
    if scheme == "gs":
        return GCSStore(bucket, **how)
    if own:
        how["endpoint"] = own
    return S3Store(bucket, **how, **_aws_credentials())


def _aws_credentials() -> dict[str, Any]:
    """Those of `~/.aws`, where boto3 is installed to read them; what stands in the environment, obstore finds by itself."""
    files = (os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), os.environ.get("AWS_CONFIG_FILE", "~/.aws/config"))
    if os.environ.get("AWS_ACCESS_KEY_ID") or not any(Path(file).expanduser().exists() for file in files):
        return {}
    try:
        from boto3 import Session  # type: ignore[import-untyped]
        from obstore.auth.boto3 import Boto3CredentialProvider

        return {"credential_provider": Boto3CredentialProvider(Session())}
    except (ImportError, ValueError):  # ValueError: there are none
        return {}


@contextmanager
def _asking(address: str, pinned: Pinned | None = None) -> Iterator[None]:
    """Make of obstore's errors inside: Absent, Passing where another try may help, else what the user should know."""
    from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError

    try:
        yield
        return
    except FileNotFoundError:
        known: Exception = Absent(address)
    except (PermissionDeniedError, UnauthenticatedError) as error:
        known = _refused(address, error)
    except PreconditionError as error:
        known = remote_changed(pinned) if pinned else Passing(_reason(error))
    except BaseError as error:
        text = str(error)
        if "NoSuchBucket" in text:
            known = Absent(address)
        elif re.search(r"status code: 40[13]\b", text) and "169.254" not in text:
            known = _refused(address, error)
        elif re.search(r"169\.254\.|metadata\.google|credential", text, re.IGNORECASE):
            hint = AWS_HINT if address.startswith("s3") else GOOGLE_HINT
            known = HubError(f"there are no credentials for `{address}`", facts={"reason": _reason(error)}, hint=hint)
        elif "redirect without LOCATION" in text:
            known = HubError(f"`{address}` lies in another region", facts={"reason": _reason(error)}, hint="set `AWS_REGION`")
        else:
            known = Passing(_reason(error))
    raise known  # outside of `except`: the library's own message is long, and would be the context


def _refused(address: str, error: Exception) -> HubError:
    what = f"access to `{name_of(address)}` is refused"
    return HubError(what, facts={"address": address, "reason": _reason(error)}, hint="check the credentials")


def _reason(error: Exception) -> str:
    """The first line of what the library says, without the address that was asked."""
    line = str(error).partition("\n")[0]
    return line.rpartition(" - ")[2].partition(": <?xml")[0][:200]
