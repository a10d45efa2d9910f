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
with Rating(("127.0.0.1", 0), votes, folder, votes.study["prompts"], votes.study["seed"], None) as server:
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
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
def server(folder: Path, token: str | None = None) -> Iterator[Rating]:
    """In this process; folder: of a study that the command has made."""
    with (
        contextlib.closing(Votes(folder / "votes.db")) as votes,
        Rating(("127.0.0.1", 0), votes, folder, PROMPTS, 0, token) as rating,
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


def ask(
    address: str, path: str, choice: str | None = None, kind: str = "application/json", host: str | None = None
) -> Any:
    body = None if choice is None else json.dumps({"choice": choice}).encode()
    request = urllib.request.Request(
        f"{address}{path}", body, {"Content-Type": kind} | ({"Host": host} if host else {})
    )
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
            page.open(f"{address}?rater=Ann")
            page.wait(ANSWERED.format(3))
            for answered in (4, 5, 6):
                vote_for(page, BLUE)
                page.wait(ANSWERED.format(answered))
            assert "Thank you" in page.value("document.body.innerText")
            page.value("window.before = 1")
            page.open(f"{address}?rater=Ann")  # reloaded: the end is still the end
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
        address = f"http://127.0.0.1:{rating.server_port}/"
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
        assert refused(address, "vote?rater=ann&number=0", "left", host="evil.example")[0] == 403
        assert ask(address, "task?rater=ann", host=f"localhost:{rating.server_port}")["tasks"] == 6
        for request, status in (
            (b"GET http://[/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"400"),
            (b"POST /vote HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", b"413"),
            (b"POST /vote?rater=ann&number=0 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
             b"Content-Length: 4000\r\n\r\n" + b"[" * 4000, b"400"),
        ):  # fmt: skip
            with socket.create_connection(("127.0.0.1", rating.server_port), timeout=30) as raw:
                raw.sendall(request)
                assert raw.recv(100).split()[1] == status
        assert rating.votes.all() == []
    assert (folder / "votes.db").stat().st_mode & 0o077 == 0  # it holds a token


def test_token(study: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, arguments = study
    make(arguments, monkeypatch)
    with server(folder, token="secret") as rating:
        address = f"http://127.0.0.1:{rating.server_port}/"
        for path in ("", "task?rater=ann", "image?rater=ann&number=0&side=left", "task?rater=ann&token=wrong"):
            assert refused(address, path)[0] == 403
        assert refused(address, "vote?rater=ann&number=0", "left")[0] == 403
        assert rating.votes.all() == []
        assert ask(address, "vote?rater=ann&number=0&token=secret", "left")["answered"] == 1


@pytest.mark.parametrize(("host", "asked"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_who_needs_a_token(
    study: tuple[Path, list[str]], host: str, asked: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, arguments = study
    make([*arguments, "--host", host], monkeypatch)
    with contextlib.closing(Votes(folder / "votes.db")) as votes:
        assert (f"?token={votes.study['token']}" in capsys.readouterr().out) is asked


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
