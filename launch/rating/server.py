"""The server of the page on which raters vote. Which run is which never leaves it."""

import json
import secrets
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from launch.rating.tasks import Tasks
from launch.rating.votes import BOTH_BAD, SIDES, Votes

_HEADERS = {
    "Referrer-Policy": "no-referrer",  # it would tell the token
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # else another site's page could have its visitors vote
    "Content-Security-Policy": "default-src 'none'; img-src 'self' blob:; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
}
_LONGEST_NAME, _LONGEST_BODY = 40, 4096
PAGE = Path(__file__).with_name("templates") / "page.html"


class BadRequest(Exception):
    """args: (HTTP status, message)."""


class Rating(ThreadingHTTPServer):
    """images: folder with a/00000.png and b/00000.png. Every request must carry the study's token: on a machine that
    people share, its loopback address is open to all of them, and to pages of other sites in a rater's browser."""

    daemon_threads = True
    request_queue_size = 512  # a room of raters votes at once; five is the default

    def __init__(self, address: tuple[str, int], votes: Votes, images: Path, prompts: list[str], seed: int) -> None:
        super().__init__(address, _Handler)
        self.votes, self.token = votes, str(votes.study["token"])
        self.tasks = Tasks(votes, images, prompts, seed)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A rater who goes away is no error of the server's."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Rating  # pyright: ignore[reportIncompatibleVariableOverride] (the base has any server)
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: a line per request would hide the address to open."""

    def do_GET(self) -> None:
        self._answer({"/": self._page, "/task": self._task, "/image": self._image})

    def do_POST(self) -> None:
        self._answer({"/vote": self._vote})

    def _answer(self, routes: dict[str, Any]) -> None:
        try:
            body = self._body()
            try:
                address = urlsplit(self.path)
                self.query = {key: values[0] for key, values in parse_qs(address.query).items()}
            except ValueError:
                raise BadRequest(400, "the address cannot be read") from None
            token = self.query.get("token", "").encode("utf-8", "replace")
            if not secrets.compare_digest(token, self.server.token.encode()):
                raise BadRequest(403, "the address must end in the token that the command printed")
            if address.path not in routes:
                raise BadRequest(404, "there is no such page")
            kind, content = routes[address.path](body)
            self._send(200, kind, content)
        except BadRequest as error:
            self._send(error.args[0], "text/plain; charset=utf-8", error.args[1].encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or len(length) > 9 or int(length) > _LONGEST_BODY:
            self.close_connection = True  # what follows is not read
            raise BadRequest(413, f"expected at most {_LONGEST_BODY} bytes")
        return self.rfile.read(int(length))

    def _page(self, body: bytes) -> tuple[str, bytes]:
        return "text/html; charset=utf-8", PAGE.read_bytes()

    def _task(self, body: bytes) -> tuple[str, bytes]:
        number = self._number() if "number" in self.query else None
        return "application/json", json.dumps(self.server.tasks.state(self._rater(), number)).encode()

    def _image(self, body: bytes) -> tuple[str, bytes]:
        if (side := self.query.get("side")) not in SIDES:
            raise BadRequest(400, "side must be left or right")
        return "image/png", self.server.tasks.image(self._rater(), self._number(), side)

    def _vote(self, body: bytes) -> tuple[str, bytes]:
        # A page of another site can make a browser send a form to this one, but not JSON.
        if self.headers.get_content_type() != "application/json":
            raise BadRequest(415, "a vote must be JSON")
        try:
            choice = json.loads(body)["choice"]
        except (ValueError, TypeError, KeyError, RecursionError):
            choice = None
        if not isinstance(choice, str) or choice not in (*SIDES, BOTH_BAD):
            raise BadRequest(400, "choice must be left, right or both_bad")
        rater = self._rater()
        self.server.tasks.vote(rater, self._number(), choice)
        return "application/json", json.dumps(self.server.tasks.state(rater, None)).encode()

    def _rater(self) -> str:
        rater = self.query.get("rater", "").strip()
        if not rater or len(rater) > _LONGEST_NAME:
            raise BadRequest(400, f"a rater's name has 1 to {_LONGEST_NAME} letters")
        return rater

    def _number(self) -> int:
        text, count = self.query.get("number", ""), self.server.tasks.count
        if not text.isdecimal() or len(text) > 9 or int(text) >= count:
            raise BadRequest(400, f"number must be below {count}")
        return int(text)
