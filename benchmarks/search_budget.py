"""How many trials of a search find the same learning rate? Subsets of a finished study, by the fit and by the best.

    python -m benchmarks.search_budget --study runs/NAME --output benchmarks/results/search_budget.json

Of each size subsets of the trials that ended are drawn, diverged ones among them, because they are paid for too. Each
gives a learning rate as `transfer` does (the fit's, or the best trial's where the fit has no minimum), and the best
trial's alone; counted is how often these lie within --octaves of what all trials give. A subset is a part of what it is
compared with, so that this flatters the larger ones: the last row is right by definition. The study's own interval,
stored beside, says how well the whole of it knows.
"""

import argparse
import dataclasses
import math
import random
import statistics
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from launch.common import run
from trainer.errors import ConfigError
from trainer.search.lr_fit import LR, fit_of
from trainer.search.report import completed
from trainer.search.space import Dimension
from trainer.search.study import Study, Trial

ENOUGH = 0.9
"""Share of the subsets of a size that must agree."""


def log2_lr(trial: Trial) -> float:
    return math.log2(float(trial.point[LR] or 0))


def transferred(space: tuple[Dimension, ...], done: list[Trial]) -> tuple[float, bool]:
    """(log2 of the learning rate that transfer would write, whether it is the fit's) of trials, best first."""
    fit = fit_of(space, done)
    if fit is None or fit.optimum is None or fit.region is None:
        return log2_lr(done[0]), False
    return fit.optimum.value, True


def row(study: Study, ended: list[Trial], done: list[Trial], size: int, draws: int, octaves: float) -> dict[str, Any]:
    """What subsets of one size find. done: the good trials among those that ended, best first."""
    whole, best = transferred(study.search.space, done)[0], log2_lr(done[0])
    distances: dict[str, list[float]] = {"fit": [], "best": []}
    fits, empty = 0, 0
    for draw in range(draws):
        numbers = {trial.number for trial in random.Random(f"{size}/{draw}").sample(ended, size)}
        drawn = [trial for trial in done if trial.number in numbers]
        if not drawn:
            empty += 1
            continue
        found, by_fit = transferred(study.search.space, drawn)
        fits += by_fit
        distances["fit"].append(abs(found - whole))
        distances["best"].append(abs(log2_lr(drawn[0]) - best))
    return {
        "trials": size,
        "by_the_fit": fits / draws,
        "without_a_good_trial": empty / draws,
        **{
            f"{name}_{key}": round(value, 4)
            for name, found in distances.items()
            for key, value in (
                ("within", sum(d <= octaves for d in found) / draws),
                ("median_octaves", statistics.median(found)),
            )
        },
    }


def enough(rows: list[dict[str, Any]], name: str) -> int:
    """The fewest trials from which on at least ENOUGH of the subsets agree."""
    last = [r["trials"] for r in rows if r[f"{name}_within"] < ENOUGH]
    return min(r["trials"] for r in rows if r["trials"] > max(last, default=0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, help="the study's folder, or its name under runs/")
    parser.add_argument("--draws", type=int, default=200, help="subsets of each size")
    parser.add_argument("--octaves", type=float, default=0.1, help="that count as the same learning rate")
    parser.add_argument("--output", type=Path, required=True)
    a = parser.parse_args()
    study = Study.load(a.study)
    done = completed(study)
    if (fit := fit_of(study.search.space, done)) is None:
        raise ConfigError(f"{study.folder} did not search {LR}")
    ended = [trial for trial in study.trials() if trial.state in ("complete", "diverged")]
    sizes = [*range(5, len(ended), 5), len(ended)]
    rows = [row(study, ended, done, size, a.draws, a.octaves) for size in sizes]
    write(
        a.output,
        {
            "config": study.search.config,
            "overrides": list(study.search.overrides),
            "space": [dataclasses.asdict(d) for d in study.search.space],
            "ended": len(ended),
            "good": len(done),
            "octaves": a.octaves,
            "draws": a.draws,
            "fit": dataclasses.asdict(fit),
            "best_log2_lr": log2_lr(done[0]),
            "enough": {"share": ENOUGH, "fit": enough(rows, "fit"), "best": enough(rows, "best")},
            "rows": rows,
            "trials": [{"state": t.state, "loss": t.value, **t.point} for t in ended],
        },
    )
    return 0


if __name__ == "__main__":
    run(main)
