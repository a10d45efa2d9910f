"""launch/coord_check.py as a person runs it: verdict, files, exit codes."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from torch._dynamo.utils import counters

import trainer.build.engine
from launch import coord_check
from tests.helpers.forked import finished
from trainer.errors import ConfigError
from trainer.parallel.compile import compile_units

SMALL = ("text_encoder.max_length=8", "text_encoder.width=32")


def check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return finished("launch/coord_check.py", "--config", "mmdit_debug_mup.yaml", *arguments)


def report(folder: Path, exit_code: int, *arguments: str) -> dict[str, Any]:
    done = check("--output", folder, *arguments, *SMALL)
    assert done.returncode == exit_code, done.stdout + done.stderr
    found = json.loads((folder / "coord_check.json").read_text())
    assert found["verdict"].upper() in done.stdout
    assert matplotlib.image.imread(folder / "coord_check.png").shape[1] > 400
    return found


def test_mup_passes_and_says_how_far_from_the_limits(tmp_path: Path) -> None:
    found = report(tmp_path, 0, "--widths", "128,256,512", "--seeds", "1")
    assert found["passed"] is True
    assert found["worst"]["control"]["slope"] > 0.7
    assert abs(found["worst"]["change"]["slope"]) < 0.25
    assert not any(found["culprits"].values())
    assert {row["run"] for row in found["rows"]} == {"checked", "control"}
    assert found["settings"]["widths"] == [128, 256, 512]


# Shipped proxies, smaller in all but their base width, on which it depends how large a step the rules stand.
PROXIES = {
    "dit_proxy_mup": ("--widths", "144,288,576"),
    "mmdit_0.18b_mup": (
        "--widths",
        "128,256,512",
        "objective.repa_layer=1",
        "text_encoder.max_length=8",
        "data.text_lengths=[]",
    ),
}


@pytest.mark.parametrize("name", PROXIES)
def test_shipped_proxies_pass(name: str, tmp_path: Path) -> None:
    """At a learning rate that is found for each, the alignment left out: at one for all right models failed."""
    done = check("--config", name, "--output", tmp_path, "model.depth=2", "data.resolution=64", *PROXIES[name])
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("without REPA" in done.stdout) == name.startswith("mmdit")


def test_sp_fails(tmp_path: Path) -> None:
    found = report(tmp_path, 1, "--widths", "64,128,256", "--seeds", "1", "mup.parametrization=sp")
    assert found["passed"] is False
    assert max(row["slope"] for row in found["rows"] if row["judged"] and row["slope"] is not None) > 0.7


def test_a_tiny_learning_rate_hides_nothing(tmp_path: Path) -> None:
    found = report(tmp_path, 1, "--widths", "32,64,128", "--seeds", "1", "--lr", "1e-7")
    assert (found["passed"], found["verdict"]) == (False, "inconclusive")


def test_bad_input_is_one_message(tmp_path: Path) -> None:
    done = check("--output", tmp_path / "out", "--widths", "64,100,128")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert "model.width 100 is not a multiple of model.head_dim 16" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--widths", "64,128,128"), "--widths needs at least 3 different widths"),
        (("--steps", "0"), "--steps and --seeds must be at least 1"),
        (("--lr", "-1"), r"optim\.lr must be greater than 0, got -1"),
        (("optim.betta=1",), r"optim\.betta: unknown key"),
    ],
)
def test_bad_input(
    tmp_path: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    command = ["coord_check.py", "--config", "mmdit_debug_mup.yaml", "--output", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ConfigError, match=message):
        coord_check.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_are_seen_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """parallel.compile compiles the blocks, whose outputs are followed but no longer the layers inside them. Traced,
    without code generation, which takes minutes."""
    monkeypatch.setattr(trainer.build.engine, "compile_units", partial(compile_units, backend="eager"))
    monkeypatch.setattr(coord_check, "LEAST_WIDTHS", 2)
    counters.clear()
    found = {}
    for compiled in ("true", "false"):
        folder = tmp_path / compiled
        shapes = ("--widths", "64,256", "--seeds", "1", "--steps", "2")
        command = ["coord_check.py", "--config", "dit_debug_mup.yaml", "--output", str(folder), *shapes]
        monkeypatch.setattr(sys, "argv", [*command, f"parallel.compile={compiled}"])
        coord_check.main()
        found[compiled] = json.loads((folder / "coord_check.json").read_text())
    assert 2 <= counters["stats"]["unique_graphs"] <= 4  # a graph a width; another where the first block differs
    assert found["true"]["verdict"] == found["false"]["verdict"]
    slopes = {
        compiled: {(row["run"], row["kind"], row["name"], row["step"]): row["slope"] for row in each["rows"]}
        for compiled, each in found.items()
    }
    for key, slope in slopes["true"].items():
        assert slope == pytest.approx(slopes["false"][key], abs=0.01), key
    followed = {name for _, kind, name, _ in slopes["true"] if kind == "activation"}
    assert {"blocks.0", "blocks.1", "final"} <= followed
    assert not any(name.startswith("blocks.0.") for name in followed)
