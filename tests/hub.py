"""Stands in for the Hugging Face hub: serves the part of its HTTP interface that its client uses to make, fill and read models.

Large files arrive as on the hub: by Git LFS, or by Xet, whose store is then a folder here (the client writes to ``local://``).
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCard

TOKEN, READ_ONLY = "hf_may_write", "hf_may_read"
LARGE = (".safetensors", ".model")


class File:
    """Holds a file of a repository: its content, or for a file in the Xet store, which we do not read, its SHA-256 and size."""

    def __init__(self, content: bytes | None, sha: str | None = None, size: int = 0) -> None:
        self.content, self.sha, self.size = content, sha, size if content is None else len(content)

    def entry(self, path: str) -> dict[str, Any]:
        git = hashlib.sha1(b"blob %d\0" % self.size + (self.content or b"")).hexdigest()
        found = {"type": "file", "path": path, "size": self.size, "oid": git}
        return found if self.sha is None else {**found, "lfs": {"oid": self.sha, "size": self.size, "pointerSize": 130}}


class Hub(ThreadingHTTPServer):
    """Serves the repositories.

    Attributes:
        repositories: the files by path, of each repository by its name.
        private: which repositories are private.
        blobs: the large files that have arrived by Git LFS, by SHA-256.
        sent: how often each of them was sent.
        commits: the summaries of all commits.
        failing: how many of the next large files are refused.
        refused: requests that the stand-in does not know.
    """

    daemon_threads = True

    def __init__(self, xet: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, File]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.sent: Counter[str] = Counter()
        self.commits: list[str] = []
        self.failing = 0
        self.refused: list[str] = []
        self.xet = xet
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def head(self, name: str) -> str:
        """Returns the hash of a repository's newest commit: another one for other files."""
        entries = [file.entry(path) for path, file in sorted(self.repositories[name].items())]
        return hashlib.sha1(json.dumps(entries).encode()).hexdigest()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores connections that a client has closed."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, body: Any, status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), "Content_Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, message: str, code: str = "") -> None:
        self._answer({"error": message}, status, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, token = unquote(urlsplit(self.path).path), self.headers.get("Authorization", "").removeprefix("Bearer ")
        writes = self.command in ("POST", "PUT")
        if token not in (TOKEN, READ_ONLY) and not path.startswith("/lfs/"):
            return self._refuse(401, "Invalid username or password.")
        if writes and token == READ_ONLY:
            return self._refuse(403, "you do not have the right to write")
        for pattern, act in ROUTES.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return act(self, body, *found.groups())
        self.server.refused.append(f"{self.command} {self.path}")
        return self._refuse(404, "Not Found")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.server.repositories
        if not there:
            self.server.repositories[name] = {".gitattributes": File(b"*.safetensors filter=lfs\n")}
            self.server.private[name] = asked.get("visibility") == "private" or asked.get("private") is True
        self._answer({"url": f"{self.server.url}/{name}", "name": name, "id": "1"}, 409 if there else 200)

    def validate(self, body: bytes) -> None:
        """Reads the header of a README.md; the hub also knows which values its fields take."""
        try:
            wrong = [] if ModelCard(json.loads(body)["content"]).data.to_dict() else ["empty"]
        except Exception as error:
            wrong = [str(error)]
        self._answer({"errors": [{"message": text} for text in wrong], "warnings": []}, 400 if wrong else 200)

    def info(self, body: bytes, name: str) -> None:
        files = self.server.repositories.get(name)
        if files is None:
            return self._refuse(404, "Repository not found", "RepoNotFound")
        siblings = [{"rfilename": path} for path in files]
        self._answer(
            {
                "id": name,
                "sha": self.server.head(name),
                "private": self.server.private[name],
                "siblings": siblings,
                "tags": [],
            }
        )

    def tree(self, body: bytes, name: str) -> None:
        if name not in self.server.repositories:
            return self._refuse(404, "Repository not found", "RepoNotFound")
        self._answer([file.entry(path) for path, file in self.server.repositories[name].items()])

    def preupload(self, body: bytes, name: str) -> None:
        there = self.server.repositories[name]
        files = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            entry = there[path].entry(path) if path in there else {}
            oid = entry.get("lfs", entry).get("oid")
            mode = "lfs" if path.endswith(LARGE) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            new = asked["oid"] not in self.server.blobs
            to = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}", "header": {}}}
            objects.append({**asked, **({"actions": to} if new else {})})
        self._answer({"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        with self.server.lock:
            if self.server.failing:
                self.server.failing -= 1
                return self._refuse(400, "the stand-in was told to fail")
            assert hashlib.sha256(body).hexdigest() == oid
            self.server.blobs[oid] = body
            self.server.sent[oid] += 1
        self._answer(b"")

    def xet_token(self, body: bytes, name: str) -> None:
        cas, end = f"local://{self.server.xet}", int(time.time()) + 3600
        headers = {"X_Xet_Cas_Url": cas, "X_Xet_Access_Token": "t", "X_Xet_Token_Expiration": str(end)}
        self._answer({"casUrl": cas, "accessToken": "t", "exp": end}, **headers)

    def commit(self, body: bytes, name: str) -> None:
        files = self.server.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[value["path"]] = File(self.server.blobs.get(value["oid"]), value["oid"], value.get("size", 0))
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise AssertionError(line)
        head = self.server.head(name)
        self._answer({"commitUrl": f"{self.server.url}/{name}/commit/{head}", "commitOid": head})

    def resolve(self, body: bytes, name: str, path: str) -> None:
        file = self.server.repositories[name].get(path)
        if file is None or file.content is None:
            return self._refuse(404, "Entry not found", "EntryNotFound")
        entry = file.entry(path)
        etag = entry.get("lfs", entry)["oid"]
        self._answer(
            file.content,
            ETag=f'"{etag}"',
            X_Repo_Commit=self.server.head(name),
            Content_Type="application/octet-stream",
        )


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    r"GET /api/agent-harnesses": lambda handler, body: handler._answer([]),
    r"POST /api/repos/create": Handler.create,
    r"POST /api/validate-yaml": Handler.validate,
    rf"GET /api/models/{NAME}(?:/revision/\w+)?": Handler.info,
    rf"GET /api/models/{NAME}/tree/\w+": Handler.tree,
    rf"POST /api/models/{NAME}/preupload/main": Handler.preupload,
    rf"GET /api/models/{NAME}/xet-write-token/main": Handler.xet_token,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": Handler.batch,
    r"PUT /lfs/(\w+)": Handler.put,
    rf"POST /api/models/{NAME}/commit/main": Handler.commit,
    rf"(?:GET|HEAD) /{NAME}/resolve/\w+/(.+)": Handler.resolve,
}


@contextmanager
def served(xet: Path) -> Iterator[Hub]:
    """Runs a stand-in while the block runs."""
    server = Hub(xet)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
