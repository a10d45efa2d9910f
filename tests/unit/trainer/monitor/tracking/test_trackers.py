"""Trackers never cost a run, are resumed by one rule, and reach nobody unless they are told to."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from trainer.config.load import load_config
from trainer.errors import ConfigError
from trainer.monitor.metrics import Metrics, read_metrics
from trainer.monitor.tracking import trackers
from trainer.monitor.tracking.tracker import Tracked, run_id
from trainer.monitor.tracking.trackers import check_installed
from trainer.monitor.tracking.wandb_run import withdraw


class Failing:
    """A wandb whose server takes so many calls."""

    def __init__(self, calls: int) -> None:
        self.left, self.modes = calls, list[str]()
        self.Image = str

    def init(self, mode: str, **settings: Any) -> Any:
        self.modes.append(mode)
        self._call()
        return SimpleNamespace(log=self._call, define_metric=lambda *a, **b: None, finish=self._call)

    def login(self, **settings: Any) -> bool:
        return True

    def Settings(self, **settings: Any) -> None: ...

    def teardown(self) -> None: ...

    def _call(self, *arguments: Any) -> None:
        if self.left == 0:
            raise RuntimeError("gone\nwith a long story")
        self.left -= 1


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_run_goes_on_without_it(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it fails at the start, at a line, at the end; one warning each. The other tracker goes on."""
    wandb = Failing(calls)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    metrics = Metrics(tmp_path, True, 10, 0)
    metrics.start_trackers(["wandb", "tensorboard"], Tracked(tmp_path, "project", "name", "online", {}))
    for step in (1, 2):
        metrics.write({"step": step, "loss": 0.5})
    metrics.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert [step for step, _ in of_tensorboard(tmp_path)] == [1, 2]
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    if calls == 0:
        assert wandb.modes == ["online", "offline"]
        assert [line.partition(" (gone); ")[0] for line in said] == [
            "warning: wandb cannot be used online", "warning: wandb cannot be used offline",
        ]  # fmt: skip
    else:
        assert said == ["warning: wandb has failed (gone); the run goes on without it"]


def test_a_full_disk_ends_the_tracker_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, True, 10, 0)
    metrics.start_trackers(["tensorboard"], Tracked(tmp_path, "project", "name", "offline", {}))
    begun: Any = metrics._trackers
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, begun._begun["tensorboard"]._file.fileno())
    os.close(full)
    for step in (1, 2):
        metrics.write({"step": step, "loss": 0.5})
    metrics.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert capsys.readouterr().out.count("warning: tensorboard has failed ([Errno 28]") == 1


def test_an_id_belongs_to_project_name_and_folder(tmp_path: Path) -> None:
    folder, copied = tmp_path / "run", tmp_path / "copied"
    folder.mkdir()
    (folder / "id").write_text("0badcafe")  # of an older version
    assert [run_id(folder / "id", "project", "name") for _ in range(2)] == ["0badcafe"] * 2
    shutil.copytree(folder, copied)
    copied_id = run_id(copied / "id", "project", "name")
    assert len({copied_id, run_id(folder / "id", "project", "b"), run_id(folder / "id", "c", "b"), "0badcafe"}) == 4
    assert run_id(copied / "id", "project", "name") == copied_id
    (folder / "id").write_bytes(b"\xff\0damaged")
    assert len(run_id(folder / "id", "c", "b")) == 8


@pytest.mark.parametrize("identity", ["x/../../../victim", "0badcaf?", "0badcafe "])
def test_an_id_of_a_foreign_file_removes_nothing(identity: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in (tmp_path / "victim", run / "wandb" / "offline-run-1-x", run / "wandb" / "offline-run-1-0badcafe"):
        folder.mkdir(parents=True)
    (run / "wandb_id.txt").write_text(identity)
    before = sorted(tmp_path.rglob("*"))
    assert withdraw(run) is None
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("linked", ["wandb", "wandb/offline-run-1-0badcafe"])
def test_what_is_withdrawn_lies_in_the_run_folder(linked: str, tmp_path: Path) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim" / "offline-run-1-0badcafe"
    (run / "wandb" / "offline-run-2-0badcafe").mkdir(parents=True)
    victim.mkdir(parents=True)
    (run / "wandb_id.txt").write_text("0badcafe")
    if linked == "wandb":
        (run / "wandb").rename(run / "before")
    (run / linked).symlink_to(victim.parent if linked == "wandb" else victim)
    assert withdraw(run) is None
    assert victim.is_dir()
    assert linked == "wandb" or not (run / "wandb" / "offline-run-2-0badcafe").exists()


def test_kind_is_a_name_or_a_list_and_older_configs_name_wandb() -> None:
    def tracked(*overrides: str) -> tuple[Any, str, str]:
        return load_config("mmdit_debug_mup", overrides).tracked

    assert tracked() == tracked("tracking.kind=none") == ((), "mudit", "offline")
    assert tracked("tracking.kind=trackio", "tracking.project=p") == (("trackio",), "p", "offline")
    assert tracked("tracking.kind=[wandb,tensorboard]")[0] == ("wandb", "tensorboard")
    assert tracked("wandb.project=p", "wandb.mode=online") == (("wandb",), "p", "online")
    assert tracked("wandb.project=p", "wandb.mode=disabled")[0] == ()
    with pytest.raises(ConfigError, match=r"wandb\.project and tracking\.kind both choose"):
        tracked("wandb.project=p", "tracking.kind=tensorboard")
    with pytest.raises(ConfigError, match=r"tracking\.kind.*'wandb', 'tensorboard' or 'trackio'"):
        tracked("tracking.kind=mlflow")


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed(["wandb", "tensorboard", "trackio"])
    monkeypatch.setitem(trackers.importlib.util.__dict__, "find_spec", lambda name: None if name == "trackio" else name)
    with pytest.raises(ConfigError, match=r"trackio is not installed: pip install -e '\.\[trackers\]'"):
        check_installed(["wandb", "trackio"])


@pytest.mark.slow
def test_a_database_that_another_holds_does_not_hold_the_run(tmp_path: Path) -> None:
    """The lines go in as soon as it is free; a database that stays held costs the tracker, at the end."""
    code = """
import sqlite3, sys, time
from pathlib import Path
from trainer.monitor.metrics import Metrics
from trainer.monitor.tracking import trackio_run
from trainer.monitor.tracking.tracker import Tracked
folder = Path(sys.argv[1])
trackio_run.FINISH_S = 0.5
metrics = Metrics(folder, True, 10, 0)
metrics.start_trackers(["trackio"], Tracked(folder, "project", "name", "offline", {}))
database = sqlite3.connect(folder.parent / "trackio" / "project.db")
database.execute("BEGIN IMMEDIATE")
began = time.monotonic()
for step in range(1, 6):
    metrics.write({"step": step, "loss": 1.0})
print("took", time.monotonic() - began < 2)
if sys.argv[2:]:
    database.rollback()
    trackio_run.FINISH_S = 30.0
metrics.close()
"""
    (tmp_path / "run").mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "TRACKIO_DIR"}
    for free in ([], ["free"]):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run"), *free],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert "took True" in done.stdout, (done.stdout, done.stderr)
        assert ("warning: trackio has failed (its database has not taken" in done.stdout) == (not free), done.stdout
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "project.db")) as database:
        assert database.execute("SELECT step FROM metrics").fetchall() == [(step,) for step in range(1, 6)]


@pytest.mark.slow
def test_nothing_is_imported_unless_chosen() -> None:
    code = "import sys, trainer.monitor.metrics; print(*{'wandb', 'tensorboard', 'trackio'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_a_rollback_takes_back_what_tensorboard_has(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, True, 10, 0)
    metrics.start_trackers(["tensorboard"], Tracked(tmp_path, "project", "name", "offline", {}))
    for step in (1, 2, 3):
        metrics.write({"step": step, "loss": float(step)})
    metrics.cut(1)
    metrics.write({"step": 2, "loss": 20.0})
    metrics.close()
    assert of_tensorboard(tmp_path) == [(1, 1.0), (2, 20.0)]


def test_a_run_begun_anew_leaves_no_number_of_the_first_in_tensorboard(tmp_path: Path) -> None:
    """At step 0 as well. The config of each start stands there, the newest last: its reader drops numbers alone."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, lr in ((0, 5.0), (0, 7.0), (3, 9.0)):
        metrics = Metrics(tmp_path, True, 10, first)
        metrics.start_trackers(["tensorboard"], Tracked(tmp_path, "project", "name", "offline", {"lr": lr}))
        metrics.write({"step": first, "val_loss": lr})
        metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("val/loss")] == [(0, 7.0), (3, 9.0)]
    configs = [(event.step, event.tensor_proto.string_val[0].strip()) for event in events.Tensors("config")]
    assert configs[-2:] == [(0, b"lr: 7.0"), (3, b"lr: 9.0")]


RUN = """
import os, signal, sys
from pathlib import Path
from trainer.monitor.metrics import Metrics
from trainer.monitor.tracking.tracker import Tracked
folder, first, last, loss = Path(sys.argv[1]), *map(int, sys.argv[2:5])
metrics = Metrics(folder, True, 10, first)
config = {"optim": {"lr": 0.5}, "data": {"shards": "https://me:hunter2@host/a.tar"}}
metrics.start_trackers(["wandb", "tensorboard", "trackio"], Tracked(folder, "project", "name", "offline", config))
for step in range(first + 1, last + 1):
    if step == 2:
        metrics.picture(step, "samples", folder / "samples" / "step_00000002.png")
    metrics.write({"step": step, "loss": float(loss + step), "val_loss": 2.0, "images_per_s": 3.0, "mup/a": 1.0})
if sys.argv[5:]:
    os.kill(os.getpid(), signal.SIGKILL)
metrics.close()
"""


@pytest.mark.slow
def test_a_killed_run_stands_once_in_each_and_nothing_leaves_the_machine(tmp_path: Path) -> None:
    """Steps 1 to 6, killed; resumed at 4 with other losses, and stopped at 7; resumed at 7 as it is.

    In processes of their own, because wandb starts a service and all of them read variables. Whatever they wanted to
    reach would reach the socket here.
    """
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    Image.new("RGB", (8, 4), (255, 0, 0)).save(folder / "samples" / "step_00000002.png")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        names = ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "https_proxy", "HF_ENDPOINT", "TRACKIO_SERVER_URL")
        online = {**dict.fromkeys(names, address), "NO_PROXY": "", "no_proxy": "", "TRACKIO_WRITE_TOKEN": "a" * 20}
        online |= {"HF_TOKEN": "hf_" + "a" * 30, "HF_HUB_OFFLINE": "0"}
        kept = {key: value for key, value in os.environ.items() if key != "TRACKIO_DIR"}
        ids = []
        for arguments in (["0", "6", "0", "kill"], ["4", "7", "100"], ["7", "8", "100"]):
            done = subprocess.run(
                [sys.executable, "-c", RUN, str(folder), *arguments],
                env={**kept, **online}, capture_output=True, text=True, timeout=120,
            )  # fmt: skip
            assert done.returncode == (-signal.SIGKILL if "kill" in arguments else 0), done.stderr
            assert "warning" not in done.stdout, done.stdout
            ids.append((folder / "wandb_id.txt").read_text().split()[0])
        with pytest.raises(BlockingIOError):
            server.accept()
    expected = [(step, float(step if step <= 4 else step + 100)) for step in range(1, 9)]
    assert [(each["step"], each["loss"]) for each in read_metrics(folder)] == expected
    assert of_tensorboard(folder) == of_trackio(folder) == of_wandb(folder) == expected
    assert ids[0] != ids[1] == ids[2], "what wandb holds past the checkpoint cannot be taken back"
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(b"hunter2" in content for content in written)
    assert sum(b"***@host" in content for content in written) >= 3


def of_tensorboard(folder: Path) -> list[tuple[int, float]]:
    """(step, loss), as its own reader sees them; the picture and the config are there where the run has them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    if (folder / "samples").is_dir():
        (image,) = events.Images("samples")
        assert (image.step, image.width, image.height) == (2, 8, 4)
        assert all(b"'lr': 0.5" in config.tensor_proto.string_val[0] for config in events.Tensors("config"))
        assert {"val/loss", "perf/images_per_s", "mup/a"} <= {*events.Tags()["scalars"]}
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def of_trackio(folder: Path) -> list[tuple[int, float]]:
    """As trackio's own interface gives them."""
    code = """
import json, sys, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("project")
assert run.config["optim"] == {"lr": 0.5}, run.config
print(json.dumps(SQLiteStorage.get_logs("project", run.name, run_id=run.id)))
"""
    environment = {**os.environ, "TRACKIO_DIR": str(folder.parent / "trackio")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    lines = json.loads(done.stdout.splitlines()[-1])
    (image,) = [line for line in lines if "samples" in line]
    assert image["step"] == 2
    assert (folder.parent / "trackio" / "media" / image["samples"]["file_path"]).is_file()
    assert all(line["mup/a"] == 1.0 for line in lines if "train/loss" in line)
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


def of_wandb(folder: Path) -> list[tuple[int, float]]:
    """The history in the offline files: records of wandb's own message in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2

    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        content, place, parts = file.read_bytes(), 7, b""  # past the head of the file
        while place + 7 <= len(content):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
            length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
            parts += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                history = messages.Record.FromString(parts).history
                values = {item.key or item.nested_key[0]: item.value_json for item in history.item}
                if "train/loss" in values:
                    found.append((int(values["step"]), float(values["train/loss"])))
                parts = b""
    assert list(folder.glob("wandb/offline-run-*/files/media/images/samples*.png"))
    return found


ONLINE = """
import os, sys
from pathlib import Path
from trainer.monitor.metrics import Metrics
from trainer.monitor.tracking import wandb_run
from trainer.monitor.tracking.tracker import Tracked
wandb_run.ONLINE_S = 3.0
for name in ("without_key", "without_network"):
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    metrics = Metrics(folder, True, 10, 0)
    metrics.start_trackers(["wandb"], Tracked(folder, "project", name, "online", {}))
    metrics.write({"step": 1})
    metrics.close()
    os.environ["WANDB_API_KEY"] = "a" * 40
"""


@pytest.mark.slow
def test_online_without_key_or_network_is_offline(tmp_path: Path) -> None:
    """The real one, which would wait for two minutes and then raise."""
    closed = dict.fromkeys(("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "https_proxy"), "http://127.0.0.1:1")
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_API_KEY"}
    done = subprocess.run(
        [sys.executable, "-c", ONLINE, str(tmp_path)],
        env={**environment, **closed, "HOME": str(tmp_path), "NO_PROXY": "", "no_proxy": ""},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stdout.splitlines() if "warning: wandb cannot be used online" in line]
    assert len(warned) == 2, done.stdout
    assert "no API key" in warned[0]
    assert f"{tmp_path / 'without_network' / 'wandb'} is written instead" in warned[1]
    for name in ("without_key", "without_network"):
        assert list((tmp_path / name).glob("wandb/offline-run-*/run-*.wandb")), name
