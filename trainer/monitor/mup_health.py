"""Live health of a run by muP role: what tells early that a width, a learning rate or Adam's epsilon is wrong.

Everything is accumulated on the device. Losses by time and the share of clipped steps are sums over all steps since
the last log line; figures by role are those of the logged step itself, because they need a copy of the weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

BINS = 8
_TINY = 10.0  # |gradient| below this many epsilons: Adam's step is shrunk by epsilon rather than by the gradient
_SUMS = 4  # by role: squared update, squared weight, tiny gradients, gradients


class WatchedParameter(NamedTuple):
    """What health must know of a parameter: its role, and the epsilon that Adam divides by."""

    role: str
    eps: float


def time_sums(t: Tensor, losses: Tensor, weight: Tensor) -> Tensor:
    """[2, BINS] float64: weighted losses and weights of samples [b] whose time lies in each part of [0, 1]."""
    number = (t * BINS).long().clamp(0, BINS - 1)
    member = (number == torch.arange(BINS, device=t.device)[:, None]).double()  # [BINS, b]; a sum in a fixed order
    return torch.stack([member @ (weight * losses).double(), member @ weight.double()])


def time_figures(sums: Sequence[float]) -> dict[str, float]:
    """2 BINS numbers, flattened -> mean loss of each part of [0, 1] that has samples, named by its middle."""
    return {
        f"mup/loss_t{(i + 0.5) / BINS:.4f}": loss / weight
        for i, (loss, weight) in enumerate(zip(sums[:BINS], sums[BINS:], strict=True))
        if weight
    }


class Health:
    """Figures by role of one step. An engine calls `before` and `after` around its update (engine.Watch).

    settings: by parameter name. replicas: ranks that hold the same shard, which the sum over ranks counts twice.
    """

    def __init__(self, settings: Mapping[str, WatchedParameter], replicas: int) -> None:
        self._settings = settings
        self._replicas = replicas
        self.roles = sorted({each.role for each in settings.values()})
        self._kept: dict[str, list[Tensor]] = {}  # by role
        self._sums: Tensor | None = None

    @torch.no_grad()
    def before(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """This rank's shards as they are before the update, and the gradients (clipped) that it will be made from."""
        self._kept = {role: [w.clone() for w in shards] for role, shards in self._by_role(weights).items()}
        device = next(iter(weights.values())).device
        self._sums = torch.zeros(len(self.roles), _SUMS, dtype=torch.float64, device=device)
        for name, gradient in gradients.items():
            role, eps = self._settings[name]
            if eps == 0:  # Muon has none
                continue
            row = self._sums[self.roles.index(role)]
            row[2] += (gradient.abs() < _TINY * eps).sum()
            row[3] += gradient.numel()

    @torch.no_grad()
    def after(self, weights: Mapping[str, Tensor]) -> None:
        """The same shards after the update; frees the copies."""
        assert self._sums is not None
        for role, shards in self._by_role(weights).items():
            row, moved = self._sums[self.roles.index(role)], self._kept.pop(role)
            torch._foreach_sub_(moved, shards)
            for column, tensors in enumerate((moved, shards)):
                row[column] = torch.stack(torch._foreach_norm(tensors)).double().square().sum()
        dist.all_reduce(self._sums)

    def _by_role(self, tensors: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        groups: dict[str, list[Tensor]] = {role: [] for role in self.roles}
        for name, tensor in tensors.items():
            groups[self._settings[name].role].append(tensor)
        return groups

    def figures(self) -> dict[str, float]:
        """By role, of the step that was watched last (a host sync); nothing where none was."""
        if self._sums is None:
            return {}
        found: dict[str, Any] = {}
        for role, (update, weight, tiny, gradients) in zip(self.roles, self._sums.tolist(), strict=True):
            name = f"mup/{role}"
            if weight:
                found[f"{name}/update_to_weight"] = (update / weight) ** 0.5
            found[f"{name}/weight_norm"] = (weight / self._replicas) ** 0.5
            if gradients:
                found[f"{name}/tiny_gradient_share"] = tiny / gradients
        self._sums = None
        return found
