"""The job of a run: its script from train.sbatch, and code, config and script frozen in the run folder."""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.load import to_yaml
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.provenance import ROOT, commit, rooms

TEMPLATE = Path(__file__).with_name("train.sbatch")


def new_folder(config: TrainConfig) -> Path:
    """The first of runs/NAME/jobs/001, 002, ... that does not exist; it is not made here."""
    jobs = Path(config.run.dir) / str(config.run.name) / "jobs"
    return jobs / f"{1 + len(list(jobs.glob('[0-9]*'))):03d}"


def options_of(a: argparse.Namespace, config: TrainConfig, folder: Path) -> list[str]:
    """sbatch's options. a: the arguments of launch/submit.py."""
    return [
        f"--job-name={config.run.name}", f"--nodes={a.nodes}", "--ntasks-per-node=1", f"--partition={a.partition}",
        f"--time={a.time}", *([f"--gpus-per-node={a.gpus_per_node}"] if a.gpus_per_node else []),
        *(f"--{key}={value}" for key in ("account", "qos") if (value := getattr(a, key))),
        "--requeue" if a.chain == 1 else "--no-requeue", "--open-mode=append", f"--output={folder}/slurm-%j.out",
        f"--signal=B:USR1@{a.signal_seconds}", *a.sbatch,
    ]  # fmt: skip


def settings_of(a: argparse.Namespace, config: TrainConfig, folder: Path) -> dict[str, str]:
    """The environment that train.sbatch reads. a: the arguments of launch/submit.py."""
    mounts = ",".join(m if ":" in m else f"{m}:{m}" for m in [str(Path.cwd()), config.run.dir, *a.mount])
    settings = {
        "MUDIT_CODE": str(folder / "code"),
        "MUDIT_PYTHON": "python" if a.container or a.apptainer else sys.executable,
        "MUDIT_HOST_PYTHON": sys.executable,
        "MUDIT_REQUEUE": str(int(a.chain == 1)),
        "MUDIT_SHUTDOWN": str(max(10, a.signal_seconds - 30)),
    }
    if a.container:
        settings["MUDIT_SRUN"] = (
            f"--container-image={a.container} --container-mounts={mounts} --container-workdir={Path.cwd()}"
            " --container-env=HF_HOME,HF_HUB_OFFLINE,OMP_NUM_THREADS,PYTHONPATH"  # else the image's own win
        )
    if a.apptainer:
        settings["MUDIT_INSIDE"] = f"apptainer exec --nv --bind {mounts} --pwd {Path.cwd()} {a.apptainer}"
    return settings


def job_script(options: Sequence[str], settings: dict[str, str]) -> str:
    """train.sbatch with these options in place of its own, and with these environment variables."""
    shebang, *lines = TEMPLATE.read_text().splitlines()
    body = [line for line in lines if not line.startswith("#")]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    return "\n".join([shebang, *(f"#SBATCH {option}" for option in options), *exports, *body]) + "\n"


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
        raise ConfigError(f"sbatch refused {folder / 'job.sbatch'}: {done.stderr.strip()}")
    return int(done.stdout.partition(";")[0])
