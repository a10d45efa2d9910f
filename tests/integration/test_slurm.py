"""Jobs on a real Slurm: submitted, trained, preempted by a signal, requeued, resumed, finished."""

import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.slurm.options import limit_s
from tests.distributed.runs import exact, last_step, train
from tests.helpers.forked import environment, once
from tests.helpers.paths import ROOT
from trainer.config.load import load_config
from trainer.errors import ConfigError
from trainer.monitor.metrics import read_metrics
from trainer.provenance import rooms
from trainer.search.study import Study

from . import slurm
from .slurm import Slurm

SMALL = ("train.steps=50", "train.sample_every=0", "train.checkpoint_every=10", "validation.samples=4")
ENDED = ("COMPLETED", "FAILED", "CANCELLED")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := slurm.why_not():
        pytest.skip(f"no Slurm: {reason}")
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def variables(cluster: Slurm) -> dict[str, str]:
    return {**environment(), **cluster.environment, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return exact(train(2, tmp_path_factory.mktemp("slurm") / "uninterrupted", *SMALL))


def submit(cluster: Slurm, folder: Path, *options: str) -> list[int]:
    """launch/submit.py for a run in `folder`; the numbers of its jobs."""
    done = subprocess.run(
        [
            sys.executable, "launch/submit.py", "--config", "mmdit_debug_mup.yaml", "--nodes", "1",
            "--gpus-per-node", "2", "--partition", slurm.PARTITION, "--time", "00:30:00",
            *once([f"run.dir={folder.parent}", f"run.name={folder.name}", *SMALL, *options]),
        ],
        cwd=ROOT, env=variables(cluster), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [int(line.split()[1].rstrip(":")) for line in done.stdout.splitlines()]


def preempt(cluster: Slurm, folder: Path, number: int) -> None:
    """Tell a job to stop once its run trains, as the time limit would."""
    deadline = time.monotonic() + 300
    while last_step(folder) < 3:
        assert time.monotonic() < deadline, "the job logs nothing"
        time.sleep(0.05)
    cluster.run("scancel", "--batch", "--signal=USR1", str(number))


def test_preempted_requeued_resumed_finished(
    cluster: Slurm, uninterrupted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "job"
    (number,) = submit(cluster, folder)
    log = folder / "jobs" / "001" / f"slurm-{number}.out"
    try:
        preempt(cluster, folder, number)
        deadline = time.monotonic() + 300
        while cluster.job(number)["Restarts"] == "0":
            assert time.monotonic() < deadline, "the job was not requeued"
            time.sleep(0.2)
        stopped = json.loads((folder / "status.json").read_text())
        assert stopped["state"] == "preempted"
        assert 3 <= stopped["step"] < 50
        ended = cluster.wait(number, *ENDED)
    finally:
        said = log.read_text() if log.is_file() else "no log"
        with capsys.disabled():
            print("\n".join(["", *(line for line in said.splitlines() if "job " in line or "resum" in line)]))
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), f"{said}\n{cluster.logs()}"
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert f"resuming {folder}/checkpoints/step_{stopped['step']:08d}" in said
    meta = json.loads((folder / "checkpoints" / "step_00000050" / "meta.json").read_text())
    assert meta["commit"] == (folder / "jobs" / "001" / "code" / "COMMIT").read_text().strip()
    assert exact(read_metrics(folder)) == uninterrupted


def test_nodes_whose_names_do_not_resolve(cluster: Slurm, uninterrupted: list[str], tmp_path: Path) -> None:
    (number,) = submit(cluster, tmp_path / "job", "--nodes", "2", "--gpus-per-node", "1")
    ended = cluster.wait(number, *ENDED)
    said = (tmp_path / "job" / "jobs" / "001" / f"slurm-{number}.out").read_text()
    assert ended["JobState"] == "COMPLETED", said
    assert "2 nodes: mudit-node[1-2], which meet at 127.0.0.1:" in said
    assert exact(read_metrics(tmp_path / "job")) == uninterrupted


def test_spaces_in_the_names_of_folders(cluster: Slurm, uninterrupted: list[str], tmp_path: Path) -> None:
    """Of the project, its environment, the config and the runs."""
    project, runs = tmp_path / "my project", tmp_path / "my runs"
    for room in (*rooms(), "configs"):
        shutil.copytree(ROOT / room, project / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", project)
    (project / "my environment").symlink_to(sys.prefix)
    config = tmp_path / "my configs" / "debug.yaml"
    config.parent.mkdir()
    config.write_text(f"extends: {project}/configs/mmdit_debug_mup.yaml\n")
    command = [
        str(project / "my environment" / "bin" / "python"), "launch/submit.py", "--config", str(config), "--nodes", "1",
        "--gpus-per-node", "2", "--partition", slurm.PARTITION, "--time", "30", f"run.dir={runs}", *SMALL,
    ]  # fmt: skip
    own = variables(cluster) | {"PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=project, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    number = int(done.stdout.split()[1].rstrip(":"))
    ended = cluster.wait(number, *ENDED)
    said = (runs / "debug" / "jobs" / "001" / f"slurm-{number}.out").read_text()
    assert ended["JobState"] == "COMPLETED", said
    assert "requeue" not in said
    assert exact(read_metrics(runs / "debug")) == uninterrupted


def test_a_chain_finishes_one_run(cluster: Slurm, uninterrupted: list[str], tmp_path: Path) -> None:
    """The first job is told to stop and is not requeued: the second, which waited for its end, goes on."""
    folder = tmp_path / "chain"
    first, second = submit(cluster, folder, "--chain", "2", "--gres", "gpu")
    assert cluster.job(second)["Dependency"] == f"afterany:{first}(unfulfilled)"
    preempt(cluster, folder, first)
    ends = [cluster.wait(number, *ENDED) for number in (first, second)]
    said = [(folder / "jobs" / "001" / f"slurm-{number}.out").read_text() for number in (first, second)]
    assert [(end["JobState"], end["Restarts"]) for end in ends] == [("COMPLETED", "0")] * 2, "\n".join(said)
    assert "the next job of the chain goes on with it" in said[0]
    assert "2 processes" in said[0], "one per GPU, in whatever way GPUs are asked for"
    assert f"resuming {folder}/checkpoints/step_" in said[1]
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert exact(read_metrics(folder)) == uninterrupted


def test_a_mistake_is_not_repeated(cluster: Slurm, tmp_path: Path) -> None:
    """A job that fails at its start ends, although the run was preempted before."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "status.json").write_text('{"state": "preempted"}')
    os.utime(tmp_path / "job" / "status.json", (1, 1))
    command = ["sbatch", "--parsable", "--nodes=1", f"--output={tmp_path}/%j.out", "launch/slurm/train.sbatch"]
    arguments = ["mmdit_debug_mup.yaml", f"run.dir={tmp_path}", "run.name=job", "data.shards=nowhere"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=variables(cluster), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    ended = cluster.wait(int(done.stdout), *ENDED)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert "data.shards" in (tmp_path / f"{ended['JobId']}.out").read_text()


def test_an_array_saves_its_trial_and_is_queued_again(cluster: Slurm, tmp_path: Path) -> None:
    """Told as by its time limit: the trial goes on from the step at which it was stopped, and nothing else saves it."""
    (tmp_path / "search.yaml").write_text(SEARCH)
    command = [
        sys.executable, "launch/search.py", "run", "--config", str(tmp_path / "search.yaml"), "--array", "1",
        "--partition", slurm.PARTITION, "--time", "00:10:00", "--gpus-per-node", "0", "--sbatch=--comment=told",
        "trials=1", *(word.replace("{page}", str(tmp_path)) for word in OVERRIDES),
        "train.steps=300", "train.checkpoint_every=1000", "train.log_every=1",
    ]  # fmt: skip
    command = once(command)
    done = subprocess.run(command, cwd=ROOT, env=variables(cluster), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    number = int(re.findall(r"batch job (\d+)", done.stdout)[0])
    study = Study.load(str(tmp_path / "searched"))
    preempt(cluster, study.run_folder(0), number)
    ended = cluster.wait(number, *ENDED)
    log = (tmp_path / "searched" / "logs" / "array_0.log").read_text()
    assert (ended["JobState"], ended["Restarts"], ended["Comment"]) == ("COMPLETED", "1", "told"), (
        f"{log}\n{ended}\n{cluster.logs()}"
    )
    assert "trial 0 is saved: start the search again to go on" in log
    assert [trial.state for trial in study.trials()] == ["complete"]
    said = (tmp_path / "searched" / "logs" / "0000_rank0.log").read_text()
    assert re.search(r"resuming .*checkpoints/step_00000[0-2]\d\d", said), said


def test_time_limits_are_read_as_slurm_does(cluster: Slurm) -> None:
    for limit in ("7", "7:00", "0:07:00", "1-2", "1-2:03", "1-02:03:00", "1:02:03:04", "1d", "0"):
        job = ["sbatch", "--parsable", "--hold", f"--time={limit}", "--output=/dev/null", "--wrap", "true"]
        done = subprocess.run(job, env=cluster.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            with pytest.raises(ConfigError):
                limit_s(limit)
            continue
        read = cluster.job(int(done.stdout))["TimeLimit"]
        cluster.run("scancel", done.stdout.strip())
        assert limit_s(limit) == (math.inf if read == "UNLIMITED" else limit_s(read)), f"{limit} is {read} to Slurm"


@pytest.mark.parametrize(
    ("given", "cpus", "memory"),
    [
        ((), "16", "4000M"),
        (("--cpus-per-gpu", "3", "--mem", "1G"), "6", "1G"),
        (("--sbatch=--mem-per-cpu=100M", "--sbatch=--cpus-per-gpu=5"), "10", "1000M"),
        (("--gres", "gpu"), "16", "4000M"),
    ],
)
def test_a_job_has_what_it_asks_for(
    cluster: Slurm, given: tuple[str, ...], cpus: str, memory: str, tmp_path: Path
) -> None:
    (number,) = submit(cluster, tmp_path / "job", *given)
    job = cluster.wait(number, "RUNNING")
    cluster.run("scancel", str(number))
    assert (job["NumCPUs"], job["TresPerNode"]) == (cpus, "gres:gpu:2")
    assert f"cpu={cpus},mem={memory}," in job["TRES"]


def test_more_than_a_node_has_is_refused_with_the_options(cluster: Slurm, tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"(?s)error: sbatch refused .*--cpus-per-gpu, --mem, --gpus-per-node, --gres"
    ):
        submit(cluster, tmp_path / "job", "--cpus-per-gpu", "33")


def srun(cluster: Slurm, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A command under srun, without torchrun."""
    return subprocess.run(
        ["srun", *command], cwd=ROOT, env=variables(cluster) | more, capture_output=True, text=True, timeout=300
    )


def test_srun_alone_trains_one_world(cluster: Slurm, uninterrupted: list[str], tmp_path: Path) -> None:
    """On two nodes, whose names do not resolve."""
    train = ("launch/train.py", "--config", "mmdit_debug_mup.yaml", f"run.dir={tmp_path}", "run.name=srun", *SMALL)
    done = srun(cluster, "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", sys.executable, *train)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished at step 50") == 1
    assert exact(read_metrics(tmp_path / "srun")) == uninterrupted


@pytest.mark.parametrize("nodes", [1, 2])
def test_preflight_where_scontrol_is_absent(cluster: Slurm, nodes: int, tmp_path: Path) -> None:
    """As in a container, which has no client of Slurm."""
    command = once(["launch/preflight.py", "--config", "mmdit_debug_mup.yaml", *ADDED["preflight"], "--json"])
    place = (f"--nodes={nodes}", "--ntasks=2", f"--ntasks-per-node={2 // nodes}")
    inside = ("env", f"PATH={tmp_path}", sys.executable, *(word.replace("{page}", str(tmp_path)) for word in command))
    done = srun(cluster, *place, *inside)
    if nodes == 2:  # nor does the name of the first node resolve
        assert done.returncode == 2
        assert "export MASTER_ADDR=ADDRESS before srun" in done.stderr
        assert "Traceback" not in done.stderr
        done = srun(cluster, *place, *inside, MASTER_ADDR="127.0.0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads(done.stdout)["processes"]) == 2


# docs/cluster.md at debug size: other values of options, and what is added to a command.
VALUES = {
    "--config": "mmdit_debug_mup.yaml", "--to": "mmdit_debug_mup.yaml", "--gpus": "2", "--nodes": "1",
    "--ntasks-per-node": "2", "--gpus-per-node": "1", "--partition": slurm.PARTITION, "--time": "00:10:00",
    "--widths": "64,128,256", "--steps": "4", "--processes": "1", "--array": "2", "--study": "{page}/searched",
    "--checkpoint": "{page}/submitted",
}  # fmt: skip
PATHS = {"configs/mmdit_18b_found.yaml": "{page}/found.yaml", "runs/NAME": "{page}/NAME", "18b": "debug"}
OVERRIDES = (
    "data.shards=synthetic", "text_encoder.path=none", "text_encoder.max_length=8", "text_encoder.width=32",
    "validation.samples=4", "train.steps=4", "train.sample_every=0", "run.dir={page}",
)  # fmt: skip
SEARCH = """
name: searched
config: mmdit_debug_mup.yaml
trials: 2
space:
  optim.lr: {log_uniform: [1e-3, 1e-2]}
"""
ADDED = {
    "preflight": ("--process-nodes", "--least", "0.01", "--clock-s", "60", *OVERRIDES),
    "ladder": ("--tolerance", "1", *OVERRIDES),
    "submit": ("run.name=submitted", *OVERRIDES),
    "train": ("run.name=by_hand", *OVERRIDES),
    "report": (),
    "branch": (),
    "transfer": (),
}
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    for line in block.splitlines()
]


def command_name(line: str) -> str:
    """What a command of the page does: the script, or the command of launch/search.py."""
    words = shlex.split(line)
    at = next(number for number, word in enumerate(words) if word.startswith("launch/"))
    return words[at + 1] if words[at] == "launch/search.py" else Path(words[at]).stem


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of everything that the page's commands make, one after another."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "search.yaml").write_text(SEARCH)
    return folder


@pytest.mark.parametrize("line", COMMANDS, ids=command_name)
def test_commands_of_the_page(
    cluster: Slurm, page: Path, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, name = shlex.split(line), command_name(line)
    command = [
        "{page}/search.yaml" if word.startswith("search/") else VALUES.get(option, word)
        for option, word in zip(["", *words], words, strict=False)
    ]
    for text, smaller in PATHS.items():
        command = [word.replace(text, smaller) for word in command]
    command = once([word.replace("{page}", str(page)) for word in (*command, *ADDED.get(name, OVERRIDES))])
    for key, value in variables(cluster).items():
        monkeypatch.setenv(key, value)
    if command[0] == "python":  # in this process, which has imported torch already
        monkeypatch.setattr(sys, "argv", command[1:])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(command[1], run_name="__main__")
        said, complaints = capsys.readouterr()
        assert ended.value.code == 0, said + complaints
    else:
        added = {"sbatch": ["--parsable", f"--output={page}/%j.out"]}.get(command[0], [])
        command = [command[0], *added, *(sys.executable if word == "python" else word for word in command[1:])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        said = done.stdout
    if name in ("submit", "train"):
        job = cluster.wait(int(re.findall(r"\d+", said)[0]), *ENDED)
        assert job["JobState"] == "COMPLETED", Path(job["StdOut"]).read_text()
        status = page / ("submitted" if name == "submit" else "by_hand") / "status.json"
        assert json.loads(status.read_text())["state"] == "finished"
    elif name == "ladder":
        found = json.loads((page / "mmdit_debug_mup_ladder" / "ladder.json").read_text())
        assert found["passed"] is True
        assert list(found["val_loss"]) == ["64", "128", "256"]
        assert (page / "mmdit_debug_mup_ladder" / "ladder.png").stat().st_size > 1000
    elif name == "preflight":
        assert "all-reduce" in said
    elif name == "run":
        assert cluster.gone(int(re.findall(r"batch job (\d+)", said)[0])), cluster.logs()
        logs = "\n".join(path.read_text() for path in (page / "searched" / "logs").glob("array_*.log"))
        assert [trial.state for trial in Study.load(str(page / "searched")).trials()] == ["complete"] * 2, logs
    elif name == "report":
        assert (page / "searched" / "report" / "index.html").is_file()
    elif name == "transfer":
        best = min(Study.load(str(page / "searched")).trials(), key=lambda trial: trial.value or math.inf)
        assert load_config(str(page / "found.yaml")).optim.lr == best.point["optim.lr"]
