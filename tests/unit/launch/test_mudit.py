"""`mudit NAME` is launch/NAME.py: which commands there are, what is told before anything starts, how many processes."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from launch import mudit
from tests.helpers.paths import ROOT
from trainer.errors import ConfigError


def test_every_command_is_in_the_table_and_on_the_page() -> None:
    names = mudit.commands()
    assert {"train", "sample", "search", "coord-check", "data-order", "doctor"} <= names.keys()
    assert not names.keys() & {"mudit", "common", "ranks", "processes", "workers"}
    assert all(does.endswith((".", "?")) and "\n" not in does for does in names.values())
    page = (ROOT / "docs" / "commands.md").read_text()
    named = set(re.findall(r"launch/(\w+)\.py|mudit ([\w-]+)", page))
    assert names.keys() <= {(file or name).replace("_", "-") for file, name in named}
    assert set(mudit.PARALLEL) <= names.keys()


def test_the_entry_point_is_this_program() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"mudit": "launch.mudit:main"}


def said(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`mudit WORDS` in another directory, as the installed script runs it, which says at the end what it imported."""
    code = (
        "import atexit, sys\natexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from launch.mudit import main\nsys.argv[0] = 'mudit'\nmain()"
    )
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--help"], 0, "  coord-check  Coordinate check"),
        (["train", "--help"], 0, "usage: mudit train"),
        (["search", "cost", "--help"], 0, "usage: mudit search cost"),
        (["trian"], 2, 'error: mudit has no command "trian"; did you mean "train"?'),
        (["train", "--config", "mmdit_debug_mup", "--gpus", "0"], 2, "--gpus must be at least 1, got 0"),
        (["train", "--config", "mmdit_debug_mup", "--gpus", "2", "optim.lrr=1"], 2, 'did you mean "optim.lr"?'),
        (["coord_check", "--widht", "3"], 2, "usage: mudit coord-check"),
    ],
)
def test_what_needs_no_torch_is_answered_without_it(words: list[str], code: int, told: str, tmp_path: Path) -> None:
    done = said(tmp_path, *words)
    assert told in done.stdout + done.stderr
    assert (done.returncode, done.stderr.splitlines()[-1]) == (code, "False")
    assert not list(tmp_path.iterdir())


class Train:
    """launch.train, of which the command line is right."""

    @staticmethod
    def read_config() -> None:
        pass


def processes(
    monkeypatch: pytest.MonkeyPatch, gpus: int | None, seen: int, name: str = "train", **variables: str
) -> int:
    """How many are started on a machine with `seen` GPUs."""
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "argv", [f"mudit {name}"])
    nodes: Any = [Path("/dev/nvidia0")] if seen else []
    monkeypatch.setattr(Path, "glob", lambda self, pattern: nodes)
    monkeypatch.setattr("launch.workers.gpus_seen", lambda: seen)
    return mudit._processes(name, gpus, Train)


def test_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes(monkeypatch, None, seen=8) == 8
    assert processes(monkeypatch, 2, seen=8) == 2
    assert processes(monkeypatch, None, seen=0) == 1
    assert processes(monkeypatch, 3, seen=0) == 3
    assert processes(monkeypatch, None, seen=8, name="evaluate") == 1
    assert processes(monkeypatch, 4, seen=8, name="evaluate") == 4
    assert processes(monkeypatch, None, seen=8, RANK="3", WORLD_SIZE="16") == 1
    with pytest.raises(ConfigError, match="this is one of 16 processes of srun or torchrun already: leave it out"):
        processes(monkeypatch, 8, seen=8, RANK="3", WORLD_SIZE="16")
    with pytest.raises(ConfigError, match="--gpus 9: expected at most 8"):
        processes(monkeypatch, 9, seen=8)


def test_gpus_is_taken_out_of_the_words() -> None:
    assert mudit._take_gpus(["--config", "a", "--gpus", "2", "b=1"]) == (2, ["--config", "a", "b=1"])
    assert mudit._take_gpus(["--gpus=4", "--config", "a"]) == (4, ["--config", "a"])
    assert mudit._take_gpus(["--gpus-per-node", "4"]) == (None, ["--gpus-per-node", "4"])
    assert mudit._take_gpus(["--gpu", "4"]) == (None, ["--gpu", "4"]), "no abbreviation"
