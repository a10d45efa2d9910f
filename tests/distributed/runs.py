"""Real runs of launch/train.py for the tests: start, kill, read what they logged and saved."""

import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.helpers.forked import finished, started, under_torchrun
from trainer.checkpoint.find import complete_checkpoints, find_checkpoint
from trainer.monitor.metrics import read_metrics
from trainer.parallel.dcp import TensorReader

DEBUG = ("--config", "mmdit_debug_mup.yaml")
TIMING = (
    "images_per_s", "model_tflops_per_s", "mfu", "step_time_s", "checkpoint_blocked_s", "checkpoint_write_s",
)  # fmt: skip


def train(processes: int, folder: Path, *arguments: str, config: str = "mmdit_debug_mup.yaml") -> list[dict[str, Any]]:
    """Run to the end in `folder`; returns the logged lines. An exit code other than 0 fails with the output."""
    done = finished("launch/train.py", "--config", config, *_in(folder), *arguments, processes=processes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return read_metrics(folder)


def train_and_kill(
    processes: int,
    folder: Path,
    after_step: int,
    delay_s: float,
    *arguments: str,
    after_save: bool = False,
    torchrun: bool = False,
) -> int:
    """SIGKILL every process of a run `delay_s` after it has logged `after_step`, and, with after_save, has a complete
    checkpoint; returns the last logged step. torchrun: under the real one, which is killed too."""

    def reached() -> bool:
        saved = not after_save or complete_checkpoints(folder / "checkpoints")
        return last_step(folder) >= after_step and bool(saved)

    start = under_torchrun if torchrun else started
    with start("launch/train.py", *DEBUG, *_in(folder), *arguments, processes=processes) as run:
        deadline = time.monotonic() + 240
        while not reached():
            assert run.code() is None or reached(), "the run ended before it could be killed: " + run.said("err")
            assert time.monotonic() < deadline, "the run logs nothing"
            time.sleep(0.02)
        time.sleep(delay_s)
        run.kill()
    return last_step(folder)


def last_step(folder: Path) -> int:
    return max((record["step"] for record in read_metrics(folder)), default=-1)


def exact(records: list[dict[str, Any]]) -> list[str]:
    """Logged lines without what depends on the clock, as text: equal text is equal bits."""
    return [json.dumps({k: v for k, v in record.items() if not _timed(k)}) for record in records]


def assert_close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], tolerance: float) -> None:
    """Two runs logged the same figures, apart from the clock's, up to `tolerance`."""
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        keys = {key for key in one if not _timed(key)}
        assert keys == {key for key in two if not _timed(key)}
        wrong = {
            k: (one[k], two[k])
            for k in keys
            if (one[k] != two[k] if isinstance(one[k], str) else abs(one[k] - two[k]) > tolerance)
        }
        assert not wrong, f"step {one['step']}: {wrong}"


def _timed(key: str) -> bool:
    return key in TIMING or key.startswith("perf/")


def weights(folder: Path, group: str = "model") -> dict[str, Tensor]:
    """The whole weights of a run's newest checkpoint, read without a process group."""
    reader = TensorReader(find_checkpoint(folder))
    return {name: reader.read(f"{group}/{name}") for name in reader.entries(group)}


def _in(folder: Path) -> list[str]:
    return [f"run.dir={folder.parent}", f"run.name={folder.name}"]
