"""The exponent of the best learning rate in the duration, on losses that are made up: its truth is known."""

import json
import math
import random
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.search.exponent import FILE, Exponent, Refusal, fit_exponent, read_exponent
from trainer.search.statistics import Losses

STEPS = (50, 100, 200)
RATES = (-2.0, -1.0, 0.0, 1.0, 2.0)  # log2 of the factor


def losses(
    exponent: float,
    noise: float = 0.0,
    seeds: int = 3,
    start: float = 0.4,
    rates: tuple[float, ...] = RATES,
    cube: float = 0.0005,
) -> Losses:
    """Valleys that are steeper above, as real ones are (cube); the best log2 rate of the shortest run is `start`."""
    chance = random.Random(0)
    easy = [chance.gauss(0, 0.02) for _ in range(seeds)]

    def loss(x: float, d: int) -> float:
        away = x - start - exponent * d
        return 0.5 - 0.05 * d + 0.01 * away**2 + cube * away**3

    return {n: {x: [loss(x, d) + e + chance.gauss(0, noise) for e in easy] for x in rates} for d, n in enumerate(STEPS)}


def fitted(given: Losses) -> Exponent:
    found = fit_exponent(given)
    assert isinstance(found, Exponent), found
    return found


def refused(given: Losses) -> Refusal:
    found = fit_exponent(given)
    assert isinstance(found, Refusal), found
    return found


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [0.0, -0.3, -0.5])
@pytest.mark.parametrize("seeds", [1, 3])
def test_planted_exponent_lies_in_its_interval(exponent: float, seeds: int) -> None:
    found = fitted(losses(exponent, noise=0.0005, seeds=seeds)).exponent
    assert found.low <= exponent <= found.high
    assert found.low <= found.value <= found.high
    assert 0 < found.half_width < 0.4
    assert fitted(losses(exponent, seeds=3)).exponent.value == pytest.approx(exponent, abs=0.1), "without noise"


@pytest.mark.slow
def test_noise_widens_the_interval() -> None:
    for seeds in (1, 3):
        calm, loud = (fitted(losses(-0.3, noise, seeds, cube=0.0)).exponent for noise in (0.0003, 0.003))
        assert loud.half_width > 2 * calm.half_width


@pytest.mark.slow
def test_a_valley_that_is_no_parabola_widens_the_interval_of_seeds_that_agree() -> None:
    round_, steep = (fitted(losses(-0.5, 1e-6, cube=cube)).exponent for cube in (0.0, 0.001))
    assert round_.half_width < 0.01
    assert abs(steep.value + 0.5) > 0.02, "the parabola is drawn aside"
    assert steep.low <= -0.5 <= steep.high


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3])
def test_interval_covers_the_truth_about_as_often_as_it_says(seeds: int) -> None:
    covered = 0
    for draw in range(20):
        chance = random.Random(draw)
        noisy = {n: {x: [0.5 + 0.01 * (x - 0.3 + 0.4 * d) ** 2 + chance.gauss(0, 0.001) for _ in range(seeds)]
                     for x in RATES} for d, n in enumerate(STEPS)}  # fmt: skip
        found = fit_exponent(noisy)
        covered += isinstance(found, Refusal) or found.exponent.low <= -0.4 <= found.exponent.high
    assert covered >= 16  # 95 % of 20 is 19


@pytest.mark.slow
def test_a_diverged_seed_is_no_part_of_the_valley() -> None:
    given = {n: dict(curve) for n, curve in losses(-0.3).items()}
    for curve in given.values():
        curve[3.0] = [math.inf, 0.4, 0.4]
    assert fitted(given).exponent == fitted(losses(-0.3)).exponent


def test_an_interval_that_says_nothing_is_refused() -> None:
    for seeds in (1, 3):
        assert "is wider than 1: more --seeds" in refused(losses(-0.3, 0.02, seeds, cube=0.0)).reasons[0]


def test_one_seed_and_three_rates_are_refused() -> None:
    narrow = (-1.0, 0.0, 1.0)
    assert "say nothing of the noise: more --seeds or --lrs" in refused(losses(0.0, 0.001, 1, 0.1, narrow)).reasons[0]
    assert isinstance(fit_exponent(losses(0.0, 0.001, 2, 0.1, narrow)), Exponent)


@pytest.mark.parametrize(
    ("start", "told", "add"), [(-2.5, "the best rate is the lowest", -3.0), (4.0, "the best rate is the highest", 3.0)]
)
def test_best_rate_at_the_edge_is_refused(start: float, told: str, add: float) -> None:
    found = refused(losses(0.0, start=start))
    assert [reason.partition(":")[0] for reason in found.reasons] == ["50 steps", "100 steps", "200 steps"]
    assert all(f"{told} that was tried" in reason for reason in found.reasons)
    assert found.add == [add]


def test_best_rate_next_to_divergence_asks_for_one_between() -> None:
    given = {n: dict(curve) for n, curve in losses(0.0, start=1.0).items()}
    given[200][2.0] = [math.inf] * 3
    found = refused(given)
    assert (list(found.reasons), found.add) == (
        ["200 steps: the best rate is the highest that is near the best loss"],
        [1.5],
    )
    given[200] = {x: [math.inf] * 3 for x in RATES}
    found = refused(given)
    assert (list(found.reasons), found.add) == (["200 steps: all rates diverged"], [-3.0])


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "null", "{}", '{"exponent": -0.4, "interval": [-0.5, -0.3], "durations": [5, 10], "log2_lr": [1]}'],
)
def test_damaged_file_is_one_message(tmp_path: Path, content: str) -> None:
    assert read_exponent(tmp_path) is None
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ConfigError, match=r"horizon\.json is damaged .*: give `search\.py horizon` again"):
        read_exponent(tmp_path)


@pytest.mark.parametrize("low", [-0.3, None, math.nan, "x"])
def test_interval_must_hold_the_exponent(tmp_path: Path, low: float | None) -> None:
    good = {"exponent": -0.4, "interval": [-0.5, -0.3], "durations": [5, 10], "log2_lr": [1, 0.6]}
    (tmp_path / FILE).write_text(json.dumps(good))
    assert str(read_exponent(tmp_path)) == "best lr ~ duration^-0.40 [-0.50, -0.30]"
    (tmp_path / FILE).write_text(json.dumps({**good, "interval": [low, -0.2]}))
    with pytest.raises(ConfigError, match="is damaged"):
        read_exponent(tmp_path)
