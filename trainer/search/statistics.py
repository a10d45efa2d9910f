"""Statistics of losses over hyperparameters: the optimum by a quadratic fit, with bootstrap intervals.

All learning rates and widths enter as log2. Random numbers come from a fixed seed: the same data give the same figures.
"""

import itertools
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REPLICATES = 1000
WINDOW = 2
"""Grid points on either side of the best one that the parabola is fitted to."""
DIVERGED_AT = 1.5
"""A mean loss above so many times the best one at its width is no part of the valley."""
Losses = Mapping[int, Mapping[float, Sequence[float]]]
"""{width: {log2 lr: loss of each seed}}; every seed saw the same data and noise at all widths and learning rates."""


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def quadratic_minimum(x: Sequence[float], y: Sequence[float], window: int = WINDOW) -> float:
    """Minimum of the least-squares parabola through the lowest point and its neighbours.

    At most one step beyond the range. Where the points do not bend upwards, the lowest point itself.
    """
    order = sorted(range(len(x)), key=lambda i: x[i])
    xs, ys = [x[i] for i in order], [y[i] for i in order]
    best = min(range(len(xs)), key=ys.__getitem__)
    near = near_lowest(ys, window)
    if len(near) < 3:
        return xs[best]
    px, py = [xs[i] - xs[best] for i in near], [ys[i] for i in near]
    # The least-squares fit of y on 1, x and x^2: the bend is the slope of y on what 1 and x leave of x^2. By hand,
    # because numpy.polyfit finds a bend in points that have none (equal losses) by its rounding, and takes three times
    # as long, which a thousand replicates feel.
    mean_x, mean_q, mean_y = statistics.fmean(px), statistics.fmean(v * v for v in px), statistics.fmean(py)
    sxx = sum((v - mean_x) ** 2 for v in px)
    of_q = sum((v - mean_x) * (v * v - mean_q) for v in px) / sxx
    of_y = sum((v - mean_x) * (u - mean_y) for v, u in zip(px, py, strict=True)) / sxx
    rest = [v * v - mean_q - of_q * (v - mean_x) for v in px]
    bend = sum(r * u for r, u in zip(rest, py, strict=True)) / sum(r * r for r in rest)
    slope = of_y - bend * of_q
    if bend <= 0:
        return xs[best]
    step = (xs[-1] - xs[0]) / (len(xs) - 1)
    return min(max(xs[best] - slope / (2 * bend), xs[0] - step), xs[-1] + step)


def near_lowest(y: Sequence[float], window: int = WINDOW) -> list[int]:
    """Which points a parabola is fitted to: the lowest and its neighbours, without what is no part of the valley."""
    best = min(range(len(y)), key=y.__getitem__)
    return [i for i in range(max(0, best - window), best + window + 1) if i < len(y) and y[i] <= DIVERGED_AT * y[best]]


def line_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of y over x."""
    return statistics.linear_regression(x, y).slope


def interval(values: Sequence[float], value: float, share: float = 0.95) -> Estimate:
    """`value` with the central `share` of its replicates."""
    ordered = sorted(values)

    def quantile(q: float) -> float:
        position = q * (len(ordered) - 1)
        below = math.floor(position)
        above = min(below + 1, len(ordered) - 1)
        # As numpy.quantile, which gives NaN here: infinities have no difference.
        if ordered[below] == ordered[above] or position == below:
            return ordered[below]
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    return Estimate(value, quantile((1 - share) / 2), quantile((1 + share) / 2))


# ---------------------------------------------------------------------------------------------------- transfer study


@dataclass(frozen=True)
class Transfer:
    """What a sweep of learning rate x width shows.

    optima: log2 of the best learning rate by width. shift: its change in octaves per doubling of the width. regret: the
    loss that the narrowest one's best learning rate costs the widest model; gain: what that wins over the narrowest.
    wider_is_better: {log2 lr: largest rise of the mean loss from one width to the next, and the standard error of it},
    at the learning rates where no width diverges.
    """

    optima: dict[int, Estimate]
    at_edge: list[int]
    shift: Estimate
    regret: Estimate
    gain: float
    seed_std: float
    wider_is_better: dict[float, tuple[float, float]]

    @property
    def wider_at_least_as_good(self) -> bool:
        """No rise that two standard errors do not explain."""
        return all(rise <= 2 * error for rise, error in self.wider_is_better.values())


def transfer(losses: Losses, seed: int = 0) -> Transfer:
    """Statistics of a sweep; a loss that is not finite counts as diverged."""
    widths = sorted(losses)
    means = {w: {lr: mean_loss(values) for lr, values in losses[w].items()} for w in widths}
    centred = {w: seed_deviations(losses[w]) for w in widths}
    chance = random.Random(seed)
    doublings = [math.log2(w) for w in widths]

    def figures(curves: Mapping[int, Mapping[float, float]]) -> tuple[list[float], float, float]:
        optima = [optimum(curves[w]) for w in widths]
        return optima, line_slope(doublings, optima), _regret(curves[widths[-1]], optima[0])

    optima, shift, regret = figures(means)
    replicates = [figures({w: resampled(means[w], centred[w], chance) for w in widths}) for _ in range(REPLICATES)]
    narrow, wide = (min(filter(math.isfinite, means[w].values())) for w in (widths[0], widths[-1]))
    spreads = [statistics.variance(v) for w in widths for lr in in_valley(means[w]) if len(v := centred[w][lr]) > 1]
    return Transfer(
        optima={w: interval([r[0][i] for r in replicates], optima[i]) for i, w in enumerate(widths)},
        at_edge=[w for i, w in enumerate(widths) if not min(means[w]) < _lowest(means[w]) < max(means[w])],
        shift=interval([r[1] for r in replicates], shift),
        regret=interval([r[2] for r in replicates], regret),
        gain=narrow - wide,
        seed_std=math.sqrt(statistics.fmean(spreads)) if spreads else 0.0,
        wider_is_better=_rises(losses, widths, means),
    )


def mean_loss(values: Sequence[float]) -> float:
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.inf


def _lowest(curve: Mapping[float, float]) -> float:
    return min(curve, key=curve.__getitem__)


def optimum(curve: Mapping[float, float]) -> float:
    finite = {lr: loss for lr, loss in curve.items() if math.isfinite(loss)}
    return quadratic_minimum(list(finite), list(finite.values()))


def _regret(curve: Mapping[float, float], lr: float) -> float:
    """Loss at `lr`, between the measured ones by linear interpolation, less the lowest measured loss."""
    points = sorted((x, y) for x, y in curve.items() if math.isfinite(y))
    x = min(max(lr, points[0][0]), points[-1][0])
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) - min(y for _, y in points)
    return 0.0


def in_valley(means: Mapping[float, float]) -> list[float]:
    """The learning rates neither so high nor so low that their loss is far above the best."""
    lowest = min(means.values())
    return [lr for lr, mean in means.items() if mean <= max(lowest, DIVERGED_AT * lowest)]


def seed_deviations(curve: Mapping[float, Sequence[float]]) -> dict[float, list[float]]:
    """Deviations of each seed from the mean at its learning rate, less what the seed adds at all of them: data and
    initial weights that are easier everywhere do not move an optimum. Widened by sqrt(n / (n - 1)), as a sample's
    standard deviation is. Zero outside the valley: how far one seed ran away is no noise of a valley."""
    finite = {lr: list(values) for lr, values in curve.items() if all(map(math.isfinite, values))}
    count = min(map(len, finite.values()))
    means = {lr: statistics.fmean(values) for lr, values in finite.items()}
    valley = in_valley(means)
    common = [statistics.fmean(finite[lr][k] - means[lr] for lr in valley) for k in range(count)]
    widen = math.sqrt(count / (count - 1)) if count > 1 else 1.0
    deviations = {lr: [widen * (finite[lr][k] - means[lr] - common[k]) for k in range(count)] for lr in valley}
    return {lr: deviations.get(lr, [0.0] * count) for lr in finite}


def resampled(
    means: Mapping[float, float], centred: Mapping[float, Sequence[float]], chance: random.Random
) -> dict[float, float]:
    """A bootstrap replicate of the mean curve: deviations drawn with replacement, each learning rate by itself."""
    return {
        lr: means[lr] + statistics.fmean(chance.choices(deviations, k=len(deviations)))
        for lr, deviations in centred.items()
    }


def _rises(
    losses: Losses, widths: Sequence[int], means: Mapping[int, Mapping[float, float]]
) -> dict[float, tuple[float, float]]:
    rises = {}
    for lr in sorted(set.intersection(*(set(in_valley(means[w])) for w in widths))):
        steps = []
        for narrow, wide in itertools.pairwise(widths):
            differences = [b - a for a, b in zip(losses[narrow][lr], losses[wide][lr], strict=True)]
            error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
            steps.append((statistics.fmean(differences), error))
        rises[lr] = max(steps, key=lambda step: step[0])
    return rises


# ------------------------------------------------------------------------------------------------------- best region


def best_region(
    points: Sequence[Sequence[float]], losses: Sequence[float], seed: int = 0, replicates: int = 400
) -> list[Estimate] | None:
    """Optimum of each coordinate, scaled to [0, 1], with the interval that resampling the trials gives.

    A separable parabola is fitted to the better half of the trials. None where these are fewer than its coefficients
    and two more.
    """
    x, y = torch.tensor(points, dtype=torch.float64), torch.tensor(losses, dtype=torch.float64)
    better = y.argsort()[: (len(losses) + 1) // 2]
    x, y = x[better], y[better]
    if len(y) < 2 * x.shape[1] + 3:
        return None
    centre, scale = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    z = (x - centre) / scale
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(y), (replicates, len(y)), generator=generator)
    within = (z.amin(dim=0), z.amax(dim=0))  # where the better half lies: nothing is known beyond
    value = centre + scale * _separable_minimum(z[None], y[None], within)[0]
    found = centre + scale * _separable_minimum(z[draws], y[draws], within)
    return [interval(found[:, i].tolist(), value[i].item()) for i in range(x.shape[1])]


def _separable_minimum(z: Tensor, y: Tensor, within: tuple[Tensor, Tensor]) -> Tensor:
    """z [R, n, k], y [R, n] -> minimum [R, k] of the fitted a + sum(b z + c z^2) within (low [k], high [k])."""
    count, (low, high) = z.shape[-1], within
    design = torch.cat([torch.ones_like(z[..., :1]), z, z * z], dim=-1)  # [R, n, 1 + 2k]
    spread = y.std(dim=1, keepdim=True).clamp(min=1e-12)
    target = ((y - y.mean(dim=1, keepdim=True)) / spread)[..., None]
    # A little ridge: a replicate may hold too few different points.
    normal = design.mT @ design + 1e-3 * torch.eye(design.shape[-1], dtype=z.dtype)
    _, b, c = torch.linalg.solve(normal, design.mT @ target)[..., 0].split([1, count, count], dim=-1)
    vertex = torch.minimum(torch.maximum(-b / (2 * c), low), high)
    end = torch.where(b * low + c * low**2 < b * high + c * high**2, low, high)
    return torch.where(c > 0, vertex, end)
