"""A study of many trials whose workers are killed again and again: in the end every trial is accounted for.

python -m benchmarks.search_kills --trials 80 --kills 10 --output benchmarks/results/search_kills.json
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.machine import write
from launch.common import kill_tree
from tests.distributed.runs import ROOT, environment
from trainer.metrics import read_metrics
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=80)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    chance, began = random.Random(arguments.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        config, folder = Path(scratch) / "kills.yaml", Path(scratch) / "kills"
        config.write_text(SEARCH)
        command = [
            *(sys.executable, "launch/search.py", "run", "--config", str(config), f"run.dir={scratch}"),
            *(f"trials={arguments.trials}", "--workers", str(arguments.workers)),
        ]
        kills = 0
        while True:
            process = subprocess.Popen(command, cwd=ROOT, env=environment())
            try:
                # Workers need some seconds to start; the last call runs to the end.
                process.wait(None if kills == arguments.kills else chance.uniform(10, 40))
                break
            except subprocess.TimeoutExpired:
                kills += 1
                print(f"kill {kills}", flush=True)
            finally:
                kill_tree(process.pid)
                process.wait()
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
