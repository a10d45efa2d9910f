"""A search as a person runs it: killed in the middle, run again, reported, transferred, and the target trained."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.runs import exact, last_step, train
from tests.helpers.forked import Started, finished, started
from trainer.checkpoint.find import complete_checkpoints
from trainer.monitor.metrics import read_metrics
from trainer.search.study import Study, Trial

SEARCH = """
name: small
config: mmdit_debug_mup.yaml
overrides: [train.steps=12, train.validate_every=3, train.checkpoint_every=3, train.sample_every=0, model.width=32,
            model.depth=1, validation.samples=8]
sampler: grid
seeds: 1
space:
  optim.lr: {choices: [2e-3, 1e-2, 1e30]}
  optim.clip_norm: {choices: [1.0]}
"""


def run(*arguments: str | Path, code: int = 0, processes: int = 1, torchrun: bool = False) -> str:
    done = finished("launch/search.py", *arguments, processes=processes, torchrun=torchrun)
    assert done.returncode == code, (done.stdout + done.stderr)[-3000:]
    return done.stderr + done.stdout


def wait_for_step(folder: Path, step: int, job: Started) -> None:
    deadline = time.monotonic() + 240
    while last_step(folder) < step:
        assert job.code() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline, "it logs nothing"
        time.sleep(0.01)


def wait_for_checkpoint(folder: Path, job: Started) -> None:
    wait_for_step(folder, 0, job)
    while not complete_checkpoints(folder / "checkpoints"):
        assert job.code() is None, "the search ended before it could be stopped"
        time.sleep(0.01)


def test_a_search_from_end_to_end(tmp_path: Path) -> None:
    config, study = tmp_path / "small.yaml", tmp_path / "small"
    config.write_text(SEARCH)
    command = ("run", "--config", config, f"run.dir={tmp_path}", "--workers", "2")

    with started("launch/search.py", *command) as killed:
        wait_for_checkpoint(study / "0000", killed)
        killed.kill()
    before = trials(study)
    assert before[0].state == "running", "killed in its middle"
    lines = exact(read_metrics(study / "0000"))

    output = run(*command)
    assert "2 complete, 1 diverged; best: trial" in output
    after = trials(study)
    assert [t.point for t in after] == [t.point for t in before]
    assert [t.state for t in after] == ["complete", "complete", "diverged"]
    assert "finite gradients" in after[2].reason
    assert after[2].value is None
    assert exact(read_metrics(study / "0000"))[: len(lines)] == lines
    assert "resuming" in (study / "logs" / "0000_rank0.log").read_text()
    alone = train(1, tmp_path / "alone", *settings(after[0]))
    assert after[0].value == alone[-1]["val_loss_ema"], "as if it had never been killed, bit for bit"

    page = run("report", "--study", study).splitlines()[-1]
    assert Path(page).read_text().count("<img") >= 2
    target, found = tmp_path / "target.yaml", tmp_path / "found.yaml"
    target.write_text("extends: mmdit_debug_mup.yaml\nmodel: {width: 64, depth: 1}\ntrain: {steps: 12}\n")
    assert "found.yaml" in run("transfer", "--study", study, "--to", target, "--output", found)
    records = train(1, tmp_path / "wide", "train.sample_every=0", config=str(found))
    best = min(after[:2], key=lambda t: t.value or 0.0)
    assert records[-1]["lr"] == pytest.approx(best.point["optim.lr"])
    assert records[-1]["val_loss_ema"] < records[0]["val_loss"]


def test_a_signal_saves_the_trial_and_a_worker_under_torchrun_takes_it(tmp_path: Path) -> None:
    config, study = tmp_path / "small.yaml", tmp_path / "small"
    config.write_text(SEARCH)
    command = ("run", "--config", config, f"run.dir={tmp_path}", "trials=1", "train.steps=40", "seeds=2")
    with started("launch/search.py", *command) as asked:
        wait_for_step(study / "0000", 4, asked)
        asked.send_signal(signal.SIGTERM)
        code, output = asked.wait(300), asked.said("out") + asked.said("err")
    assert code == 0, output
    assert "trial 0 is saved: start the search again" in output
    assert json.loads((study / "0000" / "status.json").read_text())["state"] == "preempted"

    run(*command, processes=2, torchrun=True)
    [trial] = trials(study)
    assert trial.state == "complete"
    assert trial.attributes["processes"] == 2
    values = [read_metrics(study / name)[-1]["val_loss_ema"] for name in ("0000", "0000_seed1")]
    assert trial.losses == values
    assert values[0] != values[1], "another seed is another run"


def test_mistakes_exit_with_2(tmp_path: Path) -> None:
    assert 'no study "nowhere"' in run("report", "--study", "nowhere", code=2)
    config = tmp_path / "small.yaml"
    config.write_text(SEARCH)
    assert "names no target" in run("cost", "--config", config, code=2)


def trials(folder: Path) -> list[Trial]:
    return Study.load(str(folder)).trials()


def settings(trial: Trial) -> list[str]:
    """The overrides of a trial, for launch/train.py."""
    return [
        "train.steps=12", "train.validate_every=3", "train.checkpoint_every=3", "train.sample_every=0",
        "model.width=32", "model.depth=1", "validation.samples=8",
        *(f"{key}={value}" for key, value in trial.point.items()),
    ]  # fmt: skip
