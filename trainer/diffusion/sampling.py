"""From noise to images: the Euler sampler and classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .flow import shift_time

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, h, w], t [B]) -> velocity like x."""


def euler_times(steps: int, shift: float) -> list[float]:
    """steps + 1 times from 1 (noise) to 0 (image), shifted as in training."""
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()


def euler(velocity: Velocity, noise: Tensor, times: list[float]) -> Tensor:
    """Integrate dx/dt = velocity from times[0] to times[-1]; noise [B, C, h, w] -> images like it."""
    x = noise
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, torch.full((len(x),), t, dtype=torch.float32, device=x.device))
    return x


def guided(conditional: Velocity, unconditional: Velocity, guidance: float) -> Velocity:
    """unconditional + guidance x (conditional - unconditional); at guidance 1 the unconditional is not computed."""
    if guidance == 1.0:
        return conditional

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        without = unconditional(x, t)
        return without + guidance * (conditional(x, t) - without)

    return velocity
