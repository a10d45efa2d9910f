"""Submit a run to Slurm: check the config, freeze code and config into the run folder, write the job, sbatch it.

python launch/submit.py --config mmdit_18b_mup.yaml --nodes 32 --gpus-per-node 8 --partition gpu --time 24:00:00 \\
    [--account A] [--qos Q] [--container IMAGE | --apptainer IMAGE.sif] [--mount /data] [--chain N] [--dry-run] \\
    [key=value ...]

A job that is told to stop (by its time limit, or `scancel --batch --signal=USR1 JOB`) saves and requeues itself. Where
a cluster forbids that, --chain N submits N jobs, each after the one before it. The same command again goes on with
the run; what is frozen lies in runs/NAME/jobs/NNN. --dry-run prints the script and writes nothing.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.common import run
from trainer.config.load import load_config, to_yaml
from trainer.config.resolve import resolve
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.provenance import commit

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("models", "data", "trainer", "export", "launch", "configs")
TEMPLATE = ROOT / "launch" / "slurm" / "train.sbatch"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a name under configs/")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, required=True, help="0: one process a node on its CPUs")
    parser.add_argument("--partition", required=True)
    parser.add_argument("--time", required=True, help="limit of one job, as sbatch takes it: 24:00:00")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument("--container", help="image for Pyxis (srun --container-image); the repository is mounted")
    parser.add_argument("--apptainer", metavar="IMAGE", help="image for apptainer exec --nv")
    parser.add_argument(
        "--mount", action="append", default=[], metavar="PATH[:PATH]", help="more for the container: data, encoders"
    )
    parser.add_argument("--signal-seconds", type=int, default=300, help="warning before the time limit")
    parser.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs one after another, not requeued")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="any other: --sbatch=--mem=0")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    a = parser.parse_intermixed_args()
    if a.nodes < 1 or a.gpus_per_node < 0 or a.chain < 1:
        raise ConfigError("--nodes and --chain must be at least 1, --gpus-per-node at least 0")
    if a.container and a.apptainer:
        raise ConfigError("--container and --apptainer exclude each other")
    config = load_config(a.config, a.overrides)
    # What is frozen lies in the run folder, wherever the job starts.
    placed = config.run.model_copy(update={"dir": str(Path(config.run.dir).resolve())})
    config = config.model_copy(update={"run": placed})
    resolve(config, a.nodes * max(1, a.gpus_per_node))
    warn_without_ladder(config)

    jobs = Path(config.run.dir) / str(config.run.name) / "jobs"
    folder = jobs / f"{1 + len(list(jobs.glob('[0-9]*'))):03d}"
    options = [
        f"--job-name={config.run.name}", f"--nodes={a.nodes}", "--ntasks-per-node=1", f"--partition={a.partition}",
        f"--time={a.time}", *([f"--gpus-per-node={a.gpus_per_node}"] if a.gpus_per_node else []),
        *(f"--{key}={value}" for key in ("account", "qos") if (value := getattr(a, key))),
        "--requeue" if a.chain == 1 else "--no-requeue", "--open-mode=append", f"--output={folder}/slurm-%j.out",
        f"--signal=B:USR1@{a.signal_seconds}", *a.sbatch,
    ]  # fmt: skip
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
    script = job_script(options, settings)
    if a.dry_run:
        print(script)
        return 0
    freeze(config, folder, script)
    number = None
    for _ in range(a.chain):
        number = submit(folder, number)
        print(f"job {number}: {folder}/slurm-{number}.out")
    return 0


def job_script(options: Sequence[str], settings: dict[str, str]) -> str:
    """train.sbatch with these options in the place of its own, and these settings."""
    shebang, *lines = TEMPLATE.read_text().splitlines()
    body = [line for line in lines if not line.startswith("#")]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    return "\n".join([shebang, *(f"#SBATCH {option}" for option in options), *exports, *body]) + "\n"


def freeze(config: TrainConfig, folder: Path, script: str) -> None:
    """Code, config and script, so that a job that starts in a week runs what was checked today."""
    code = folder / "code"
    for room in ROOMS:
        shutil.copytree(ROOT / room, code / room, ignore=shutil.ignore_patterns("__pycache__"))
    (code / "COMMIT").write_text(f"{commit()}\n")
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "job.sbatch").write_text(script)


def submit(folder: Path, after: int | None) -> int:
    """sbatch; returns the job's number. after: a job that must end first."""
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


def warn_without_ladder(config: TrainConfig) -> None:
    """A large model whose shape has climbed no ladder may be wrong in a way that small ones would have shown."""
    name = str(config.run.name)
    width, base = config.model.width, config.mup.base_width
    path = Path(config.run.dir) / f"{name}_ladder" / "ladder.json"
    passed = path.is_file() and json.loads(path.read_text())["passed"]
    if width > base and not passed:
        print(
            f"warning: no passed ladder in {path}: python launch/ladder.py --config {name}.yaml --widths ... first",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(main)
