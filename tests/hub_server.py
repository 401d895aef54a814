"""A small Hub on 127.0.0.1: enough of its answers for `huggingface_hub`, and the ways in which a network lets one down.

Large files are answered as the real one does: a redirect to another address that knows only the file's sha256.
"""

import hashlib
import json
import sys
import threading
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")


@dataclass(frozen=True)
class Request:
    """What a client asked for: `start` is where its Range begins, 0 without one.

    `token`: whether it showed one. `bounded`: whether the Range has an end, as of a client that looks at a header.
    """

    method: str
    path: str
    start: int
    token: bool
    bounded: bool


@dataclass
class Repo:
    """A model: the files of each revision, and who may have them."""

    revisions: dict[str, dict[str, bytes]]
    gated: bool = False


@dataclass
class Troubles:
    """What goes wrong, by file name, until it is taken out again.

    `broken[name]` is a list: each number is a connection that ends after so many bytes. `held[name]` sends so many
    bytes, then sets `holding` and waits for `go_on`. `damaged` files have a byte turned over on the way. `no_ranges`:
    asked for the rest of a file, the server sends the whole.
    """

    broken: dict[str, list[int]] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    no_ranges: bool = False
    all_answers: int | None = None  # an HTTP status for whatever is asked
    holding: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub:` serves on a free port at `hub.url` and remembers `hub.requests`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.troubles = Troubles()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client that went away is part of the tests
            super().handle_error(request, client_address)

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.troubles.go_on.set()
        self.shutdown()
        self.server_close()

    def put(self, name: str, files: dict[str, bytes], revision: str = "main") -> dict[str, bytes]:
        """Make `files` a revision of the model `name`, and return them."""
        self.repos.setdefault(name, Repo({})).revisions[revision] = files
        return files

    def add(self, name: str, folder: Path, revision: str = "main") -> dict[str, bytes]:
        """`put` the files of a folder."""
        return self.put(name, {path.name: path.read_bytes() for path in sorted(folder.iterdir())}, revision)

    def fetches(self, name: str) -> list[int]:
        """Where each GET of a file's bytes began, in order."""
        digests = {
            sha256(files[name]) for repo in self.repos.values() for files in repo.revisions.values() if name in files
        }
        paths = {f"/large/{digest}" for digest in digests}
        small = [] if name.endswith(LARGE) else [name]
        return [
            request.start
            for request in self.requests
            if request.method == "GET"
            and not request.bounded
            and (request.path in paths or any(request.path.endswith(f"/{name}") for name in small))
        ]


@cache
def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@cache
def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted((name, sha256(content)) for name, content in files.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        given, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        if path.startswith("/api/") and not path.startswith("/api/models/"):  # asked beside, now and then
            self.answer(404)
            return
        self.server.requests.append(
            Request(self.command, path, int(given), "Authorization" in self.headers, bool(last))
        )
        parts = path.strip("/").split("/")
        if self.server.troubles.all_answers:
            self.answer(self.server.troubles.all_answers, b"<html>Log in to the network</html>")
        elif parts[0] == "large":
            self.send_large(parts[1], int(given), int(last or 1 << 60) + 1)
        elif parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
            self.send_tree("/".join(parts[2:4]), parts[5])
        elif parts[:2] == ["api", "models"]:
            self.send_listing("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
        else:
            self.send_resolved("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def answer(self, status: int, content: bytes = b"", **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(headers.pop("length", len(content))))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def files_of(self, name: str, revision: str) -> dict[str, bytes] | None:
        """The files asked for, or None after an answer that says why not, in the real Hub's words."""
        repo = self.server.repos.get(name)
        if repo is None:
            self.answer(401, b"Invalid username or password.", X_Error_Code="RepoNotFound")
            return None
        by_commit = {commit_of(files): files for files in repo.revisions.values()}
        files = repo.revisions.get(revision) or by_commit.get(revision)
        if files is None:
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        return files

    def send_listing(self, name: str, revision: str):
        files = self.files_of(name, revision)
        if files is None:
            return
        siblings = []
        for file, content in files.items():
            entry = {"rfilename": file, "size": len(content), "blobId": git_id(content)}
            if file.endswith(LARGE):
                entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        listing = {"_id": "1", "id": name, "modelId": name, "sha": commit_of(files), "siblings": siblings}
        self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")

    def send_tree(self, name: str, revision: str):
        """What `snapshot_download` asks, where we ask for a listing."""
        files = self.files_of(name, revision)
        if files is None:
            return
        entries = []
        for file, content in files.items():
            entry = {"type": "file", "path": file, "size": len(content), "oid": git_id(content)}
            if file.endswith(LARGE):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")

    def send_resolved(self, name: str, revision: str, file: str):
        files = self.files_of(name, revision)
        if files is None:
            return
        if self.server.repos[name].gated:
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted.")
            return
        if file not in files:
            self.answer(404, X_Error_Code="EntryNotFound")
            return
        content, commit = files[file], commit_of(files)
        if file.endswith(LARGE):
            digest = sha256(content)
            location = f"{self.server.url.replace('127.0.0.1', 'localhost')}/large/{digest}"  # a host of its own
            linked = {"X_Linked_Etag": f'"{digest}"', "X_Linked_Size": len(content), "X_Repo_Commit": commit}
            self.answer(302, Location=location, **linked)
        elif self.command == "HEAD":
            self.send_response(200)
            for key, value in (("X-Repo-Commit", commit), ("ETag", f'"{git_id(content)}"')):
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
        else:
            self.send_content(file, content, 0, {"X-Repo-Commit": commit, "ETag": f'"{git_id(content)}"'})

    def send_large(self, digest: str, start: int, end: int):
        for repo in self.server.repos.values():
            for files in repo.revisions.values():
                for name, content in files.items():
                    if name.endswith(LARGE) and sha256(content) == digest:
                        self.send_content(name, content, start, {"ETag": f'"{digest}"'}, end)
                        return
        self.answer(404)

    def send_content(self, name: str, content: bytes, start: int, headers: dict[str, str], end: int = 1 << 60):
        """The bytes of a file from `start` to `end`, with whatever trouble is meant for it."""
        troubles = self.server.troubles if end > len(content) else Troubles()
        if name in troubles.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        whole = troubles.no_ranges or (not start and end >= len(content))
        part = content if whole else content[start:end]
        self.send_response(200 if whole else 206)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(part)))
        if not whole:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.end_headers()
        if troubles.broken.get(name):
            self.wfile.write(part[: troubles.broken[name].pop(0)])
            self.wfile.flush()
            self.close_connection = True
            return
        if name in troubles.held:
            sent = troubles.held[name]
            self.wfile.write(part[:sent])
            self.wfile.flush()
            troubles.holding.set()
            troubles.go_on.wait(60)
            part = part[sent:]
        try:
            self.wfile.write(part)
        except OSError:  # the client is gone
            self.close_connection = True
