"""Muon on the weights that this rank holds (Jordan et al., 2024): momentum of the gradient, made orthogonal.

A step moves a matrix by lr x scale along the polar factor of its momentum, whose singular values are all about 1. The
muP table decides which weights are trained so and gives scale, sqrt(fan_out / fan_in), by name (trainer/mup/rules.py).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .owners import Owners, Ranks, Stacked
from .polar import multiply_adds, polar_factor


class MuonSettings(NamedTuple):
    """momentum: decay of the running mean of the gradient. nesterov: look ahead by one more step of it. steps: of the
    iteration that finds the polar factor."""

    momentum: float
    nesterov: bool
    steps: int


class Muon:
    """Updates the weights in `groups`, which are those of the muP table for Muon, in place.

    groups: as trainer.mup.apply.param_groups makes them; params are this rank's shards. ranks: who shares the weights.
    device, dtype: where and in which type polar factors are computed: the model's own type.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        settings: MuonSettings,
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._groups, self._settings = groups, settings
        self.shards: dict[str, Tensor] = {}
        parameters: dict[str, Stacked] = {}
        for group in groups:
            for name, shard, shape, count in zip(
                group["param_names"], group["params"], group["shapes"], group["matrices"], strict=True
            ):
                self.shards[name] = shard
                parameters[name] = Stacked(shape[0], shape[1], count)
        self.momenta = {name: torch.zeros_like(shard) for name, shard in self.shards.items()}
        cost = partial(multiply_adds, steps=settings.steps)
        self._owners = Owners(parameters, ranks, cost, device, dtype)
        self._polar = partial(polar_factor, steps=settings.steps)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], skipped: Tensor) -> None:
        """gradients: shards by name, which are written over. skipped: 1 leaves weights and momenta as they are, and 0
        takes the step; a scalar on the shards' device, so that the host need not know."""
        own = next(iter(self.shards.values())).dtype
        taken = (1 - skipped).to(own)
        without = self.shards.keys() - gradients.keys()
        assert not without, f"{min(without)} has no gradient: a weight that nothing depends on cannot be Muon's"
        directions = self._directions({name: gradients[name] for name in self.shards}, taken)
        factors = {
            name: (1 - taken * (group["lr"] * group["weight_decay"]), taken * (-group["lr"] * group["scale"]))
            for group in self._groups
            for name in group["param_names"]
        }
        for polar in self._owners.computed(directions, self._polar):
            for name, factor in polar.items():
                keep, move = factors[name]
                shard = self.shards[name]
                shard.mul_(keep).add_(factor.to(shard.device, shard.dtype).mul_(move))

    def _directions(self, gradients: dict[str, Tensor], taken: Tensor) -> dict[str, Tensor]:
        """The momenta after this step, or what Nesterov's rule makes of them."""
        momentum = self._settings.momentum
        grads, momenta = list(gradients.values()), [self.momenta[name] for name in gradients]
        for grad in grads:
            grad.masked_fill_(taken == 0, 0)  # what is not finite stays so when it is multiplied by 0
        share = (1 - momentum) * taken
        torch._foreach_mul_(grads, share)
        torch._foreach_mul_(momenta, 1 - share)
        torch._foreach_add_(momenta, grads)
        if not self._settings.nesterov:
            return dict(zip(gradients, momenta, strict=True))
        torch._foreach_add_(grads, momenta, alpha=momentum)
        return gradients
