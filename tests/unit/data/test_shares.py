"""Shares of several sources, by arithmetic."""

from fractions import Fraction

import numpy as np
import pytest

from data.shares import MOST_ASTRAY, Shares


@pytest.mark.slow
def test_shares_are_kept_however_long_the_run_is() -> None:
    weights = [Fraction(w) for w in (0.3, 1 / 3, 0.01, 1e-5, 0.7)]
    shares = Shares(weights, 1000)
    steps = np.unique(np.geomspace(1, 2**33, 3000).astype(np.int64))
    exact = [[int(step) * 1000 * w / sum(weights) for step in steps] for w in weights]
    assert np.abs((shares.before(steps) - np.array(exact)).astype(float)).max() < MOST_ASTRAY
