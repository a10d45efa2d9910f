"""Exponential moving averages of the master weights: fp32, on local shards, several decays at once."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class EMA:
    """Averages of `shards`, the live weights of this rank by name, from which they start. They are kept in
    `shards[decay][name]`."""

    def __init__(self, shards: Mapping[str, Tensor], decays: Sequence[float], warmup: bool) -> None:
        self.decays = tuple(decays)
        self._warmup = warmup
        self._live = shards
        self.shards = {decay: {name: shard.clone() for name, shard in shards.items()} for decay in self.decays}

    def decay_at(self, decay: float, step: int) -> float:
        """Decay of update `step` (from 0). With warm-up it begins small: over a short run an average with decay 0.9999
        would still consist of the initial weights."""
        return min(decay, (1 + step) / (10 + step)) if self._warmup else decay

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """average += (1 - decay) x (weight - average); nothing if `skipped`, 0 or 1 on the device, is 1."""
        live = list(self._live.values())
        for decay, shards in self.shards.items():
            averages = [shards[name] for name in self._live]
            # This is gradient descent on (average - weight)^2 / 2, which torch makes one kernel for all tensors, and
            # with a flag on the device that can be read there. lerp with a rate on the device is a kernel for each.
            torch._fused_sgd_(
                averages, live, [], lr=1 - self.decay_at(decay, step), weight_decay=1.0, momentum=0.0, dampening=0.0,
                nesterov=False, maximize=True, is_first_step=False, found_inf=skipped.to(averages[0].device),
            )  # fmt: skip

    def reset(self, decays: Sequence[float]) -> None:
        """Start the averages of some decays again from the live weights."""
        for decay in decays:
            for name, shard in self.shards[decay].items():
                shard.copy_(self._live[name])

    def tensors(self, decays: Sequence[float] | None = None) -> dict[str, Tensor]:
        """The averages of some decays, or of all, as a checkpoint names them."""
        wanted = self.decays if decays is None else decays
        return {f"ema_{decay}/{name}": t for decay in wanted for name, t in self.shards[decay].items()}
