"""A server in the place of S3 that answers with nonsense, slowly, or with a redirect: exit 3 or 6, and no signature for another host."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.errors import HubError, InputError, LlavaWeightsError, UsageError
from llava_weights.storage import buckets, ranges, retry
from llava_weights.storage.reading import SourceFile
from llava_weights.write.destinations import Bucket

pytest.importorskip("obstore")
BODY, SIZE = os.urandom(3000), 3000
SECRET = "SeCrEtKeY0123456789"
LIST = "<ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated><KeyCount>1</KeyCount>{}</ListBucketResult>"
ENTRY = "<Contents><Key>{}</Key><Size>{}</Size><ETag>&quot;a&quot;</ETag><LastModified>2015-10-21T07:28:00.000Z</LastModified></Contents>"


class Server(ThreadingHTTPServer):
    """Answers as `mode` says; `asked` are the headers of every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode, self.location, self.body = "", "", b""
        self.asked: list[dict[str, str]] = []
        self.ended = threading.Event()
        self.port = self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def send(self, status: int, headers: dict[str, str], body: bytes, size: int | None = None) -> None:
        self.send_response(status)
        for name, value in ({"ETag": '"a"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.server.asked.append(dict(self.headers))
        self.send(200, {}, b"", SIZE)

    def do_PUT(self) -> None:
        self.server.asked.append(dict(self.headers))
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send(int(self.server.mode), {}, b"<Error><Code>No</Code></Error>")

    def do_GET(self) -> None:
        self.server.asked.append(dict(self.headers))
        mode = self.server.mode
        if "list-type" in self.path:
            return self.send(200, {"Content-Type": "application/xml"}, self.server.body)
        start, stop = (int(part) for part in self.headers["Range"].removeprefix("bytes=").split("-"))
        data, told = BODY[start : stop + 1], {"Content-Range": f"bytes {start}-{stop}/{SIZE}"}
        if mode == "redirect":
            return self.send(302, {"Location": self.server.location}, b"")
        if mode in ("drip", "stall", "short"):
            self.send(206, told, b"", len(data))
            if mode == "short":
                self.wfile.write(data[:10])
                self.close_connection = True
            while mode != "short" and not self.server.ended.wait(0.05):
                self.wfile.write(b"x" if mode == "drip" else b"")
            return None
        answers: dict[str, Callable[[], None]] = {
            "wrong range": lambda: self.send(206, {"Content-Range": f"bytes {start + 1}-{stop + 1}/{SIZE}"}, data),
            "other size": lambda: self.send(206, {"Content-Range": f"bytes {start}-{stop}/{SIZE + 1}"}, data),
            "no range": lambda: self.send(206, {}, data),
            "nonsense": lambda: self.send(206, {"Content-Range": "bytes \xb2"}, data),
            "whole": lambda: self.send(200, {}, BODY),
            "compressed": lambda: self.send(206, told | {"Content-Encoding": "gzip"}, data),
            "etag": lambda: self.send(206, told | {"ETag": '"b"'}, data),
            "no etag": lambda: self.send(206, told | {"ETag": ""}, data),
            "precondition": lambda: self.send(412, {}, b"<Error><Code>PreconditionFailed</Code></Error>"),
            "long": lambda: self.send(206, told, data + b"more"),
            "gone": lambda: self.send(404, {}, b"<Error><Code>NoSuchKey</Code></Error>"),
            "gone bucket": lambda: self.send(404, {}, b"<Error><Code>NoSuchBucket</Code></Error>"),
            "": lambda: self.send(206, told, data),
        }
        if mode.isdigit():
            return self.send(int(mode), {}, f"<Error><Code>No</Code><Message>{SECRET}</Message></Error>".encode())
        return answers[mode]()


def serving() -> Server:
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = serving()
    keys = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    monkeypatch.setattr(buckets, "PART_TRIES", 2)
    buckets.forget()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()
    buckets.forget()


FILE = SourceFile("s3://bucket/folder/model.safetensors", SIZE, 0, 0, etag='"a"')


def read(start: int = 100, size: int = 500) -> bytes:
    out = bytearray(size)
    ranges.read(FILE, start, memoryview(out))
    return bytes(out)


def text_of(error: LlavaWeightsError) -> str:
    return f"{error.what} {error.facts} {error.hint}"


def test_a_sound_answer(s3: Server) -> None:
    assert read() == BODY[100:600]
    assert len(s3.asked) == 1
    assert s3.asked[0]["if-match"] == '"a"'


PASSING = ("wrong range", "no range", "nonsense", "whole", "compressed", "short", "500", "503", "429")
CHANGED = ("other size", "etag", "no etag", "precondition", "gone", "gone bucket")


@pytest.mark.parametrize("mode", [*PASSING, *CHANGED, "401", "403", "400", "301"])
def test_an_answer_that_is_wrong(s3: Server, mode: str) -> None:
    """Tried again, once in each try, where it may pass; another file is told as a changed one; nothing that came is taken."""
    s3.mode = mode
    with pytest.raises(LlavaWeightsError) as caught:
        read()
    assert caught.value.exit_code == (3 if mode in CHANGED else 6)
    assert SECRET not in text_of(caught.value)
    if mode in PASSING:
        assert len(s3.asked) == retry.TRIES
        assert "can't be read over the network" in caught.value.what
    if mode in CHANGED:
        assert "changed while it was being read" in caught.value.what


def test_more_than_was_asked_for(s3: Server) -> None:
    """What stands behind the length of an answer belongs to none."""
    s3.mode = "long"
    with suppress(HubError):
        assert read() == BODY[100:600]


@pytest.mark.parametrize("mode", ["drip", "stall"])
def test_an_answer_that_does_not_end(s3: Server, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(buckets, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(retry, "TRIES", 2)
    s3.mode, begun = mode, time.monotonic()
    with pytest.raises(HubError, match="can't be read over the network"):
        read()
    assert len(s3.asked) == 2
    assert time.monotonic() - begun < 30


LOCATIONS = (
    "http://localhost:{port}/x",
    "http://user:pw@localhost:{port}/x",
    "file:///etc/passwd",
    "ftp://host/x",
    "http://[::1",
    "//",
    "data:,x",
    "",
)


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_redirect(s3: Server, location: str) -> None:
    """What another host gets holds no signature, and no local file is read."""
    other = serving()
    other.mode = "etag"
    s3.mode, s3.location = "redirect", location.format(port=other.port)
    with pytest.raises((HubError, InputError)) as caught:
        read()
    assert "root:" not in text_of(caught.value)
    for headers in other.asked:
        lines = "\n".join(f"{name}: {value}" for name, value in headers.items())
        assert SECRET not in lines
        assert "AWS4" not in lines
        assert "key/" not in lines
    other.shutdown()
    other.server_close()


@pytest.mark.parametrize(
    "key",
    ["folder/../../etc/passwd.safetensors", "folder//x.safetensors", "folder/.hidden.safetensors", "other/x.safetensors", "/etc/x.bin"],
)
def test_names_from_strangers(s3: Server, key: str) -> None:
    s3.body = LIST.format(ENTRY.format("folder/config.json", 2) + ENTRY.format(key, 100)).encode()
    with pytest.raises((InputError, HubError)) as caught:
        open_checkpoint("s3://bucket/folder")
    assert caught.value.exit_code in (3, 6)


@pytest.mark.parametrize("size", ["-1", "1e9", str(1 << 60), str(1 << 70), ""])
def test_sizes_that_are_lies(s3: Server, size: str) -> None:
    s3.body = LIST.format(ENTRY.format("folder/model.safetensors", size)).encode()
    with pytest.raises((InputError, HubError)) as caught:
        open_checkpoint("s3://bucket/folder")
    assert caught.value.exit_code in (3, 6)


@pytest.mark.parametrize(
    "body", [b"", b"<", b"\xff" * 100, b"<!DOCTYPE x [<!ENTITY a 'b'><!ENTITY c '&a;&a;'>]><ListBucketResult>&c;</ListBucketResult>"]
)
def test_a_listing_that_is_none(s3: Server, body: bytes) -> None:
    s3.body = body
    with pytest.raises((InputError, HubError)) as caught:
        open_checkpoint("s3://bucket/folder")
    assert caught.value.exit_code in (3, 6)


@pytest.mark.parametrize("mode", ["403", "400", "503", "404"])
def test_a_place_that_can_not_be_written(s3: Server, tmp_path: Path, mode: str) -> None:
    s3.mode = mode
    (tmp_path / "config.json").write_bytes(b"{}")
    with pytest.raises(HubError) as caught:
        Bucket("s3://bucket/folder").put(tmp_path / "config.json", "config.json")
    assert caught.value.exit_code == 6
    assert SECRET not in text_of(caught.value)
    assert ("there is no bucket" in caught.value.what) == (mode == "404")


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # of Python 3.12 on
def test_a_fork_is_refused(s3: Server) -> None:
    """There, obstore would wait for threads that do not exist."""
    read()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            read()
        except UsageError as error:
            os.write(writer, str(error.hint).encode())
        finally:
            os._exit(0)
    os.close(writer)
    assert b"spawn" in os.read(reader, 1000)
    os.close(reader)
    os.waitpid(child, 0)


def test_no_credentials(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would ask a cloud's own service for them is told what to set; that service is this server here."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{s3.port}/credentials")
    token: Any = Path(os.devnull)
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(token))
    s3.mode = "404"
    with pytest.raises(HubError) as caught:
        read()
    assert caught.value.exit_code == 6
