"""An HTTP server on loopback that passes requests to a provider's `serve`, and breaks connections where it says so."""

import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the server sends back, or how it fails to."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    missing: int = 0
    """Bytes that Content-Length announces beyond the body, before the connection closes."""
    lost: bool = False
    """The connection closes without an answer."""
    dies: bool = False
    """The same, and the server stops."""
    drips: float = 0.0
    """Seconds between two bytes of the body, until the client goes away."""
    waits: bool = False
    """The reply waits for `server.release()`."""


class LoopbackServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, provider: Any, port: int) -> None:
        self.provider = provider
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # the other side or its thread has closed it already
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):  # a client that is killed is no fault
            self.provider.faults.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: LoopbackServer

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        if len(raw) < length:  # the server stops, or the client was killed, in the middle of the request
            self.close_connection = True
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.server.provider.serve(self.command, self.path, headers, raw)
        if reply.lost or reply.dies:
            self.close_connection = True
            if reply.dies:
                self.server.provider.stop()  # before the client hears of it, so that its next try finds no port
            return
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body) + reply.missing))
        self.end_headers()
        for byte in reply.body if reply.drips else b"":
            self.wfile.write(bytes([byte]))
            time.sleep(reply.drips)
        self.wfile.write(b"" if reply.drips else reply.body)
        self.close_connection = self.close_connection or bool(reply.missing)

    do_GET = do_POST = do_DELETE = _serve  # the names that http.server calls

    def log_message(self, *_: object) -> None:
        """Print nothing."""
