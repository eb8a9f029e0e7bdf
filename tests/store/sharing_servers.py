"""Servers on loopback that stores are pushed to and pulled from: a web server, an S3 and a small Hugging Face Hub."""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY = Path(__file__).resolve().parents[2]
ENDLESS = 48 << 20
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(kw_only=True)
class Behaviour:
    """How the server behaves, changeable at any time, and what it has seen."""

    ranges: bool = True
    wrong: set[str] = field(default_factory=set[str])
    """Paths below the folder that are served with one bit flipped."""
    cuts: int = 0
    """Connections still to be cut, each after `cut_after` bytes of the answer's body."""
    cut_after: int = 1000
    pause: float = 0.0
    """Seconds before each answer."""
    down: bool = False
    """Answer everything with 503."""
    refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list[tuple[int, dict[str, str]]])
    """Statuses and headers of the next answers, one each, before files are served again."""
    endless: set[str] = field(default_factory=set[str])
    """Paths that are sent in chunks, without a length, and then zeros until the client hangs up, at most ENDLESS."""
    compressed: dict[str, bytes] = field(default_factory=dict[str, bytes])
    """Bodies that are sent with `Content-Encoding: gzip` in place of the files of these paths."""
    bytes_sent: int = 0
    asked: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    """(path, first byte) of every GET."""

    def asked_for(self, path: str) -> list[int]:
        """First bytes of the GETs of `path`."""
        return [start for name, start in self.asked if name == path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the parent's name
        """Say nothing."""

    def answer(self, body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._write(body)

    def answer_json(self, value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        given = {"Content-Type": "application/json", **(headers or {})}
        self.answer(json.dumps(value).encode(), status=status, headers=given)

    def answer_file(self, root: Path, name: str) -> None:
        behaviour = self.server.behaviour
        path = root / name
        if not path.is_file():
            self.answer(b"", status=404, headers={"X-Error-Code": "EntryNotFound"})
            return
        body = bytearray(path.read_bytes())
        if name in behaviour.wrong:
            body[len(body) // 2] ^= 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if behaviour.ranges else None
        start = int(asked[1]) if asked else 0
        if self.command == "GET":
            behaviour.asked.append((name, start))
        if name in behaviour.compressed:
            self.answer(behaviour.compressed[name], headers={"Content-Encoding": "gzip"})
            return
        answer = self.answer_without_end if name in behaviour.endless and self.command == "GET" else self.answer
        if asked is None:
            answer(bytes(body))
            return
        if start >= len(body):
            self.answer(b"", status=416, headers={"Content-Range": f"bytes */{len(body)}"})
            return
        stop = min(int(asked[2]) + 1 if asked[2] else len(body), len(body))
        span = {"Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"}
        answer(bytes(body[start:stop]), status=206, headers=span)

    def answer_without_end(self, body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Transfer-Encoding": "chunked", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        block, left = body or bytes(1 << 16), ENDLESS
        while left > 0:  # a client that hangs up ends it with an error
            self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block))
            self.server.behaviour.bytes_sent += len(block)
            left -= len(block)
            block = bytes(1 << 16)
        self.wfile.write(b"0\r\n\r\n")

    def _write(self, body: bytes) -> None:
        behaviour = self.server.behaviour
        time.sleep(behaviour.pause)
        if behaviour.cuts > 0 and len(body) > behaviour.cut_after:
            behaviour.cuts -= 1
            body = body[: behaviour.cut_after]
            self.close_connection = True
        behaviour.bytes_sent += len(body)
        self.wfile.write(body)
        if self.close_connection:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


class _WebHandler(_Handler):
    def do_GET(self) -> None:  # the name that http.server calls
        behaviour = self.server.behaviour
        if behaviour.down:
            self.answer(b"", status=503)
            return
        if behaviour.refusals:
            status, headers = behaviour.refusals.pop(0)
            self.answer(b"", status=status, headers=headers)
            return
        self.answer_file(self.server.folder, unquote(urlsplit(self.path).path).lstrip("/"))

    do_HEAD = do_GET


class _HubHandler(_Handler):
    """The endpoints of the Hub that HfFileSystem and HfApi.create_commit call, for data sets on branch `main`."""

    REPO = re.compile(
        r"/api/datasets/(?P<repo>[^/]+/[^/]+)(/(?P<what>\w[\w-]*)(/(?P<revision>[^/]+)(/(?P<path>.*))?)?)?"
    )
    FILE = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/main/(?P<path>.*)")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := self.FILE.fullmatch(path):
            self.answer_file(self.server.folder / found["repo"], found["path"])
            return
        found = self.REPO.fullmatch(path)
        if found is None or not (self.server.folder / found["repo"]).is_dir():
            self.answer(b"", status=404, headers={"X-Error-Code": "RepoNotFound"})
        elif found["revision"] not in (None, "main"):
            self.answer(b"", status=404, headers={"X-Error-Code": "RevisionNotFound"})
        elif found["what"] == "tree":
            self._tree(self.server.folder / found["repo"], found["path"] or "")
        else:
            self.answer_json({"id": found["repo"], "sha": "a" * 40, "private": False, "tags": [], "siblings": []})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        sent = self._body()
        path = unquote(urlsplit(self.path).path)
        found = self.REPO.fullmatch(path)
        if path == "/api/validate-yaml":
            self.answer_json({"warnings": [], "errors": []})
        elif found and found["what"] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(sent)["files"]
            ]
            self.answer_json({"files": files})
        elif found and found["what"] == "commit":
            self._commit(self.server.folder / found["repo"], sent)
            url = f"http://{self.headers['Host']}/datasets/{found['repo']}/commit/{'b' * 40}"
            self.answer_json({"success": True, "commitOid": "b" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer(b"", status=404)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _tree(self, root: Path, below: str) -> None:
        start = root / below
        if not start.is_dir():
            self.answer(b"", status=404, headers={"X-Error-Code": "EntryNotFound"})
            return
        recursive = "recursive=true" in self.path.lower()
        entries: list[dict[str, Any]] = []
        for path in sorted(start.rglob("*") if recursive else start.iterdir()):
            name = path.relative_to(root).as_posix()
            if path.is_dir():
                entries.append({"type": "directory", "path": name, "oid": "c" * 40, "size": 0})
            else:
                body = path.read_bytes()
                blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
                entries.append({"type": "file", "path": name, "oid": blob, "size": len(body)})
        self.answer_json(entries)

    def _commit(self, root: Path, sent: bytes) -> None:
        self.server.commits += 1
        for line in sent.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                target = root / operation["value"]["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(operation["value"]["content"]))
            elif operation["key"] == "deletedFile":
                (root / operation["value"]["path"]).unlink()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, handler: type[_Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.folder = folder
        self.behaviour = Behaviour()
        self.commits = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away (or was killed) is nothing to report."""


@contextmanager
def _serving(folder: Path, handler: type[_Handler]) -> Generator[_Server]:
    server = _Server(folder, handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def web_server(folder: Path):
    """Serves `folder` at `server.url`; `server.behaviour` says how, and counts."""
    return _serving(folder, _WebHandler)


def hub_server(folder: Path):
    """A Hub whose data sets are the folders OWNER/NAME below `folder`; point HF_ENDPOINT at `server.url`."""
    return _serving(folder, _HubHandler)


@contextmanager
def s3_server() -> Generator[str]:
    """An S3 of its own process (moto); yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env={**os.environ, **CREDENTIALS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        assert process.poll() is None, "moto did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
