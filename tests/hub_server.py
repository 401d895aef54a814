"""A small Hub on 127.0.0.1: the answers that `huggingface_hub` needs, and what a network does to files on the way."""

import hashlib
import json
import sys
import threading
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")


@cache
def checksum(name: str, content: bytes) -> str:
    """A large file's sha256, or git's id of a small one."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub:` serves on a free port at `hub.url`.

    `fetched`: the names of the files whose bytes were asked for, in order. `on_the_way[name]` makes of a file's content
    what is sent of it; after less, the connection breaks. `status` is the answer to everything, when it is set.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}  # name -> revision -> files
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.fetched: list[str] = []
        self.on_the_way: dict[str, Callable[[bytes], bytes]] = {}
        self.status: int | None = None

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client that went away is part of the tests
            super().handle_error(request, client_address)

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def put(self, name: str, files: dict[str, bytes], revision: str = "main") -> dict[str, bytes]:
        """Make `files` a revision of the model `name`, and return them."""
        self.models.setdefault(name, {})[revision] = files
        return files

    def add(self, name: str, folder: Path, revision: str = "main") -> dict[str, bytes]:
        """`put` the files of a folder."""
        return self.put(name, {path.name: path.read_bytes() for path in sorted(folder.iterdir())}, revision)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        match path.strip("/").split("/"):
            case _ if self.server.status:
                self.answer(self.server.status, b"<html>Log in to the network</html>")
            case ["api", "models", owner, model, "revision", revision]:
                self.send_listing(f"{owner}/{model}", revision)
            case [owner, model, "resolve", revision, *file]:
                self.send_file(f"{owner}/{model}", revision, "/".join(file))
            case _:  # asked beside, now and then
                self.answer(404)

    def answer(self, status: int, content: bytes = b"", length: int | None = None, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
            self.close_connection = length is not None and len(content) < length

    def files_of(self, name: str, revision: str) -> dict[str, bytes] | None:
        """The files asked for, or None after an answer that says why not, in the real Hub's words."""
        revisions = self.server.models.get(name)
        if revisions is None:
            self.answer(401, b"Invalid username or password.", X_Error_Code="RepoNotFound")
            return None
        files = revisions.get(revision) or {commit_of(files): files for files in revisions.values()}.get(revision)
        if files is None:
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        return files

    def send_listing(self, name: str, revision: str):
        if (files := self.files_of(name, revision)) is None:
            return
        siblings = []
        for file, content in files.items():
            entry = {"rfilename": file, "size": len(content), "blobId": checksum("", content)}
            if file.endswith(LARGE):
                entry["lfs"] = {"sha256": checksum(file, content), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        listing = {"_id": "1", "id": name, "modelId": name, "sha": commit_of(files), "siblings": siblings}
        self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")

    def send_file(self, name: str, revision: str, file: str):
        if (files := self.files_of(name, revision)) is None:
            return
        if name in self.server.gated:
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted.")
            return
        if file not in files:
            self.answer(404, X_Error_Code="EntryNotFound")
            return
        content = files[file]
        sent = content
        if self.command == "GET":
            self.server.fetched.append(file)
            sent = self.server.on_the_way.get(file, bytes)(content)
        etag = f'"{checksum(file, content)}"'
        self.answer(200, sent, len(content), ETag=etag, X_Repo_Commit=commit_of(files))
