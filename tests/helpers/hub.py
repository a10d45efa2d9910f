"""A model hub on the loopback, as far as huggingface_hub asks one to make a repository and to take a folder."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """token: the one that may write. Others are refused, as the hub does."""

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.created: list[dict[str, Any]] = []
        self.repositories: dict[str, str] = {}
        """public or private, by "user/name"."""
        self.files: dict[str, bytes] = {}
        """What has been committed, by "user/name/path"."""
        self.stored: dict[str, bytes] = {}
        """Large files by their SHA-256."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride] (the base has any server)
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        repo = self.path.removeprefix("/api/models/")
        if (visibility := self.server.repositories.get(repo)) is None:
            return self._answer(404, {"error": f"no {self.path} here"})
        return self._answer(200, {"id": repo, "private": visibility == "private"})

    def do_PUT(self) -> None:
        self.server.stored[self.path.rpartition("/")[2]] = self._body()
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self._answer(403, {"error": f"no right to write, asked as {self.headers.get('Authorization')}"})
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            made = json.loads(body)
            repo = f"{made['organization']}/{made['name']}"
            known = repo in self.server.repositories
            if not known:
                self.server.created.append(made)
                self.server.repositories[repo] = made.get("visibility", "public")
            return self._answer(409 if known else 200, {"url": f"{self.server.url}/{repo}"})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if parts[-2] == "preupload":
            large = (".safetensors",)
            modes = [
                {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(large) else "regular"}
                for each in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if parts[-2] == "commit":
            repo = "/".join(parts[2:4])
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[f"{repo}/{value['path']}"] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[f"{repo}/{value['path']}"] = self.server.stored[value["oid"]]
            return self._answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/1", "commitOid": "1" * 40})
        return self._answer(404, {"error": f"no {self.path} here"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if code >= 400:
            self.send_header("Connection", "close")  # else a hub that is gone goes on to answer on it
        self.end_headers()
        self.wfile.write(text)


@contextlib.contextmanager
def serve_hub(token: str) -> Iterator[Hub]:
    """A running hub."""
    hub = Hub(token)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
