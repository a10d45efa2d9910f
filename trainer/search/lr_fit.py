"""The best learning rate of a study: the minimum of a parabola in log2 lr through all good trials, with an interval.

The best of many random draws is the luckiest one: its other keys and its noise are in its loss as well, and say nothing
about its learning rate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .space import Dimension
from .statistics import DIVERGED_AT, REPLICATES, Estimate, interval
from .study import Trial

LR = "optim.lr"

WINDOW = 2.0
"""Octaves on either side of the minimum within which trials are fitted: further away a valley is no parabola."""
WIDEST = 2.0
"""Octaves of the widest interval that still says where a minimum is."""
SPARE = 2
"""The fewest trials beyond the number of coefficients."""
_PLACES = 1001
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LrFit:
    """optimum: log2 of the best learning rate, with its 95 % interval; None where nothing could be fitted. trials: how
    many were fitted. refused: why the optimum is not to be taken; None where it is. noise: standard deviation of a
    trial's loss about the fit."""

    optimum: Estimate | None
    trials: int
    refused: str | None
    noise: float = 0.0

    @property
    def region(self) -> Estimate | None:
        """The optimum as a learning rate; None where it is refused."""
        if self.optimum is None or self.refused is not None:
            return None
        return Estimate(*(2.0**x for x in (self.optimum.value, self.optimum.low, self.optimum.high)))

    def __str__(self) -> str:
        if (found := self.region) is None:
            return f"no minimum of a fit: {self.refused}"
        return f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}] by the fit over {self.trials} trials"


def fit_of(space: Sequence[Dimension], done: Sequence[Trial]) -> LrFit | None:
    """The fit to the finished trials of a study; None where it did not search the learning rate."""
    if not any(d.key == LR and d.numeric and d.ends[0] != d.ends[-1] for d in space):
        return None
    others = [d for d in space if d.key != LR]
    columns = [[x for d in others for x in _columns(d, trial)] for trial in done]
    return fit_lr([math.log2(float(t.point[LR] or 0)) for t in done], [t.value or 0.0 for t in done], columns)


def _columns(dimension: Dimension, trial: Trial) -> list[float]:
    """A searched value as numbers: itself, its logarithm, or for values without an order which of the choices it is."""
    value = trial.point[dimension.key]
    if not dimension.numeric:
        return [float(value == choice) for choice in (dimension.choices or ())[1:]]
    return [math.log2(float(value or 0)) if dimension.log else float(value or 0)]


def fit_lr(
    log2_lr: Sequence[float], losses: Sequence[float], others: Sequence[Sequence[float]], seed: int = 0
) -> LrFit:
    """Least squares of the loss on log2 lr, its square, its cube and what else was searched, which enters linearly.

    The cube is there because a valley is steeper above its minimum than below, which draws a parabola's minimum down.
    Where the trials are too few it is left out, and after it the others.

    others: the same number of columns for each trial. A trial with a loss above DIVERGED_AT times the best is no part
    of the valley, and of the valley those within WINDOW of the minimum count. The interval resamples the residuals,
    widened as Student's t is where trials are few; that the window was chosen by the same trials is not in it.
    """
    x, y = np.asarray(log2_lr, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    more = np.asarray(others, dtype=np.float64).reshape(len(x), -1)
    valley = y <= max(y.min(), DIVERGED_AT * y.min())
    if (tried := len(np.unique(x[valley]))) < 3:
        why = f"{tried} of the learning rates came near the best loss, a parabola needs 3"
        return LrFit(None, int(valley.sum()), why)
    if valley.sum() < 3 + SPARE:
        return LrFit(
            None, int(valley.sum()), f"{valley.sum()} trials came near the best loss, and it needs {3 + SPARE}"
        )
    near, minimum = valley, float(x[y.argmin()])
    for _ in range(20):  # the window follows the minimum
        within = valley & (abs(x - minimum) <= WINDOW)
        if within.sum() < 3 + SPARE or (near is not valley and (within == near).all()):
            break
        near = within
        minimum = _Valley.of(x[near], y[near], more[near]).minimum
    found = _Valley.of(x[near], y[near], more[near])
    optimum = interval(found.resampled(seed).tolist(), found.minimum)
    refused = _refusal(optimum, found, (float(x[valley].min()), float(x[valley].max())))
    return LrFit(optimum, int(near.sum()), refused, found.noise)


@dataclass(frozen=True)
class _Valley:
    """A fit to some trials. places: where its minimum is looked for, between the lowest and the highest of the trials'
    log2 lr; powers: [degree + 1, places] of these, about `centre`."""

    places: Array
    powers: Array
    inverse: Array
    fitted: Array
    residuals: Array
    spare: int

    @classmethod
    def of(cls, x: Array, y: Array, more: Array) -> "_Valley":
        more = more[:, np.ptp(more, axis=0) > 0]
        room = len(x) - SPARE
        degree = 3 if room >= 4 + more.shape[1] and len(np.unique(x)) > 4 else 2
        more = more[:, : more.shape[1] if room >= degree + 1 + more.shape[1] else 0]
        centre = x.mean()
        places = np.linspace(x.min(), x.max(), _PLACES)
        design = np.column_stack([np.vander(x - centre, degree + 1, increasing=True), more - more.mean(axis=0)])
        inverse = np.linalg.pinv(design)
        fitted = design @ (inverse @ y)
        spare = len(x) - int(np.linalg.matrix_rank(design))
        powers = np.vander(places - centre, degree + 1, increasing=True).T
        return cls(places, powers, inverse[: degree + 1], fitted, y - fitted, max(1, spare))

    @property
    def minimum(self) -> float:
        return float(self._minima(self.fitted[None])[0])

    @property
    def noise(self) -> float:
        return float(np.sqrt((self.residuals**2).sum() / self.spare))

    def resampled(self, seed: int) -> Array:
        """Minima of REPLICATES fits to the fitted losses with residuals drawn anew."""
        chance, count = np.random.default_rng(seed), len(self.residuals)
        drawn = self.residuals[chance.integers(count, size=(REPLICATES, count))] * np.sqrt(count / self.spare)
        student = np.sqrt(chance.chisquare(self.spare, size=(REPLICATES, 1)) / self.spare)
        return self._minima(self.fitted + drawn / student)

    def _minima(self, losses: Array) -> Array:
        """[R, trials] -> [R]."""
        return self.places[(losses @ self.inverse.T @ self.powers).argmin(axis=1)]


def _refusal(found: Estimate, fit: _Valley, valley: tuple[float, float]) -> str | None:
    """Why a minimum is not to be taken. valley: the lowest and the highest log2 lr near the best loss."""
    ends = float(fit.places[0]), float(fit.places[-1])
    fitted = f"the learning rates near the best loss ({2.0 ** ends[0]:.4g} to {2.0 ** ends[1]:.4g})"
    inner = ends[0] < found.value < ends[1]
    if inner and found.low <= ends[0] and found.high >= ends[1]:
        return f"the losses do not tell where in {fitted} it lies"
    if not inner or found.low <= ends[0] or found.high >= ends[1]:
        side = 0 if found.value <= ends[0] or (inner and found.low <= ends[0]) else 1
        wider = ": widen the range of optim.lr" if ends[side] == valley[side] else ""
        return f"its 95 % interval reaches the {('lower', 'upper')[side]} end of {fitted}{wider}"
    if (width := found.high - found.low) > WIDEST:
        return f"its 95 % interval is {width:.1f} octaves wide"
    return None
