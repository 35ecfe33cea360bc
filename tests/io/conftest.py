"""Stands in for Google Cloud Storage: serves its HTTP interface from a dictionary to the real clients.

As in the real store, objects appear whole when their upload ends, and there are no folders, no rename and no append.
``gcsfs`` (through etils' epath) and TensorStore (through Orbax) reach it by their environment variables for emulators.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LOCATION = re.compile(r"/(?:download/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?$")


class Store(ThreadingHTTPServer):
    """Serves the objects.

    Attributes:
        objects: (generation, bytes) of each object by (bucket, name).
        log: one line for each request that changes something: ``write name`` or ``delete name``.
        refused: requests that the store does not know, which jaxblock must never send.
        failing: the pattern of the names that cannot be written; None where all can.
        writers: the host names by which clients called the store when they wrote an object, by the object's name.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[tuple[str, str], tuple[int, bytes]] = {}
        self.log: list[str] = []
        self.refused: list[str] = []
        self.failing: re.Pattern[str] | None = None
        self.writers: dict[str, set[str]] = {}
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.lock = threading.Lock()
        self.generation = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores broken connections: a client that asks twice and takes the first answer closes the other connection."""

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for _, name in self.objects if name.startswith(prefix))

    def content(self, name: str) -> bytes:
        return next(content for (_, at), (_, content) in self.objects.items() if at == name)

    def put(self, bucket: str, name: str, content: bytes, query: dict[str, str]) -> tuple[int, Any]:
        with self.lock:
            there = self.objects.get((bucket, name))
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != (there[0] if there else 0):
                return 412, {"error": {"code": 412, "message": "precondition failed"}}
            self.generation += 1
            self.objects[bucket, name] = (self.generation, content)
            self.log.append(f"write {name}")
            return 200, self.about(bucket, name)

    def delete(self, bucket: str, name: str) -> int:
        with self.lock:
            if self.objects.pop((bucket, name), None) is None:
                return 404
            self.log.append(f"delete {name}")
            return 204

    def about(self, bucket: str, name: str) -> dict[str, str]:
        generation, content = self.objects[bucket, name]
        about = {"kind": "storage#object", "name": name, "bucket": bucket, "size": str(len(content))}
        about |= {"generation": str(generation), "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode()}
        return about | dict.fromkeys(("updated", "timeCreated"), "2026-01-01T00:00:00.000Z")

    def listing(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset")
        items, folders = [], set()
        with self.lock:
            for at, name in sorted(self.objects):
                if at != bucket or not name.startswith(prefix) or name < first or (end and name >= end):
                    continue
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    folders.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(self.about(bucket, name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the other side's delayed acknowledgement
    server: Store

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        if not isinstance(body, bytes):
            headers["Content_Type"] = "application/json"
        self.send_response(status)
        for name, value in {**headers, "Content_Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _fail(self, status: int, message: str) -> None:
        self._answer(status, {"error": {"code": status, "message": message}})

    def _refuse(self) -> None:
        self.server.refused.append(f"{self.command} {self.path}")
        self._fail(501, f"the stand-in has no {self.command} {self.path}")

    def _asked(self) -> tuple[str, dict[str, str], bytes]:
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return parts.path, query, body

    def do_GET(self) -> None:
        path, query, _ = self._asked()
        found = LOCATION.match(path)
        if found is None:
            return self._refuse()
        bucket, name = found[1], found[2]
        if "/o" not in path.split(bucket, 1)[1]:
            return self._answer(200, {"kind": "storage#bucket", "name": bucket, "location": "US"})
        if name is None or name == "":
            return self._answer(200, self.server.listing(bucket, query))
        there = self.server.objects.get((bucket, unquote(name)))
        if there is None:
            return self._fail(404, f"No such object: {unquote(name)}")
        if query.get("alt") != "media":
            return self._answer(200, self.server.about(bucket, unquote(name)))
        generation, content = there
        asked = re.match(r"bytes=(\d*)-(\d*)$", self.headers.get("Range", ""))
        total = len(content)
        if asked is None:
            return self._answer(200, content, x_goog_generation=str(generation))
        begin = int(asked[1]) if asked[1] else max(total - int(asked[2]), 0)
        end = min(int(asked[2]) + 1, total) if asked[1] and asked[2] else total
        if begin >= total:
            return self._fail(416, "range not satisfiable")
        where = f"bytes {begin}-{end - 1}/{total}"
        return self._answer(206, content[begin:end], x_goog_generation=str(generation), Content_Range=where)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, query, body = self._asked()
        if path == "/batch/storage/v1":
            return self._batch(body)
        bucket = re.match(r"/upload/storage/v1/b/([^/]+)/o$", path)
        if bucket is None:
            return self._refuse()
        name, kind, content = query.get("name", ""), query.get("uploadType"), body
        if kind == "multipart":
            mark = b"--" + (re.search(r'boundary="?([^";]+)', self.headers["Content-Type"]) or [b"", ""])[1].encode()
            about, content = (part.split(b"\n\n", 1)[1][:-1] for part in body.split(mark)[1:3])
            name = json.loads(about)["name"]
        if name:  # the later pieces of an upload have none
            caller = self.headers["Host"].rpartition(":")[0]
            self.server.writers.setdefault(name, set()).add(caller)
        if self.server.failing is not None and self.server.failing.search(name):
            return self._fail(403, "the stand-in was told to fail")
        if kind == "resumable":
            if "upload_id" not in query:
                number = f"{len(self.server.uploads)}"
                self.server.uploads[number] = (bucket[1], name or json.loads(body)["name"], bytearray())
                where = f"{self.server.url}{path}?uploadType=resumable&upload_id={number}"
                return self._answer(200, Location=where)
            return self._chunk(query["upload_id"], body)
        return self._answer(*self.server.put(bucket[1], name, content, query))

    def _chunk(self, number: str, body: bytes) -> None:
        bucket, name, so_far = self.server.uploads[number]
        so_far += body
        total = self.headers["Content-Range"].rpartition("/")[2]
        if total == "*" or len(so_far) < int(total):
            return self._answer(308, Range=f"bytes=0-{len(so_far) - 1}")
        return self._answer(*self.server.put(bucket, name, bytes(so_far), {}))

    do_PUT = do_POST

    def _batch(self, body: bytes) -> None:
        text = ""
        for at in re.findall(r"DELETE (\S+) HTTP", body.decode()):
            status = self.server.delete(*self._named(at))
            text += f"--part\nContent-Type: application/http\n\nHTTP/1.1 {status}\n\n\n"
        self._answer(200, f"{text}--part--".encode(), Content_Type="multipart/mixed; boundary=part")

    def do_DELETE(self) -> None:
        status = self.server.delete(*self._named(self.path))
        self._answer(status) if status == 204 else self._fail(status, "No such object")

    def _named(self, address: str) -> tuple[str, str]:
        """Returns the bucket and the name of the object at an address."""
        found = LOCATION.match(urlsplit(address).path)
        assert found is not None
        return found[1], unquote(found[2])


@pytest.fixture
def store(monkeypatch):
    """Starts a stand-in to which ``gs://`` paths of this process, and of processes that it starts, lead."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks a second service, over gRPC
    pytest.importorskip("gcsfs", reason="gs:// needs gcsfs")
    server = Store()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(variable, server.url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "stand-in")
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
    _forget_clients()
    yield server
    _forget_clients()
    server.shutdown()
    server.server_close()


def _forget_clients() -> None:
    """Drops the clients, which would otherwise be kept with the address of an earlier stand-in."""
    import fsspec
    import gcsfs
    from etils.epath import backend

    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    gcsfs.GCSFileSystem.clear_instance_cache()
    fsspec.config.set_conf_env(fsspec.config.conf)
