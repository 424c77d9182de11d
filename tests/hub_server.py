"""A Hub for tests: serves folders as model repositories on the loopback interface, with the parts of the Hub's API that downloads use.

Files that the real Hub would keep in its large-file storage are redirected to another address, as there; the address carries a
signature, which can expire. Folders are served as plain files too (`static`), and every answer can be spoilt (`faults`).
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".bin", ".safetensors", ".pth", ".msgpack", ".h5")
ROUTE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+?)(?:/(?P<verb>revision|tree)/(?P<revision>[^/]+))?")
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repo:
    """`commits` maps a sha to the folder that it holds, `refs` a branch or tag to a sha. `gated` lets nobody have the files."""

    commits: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub: hub.add("owner/name", folder); ... hub.url, hub.downloads`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, authorization
        self.refuse: tuple[int, dict[str, str]] | None = None  # status and headers to answer everything with
        self.delay = 0.0  # seconds before each answer
        self.static: dict[str, Path] = {}  # first part of a path -> folder that is served below it, without a listing
        self.faults: list[str] = []  # one for each content request from now on: see `Handler.content`
        self.signature = 0  # a higher one makes all earlier signed addresses invalid
        self.sent = 0  # bytes of file content
        self.ranges: list[tuple[str, str]] = []  # path and range of each content request
        self.turn = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.storage = self.url  # where large files are redirected to

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""

    def add(self, repo_id: str, folder: Path, *, ref: str = "main", gated: bool = False) -> str:
        """Make `folder` the newest commit of `repo_id` on `ref`; returns its sha."""
        repo = self.repos.setdefault(repo_id, Repo())
        repo.gated = gated
        sha = hashlib.sha1(f"{repo_id} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[sha] = folder
        repo.refs[ref] = sha
        return sha

    @property
    def downloads(self) -> list[str]:
        """Paths of the files whose content was asked for, sorted."""
        found = (RESOLVE.fullmatch(unquote(path)) for method, path, _ in list(self.requests) if method == "GET")
        return sorted(match["path"] for match in found if match)


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: two of them wait for the client's delayed acknowledgement
    disable_nagle_algorithm = True

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.server.requests.append((self.command, url.path, self.headers.get("Authorization")))
        time.sleep(self.server.delay)
        if self.server.refuse:
            status, headers = self.server.refuse
            self.answer(status, b"<html>", headers)
        elif (folder := self.server.static.get(url.path.split("/")[1])) is not None:
            path = folder / unquote(url.path).split("/", 2)[2]
            self.content(path, {"ETag": f'"{etag(path)}"'}) if path.is_file() else self.answer(404, b"no such file")
        elif match := RESOLVE.fullmatch(unquote(url.path)) or ROUTE.fullmatch(unquote(url.path.replace("%2F", "\0"))):
            self.from_repo(match, signature=int(url.query.partition("=")[2] or -1) if "signed=" in url.query else None)
        else:
            self.refused(404, "EntryNotFound")

    def from_repo(self, match: re.Match[str], *, signature: int | None) -> None:
        repo = self.server.repos.get(match["repo"])
        if repo is None:
            return self.refused(404 if self.headers.get("Authorization") else 401, "RepoNotFound", "Repository not found")
        revision = (match["revision"] or "main").replace("\0", "/")
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            return self.refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if match.re is RESOLVE:
            if repo.gated:
                return self.refused(401 if not self.headers.get("Authorization") else 403, "GatedRepo", "Access is restricted")
            return self.file(repo.commits[sha], match["path"], sha, signature)
        files = [describe(path, repo.commits[sha]) for path in sorted(repo.commits[sha].rglob("*")) if path.is_file()]
        if match["verb"] == "tree":
            return self.answer(200, json.dumps([{"type": "file", "oid": each.pop("blobId"), **each} for each in files]).encode())
        siblings = [{"rfilename": each.pop("path"), **each} for each in files]
        info = {"id": match["repo"], "modelId": match["repo"], "sha": sha, "private": False, "gated": repo.gated, "siblings": siblings}
        return self.answer(200, json.dumps(info).encode())

    def file(self, folder: Path, name: str, sha: str, signature: int | None) -> None:
        path = folder / name
        if not path.is_file():
            return self.refused(404, "EntryNotFound", headers={"X-Repo-Commit": sha})
        described = describe(path, folder)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{described["blobId"]}"'}
        if "lfs" in described:
            headers |= {"X-Linked-Size": str(described["size"]), "X-Linked-Etag": f'"{described["lfs"]["sha256"]}"'}
            if signature is None:
                return self.answer(302, b"", headers | {"Location": f"{self.server.storage}{self.path}?signed={self.server.signature}"})
            if signature != self.server.signature:
                return self.answer(403, b"<Error>expired</Error>")
        return self.content(path, headers)

    def content(self, path: Path, headers: dict[str, str]) -> None:
        """The file, or the range of it that is asked for, or what the next fault makes of it: a status with or without Retry-After
        ("429", "503"), "reset", "short", "long", "wrong range", "whole", "compressed", "etag", "stall"; "" is none."""
        size, asked = path.stat().st_size, self.headers.get("Range", "")
        with self.server.turn:
            fault = self.server.faults.pop(0) if self.server.faults else ""
            self.server.ranges.append((path.name, asked))
        if fault.isdigit():
            return self.answer(int(fault), b"no", {"Retry-After": "0"} if fault == "429" else {})
        if fault == "expired":
            self.server.signature += 1
            return self.answer(403, b"expired")
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked) if fault != "whole" else None
        start, stop = (int(found[1]), min(int(found[2] or size), size - 1) + 1) if found else (0, size)
        headers = headers | {"Accept-Ranges": "bytes"}
        if found and start >= size:
            return self.answer(416, b"", headers | {"Content-Range": f"bytes */{size}"})
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if found:
            shift = 8 if fault == "wrong range" else 0
            headers["Content-Range"] = f"bytes {start + shift}-{stop - 1 + shift}/{size}"
        headers |= {"ETag": '"another"'} if fault == "etag" else {"Content-Encoding": "gzip"} if fault == "compressed" else {}
        self.body(206 if found else 200, data, headers, fault)

    def body(self, status: int, data: bytes, headers: dict[str, str], fault: str) -> None:
        if fault == "long":
            data += b"x" * 100
        cut = fault in ("reset", "short", "stall")
        if self.command != "HEAD":
            with self.server.turn:  # before the answer: who has read it must find it counted
                self.server.sent += len(data) // 2 if cut else len(data)
        if cut:
            self.answer(status, data, headers, cut=len(data) // 2)
            if fault == "stall":
                time.sleep(1)
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        else:
            self.answer(status, data, headers)

    def refused(self, status: int, code: str, message: str = "", headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
            self.wfile.flush()


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@lru_cache(maxsize=256)
def _describe(path: Path, folder: Path, changed: int) -> dict:
    data = path.read_bytes()
    git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    large = {
        "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    }
    return {"path": path.relative_to(folder).as_posix(), "size": len(data), "blobId": git} | (large if path.name.endswith(LARGE) else {})


def describe(path: Path, folder: Path) -> dict:
    return dict(_describe(path, folder, path.stat().st_mtime_ns))
