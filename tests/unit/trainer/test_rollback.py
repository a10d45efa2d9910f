"""Going back to a checkpoint: what is loaded, cut and written, and when it is refused."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.checkpoints import meta_of
from trainer.errors import DivergedError, RunError
from trainer.monitor.metrics import Metrics, read_metrics
from trainer.parallel.mesh import World
from trainer.recovery.skipped_ranges import SkippedRange
from trainer.rollback import MOST_IN_A_ROW, check_health, go_back
from trainer.state import TrainState


class Checkpoints:
    """Loads totals of ones, in mid-row."""

    loaded: Path | None = None
    waited = False

    def wait(self) -> None:
        self.waited = True

    def load(self, checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
        assert self.waited, "a save in flight may be newer than what is there"
        self.loaded = checkpoint
        for tensor in tensors.values():
            tensor.fill_(1)


@pytest.fixture
def metrics(tmp_path: Path) -> Iterator[Metrics]:
    metrics = Metrics(tmp_path, True, 100, 0)
    yield metrics
    metrics.close()


def a_run(folder: Path, world: World, metrics: Metrics, *checkpoints: int) -> Any:
    for step in checkpoints:
        path = folder / "checkpoints" / f"step_{step:08d}"
        path.mkdir(parents=True)
        (path / "meta.json").write_text(json.dumps(meta_of(step)))
    state = TrainState.start(torch.device("cpu"))
    state.step = 12
    return SimpleNamespace(
        state=state,
        world=world,
        folder=folder,
        plan=SimpleNamespace(rollback_after=3, max_skipped_steps=5, first_step=0, stage=None),
        last_step=100,
        ema=SimpleNamespace(tensors=dict),
        checkpointer=Checkpoints(),
        metrics=metrics,
    )


def test_goes_back_to_the_newest(world: World, metrics: Metrics, tmp_path: Path) -> None:
    run = a_run(tmp_path, world, metrics, 4, 8)
    for step in (2, 8, 9):
        run.metrics.write({"step": step})
    go_back(run, 3)
    assert run.checkpointer.loaded == tmp_path / "checkpoints" / "step_00000008"
    assert (run.state.step, run.state.skipped_ranges) == (8, (SkippedRange(8, 4, run.state.skipped_ranges[0].reason),))
    assert json.loads((tmp_path / "jumps.json").read_text()) == [run.state.skipped_ranges[0]._asdict()]
    assert float(run.state.totals[0]) == 1, "as loaded"
    assert run.state.spikes.numbers.tolist() == [0, 0, 1, 1, 1], "the row in which the checkpoint was saved is over"
    assert [record["step"] for record in read_metrics(tmp_path)] == [2, 8]
    run.metrics.write({"step": 10})
    assert [record["step"] for record in read_metrics(tmp_path)] == [2, 8, 10]
    assert "back to step 8" in json.loads((tmp_path / "status.json").read_text())["reason"]


def test_without_a_checkpoint_the_run_ends(world: World, metrics: Metrics, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"3 steps in a row .* no checkpoint to go back to: lower optim\.lr"):
        go_back(a_run(tmp_path, world, metrics), 3)
    assert not (tmp_path / "jumps.json").exists()


def test_in_vain(world: World, metrics: Metrics, tmp_path: Path) -> None:
    run = a_run(tmp_path, world, metrics, 8)
    for _ in range(MOST_IN_A_ROW):
        go_back(run, 3)
        run.state.step = 12
    with pytest.raises(RunError, match=r"step_00000008 3 times already"):
        go_back(run, 3)
    (tmp_path / "checkpoints" / "step_00000012").mkdir()
    (tmp_path / "checkpoints" / "step_00000012" / "meta.json").write_text(json.dumps(meta_of(12)))
    run.state.step = 16
    go_back(run, 3)
    assert run.state.step == 12, "a new checkpoint starts the count anew"
    assert [skipped_range.steps for skipped_range in run.state.skipped_ranges] == [4] * (MOST_IN_A_ROW + 1)


def test_killed_after_going_back_the_row_is_over_as_well(world: World) -> None:
    """The checkpoint was saved in a row of bad steps, and does not know the skipped range that begins at it."""
    meta = {"step": 8, "reads": [[{}, 0]], "jumps": [[4, 2, "NaN"]]}
    for skipped_ranges, row in (
        ((SkippedRange(4, 2, "NaN"),), 2),
        ((SkippedRange(4, 2, "NaN"), SkippedRange(8, 4, "NaN")), 0),
    ):
        state = TrainState.start(torch.device("cpu"))
        state.skipped_ranges = (*skipped_ranges, SkippedRange(20, 1, "of a later step"))
        state.spikes.numbers[:2] = 2  # as loaded
        state.restore(meta, rank=0)
        assert state.spikes.take_longest_row() == row


def test_a_diverged_run_ends(world: World, metrics: Metrics, tmp_path: Path) -> None:
    """At step 12, after the skipped steps 9 to 12: step 8 was taken last, and may have spoilt the weights."""
    run = a_run(tmp_path, world, metrics, 4, 8, 10)
    check_health(run, {"val_loss": 1.0}, 4)
    with pytest.raises(DivergedError, match=r"val_loss_ema is not finite after step 12\. The same command"):
        check_health(run, {"val_loss": 1.0, "val_loss_ema": float("nan")}, 0)
    run.plan.max_skipped_steps = 0
    check_health(run, {"val_loss": float("nan")}, 1000)
    run.plan.max_skipped_steps = 4
    with pytest.raises(DivergedError, match="last 4 steps up to step 12 were all skipped") as ended:
        check_health(run, {}, 4)
    assert "starts again from step_00000004: lower optim.lr" in str(ended.value)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000008.diverged", "step_00000010.diverged"]


@pytest.mark.parametrize(("step", "row", "ends"), [(100, 10, True), (100, 9, False), (2, 2, True), (50, 10, False)])
def test_no_run_finishes_on_skipped_steps(
    step: int, row: int, ends: bool, world: World, metrics: Metrics, tmp_path: Path
) -> None:
    run = a_run(tmp_path, world, metrics)
    run.plan.max_skipped_steps, run.state.step, run.last_step = 1000, step, 2 if step == 2 else 100
    with pytest.raises(DivergedError) if ends else contextlib.nullcontext():
        check_health(run, {}, row)


def test_not_into_the_stage_before(tmp_path: Path, world: World, metrics: Metrics) -> None:
    run = a_run(tmp_path, world, metrics, 4)
    run.plan.first_step, run.plan.stage = 6, "stage 2 of 3"
    with pytest.raises(RunError, match=r"step_00000004.*is before step 6, at which stage 2 of 3 begins"):
        go_back(run, 3)
