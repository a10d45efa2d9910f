"""What goes wrong in a long run, planted: a rank killed, NaNs, a hang, signals, torchrun itself killed."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import exact, last_step, train
from tests.helpers.forked import finished
from trainer.checkpoint.find import complete_checkpoints
from trainer.monitor.metrics import read_metrics

from .harness import job, kill, lives, status, wait_until, workers

SETTINGS = (
    "train.steps=16", "train.log_every=2", "train.checkpoint_every=4", "train.validate_every=8", "train.sample_every=0",
)  # fmt: skip
DELAY_S = 2.0  # of faulty_train.py
START_S = 180.0  # a start on a machine that others use as well
FOR_EVER = ("train.steps=100000", "train.validate_every=0", "train.sample_every=0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a run logs to which nothing happens."""
    return exact(train(2, tmp_path_factory.mktemp("whole") / "run", *SETTINGS))


# ------------------------------------------------------------------------------------------------------- a rank is lost


def test_a_killed_rank_ends_the_job_and_resumes_exactly(whole: list[str], tmp_path: Path) -> None:
    """Rank 0, so that the survivor must write status.json; between two checkpoints."""
    run = tmp_path / "run"
    with job(run, *SETTINGS, faults={"rank": 0, "kill": 11}) as first:
        wait_until(lambda: len(workers(first.process.pid)) == 2, START_S, "two workers")
        victim = workers(first.process.pid)[0]
        wait_until(lambda: not lives(victim), START_S, "rank 0 kills itself")
        assert first.wait(60) == 1
        assert "forcefully exiting" not in first.text(), "torchrun did not have to kill the survivor"
        assert "Traceback" not in first.text().partition("failed (exitcode")[0], "of torchrun alone"
    assert status(run)["state"] == "failed"
    assert "rank 0 is lost" in status(run)["reason"]
    assert [p.name for p in complete_checkpoints(run / "checkpoints")] == ["step_00000004", "step_00000008"]
    assert exact(train(2, run, *SETTINGS)) == whole


def test_a_killed_rank_is_restarted_and_the_run_goes_on(whole: list[str], tmp_path: Path) -> None:
    """Rank 0, at whose old address the other one must not look for it."""
    run = tmp_path / "run"
    launcher = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    with job(run, *SETTINGS, faults={"rank": 0, "kill": 11}, launcher=launcher) as restarted:
        assert restarted.wait(2 * START_S) == 0, restarted.text()[-4000:]
        assert re.search(r"resuming \S+step_00000008", restarted.text())
    assert exact(read_metrics(run)) == whole


# ---------------------------------------------------------------------------------------------------- NaNs and rollback

# Data steps: one alone, then a row of three; and what makes rank 1 slow, without a figure that differs.
BAD = {"rank": 1, "nan": [2, 9, 10, 11], "slow_data": [3], "slow_model": [5]}
ROLLBACK = (*SETTINGS, "train.rollback_after=3")


def faulty(processes: int, folder: Path, *arguments: str, code: int = 0, torchrun: bool = False, **faults: Any) -> str:
    """Output of faulty_train.py, which ends with this code; without torchrun where the faults are no matter of it."""
    done = finished(
        "tests/faults/faulty_train.py", "--config", "mmdit_debug_mup.yaml", f"run.dir={folder.parent}",
        f"run.name={folder.name}", *arguments, processes=processes, more_environment={"FAULTS": json.dumps(faults)},
        torchrun=torchrun,
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollback") / "run"
    faulty(2, folder, *ROLLBACK, **BAD)
    return folder


def test_the_slow_rank_is_named(rolled_back: Path) -> None:
    """Waiting for data between two log lines, computing in the last step; the other rank has waited for it in both."""
    records = {r["step"]: r for r in read_metrics(rolled_back)}
    late, long = records[4], records[6]
    for what, slow, usual in (("data_wait", late, long), ("forward", long, late)):
        assert slow[f"perf/{what}_slowest_rank"] == 1
        share = 1 / 2 if what == "data_wait" else 1  # the mean of two steps
        assert slow[f"perf/{what}_max_s"] >= share * DELAY_S
        assert slow[f"perf/{what}_median_s"] < 0.8 * slow[f"perf/{what}_max_s"], "the other rank is not slow"
        assert usual[f"perf/{what}_max_s"] < share * DELAY_S
        assert slow["perf/step_median_s"] > DELAY_S / 2 * 0.9, "both take the time of the slower one"


def test_a_nan_on_one_rank_is_skipped_on_all(rolled_back: Path) -> None:
    records = read_metrics(rolled_back)
    skipped = {r["step"]: r["skipped_steps"] for r in records if "skipped_steps" in r}
    assert skipped == {step: int(step == 4) for step in range(2, 17, 2)}
    assert all(r["spike_steps"] == 0 for r in records if r["step"])
    assert all(0 < r["loss"] < 2 for r in records if r["step"]), "no figure holds a NaN"


def test_a_row_of_nans_rolls_back(rolled_back: Path) -> None:
    """Training steps 10 to 12 are bad: the log line of step 12 goes back to step 8, and past the data of four steps."""
    [skipped_range] = json.loads((rolled_back / "jumps.json").read_text())
    assert (skipped_range["at_step"], skipped_range["steps"]) == (8, 4)
    assert "3 steps in a row" in skipped_range["reason"]
    records = read_metrics(rolled_back)
    assert [r["step"] for r in records] == list(range(0, 17, 2)), "no step twice, none left out"
    assert [r.get("jumped_steps", 0) for r in records] == [0] * 4 + [0, 4, 4, 4, 4]
    assert status(rolled_back) == {"state": "finished", "step": 16, "reason": ""}
    meta = json.loads((rolled_back / "checkpoints" / "step_00000016" / "meta.json").read_text())
    assert meta["jumps"] == [[8, 4, skipped_range["reason"]]]


def test_data_order_shows_the_jump(rolled_back: Path) -> None:
    def keys(*of_run: str) -> list[Any]:
        done = finished("launch/data_order.py", "--config", "mmdit_debug_mup.yaml", "--to-step", "20", *of_run)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["step"] for line in lines] == list(range(20))
        return [line["keys"] for line in lines]

    jumped = keys(f"run.dir={rolled_back.parent}", f"run.name={rolled_back.name}")
    straight = keys(f"run.dir={rolled_back.parent}", "run.name=none")
    assert jumped == [*straight[:8], *straight[12:], *jumped[-4:]]
    assert straight[8] not in jumped


def test_killed_after_the_rollback_it_goes_on_the_same_way(rolled_back: Path, tmp_path: Path) -> None:
    """Before it has saved again: jumps.json alone knows that it went back."""
    run = tmp_path / "run"
    faulty(2, run, *ROLLBACK, code=1, torchrun=True, **BAD, kill_after_rollback=True)
    assert complete_checkpoints(run / "checkpoints")[-1].name == "step_00000008"
    faulty(2, run, *ROLLBACK, **BAD)
    assert exact(read_metrics(run)) == exact(read_metrics(rolled_back))


def test_a_run_of_one_epoch_ends_where_its_data_end(tmp_path: Path) -> None:
    """The data hold 16 steps, 4 of which a rollback skips: 12 are left."""
    run = tmp_path / "run"
    settings = (*ROLLBACK, "train.global_batch_size=32", "data.epochs=1")
    for said in ("finished at step 12", "has finished its 12 steps"):
        assert said in faulty(1, run, *settings, **{**BAD, "rank": 0})
    assert [r["step"] for r in read_metrics(run)] == list(range(0, 13, 2))
    assert complete_checkpoints(run / "checkpoints")[-1].name == "step_00000012"


# -------------------------------------------------------------------------------------------------------------- a hang


def test_a_rank_that_hangs_leaves_stacks_and_a_reason(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = (
        "train.watchdog_min_s=10", "train.watchdog_factor=5", "train.log_every=1", "train.checkpoint_every=4",
        "train.checkpoint_async=false",
    )  # fmt: skip
    with job(run, *FOR_EVER, *settings, faults={"rank": 1, "hang": 8}) as hung:
        wait_until(lambda: "hanging at" in hung.text(), START_S, "rank 1 hangs")
        assert hung.wait(150) == 1
        assert "error: watchdog: step 9 took more than" in hung.text()
    assert status(run)["state"] == "failed"
    assert status(run)["step"] == 8
    assert "times the median" in status(run)["reason"]
    sleeping, waiting = ((run / "stacks" / f"rank_{rank}.txt").read_text() for rank in (1, 0))
    asleep = r'faulty_train\.py", line \d+ in _encode'
    assert re.search(asleep, sleeping)
    assert "train_step" in waiting
    assert not re.search(asleep, waiting)
    assert complete_checkpoints(run / "checkpoints")[-1].name == "step_00000008"


# ------------------------------------------------------------------------------------------------------------- signals


def test_a_signal_to_torchrun_saves_and_leaves_no_orphan(tmp_path: Path) -> None:
    """Without a log line: ranks agree in the step itself."""
    run = tmp_path / "run"
    launcher = ("--standalone", "--nproc-per-node", "2", "--signals-to-handle", "SIGTERM,SIGUSR1")
    more = {"PET_SHUTDOWN_TIMEOUT": "100"}
    settings = (*FOR_EVER, "train.log_every=100000", "train.checkpoint_every=5")
    with job(run, *settings, launcher=launcher, more_environment=more) as asked:
        wait_until(lambda: complete_checkpoints(run / "checkpoints"), START_S, "a first checkpoint")
        pids = workers(asked.process.pid)
        kill([asked.process.pid], signal.SIGUSR1)
        asked.wait(150)
        assert len(pids) == 2
        assert not any(lives(pid) for pid in pids)
    told = status(run)
    assert f"preempted at step {told['step']}:" in asked.text(), "said when training has returned"
    assert told["state"] == "preempted"
    assert complete_checkpoints(run / "checkpoints")[-1].name == f"step_{told['step']:08d}"
    assert last_step(run) < told["step"], "no log line was due"


def test_workers_end_with_a_torchrun_that_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with job(run, *FOR_EVER, "train.log_every=1") as orphaned:
        wait_until(lambda: last_step(run) > 0, START_S, "a first step")
        pids = workers(orphaned.process.pid)
        assert len(pids) == 2
        try:
            kill([orphaned.process.pid], signal.SIGKILL)
            # By the kernel: that the store is gone would end them as well, after some seconds, and they would say so.
            wait_until(lambda: not any(lives(pid) for pid in pids), 60, "no orphan")
            assert " ends: " not in orphaned.text()
        finally:
            kill(pids, signal.SIGKILL)
