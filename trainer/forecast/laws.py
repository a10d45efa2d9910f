"""The law of a loss: L(N, D) = L_inf + a N^-alpha + b D^-beta, of N parameters after D images.

The form is that of Hoffmann et al. (arXiv 2203.15556, equation 10); for diffusion transformers arXiv 2410.08184 has
fitted its consequences. It is fitted to log L, with Huber's loss, so that one bad run does not bend the law.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

COEFFICIENTS = 5
_HUBER = 1.345  # standard deviations: 95 % efficient where the noise is normal (Huber 1981)
_EXPONENTS = (0.02, 4.0)  # the least and the largest that are tried
_LEAST = 1e-12  # of a term, relative to the loss: what is smaller than this is nothing
_COUNTS = 1e-3  # of the loss: the least that a term is at the centre, where its exponent means something
_ROUNDS = 60


class Grid(NamedTuple):
    """Where losses were measured: point i is of n[i] parameters after d[i] images."""

    n: Array
    d: Array

    @property
    def centre(self) -> tuple[float, float]:
        """Geometric means: about them the terms of the law are least alike."""
        return math.exp(np.log(self.n).mean()), math.exp(np.log(self.d).mean())


class Laws(NamedTuple):
    """R laws side by side. theta [R, 5]: logarithms of L_inf, a n0^-alpha, b d0^-beta, alpha, beta."""

    theta: Array
    centre: tuple[float, float]

    @property
    def floor(self) -> Array:
        """L_inf [R]: what neither size nor data takes away."""
        return np.exp(self.theta[:, 0])

    @property
    def alpha(self) -> Array:
        """Exponent of the size [R]."""
        return np.exp(self.theta[:, 3])

    @property
    def beta(self) -> Array:
        """Exponent of the images [R]."""
        return np.exp(self.theta[:, 4])

    @property
    def both_terms_found(self) -> NDArray[np.bool_]:
        """Whether both terms are a part of the loss that counts, with exponents between the ends of those tried [R]."""
        shares = np.exp(self.theta[:, 1:3] - self.log_loss(*self.centre))  # [R, 2]
        low, high = (math.log(each) for each in _EXPONENTS)
        inside = (self.theta[:, 3:] > low + 0.01) & (self.theta[:, 3:] < high - 0.01)
        return np.asarray(((shares > _COUNTS) & inside).all(axis=1))

    def log_loss(self, n: Array | float, d: Array | float) -> Array:
        """log L [R, points]."""
        n, d = np.broadcast_arrays(np.atleast_1d(n), np.atleast_1d(d))
        return _log_loss(self.theta, *_logs(Grid(n, d), self.centre))[0]

    def optimal_parameters(self, budget: float) -> Array:
        """The size [R] of least loss for which N D is `budget` (FLOPs are proportional to it): where both terms fall
        alike, alpha a N^-alpha = beta b D^-beta."""
        n0, d0 = self.centre
        log_n0_share = np.log(self.alpha) + self.theta[:, 1] - np.log(self.beta) - self.theta[:, 2]
        # with N = n0 x and D = d0 c / x, c = budget / (n0 d0): x^(alpha + beta) = (alpha A / beta B) c^beta
        log_x = (log_n0_share + self.beta * math.log(budget / n0 / d0)) / (self.alpha + self.beta)
        return n0 * np.exp(log_x)

    def budget_of(self, parameters: float) -> Array:
        """N D [R] for which `parameters` is the best size: the inverse of optimal_parameters."""
        n0, d0 = self.centre
        log_share = np.log(self.alpha) + self.theta[:, 1] - np.log(self.beta) - self.theta[:, 2]
        log_c = ((self.alpha + self.beta) * math.log(parameters / n0) - log_share) / self.beta
        return n0 * d0 * np.exp(log_c)

    def best_of(self, cost: Array) -> "Laws":
        """The law of least cost of each group; cost [R / S, S] of laws that stand group by group."""
        groups, starts = cost.shape
        return Laws(self.theta.reshape(groups, starts, -1)[np.arange(groups), cost.argmin(axis=1)], self.centre)


def fit_law(grid: Grid, loss: Array, weight: Array | None = None) -> Laws:
    """The law (R = 1) of losses [points], the best that is found from several starts. weight: of each point."""
    starts = _starts(loss)
    repeated = np.broadcast_to(np.log(loss), (len(starts), len(loss)))
    laws, cost = _descend(grid, repeated, starts, weight)
    return laws.best_of(cost[None])


def refit(grid: Grid, losses: Array, law: Laws, weight: Array | None = None) -> Laws:
    """A law [R] for each row of losses [R, points], from the law of another draw and from two that differ from it in
    how they share the loss out."""
    begin = law.theta[0]
    shifts = np.array([[0, 0, 0, 0, 0], [-0.3, 0.7, 0.0, -0.6, 0.0], [-0.3, 0.0, 0.7, 0.0, -0.6]])
    starts = np.tile(begin + shifts, (len(losses), 1))
    repeated = np.repeat(np.log(losses), len(shifts), axis=0)
    laws, cost = _descend(grid, repeated, starts, weight, law.centre)
    return laws.best_of(cost.reshape(len(losses), len(shifts)))


def _starts(loss: Array) -> Array:
    """Some share of the least loss as floor, the rest shared out between size and data, at some exponents."""
    least, spread = float(loss.min()), float(np.ptp(loss)) + 1e-3 * float(loss.min())
    return np.array([
        [math.log(floor * least), math.log(part * spread), math.log((1 - part) * spread), math.log(x), math.log(y)]
        for floor in (0.3, 0.7, 0.95) for part in (0.3, 0.7) for x in (0.2, 0.6, 1.5) for y in (0.2, 0.6, 1.5)
    ])  # fmt: skip


def _logs(grid: Grid, centre: tuple[float, float]) -> tuple[Array, Array]:
    return np.log(grid.n / centre[0]), np.log(grid.d / centre[1])


def _log_loss(theta: Array, log_n: Array, log_d: Array) -> tuple[Array, Array]:
    """log L [R, points] and its derivatives [R, points, 5] by theta."""
    alpha, beta = np.exp(theta[:, 3:4]), np.exp(theta[:, 4:5])
    terms = np.stack(
        [
            np.broadcast_to(theta[:, 0:1], (len(theta), len(log_n))),
            theta[:, 1:2] - alpha * log_n,
            theta[:, 2:3] - beta * log_d,
        ],
        axis=-1,
    )  # [R, points, 3], logarithms
    top = terms.max(axis=-1, keepdims=True)
    parts = np.exp(terms - top)
    total = parts.sum(axis=-1, keepdims=True)
    share = parts / total
    by_exponents = np.stack([-share[..., 1] * alpha * log_n, -share[..., 2] * beta * log_d], axis=-1)
    return (top + np.log(total))[..., 0], np.concatenate([share, by_exponents], axis=-1)


def _descend(
    grid: Grid, target: Array, theta: Array, weight: Array | None = None, centre: tuple[float, float] | None = None
) -> tuple[Laws, Array]:
    """Levenberg and Marquardt's method on Huber's loss of log L - target, all R problems at once; (laws, cost [R]).

    target [R, points]. The scale of the noise is that of the residuals themselves, by their median, anew each round of
    the first half, and then kept, so that what is minimised is one function.
    """
    centre = centre or grid.centre
    log_n, log_d = _logs(grid, centre)
    count: Array = np.ones(len(log_n)) if weight is None else weight / weight.mean()
    theta, damping = theta.copy(), np.full(len(theta), 1e-2)
    low, high = _bounds(target)
    theta = np.clip(theta, low, high)
    value, slope = _log_loss(theta, log_n, log_d)
    delta = _threshold(value - target)
    cost = _cost(value - target, delta, count)
    for number in range(_ROUNDS):
        if 0 < number < _ROUNDS // 2 and number % 5 == 0:
            delta = _threshold(value - target)
            cost = _cost(value - target, delta, count)
        residual = value - target
        w = count * np.minimum(1.0, delta[:, None] / np.maximum(np.abs(residual), 1e-300))  # [R, points]
        normal = np.einsum("rpi,rp,rpj->rij", slope, w, slope)
        gradient = np.einsum("rpi,rp->ri", slope, w * residual)
        ridge = damping[:, None] * (np.einsum("rii->ri", normal) + 1e-9)
        step = np.linalg.solve(normal + np.einsum("ri,ij->rij", ridge, np.eye(COEFFICIENTS)), gradient[..., None])
        tried = np.clip(theta - np.clip(step[..., 0], -1.0, 1.0), low, high)
        new_value, new_slope = _log_loss(tried, log_n, log_d)
        new_cost = _cost(new_value - target, delta, count)
        better = new_cost < cost
        theta[better], value[better], slope[better] = tried[better], new_value[better], new_slope[better]
        cost = np.where(better, new_cost, cost)
        damping = np.clip(np.where(better, damping / 4, damping * 5), 1e-9, 1e6)
    return Laws(theta, centre), cost


def _bounds(target: Array) -> tuple[Array, Array]:
    """theta's [R, 5]: no term is above the largest loss, exponents lie within _EXPONENTS."""
    top = target.max(axis=1, keepdims=True)
    ends = [np.log(_EXPONENTS[i]) + np.zeros((len(target), 2)) for i in (0, 1)]
    terms = [top + np.log(_LEAST) + np.zeros((1, 3)), top + np.zeros((1, 3))]
    return np.concatenate([terms[0], ends[0]], axis=1), np.concatenate([terms[1], ends[1]], axis=1)


def _threshold(residual: Array) -> Array:
    """Where Huber's loss turns from square to linear [R]: _HUBER standard deviations, which five coefficients have made
    smaller than the noise is."""
    count = residual.shape[1]
    widen = math.sqrt(count / max(1, count - COEFFICIENTS))
    return np.maximum(_HUBER * widen * 1.4826 * np.median(np.abs(residual), axis=1), 1e-9)


def _cost(residual: Array, delta: Array, weight: Array) -> Array:
    size, delta = np.abs(residual), delta[:, None]
    return (weight * np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))).sum(axis=1)
