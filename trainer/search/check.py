"""Does the best learning rate of a study stay at another width? Three runs there: half of it, itself, and twice it."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import ConfigError
from ..files import write_atomically
from .definition import Search
from .lr_fit import LR, fit_of
from .report import completed
from .space import Dimension, as_overrides
from .statistics import REPLICATES, Estimate, interval
from .study import Study

TOLERANCE = 0.5
"""Octaves within which an optimum has not moved: there the loss hardly changes."""
Verdict = Literal["stays", "moved", "open"]


@dataclass(frozen=True)
class Check:
    """losses: of half the learning rate, of itself and of twice it, infinite where a run diverged. shift: octaves from
    it to the minimum of the parabola through them; None where the two upper ones cannot be compared."""

    width: int
    lr: float
    losses: tuple[float, float, float]
    shift: Estimate | None
    verdict: Verdict
    why: str

    def __str__(self) -> str:
        rows = "\n".join(
            f"  {self.lr * factor:<10.4g} val_loss_ema {loss:.4g}"
            for factor, loss in zip((0.5, 1.0, 2.0), self.losses, strict=True)
        )
        said = {"stays": "has not moved", "moved": "HAS MOVED", "open": "cannot be told"}[self.verdict]
        return f"width {self.width}, optim.lr\n{rows}\nthe optimum {said}: {self.why}"


def check_search(study: Study, width: int) -> Search:
    """The three runs as a search of their own, beside the study's: its best trial at that width, with the learning rate
    that `transfer` writes. Raises ConfigError where the study did not search it."""
    if study.proxy.optim.kind == "muon":
        raise ConfigError(
            f"{study.folder} is of optim.kind muon: the check moves {LR} alone, which is AdamW's. Search again at "
            f"model.width={width} instead"
        )
    done = completed(study)
    best, fit = done[0], fit_of(study.search.space, done)
    if fit is None:
        raise ConfigError(f"{study.folder} did not search {LR}: there is no optimum to look for again")
    lr = fit.region.value if fit.region else float(best.point[LR] or 0)
    others = {key: value for key, value in best.point.items() if key != LR}
    rates = tuple(float(f"{lr * factor:.4g}") for factor in (0.5, 1.0, 2.0))
    return dataclasses.replace(
        study.search,
        name=f"{study.search.name}_width{width}",
        overrides=(*study.search.overrides, *as_overrides(others), f"model.width={width}"),
        space=(Dimension(LR, "choices", rates),),
        sampler="grid",
        start=None,
        trials=3,
        halving=None,
        target=None,
        published=None,
    )


def write_search(search: Search) -> Path:
    """The search as a file in its folder, which `search.py run` takes; JSON is YAML."""
    [lr] = search.space
    data = {
        "name": search.name,
        "config": search.config,
        "overrides": list(search.overrides),
        "space": {lr.key: {lr.scale: list(lr.values)}},
        "sampler": search.sampler,
        "seed": search.seed,
        "seeds": search.seeds,
    }
    search.folder.mkdir(parents=True, exist_ok=True)
    path = search.folder / "search.yaml"
    write_atomically(path, json.dumps(data, indent=1) + "\n")
    return path


def judge(study: Study, checked: Study) -> Check:
    """The verdict of the three runs, with the noise of a trial in the first study. Raises ConfigError unless all three
    have ended."""
    trials = sorted(checked.trials(), key=lambda trial: float(trial.point[LR] or 0))
    rates = [float(trial.point[LR] or 0) for trial in trials]
    if any(trial.state not in ("complete", "diverged") for trial in trials):
        raise ConfigError(f"{checked.folder}: not all of its runs have ended; the same command goes on with them")
    low, own, high = (math.inf if trial.value is None else trial.value for trial in trials)
    fit = fit_of(study.search.space, completed(study))
    noise = fit.noise if fit is not None else 0.0
    if noise == 0.0:  # of a study without enough trials to tell
        width, why = checked.proxy.model.width, "the study's own trials are too few to tell their noise: give it more"
        return Check(width, rates[1], (low, own, high), None, "open", why)
    return compared(checked.proxy.model.width, rates[1], (low, own, high), noise)


def compared(width: int, lr: float, losses: tuple[float, float, float], noise: float) -> Check:
    """The verdict on losses at half of lr, at lr and at twice it. noise: standard deviation of a loss."""
    shift = _shift(losses, noise) if all(map(math.isfinite, losses)) else None
    verdict, why = _verdict(losses, shift)
    return Check(width, lr, losses, shift, verdict, why)


def _shift(losses: tuple[float, float, float], noise: float, seed: int = 0) -> Estimate:
    """Octaves from the middle to the minimum of the parabola through three losses an octave apart, between the outer
    two; the interval draws losses about the measured ones, with the standard deviation `noise`."""

    def minima(y: np.ndarray) -> np.ndarray:
        bend, slope = (y[:, 0] + y[:, 2] - 2 * y[:, 1]) / 2, (y[:, 2] - y[:, 0]) / 2
        vertex = np.clip(-slope / np.where(bend > 0, 2 * bend, 1.0), -1, 1)
        return np.where(bend > 0, vertex, np.where(slope > 0, -1.0, 1.0))

    measured = np.array([losses])
    drawn = measured + noise * np.random.default_rng(seed).standard_normal((REPLICATES, 3))
    return interval(minima(drawn).tolist(), float(minima(measured)[0]))


def _verdict(losses: tuple[float, float, float], shift: Estimate | None) -> tuple[Verdict, str]:
    low, own, high = losses
    if math.isinf(low) and not math.isinf(own):
        return "open", "half of it diverged, which says nothing of learning rates: look at that run"
    if math.isinf(own) or (math.isinf(high) and low < own):
        return "moved", "it lies lower than the study's, above which runs diverge"
    if shift is None:
        return "stays", "half of it is worse, and twice it diverges: it lies less than an octave away"
    octaves = f"{shift} octaves from the study's"
    if shift.low <= -1 or shift.high >= 1:
        if abs(shift.value) < 1:
            return "open", f"{octaves}, and a trial's noise lets it lie an octave away: give the search more seeds"
        return "moved", f"{octaves} or further"
    if abs(shift.value) <= TOLERANCE:
        return "stays", octaves
    return ("moved", octaves) if shift.low > 0 or shift.high < 0 else ("open", f"{octaves}: give the search more seeds")
