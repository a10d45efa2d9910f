"""Which process of how many a command is: under srun, under other launchers, and by variables that are half set."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.ranks import first_host, take_ranks, tasks_per_node
from tests.helpers.paths import ROOT
from trainer.errors import ConfigError

# Of the last of 11 tasks on two nodes, as srun sets them.
TASK = {
    "SLURM_JOB_ID": "1501", "SLURM_STEP_ID": "2", "SLURM_PROCID": "10", "SLURM_LOCALID": "2", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "8,3",
    "SLURM_STEP_NODELIST": "localhost,node[07-09]", "SLURM_NTASKS": "11",
}  # fmt: skip


def taken(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> dict[str, str]:
    """What take_ranks adds to an environment."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(variables))
        take_ranks()
        return {name: value for name, value in os.environ.items() if name not in variables}


def test_a_task_of_srun_has_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken(monkeypatch, TASK) == {
        "RANK": "10", "WORLD_SIZE": "11", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "localhost", "MASTER_PORT": "20010",
    }  # fmt: skip
    assert taken(monkeypatch, TASK | {"CUDA_VISIBLE_DEVICES": "0,1,2"})["LOCAL_RANK"] == "2"
    assert taken(monkeypatch, TASK | {"CUDA_VISIBLE_DEVICES": "2"})["LOCAL_RANK"] == "0", "a GPU of its own"
    assert taken(monkeypatch, TASK | {"SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "localhost"
    given = taken(monkeypatch, TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert not {"MASTER_ADDR", "MASTER_PORT"} & set(given), "what the user sets stays"


def test_other_processes_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4"}
    batch_script = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}
    for variables in ({}, torchrun, TASK | torchrun, batch_script, TASK | {"SLURM_STEP_NUM_TASKS": "1"}):
        assert taken(monkeypatch, variables) == {}, variables
    assert taken(monkeypatch, TASK | {"PMI_SIZE": "11"})["RANK"] == "10", "srun --mpi=pmi2"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, r"one of 4 processes \(OMPI_COMM_WORLD_SIZE\).*torchrun --nproc-per-node"),
        ({"PMI_SIZE": "2"}, r"one of 2 processes \(PMI_SIZE\)"),
        (TASK | {"OMPI_COMM_WORLD_SIZE": "16"}, "one of 16"),  # mpirun in a job: the step is of its daemons
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set.*expected RANK and WORLD_SIZE"),
        ({"RANK": "0"}, "RANK is set"),
        (TASK | {"SLURM_GPUS_ON_NODE": "8"}, "3 of the tasks on this node of 8 GPUs.*--ntasks-per-node 8"),
    ],
)
def test_what_would_train_several_worlds_is_refused(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=said):
        taken(monkeypatch, variables)


def test_every_command_asks(tmp_path: Path) -> None:
    variables = {**os.environ, "OMPI_COMM_WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    train = [sys.executable, "launch/train.py", "--config", "mmdit_debug_mup", f"run.dir={tmp_path}"]
    done = subprocess.run(train, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith("error: this is one of 2 processes")
    assert not list(tmp_path.iterdir())


def test_lists_of_slurm() -> None:
    assert first_host("a") == "a"
    assert first_host("node1,node2") == "node1"
    assert first_host("node[01-03,7],x") == "node01"
    assert first_host("rack[2-3]-node[05,9-12]-ib") == "rack2-node05-ib"
    assert first_host("gpu-a[10]") == "gpu-a10"
    assert tasks_per_node("8") == [8]
    assert tasks_per_node("8(x3),2,1(x2)") == [8, 8, 8, 2, 1, 1]


def test_a_name_that_does_not_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm knows the address; where it cannot be asked, as in a container, one message says what to set."""

    def no_address(*_: object) -> None:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    variables = TASK | {"SLURM_STEP_NODELIST": "node[07-08]", "PATH": str(tmp_path)}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"node07, does not resolve.*export MASTER_ADDR=ADDRESS before srun"):
        taken(monkeypatch, variables)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "NodeName=$4 NodeAddr=10.1.2.3 NodeHostName=$4"\n')
    scontrol.chmod(0o755)
    assert taken(monkeypatch, variables)["MASTER_ADDR"] == "10.1.2.3"
    scontrol.write_text("#!/bin/sh\nexit 1\n")  # there, without Slurm's own files
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        taken(monkeypatch, variables)
