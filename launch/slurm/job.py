"""The job of a run: its script from train.sbatch, and code, config and script frozen in the run folder."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data.redaction import quote
from launch.slurm.options import check_time, directives, literal, option, refusal, resources
from trainer.config.load import to_yaml
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.provenance import ROOT, commit, rooms

TEMPLATE = Path(__file__).with_name("train.sbatch")


def new_folder(config: TrainConfig) -> Path:
    """The first of runs/NAME/jobs/001, 002, ... that does not exist; it is not made here."""
    jobs = config.run.folder / "jobs"
    return jobs / f"{1 + len(list(jobs.glob('[0-9]*'))):03d}"


def options_of(a: argparse.Namespace, config: TrainConfig, folder: Path) -> list[str]:
    """sbatch's options. a: the arguments of launch/submit.py. Raises ConfigError for a time that is none."""
    check_time(a.time, a.signal_seconds, "--signal-seconds")
    return [
        option("job-name", config.run.name), f"--nodes={a.nodes}", "--ntasks-per-node=1",
        option("partition", a.partition), option("time", a.time),
        *(option(key, value) for key in ("account", "qos") if (value := getattr(a, key))),
        "--requeue" if a.chain == 1 else "--no-requeue", "--open-mode=append",
        option("output", f"{literal(folder)}/slurm-%j.out"),
        f"--signal=B:USR1@{a.signal_seconds}", *resources(a, config.data.num_workers),
    ]  # fmt: skip


def settings_of(a: argparse.Namespace, config: TrainConfig, folder: Path) -> dict[str, str]:
    """The environment that train.sbatch reads. a: the arguments of launch/submit.py. Raises ConfigError for a path that
    the job cannot name."""
    here = Path.cwd()
    if ":" in str(folder):  # modules would come from elsewhere
        raise ConfigError(f"run.dir: {quote(folder)} holds a colon, which no PYTHONPATH takes: choose another")
    settings = {
        "MUDIT_CODE": str(folder / "code"),
        "MUDIT_PYTHON": "python" if a.container or a.apptainer else sys.executable,
        "MUDIT_HOST_PYTHON": sys.executable,
        "MUDIT_PROCESSES": str(max(1, a.gpus_per_node)),
        "MUDIT_REQUEUE": str(int(a.chain == 1)),
        "MUDIT_SHUTDOWN": str(max(10, a.signal_seconds - 30)),
    }
    if a.container:
        settings["MUDIT_SRUN"] = shlex.join([
            f"--container-image={_printable(a.container)}", f"--container-mounts={_mounts(a, config, here)}",
            f"--container-workdir={here}",
            "--container-env=HF_HOME,HF_HUB_OFFLINE,OMP_NUM_THREADS,PYTHONPATH",  # else the image's own win
        ])  # fmt: skip
    if a.apptainer:
        binds = ["--bind", _mounts(a, config, here), "--pwd", str(here)]
        settings["MUDIT_INSIDE"] = shlex.join(["apptainer", "exec", "--nv", *binds, _printable(a.apptainer)])
    return settings


def _mounts(a: argparse.Namespace, config: TrainConfig, here: Path) -> str:
    """What a container sees: the repository, the runs, and what --mount names."""
    for path in (str(here), config.run.dir):
        if re.search("[,:]", path):
            raise ConfigError(f"a container: {quote(path)} holds a comma or colon, which no mount takes; move it")
    mounts = [f"{path}:{path}" for path in (str(here), config.run.dir)]
    return _printable(",".join([*mounts, *(m if ":" in m else f"{m}:{m}" for m in a.mount)]))


def _printable(text: str) -> str:
    """Raises ConfigError for what is more than a line."""
    if not text.isprintable():
        raise ConfigError(f"a container: {quote(text)} is no image or path, expected one line of characters")
    return text


def job_script(options: Sequence[str], settings: dict[str, str]) -> str:
    """train.sbatch with these options in place of its own, and with these environment variables."""
    shebang, *lines = TEMPLATE.read_text().splitlines()
    body = [line for line in lines if not line.startswith("#")]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    return "\n".join([shebang, directives(options), *exports, *body]) + "\n"


def freeze(config: TrainConfig, folder: Path, script: str) -> None:
    """Copy code, config and script there, so that a job that starts in a week runs what was checked today."""
    code = folder / "code"
    for room in (*rooms(), "configs"):
        shutil.copytree(ROOT / room, code / room, ignore=shutil.ignore_patterns("__pycache__"))
    (code / "COMMIT").write_text(f"{commit()}\n")
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "job.sbatch").write_text(script)


def submit(folder: Path, after: int | None) -> int:
    """Hand the job to sbatch; returns its number. after: the job that must end first."""
    command = ["sbatch", "--parsable", *([f"--dependency=afterany:{after}"] if after else [])]
    try:
        done = subprocess.run(
            [*command, str(folder / "job.sbatch"), str(folder / "config.yaml")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise ConfigError("sbatch is not found: run this on a login node, or look with --dry-run") from None
    if done.returncode != 0:
        raise refusal(folder / "job.sbatch", done.stderr)
    return int(done.stdout.partition(";")[0])
