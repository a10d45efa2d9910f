"""Ends of short runs of two processes whose rendezvous store is slow: each must end with exit code 0 and in silence.

    python -m benchmarks.ends --runs 50 --output benchmarks/results/ends.json

A thread that is inside the store when the interpreter ends aborts it, after everything has been saved.
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.machine import write
from tests.faults.harness import job, status

SETTINGS = (
    "train.steps=4", "train.log_every=2", "train.checkpoint_every=0", "train.validate_every=0", "train.sample_every=0",
)  # fmt: skip
SLOW_S = 0.3
PATIENCE_S = 300.0


def end_of(folder: Path) -> str:
    """How one run ended: "right", or what was wrong."""
    with job(folder, *SETTINGS, faults={"rank": None, "slow_store": SLOW_S}) as run:
        code = run.wait(PATIENCE_S)
        if "terminate called" in run.text():
            return "aborted"
    return "right" if code == 0 and status(folder)["state"] == "finished" else f"exit code {code}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    began, ends = time.monotonic(), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.runs):
            ends[end_of(Path(scratch) / f"run_{number}")] += 1
            print(dict(ends), flush=True)
    minutes = round((time.monotonic() - began) / 60, 1)
    write(arguments.output, {"runs": arguments.runs, "store_slowed_s": SLOW_S, "ends": ends, "minutes": minutes})
    return 0 if ends["right"] == arguments.runs else 1


if __name__ == "__main__":
    raise SystemExit(main())
