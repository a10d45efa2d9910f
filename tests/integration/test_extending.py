"""docs/extending.md, followed to the letter in a copy of models/ and configs/: its backbone trains."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.forked import environment
from tests.helpers.paths import ROOT

BLOCK = re.compile(r"```(?:python|yaml)\n# (\S+)\n(.*?)```\n", re.DOTALL)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models/ and configs/ as the page leaves them."""
    folder = tmp_path_factory.mktemp("extended")
    for room in ("models", "configs"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = dict(BLOCK.findall((ROOT / "docs/extending.md").read_text()))
    assert blocks.keys() == {"models/vit.py", "models/registry.py", "configs/vit_debug_mup.yaml"}
    registry = folder / "models/registry.py"
    first = '    "mmdit": Entry('
    assert first in registry.read_text()
    registry.write_text(registry.read_text().replace(first, blocks.pop("models/registry.py") + first))
    for path, text in blocks.items():
        (folder / path).write_text(text)
    return folder


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """A command that takes models from the folder, and all else from the checkout."""
    paths = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment() | paths,
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_it_trains(extended: Path, tmp_path: Path) -> None:
    config = extended / "configs/vit_debug_mup.yaml"
    settings = (f"run.dir={tmp_path}", "run.name=vit", "train.steps=20")
    run(extended, "launch/train.py", "--config", config, *settings)
    records = [json.loads(line) for line in (tmp_path / "vit/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert (tmp_path / "vit/samples/step_00000020.png").is_file()


def test_its_keys_have_help_and_its_flops_are_right(extended: Path) -> None:
    assert "number of class labels" in run(extended, "launch/train.py", "--help-config", "model").stdout.lower()
    script = extended / "check.py"
    script.write_text(
        "from models.vit import ViTConfig\n"
        "from tests.helpers.backbones import check_features, check_flops, check_gradients\n"
        "config = ViTConfig(width=32, depth=2, head_dim=16, num_classes=5)\n"
        "check_flops(config, 8, 12, 0)\n"
        "check_features(config)\n"
        "check_gradients(config, {'final.weight', 'final.bias'})\n"
    )
    run(extended, script)


def test_it_passes_the_coordinate_check(extended: Path, tmp_path: Path) -> None:
    config = extended / "configs/vit_debug_mup.yaml"
    run(extended, "launch/coord_check.py", "--config", config, "--widths", "64,128,256", "--output", tmp_path)
    assert json.loads((tmp_path / "coord_check.json").read_text())["passed"] is True
