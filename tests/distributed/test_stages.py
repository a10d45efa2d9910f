"""Runs of several stages: killed inside each of them and at their borders, and gone on with in another world."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.forked import finished, started

from .runs import DEBUG, assert_close, exact, last_step, train, train_and_kill, weights

STAGES = (
    "stages=[{until: 6}, "
    "{until: 12, data: {resolution: 64, buckets: aspect}, train: {global_batch_size: 4}, objective: {timestep_mean: 1},"
    " optim: {lr: 0.002, warmup_steps: 2}}, "
    "{data: {resolution: 32, buckets: none}, train: {global_batch_size: 6}}]"
)
SETTINGS = (
    STAGES,
    "train.steps=18",
    "train.log_every=1",
    "train.validate_every=6",
    "train.checkpoint_every=2",
    "train.sample_every=9",
    "sample.count=2",
    "sample.steps=2",
    "model.pos_embed_max_size=24",
    "validation.samples=8",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages") / "whole"
    train(2, folder, *SETTINGS)
    return folder


def test_kills_inside_stages_and_at_borders_leave_no_trace(whole: Path, tmp_path: Path) -> None:
    for after_step, delay_s in ((3, 0.0), (6, 0.0), (6, 0.3), (9, 0.0), (12, 0.1), (14, 0.0)):
        train_and_kill(2, tmp_path / "killed", after_step, delay_s, *SETTINGS)
    records = train(2, tmp_path / "killed", *SETTINGS)
    assert exact(records) == exact(train(2, whole, *SETTINGS))
    for group in ("model", "ema_0.99", "exp_avg"):
        one, two = weights(whole, group), weights(tmp_path / "killed", group)
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_a_stage_changes(whole: Path) -> None:
    records = {record["step"]: record for record in train(2, whole, *SETTINGS) if "loss" in record}
    assert [records[step]["samples_seen"] for step in (6, 12, 18)] == [48, 72, 108]
    assert [records[step]["stage"] for step in (6, 7, 12, 13)] == [f"stage {n} of 3" for n in (1, 2, 2, 3)]
    # A schedule of its own: the warm-up begins again, and then its own rate stays, in the next stage too.
    assert [records[step]["lr"] for step in (7, 8, 9, 13)] == [0.001, 0.002, 0.002, 0.002]
    sets = [records[step]["val_set"] for step in (6, 12, 18)]
    assert len(set(sets)) == 3
    assert json.loads((whole / "status.json").read_text())["state"] == "finished"


def test_another_world_reads_the_same_samples_over_a_border(whole: Path, tmp_path: Path) -> None:
    orders = []
    for size in ("1", "2", "3"):
        asked = ("--from-step", "4", "--to-step", "15", "--world-size", size)
        done = finished("launch/data_order.py", *DEBUG, *SETTINGS, f"run.dir={tmp_path}", *asked, processes=1)
        assert done.returncode == 0, done.stderr
        orders.append([json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")])
    assert orders[0] == orders[1] == orders[2]
    assert [len(line["keys"]) for line in orders[0]] == [8] * 2 + [4] * 6 + [6] * 3

    fp64 = (*SETTINGS, "parallel.precision=fp64")
    one = train(1, tmp_path / "one", *fp64)
    train_and_kill(2, tmp_path / "both", 4, 0.0, *fp64)
    assert_close(train(1, tmp_path / "both", *fp64), one, 1e-9)


def test_a_run_without_stages_gets_one(tmp_path: Path) -> None:
    """What resuming with another batch or resolution refuses, and names the way."""
    plain = [key for key in SETTINGS if key != STAGES and not key.startswith("train.steps")]
    first = train(1, tmp_path / "run", *plain, "train.steps=6")
    more = ("train.steps=9", "run.allow_change=[train.steps]")
    place = (f"run.dir={tmp_path}", "run.name=run")
    other = (*plain, *more, *place, "train.global_batch_size=4")
    done = finished("launch/train.py", *DEBUG, *other, processes=1)
    assert done.returncode == 2
    assert "'stages=[{until: 6}, {train: {global_batch_size: 4}}]'" in done.stderr
    records = train(1, tmp_path / "run", *plain, *more, "stages=[{until: 6}, {train: {global_batch_size: 4}}]")
    assert exact(records[: len(first)]) == exact(first)
    assert records[-1]["samples_seen"] == 6 * 8 + 3 * 4

    late = (*plain, *more, *place, "stages=[{until: 5}, {train: {global_batch_size: 4}}]")
    done = finished("launch/train.py", *DEBUG, *late, processes=1)
    assert done.returncode == 2
    assert "train.global_batch_size" in done.stderr


def test_a_signal_in_what_is_done_at_a_border_ends_the_run(tmp_path: Path) -> None:
    """No step tells of it: the grid of samples at the end of the stage takes longer than the signal does to come."""
    settings = (*SETTINGS, "train.sample_every=6", "sample.steps=150", "validation.samples=2")
    folder = tmp_path / "run"
    with started("launch/train.py", *DEBUG, *settings, f"run.dir={tmp_path}", "run.name=run", processes=2) as run:
        deadline = time.monotonic() + 240
        while last_step(folder) < 5:
            assert time.monotonic() < deadline, run.said("err")
            time.sleep(0.01)
        time.sleep(0.5)  # the last step of the stage is done in less
        assert last_step(folder) == 5, "the border's work was over before the signal"
        run.send_signal(signal.SIGUSR1)
        assert run.wait(240) == 0, run.said("err")
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", 6)
    assert last_step(folder) == 6
