"""Weights & Biases never costs a run; what it is sent: checkpoint/test_find.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.monitor.metrics import Metrics, read_metrics
from trainer.monitor.trackers import _run_id


class Failing:
    """A wandb whose server takes so many calls."""

    def __init__(self, calls: int) -> None:
        self.left, self.modes = calls, list[str]()

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
    """Where it fails at the start, at a line, at the end; one warning each."""
    wandb = Failing(calls)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    metrics = Metrics(tmp_path, True, 10, 0)
    metrics.start_wandb("project", "online", "name", {})
    for step in (1, 2):
        metrics.write({"step": step})
    metrics.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    if calls == 0:
        assert wandb.modes == ["online", "offline"]
        assert [line.partition(" (gone); ")[0] for line in said] == [
            "warning: wandb cannot be used online", "warning: wandb cannot be used offline",
        ]  # fmt: skip
    else:
        assert said == ["warning: wandb has failed (gone); the run goes on without it"]


def test_an_id_belongs_to_project_name_and_folder(tmp_path: Path) -> None:
    folder, copied = tmp_path / "run", tmp_path / "copied"
    folder.mkdir()
    (folder / "wandb_id.txt").write_text("0badcafe")  # of an older version
    assert [_run_id(folder, "project", "name") for _ in range(2)] == ["0badcafe"] * 2
    shutil.copytree(folder, copied)
    others = [_run_id(copied, "project", "name"), _run_id(folder, "project", "b"), _run_id(folder, "other", "b")]
    assert len({*others, "0badcafe"}) == 4
    assert _run_id(copied, "project", "name") == others[0]
    (folder / "wandb_id.txt").write_bytes(b"\xff\0damaged")
    assert len(_run_id(folder, "other", "b")) == 8


ONLINE = """
import os, sys
from pathlib import Path
from trainer.monitor import trackers
from trainer.monitor.metrics import Metrics
trackers.ONLINE_S = 3.0
for name in ("without_key", "without_network"):
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    metrics = Metrics(folder, True, 10, 0)
    metrics.start_wandb("project", "online", name, {})
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
