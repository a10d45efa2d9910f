"""A web server on the loopback that gives files in ranges, slowly or wrongly where a test says so."""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("stall", "reset", "500", "404", "short")


class Server(ThreadingHTTPServer):
    """files: what stands behind the host in a URL -> file. latency_s: before every answer. faulty: share of requests
    that go wrong. etags: whether answers have them."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, files: Callable[[str], Path], latency_s: float = 0.0, faulty: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.latency_s, self.faulty = files, latency_s, faulty
        self.faults: tuple[str, ...] = FAULTS
        self.stall_s = 30.0
        self.etags = True
        self.override: Callable[[BaseHTTPRequestHandler], bool] = lambda _: False
        """Answers a request in place of the files, where it returns True."""
        self.requests: list[tuple[str, int, int]] = []
        """(path, first byte, one past the last) of every GET."""
        self.heads: list[str] = []
        """The path of every HEAD."""
        self.random = random.Random(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that went away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride] (the base has any server)
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _fail(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, body: bool) -> None:
        time.sleep(self.server.latency_s)
        if self.server.override(self):
            return None
        name = self.path.partition("?")[0]
        fault = (
            self.server.random.choice(self.server.faults) if self.server.random.random() < self.server.faulty else ""
        )
        path = self.server.files(self.path.lstrip("/"))
        if not path.is_file() or fault in ("404", "500"):
            return self._fail(500 if fault == "500" else 404)
        size = path.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, end = (int(match[1]), min(int(match[2]) + 1, size)) if match else (0, size)
        if body:
            self.server.requests.append((name, first, end))
        else:
            self.server.heads.append(name)
        if fault == "stall":
            time.sleep(self.server.stall_s)
        if fault == "reset":
            self.close_connection = True
            return None
        self.send_response(206 if match else 200)
        if self.server.etags:
            self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}-{size:x}"')
        if match:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
        sent = max(0, end - first - (7 if fault == "short" else 0)) if body else end - first
        self.send_header("Content-Length", str(sent))
        self.end_headers()
        if body:
            with open(path, "rb") as file:
                file.seek(first)
                self.wfile.write(file.read(sent))
        return None


@contextlib.contextmanager
def serve(folder: Path | Callable[[str], Path], latency_s: float = 0.0, faulty: float = 0.0) -> Iterator[Server]:
    """A running server of a folder's files."""
    files = folder if callable(folder) else lambda name: folder / name.partition("?")[0]
    server = Server(files, latency_s, faulty)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
