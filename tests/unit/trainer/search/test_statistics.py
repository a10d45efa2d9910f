"""Optimum, shift, regret and intervals on sweeps whose truth is known."""

import math
import random
import statistics

import pytest

from trainer.search.statistics import Losses, best_region, quadratic_minimum, transfer

LRS = [-9.0, -8.0, -7.0, -6.0, -5.0]
WIDTHS = [64, 128, 256]


def sweep(shift: float, noise: float, seed: int = 0, common: float = 0.05, better: float = 0.05) -> Losses:
    """Parabolas in log2 lr whose optimum starts at -7 and moves by `shift` a doubling; wider is better by `better`."""
    chance = random.Random(seed)
    easy = [chance.gauss(0, common) for _ in range(3)]  # what a seed adds everywhere
    return {
        w: {
            lr: [0.5 - better * d + 0.02 * (lr + 7 - shift * d) ** 2 + e + chance.gauss(0, noise) for e in easy]
            for lr in LRS
        }
        for d, w in enumerate(WIDTHS)
    }


def test_quadratic_minimum_is_exact_on_a_parabola() -> None:
    assert quadratic_minimum(LRS, [(lr + 6.8) ** 2 + 10 for lr in LRS]) == pytest.approx(-6.8)
    assert quadratic_minimum(LRS[::-1], [(lr + 6.8) ** 2 + 10 for lr in LRS[::-1]]) == pytest.approx(-6.8)


def test_a_divergent_point_does_not_bend_the_parabola() -> None:
    losses = [(lr + 6.8) ** 2 + 10 for lr in LRS[:-1]] + [1e6]
    assert quadratic_minimum(LRS, losses) == pytest.approx(-6.8)


def test_minimum_without_a_bend_is_the_lowest_point() -> None:
    assert quadratic_minimum(LRS, [1.0, 0.98, 0.92, 0.82, 0.68]) == -5.0
    assert quadratic_minimum([-7.0, -6.0], [1.0, 2.0]) == -7.0
    assert quadratic_minimum(LRS, [1.2, 1.12, 1.06, 1.02, 1.0]) <= -4.0, "at most one step beyond the range"


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, -0.5, 1.0])
def test_shift_of_noiseless_sweeps(shift: float) -> None:
    found = transfer(sweep(shift, noise=0.0))
    assert found.shift.value == pytest.approx(shift, abs=1e-6)
    assert found.shift.half_width < 1e-6, "what a seed adds everywhere does not widen the interval"
    assert found.optima[64].value == pytest.approx(-7)
    assert found.gain == pytest.approx(0.1, abs=0.02)


@pytest.mark.slow
def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    found = [transfer(sweep(0.3, noise=0.004, seed=seed)).shift for seed in range(20)]
    covered = sum(estimate.low <= 0.3 <= estimate.high for estimate in found)
    assert covered >= 16  # 95 % of 20 is 19
    assert statistics.fmean(estimate.half_width for estimate in found) < 0.5, "an interval that says something"


def test_regret_is_what_the_narrow_optimum_costs() -> None:
    found = transfer(sweep(-1.0, noise=0.0))
    assert found.regret.value == pytest.approx(0.02 * 4, abs=1e-6)  # two octaves off at the widest
    assert transfer(sweep(0.0, noise=0.0)).regret.value == pytest.approx(0, abs=1e-9)


def test_wider_is_better() -> None:
    assert transfer(sweep(0.0, noise=0.001)).wider_at_least_as_good
    assert not transfer(sweep(0.0, noise=0.001, better=-0.05)).wider_at_least_as_good


def test_divergence_is_left_out() -> None:
    losses = {w: dict(curve) for w, curve in sweep(0.0, noise=0.0).items()}
    losses[256][-5.0] = [math.inf, 0.5, 0.5]
    found = transfer(losses)
    assert -5.0 not in found.wider_is_better
    assert found.shift.value == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_one_seed_that_ran_away_does_not_widen_the_interval() -> None:
    """Its distance from the others is not the noise of the learning rates that work."""
    losses = {w: {lr: list(values) for lr, values in curve.items()} for w, curve in sweep(-0.5, noise=0.002).items()}
    calm = transfer(losses)
    for values in losses.values():
        values[-4.0] = [1.5, 1.6, 1.5]  # diverged alike
    alike = transfer(losses)
    losses[256][-4.0][1] = 40.0
    away = transfer(losses)
    assert away.shift == alike.shift
    assert away.shift.half_width < 2 * calm.shift.half_width
    assert away.seed_std == pytest.approx(calm.seed_std)
    assert away.regret == alike.regret


def test_optimum_at_the_edge_is_named() -> None:
    losses = {w: {lr: [lr] * 3 for lr in LRS} for w in WIDTHS}
    assert transfer(losses).at_edge == WIDTHS


def test_best_region_covers_the_optimum_and_tells_what_does_not_matter() -> None:
    chance = random.Random(0)
    points = [[chance.random(), chance.random()] for _ in range(80)]
    losses = [(x - 0.6) ** 2 + 0.001 * y + chance.gauss(0, 0.003) for x, y in points]
    region = best_region(points, losses)
    assert region is not None
    assert region[0].value == pytest.approx(0.6, abs=0.02)
    assert region[0].half_width < 0.1 < region[1].half_width
    assert best_region(points[:12], losses[:12]) is None
