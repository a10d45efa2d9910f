"""Samplers of a DDPM: diffusers' schedulers on exactly the betas of training."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from .ddpm import DDPM, TIMESTEPS, betas
from .random import at_step
from .sampling import Predict

SamplerName = Literal["ancestral", "ddim", "dpm_solver", "dpm_solver_sigma_min"]


@dataclass(frozen=True)
class DDPMSampler:
    """ancestral: Ho et al.'s chain, thinned out evenly; its variance is the learned one, else the posterior's.
    ddim: deterministic (Song et al., arXiv 2010.02502); steps must divide 1000.
    dpm_solver: DPM-Solver++ of second order, multistep (Lu et al., arXiv 2211.01095), whose last step is of first order
    and ends without noise.
    dpm_solver_sigma_min: the same up to the last step, which is of second order and ends at timestep 0, as in the
    solver's own code."""

    ddpm: DDPM
    name: SamplerName
    steps: int

    def scheduler(self) -> Any:
        """A fresh one for each batch: the solvers keep their last outputs. Its tables stay on the CPU, where reading
        a timestep waits for no device."""
        shared: dict[str, Any] = {
            "num_train_timesteps": TIMESTEPS,
            "trained_betas": betas(self.ddpm.beta_schedule).numpy(),
            "prediction_type": "epsilon",
        }
        if self.name == "ancestral":
            # linspace thins out the chain as the published 250-step samples do, 999 and 0 included. Latents are not
            # confined to [-1, 1], so nothing is clipped.
            variance = "learned_range" if self.ddpm.learned_sigma else "fixed_small"
            made = DDPMScheduler(**shared, variance_type=variance, timestep_spacing="linspace", clip_sample=False)
        elif self.name == "ddim":
            # trailing begins at 999, where the starting noise belongs (Lin et al., arXiv 2305.08891, table 2).
            made = DDIMScheduler(**shared, timestep_spacing="trailing", clip_sample=False)
        else:
            shared |= {"algorithm_type": "dpmsolver++", "solver_order": 2, "timestep_spacing": "linspace"}
            if self.name == "dpm_solver_sigma_min":  # the solver's own code lowers the order below 10 steps, not 15
                shared |= {"final_sigmas_type": "sigma_min", "lower_order_final": self.steps < 10}
            made = DPMSolverMultistepScheduler(**shared)
        with warnings.catch_warnings():  # DPM-Solver's use of numpy 2 is deprecated; not a user's business
            warnings.simplefilter("ignore", DeprecationWarning)
            made.set_timesteps(self.steps)
        return made

    def __call__(self, predict: Predict, noise: Tensor, keys: Tensor) -> Tensor:
        scheduler, x, keys = self.scheduler(), noise, keys.cpu()
        for number, timestep in enumerate(scheduler.timesteps.tolist()):
            output = predict(x, torch.full((len(x),), timestep / TIMESTEPS, dtype=torch.float32, device=x.device))
            if self.name == "ancestral":
                x = scheduler.step(output, timestep, x, generator=_generators(keys, number)).prev_sample
            else:  # these take no variance, and DPM-Solver would cut it off at three channels
                x = scheduler.step(output[:, : x.shape[1]], timestep, x).prev_sample
        return x


def _generators(keys: Tensor, step: int) -> list[torch.Generator]:
    """One generator per sample, seeded by (key, step): the noise does not depend on batch, rank, device or the global
    generator.

    diffusers draws the noise inside `step` and takes no tensor for it, but a generator for each row. On the CPU,
    because a CPU's and a GPU's generators differ.
    """
    return [torch.Generator().manual_seed(seed) for seed in at_step(keys, step).tolist()]
