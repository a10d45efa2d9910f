"""A run folder of an older commit resumes, samples and exports: what users have stays readable."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from data.debug import ensure_debug_assets
from tests.distributed.runs import train
from tests.helpers.forked import finished
from trainer.checkpoint.find import complete_checkpoints

FOLDER = Path(__file__).with_name("run_of_0db30ff")
MODEL = ("model.width=16", "mup.base_width=8", "model.head_dim=8", "model.depth=1")
INTERVALS = ("train.checkpoint_every=4", "train.validate_every=4", "train.sample_every=0")
LONGER = ("train.steps=8", "run.allow_change=[train.steps]")
RESUMED: dict[str, list[dict[str, Any]]] = json.loads((FOLDER / "resumed.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ensure_debug_assets()
    shutil.copytree(FOLDER, tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.parametrize("case", ["plain", "skipped"])
def test_it_resumes(folder: Path, case: str) -> None:
    if case == "skipped":
        (folder / "jumps.json").write_text(json.dumps([{"at_step": 4, "steps": 3, "reason": "test"}]))
    before = (folder / "metrics.jsonl").read_text().splitlines()
    train(1, folder, *MODEL, *INTERVALS, *LONGER)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines[: len(before)]] == [json.loads(line) for line in before]
    for line, expected in zip(lines[len(before) :], RESUMED[case], strict=True):
        record = json.loads(line)
        assert record["step"] == expected["step"]
        assert record["samples_seen"] == expected["samples_seen"]
        for key, value in expected.items():  # processors round differently
            assert record[key] == pytest.approx(value, rel=1e-4), (record["step"], key)
    assert [path.name for path in complete_checkpoints(folder / "checkpoints")] == ["step_00000004", "step_00000008"]
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    table, old = (json.loads((path / "mup.json").read_text()) for path in (folder, FOLDER))
    assert {key: table[key] for key in old} == old


def test_it_samples_and_exports(folder: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    done = finished("launch/sample.py", "--checkpoint", folder, "--prompt", "a red circle", "--output", image)
    assert done.returncode == 0, done.stdout + done.stderr
    now, then = (np.asarray(Image.open(path), dtype=int) for path in (image, FOLDER / "sampled.png"))
    assert now.shape == then.shape
    assert abs(now - then).max() <= 2  # of 255: processors round differently
    done = finished("launch/export.py", "--checkpoint", folder, "--output", tmp_path / "exported")
    assert done.returncode == 0, done.stdout + done.stderr
    tensors = load_file(tmp_path / "exported/transformer/diffusion_pytorch_model.safetensors")
    assert tensors
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
