"""Rectified flow (Liu et al., arXiv 2209.03003) with SD3's logit-normal times (Esser et al., arXiv 2403.03206).

x_t = (1 - t) x0 + t noise, so t = 1 is noise; the model predicts the velocity v = noise - x0.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .random import normal


class Draw(NamedTuple):
    """t [B] float32; noise, x_t, target and x0 [B, C, h, w] in x0's type; weight [B] float32."""

    t: Tensor
    noise: Tensor
    x_t: Tensor
    target: Tensor
    weight: Tensor
    x0: Tensor


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times towards the noise for larger images: t' = s t / (1 + (s - 1) t) (SD3, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class RectifiedFlow:
    """mean, std: of logit(t) before the shift. shift: sqrt(image tokens / base tokens), for x0 of `area` = h w; other
    areas have other shifts. None: all have this one."""

    mean: float
    std: float
    shift: float
    area: int | None = None

    def draw(self, x0: Tensor, keys: Tensor) -> Draw:
        """x0 [B, C, h, w], keys int64 [B] -> a time and noise for each sample, functions of its key alone."""
        t = torch.sigmoid(self.mean + self.std * normal(keys, (), "time"))
        area = x0.shape[-2] * x0.shape[-1]
        shift = self.shift * math.sqrt(area / self.area) if self.area else self.shift
        return self.draw_at(x0, keys, shift_time(t, shift).float())

    def draw_at(self, x0: Tensor, keys: Tensor, t: Tensor) -> Draw:
        """As `draw`, at given times t [B]."""
        noise = normal(keys, tuple(x0.shape[1:]), "noise").to(x0.dtype)
        time = t.to(x0.dtype)[:, None, None, None]
        return Draw(t, noise, (1 - time) * x0 + time * noise, noise - x0, torch.ones_like(t), x0)

    def loss(self, prediction: Tensor, draw: Draw) -> Tensor:
        """Mean squared error of the velocity, [B], in float32 or better."""
        error = prediction.to(draw.target.dtype) - draw.target
        return draw.weight * error.square().flatten(1).mean(1)

    def denoising_loss(self, prediction: Tensor, draw: Draw) -> Tensor:
        """What validation measures: here the loss itself."""
        return self.loss(prediction, draw)
