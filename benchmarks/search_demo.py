"""A search on real data from end to end: run, killed in its middle, run again, report, transfer, train the target.

python -m benchmarks.search_demo --output benchmarks/results/search_demo.json --figure docs/search_demo.png
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks.machine import write
from launch.processes import kill_tree
from tests.distributed.runs import last_step
from tests.helpers.forked import environment
from tests.helpers.paths import ROOT
from trainer.monitor.metrics import read_metrics
from trainer.search.study import Study

SEARCH, TARGET = "search/demo.yaml", "mmdit_demo_mup.yaml"
STUDY = "demo_search"
KILL_IN = ("0004", 25)  # the trial in the middle of eight, and a step at which it has a checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of the target; more than its 50 of warm-up")
    parser.add_argument("--workers", type=int, default=2, help="of the search, and processes of the target")
    parser.add_argument("--folder", type=Path, default=Path("runs/search_demo"), help="removed first")
    parser.add_argument("--figure", type=Path, help="copy of the report's picture: loss against each hyperparameter")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the search")
    a = parser.parse_intermixed_args()
    shutil.rmtree(a.folder, ignore_errors=True)
    study, found = a.folder / STUDY, a.folder / "found.yaml"
    seconds: dict[str, float] = {}

    def timed(name: str, *words: str, kill_in: tuple[str, int] | None = None) -> None:
        began = time.monotonic()
        process = subprocess.Popen(words, cwd=ROOT, env=environment())
        try:
            while process.poll() is None:
                if kill_in is not None and last_step(study / kill_in[0]) >= kill_in[1]:
                    break
                time.sleep(0.2)
            assert (process.poll() is None) if kill_in else (process.returncode == 0), f"{name}: {process.returncode}"
        finally:
            kill_tree(process.pid)
            process.wait()
        seconds[name] = round(time.monotonic() - began, 1)

    search = (sys.executable, "launch/search.py")
    running = (*search, "run", "--config", SEARCH, "--workers", str(a.workers), f"run.dir={a.folder}", *a.overrides)
    timed("run_until_killed", *running, kill_in=KILL_IN)
    before = Counter(trial.state for trial in Study.load(str(study)).trials())
    timed("run_again", *running)
    timed("report", *search, "report", "--study", str(study))
    timed("transfer", *search, "transfer", "--study", str(study), "--to", TARGET, "--output", str(found))
    settings = (f"run.dir={a.folder}", "run.name=target", f"train.steps={a.steps}", f"train.validate_every={a.steps}")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(a.workers))
    timed("train", *torchrun, "launch/train.py", "--config", str(found), *settings, "train.sample_every=0")

    trials = Study.load(str(study)).trials()
    after = Counter(trial.state for trial in trials)
    best = min((t for t in trials if t.value is not None), key=lambda t: t.value or 0.0)
    records = read_metrics(a.folder / "target")
    if a.figure:
        shutil.copy(study / "report" / "losses.png", a.figure)
    whole = after["complete"] + after["diverged"] == len(trials) and records[-1]["step"] == a.steps
    write(a.output, {
        "whole": whole, "minutes": round(sum(seconds.values()) / 60, 2), "seconds": seconds,
        "trials_when_killed": dict(before), "trials_at_the_end": dict(after),
        "best": {"trial": best.number, "val_loss_ema": best.value, **best.point},
        "target": {"config": TARGET, "steps": a.steps, "val_loss_before": records[0]["val_loss"],
                   "val_loss_ema": records[-1]["val_loss_ema"]},
    })  # fmt: skip
    return 0 if whole else 1


if __name__ == "__main__":
    raise SystemExit(main())
