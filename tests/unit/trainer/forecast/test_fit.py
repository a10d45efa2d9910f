"""The interval of a forecast holds what it promises, and what is no good is refused with numbers."""

import dataclasses

import numpy as np
import pytest

from tests.helpers.rungs import IMAGES, SIZES, Law, draw_law, rungs_of
from trainer.forecast.fit import Fit, Rung, fit_rungs

TARGET = 1.6e6, 38400.0


def quiet_fit(seed: int = 0) -> tuple[list[Rung], Fit]:
    rungs = rungs_of(Law(), 0.003, np.random.default_rng(seed))
    return rungs, fit_rungs(rungs, replicates=60)


@pytest.mark.slow
def test_nine_of_ten_runs_lie_in_the_interval() -> None:
    """200 laws, each with rungs of three seeds whose durations share a trunk's noise, and a target's own run."""
    chance, noise, held = np.random.default_rng(1), 0.005, 0
    for _ in range(200):
        law = draw_law(chance)
        fit = fit_rungs(rungs_of(law, noise, chance), replicates=60, check=False)
        loss = fit.loss(*TARGET)
        held += loss.low <= law.loss(*TARGET) * np.exp(noise * chance.standard_normal()) <= loss.high
        assert loss.high / loss.low < 1.12, "an interval that says something"
    assert 0.85 <= held / 200 <= 0.95


def test_exponents_and_optimum_have_intervals() -> None:
    _, fit = quiet_fit()
    for name, true in (("alpha", Law().alpha), ("beta", Law().beta), ("floor", Law().floor)):
        each = fit.coefficients()[name]
        assert each.low < true < each.high, name
    best = fit.optimal_parameters(1e11)
    assert best.low < best.value < best.high
    assert not fit.refused


def test_more_noise_gives_a_wider_interval() -> None:
    widths = []
    for noise in (0.002, 0.008):
        loss = fit_rungs(rungs_of(Law(), noise, np.random.default_rng(3)), replicates=60).loss(*TARGET)
        widths.append(loss.high / loss.low - 1)
    assert widths[1] > 2 * widths[0]


def test_one_seed_has_an_interval_too() -> None:
    loss = fit_rungs(rungs_of(Law(), 0.004, np.random.default_rng(5), seeds=1), replicates=60).loss(*TARGET)
    assert loss.low < loss.value < loss.high


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_width_that_is_trained_wrongly_is_refused(size: float) -> None:
    """As with a learning rate that is four times too high at one of four widths."""
    rungs, _ = quiet_fit()
    spoilt = [dataclasses.replace(r, loss=r.loss * (1.08 if r.parameters == size else 1)) for r in rungs]
    reasons = fit_rungs(spoilt, replicates=20).refused
    assert any("does not fit" in reason or "misses them by" in reason for reason in reasons), reasons
    assert all("%" in reason for reason in reasons), "with numbers"


def test_what_spans_too_little_is_refused() -> None:
    law = Law()
    few = [Rung(n, d, s, law.loss(n, d)) for n in (1e5, 1.3e5, 1.7e5) for d in (1e4, 2e4, 4e4) for s in (0, 1)]
    assert any("span 6.8 times the compute" in reason for reason in fit_rungs(few, replicates=20).refused)


@pytest.mark.slow
def test_rates_at_the_edge_are_refused() -> None:
    rungs, _ = quiet_fit()
    at = {"parameters": SIZES[1], "images": IMAGES[0], "seed": 0}
    middle = [Rung(**at, loss=0.5, lr=0.5), Rung(**at, loss=0.6, lr=2.0)]
    assert fit_rungs([*rungs, *middle], replicates=20).refused == []
    edge = [Rung(**at, loss=0.2, lr=0.5), Rung(**at, loss=0.6, lr=2.0)]
    (reason,) = fit_rungs([*rungs, *edge], replicates=20).refused
    assert "at the edge of those tried (0.5 x: 0.2, 1 x: 0.3" in reason


@pytest.mark.slow
def test_diverged_rungs_are_refused_and_left_out() -> None:
    rungs, fit = quiet_fit()
    dead = dataclasses.replace(rungs[0], seed=7, loss=float("inf"))
    again = fit_rungs([*rungs, dead], replicates=60)
    assert any("seed 7 has diverged" in reason for reason in again.refused)
    assert again.loss(*TARGET).value == fit.loss(*TARGET).value


def test_too_few_points() -> None:
    with pytest.raises(ValueError, match=r"6 runs leave 6 points .* needs 7"):
        fit_rungs([Rung(n, d, 0, Law().loss(n, d)) for n in SIZES[:2] for d in IMAGES])


@pytest.mark.slow
def test_losses_without_a_size_or_without_images_have_no_optimum() -> None:
    """Nor do they make one up: a term that vanishes leaves the best size anywhere."""
    for law in (Law(a=1e-9), Law(b=1e-9)):
        fit = fit_rungs(rungs_of(law, 0.001, np.random.default_rng(2)), replicates=20)
        assert not fit.has_optimum
    assert quiet_fit()[1].has_optimum


def test_equal_losses_are_no_law() -> None:
    equal = [Rung(n, d, 0, 0.5) for n in SIZES for d in IMAGES]
    assert any("all losses are equal" in reason for reason in fit_rungs(equal, replicates=20).refused)


def test_what_was_not_left_out_is_not_said_to_be() -> None:
    law = Law()
    small = [Rung(n, d, s, law.loss(n, d)) for n in SIZES[:3] for d in IMAGES for s in (0, 1)]
    assert fit_rungs(small, replicates=20).left_out is None
    whole = quiet_fit()[1].left_out
    assert whole is not None
    assert whole.low <= 0 <= whole.high


def test_the_interval_is_the_same_however_often_it_is_asked_for() -> None:
    fit = quiet_fit()[1]
    assert fit.loss(*TARGET) == fit.loss(*TARGET)


@pytest.mark.slow
def test_the_same_rungs_give_the_same_forecast() -> None:
    assert quiet_fit()[1].loss(*TARGET) == quiet_fit()[1].loss(*TARGET)
