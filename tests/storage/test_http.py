"""Servers that answer with nonsense, byte by byte, or not at all: exit 3 or 6 in plain words, in bounded time, with notes of retries."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_uploads import UploadHub
from typer.testing import CliRunner

from llava_weights.cli.main import app
from llava_weights.errors import HubError, UsageError
from llava_weights.events import Event, Note, listening
from llava_weights.storage import http, ranges, retry
from llava_weights.storage.reading import SourceFile
from llava_weights.storage.remote import open_remote
from llava_weights.write.upload import push, repository_of

SIZE = 1 << 20
TOKEN = "hf_" + "FaKeToKeN0123456789"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # how huggingface_hub calls its client


class Server(ThreadingHTTPServer):
    """Answers every request with `status` and `headers`; `drip` bytes of a body that never ends otherwise."""

    daemon_threads = True
    ended: threading.Event

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.headers, self.drip, self.asked = 302, dict[str, str](), 0, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked += 1
        self.send_response(self.server.status)
        asked = self.headers["Range"].removeprefix("bytes=") if self.server.drip else ""
        for name, value in (self.server.headers | ({"Content-Range": f"bytes {asked}/{SIZE}"} if asked else {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.server.drip:
            start, _, stop = asked.partition("-")
            for _ in range(int(start), int(stop) + 1, self.server.drip):
                self.wfile.write(b"x" * self.server.drip)
                self.wfile.flush()
                time.sleep(0.005 if self.server.drip < 1024 else 0)  # or many drips would arrive as one piece


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1,localhost")
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    http._signed.clear()
    with Server() as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield made
        made.shutdown()


PLACES = (
    "http://[::1", "http://[::1]:x/", "http://127.0.0.1:99999/", "http://127.0.0.1:-1/", "http://127.0.0.1:0/", "http://[", "//[::1",
    "http:", "", "http://", "http:///x", "https://", "https://:443/", "\\\\x",
    "file:///etc/passwd", "ftp://host/x", "javascript:alert(1)", "data:,x",
    "http://127.0.0.1:1\\@evil/", "https://[v1.x]/", "http://%00/", "?", "#", "http://127.0.0.1%0d%0a/",
    "http://user:pa[ss@127.0.0.1/", "https://[::ffff:999.1.1.1]/",
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_redirect_to_no_address(server: Server, place: str) -> None:
    """HubError, exit 6, or the same file again without end; nothing beyond this machine is asked."""
    server.headers = {"Location": place, "Content-Length": "0"}
    with pytest.raises(HubError) as caught:
        ranges.stat(f"{server.url}/model.safetensors")
    assert caught.value.exit_code == 6


def test_a_redirect_to_no_address_ends_the_command(server: Server) -> None:
    server.headers = {"Location": "http://[::1", "Content-Length": "0"}
    done = CliRunner().invoke(app, ["inspect", f"{server.url}/model.safetensors"])
    assert done.exit_code == 6
    assert "is no address" in done.stderr


NONSENSE = {
    "Content-Range": ["bytes", "bytes 0-0/", "bytes 0-0/-1", "bytes 0-0/99999999999999999999", "bytes 0-0/\xb2", "bytes 0-0/1e9", ""],
    "Content-Length": ["\xb2"],
    "ETag": ["\xff" * 100, "x" * 5000, ""],
    "Content-Encoding": ["nosuch", "gzip, gzip, br"],
    "Content-Type": ["text/html; charset=nosuch"],
    "Set-Cookie": ["=;=;=;Expires=nonsense; Max-Age=x; Domain=[::1"],
    "Retry-After": ["\xb2", "1e999", "-5", "9" * 50],
    "X-Repo-Commit": ["\x7f"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NONSENSE.items() for value in values])
@pytest.mark.parametrize("status", [206, 503])
def test_headers_that_make_no_sense(server: Server, name: str, value: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size, or HubError."""
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 0.001)
    server.status = status
    server.headers = {"Content-Range": f"bytes 0-0/{SIZE}", "Content-Length": "0", "Connection": "close", name: value}
    with suppress(HubError):
        assert ranges.stat(f"{server.url}/model.safetensors") == (SIZE, server.headers.get("ETag", "")[:200])


@pytest.mark.parametrize("address", ["https://[::1", "https://h:99999/x", "https://h:x/", "HTTP://[", "https://[::1]x/", "s3://[::1/x"])
def test_an_address_of_the_users_that_is_none(address: str) -> None:
    done = CliRunner().invoke(app, ["inspect", address])
    assert done.exit_code in (2, 6), done.stderr
    assert "is no address" in done.stderr
    with pytest.raises((UsageError, HubError)):
        open_remote(address)


@pytest.mark.parametrize(
    ("endpoint", "source"),
    [
        ("http://[::1", "hf://owner/name"),
        ("http://[::1", "owner/name"),
        ("foo://x", "owner/name"),
        ("http://u:pa/ss@127.0.0.1:9", "hf://o/n"),
    ],
)
def test_an_endpoint_that_is_no_address(process: Any, endpoint: str, source: str) -> None:
    """In a process of its own: huggingface_hub reads the variable on import, and fails there."""
    done = process("inspect", source, env={"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": ""})
    assert done.code == 6
    assert "error: `HF_ENDPOINT` is no address" in done.stderr
    assert "pa/ss" not in done.stderr


# --- a server that drips ----------------------------------------------------------------------------------------------


class Clock:
    """A clock that moves on by `step` seconds each time it is read."""

    def __init__(self, step: float) -> None:
        self.step, self.now = step, 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def served(server: Server, drip: int) -> SourceFile:
    server.status, server.drip = 206, drip
    server.headers = {"Connection": "close", "ETag": '"a"'}
    return SourceFile(f"{server.url}/model.safetensors", SIZE, 0, 0, etag='"a"')


def test_a_server_that_drips_is_given_up(server: Server) -> None:
    file = served(server, 256)
    with pytest.raises(HubError, match="can't be read over the network") as caught:
        ranges.read(file, 0, memoryview(bytearray(SIZE)), clock=Clock(http.WINDOW_SECONDS / 3))
    assert caught.value.exit_code == 6
    assert "bytes came in" in caught.value.facts["reason"]
    assert server.asked == retry.TRIES


def test_a_slow_server_is_read_to_its_end(server: Server) -> None:
    """Ten times as fast as the slowest that is waited for."""
    file, out = served(server, 1 << 15), bytearray(SIZE)
    ranges.read(file, 0, memoryview(out), clock=Clock(http.WINDOW_SECONDS / 100))
    assert (bytes(out), server.asked) == (b"x" * SIZE, 1)


class Endless(BaseHTTPRequestHandler):
    """Sends a byte now and then, of headers or of an answer of the Hub's API."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked += 1  # type: ignore[attr-defined]
        api = self.path.startswith("/api/")
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: 100000\r\n\r\n" if api else b"X: "))
        with suppress(OSError):
            while not self.server.ended.wait(0.02):  # type: ignore[attr-defined]
                self.wfile.write(b" ")


@pytest.mark.parametrize("address", ["{url}/model.safetensors", "hf://owner/name", "owner/name"])
def test_an_answer_that_never_ends(server: Server, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server.RequestHandlerClass = Endless
    server.ended = threading.Event()
    monkeypatch.setattr(retry, "ANSWER_SECONDS", 0.1)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    done = CliRunner().invoke(app, ["inspect", address.format(url=server.url)])
    server.ended.set()
    assert done.exit_code == 6, done.stderr
    assert "network" in done.stderr or "can't be reached" in done.stderr
    assert server.asked


# --- a Hub that does not answer ---------------------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of huggingface_hub's own loop, recorded instead of made."""
    made: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(**{**vars(time), "sleep": made.append}))
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return made


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    """The smallest complete output."""
    for name, text in {"llava-weights.manifest.json": "{}", "SHA256SUMS": f"{'0' * 64}  config.json\n", "config.json": "{}"}.items():
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    return tmp_path / "out"


def test_refused_connections_are_tried_in_one_loop_with_notes(complete: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loops, one in the other, once made 36 tries in two and a half minutes, without a note."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    events: list[Event] = []
    before: list[int] = []

    def listen(event: Event) -> None:
        events.append(event)
        before.append(len(waits))

    with listening(listen), pytest.raises(HubError, match="can't be written over the network") as caught:
        push(complete, repository_of("owner/name"))
    assert (caught.value.exit_code, caught.value.facts["tries"]) == (6, "6")
    assert len(waits) <= retry.TRIES
    assert before == [0], "a note comes before the first pause"
    assert [type(event) for event in events] == [Note]
    assert "owner/name" in events[0].text  # type: ignore[union-attr]


def test_a_broken_hub_is_asked_in_one_loop(complete: Path, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with UploadHub(tmp_path / "hub", TOKEN) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.refuse = (503, {})
        with pytest.raises(HubError, match="can't be written over the network"):
            push(complete, repository_of("owner/name"))
        assert len(hub.requests) == retry.TRIES


def test_what_the_library_does_not_try_again_we_do(
    complete: Path, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hub").mkdir()
    with UploadHub(tmp_path / "hub", TOKEN) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.faults_of = {"commit": ["503", "lost", ""], "create_repo": ["503", "reset", ""]}
        assert push(complete, repository_of("owner/name")).endswith("owner/name")
        assert hub.files("owner/name")["config.json"] == b"{}"


def test_the_librarys_log_is_left_as_it_was(complete: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    log = logging.getLogger("huggingface_hub.utils._http")
    before = log.level, log.propagate, list(log.handlers)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError):
        push(complete, repository_of("owner/name"))
    assert (log.level, log.propagate, list(log.handlers)) == before


def test_reading_sends_notes_too(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = CliRunner().invoke(app, ["inspect", "hf://owner/name"])
    assert done.exit_code == 6
    assert done.stderr.index("trying again") < done.stderr.index("error: ")
