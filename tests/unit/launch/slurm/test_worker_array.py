"""The Slurm array of a search's workers: what its script says, and what is said where Slurm is not there."""

import argparse
import subprocess
from pathlib import Path

import pytest

from launch.slurm.worker_array import Work
from launch.slurm.worker_array import submit_array as submit
from tests.helpers.studies import search
from trainer.errors import ConfigError
from trainer.search.definition import Search
from trainer.search.study import Study


def arguments(**changes: object) -> argparse.Namespace:
    given = {"array": 4, "gpus_per_node": 8, "partition": "gpu", "time": "12:00:00", "dry_run": True, "sbatch": []}
    given |= {"cpus_per_gpu": None, "mem": None, "gres": None}
    return argparse.Namespace(
        config="search/demo.yaml", overrides=["data.shards=a b-{000..100}.tar"], **given | changes
    )


def submit_array(wanted: Search, given: argparse.Namespace) -> int:
    command = ["launch/search.py", "run", "--config", given.config, *given.overrides]
    return submit(Work(f"search-{wanted.name}", Study.open(wanted).folder, command, "12 trials", 0), given)


def test_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = search(tmp_path)
    assert submit_array(wanted, arguments()) == 0
    path = wanted.folder / "array.sbatch"
    assert str(path) in capsys.readouterr().out
    text = path.read_text()
    for line in (
        "--array=0-3",
        "--gpus-per-node=8",
        "--cpus-per-task=64",
        "--partition=gpu",
        "--time=12:00:00",
        "--requeue",
        "--signal=B:USR1@",
    ):
        assert f"#SBATCH {line}" in text, line
    assert "'data.shards=a b-{000..100}.tar'" in text, "quoted"
    assert "torch.distributed.run --standalone --nproc-per-node 8" in text
    assert "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" in text
    assert "scontrol requeue" in text
    directives = [number for number, line in enumerate(text.splitlines()) if line.startswith("#SBATCH")]
    assert directives == list(range(1, len(directives) + 1)), "Slurm reads them up to the first command"
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.slow
def test_no_line_is_slipped_in(tmp_path: Path) -> None:
    for changes in ({"time": "1:00\nid"}, {"partition": "gpu\nid"}, {"sbatch": ["--mem=0\nid"]}):
        with pytest.raises(ConfigError, match="expected"):
            submit_array(search(tmp_path), arguments(**changes))


def test_one_device_needs_no_torchrun(tmp_path: Path) -> None:
    wanted = search(tmp_path)
    submit_array(wanted, arguments(gpus_per_node=0, partition=None))
    text = (wanted.folder / "array.sbatch").read_text()
    assert "torch.distributed.run" not in text
    assert "gpus-per-node" not in text
    assert "partition" not in text
    assert "#SBATCH --cpus-per-task=8\n" in text
    assert "mem" not in text, "what the site gives to these CPUs: other workers share the node"


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not on this machine"):
        submit_array(search(tmp_path), arguments(dry_run=False))
    with pytest.raises(ConfigError, match="--time 3 is 180 s"):
        submit_array(search(tmp_path), arguments(time="3"))
    with pytest.raises(ConfigError, match="--array must be at least 1"):
        submit_array(search(tmp_path), arguments(array=0))
