"""A Hub for tests that takes uploads: repositories, branches, large files, commits. Every commit is a folder of its own."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import struct
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from hub_server import LARGE, Handler, HubServer, Repo, describe

API = r"/api/models/(?P<repo>[^/]+/[^/]+)/"
POSTS = {
    "create_repo": r"/api/repos/create",
    "yaml": r"/api/validate-yaml",
    "branch": API + r"branch/(?P<branch>[^/]+)",
    "preupload": API + r"preupload/(?P<revision>[^/]+)",
    "paths": API + r"paths-info/(?P<revision>[^/]+)",
    "commit": API + r"commit/(?P<revision>[^/]+)",
    "batch": r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
}
TREE = re.compile(API + r"tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")


class UploadHub(HubServer):
    """`token` may write to the namespace `owner`. `faults_of` maps an action ("commit", "put"...) to what happens to the next calls of it:
    a status, "reset", "lost" (done, but the answer is lost), or "" for nothing; "*" at the end repeats for ever."""

    def __init__(self, folder: Path, token: str) -> None:
        super().__init__()
        self.RequestHandlerClass = UploadHandler
        self.folder, self.token = folder, token
        self.actions: list[tuple[str, str]] = []  # what was asked, and of what
        self.faults_of: dict[str, list[str]] = {}
        self.private: set[str] = set()
        self.watch = lambda: None  # called with each large file that arrives

    def fault(self, action: str) -> str:
        with self.turn:
            faults = self.faults_of.get(action) or [""]
            return faults[0] if faults[1:] == ["*"] else faults.pop(0)

    def files(self, repo_id: str, ref: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        repo = self.repos[repo_id]
        folder = repo.commits[repo.refs[ref]]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    def commit(self, repo_id: str, ref: str, changes: dict[str, bytes | None]) -> str:
        """Make a commit; None deletes. Returns its sha."""
        repo = self.repos[repo_id]
        folder = self.folder / repo_id.replace("/", "--") / str(len(repo.commits))
        if ref in repo.refs:
            shutil.copytree(repo.commits[repo.refs[ref]], folder, copy_function=os.link)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in changes.items():
            path = folder / name
            path.unlink(missing_ok=data is not None)
            if data is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        sha = hashlib.sha1(f"{repo_id} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[sha] = folder
        repo.refs[ref] = sha
        return sha


class UploadHandler(Handler):
    server: UploadHub

    def do_GET(self) -> None:
        found = TREE.fullmatch(unquote(urlsplit(self.path).path))
        if found is None:
            return super().do_GET()
        repo = self.server.repos.get(found["repo"])
        if repo is None or not self.may_read(found["repo"]):
            return self.refused(404 if self.headers.get("Authorization") else 401, "RepoNotFound", "Repository not found")
        sha = repo.refs.get(found["revision"], found["revision"])
        if sha not in repo.commits:
            return self.refused(404, "RevisionNotFound")
        folder = repo.commits[sha] / (found["folder"] or "")
        if not folder.is_dir():
            return self.refused(404, "EntryNotFound")
        here = [describe(path, repo.commits[sha]) for path in sorted(folder.iterdir()) if path.is_file()]
        found_here = [{"type": "file", "oid": each.pop("blobId"), **each} for each in here]
        found_here += [{"type": "directory", "oid": "0" * 40, "path": path.name} for path in folder.iterdir() if path.is_dir()]
        return self.answer(200, json.dumps(found_here).encode())

    def may_read(self, repo_id: str) -> bool:
        return repo_id not in self.server.private or self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def do_PUT(self) -> None:
        oid = urlsplit(self.path).path.rpartition("/")[2]
        fault = self.begin("put", oid)
        if fault is None:
            return None
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer(400, b"another digest")
        (self.server.folder / oid).write_bytes(data)
        self.server.watch()
        return self.end(fault, b"")

    def do_DELETE(self) -> None:
        found = re.fullmatch(POSTS["branch"], urlsplit(self.path).path)
        assert found is not None
        fault = self.begin("delete_branch", found["branch"])
        if fault is None:
            return None
        if self.server.repos[found["repo"]].refs.pop(found["branch"], None) is None:
            return self.refused(404, "RevisionNotFound")
        return self.end(fault, b"{}")

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        action, found = next((name, found) for name, route in POSTS.items() if (found := re.fullmatch(route, path)))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if "Content-Length" in self.headers else self.chunked()
        fault = self.begin(action, path)
        if fault is None:
            return None
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.refused(401, "", "Invalid credentials in Authorization header")
        repo_id = found.groupdict().get("repo", "owner/")
        if not repo_id.startswith("owner/"):
            return self.refused(403, "", "You have no right to write here")
        if repo_id != "owner/" and repo_id not in self.server.repos:
            return self.refused(404, "RepoNotFound", "Repository not found")
        status, answer = getattr(self, f"post_{action}")(found, body)
        return self.end(fault, json.dumps(answer).encode(), status)

    def chunked(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def begin(self, action: str, what: str) -> str | None:
        """The fault that is to come after the work; None where one came before."""
        self.server.actions.append((action, what))
        self.server.requests.append((self.command, what, self.headers.get("Authorization")))
        fault = self.server.fault(action)
        if fault.isdigit():
            self.close_connection = True
            self.answer(int(fault), b'{"error": "no"}', {"Connection": "close"})
        elif fault == "reset":
            self.reset()
        return None if fault not in ("", "lost") else fault

    def end(self, fault: str, body: bytes, status: int = 200) -> None:
        return self.reset() if fault == "lost" else self.answer(status, body)

    def reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def post_create_repo(self, found: re.Match[str], body: bytes) -> tuple[int, dict]:
        asked = json.loads(body)
        if asked["organization"] != "owner":
            return 403, {"error": "You have no right to create a model in this namespace"}
        repo_id = f"owner/{asked['name']}"
        if repo_id in self.server.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo_id}"}
        self.server.repos[repo_id] = Repo()
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(repo_id)
        self.server.commit(repo_id, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return 200, {"url": f"{self.server.url}/{repo_id}"}

    def post_yaml(self, found: re.Match[str], body: bytes) -> tuple[int, dict]:
        return (200, {}) if json.loads(body)["content"].startswith("---\n") else (400, {"errors": [{"message": "no metadata"}]})

    def post_branch(self, found: re.Match[str], body: bytes) -> tuple[int, dict]:
        refs = self.server.repos[found["repo"]].refs
        if found["branch"] in refs:
            return 409, {"error": "Reference already exists"}
        refs[found["branch"]] = refs[json.loads(body).get("startingPoint", "main")]
        return 200, {}

    def post_preupload(self, found: re.Match[str], body: bytes) -> tuple[int, dict]:
        there = {name: describe_of(data, name) for name, data in self.server.files(found["repo"], found["revision"]).items()}
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": there.get(file["path"])})
        return 200, {"files": files}

    def post_batch(self, found: re.Match[str], body: bytes) -> tuple[int, dict]:
        objects = []
        for item in json.loads(body)["objects"]:
            there = (self.server.folder / item["oid"]).exists()
            upload = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}
            objects.append({"oid": item["oid"], "size": item["size"], **({} if there else upload)})
        return 200, {"transfer": "basic", "objects": objects}

    def post_paths(self, found: re.Match[str], body: bytes) -> tuple[int, list]:
        repo = self.server.repos[found["repo"]]
        folder = repo.commits[repo.refs[found["revision"]]]
        asked = parse_qs(body.decode())["paths"]
        here = [describe(folder / path, folder) for path in asked if (folder / path).is_file()]
        return 200, [{"type": "file", "oid": each.pop("blobId"), **each} for each in here]

    def post_commit(self, found: re.Match[str], body: bytes) -> tuple[int, dict]:
        changes: dict[str, bytes | None] = {}
        there = self.server.files(found["repo"], found["revision"])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                changes[value["path"]] = (self.server.folder / value["oid"]).read_bytes()
            elif item["key"] == "deletedFile":
                if value["path"] not in there:
                    return 404, {"error": "A file with this name doesn't exist"}
                changes[value["path"]] = None
        sha = self.server.commit(found["repo"], found["revision"], changes)
        return 200, {"commitUrl": f"{self.server.url}/{found['repo']}/commit/{sha}", "commitOid": sha, "success": True}


def describe_of(data: bytes, name: str) -> str:
    """The digest by which the library knows that a file is there already."""
    return hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
