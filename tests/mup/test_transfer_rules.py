"""Batch and duration: the equations by hand, what they keep, and where they were tested."""

import pytest

from trainer.mup.transfer_rules import RULES, Rates, Rules, Size, lr_factor, ratio, scaled, untested

PROXY = Size(batch=1024, steps=30_000, width=512, depth=19, base_depth=19)
RATES = Rates(lr=1e-3, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.01)


def at(rules: Rules, **changes: int) -> Rates:
    return scaled(RATES, ratio(rules, PROXY, PROXY._replace(**changes)))


def test_a_longer_run() -> None:
    """30K -> 200K steps of one batch: m_D = 20/3 and r = 3/20."""
    found = at("completed-p", steps=200_000)
    assert found == Rates(lr=0.0003873, betas=(0.985, 0.9925), eps=2.582e-12, weight_decay=0.003873)
    assert at("sqrt-batch", steps=200_000) == RATES, "it says nothing of duration"


def test_weight_decay_beside_a_learning_rate_that_was_chosen_otherwise() -> None:
    """What keeps the decay of the whole run depends on the learning rate: beside 0.545 x lr it is 0.00275."""
    steps = 200_000 / 30_000
    assert RATES.weight_decay / (steps * 0.545) == pytest.approx(0.00275, rel=1e-3)
    found = at("completed-p", steps=200_000)
    assert steps * found.lr * found.weight_decay == pytest.approx(RATES.lr * RATES.weight_decay, rel=1e-3)


@pytest.mark.parametrize("changes", [{"steps": 200_000}, {"batch": 4096}, {"batch": 512, "steps": 120_000}])
def test_a_measured_exponent_of_minus_a_half_is_the_rule(changes: dict[str, int]) -> None:
    target = PROXY._replace(**changes)
    r = ratio("completed-p", PROXY, target)
    assert scaled(RATES, r, lr_factor(PROXY, target, -0.5)) == scaled(RATES, r)


def test_a_measured_exponent_moves_the_learning_rate_and_takes_the_decay_with_it() -> None:
    """Four times the batch at equal steps, r = 1: lr x sqrt(4) x 4^-1/4."""
    target = PROXY._replace(batch=4096)
    found = scaled(RATES, ratio("completed-p", PROXY, target), lr_factor(PROXY, target, -0.25))
    assert found == RATES._replace(lr=0.001414, weight_decay=0.007071)


@pytest.mark.parametrize("rules", ["completed-p", "sqrt-batch"])
def test_a_larger_batch_at_equal_images(rules: Rules) -> None:
    assert at(rules, batch=4096, steps=7_500) == Rates(lr=2e-3, betas=(0.6, 0.8), eps=5e-13, weight_decay=0.02)


@pytest.mark.parametrize("rules", ["completed-p", "sqrt-batch"])
@pytest.mark.parametrize("batch", [256, 2048])
def test_what_is_kept_at_equal_images(rules: Rules, batch: int) -> None:
    """Shares of the run: of the decay, and of the memory of Adam's means."""
    steps = PROXY.steps * PROXY.batch // batch
    found = at(rules, batch=batch, steps=steps)
    assert steps * found.lr * found.weight_decay == pytest.approx(PROXY.steps * RATES.lr * RATES.weight_decay, rel=1e-3)
    for before, after in zip(RATES.betas, found.betas, strict=True):
        assert steps * (1 - after) == pytest.approx(PROXY.steps * (1 - before), rel=1e-3)


def test_equal_steps_change_nothing() -> None:
    """A larger batch and as much longer a run: Complete(d)P's two factors cancel."""
    assert at("completed-p", batch=4096) == RATES
    assert at("none", batch=4096, steps=7) == RATES


def test_betas_of_long_runs_keep_their_digits() -> None:
    assert at("completed-p", steps=30_000_000).betas == (0.9999, 0.99995)


def test_betas_leave_their_range_with_numbers() -> None:
    assert at("completed-p", steps=3_000).betas == (0.0, 0.5), "the last run that there is"
    with pytest.raises(
        ValueError, match=r"1 - beta1 = 0\.1 times r = 30 is 3, and beta1 = -2 does not lie in \[0, 1\)"
    ):
        at("completed-p", steps=1_000)
    with pytest.raises(ValueError, match=r"and beta2 = -0\.5 does not lie in"):
        scaled(RATES._replace(betas=(0.99, 0.95)), 30.0)


def lines(rules: Rules, rates: Rates = RATES, **changes: int) -> list[str]:
    return list(untested(rules, PROXY, PROXY._replace(**changes), rates))


def test_ranges() -> None:
    for rules in RULES:
        assert lines(rules) == []
    assert lines("completed-p", batch=128) == lines("completed-p", batch=4096) == []
    assert lines("completed-p", batch=127) == ["the batch is 0.124 times the proxy's, tested are 0.125 to 4 times"]
    assert len(lines("completed-p", batch=4097)) == 1
    assert lines("completed-p", width=8192) == lines("completed-p", width=32) == []
    assert lines("completed-p", width=8704) == ["the width is 17 times the proxy's, tested are factors up to 16"]
    assert lines("completed-p", depth=608) == []
    assert lines("completed-p", depth=627) == ["the depth is 33 times the proxy's, tested are factors up to 32"]
    [line] = lines("completed-p", depth=38, base_depth=38)
    assert "without the rule for it" in line
    assert lines("sqrt-batch", batch=8192) == []
    assert lines("sqrt-batch", batch=9000, depth=627, base_depth=1) == [
        "the batch is 8.789 times the proxy's, tested are 0.125 to 8 times"
    ]
    assert lines("sqrt-batch", RATES._replace(betas=(0.5, 0.89))) == ["beta2 would be 0.89, tested is at least 0.9"]
    assert lines("none", batch=1, width=4, depth=1000) == []
