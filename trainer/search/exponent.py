"""How the best learning rate moves with the duration of a run: lr ~ duration^exponent, with an interval.

arXiv 2409.19913 finds such a law for language models, whose exponent is theirs; this one is fitted to the losses of
trainer/search/horizon.py, and kept in horizon.json beside the study.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.files import parse_json

from ..errors import ConfigError
from .statistics import (
    REPLICATES,
    Estimate,
    Losses,
    in_valley,
    interval,
    line_slope,
    mean_loss,
    near_lowest,
    optimum,
    resampled,
    seed_deviations,
)

FILE = "horizon.json"
WIDEST = 1.0
"""Of an interval that still says something: over four times the duration it is two octaves of the rate."""
Curve = Mapping[float, float]


@dataclass(frozen=True)
class Exponent:
    """exponent: of the best learning rate in the duration, with its 95 % interval. optima: {steps: log2 of the best
    rate}, in the unit of the losses' rates."""

    exponent: Estimate
    optima: Mapping[int, float]

    def __str__(self) -> str:
        found = self.exponent
        return f"best lr ~ duration^{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"

    @property
    def durations(self) -> str:
        """Where it was measured, for a person."""
        return f"{min(self.optima)} to {max(self.optima)} steps"


@dataclass(frozen=True)
class Refusal:
    """Why there is no exponent. add: log2 of rates to try as well."""

    reasons: Sequence[str]
    add: Sequence[float] = ()


def fit_exponent(losses: Losses, seed: int = 0) -> Exponent | Refusal:
    """Slope of log2 of the best rate over log2 of the steps.

    losses: {steps: {log2 rate: loss of each seed}}; one that is not finite has diverged. The best rate is the minimum
    of a parabola through the lowest mean and its neighbours. The interval is the wider of two: resampling the seeds'
    deviations, where there are seeds, and resampling the residuals of all parabolas, with Student's t for their number,
    because a valley that is no parabola shifts its minimum alike for every seed. Seeds of different durations are drawn
    by themselves: those of a trunk deviate alike, so that their slope is better known than the interval says.
    """
    curves = {steps: {x: mean_loss(values) for x, values in losses[steps].items()} for steps in sorted(losses)}
    edges = {steps: edge for steps, curve in curves.items() if (edge := _edge(curve))}
    if edges:
        return Refusal([f"{n} steps: {why}" for n, (why, _) in edges.items()], sorted({x for _, x in edges.values()}))
    chance = random.Random(seed)
    drawn = [_by_residuals(curves, chance)]
    if len(next(iter(losses[min(losses)].values()))) > 1:
        drawn.append(_by_seeds(losses, curves, chance))
    elif drawn == [None]:
        return Refusal(["one seed and three rates near each best loss say nothing of the noise: more --seeds or --lrs"])
    doublings = [math.log2(steps) for steps in curves]
    optima = {steps: optimum(curve) for steps, curve in curves.items()}
    slope = line_slope(doublings, list(optima.values()))
    found = [
        interval([line_slope(doublings, [optimum(curve) for curve in replicate]) for replicate in replicates], slope)
        for replicates in drawn
        if replicates is not None
    ]
    ends = min(slope, *(each.low for each in found)), max(slope, *(each.high for each in found))
    exponent = Exponent(Estimate(slope, *ends), optima)
    if ends[1] - ends[0] > WIDEST:
        return Refusal([f"{exponent} is wider than {WIDEST:g}: more --seeds or --lrs, or --branches further apart"])
    return exponent


def _by_seeds(losses: Losses, curves: Mapping[int, Curve], chance: random.Random) -> Iterator[list[Curve]]:
    """Replicates of all curves, by the deviations of the seeds."""
    deviations = {steps: seed_deviations(losses[steps]) for steps in curves}
    for _ in range(REPLICATES):
        yield [resampled(curve, deviations[steps], chance) for steps, curve in curves.items()]


def _by_residuals(curves: Mapping[int, Curve], chance: random.Random) -> Iterator[list[Curve]] | None:
    """Replicates of all curves, by what the parabolas leave; None where they leave nothing."""
    left: list[float] = []
    spare = 0
    for curve in curves.values():
        xs = _finite(curve)
        x = np.array([xs[i] for i in near_lowest([curve[x] for x in xs])])
        if len(x) > 3:
            y, about = np.array([curve[v] for v in x]), x - x.mean()
            left += (y - np.polyval(np.polyfit(about, y, 2), about)).tolist()
            spare += len(x) - 3
    if not spare:
        return None
    wide = math.sqrt(len(left) / spare)  # the parabolas have taken some of the noise

    def replicates() -> Iterator[list[Curve]]:
        for _ in range(REPLICATES):
            student = math.sqrt(chance.gammavariate(spare / 2, 2) / spare)
            yield [
                {x: curve[x] + wide * chance.choice(left) / student for x in _finite(curve)}
                for curve in curves.values()
            ]

    return replicates()


def _finite(curve: Curve) -> list[float]:
    return sorted(x for x, loss in curve.items() if math.isfinite(loss))


def _edge(curve: Curve) -> tuple[str, float] | None:
    """Why the rates do not enclose the best one, and the log2 rate that is missing; None where they do.

    Where the neighbour was tried and is no part of the valley, it is one between the two.
    """
    tried, finite = sorted(curve), _finite(curve)
    gap = tried[1] - tried[0] if len(tried) > 1 else 1.0
    if not finite:
        return "all rates diverged", tried[0] - gap
    valley = sorted(set(in_valley(curve)) & set(finite))
    best = min(valley, key=curve.__getitem__)
    for side, sign, beyond in (
        ("lowest", -1, [x for x in tried if x < best]),
        ("highest", 1, [x for x in tried if x > best]),
    ):
        if not beyond:
            return f"the best rate is the {side} that was tried", best + sign * gap
        if best == (valley[0] if sign < 0 else valley[-1]):
            nearest = min(beyond, key=lambda x: abs(x - best))
            return f"the best rate is the {side} that is near the best loss", (best + nearest) / 2
    if not valley[0] <= (found := optimum(curve)) <= valley[-1]:
        return "the parabola's minimum lies beyond the rates", valley[0] - gap if found < valley[0] else valley[
            -1
        ] + gap
    return None


def read_exponent(study: Path) -> Exponent | None:
    """As measured in a study's folder; None where it was not. Raises ConfigError where horizon.json is damaged."""
    path = study / FILE
    try:
        found = parse_json(path.read_bytes())
        low, high = found["interval"]
        estimate = Estimate(*(float(x) for x in (found["exponent"], low, high)))
        optima = {int(steps): float(x) for steps, x in zip(found["durations"], found["log2_lr"], strict=True)}
        if not -math.inf < estimate.low <= estimate.value <= estimate.high < math.inf:
            raise ValueError("its interval does not hold its exponent")
        if len(optima) < 2 or min(optima) < 1:
            raise ValueError("it needs two durations")
        return Exponent(estimate, optima)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}): give `search.py horizon` again, which writes it from its runs, or remove it "
            "for the exponent -1/2 of the rule"
        ) from None
