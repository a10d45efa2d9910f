"""The server of the live page: read-only, on the loopback address, and of its folders only what the page shows. No
address holds a path: runs and samples are asked for by number."""

import hashlib
import secrets
import socket
import threading
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data.errors import DataError
from data.redaction import one_line
from launch.watching.sources import Sources
from trainer.page.html import PLOTLY, live_page, page_data, plain
from trainer.page.run_data import RunFolder, read_sample

_LONGEST_PATH = 80
_HEADERS = {
    b"cache-control": b"no-store",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
}
_POLICY = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_STUDY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; sandbox"


class Guard:
    """Refuses requests by another name, and adds what a browser is to hold to. A page of another site may have its name
    lead to this address (DNS rebinding), and would then read what is here; its requests say that name."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._hosts = {f"{name}:{port}".encode() for name in ("localhost", "127.0.0.1", "[::1]")}
        if port == 80:
            self._hosts |= {b"localhost", b"127.0.0.1", b"[::1]"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        hosts = [value.lower() for name, value in scope["headers"] if name == b"host"]
        answer: ASGIApp = self._app
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            names = ", ".join(sorted(host.decode() for host in self._hosts))
            text = f"this page is read as {names} alone; with ssh -L keep the port the same on both sides\n"
            answer = PlainTextResponse(text, 421)
        elif len(scope.get("raw_path") or scope["path"]) > _LONGEST_PATH:
            answer = PlainTextResponse("there is no such page\n", 404)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                message["headers"] += [(name, value) for name, value in _HEADERS.items() if name not in given]
            await send(message)

        await answer(scope, receive, with_headers)


def application(sources: Sources, port: int) -> Starlette:
    """port: the one that it is reached by."""
    lock = threading.Lock()  # requests are answered by threads, and reading on is one's at a time
    shown = sources.look()

    def page(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        headers = {"Content-Security-Policy": _POLICY.format(nonce=nonce)}
        return Response(live_page(nonce), media_type="text/html", headers=headers)

    def data(request: Request) -> Response:
        """204 where nothing has changed since the stamp that the page has."""
        nonlocal shown
        with lock:
            try:
                shown = sources.look()
                stamps = [(number, source.stamp()) for number, source in shown.items()]
                stamp = hashlib.sha256(repr((stamps, sources.notes)).encode()).hexdigest()[:16]
                if request.query_params.get("stamp") == stamp:
                    return Response(status_code=204)
                found = [{"number": number, **source.data()} for number, source in shown.items()]
                content = plain({**page_data(found, sources.notes), "stamp": stamp})
            except Exception as error:  # what folders hold may be anything: the next request looks again
                text = f"the folders cannot be shown: {type(error).__name__}: {error}"
                return PlainTextResponse(one_line(text, 300), 503)
        return Response(content, media_type="application/json")

    def sample(request: Request) -> Response:
        """Its address changes with the picture, so that a browser may keep it."""
        source = shown.get(request.path_params["source"])
        if not isinstance(source, RunFolder):
            return _nothing()
        headers = {"Cache-Control": "private, max-age=3600"}
        return _read(lambda: read_sample(source.folder, request.path_params["step"]), "image/png", headers)

    def study(request: Request) -> Response:
        source = shown.get(request.path_params["source"])
        if source is None or isinstance(source, RunFolder):
            return _nothing()
        from trainer.page.study_data import read_report  # loaded already, where a study is among the sources

        return _read(lambda: read_report(source.folder), "text/html", {"Content-Security-Policy": _STUDY_POLICY})

    def script(request: Request) -> Response:
        return FileResponse(PLOTLY, media_type="text/javascript", headers={"Cache-Control": "private, max-age=3600"})

    routes = [
        Route("/", page),
        Route("/data", data),
        Route("/plotly.js", script),
        Route("/samples/{source:int}/{step:int}", sample),
        Route("/study/{source:int}", study),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, port=port), Middleware(GZipMiddleware, minimum_size=4096, compresslevel=4)],
    )


def serve(sources: Sources, listening: socket.socket) -> None:
    """Until a signal ends it."""
    config = uvicorn.Config(
        application(sources, listening.getsockname()[1]), log_level="warning", access_log=False, server_header=False,
        lifespan="off", ws="none", proxy_headers=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listening])


def _read(read: Callable[[], bytes], kind: str, headers: dict[str, str]) -> Response:
    try:
        return Response(read(), media_type=kind, headers=headers)
    except (OSError, DataError):
        return _nothing()


def _nothing() -> Response:
    return PlainTextResponse("there is no such page\n", 404)
