"""The end of a Slurm job: requeue it if its status.json says that the run was preempted, or that a machine failed.

Called by launch/slurm/train.sbatch. A worker's exit code does not survive torchrun, the status file does. The file's
time counts too: a start that died before it wrote anything must not be repeated for ever. Nor must a machine's failure:
the job is requeued after one only if this start got as far as a checkpoint.
"""

import contextlib
import os
import re
import subprocess
from pathlib import Path

from launch.common import command, run
from trainer.config.load import load_config
from trainer.monitor.records import read_status

_MACHINE = re.compile(r"rank \d+ is lost|store is gone|^watchdog: |CUDA error|NCCL|ECC")


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--since", type=float, required=True, help="when the job started, seconds since 1970")
    parser.add_argument(
        "--exit-code", type=int, default=0, help="of srun; this command ends with it where it requeues nothing"
    )
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    assert config.run.name is not None
    folder = config.run.folder
    state, reason = state_since(folder / "status.json", arguments.since)
    if again := failed_by_a_machine(state, reason) and has_saved(folder, arguments.since):
        print(f"the run was cut off ({reason or 'killed'}), and has saved since it started", flush=True)
    if state != "preempted" and not again:
        print(f"the run is {state or 'not started'}; exit code {arguments.exit_code}", flush=True)
        return 0 if state == "finished" else arguments.exit_code
    if os.environ.get("MUDIT_REQUEUE") == "0":
        print(f"the run was {state}: the next job of the chain goes on with it", flush=True)
        return 0
    job = os.environ["SLURM_JOB_ID"]
    print(f"the run was {state}: requeueing job {job}", flush=True)
    return subprocess.run(["scontrol", "requeue", job], check=False).returncode


def state_since(status: Path, since: float) -> tuple[str | None, str]:
    """The run's state and the reason for it, if they were written after `since`; else (None, ""). A damaged status says
    as little as that of a run that was killed."""
    if not _written_since(status, since):
        return None, ""
    return read_status(status.parent) or ("running", f"{status} is damaged")


def failed_by_a_machine(state: str | None, reason: str) -> bool:
    """Whether another start may do better: after a lost rank or host, a hang, or a GPU's error, not after what a user
    must mend. The status of a run that was killed still says "running"."""
    return state == "running" or (state == "failed" and _MACHINE.search(reason) is not None)


def has_saved(folder: Path, since: float) -> bool:
    """Whether a checkpoint of the run was completed after `since`."""
    from trainer.checkpoint.checksums import META
    from trainer.checkpoint.find import complete_checkpoints

    return any(_written_since(path / META, since) for path in complete_checkpoints(folder / "checkpoints"))


def _written_since(path: Path, since: float) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return int(path.stat().st_mtime) >= int(since)  # whole seconds: `since` is one, and file systems round
    return False


if __name__ == "__main__":
    run(main)
