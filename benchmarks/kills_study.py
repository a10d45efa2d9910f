"""A study of many trials whose workers are killed again and again: in the end every trial is accounted for.

The workers are processes of this machine, or jobs of a Slurm array (as root: a Slurm is started for it).
"""

import contextlib
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch.processes import kill_tree
from tests.helpers.forked import environment
from tests.helpers.paths import ROOT
from tests.integration import slurm
from tests.integration.slurm import Slurm
from trainer.monitor.metrics import read_metrics
from trainer.search.space import point
from trainer.search.study import Study, Trial

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

WORKERS = 2


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


def kills(seed: int, count: int, scratch: Path, trials: int = 0, on_slurm: bool = False) -> Iterator[dict[str, Any]]:
    """`count` kills of all workers, and in the end whether every trial is accounted for. trials: 0 for eight a kill,
    of which the workers do less before the next kill."""
    trials = trials or 8 * count
    chance = random.Random(seed)
    config, folder = scratch / "kills.yaml", scratch / "kills"
    config.write_text(SEARCH)
    command = [
        *(sys.executable, "launch/search.py", "run", "--config", str(config), f"run.dir={scratch}"),
        f"trials={trials}",
    ]
    with contextlib.ExitStack() as stack:
        if on_slurm:
            run = of_slurm(stack.enter_context(slurm.cluster(scratch / "slurm")), command, WORKERS)
        else:
            run = of_this_machine(command, WORKERS)
        killed = 0
        # Workers need some seconds to start; the last call runs to the end.
        while not run(None if killed == count else chance.uniform(10, 40)):
            killed += 1
            yield {"moment": "study on slurm" if on_slurm else "study"}
    study = Study.load(str(folder))
    found = study.trials()
    yield {"equal": len(found) == trials and all(accounted_for(study, trial) for trial in found)}


def accounted_for(study: Study, trial: Trial) -> bool:
    """Whether a trial has the point of its number, and the value that its run logged, or a divergence."""
    if trial.point != point(study.search.space, "random", 0, trial.number):
        return False
    if trial.state == "complete":
        return trial.value == read_metrics(study.run_folder(trial.number))[-1]["val_loss_ema"]
    return trial.state == "diverged"
