"""A study of many trials whose workers are killed again and again: in the end every trial is accounted for.

python -m benchmarks.search_kills --trials 80 --kills 10 [--slurm] --output benchmarks/results/search_kills.json
"""

import argparse
import contextlib
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.machine import write
from launch.processes import kill_tree
from tests.helpers.forked import environment
from tests.helpers.paths import ROOT
from tests.integration import slurm
from tests.integration.slurm import Slurm
from trainer.monitor.metrics import read_metrics
from trainer.search.space import point
from trainer.search.study import Study

SEARCH = """
name: kills
config: mmdit_debug_mup.yaml
overrides: [train.steps=12, train.validate_every=3, train.checkpoint_every=3, train.sample_every=0, model.width=32,
            model.depth=1, validation.samples=8, run.keep_last=1]
trials: 1
space:
  optim.lr: {log_uniform: [1e-3, 1]}
  optim.clip_norm: {choices: [0.3, 1.0, 3.0]}
"""


def of_this_machine(command: list[str], workers: int) -> Callable[[float | None], bool]:
    """Let the search run for so many seconds (None: to its end) and kill it; says whether it has ended by itself."""

    def run(seconds: float | None) -> bool:
        process = subprocess.Popen([*command, "--workers", str(workers)], cwd=ROOT, env=environment())
        try:
            process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            return False
        finally:
            kill_tree(process.pid)
            process.wait()

    return run


def of_slurm(cluster: Slurm, command: list[str], workers: int) -> Callable[[float | None], bool]:
    """The same with jobs of an array. Seconds count from when they are submitted."""
    options = ("--array", str(workers), "--gpus-per-node", "0", "--partition", slurm.PARTITION, "--time", "01:00:00")
    variables = {**environment(), **cluster.environment, "PYTHONPATH": str(ROOT)}

    def run(seconds: float | None) -> bool:
        done = subprocess.run([*command, *options], cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
        [number] = re.findall(r"batch job (\d+)", done.stdout)
        if cluster.gone(int(number), timeout_s=3600 if seconds is None else seconds):
            return True
        cluster.run("scancel", "--full", "--signal=KILL", number)
        assert cluster.gone(int(number)), cluster.logs()
        return False

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=80)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slurm", action="store_true", help="jobs of a Slurm that is started for it; needs root")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.slurm and (reason := slurm.why_not()):
        print(f"skipped: {reason}")
        return 0
    chance, began = random.Random(arguments.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        config, folder = Path(scratch) / "kills.yaml", Path(scratch) / "kills"
        config.write_text(SEARCH)
        command = [
            *(sys.executable, "launch/search.py", "run", "--config", str(config), f"run.dir={scratch}"),
            f"trials={arguments.trials}",
        ]
        if arguments.slurm:
            run = of_slurm(stack.enter_context(slurm.cluster(Path(scratch) / "slurm")), command, arguments.workers)
        else:
            run = of_this_machine(command, arguments.workers)
        kills = 0
        # Workers need some seconds to start; the last call runs to the end.
        while not run(None if kills == arguments.kills else chance.uniform(10, 40)):
            kills += 1
            print(f"kill {kills}", flush=True)
        study = Study.load(str(folder))
        trials = study.trials()
        wrong = [
            t.number
            for t in trials
            if t.point != point(study.search.space, "random", 0, t.number)
            or (t.state == "complete" and read_metrics(study.run_folder(t.number))[-1]["val_loss_ema"] != t.value)
        ]
    states = Counter(trial.state for trial in trials)
    accounted = states["complete"] + states["diverged"] == len(trials) == arguments.trials and not wrong
    write(arguments.output, {"trials": len(trials), "kills": kills, "states": dict(states), "wrong": wrong,
                             "all_accounted_for": accounted, "seconds": round(time.monotonic() - began)})  # fmt: skip
    return 0 if accounted else 1


if __name__ == "__main__":
    raise SystemExit(main())
