"""Rows of bad steps and the spike rule, against the same rule in plain floats."""

import math
import random

import pytest
import torch

from trainer.recovery.spikes import LEAST_STD, RATE, WARM_UP, SpikeDetector


def fed(spikes: SpikeDetector, norms: list[float]) -> list[bool]:
    """Whether each step was skipped, as an engine spikes it."""
    skipped = []
    for value in norms:
        norm, limit = torch.tensor(value), spikes.limit()
        bad = ~norm.isfinite() if limit is None else ~norm.isfinite() | (norm > limit)
        spikes.update(norm, bad.float())
        skipped.append(bool(bad))
    return skipped


def test_rows_are_counted_across_log_lines() -> None:
    spikes, nan = SpikeDetector(torch.device("cpu")), math.nan
    assert fed(spikes, [1, nan, nan, 1, nan]) == [False, True, True, False, True]
    assert spikes.take_longest_row() == 2
    assert spikes.take_longest_row() == 0, "seen"
    fed(spikes, [math.inf, nan])
    assert spikes.take_longest_row() == 3, "one that goes on is counted from its beginning"
    fed(spikes, [1.0])
    assert spikes.take_longest_row() == 0
    fed(spikes, [nan, nan])
    spikes.forget_rows()
    fed(spikes, [nan])
    assert spikes.take_longest_row() == 1


def test_the_limit_is_that_of_the_rule() -> None:
    spikes, chance = SpikeDetector(torch.device("cpu"), threshold=4.0), random.Random(0)
    mean = variance = 0.0
    for count in range(4 * WARM_UP):
        norm = math.exp(chance.gauss(-1, 0.3))
        limit = spikes.limit()
        assert limit is not None
        expected = math.exp(mean + 4 * math.sqrt(variance)) if count >= WARM_UP else math.inf
        assert float(limit) == pytest.approx(expected, rel=1e-6)
        spikes.update(torch.tensor(norm, dtype=torch.float64), torch.tensor(0.0))
        rate = max(1 / (count + 1), RATE)
        away = math.log(norm) - mean
        mean, variance = mean + rate * away, (1 - rate) * (variance + rate * away**2)
    assert mean == pytest.approx(-1, abs=0.1)
    assert math.sqrt(variance) == pytest.approx(0.3, abs=0.05)


def test_a_spike_is_skipped_and_counts_as_the_limit() -> None:
    spikes, capped = (SpikeDetector(torch.device("cpu"), threshold=5.0) for _ in range(2))
    for one in (spikes, capped):
        fed(one, [1.0] * WARM_UP)
    limit = float(torch.as_tensor(spikes.limit()))
    assert limit == pytest.approx(math.exp(5 * LEAST_STD))
    assert fed(spikes, [1e30]) == [True]
    assert fed(capped, [limit * (1 - 1e-7)]) == [False]
    assert spikes.numbers[2:].tolist() == pytest.approx(capped.numbers[2:].tolist(), rel=1e-6)
    before = spikes.numbers.clone()
    assert fed(spikes, [math.nan, math.inf]) == [True, True]
    assert torch.equal(spikes.numbers[2:], before[2:]), "what is not finite says nothing of the norm"


def test_a_lasting_change_of_the_norm_is_skipped_for_some_steps_only() -> None:
    spikes = SpikeDetector(torch.device("cpu"), threshold=5.0)
    fed(spikes, [1.0] * WARM_UP)
    skipped = fed(spikes, [2.0] * 40)
    assert 5 <= sum(skipped) <= 25
    assert not any(skipped[sum(skipped) :]), "and never again"


def test_nothing_is_a_spike_before_the_warm_up_or_without_a_threshold() -> None:
    assert not any(fed(SpikeDetector(torch.device("cpu"), 3.0), [1.0] * (WARM_UP - 1) + [1e9]))
    assert not any(fed(SpikeDetector(torch.device("cpu")), [1.0] * WARM_UP + [1e9]))


def test_a_norm_of_zero_is_no_error() -> None:
    spikes = SpikeDetector(torch.device("cpu"), 3.0)
    fed(spikes, [0.0, 1.0])
    assert bool(spikes.numbers.isfinite().all())
