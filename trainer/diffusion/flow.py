"""Rectified flow (Liu et al., arXiv 2209.03003) with SD3's logit-normal times (Esser et al., arXiv 2403.03206).

x_t = (1 - t) x0 + t noise, so t = 1 is noise; the model predicts the velocity v = noise - x0, or the clean x0, which is
turned into the velocity (JiT, arXiv 2511.13720).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .random import normal, uniform

Prediction = Literal["velocity", "x"]


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


def velocity_towards(x0: Tensor, x_t: Tensor, t: Tensor, clamp: float = 0.0) -> Tensor:
    """Velocity (x_t - x0) / max(t, clamp) of the straight path that leads from x0 through x_t [B, C, h, w], where it is
    at time t [B]; without a clamp t must not be 0."""
    return (x_t - x0) / t.clamp(min=clamp).to(x_t.dtype)[:, None, None, None]


@dataclass(frozen=True)
class RectifiedFlow:
    """mean, std: of logit(t) before the shift. shift: sqrt(image tokens / base tokens), for x0 of `area` = h w; other
    areas have other shifts. None: all have this one.

    predict: what the model puts out. Of the clean x, the loss is still that of the velocity, (x_t - x) / max(t,
    x_clamp), of prediction and image alike. uniform_share: of samples whose time is uniform on (0, 1), and not shifted.
    contrastive_weight: of the squared distance to another sample's velocity, noise - x0 at any time, which is
    subtracted (contrastive flow matching, arXiv 2506.05350); each other's other are rows 0 and 1, 2 and 3, ...
    """

    mean: float
    std: float
    shift: float
    area: int | None = None
    predict: Prediction = "velocity"
    x_clamp: float = 0.05
    uniform_share: float = 0.0
    contrastive_weight: float = 0.0

    def draw(self, x0: Tensor, keys: Tensor) -> Draw:
        """x0 [B, C, h, w], keys int64 [B] -> a time and noise for each sample, functions of its key alone."""
        t = torch.sigmoid(self.mean + self.std * normal(keys, (), "time"))
        area = x0.shape[-2] * x0.shape[-1]
        shift = self.shift * math.sqrt(area / self.area) if self.area else self.shift
        t = shift_time(t, shift)
        if self.uniform_share:
            chance, even = uniform(keys, 2, "uniform").unbind(1)
            t = torch.where(chance < self.uniform_share, even, t)
        return self.draw_at(x0, keys, t.float())

    def draw_at(self, x0: Tensor, keys: Tensor, t: Tensor) -> Draw:
        """As `draw`, at given times t [B]."""
        noise = normal(keys, tuple(x0.shape[1:]), "noise").to(x0.dtype)
        time = t.to(x0.dtype)[:, None, None, None]
        return Draw(t, noise, (1 - time) * x0 + time * noise, noise - x0, torch.ones_like(t), x0)

    def loss(self, prediction: Tensor, draw: Draw, counts: Tensor | None = None) -> Tensor:
        """Mean squared error of the velocity, [B], in float32 or better; less the contrastive term, where there is one.

        counts [B]: 0 for rows that hold no sample, which nothing is contrasted with; None: all rows hold one.
        """
        velocity, target = self._velocities(prediction, draw, self.x_clamp)
        loss = (velocity - target).square().flatten(1).mean(1)
        if self.contrastive_weight:
            rows = torch.arange(len(loss), device=loss.device)
            other = rows ^ 1  # the last of an odd number of rows has no other
            there = other < len(loss)
            other = torch.where(there, other, rows)
            counted = there if counts is None else there * counts[other]
            distance = (velocity - draw.target[other]).square().flatten(1).mean(1)
            loss = loss - self.contrastive_weight * counted * distance
        return draw.weight * loss

    def denoising_loss(self, prediction: Tensor, draw: Draw) -> Tensor:
        """What validation measures, [B]: the squared error of the velocity alone and without the clamp, so that it
        compares models whatever they predict. Where x is predicted, t must not be 0."""
        velocity, target = self._velocities(prediction, draw, clamp=0.0)
        return draw.weight * (velocity - target).square().flatten(1).mean(1)

    def _velocities(self, prediction: Tensor, draw: Draw, clamp: float) -> tuple[Tensor, Tensor]:
        """The predicted velocity and the true one, [B, C, h, w], in float32 or better."""
        prediction = prediction.to(draw.target.dtype)
        if self.predict == "velocity":
            return prediction, draw.target
        velocity, target = (velocity_towards(x, draw.x_t, draw.t, clamp) for x in (prediction, draw.x0))
        return velocity, target
