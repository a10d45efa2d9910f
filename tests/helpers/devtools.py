"""Keys for a page in the headless Chromium of tests.helpers.browser, through its DevTools protocol."""

import asyncio
import contextlib
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

from launch.processes import kill_tree

from .browser import _OPTIONS, browser, why_not

_TIMEOUT_S = 60.0
_TEXT_OF = {"Enter": "\r"}


class Page:
    """A tab. Methods return when the browser has answered."""

    def __init__(self, runner: asyncio.Runner, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._runner, self._socket = runner, socket
        self._numbers = itertools.count()
        self.errors: list[str] = []
        """What the console has said of errors, once `watch_console` was called."""

    def open(self, url: str) -> None:
        """Navigate; what the page loads is not waited for."""
        self._call("Page.navigate", url=url)

    def watch_console(self) -> None:
        """Collect errors: uncaught ones, console.error, what could not be loaded or was refused."""
        self._call("Runtime.enable")
        self._call("Log.enable")

    def press(self, key: str) -> None:
        """A key by its DOM name: "ArrowLeft", "Backspace", "Enter"."""
        self._call("Input.dispatchKeyEvent", type="keyDown", key=key, text=_TEXT_OF.get(key, ""))
        self._call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def write(self, text: str) -> None:
        """Into what has the focus."""
        self._call("Input.insertText", text=text)

    def value(self, script: str) -> Any:
        """Of a JavaScript expression; a promise is waited for."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Until an expression is true. Errors count as false: the page may be loading."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not self.value(f"(() => {{ try {{ return !!({script}) }} catch {{ return false }} }})()"):
            assert time.monotonic() < deadline, f"never true: {script}\n{self.value('document.body.innerText')}"
            time.sleep(0.02)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._runner.run(asyncio.wait_for(self._exchange(method, parameters), _TIMEOUT_S))

    async def _exchange(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while (answer := await self._socket.receive_json()).get("id") != number:
            self._hear(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _hear(self, event: dict[str, Any]) -> None:
        method, told = event.get("method"), event.get("params", {})
        uncaught = method == "Runtime.exceptionThrown"
        said = method == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert")
        logged = method == "Log.entryAdded" and told["entry"]["level"] == "error"
        if uncaught or said or logged:
            self.errors.append(json.dumps(told)[:2000])


@contextlib.contextmanager
def new_page() -> Iterator[Page]:
    """An empty tab of a browser of its own."""
    path = browser()
    assert path is not None, why_not()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, asyncio.Runner() as runner:
        process = subprocess.Popen(
            [path, *_OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        session, socket = None, None
        try:
            session, socket = runner.run(_connect(_port(Path(profile) / "DevToolsActivePort")))
            yield Page(runner, socket)
        finally:
            if session is not None and socket is not None:
                runner.run(socket.close())
                runner.run(session.close())
            kill_tree(process.pid)
            process.wait()


def _port(file: Path) -> int:
    deadline = time.monotonic() + _TIMEOUT_S
    while not file.is_file() or not (lines := file.read_text().splitlines()):
        assert time.monotonic() < deadline, "the browser opens no port"
        time.sleep(0.05)
    return int(lines[0])


async def _connect(port: int) -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
    session = aiohttp.ClientSession()
    deadline = time.monotonic() + _TIMEOUT_S
    pages: list[dict[str, Any]] = []
    while not pages:  # the port is open before the first tab
        assert time.monotonic() < deadline, "the browser opens no tab"
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            pages = [tab for tab in json.loads(await answer.text()) if tab["type"] == "page"]
        await asyncio.sleep(0.05)
    url = pages[0]["webSocketDebuggerUrl"]
    return session, await session.ws_connect(url, max_msg_size=0)
