"""mudit watch and mudit report as a person meets them: the page in a browser, and what its server refuses."""

import contextlib
import http.client
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from starlette.requests import Request
from starlette.routing import Route

from launch import report
from launch.watching.server import application
from launch.watching.sources import Sources
from tests.helpers.browser import why_not
from tests.helpers.devtools import new_page
from tests.helpers.forked import environment
from tests.helpers.paths import ROOT
from tests.helpers.studies import fill, search
from trainer.errors import ConfigError
from trainer.monitor.records import METRICS, metrics_line
from trainer.page.run_data import RunFolder
from trainer.search.study import Study

pytestmark = pytest.mark.slow
REAL = ROOT / "tests" / "integration" / "run_of_0db30ff"
PATHS = (
    "/samples/1/5", "/samples/0/5", "/samples/9/4", "/samples/2/4", "/study/0", "/study/9", "/config.yaml",
    "/../config.yaml", "/samples/../../config.yaml", "/samples/0/..%2f..%2fconfig.yaml", "/samples/-1/4",
    "/samples/0/%2e%2e/config.yaml", "/samples/0/4/../../../config.yaml", "/samples/0/4%00.yaml", "//etc/passwd",
    "/docs", "/samples/0/" + "9" * 70, "/samples/0/" + "9" * 5000, "/openapi.json",
)  # fmt: skip
HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a real run, "one", its double with other figures, "two", and a study."""
    for name, colour in (("one", "red"), ("two", "blue")):
        folder = Path(shutil.copytree(REAL, tmp_path / "runs" / name))
        (folder / "samples").mkdir()
        Image.new("RGB", (64, 64), colour).save(folder / "samples" / "step_00000004.png")
        (folder / "samples" / "prompts.txt").write_text(f"a cat\n{HOSTILE}\n")
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("width: 16", "width: 32"))
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\nsecret")
    (folder / "samples" / "step_00000005.png").symlink_to(tmp_path / "secret.png")
    return tmp_path / "runs"


@contextlib.contextmanager
def watching(*arguments: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """(port, process) of the command, which is ended as by Ctrl-C: without a traceback."""
    command = [sys.executable, "launch/watch.py", *arguments, "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)  # fmt: skip
    try:
        said = ""
        assert process.stdout is not None
        while "ssh -L" not in said:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            said += line
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
        assert found, said
        assert f"ssh -L {found[1]}:127.0.0.1:{found[1]} " in said
        yield int(found[1]), process
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.communicate()


def ask(port: int, path: str, method: str = "GET", host: str | None = None) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, content) of a request whose path goes out as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", f"127.0.0.1:{port}" if host is None else host)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def test_what_the_server_gives_and_refuses(runs: Path, tmp_path: Path) -> None:
    study = Study.open(search(runs, trials=4))
    fill(study, lambda point: float(point["optim.lr"] or 0))
    (study.folder / "report").mkdir()
    (study.folder / "report" / "index.html").write_text("<p>found</p>")
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    with watching(str(runs / "one"), str(runs / "two"), str(study.folder), str(tmp_path / "later")) as (port, _):
        status, headers, content = ask(port, "/")
        assert status == 200
        assert "default-src 'none'" in headers["content-security-policy"]
        assert ask(port, "/")[1]["content-security-policy"] != headers["content-security-policy"], "a nonce of its own"
        data = json.loads(ask(port, "/data")[2])
        assert [each["name"] for each in data["sources"]] == ["one", "two", study.folder.name, "later"]
        assert "no folder" in data["sources"][3]["problem"]
        assert "the page waits for one" in data["notes"][0]
        shutil.copytree(runs / "one", tmp_path / "later")
        later = json.loads(ask(port, f"/data?stamp={data['stamp']}")[2])
        assert [each["problem"] for each in later["sources"]] == [""] * 4
        data = {**data, "stamp": later["stamp"]}
        assert len(data["sources"][2]["trials"]) == 4
        assert ask(port, f"/data?stamp={data['stamp']}")[0] == 204
        assert ask(port, "/samples/0/4")[2] == (runs / "one/samples/step_00000004.png").read_bytes()
        assert ask(port, "/study/2")[2] == b"<p>found</p>"
        assert "sandbox" in ask(port, "/study/2")[1]["content-security-policy"]
        assert ask(port, "/plotly.js", "HEAD")[0] == 200

        for host in (f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
            assert ask(port, "/", host=host)[0] == 200
        others = (
            "{}:PORT.evil.example",
            "{}:PORT@evil.example",
            "{}.evil.example:PORT",
            "{}:1",
            "{}",
            "evil.example:PORT",
        )
        for host in ("", "evil.example", *(other.format("localhost").replace("PORT", str(port)) for other in others)):
            status, _, content = ask(port, "/data", host=host)
            assert status in (400, 421), host
            assert b"loss" not in content
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
            assert ask(port, "/data", method)[0] == 405, method
        for path in PATHS:
            status, headers, content = ask(port, path)
            assert (status, content) in [(404, b"there is no such page\n"), (404, b"Not Found")], path
            assert headers["x-content-type-options"] == "nosniff"
        taken = subprocess.run([sys.executable, "launch/watch.py", str(runs / "one"), "--port", str(port)], cwd=ROOT,
                               env=environment(), capture_output=True, text=True, timeout=120)  # fmt: skip
        assert taken.returncode == 2
        assert re.fullmatch(rf"error: --port {port}: .*in use: give another one.*\n", taken.stderr)
        with pytest.raises(ConnectionRefusedError):
            http.client.HTTPConnection("127.0.0.2", port, timeout=5).connect()
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before, "it changes nothing"


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_the_live_page_follows_the_run_and_the_report_holds_it(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel = "[...document.querySelectorAll('.panel')].find(p => p.querySelector('h3').firstChild?.data === '{}')"
    loss = panel.format("Loss")
    picture = "document.querySelector('#samples img')"
    (runs / "one" / "jumps.json").write_text(json.dumps([{"at_step": 3, "steps": 2, "reason": HOSTILE}]))
    with watching(str(runs / "one"), str(runs / "two")) as (port, _), new_page() as page:
        page.watch_console()
        page.open(f"http://127.0.0.1:{port}/")
        page.wait(f"{loss}.querySelector('.plot').data.length >= 6 && {picture}.naturalWidth === 64")
        page.value("window.same = true")
        newest = f"Math.max(...{loss}.querySelector('.plot').data.flatMap(trace => trace.x))"
        assert page.value(newest) == 4
        assert page.value("document.querySelectorAll('#samples img').length") == 2
        assert "model.width" in page.value("document.body.innerText"), "what differs between the two"
        with (runs / "one" / METRICS).open("ab") as file:
            file.write(metrics_line({"step": 1_234_567, "samples_seen": 72, "loss": 1.25}))
        Image.new("RGB", (96, 96), "green").save(runs / "one" / "samples" / "step_01234567.png")
        page.wait(f"{newest} === 1234567 && {picture}.naturalWidth === 96")
        text = page.value("document.body.innerText")
        assert "step 1,234,567 of 4" in text
        assert "1.23e6" not in text
        assert page.value("window.same"), "without loading it again"
        page.value("(s => { s.value = 0; s.dispatchEvent(new Event('input')) })(document.getElementById('sample'))")
        page.wait(f"{picture}.naturalWidth === 64")
        page.value(
            "(s => { s.value = 'images'; s.dispatchEvent(new Event('change')) })(document.getElementById('axis'))"
        )
        page.wait(f"{newest} === 72")
        page.value("document.querySelector('.chip').click()")
        page.wait(f"{newest} === 32")
        assert page.value("window.broken") is None
        assert page.errors == []

    file = tmp_path / "report.html"
    monkeypatch.setattr(sys, "argv", ["launch/report.py", str(runs / "one"), "--output", str(file)])
    assert report.main() == 0
    shutil.rmtree(runs)  # it needs no other file
    with new_page() as page:
        page.watch_console()
        page.open(file.as_uri())
        page.wait(f"{loss}.querySelector('.plot').data.length === 3 && {picture}.naturalWidth === 96")
        assert HOSTILE in page.value("document.body.innerText")
        assert page.value("window.broken") is None
        assert page.errors == []


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_the_report_of_a_study_holds_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study.open(search(tmp_path, trials=6))
    fill(study, lambda point: None if float(point["optim.lr"] or 0) > 0.05 else float(point["optim.lr"] or 0))
    (study.folder / "report").mkdir()
    (study.folder / "report" / "index.html").write_text("<p id=found>found</p><script>top.broken = 1</script>")
    file = tmp_path / "study.html"
    monkeypatch.setattr(sys, "argv", ["launch/report.py", str(study.folder), "--output", str(file)])
    assert report.main() == 0
    with new_page() as page:
        page.watch_console()
        page.open(file.as_uri())
        page.wait("document.querySelectorAll('.plot .main-svg').length >= 2 && document.querySelector('iframe')")
        assert page.value("document.querySelectorAll('table')[0].rows.length") == 7
        assert page.value("window.broken") is None
        assert [error for error in page.errors if "sandboxed" not in error] == []


def test_what_cannot_be_shown_is_told(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "data", lambda self: {"kind": "run", "name": "one", "curves": [], "loss": math.nan})
    routes = application(Sources([str(runs / "one")]), 1).routes
    (data,) = (route for route in routes if isinstance(route, Route) and route.path == "/data")
    answer = data.endpoint(Request({"type": "http", "query_string": b""}))
    assert answer.status_code == 503
    assert b"the folders cannot be shown: ValueError: Out of range float" in answer.body


def test_reports_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for name, output, words in (
        ("empty", "report.html", "holds no run"),
        ("absent", "report.html", "no folder"),
        ("absent", "empty", "empty is a folder"),
    ):
        command = ["launch/report.py", str(tmp_path / name), "--output", str(tmp_path / output)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(ConfigError, match=words):
            report.main()
    assert os.listdir(tmp_path) == ["empty"]
