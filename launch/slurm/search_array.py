"""A Slurm array whose tasks are workers of one search: each takes trials until none is left."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from launch.slurm.options import check_time, directives, literal, option, refusal, resources
from trainer.errors import ConfigError
from trainer.files import write_atomically
from trainer.search.definition import Search
from trainer.search.study import Study

SEARCH = Path(__file__).resolve().parents[1] / "search.py"
NOTICE_S = 300  # before the time limit: to save and be queued again
_SCRIPT = """#!/bin/bash
{directives}
cd {here}
# srun without this has one CPU, whatever the job has.
[ -n "${{SLURM_CPUS_PER_TASK:-}}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun {command} &
worker=$!
# Before the time limit the worker saves its trial, and the task is queued again. USR1: at a TERM, srun kills.
told= again=yes
trap 'told=yes; again=yes; kill -USR1 "$worker" 2>/dev/null' USR1
# A signal ends `wait`, not the worker, whose exit code bash keeps for the next `wait`.
while [ "$again" ]; do again=; wait "$worker"; ended=$?; done
[ -n "$told" ] && scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
exit "$ended"
"""


def array_script(search: Search, arguments: argparse.Namespace) -> str:
    """The batch script. All nodes must reach the study under the same path."""
    gpus = arguments.gpus_per_node
    options = [
        option("job-name", f"search-{search.name}"), f"--array=0-{arguments.array - 1}", "--nodes=1", "--ntasks=1",
        option("time", arguments.time), option("output", f"{literal(search.folder.resolve())}/logs/array_%a.log"),
        "--open-mode=append", "--requeue", f"--signal=B:USR1@{NOTICE_S}",
        *([option("partition", arguments.partition)] if arguments.partition else []),
        *resources(arguments, search.proxy().data.num_workers),
    ]  # fmt: skip
    launcher = [sys.executable]
    if gpus > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
        # torchrun passes the signal on and waits; 30 s, its default, may be too short to save.
        launcher += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
        launcher += ["--shutdown-timeout", str(NOTICE_S // 2)]
    command = [*launcher, str(SEARCH), "run", "--config", arguments.config, *arguments.overrides]
    return _SCRIPT.format(
        directives=directives(options),
        here=shlex.quote(str(Path.cwd())),
        command=shlex.join(command),
    )


def submit_array(search: Search, arguments: argparse.Namespace) -> int:
    """Write the script to the study's folder and hand it to sbatch."""
    if arguments.array < 1:
        raise ConfigError("--array must be at least 1")
    check_time(arguments.time, NOTICE_S, "of every array")
    folder = Study.open(search).folder  # all trials are in the study before a job starts
    (folder / "logs").mkdir(exist_ok=True)
    path = folder / "array.sbatch"
    write_atomically(path, array_script(search, arguments))
    if arguments.dry_run:
        print(f"{path} is written; submit it with: sbatch {path}")
        return 0
    try:
        done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(f"sbatch is not on this machine; {path} is written, submit it where Slurm is") from None
    if done.returncode:
        raise refusal(path, done.stderr)
    print(f"{done.stdout.strip()}: {search.trials} trials, {arguments.array} workers; logs in {folder / 'logs'}")
    return 0
