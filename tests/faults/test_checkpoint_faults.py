"""Faults around checkpoints in real runs: a full disk, a kill while a save is in flight, a damaged file.

Each run goes on to log what an uninterrupted one logs, bit for bit.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.runs import exact, last_step, train
from tests.helpers.forked import finished, started
from trainer.checkpoint.find import complete_checkpoints

SETTINGS = (
    "train.steps=12", "train.log_every=1", "train.checkpoint_every=4", "train.validate_every=0", "train.sample_every=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Finished run folders by number of processes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for processes in (1, 2):
        train(processes, folder / f"w{processes}", *SETTINGS)
    return {processes: folder / f"w{processes}" for processes in (1, 2)}


def in_folder(folder: Path) -> tuple[str, ...]:
    return ("--config", "mmdit_debug_mup.yaml", f"run.dir={folder.parent}", f"run.name={folder.name}", *SETTINGS)


def checkpoints(folder: Path) -> list[str]:
    """Everything in the checkpoints folder, hidden things too."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def logged(folder: Path) -> list[str]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return exact([json.loads(line) for line in lines])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 9 MB: room for one checkpoint of 5.6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mounting, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no file system can be mounted: {error}")
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("fault", "processes", "reason"),
    [
        pytest.param("none", 1, r"it needs \d+ bytes and \d+ are free in", id="told before writing"),
        pytest.param("no_room_check", 2, r".*, with \d+ bytes free in", id="in the middle of writing"),
    ],
)
def test_full_disk(fault: str, processes: int, reason: str, small_disk: Path, uninterrupted: dict[int, Path]) -> None:
    """A checkpoint that does not fit is told, training goes on, the last one ends the run as failed; the older one
    stays whole, and with more room the same command goes on from it."""
    folder = small_disk / "run"
    done = finished("-m", "tests.faults.disk_train", fault, *in_folder(folder), processes=processes)
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    reason = f"was not written: {reason} {folder}/checkpoints.* free space there, lower run.keep_last"
    assert re.search(f"warning: {folder}/checkpoints/step_00000008 {reason}", done.stdout), output
    assert re.search(f"error: {folder}/checkpoints/step_00000012 {reason}", done.stderr), output
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 12)
    assert "step_00000012 was not written" in status["reason"]
    assert checkpoints(folder) == ["step_00000004"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    train(processes, folder, *SETTINGS)
    assert checkpoints(folder) == ["step_00000004", "step_00000008", "step_00000012"]
    assert logged(folder) == logged(uninterrupted[processes])


def test_killed_while_a_save_is_in_flight(tmp_path: Path, uninterrupted: dict[int, Path]) -> None:
    """Training goes on while a slow disk writes; killed then, the run resumes from the checkpoint before."""
    folder = tmp_path / "run"
    half = folder / "checkpoints" / ".step_00000008.tmp"
    with started("-m", "tests.faults.disk_train", "slow", *in_folder(folder), processes=2) as run:
        deadline = time.monotonic() + 240
        while not (half.is_dir() and last_step(folder) >= 10):
            assert run.code() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        run.kill()
    assert checkpoints(folder) == [".step_00000008.tmp", "step_00000004"]
    train(2, folder, *SETTINGS)
    assert checkpoints(folder) == ["step_00000004", "step_00000008", "step_00000012"]
    assert logged(folder) == logged(uninterrupted[2])


def test_damaged_newest_checkpoint(tmp_path: Path, uninterrupted: dict[int, Path]) -> None:
    """Passed over with a warning that names the file; the run goes on from the one before."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted[2], folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000012")
    newest = complete_checkpoints(folder / "checkpoints")[-1]
    with open(newest / "__1_0.distcp", "r+b") as file:
        file.seek(os.path.getsize(file.name) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    done = finished("launch/train.py", *in_folder(folder), processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"warning: {newest / '__1_0.distcp'} is damaged: its SHA-256 is" in done.stdout
    assert f"resuming {folder / 'checkpoints' / 'step_00000004'}" in done.stdout
    names = ["step_00000004", "step_00000008", "step_00000008.corrupt", "step_00000012"]
    assert checkpoints(folder) == names
    assert logged(folder) == logged(uninterrupted[2])
