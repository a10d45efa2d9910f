"""Rungs whose losses follow a law that is known: nothing is trained."""

from typing import NamedTuple

import numpy as np

from trainer.forecast.fit import Rung

SIZES = (1e5, 2.2e5, 3.9e5, 8.6e5)
IMAGES = (9600.0, 19200.0, 38400.0)


class Law(NamedTuple):
    """L = floor + a (N / 1e5)^-alpha + b (D / 1e4)^-beta."""

    floor: float = 0.12
    a: float = 0.08
    alpha: float = 0.35
    b: float = 0.12
    beta: float = 0.45

    def loss(self, n: float, d: float) -> float:
        return self.floor + self.a * (n / 1e5) ** -self.alpha + self.b * (d / 1e4) ** -self.beta


def draw_law(chance: np.random.Generator) -> Law:
    """As the demo's models have them, or thereabouts."""
    uniform = chance.uniform
    return Law(uniform(0.05, 0.2), uniform(0.03, 0.15), uniform(0.2, 0.6), uniform(0.03, 0.15), uniform(0.2, 0.6))


def rungs_of(law: Law, noise: float, chance: np.random.Generator, seeds: int = 3, shared: float = 0.5) -> list[Rung]:
    """A whole grid. noise: standard deviation of log L, of which the share `shared` (of the variance) is that of the
    trunk, and so of all durations of a seed."""
    rungs = []
    for n in SIZES:
        for seed in range(seeds):
            trunk = chance.standard_normal()
            for d in IMAGES:
                deviation = shared**0.5 * trunk + (1 - shared) ** 0.5 * chance.standard_normal()
                rungs.append(Rung(n, d, seed, law.loss(n, d) * float(np.exp(noise * deviation))))
    return rungs
