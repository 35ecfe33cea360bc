"""Stand-ins for two services, which real clients call over HTTP: Google Cloud Storage and the Hugging Face hub."""

import base64
import hashlib
import itertools
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from huggingface_hub import ModelCard


class StandIn(ThreadingHTTPServer):
    """Answers requests in threads of this process."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.refused: list[str] = []  # requests that the stand-in does not know, which jaxblock must never send
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores broken connections: a client that asks twice and takes the first answer closes the other connection."""

    @contextmanager
    def running(self) -> Iterator[Any]:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield self
        self.shutdown()
        self.server_close()
        assert self.refused == [], self.refused


class Handler(BaseHTTPRequestHandler):
    """Finds the method for a request, by a pattern of ``METHOD /path``, and answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the other side's delayed acknowledgement
    server: Any
    routes: dict[str, Callable[..., None]]

    def log_message(self, *about: Any) -> None:
        pass

    def answer(self, body: Any = b"", status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content_Length": len(content), "Content_Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        self.answer({"error": message}, status, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    def why_not(self) -> tuple[int, str] | None:
        """Returns the status and the message with which the request is refused whatever it asks for."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if why_not := self.why_not():
            return self.refuse(*why_not)
        for pattern, act in self.routes.items():
            if found := re.fullmatch(pattern, f"{self.command} {parts.path}"):
                return act(self, *map(unquote, found.groups()))
        self.server.refused.append(f"{self.command} {self.path}")
        return self.refuse(404, "Not Found")

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET


class Store(StandIn):
    """Stands in for Google Cloud Storage, with one bucket: ``gs://bucket``.

    As in the real store, objects appear whole when their upload ends, and there are no folders, no rename and no append.
    ``gcsfs`` (through etils' epath) and TensorStore (through Orbax) reach it by their environment variables for emulators.
    """

    def __init__(self) -> None:
        super().__init__(StoreHandler)
        self.objects: dict[str, tuple[int, bytes]] = {}  # generation and bytes, by name
        self.log: list[str] = []  # of what has changed: "write name" or "delete name"
        self.failing: str | None = None  # the pattern of the names that cannot be written
        self.writers: defaultdict[str, set[str]] = defaultdict(set)  # how clients called the store, by what they wrote
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.generations = itertools.count(1)

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.objects if name.startswith(prefix))

    def content(self, name: str) -> bytes:
        return self.objects[name][1]

    def put(self, name: str, content: bytes, wanted: str | None = None) -> dict[str, str] | None:
        """Writes an object and describes it; returns None where the one that is there has not the wanted generation."""
        with self.lock:
            if wanted is not None and int(wanted) != self.objects.get(name, (0, b""))[0]:
                return None
            self.objects[name] = (next(self.generations), content)
            self.log.append(f"write {name}")
            return self.about(name, *self.objects[name])

    def delete(self, name: str) -> int:
        with self.lock:
            if self.objects.pop(name, None) is None:
                return 404
            self.log.append(f"delete {name}")
            return 204

    def about(self, name: str, generation: int, content: bytes) -> dict[str, str]:
        about = {"kind": "storage#object", "name": name, "bucket": "bucket", "size": str(len(content))}
        about |= {"generation": str(generation), "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode()}
        return about | dict.fromkeys(("updated", "timeCreated"), "2026-01-01T00:00:00.000Z")


class StoreHandler(Handler):
    def listing(self) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        first, end = self.query.get("startOffset", ""), self.query.get("endOffset") or "\U0010ffff"
        items, folders = [], set()
        with self.server.lock:
            for name in self.server.names(prefix):
                inside, more, _ = name[len(prefix) :].partition(delimiter or "\0")
                if more:
                    folders.add(prefix + inside + more)
                elif first <= name < end:
                    items.append(self.server.about(name, *self.server.objects[name]))
        self.answer({"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

    def bucket(self) -> None:
        self.answer({"kind": "storage#bucket", "name": "bucket", "location": "US"})

    def read(self, name: str) -> None:
        generation, content = self.server.objects.get(name, (0, b""))
        if not generation:
            return self.refuse(404, f"No such object: {name}")
        if self.query.get("alt") != "media":
            return self.answer(self.server.about(name, generation, content))
        about, total = {"x_goog_generation": str(generation)}, len(content)
        asked = re.match(r"bytes=(\d*)-(\d*)$", self.headers.get("Range", ""))
        if asked is None:
            return self.answer(content, **about)
        begin = int(asked[1]) if asked[1] else max(total - int(asked[2]), 0)
        end = min(int(asked[2]) + 1, total) if asked[1] and asked[2] else total
        if begin >= total:
            return self.refuse(416, "range not satisfiable")
        return self.answer(content[begin:end], 206, **about, Content_Range=f"bytes {begin}-{end - 1}/{total}")

    def upload(self) -> None:
        name, kind, content = self.query.get("name", ""), self.query.get("uploadType"), self.body
        if number := self.query.get("upload_id"):
            name, so_far = self.server.uploads[number]
            so_far += self.body
            total = self.headers["Content-Range"].rpartition("/")[2]
            if total == "*" or len(so_far) < int(total):
                return self.answer(status=308, Range=f"bytes=0-{len(so_far) - 1}")
            content = bytes(so_far)
        elif kind == "multipart":
            mark = b"--" + re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            about, content = (part.split(b"\n\n", 1)[1][:-1] for part in content.split(mark)[1:3])
            name = json.loads(about)["name"]
        elif kind == "resumable":
            name = name or json.loads(content)["name"]
        if number is None:  # the later pieces of an upload go where the answer to the first one said
            self.server.writers[name].add(self.headers["Host"].rpartition(":")[0])
        if self.server.failing is not None and re.search(self.server.failing, name):
            return self.refuse(403, "the stand-in was told to fail")
        if kind == "resumable" and number is None:
            number = str(len(self.server.uploads))
            self.server.uploads[number] = (name, bytearray())
            path = self.path.partition("?")[0]
            return self.answer(Location=f"{self.server.url}{path}?uploadType=resumable&upload_id={number}")
        done = self.server.put(name, content, self.query.get("ifGenerationMatch"))
        return self.answer(done) if done else self.refuse(412, "precondition failed")

    def delete(self, name: str) -> None:
        self.answer(status=self.server.delete(name))

    def batch(self) -> None:
        text = ""
        for at in re.findall(r"DELETE \S+/o/(\S+) HTTP", self.body.decode()):
            status = self.server.delete(unquote(at.partition("?")[0]))
            text += f"--part\nContent-Type: application/http\n\nHTTP/1.1 {status}\n\n\n"
        self.answer(f"{text}--part--".encode(), Content_Type="multipart/mixed; boundary=part")

    routes = {
        r"(?:GET|HEAD) (?:/download)?/storage/v1/b/bucket": bucket,
        r"(?:GET|HEAD) (?:/download)?/storage/v1/b/bucket/o/?": listing,
        r"(?:GET|HEAD) (?:/download)?/storage/v1/b/bucket/o/(.+)": read,
        r"(?:POST|PUT) /upload/storage/v1/b/bucket/o": upload,
        r"DELETE /storage/v1/b/bucket/o/(.+)": delete,
        r"POST /batch/storage/v1": batch,
    }


TOKEN, READ_ONLY = "hf_may_write", "hf_may_read"
LARGE = (".safetensors", ".model")


class File(NamedTuple):
    """Holds a file of a repository: its content (None in the Xet store, which we do not read); a large one's SHA-256 and size."""

    content: bytes | None
    sha: str | None = None
    size: int = 0

    def entry(self, path: str) -> dict[str, Any]:
        size = self.size if self.content is None else len(self.content)
        git = hashlib.sha1(b"blob %d\0" % size + (self.content or b"")).hexdigest()
        large = {} if self.sha is None else {"lfs": {"oid": self.sha, "size": size, "pointerSize": 130}}
        return {"type": "file", "path": path, "size": size, "oid": git, **large}

    def oid(self) -> str:
        return self.sha or self.entry("")["oid"]


class Hub(StandIn):
    """Stands in for the Hugging Face hub: the part of it that its client uses to make, fill and read models.

    Large files arrive as on the hub: by Git LFS, or by Xet, whose store is then a folder here (the client writes to ``local://``).
    """

    def __init__(self, xet: Path) -> None:
        super().__init__(HubHandler)
        self.repositories: dict[str, dict[str, File]] = {}  # the files by path, of each by its name
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}  # the large files that have arrived by Git LFS, by SHA-256
        self.sent: list[str] = []  # the SHA-256 of each that arrived
        self.commits: list[str] = []  # their summaries
        self.failing = 0  # how many of the next large files are refused
        self.xet = xet

    def head(self, name: str) -> str:
        """Returns the hash of a repository's newest commit: another one for other files."""
        files = sorted((path, file.oid()) for path, file in self.repositories[name].items())
        return hashlib.sha1(json.dumps(files).encode()).hexdigest()


class HubHandler(Handler):
    def why_not(self) -> tuple[int, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_ONLY) and not self.path.startswith("/lfs/"):
            return 401, "Invalid username or password."
        may_not = token == READ_ONLY and self.command in ("POST", "PUT")
        return (403, "you do not have the right to write") if may_not else None

    def files(self, name: str) -> dict[str, File]:
        return self.server.repositories[name]

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.server.repositories
        if not there:
            self.server.repositories[name] = {".gitattributes": File(b"*.safetensors filter=lfs\n")}
            self.server.private[name] = asked.get("visibility") == "private" or asked.get("private") is True
        self.answer({"url": f"{self.server.url}/{name}", "name": name, "id": "1"}, 409 if there else 200)

    def validate(self) -> None:
        """Reads the header of a README.md; the hub also knows which values its fields take."""
        wrong = []
        try:
            ModelCard(json.loads(self.body)["content"])
        except Exception as error:
            wrong = [{"message": str(error)}]
        self.answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def info(self, name: str) -> None:
        if name not in self.server.repositories:
            return self.refuse(404, "Repository not found", "RepoNotFound")
        siblings, private = [{"rfilename": path} for path in self.files(name)], self.server.private[name]
        found = {"id": name, "sha": self.server.head(name), "private": private, "siblings": siblings, "tags": []}
        return self.answer(found)

    def tree(self, name: str) -> None:
        self.answer([file.entry(path) for path, file in self.files(name).items()])

    def preupload(self, name: str) -> None:
        files = []
        for path in (asked["path"] for asked in json.loads(self.body)["files"]):
            oid = self.files(name)[path].oid() if path in self.files(name) else None
            how = {"uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
            files.append({"path": path, "oid": oid, **how})
        self.answer({"files": files})

    def batch(self, name: str) -> None:
        objects = json.loads(self.body)["objects"]
        for asked in objects:
            if asked["oid"] not in self.server.blobs:
                asked["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}", "header": {}}}
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        with self.server.lock:
            if self.server.failing:
                self.server.failing -= 1
                return self.refuse(400, "the stand-in was told to fail")
            assert hashlib.sha256(self.body).hexdigest() == oid
            self.server.blobs[oid] = self.body
            self.server.sent.append(oid)
        return self.answer()

    def xet_token(self, name: str) -> None:
        cas, end = f"local://{self.server.xet}", int(time.time()) + 3600
        headers = {"X_Xet_Cas_Url": cas, "X_Xet_Access_Token": "t", "X_Xet_Token_Expiration": str(end)}
        self.answer({"casUrl": cas, "accessToken": "t", "exp": end}, **headers)

    def commit(self, name: str) -> None:
        files, blobs = self.files(name), self.server.blobs
        for line in map(json.loads, self.body.splitlines()):
            match line["key"], line["value"]:
                case "header", value:
                    self.server.commits.append(value["summary"])
                case "file", value:
                    files[value["path"]] = File(base64.b64decode(value["content"]))
                case "lfsFile", value:
                    files[value["path"]] = File(blobs.get(value["oid"]), value["oid"], value.get("size", 0))
                case "deletedFile", value:
                    del files[value["path"]]
        head = self.server.head(name)
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{head}", "commitOid": head})

    def resolve(self, name: str, path: str) -> None:
        file = self.files(name).get(path)
        if file is None or file.content is None:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        about = {"ETag": f'"{file.oid()}"', "X_Repo_Commit": self.server.head(name)}
        return self.answer(file.content, **about, Content_Type="application/octet-stream")

    name = r"([\w.-]+/[\w.-]+)"
    routes = {
        r"GET /api/agent-harnesses": lambda handler: handler.answer([]),
        r"POST /api/repos/create": create,
        r"POST /api/validate-yaml": validate,
        rf"GET /api/models/{name}(?:/revision/\w+)?": info,
        rf"GET /api/models/{name}/tree/\w+": tree,
        rf"POST /api/models/{name}/preupload/main": preupload,
        rf"GET /api/models/{name}/xet-write-token/main": xet_token,
        rf"POST /{name}\.git/info/lfs/objects/batch": batch,
        r"PUT /lfs/(\w+)": put,
        rf"POST /api/models/{name}/commit/main": commit,
        rf"(?:GET|HEAD) /{name}/resolve/\w+/(.+)": resolve,
    }
