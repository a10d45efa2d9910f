"""Too many unreadable samples: the run saves, says why, stops; and goes on where it stopped once it may."""

import json
import re
import subprocess
from pathlib import Path

from data.debug import ensure_debug_assets
from data.index import ImageTextIndex
from data.storage import open_shards
from data.write_shards import write_shards
from tests.helpers.forked import finished
from tests.helpers.paths import ROOT
from trainer.checkpoint.find import complete_checkpoints
from trainer.monitor.metrics import read_metrics


def half_broken(folder: Path, every: int = 2) -> str:
    """The debug shards' size, but every second image (or all but every n-th) no image; returns data.shards."""
    index = ImageTextIndex(open_shards(str(ensure_debug_assets(ROOT / ".cache" / "debug") / "train-000000.tar")))
    with open(str(index.paths[0]), "rb") as tar:
        tar.seek(int(index.image_offset[0]))
        image = tar.read(int(index.image_size[0]))
    samples = [(f"{i:04d}", image if i % every else b"not a picture", "png", f"number {i}") for i in range(256)]
    return str(write_shards(samples, folder / "half", 256)[0])


def test_stops_and_goes_on(tmp_path: Path) -> None:
    more = [f"data.shards={half_broken(tmp_path)}", f"run.dir={tmp_path}", "run.name=run", "train.sample_every=0"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return finished("launch/train.py", "--config", "mmdit_debug_mup.yaml", *more, *arguments)

    stopped = run()
    folder = tmp_path / "run"
    assert stopped.returncode == 1
    assert "data.max_bad_share" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    last = read_metrics(folder)[-1]
    assert 3 <= last["step"] < 10, "more than 10 of 1000 samples"
    assert [p.name for p in complete_checkpoints(folder / "checkpoints")] == [f"step_{last['step']:08d}"]
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"

    held_out = (f"data.val_shards={half_broken(tmp_path / 'val')}", "validation.samples=64")
    refused = run(*held_out)
    assert refused.returncode == 2
    assert re.search(r"data\.val_shards: \d+ of \d+ validation samples are unreadable \(image: unread", refused.stderr)
    assert "Traceback" not in refused.stderr

    done = run("data.max_bad_share=1", *held_out)
    assert done.returncode == 0, done.stderr
    assert re.search(r"warning: \d+ of \d+ validation samples are unreadable", done.stdout)
    records = read_metrics(folder)
    assert [r["step"] for r in records] == list(range(21)), "no step twice, none left out"


def test_a_storage_that_is_gone_ends_the_run_unsaved(tmp_path: Path) -> None:
    """Long before it is a share of all that was read, and before a step that learned from nothing is kept, however few
    samples a step has."""
    more = [
        f"data.shards={half_broken(tmp_path, every=1)}",
        f"run.dir={tmp_path}",
        "run.name=run",
        "data.max_bad_share=0.5",
    ]
    steps = ("train.steps=40", "train.global_batch_size=8", "train.log_every=10", "train.sample_every=0")
    steps += ("train.checkpoint_every=3", "train.ema_snapshot_every=4")
    ended = finished("launch/train.py", "--config", "mmdit_debug_mup.yaml", *more, *steps)
    assert ended.returncode == 1
    assert re.search(r"error: the last \d+ samples could not be read .*the storage is gone", ended.stderr)
    assert "Traceback" not in ended.stderr
    assert complete_checkpoints(tmp_path / "run" / "checkpoints") == []
    assert not (tmp_path / "run" / "ema").exists()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
