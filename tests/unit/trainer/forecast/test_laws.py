"""The law of a loss: known constants are found again, its optimum is its least value, one bad run does not bend it."""

import numpy as np
import pytest

from tests.helpers.rungs import IMAGES, SIZES, Law
from trainer.forecast import laws
from trainer.forecast.laws import Grid, Laws, fit_law, refit

N, D = (axis.ravel() for axis in np.meshgrid(SIZES, IMAGES, indexing="ij"))
GRID, LAW = Grid(N, D), Law()
LOSS = np.array([LAW.loss(n, d) for n, d in zip(N, D, strict=True)])


def value(law: Laws, n: float, d: float) -> float:
    return float(np.exp(law.log_loss(n, d))[0, 0])


def test_known_constants_are_found() -> None:
    law = fit_law(GRID, LOSS)
    assert law.floor[0] == pytest.approx(LAW.floor, rel=1e-4)
    assert law.alpha[0] == pytest.approx(LAW.alpha, rel=1e-3)
    assert law.beta[0] == pytest.approx(LAW.beta, rel=1e-3)
    assert value(law, 1e8, 1e7) == pytest.approx(LAW.loss(1e8, 1e7), rel=1e-4)


@pytest.mark.parametrize("law", [Law(floor=0.01, alpha=0.1, beta=0.9), Law(a=0.5, alpha=1.2), Law(b=0.001)])
def test_other_constants(law: Law) -> None:
    loss = np.array([law.loss(n, d) for n, d in zip(N, D, strict=True)])
    assert value(fit_law(GRID, loss), 2e6, 1e5) == pytest.approx(law.loss(2e6, 1e5), rel=1e-3)


def test_optimum_is_the_least_along_its_compute() -> None:
    law, budget = fit_law(GRID, LOSS), 1e11
    sizes = np.geomspace(1e3, 1e8, 20001)
    along = np.array([value(law, n, budget / n) for n in sizes[::20]])
    best = float(law.optimal_parameters(budget)[0])
    assert best == pytest.approx(sizes[::20][along.argmin()], rel=0.02)
    assert float(law.budget_of(best)[0]) == pytest.approx(budget)
    assert float(law.optimal_parameters(4 * budget)[0]) > best


def test_one_bad_point_does_not_bend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = LOSS.copy()
    spoilt[5] *= 1.3
    assert abs(value(fit_law(GRID, spoilt), 2e6, 5e4) / LAW.loss(2e6, 5e4) - 1) < 0.005
    monkeypatch.setattr(laws, "_HUBER", 1e9)  # least squares
    assert abs(value(fit_law(GRID, spoilt), 2e6, 5e4) / LAW.loss(2e6, 5e4) - 1) > 0.02


def test_refit_of_the_same_losses_is_the_same_law() -> None:
    law = fit_law(GRID, LOSS)
    again = refit(GRID, np.stack([LOSS, 1.1 * LOSS]), law)
    assert np.exp(again.log_loss(2e6, 5e4))[:, 0] == pytest.approx(
        [LAW.loss(2e6, 5e4), 1.1 * LAW.loss(2e6, 5e4)], rel=1e-4
    )


def test_points_count_by_their_weight() -> None:
    spoilt = LOSS.copy()
    spoilt[-1] *= 1.02
    light = np.ones(len(N))
    light[-1] = 1e-6
    error = [abs(value(fit_law(GRID, spoilt, weight), 2e6, 5e4) / LAW.loss(2e6, 5e4) - 1) for weight in (None, light)]
    assert error[1] <= error[0]
    assert error[1] < 1e-3
