"""The job's script, run with stand-ins for srun and scontrol: what srun is told to start, word by word."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import submit
from tests.helpers.paths import ROOT

SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
# Called in the place of Slurm's, in a folder of the test's.
SRUN = '#!/bin/sh\nprintf "%s\\0" "$@" > words\n'
SCONTROL = """#!/bin/sh
case "$*" in
  "show hostnames node[07-08]") printf 'node07\\nnode08\\n' ;;
  "--oneliner show node node07") echo "NodeName=node07 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=node07" ;;
esac
"""


def started(folder: Path, script: str, *arguments: str, **variables: str) -> list[str]:
    """The words that the script gives to srun."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "requeue": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "job").write_text(script)
    job = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[07-08]"}
    job |= {"SLURM_JOB_ID": "1501", "SLURM_GPUS_ON_NODE": "4", "PATH": f"{folder}:{os.environ['PATH']}"}
    job |= {"MUDIT_PYTHON": "python", "MUDIT_HOST_PYTHON": str(folder / "requeue")}
    command = ["bash", str(folder / "job"), "mmdit_debug_mup.yaml", *arguments]
    done = subprocess.run(command, cwd=folder, env=job | variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return (folder / "words").read_text().split("\0")[:-1]


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


@pytest.mark.parametrize(
    ("variables", "address", "port"),
    [
        ({}, "10.1.2.3", "20008"),
        ({"SLURM_NNODES": "1"}, "localhost", "20008"),
        ({"SLURM_JOB_ID": "1502"}, "10.1.2.3", "20016"),
        ({"MASTER_ADDR": "10.9.9.9", "MASTER_PORT": "29500"}, "10.9.9.9", "29500"),
    ],
)
def test_where_the_nodes_meet(variables: dict[str, str], address: str, port: str, tmp_path: Path) -> None:
    words = started(tmp_path, SCRIPT.read_text(), **variables)
    assert (value(words, "--master-addr"), value(words, "--master-port")) == (address, port)
    assert (value(words, "--nproc-per-node"), value(words, "--nnodes")) == ("4", variables.get("SLURM_NNODES", "2"))


def test_a_node_without_an_address_is_reached_by_its_name(tmp_path: Path) -> None:
    assert "node07" in SCONTROL
    words = started(tmp_path, SCRIPT.read_text().replace("--oneliner show node", "--nothing"))
    assert value(words, "--master-addr") == "node07"


def test_no_address_at_all_ends_the_job(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="MASTER_ADDR: scontrol names no first node, export its address"):
        started(tmp_path, SCRIPT.read_text(), SLURM_JOB_NODELIST="other")


@pytest.mark.parametrize("container", ["--container", "--apptainer"])
def test_spaces_in_paths_survive(
    container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing in them is a word, a pattern or a command to the shell."""
    here, runs, image = tmp_path / "my project", tmp_path / "my runs", "/the images/$(id) *"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", [
        "submit.py", "--config", "mmdit_debug_mup", "--nodes=2", "--gpus-per-node=4", "--partition=gpu", "--time=1:0:0",
        "--dry-run", container, image, "--mount", "/more data", f"run.dir={runs}",
    ])  # fmt: skip
    submit.main()
    script = capsys.readouterr().out.replace(f"export MUDIT_HOST_PYTHON={sys.executable}", "")
    words = started(tmp_path, script, "a key='a b'")
    mounts = f"{here}:{here},{runs}:{runs},/more data:/more data"
    assert words[1 : words.index("sh")] == {
        "--container": [
            f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={here}",
            "--container-env=HF_HOME,HF_HUB_OFFLINE,OMP_NUM_THREADS,PYTHONPATH",
        ],
        "--apptainer": ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(here), image],
    }[container]  # fmt: skip
    assert words[-4:] == [
        f"{runs}/mmdit_debug_mup/jobs/001/code/launch/train.py", "--config", "mmdit_debug_mup.yaml", "a key='a b'",
    ]  # fmt: skip


def test_each_node_knows_its_number(tmp_path: Path) -> None:
    words = started(tmp_path, SCRIPT.read_text())
    shell = words.index("sh")
    assert words[shell + 3 :][:3] == ["sh", "python", "-m"]
    shown = subprocess.run(
        [*words[shell : shell + 4], "sh", "-c", "echo $PET_NODE_RANK"],
        env={**os.environ, "SLURM_NODEID": "3"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout == "3\n"
