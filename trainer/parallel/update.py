"""The update of the weights that this rank holds: clipping and AdamW, on plain tensors.

It is each rank's own but for one norm. On DTensors each of its operations would be dispatched in Python, once for every
parameter.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .engine import StepResult, Watch

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamWUpdate:
    """AdamW on `shards`, this rank's part of every master weight by name, which it writes into.

    groups: makes the optimizer's groups from the shards. clip_norm: the norm to which gradients are scaled down.
    """

    def __init__(
        self,
        shards: Mapping[str, Tensor],
        groups: Callable[[dict[str, Tensor]], list[dict[str, Any]]],
        betas: tuple[float, float],
        clip_norm: float | None,
    ) -> None:
        self.shards = dict(shards)
        self._clip_norm = clip_norm
        self._optimizer = torch.optim.AdamW(groups(self.shards), betas=betas, fused=True)
        for shard in self.shards.values():
            # The state that fused AdamW makes at its first step, made now so that a checkpoint can be read into it.
            self._optimizer.state[shard] = {
                "step": torch.zeros((), dtype=torch.float32, device=shard.device),
                **{moment: torch.zeros_like(shard) for moment in MOMENTS},
            }

    def step(
        self, gradients: Mapping[str, Tensor], norm: Tensor, lr: float, watch: Watch | None, max_norm: Tensor | None
    ) -> StepResult:
        """See Engine.step. gradients: shards, which are scaled in place and let go. norm: of all gradients, on the
        shards' device and the same on all ranks."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for name, gradient in gradients.items():
            self.shards[name].grad = gradient
        clipped = torch.zeros_like(norm)
        if self._clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.shards.values(), self._clip_norm, norm, foreach=True)
            clipped = (norm > self._clip_norm).float()
        bad = ~norm.isfinite() if max_norm is None else ~norm.isfinite() | (norm > max_norm.to(norm.device))
        skipped = bad.float()
        # Fused AdamW reads this flag on the device and then leaves weights, moments and step count alone.
        setattr(self._optimizer, "found_inf", skipped)  # noqa: B010 (an attribute that torch looks up by name)
        if watch is not None:
            watch.before(self.shards, gradients)
        self._optimizer.step()
        if watch is not None:
            watch.after(self.shards)
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, skipped, clipped)

    def settings(self) -> dict[str, tuple[float, float, float]]:
        """See Engine.optimizer_settings."""
        names = {id(shard): name for name, shard in self.shards.items()}
        return {
            names[id(shard)]: (group["lr"], group["weight_decay"], group["eps"])
            for group in self._optimizer.param_groups
            for shard in group["params"]
        }

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See Engine.state."""
        return {name: {"model": shard, **self._optimizer.state[shard]} for name, shard in self.shards.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The state as a checkpoint names it, such as "exp_avg/final.weight"."""
        return {f"{group}/{name}": tensor for name, state in self.state().items() for group, tensor in state.items()}


def squared_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """Of each gradient, or of this rank's shard of it: [number of gradients]."""
    return torch.stack(torch._foreach_norm(list(gradients.values()))).square()


def total_norm(squared: Tensor) -> Tensor:
    """The norm of all gradients from the squared norm of each, a scalar."""
    return torch.linalg.vector_norm(squared.sqrt())
