"""The page on which raters vote: one pair and one question at a time. Which run is which never leaves the server."""

import json
import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from launch.rating.votes import BOTH_BAD, QUESTIONS, SIDES, Vote, Votes, order

_LONGEST_NAME, _LONGEST_BODY = 40, 4096
_OTHER = {"a": "b", "b": "a"}
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Which is better?</title>
<style>
 body { font: 18px/1.5 system-ui, sans-serif; margin: 0; padding: 1em; text-align: center; background: #808080 }
 main, form { background: #fff; display: inline-block; padding: .5em 1em; border-radius: 8px; max-width: 94vw }
 [hidden] { display: none !important }
 #pair { white-space: nowrap }
 img { width: min(42vw, 58vh, 768px); margin: .4em; vertical-align: top }
 img.small { image-rendering: pixelated }
 button { font: inherit; padding: .3em 1.2em; margin: .2em } input { font: inherit }
 #prompt { font-weight: bold } #progress, .keys { color: #666; font-size: 14px }
</style>
<form id="name" hidden><label>Your name: <input name="rater" maxlength="40" required autofocus></label>
<button>Start</button></form>
<main id="rating" hidden>
<p id="progress"></p><p id="prompt"></p><p id="question"></p>
<div id="pair"><img id="left" alt="left image"><img id="right" alt="right image"></div>
<div id="answers"><button data-choice="left">left</button><button data-choice="both_bad">both bad</button>
<button data-choice="right">right</button>
<p class="keys">keys: &larr; left, &darr; both bad, &rarr; right, Backspace: the answer before</p></div>
</main>
<script>
const keys = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "both_bad"};
const query = new URLSearchParams(location.search), rater = query.get("rater");
const byId = id => document.getElementById(id);
let task = null;  // null while the server is asked: no key counts then

const url = (path, more) => {
  const all = new URLSearchParams({rater, ...more});
  if (query.has("token")) all.set("token", query.get("token"));
  return path + "?" + all;
};
async function ask(path, more, body) {
  task = null;
  try {
    const options = body && {method: "POST", body: JSON.stringify(body), headers: {"Content-Type": "application/json"}};
    const answer = await fetch(url(path, more), options);
    if (!answer.ok) throw new Error(await answer.text());
    await show(await answer.json());
  } catch (error) {
    byId("question").textContent = `${error.message || error}: reload the page to go on; what was answered is stored`;
  }
}
async function show(next) {
  byId("progress").textContent = `${next.answered} of ${next.tasks} answered`;
  byId("pair").hidden = byId("answers").hidden = next.done;
  byId("prompt").textContent = next.done ? "" : next.prompt;
  byId("question").textContent = next.done ? "All answered. Thank you!" : "";
  if (!next.done) {
    await Promise.all(["left", "right"].map(side => {
      const image = byId(side);
      image.src = url("image", {number: next.number, side});
      return image.decode().then(() => image.classList.toggle("small", image.naturalWidth < 200));
    }));
    byId("question").textContent = next.question;
  }
  task = next;
}
function vote(choice) {
  if (task && !task.done) ask("vote", {number: task.number}, {choice});
}
addEventListener("keydown", event => {
  if (!task || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in keys) { event.preventDefault(); vote(keys[event.key]); }
  if (event.key === "Backspace" && task.number > 0) { event.preventDefault(); ask("task", {number: task.number - 1}); }
});
for (const button of document.querySelectorAll("button[data-choice]"))
  button.addEventListener("click", () => { button.blur(); vote(button.dataset.choice); });
byId("name").addEventListener("submit", event => {
  event.preventDefault();
  query.set("rater", new FormData(event.target).get("rater").trim());
  location.search = query;
});
if (rater) { byId("rating").hidden = false; ask("task"); } else byId("name").hidden = false;
</script>
</html>
"""


class BadRequest(Exception):
    """(HTTP status, message)."""


class Rating(ThreadingHTTPServer):
    """images: folder with a/00000.png and b/00000.png. token: what every request must carry; None asks for nothing."""

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], votes: Votes, images: Path, prompts: list[str], seed: int, token: str | None
    ) -> None:
        super().__init__(address, _Handler)
        self.host = address[0].lower()
        self.votes, self.images, self.prompts, self.seed, self.token = votes, images, prompts, seed, token

    @property
    def tasks(self) -> int:
        """Of each rater: task n is question n % 2 of the rater's pair n // 2."""
        return len(self.prompts) * len(QUESTIONS)

    def pair(self, rater: str, number: int) -> tuple[int, str, str]:
        """(prompt, run on the left, question) of a rater's task."""
        prompt, left = order(self.seed, rater, len(self.prompts))[number // len(QUESTIONS)]
        return prompt, left, list(QUESTIONS)[number % len(QUESTIONS)]

    def task(self, rater: str, number: int | None) -> dict[str, Any]:
        """What the page shows: task `number`, or the first one without an answer."""
        answered = self.votes.of(rater)
        if number is None:
            pairs = order(self.seed, rater, len(self.prompts))
            tasks = [(prompt, question) for prompt, _ in pairs for question in QUESTIONS]
            number = next((n for n, task in enumerate(tasks) if task not in answered), self.tasks)
        state = {"number": number, "tasks": self.tasks, "answered": len(answered), "done": number == self.tasks}
        if number == self.tasks:
            return state
        prompt, _, question = self.pair(rater, number)
        return state | {"prompt": self.prompts[prompt], "question": QUESTIONS[question]}

    def image(self, rater: str, number: int, side: str) -> bytes:
        prompt, left, _ = self.pair(rater, number)
        run = left if side == "left" else _OTHER[left]
        return (self.images / run / f"{prompt:05d}.png").read_bytes()

    def vote(self, rater: str, number: int, choice: str) -> None:
        prompt, left, question = self.pair(rater, number)
        run = choice if choice == BOTH_BAD else left if choice == "left" else _OTHER[left]
        self.votes.add(Vote(rater, prompt, question, run, left))


class _Handler(BaseHTTPRequestHandler):
    server: Rating  # pyright: ignore[reportIncompatibleVariableOverride] (the base has any server)
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, format: str, *args: object) -> None:
        """A line a request would hide the address to open."""

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
                host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            except ValueError:
                raise BadRequest(400, "the address cannot be read") from None
            token = self.server.token
            if token is None and host not in ("localhost", "127.0.0.1", self.server.host):
                # A page of another site may point a name of its own at this machine.
                raise BadRequest(403, f"open this page as {self.server.host} or localhost")
            if token is not None and not secrets.compare_digest(self.query.get("token", "").encode(), token.encode()):
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
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or len(length) > 9 or int(length) > _LONGEST_BODY:
            self.close_connection = True  # what follows is not read
            raise BadRequest(413, f"expected at most {_LONGEST_BODY} bytes")
        return self.rfile.read(int(length))

    def _page(self, body: bytes) -> tuple[str, bytes]:
        return "text/html; charset=utf-8", PAGE.encode()

    def _task(self, body: bytes) -> tuple[str, bytes]:
        number = self._number() if "number" in self.query else None
        return "application/json", json.dumps(self.server.task(self._rater(), number)).encode()

    def _image(self, body: bytes) -> tuple[str, bytes]:
        if (side := self.query.get("side")) not in SIDES:
            raise BadRequest(400, "side must be left or right")
        return "image/png", self.server.image(self._rater(), self._number(), side)

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
        self.server.vote(rater, self._number(), choice)
        return "application/json", json.dumps(self.server.task(rater, None)).encode()

    def _rater(self) -> str:
        rater = self.query.get("rater", "").strip()
        if not rater or len(rater) > _LONGEST_NAME:
            raise BadRequest(400, f"a rater's name has 1 to {_LONGEST_NAME} letters")
        return rater

    def _number(self) -> int:
        text = self.query.get("number", "")
        if not text.isdecimal() or len(text) > 9 or int(text) >= self.server.tasks:
            raise BadRequest(400, f"number must be below {self.server.tasks}")
        return int(text)
