"""Servers on loopback that tests fetch from: a folder over HTTP, with faults on demand, and S3 in memory."""

import base64
import json
import logging
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar
from urllib.parse import parse_qs, unquote

import pytest


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one GET.

    Attributes:
        status: answered instead of the file.
        drop_at: close the connection after so many bytes of the body.
        stall_at: stop sending after so many bytes, for `stall_s`.
        claim: bytes more, or less, in Content-Length than in the body.
        cut: send so many bytes only, and say so.
        flip: change the body's byte at this place.
        whole: send the whole file, whatever range was asked for.
    """

    status: int | None = None
    drop_at: int | None = None
    stall_at: int | None = None
    stall_s: float = 2.0
    claim: int = 0
    cut: int | None = None
    flip: int | None = None
    whole: bool = False


Server = TypeVar("Server", bound=ThreadingHTTPServer)


class FolderServer(ThreadingHTTPServer):
    """Serves a folder; switches are plain attributes.

    Attributes:
        faults: for each file name what goes wrong with its next GETs, one after the other.
        always: for each file name what goes wrong with every GET.
        ranges: whether Range is understood.
        dated: whether answers carry ETag and Last-Modified.
        sized: whether answers carry Content-Length; without, the end of the connection is the end of the body.
        refusal: a status that every request gets, HEAD too.
        gets: names and Range headers of the GETs so far.
        sent: bytes of bodies sent, by file name.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.ranges, self.dated, self.sized = root, True, True, True
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.refusal: int | None = None
        self.gets: list[tuple[str, str | None]] = []
        self.sent: dict[str, int] = defaultdict(int)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def count(self, name: str) -> int:
        """GETs of a file so far."""
        return sum(got == name for got, _ in self.gets)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the client to acknowledge its headers
    server: FolderServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        name = unquote(self.path.partition("?")[0]).lstrip("/")
        path, server = self.server.root / name, self.server
        fault = Fault()
        if body:
            server.gets.append((name, self.headers.get("Range")))
            fault = server.faults[name].pop(0) if server.faults[name] else server.always.get(name, fault)
        status = server.refusal or fault.status or (None if path.is_file() else 404)
        if status:
            self._send(status, b"sorry", {}, Fault(), body=body)
            return
        data, headers = path.read_bytes(), {}
        if server.dated:
            stat = path.stat()
            headers = {"ETag": f'"{stat.st_mtime_ns}"', "Last-Modified": formatdate(stat.st_mtime, usegmt=True)}
        wanted, code = self.headers.get("Range"), 200
        if server.ranges:
            headers["Accept-Ranges"] = "bytes"
        if wanted and server.ranges and not fault.whole:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last or len(data)), len(data) - 1) + 1
            if start >= len(data):
                self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"}, Fault(), body=body)
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, code = data[start:stop], 206
        self._send(code, data, headers, fault, body=body, name=name)

    def _send(
        self, code: int, data: bytes, headers: dict[str, str], fault: Fault, *, body: bool, name: str = ""
    ) -> None:
        if fault.cut is not None:
            data = data[: fault.cut]
        if fault.flip is not None and fault.flip < len(data):
            data = data[: fault.flip] + bytes([data[fault.flip] ^ 1]) + data[fault.flip + 1 :]
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        if self.server.sized:
            self.send_header("Content-Length", str(len(data) + fault.claim))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if not body:
            return
        part = data if fault.drop_at is None else data[: fault.drop_at]
        if fault.stall_at is not None:
            self.wfile.write(part[: fault.stall_at])
            time.sleep(fault.stall_s)
            part = part[fault.stall_at :]
        if fault.claim < 0:
            part = part[: len(data) + fault.claim]
        self.wfile.write(part)
        self.server.sent[name] += len(part)
        if fault.drop_at is not None or fault.claim > 0:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serve(root: Path) -> Iterator[FolderServer]:
    """A folder over HTTP for the length of the block."""
    with _running(FolderServer(root)) as server:
        yield server


@contextmanager
def _running(server: Server) -> Iterator[Server]:
    """A server that answers for the length of the block."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server in memory with the bucket `bucket`, for the length of the block; gives its endpoint."""
    import boto3
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem
    from werkzeug.serving import WSGIRequestHandler

    monkeypatch.setattr(WSGIRequestHandler, "disable_nagle_algorithm", True)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    for name, value in {"AWS_ACCESS_KEY_ID": "fake", "AWS_SECRET_ACCESS_KEY": "fake"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    S3FileSystem.clear_instance_cache()  # it may be connected to an earlier server
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    try:
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="bucket")
        yield endpoint
    finally:
        server.stop()


def upload(endpoint: str, folder: Path, prefix: str) -> None:
    """Put all files below a folder into the bucket."""
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), "bucket", f"{prefix}/{path.relative_to(folder).as_posix()}")


class HubServer(ThreadingHTTPServer):
    """Hugging Face's hub as far as its file system asks, with one data set `name/data` whose files are all small.

    Attributes:
        files: by their paths.
        commits: the number of files that each wrote or removed.
        refuse: a status that the next commit gets instead.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.files: dict[str, bytes] = {}
        self.commits: list[int] = []
        self.refuse: int | None = None
        self.url = f"http://127.0.0.1:{self.server_port}"


class _HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path, files = unquote(self.path.partition("?")[0]), self.server.files
        place = "/datasets/name/data"
        if path.startswith(f"{place}/resolve/main/"):
            data = files.get(path.removeprefix(f"{place}/resolve/main/"))
            if data is None:
                self._answer(404, {}, error="EntryNotFound")
                return
            first, _, last = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1 if last else None]
            self._send(206 if self.headers.get("Range") else 200, part)
        elif path.startswith(f"/api{place}/tree/main"):
            folder = path.removeprefix(f"/api{place}/tree/main").strip("/")
            below = {name: data for name, data in files.items() if not folder or name.startswith(f"{folder}/")}
            found = [self._entry(name) for name in below]
            self._answer(200, found) if below else self._answer(404, {}, error="EntryNotFound")
        elif path in (f"/api{place}", f"/api{place}/revision/main"):
            self._answer(200, {"id": "name/data", "sha": "0" * 40, "private": False, "tags": [], "siblings": []})
        else:
            self._answer(401, {}, error="RepoNotFound")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b"".join(self._chunks())
        action, server = self.path.split("/")[5], self.server
        if action == "preupload":
            modes = [{**one, "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]
            self._answer(200, {"files": modes})
        elif action == "paths-info":
            wanted = parse_qs(body.decode())["paths"] if body[:1] != b"{" else json.loads(body)["paths"]
            self._answer(200, [self._entry(name) for name in wanted if name in server.files])
        elif server.refuse:
            status, server.refuse = server.refuse, None
            self._answer(status, {"error": "no"})
        else:
            changes = [json.loads(line) for line in body.splitlines()][1:]
            for change in changes:
                name = change["value"]["path"]
                if change["key"] == "file":
                    server.files[name] = base64.b64decode(change["value"]["content"])
                else:
                    del server.files[name]
            server.commits.append(len(changes))
            self._answer(
                200, {"commitUrl": f"{server.url}/datasets/name/data/commit/{'0' * 40}", "commitOid": "0" * 40}
            )

    def _chunks(self) -> Iterator[bytes]:
        """The body of a request whose length is not said."""
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _entry(self, name: str) -> dict[str, object]:
        return {"type": "file", "path": name, "size": len(self.server.files[name]), "oid": "0" * 40}

    def _answer(self, status: int, value: object, *, error: str = "") -> None:
        self._send(status, json.dumps(value).encode(), {"X-Error-Code": error} if error else {})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub for the length of the block, for all `hf://` URLs."""
    import fsspec
    from huggingface_hub import HfFileSystem

    with _running(HubServer()) as server:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url, "token": False})
        HfFileSystem.clear_instance_cache()
        yield server
