"""From the rungs' losses to a forecast: the law, what it says of the target with an interval, and whether to believe
it."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .laws import COEFFICIENTS, Array, Grid, Laws, fit_law, refit

REPLICATES = 400
SHARE = 0.9  # of the interval
MOST_RESIDUAL = 0.1  # of the law's own reach: what it leaves, beside what it explains
MOST_LEFT_OUT = 0.02  # of the loss: how far the law of the smaller rungs may be from the largest ones,
MOST_BY_NOISE = 0.05  # and where its own interval holds them all the same
LEAST_SPAN = 8.0  # the largest rung's compute over the smallest's
# 95 % quantiles of Student's t by degrees of freedom, over the normal distribution's
_STUDENT = {1: 3.84, 2: 1.775, 3: 1.431, 4: 1.296, 5: 1.225, 6: 1.181, 7: 1.152, 8: 1.130, 10: 1.102, 15: 1.066}


class Interval(NamedTuple):
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Rung:
    """A loss that was measured. lr: relative to the target's, where rungs differ in it."""

    parameters: float
    images: float
    seed: int
    loss: float
    lr: float = 1.0

    @property
    def compute(self) -> float:
        return self.parameters * self.images


@dataclass(frozen=True)
class Fit:
    """A law with what resampling makes of it."""

    law: Laws
    draws: Laws
    of_one_run: Array
    """Noise of a run in log L, one for each of the draws."""
    count: int
    """Points, each a mean over seeds."""
    rms_residual: float
    """What the law leaves of log L, over the points."""
    left_out: Interval | None
    """(forecast - measured) / measured of the longest run of most parameters, from a law of the smaller ones, with the
    interval of that law; None where too few are left."""
    refused: list[str] = field(default_factory=list[str])
    """Why not to believe it; empty where there is no reason."""

    def loss(self, parameters: float, images: float) -> Interval:
        """Of one run of this size: with the noise of a seed, and what the law leaves."""
        value = float(np.exp(self.law.log_loss(parameters, images))[0, 0])
        drawn = self.draws.log_loss(parameters, images)[:, 0] + self.of_one_run
        return _interval(value, np.exp(drawn))

    def optimal_parameters(self, budget: float) -> Interval:
        """The size of least loss at N D = budget."""
        return _interval(float(self.law.optimal_parameters(budget)[0]), self.draws.optimal_parameters(budget))

    def budget_of(self, parameters: float) -> Interval:
        """N D at which a size is the best."""
        return _interval(float(self.law.budget_of(parameters)[0]), self.draws.budget_of(parameters))

    @property
    def has_optimum(self) -> bool:
        """Whether the losses fall with the size and with the images by so much that a best size follows."""
        optimum = self.optimal_parameters(math.prod(self.law.centre))
        share_found = float(np.mean(self.draws.both_terms_found))
        return bool(self.law.both_terms_found[0]) and share_found >= SHARE and optimum.high < 1e4 * optimum.low

    def coefficients(self) -> dict[str, Interval]:
        """The exponents, and the loss that neither size nor data takes away."""
        laws = {name: (getattr(self.law, name), getattr(self.draws, name)) for name in ("alpha", "beta", "floor")}
        return {name: _interval(float(value[0]), drawn) for name, (value, drawn) in laws.items()}


def fit_rungs(rungs: Sequence[Rung], seed: int = 0, replicates: int = REPLICATES, check: bool = True) -> Fit:
    """Fit the law and resample it. check: also from all but the largest rungs, which costs a second fit.

    Rungs that have diverged, and rates other than the target's, are no part of the law; they are reasons to refuse, as
    are a law that does not fit and one that misses what it was not shown. Raises ValueError where fewer points than
    coefficients and two more are left.
    """
    used = [rung for rung in rungs if rung.lr == 1.0 and math.isfinite(rung.loss) and rung.loss > 0]
    table = _Table.of(used)
    if len(table.loss) < COEFFICIENTS + 2:
        raise ValueError(
            f"{len(rungs)} runs leave {len(table.loss)} points (a parameter count and a number of images each, at the "
            f"target's rate, not diverged), and a law of {COEFFICIENTS} coefficients needs {COEFFICIENTS + 2}"
        )
    grid = Grid(table.n, table.d)
    law = fit_law(grid, table.loss, table.counts)
    fitted = law.log_loss(table.n, table.d)[0]
    noise = _Noise.of(table, np.log(table.loss) - fitted, np.random.default_rng(seed))
    drawn = np.exp(fitted + noise.of_points(replicates))
    draws = refit(grid, drawn, law, table.counts)
    rms = math.sqrt(float(np.mean((np.log(table.loss) - fitted) ** 2)))
    left_out = _left_out(used, replicates) if check else None
    found = Fit(law, draws, noise.of_one_run(replicates), len(table.loss), rms, left_out)
    return dataclasses.replace(found, refused=_reasons(rungs, used, table, found))


def _reasons(rungs: Sequence[Rung], used: Sequence[Rung], table: "_Table", fit: Fit) -> list[str]:
    """Why not to believe a fit, each with its numbers."""
    reasons = [
        f"the rung of {rung.parameters:.4g} parameters, {rung.images:.4g} images and seed {rung.seed} has diverged"
        for rung in rungs
        if not math.isfinite(rung.loss) and rung.lr == 1.0
    ]
    compute = [rung.compute for rung in used]
    if (span := max(compute) / min(compute)) < LEAST_SPAN:
        reasons.append(
            f"the rungs span {span:.1f} times the compute, expected at least {LEAST_SPAN:g}: add larger ones"
        )
    reach = float(np.std(np.log(table.loss)))
    if reach == 0:
        reasons.append("all losses are equal: there is no law in them")
    elif fit.rms_residual > MOST_RESIDUAL * reach:
        worst = int(np.argmax(np.abs(np.log(table.loss) - fit.law.log_loss(table.n, table.d)[0])))
        reasons.append(
            f"the law does not fit: it leaves {fit.rms_residual:.2%} of the loss, {fit.rms_residual / reach:.0%} of "
            f"what it explains (at most {MOST_RESIDUAL:.0%}); most at {table.n[worst]:.4g} parameters and "
            f"{table.d[worst]:.4g} images"
        )
    if (miss := fit.left_out) is not None:
        most = MOST_BY_NOISE if miss.low <= 0 <= miss.high else MOST_LEFT_OUT
        if abs(miss.value) > most:
            reasons.append(
                f"without the largest rungs the law misses them by {miss.value:+.2%} "
                f"[{miss.low:+.2%}, {miss.high:+.2%}] (at most {most:.0%})"
            )
    return [*reasons, *_at_the_edge(rungs)]


def _at_the_edge(rungs: Sequence[Rung]) -> list[str]:
    """Sizes that were trained at several learning rates, the best of which is the lowest or the highest."""
    groups: dict[tuple[float, float], dict[float, list[float]]] = {}
    for rung in rungs:
        groups.setdefault((rung.parameters, rung.images), {}).setdefault(rung.lr, []).append(rung.loss)
    reasons = []
    for (parameters, images), by_lr in sorted(groups.items()):
        means = {lr: float(np.mean(losses)) for lr, losses in by_lr.items()}
        if len(means) < 2:
            continue
        best = min(means, key=lambda lr: means[lr])
        if best in (min(means), max(means)):
            shown = ", ".join(f"{lr:g} x: {means[lr]:.4g}" for lr in sorted(means))
            reasons.append(
                f"at {parameters:.4g} parameters and {images:.4g} images the best learning rate is at the edge of "
                f"those tried ({shown}): the hyperparameters do not transfer to there, or were not searched"
            )
    return reasons


def _left_out(used: Sequence[Rung], replicates: int) -> Interval | None:
    largest = max(rung.parameters for rung in used)
    try:
        smaller = fit_rungs([r for r in used if r.parameters < largest], replicates=replicates, check=False)
    except ValueError:
        return None
    held = _Table.of([rung for rung in used if rung.parameters == largest])
    last = int(held.d.argmax())
    loss = smaller.loss(float(held.n[last]), float(held.d[last]))
    return Interval(*(each / float(held.loss[last]) - 1 for each in loss))


class _Table(NamedTuple):
    """Points: means over seeds [points], their counts, and each seed's deviation in log L. deviations: {(parameters,
    seed): {images: deviation}}; the runs of a trunk deviate together."""

    n: Array
    d: Array
    loss: Array
    counts: Array
    deviations: dict[tuple[float, int], dict[float, float]]

    @classmethod
    def of(cls, rungs: Sequence[Rung]) -> "_Table":
        groups: dict[tuple[float, float], list[Rung]] = {}
        for rung in rungs:
            groups.setdefault((rung.parameters, rung.images), []).append(rung)
        points = sorted(groups)
        means = {point: float(np.mean([math.log(r.loss) for r in groups[point]])) for point in points}
        deviations: dict[tuple[float, int], dict[float, float]] = {}
        for point in points:
            for rung in groups[point]:
                deviation = math.log(rung.loss) - means[point]
                deviations.setdefault((rung.parameters, rung.seed), {})[rung.images] = deviation
        n, d = (np.array([point[i] for point in points], dtype=float) for i in (0, 1))
        counts = np.array([len(groups[point]) for point in points], dtype=float)
        return cls(n, d, np.exp(np.array([means[point] for point in points])), counts, deviations)


class _Noise:
    """What stands between the law and a measurement: the seed of a trunk, and what the law leaves.

    Both are drawn anew from the residuals themselves (a bootstrap over seeds and points), widened to what so many
    degrees of freedom have lost, and by Student's t for so few of them.
    """

    def __init__(
        self, table: _Table, seeds: list[dict[float, float]], left: Array, chance: np.random.Generator
    ) -> None:
        self._table, self._seeds, self._left, self._chance = table, seeds, left, chance

    @classmethod
    def of(cls, table: _Table, residual: Array, chance: np.random.Generator) -> "_Noise":
        count = float(table.counts.mean())
        seeds: list[dict[float, float]] = []
        if count > 1:
            widen = math.sqrt(count / (count - 1))
            seeds = [{d: widen * value for d, value in trunk.items()} for trunk in table.deviations.values()]
        degrees = max(1, len(residual) - COEFFICIENTS)
        student = next((factor for most, factor in _STUDENT.items() if degrees <= most), 1.0)
        left = residual * math.sqrt(len(residual) / degrees)
        # The points' own share of the seeds' noise is no fault of the law.
        of_seeds = float(np.mean([value**2 for trunk in seeds for value in trunk.values()])) / count if seeds else 0.0
        total = float(np.mean(left**2))
        share = math.sqrt(max(0.0, 1 - of_seeds / total)) if total > 0 else 0.0
        return cls(table, seeds, student * share * (left - left.mean()), chance)

    def of_points(self, replicates: int) -> Array:
        """Noise [replicates, points] of the points' means: of each trunk together, and of each point."""
        table = self._table
        noise = self._chance.choice(self._left, (replicates, len(table.loss)))
        for n in set(table.n) if self._seeds else ():
            here = np.flatnonzero(table.n == n)
            count = max(1, round(float(table.counts[here].mean())))
            pool = np.array([[self._of_trunk(trunk, d) for d in table.d[here]] for trunk in self._seeds])
            drawn = self._chance.integers(len(pool), size=(replicates, count))
            noise[:, here] += pool[drawn].mean(axis=1)
        return noise

    def of_one_run(self, replicates: int) -> Array:
        """Noise [replicates] of one run of one seed."""
        noise = self._chance.choice(self._left, replicates)
        if self._seeds:
            noise = noise + self._chance.choice([v for trunk in self._seeds for v in trunk.values()], replicates)
        return noise

    def _of_trunk(self, trunk: dict[float, float], images: float) -> float:
        """A trunk's deviation after so many images; where it has none, that of its nearest run."""
        return trunk[min(trunk, key=lambda d: abs(math.log(d / images)))]


def _interval(value: float, drawn: Array) -> Interval:
    low, high = map(float, np.quantile(drawn, [(1 - SHARE) / 2, (1 + SHARE) / 2]))
    return Interval(value, min(low, value), max(high, value))
