"""The update of the weights that this rank holds: clipping, then AdamW or Muon by the table, on plain tensors.

It is each rank's own but for one norm and Muon's matrices. On DTensors each of its operations would be dispatched in
Python, once for every parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .engine import StepResult, Watch
from .muon import Muon, MuonSettings
from .owners import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


class Update:
    """The optimizers of `shards`, this rank's part of every master weight by name, which they write into.

    groups: makes the optimizers' groups from the shards. clip_norm: the norm to which gradients are scaled down. muon:
    None where no weight is trained by Muon. ranks: who shares the weights. device, dtype: where and in which type the
    model computes, and Muon its polar factors.
    """

    def __init__(
        self,
        shards: Mapping[str, Tensor],
        groups: Callable[[dict[str, Tensor]], list[dict[str, Any]]],
        betas: tuple[float, float],
        clip_norm: float | None,
        muon: MuonSettings | None,
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.shards = dict(shards)
        self._clip_norm = clip_norm
        self._groups = groups(self.shards)
        self._optimizer = torch.optim.AdamW(_of("adamw", self._groups), betas=betas, fused=True)
        self._muon = None if muon is None else Muon(_of("muon", self._groups), muon, ranks, device, dtype)
        for group in self._optimizer.param_groups:
            for shard in group["params"]:
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
        for group in self._groups:
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
        if self._muon is not None:
            self._muon.step(gradients, skipped)
        if watch is not None:
            watch.after(self.shards)
        for shard in self.shards.values():
            shard.grad = None
        return StepResult(norm, skipped, clipped)

    def settings(self) -> dict[str, tuple[float, float, float]]:
        """See Engine.optimizer_settings."""
        names = {id(shard): name for name, shard in self.shards.items()}
        return {
            names[id(shard)]: (group["lr"], group["weight_decay"], group["eps"])
            for group in self._groups
            for shard in group["params"]
        }

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See Engine.state."""
        momenta = {} if self._muon is None else self._muon.momenta
        return {
            name: {"model": shard, "momentum": momenta[name]}
            if name in momenta
            else {"model": shard, **self._optimizer.state[shard]}
            for name, shard in self.shards.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """The state as a checkpoint names it, such as "exp_avg/final.weight"."""
        return {f"{group}/{name}": tensor for name, state in self.state().items() for group, tensor in state.items()}


def _of(optimizer: str, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of one optimizer."""
    return [group for group in groups if group["optimizer"] == optimizer]


def squared_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """Of each gradient, or of this rank's shard of it: [number of gradients]."""
    return torch.stack(torch._foreach_norm(list(gradients.values()))).square()


def total_norm(squared: Tensor) -> Tensor:
    """The norm of all gradients from the squared norm of each, a scalar."""
    return torch.linalg.vector_norm(squared.sqrt())
