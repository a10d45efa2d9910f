"""Jobs on a real Slurm: submitted, trained, preempted by a signal, requeued, resumed, finished."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.runs import ROOT, environment, exact, last_step, train
from trainer.metrics import read_metrics

from . import slurm
from .slurm import Slurm

SMALL = ("train.steps=30", "train.sample_every=0", "train.checkpoint_every=10", "validation.samples=4")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := slurm.why_not():
        pytest.skip(f"no Slurm: {reason}")
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def variables(cluster: Slurm) -> dict[str, str]:
    return {**environment(), **cluster.environment, "PYTHONPATH": str(ROOT)}


def test_preempted_requeued_resumed_finished(
    cluster: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "job"
    done = subprocess.run(
        [
            sys.executable, "launch/submit.py", "--config", "mmdit_debug_mup.yaml", "--nodes", "1",
            "--gpus-per-node", "2", "--partition", slurm.PARTITION, "--time", "00:30:00",
            f"run.dir={tmp_path}", "run.name=job", *SMALL,
        ],
        cwd=ROOT, env=variables(cluster), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    number = int(done.stdout.split()[1].rstrip(":"))
    log = folder / "jobs" / "001" / f"slurm-{number}.out"
    try:
        deadline = time.monotonic() + 180
        while last_step(folder) < 5:
            assert time.monotonic() < deadline, "the job logs nothing"
            time.sleep(0.05)
        cluster.run("scancel", "--batch", "--signal=USR1", str(number))
        while cluster.job(number)["Restarts"] == "0":
            assert time.monotonic() < deadline, "the job was not requeued"
            time.sleep(0.2)
        stopped = json.loads((folder / "status.json").read_text())
        assert stopped["state"] == "preempted"
        assert 5 <= stopped["step"] < 30
        ended = cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED")
    finally:
        said = log.read_text() if log.is_file() else "no log"
        with capsys.disabled():
            print("\n".join(["", *(line for line in said.splitlines() if "job " in line or "resum" in line)]))
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), said
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert f"resuming {folder}/checkpoints/step_{stopped['step']:08d}" in said
    meta = json.loads((folder / "checkpoints" / "step_00000030" / "meta.json").read_text())
    assert meta["commit"] == (folder / "jobs" / "001" / "code" / "COMMIT").read_text().strip()

    uninterrupted = train(2, tmp_path / "uninterrupted", *SMALL)
    assert exact(read_metrics(folder)) == exact(uninterrupted)


def test_by_hand_and_a_mistake(cluster: Slurm, tmp_path: Path) -> None:
    """sbatch with the script of the repository; a config that does not exist fails once and is not repeated."""

    def sbatch(config: str, *overrides: str) -> dict[str, str]:
        done = subprocess.run(
            ["sbatch", "--parsable", "--nodes=1", f"--output={tmp_path}/%j.out", "launch/slurm/train.sbatch", config,
             *overrides],
            cwd=ROOT, env=variables(cluster), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return cluster.wait(int(done.stdout), "COMPLETED", "FAILED", "CANCELLED")

    ended = sbatch("mmdit_debug_mup.yaml", f"run.dir={tmp_path}", "run.name=hand", *SMALL, "train.steps=3")
    log = (tmp_path / f"{ended['JobId']}.out").read_text()
    assert ended["JobState"] == "COMPLETED", log
    assert json.loads((tmp_path / "hand" / "status.json").read_text())["state"] == "finished"

    ended = sbatch("mmdit_debug_mup.yaml", f"run.dir={tmp_path}", "model.widht=64")
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert "model.widht: unknown key" in (tmp_path / f"{ended['JobId']}.out").read_text()


def test_preflight_under_srun(cluster: Slurm) -> None:
    done = subprocess.run(
        ["srun", "--ntasks=2", sys.executable, "launch/preflight.py", "--config", "mmdit_debug_mup.yaml",
         "data.shards=synthetic", "--process-nodes", "--least", "0.01", "--json"],
        cwd=ROOT, env=variables(cluster), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert [each["node"] for each in found["processes"]] == ["process 0", "process 1"]
    assert all(each["matmul"] > 0 and min(each["reduce"].values()) > 0 for each in found["processes"])
