"""A Slurm array whose tasks are workers of a search or a forecast: each takes runs until none is left."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from launch.slurm.options import add_resources, check_time, directives, literal, option, refusal, resources
from trainer.errors import ConfigError
from trainer.files import write_atomically

NOTICE_S = 300  # before the time limit: to save and be queued again
_SCRIPT = """#!/bin/bash
{directives}
cd {here}
# srun without this has one CPU, whatever the job has.
[ -n "${{SLURM_CPUS_PER_TASK:-}}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun {command} &
worker=$!
# Before the time limit the worker saves its run, and the task is queued again. USR1: at a TERM, srun kills.
told= again=yes
trap 'told=yes; again=yes; kill -USR1 "$worker" 2>/dev/null' USR1
# A signal ends `wait`, not the worker, whose exit code bash keeps for the next `wait`.
while [ "$again" ]; do again=; wait "$worker"; ended=$?; done
[ -n "$told" ] && scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
exit "$ended"
"""


class Work(NamedTuple):
    """What the workers do. name: of the job. folder: of all runs. command: of a worker, after Python's own name.
    runs: how many, in words. num_workers: of the data."""

    name: str
    folder: Path
    command: Sequence[str]
    runs: str
    num_workers: int


def add_array(parser: argparse.ArgumentParser) -> None:
    """Give a command the options of an array."""
    parser.add_argument("--array", type=int, metavar="N", help="submit a Slurm array of N workers instead")
    parser.add_argument("--partition", help="of the array's jobs")
    parser.add_argument(
        "--time", default="24:00:00", help="limit of the array's jobs; what they leave goes on after a requeue"
    )
    parser.add_argument("--gpus-per-node", type=int, default=1, help="devices that train one run of the array")
    add_resources(parser, None, "what the site gives to a job with that many CPUs")
    parser.add_argument("--dry-run", action="store_true", help="write the array's script, and submit nothing")


def array_script(work: Work, arguments: argparse.Namespace) -> str:
    """The batch script. All nodes must reach the folder under the same path."""
    gpus = arguments.gpus_per_node
    options = [
        option("job-name", work.name), f"--array=0-{arguments.array - 1}", "--nodes=1", "--ntasks=1",
        option("time", arguments.time), option("output", f"{literal(work.folder.resolve())}/logs/array_%a.log"),
        "--open-mode=append", "--requeue", f"--signal=B:USR1@{NOTICE_S}",
        *([option("partition", arguments.partition)] if arguments.partition else []),
        *resources(arguments, work.num_workers),
    ]  # fmt: skip
    launcher = [sys.executable]
    if gpus > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
        # torchrun passes the signal on and waits; 30 s, its default, may be too short to save.
        launcher += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
        launcher += ["--shutdown-timeout", str(NOTICE_S // 2)]
    return _SCRIPT.format(
        directives=directives(options),
        here=shlex.quote(str(Path.cwd())),
        command=shlex.join([*launcher, *work.command]),
    )


def submit_array(work: Work, arguments: argparse.Namespace) -> int:
    """Write the script to the folder, which is there, and hand it to sbatch."""
    if arguments.array < 1:
        raise ConfigError("--array must be at least 1")
    check_time(arguments.time, NOTICE_S, "of every array")
    (work.folder / "logs").mkdir(exist_ok=True)
    path = work.folder / "array.sbatch"
    write_atomically(path, array_script(work, arguments))
    if arguments.dry_run:
        print(f"{path} is written; submit it with: sbatch {path}")
        return 0
    try:
        done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(f"sbatch is not on this machine; {path} is written, submit it where Slurm is") from None
    if done.returncode:
        raise refusal(path, done.stderr)
    print(f"{done.stdout.strip()}: {work.runs}, {arguments.array} workers; logs in {work.folder / 'logs'}")
    return 0
