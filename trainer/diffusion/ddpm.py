"""Denoising diffusion (Ho et al., arXiv 2006.11239) with the learned variance of Nichol & Dhariwal (arXiv 2102.09672).

x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise at 1000 timesteps; the model predicts the noise. Times that the model
sees are timestep / 1000, so that all objectives share [0, 1].
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .flow import Draw
from .random import integers, normal

TIMESTEPS = 1000
_BITS = 1 / math.log(2)  # bits a nat
_HALF_BIN = 1 / 255  # of an 8-bit value in images scaled to [-1, 1]
_LAST_BINS = 0.999  # values beyond it are in the first or last bin, which reach to infinity
_LEAST_PROBABILITY = 1e-12  # of a bin, before the logarithm

BetaSchedule = Literal["linear", "scaled_linear"]
BETA_RANGES: dict[BetaSchedule, tuple[float, float]] = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}


def betas(schedule: BetaSchedule) -> Tensor:
    """float64 [1000]. linear: Ho et al. (arXiv 2006.11239); scaled_linear: Stable Diffusion's."""
    first, last = BETA_RANGES[schedule]
    if schedule == "linear":
        return torch.linspace(first, last, TIMESTEPS, dtype=torch.float64)
    return torch.linspace(first**0.5, last**0.5, TIMESTEPS, dtype=torch.float64).square()


class _Tables(NamedTuple):
    """What the loss looks up by timestep, each float64 [1000]."""

    sqrt_abar: Tensor
    sqrt_one_minus_abar: Tensor
    mean_per_noise: Tensor
    """Error of the posterior mean for a unit error of the predicted noise."""
    log_posterior_variance: Tensor
    log_beta: Tensor


@cache
def _tables(schedule: BetaSchedule, device: torch.device) -> _Tables:
    """On the device once, so that no step copies them there."""
    beta = betas(schedule)
    abar = (1 - beta).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    variance = beta * (1 - before) / (1 - abar)
    variance[0] = variance[1]  # it is 0 at timestep 0, whose logarithm the learned range cannot use
    # The posterior mean weighs the predicted x0 by sqrt(before) beta / (1 - abar), and a predicted x0 moves by
    # -sqrt(1 / abar - 1) for a unit of noise.
    mean_per_noise = before.sqrt() * beta / (1 - abar) * (1 / abar - 1).sqrt()
    tables = _Tables(abar.sqrt(), (1 - abar).sqrt(), mean_per_noise, variance.log(), beta.log())
    return _Tables(*(table.to(device) for table in tables))


@dataclass(frozen=True)
class DDPM:
    """learned_sigma: the prediction's second half of channels places log sigma^2 between the two bounds of each step
    (-1: the posterior's, 1: beta), and the loss adds the variational bound of the step."""

    beta_schedule: BetaSchedule
    learned_sigma: bool

    def draw(self, x0: Tensor, keys: Tensor) -> Draw:
        """x0 [B, C, h, w], keys int64 [B] -> a uniform timestep and noise a sample, functions of its key alone."""
        return self._draw(x0, keys, integers(keys, TIMESTEPS, "time"))

    def draw_at(self, x0: Tensor, keys: Tensor, t: Tensor) -> Draw:
        """As `draw`, at the timesteps next to given times t [B] in [0, 1]."""
        return self._draw(x0, keys, (t * TIMESTEPS).round().long().clamp(0, TIMESTEPS - 1))

    def _draw(self, x0: Tensor, keys: Tensor, timestep: Tensor) -> Draw:
        noise = normal(keys, tuple(x0.shape[1:]), "noise").to(x0.dtype)
        tables = _tables(self.beta_schedule, x0.device)
        x_t = _column(tables.sqrt_abar[timestep], x0) * x0 + _column(tables.sqrt_one_minus_abar[timestep], x0) * noise
        t = timestep.float() / TIMESTEPS
        return Draw(t, noise, x_t, noise, torch.ones_like(t), x0)

    def denoising_loss(self, prediction: Tensor, draw: Draw) -> Tensor:
        """Mean squared error of the noise, [B], in float32 or better: what validation measures."""
        error = self._noise(prediction, draw) - draw.target
        return error.square().flatten(1).mean(1)

    def loss(self, prediction: Tensor, draw: Draw, counts: Tensor | None = None) -> Tensor:
        """Squared error of the noise, plus the bound of the step where the variance is learned; [B], float32 or better.

        prediction: [B, C, h, w], or [B, 2 C, h, w] with a learned variance. counts: of no use here, where no row's loss
        depends on another row.
        """
        loss = self.denoising_loss(prediction, draw)
        if self.learned_sigma:
            loss = loss + self._bound(prediction, draw)
        return draw.weight * loss

    def _noise(self, prediction: Tensor, draw: Draw) -> Tensor:
        channels = draw.target.shape[1]
        expected = 2 * channels if self.learned_sigma else channels
        assert prediction.shape[1] == expected, f"{prediction.shape[1]} channels predicted, expected {expected}"
        return prediction[:, :channels].to(draw.target.dtype)

    def _bound(self, prediction: Tensor, draw: Draw) -> Tensor:
        """Bits a number of the variational bound's term at the drawn timestep, [B].

        It teaches the variance only: the mean is detached (Nichol & Dhariwal, section 3.1), so that the squared error
        alone trains the noise.
        """
        tables = _tables(self.beta_schedule, draw.x0.device)
        timestep = (draw.t * TIMESTEPS).round().long()
        lower = _column(tables.log_posterior_variance[timestep], draw.x0)
        upper = _column(tables.log_beta[timestep], draw.x0)
        share = (prediction[:, draw.x0.shape[1] :].to(draw.x0.dtype) + 1) / 2  # [B, C, h, w]
        log_variance = share * upper + (1 - share) * lower
        # Posterior mean minus the model's. Both hold the same x_t, which cancels; at timestep 0 this is x0 - mean.
        error = self._noise(prediction, draw).detach() - draw.target
        gap = _column(tables.mean_per_noise[timestep], draw.x0) * error
        divergence = _normal_divergence(gap, lower, log_variance)
        likelihood = -_log_bin_probability(draw.x0, gap, log_variance)
        nats = torch.where((timestep == 0)[:, None, None, None], likelihood, divergence)
        return _BITS * nats.flatten(1).mean(1)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1] in the type of `like`."""
    return values.to(like.dtype)[:, None, None, None]


def _normal_divergence(gap: Tensor, log_variance: Tensor, other_log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence, in nats, of a normal distribution from another whose mean is `gap` away."""
    ratio = log_variance - other_log_variance
    return 0.5 * (ratio.exp() - ratio - 1 + gap.square() * (-other_log_variance).exp())


def _log_bin_probability(x: Tensor, gap: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability of the 8-bit bin around x under a normal distribution with mean x - gap."""
    scale = (-0.5 * log_variance).exp()
    below_upper = torch.special.ndtr((gap + _HALF_BIN) * scale)
    below_lower = torch.special.ndtr((gap - _HALF_BIN) * scale)
    probability = torch.where(x > _LAST_BINS, 1 - below_lower, below_upper - below_lower)
    probability = torch.where(x < -_LAST_BINS, below_upper, probability)
    return probability.clamp(min=_LEAST_PROBABILITY).log()
