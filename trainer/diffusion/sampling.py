"""From noise to images: Euler for flows, and guidance: classifier-free (Ho & Salimans, arXiv 2207.12598), or away from
a prediction by a part of the tokens (Krause et al., arXiv 2601.01608)."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from .flow import Prediction, shift_time, velocity_towards

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, h, w], t [B]) -> the model's output [B, C or 2 C, h, w]: velocity, clean image, or noise (and
variance)."""


class Sampler(Protocol):
    def __call__(self, predict: Predict, noise: Tensor, keys: Tensor) -> Tensor:
        """noise [B, C, h, w] -> images like it; whatever else is random is a function of keys int64 [B]."""
        ...


@dataclass(frozen=True)
class Euler:
    """Steps of a rectified flow, at times shifted as in training. predict: what the model puts out; where that is the
    clean image, the last step ends at it, since no clamp of training is needed here."""

    steps: int
    shift: float
    predict: Prediction = "velocity"

    def __call__(self, predict: Predict, noise: Tensor, keys: Tensor) -> Tensor:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            output = predict(x, t)
            return velocity_towards(output, x, t) if self.predict == "x" else output

        return euler(velocity, noise, euler_times(self.steps, self.shift))


def euler_times(steps: int, shift: float) -> list[float]:
    """steps + 1 times from 1 (noise) to 0 (image), shifted as in training."""
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()


def euler(velocity: Predict, noise: Tensor, times: list[float]) -> Tensor:
    """Integrate dx/dt = velocity from times[0] to times[-1]; noise [B, C, h, w] -> images like it."""
    x = noise
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, torch.full((len(x),), t, dtype=torch.float32, device=x.device))
    return x


def guided(full: Predict, weaker: Predict, guidance: float, channels: int | None = None) -> Predict:
    """weaker + guidance x (full - weaker); at guidance 1 the weaker is not computed.

    weaker: without the condition, or routed. channels: how many of the image's channels are guided, None for all (some
    published models guide 3 of 4). The others, and a learned variance behind them, are the full prediction's.
    """
    if guidance == 1.0:
        return full

    def predict(x: Tensor, t: Tensor) -> Tensor:
        output, away = full(x, t), weaker(x, t)
        count = x.shape[1] if channels is None else min(channels, x.shape[1])
        led = away[:, :count] + guidance * (output[:, :count] - away[:, :count])
        return torch.cat([led, output[:, count:]], dim=1)

    return predict
