"""A study that several files look at."""

import random

import pytest

from tests.helpers.studies import fill, search
from trainer.search.space import Point
from trainer.search.study import Study


@pytest.fixture(scope="package")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """60 trials whose loss is a valley around lr 0.01; above 0.04 they diverge; warm-up does nothing."""
    chance = random.Random(0)

    def loss(point: Point) -> float | None:
        lr = float(point["optim.lr"] or 0)
        clip = {0.3: 0.02, 1.0: 0.0, 3.0: 0.01}[float(point["optim.clip_norm"] or 0)]
        return (
            None if lr > 0.04 else 0.2 + 0.1 * (lr / 0.01 - 1) ** 2 * (0.01 / lr) ** 0.5 + clip + chance.gauss(0, 0.003)
        )

    filled = Study.open(search(tmp_path_factory.mktemp("runs"), "optim.weight_decay=0.1", trials=60))
    fill(filled, loss)
    return filled
