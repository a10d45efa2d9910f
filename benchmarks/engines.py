"""Loss of zero (stages 1, 2, 3) beside fsdp2's in bf16: the same run of the debug config, on two processes.

    python -m benchmarks.engines --output benchmarks/results/engines.json

The figure is the largest relative difference of the smoothed losses, each the mean of the last WINDOW steps.
"""

import argparse
import subprocess
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from trainer.monitor.metrics import read_metrics

STEPS, WINDOW, LIMIT = 200, 20, 0.01
PROCESSES = 2
ENGINES = {
    "fsdp2": ["parallel.engine=fsdp2"],
    **{f"zero_{stage}": ["parallel.engine=zero", f"parallel.zero_stage={stage}"] for stage in (1, 2, 3)},
}


def losses(folder: Path, name: str, overrides: list[str]) -> list[float]:
    """Training loss of each step of a fresh run."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    settings = [
        *("parallel.precision=bf16", f"train.steps={STEPS}", "train.log_every=1", "train.validate_every=0"),
        *("train.sample_every=0", "train.checkpoint_every=0", f"run.dir={folder}", f"run.name={name}"),
    ]
    command = [*launcher, "launch/train.py", "--config", "mmdit_debug_mup.yaml", *settings, *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [record["loss"] for record in read_metrics(folder / name) if "loss" in record]


def smoothed(values: list[float]) -> list[float]:
    """Means of each WINDOW values in a row."""
    sums = [0.0, *accumulate(values)]
    return [(after - before) / WINDOW for before, after in zip(sums, sums[WINDOW:], strict=False)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: smoothed(losses(Path(folder), name, overrides)) for name, overrides in ENGINES.items()}
    expected = curves["fsdp2"]
    results: dict[str, Any] = {
        name: {
            "largest_relative_difference": max(abs(a - b) / a for a, b in zip(expected, curve, strict=True)),
            "last_smoothed_loss": curve[-1],
        }
        for name, curve in curves.items()
    }
    passed = all(figures["largest_relative_difference"] <= LIMIT for figures in results.values())
    about = {"config": "mmdit_debug_mup.yaml", "precision": "bf16", "processes": PROCESSES}
    write(arguments.output, {**about, "steps": STEPS, "window": WINDOW, "passed": passed, "engines": results})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
