"""launch/rate.py as raters and its reader meet it: the page by keys, votes that survive a kill, the report."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch import rate
from launch.rating import images
from launch.rating.server import Rating
from launch.rating.votes import Votes, order
from tests.helpers.browser import why_not
from tests.helpers.devtools import Page, new_page
from tests.helpers.exports import config_of, random_checkpoint
from tests.helpers.forked import environment
from tests.helpers.paths import ROOT

PROMPTS = ["a cat", "a <b>dog</b>", "a cat"]  # equal ones are two pairs
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def study(tmp_path: Path) -> tuple[Path, list[str]]:
    """(its folder, the command's arguments): RUN_A is red, RUN_B blue."""
    for run, colour, suffix in (("a", RED, "png"), ("b", BLUE, "webp")):
        (tmp_path / run).mkdir()
        for number in range(len(PROMPTS)):
            Image.new("RGB", (32, 32), colour).save(tmp_path / run / f"{number}.{suffix}", lossless=True)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    folder = tmp_path / "out"
    runs = [str(tmp_path / run) for run in ("a", "b")]
    return folder, [*runs, "--prompts", str(tmp_path / "prompts.txt"), "--output", str(folder), "--port", "0"]


# The server alone: launch/rate.py, with its images there, does no more, but imports torch first.
SERVER = """
import sys
from pathlib import Path
from launch.rating.server import Rating
from launch.rating.votes import Votes
folder = Path(sys.argv[1])
votes = Votes(folder / "votes.db")
with Rating(("127.0.0.1", 0), votes, folder, votes.study["prompts"], votes.study["seed"]) as server:
    print(f"http://127.0.0.1:{server.server_port}/?token={server.token}", flush=True)
    server.serve_forever()
"""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, process) of a study's server, which is killed at the end."""
    command = [sys.executable, "-c", SERVER, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def server(folder: Path) -> Iterator[Rating]:
    """In this process; folder: of a study that the command has made."""
    with (
        contextlib.closing(Votes(folder / "votes.db")) as votes,
        Rating(("127.0.0.1", 0), votes, folder, PROMPTS, 0) as rating,
    ):
        thread = threading.Thread(target=rating.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield rating
        finally:
            rating.shutdown()
            thread.join()


def make(arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    """What the command does before it serves."""
    patch.setattr(sys, "argv", ["launch/rate.py", *arguments])
    patch.setattr(Rating, "serve_forever", lambda self: None)
    patch.setattr(signal, "signal", lambda *handler: None)
    assert rate.main() == 0
    patch.undo()


def ask(address: str, path: str, choice: str | None = None, kind: str = "application/json") -> Any:
    """address: with its token."""
    body = None if choice is None else json.dumps({"choice": choice}).encode()
    root, token = address.split("?")
    url = f"{root}{path}{'&' if '?' in path else '?'}{token}"
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=30) as answer:
        content = answer.read()
    return json.loads(content) if answer.headers.get_content_type() == "application/json" else content


def refused(address: str, path: str, choice: str | None = None, **more: str) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as found:
        ask(address, path, choice, **more)
    with found.value as error:
        return error.code, error.read().decode()


def report(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert rate.report([str(folder / "votes.db"), *options]) == 0
    return capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- the page

ANSWERED = "document.getElementById('progress').textContent.startsWith('{} of') && task"
COLOUR = """(() => {{ const c = document.createElement("canvas"); c.width = c.height = 1;
 const d = c.getContext("2d"); d.drawImage(document.getElementById("{}"), 0, 0, 1, 1);
 return [...d.getImageData(0, 0, 1, 1).data].slice(0, 3) }})()"""


def vote_for(page: Page, colour: tuple[int, int, int]) -> None:
    """As a rater who likes a colour."""
    left = page.value(COLOUR.format("left")) == list(colour)
    assert left != (page.value(COLOUR.format("right")) == list(colour))
    page.press("ArrowLeft" if left else "ArrowRight")


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_a_rater_with_keys(
    study: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Name, votes, a change of mind, the server killed and started again, the rest, the result."""
    folder, arguments = study
    make(arguments, monkeypatch)
    with new_page() as page:
        with serving(folder) as (address, process):
            page.open(address)
            page.wait("document.activeElement.name == 'rater'")
            page.write("Ann")
            page.press("Enter")
            page.wait(ANSWERED.format(0))
            shown = page.value("document.documentElement.outerHTML + location")
            assert str(folder.parent) not in shown
            left, right = (page.value(f"{side}.getBoundingClientRect().toJSON()") for side in ("left", "right"))
            assert left["top"] == right["top"]
            assert left["right"] < right["left"]
            assert page.value("getComputedStyle(document.getElementById('name')).display") == "none"
            assert not any(f"/{run}/" in shown for run in ("a", "b"))
            for answered in (1, 2, 3):
                vote_for(page, RED)
                page.wait(ANSWERED.format(answered))
            page.press("Backspace")  # the third answer was a mistake
            page.wait("task && task.number == 2")
            page.press("ArrowDown")
            page.wait("task && task.number == 3")
            process.send_signal(signal.SIGKILL)
            process.wait()
            page.press("ArrowLeft")  # is not stored, and the page says so
            page.wait("document.getElementById('question').textContent.includes('reload')")
        with serving(folder) as (address, process):
            page.open(f"{address}&rater=Ann")
            page.wait(ANSWERED.format(3))
            for answered in (4, 5, 6):
                vote_for(page, BLUE)
                page.wait(ANSWERED.format(answered))
            assert "Thank you" in page.value("document.body.innerText")
            page.value("window.before = 1")
            page.open(f"{address}&rater=Ann")  # reloaded: the end is still the end
            page.wait("!window.before && document.body.innerText.includes('Thank you')")
    found = json.loads(report(folder, capsys, "--json"))
    assert found["raters"] == 1
    total = {c: sum(found[q]["votes"][c] for q in ("alignment", "looks")) for c in ("a", "b", "both_bad")}
    assert total == {"a": 2, "b": 3, "both_bad": 1}
    assert found["looks"]["votes"] == {"a": 1, "b": 2, "both_bad": 0}
    assert "66.7%" in report(folder, capsys)


# --------------------------------------------------------------------------------------------------------- the server


def test_blind_and_checked(study: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, arguments = study
    make(arguments, monkeypatch)
    with server(folder) as rating:
        address = f"http://127.0.0.1:{rating.server_port}/?token={rating.token}"
        for rater in ("ann", "bob", "eve"):
            tasks = [ask(address, f"task?rater={rater}&number={number}") for number in range(6)]
            expected = [prompt for prompt, _ in order(0, rater, 3)]
            assert [task["prompt"] for task in tasks] == [PROMPTS[prompt] for prompt in expected for _ in range(2)]
            for number in range(6):
                sides = [ask(address, f"image?rater={rater}&number={number}&side={side}") for side in ("left", "right")]
                left = order(0, rater, 3)[number // 2][1]
                assert sides == [(folder / run / "00000.png").read_bytes() for run in (left, "ba"[left == "b"])]
        assert refused(address, "task?rater=") == (400, "a rater's name has 1 to 40 letters")
        assert refused(address, "task?rater=ann&number=6")[0] == 400
        assert refused(address, "image?rater=ann&number=0&side=a")[0] == 400
        assert refused(address, "votes.db?rater=ann")[0] == 404
        assert refused(address, "vote?rater=ann&number=0", "a")[0] == 400
        assert refused(address, "vote?rater=ann&number=0", "left", kind="text/plain")[0] == 415
        assert refused(address, "vote?rater=ann&number=0", "l" * 5000)[0] == 413
        for request, status in (
            (b"GET http://[/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"400"),
            (b"POST /vote HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", b"413"),
            (f"POST /vote?rater=ann&number=0&token={rating.token} HTTP/1.1\r\nHost: localhost\r\n".encode()
             + b"Content-Type: application/json\r\nContent-Length: 4000\r\n\r\n" + b"[" * 4000, b"400"),
        ):  # fmt: skip
            with socket.create_connection(("127.0.0.1", rating.server_port), timeout=30) as raw:
                raw.sendall(request)
                assert raw.recv(100).split()[1] == status
        assert rating.votes.all() == []
    assert (folder / "votes.db").stat().st_mode & 0o077 == 0  # it holds a token


def test_token(
    study: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, arguments = study
    make(arguments, monkeypatch)
    with server(folder) as rating:
        address = f"http://127.0.0.1:{rating.server_port}/?"
        for token in ("", "token=", "token=wrong", "token=%FF%00"):  # on loopback too
            for path in ("", "task?rater=ann", "image?rater=ann&number=0&side=left"):
                assert refused(address + token, path)[0] == 403
            assert refused(address + token, "vote?rater=ann&number=0", "left")[0] == 403
        assert rating.votes.all() == []
        with urllib.request.urlopen(f"{address}token={rating.token}", timeout=30) as page:
            assert page.headers["X-Frame-Options"] == "DENY"
            assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
    with contextlib.closing(Votes(folder / "votes.db")) as votes:
        assert f"/?token={votes.study['token']}\n" in capsys.readouterr().out


def test_a_room_of_raters_votes_at_once(study: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """300 connections are made before the first is answered; none is refused, and every vote counts."""
    folder, arguments = study
    make(arguments, monkeypatch)
    body = b'{"choice": "left"}'
    with contextlib.closing(Votes(folder / "votes.db")) as votes, Rating(
        ("127.0.0.1", 0), votes, folder, PROMPTS, 0
    ) as rating, contextlib.ExitStack() as opened:  # fmt: skip
        sockets = []
        for number in range(300):
            sockets.append(opened.enter_context(socket.create_connection(("127.0.0.1", rating.server_port), timeout=5)))
            path = f"/vote?rater=r{number}&number=0&token={rating.token}"
            head = f"POST {path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            sockets[-1].sendall(head.encode() + body)
        thread = threading.Thread(target=rating.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            for each in sockets:
                each.settimeout(60)
                assert each.recv(100).split()[1] == b"200"
        finally:
            rating.shutdown()
            thread.join()
        assert len(votes.all()) == 300


# --------------------------------------------------------------------------------------------------------- the images


def test_images_of_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal noise for both; made again after a stop, they are the same and the others are left alone."""
    config = config_of("dit")
    random_checkpoint(tmp_path / "one", config)
    (tmp_path / "prompts.txt").write_text("\n".join("0123"))
    monkeypatch.setattr(images, "CHUNK", 2)
    out = tmp_path / "out"
    arguments = [str(tmp_path / "one")] * 2 + ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(out)]
    make([*arguments, "--port", "0"], monkeypatch)
    files = {path: path.read_bytes() for path in sorted((out / "a").iterdir())}
    assert [path.name for path in files] == [f"{number:05d}.png" for number in range(4)]
    assert len(set(files.values())) == 4
    assert all((out / "b" / path.name).read_bytes() == content for path, content in files.items())
    assert np.asarray(Image.open(out / "a" / "00000.png")).std() > 5
    (out / "a" / "00003.png").unlink()
    kept = (out / "a" / "00001.png").stat().st_mtime_ns
    monkeypatch.setattr(images, "CHUNK", 2)
    make([*arguments, "--port", "0"], monkeypatch)
    assert {path: path.read_bytes() for path in files} == files
    assert (out / "a" / "00001.png").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "b" / "2.webp").unlink(), r"b has no image 2: expected one for each of 3 prompts"),
        (lambda folder: (folder / "b" / "1.webp").write_bytes(b"no"), r"1\.webp: image: unreadable"),
        (lambda folder: (folder / "b" / "01.png").write_bytes(b""), r"have the same number"),
        (lambda folder: Image.new("RGB", (64, 64)).save(folder / "b" / "1.webp"), r"image 1 has 32 x 32 pixels"),
        (lambda folder: os.rename(folder / "b", folder / "c"), r'no complete checkpoint in ".*b"'),
        (lambda folder: (folder / "prompts.txt").write_text("a\n\nb\n"), r"prompts\.txt.*line 2 is blank"),
        (lambda folder: (folder / "prompts.txt").unlink(), r"prompts\.txt cannot be read"),
    ],
)  # fmt: skip
def test_what_is_refused(
    study: tuple[Path, list[str]], change: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, arguments = study
    change(folder.parent)
    with pytest.raises(ValueError, match=message):
        make(arguments, monkeypatch)


def test_votes_stay_with_their_images(study: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, arguments = study
    make(arguments, monkeypatch)
    with pytest.raises(ValueError, match=r"begun with another seed"):
        make([*arguments, "--seed", "1"], monkeypatch)
    with pytest.raises(ValueError, match=r"votes\.db does not exist"):
        rate.report([str(folder.parent / "votes.db")])
    (folder / "votes.db").write_bytes(b"something else" * 100)
    with pytest.raises(ValueError, match=r"is not the votes\.db of a rating"):
        rate.report([str(folder / "votes.db")])
