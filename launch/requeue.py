"""The end of a Slurm job: requeue it where the run was preempted, by the run folder's status.json.

Called by launch/slurm/train.sbatch. A worker's exit code does not survive torchrun, the status file does. Its time is
looked at too: a start that died before it wrote anything must not be repeated for ever.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

from launch.common import run
from trainer.config import load_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--since", type=float, required=True, help="when the job started, seconds since 1970")
    parser.add_argument("--exit-code", type=int, default=0, help="of srun, which this command ends with otherwise")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    assert config.run.name is not None
    state = state_since(Path(config.run.dir) / config.run.name / "status.json", arguments.since)
    if state != "preempted":
        print(f"the run is {state or 'not started'}; exit code {arguments.exit_code}", flush=True)
        return 0 if state == "finished" else arguments.exit_code
    if os.environ.get("MUDIT_REQUEUE") == "0":
        print("the run was preempted: the next job of the chain goes on with it", flush=True)
        return 0
    job = os.environ["SLURM_JOB_ID"]
    print(f"the run was preempted: requeueing job {job}", flush=True)
    return subprocess.run(["scontrol", "requeue", job], check=False).returncode


def state_since(status: Path, since: float) -> str | None:
    """The run's state, if it was written after `since`."""
    try:
        # Whole seconds: `since` is one, and file systems round.
        return json.loads(status.read_text())["state"] if int(status.stat().st_mtime) >= int(since) else None
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    run(main)
