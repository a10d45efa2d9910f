"""The interface between the loop and a way of sharding."""

from collections.abc import Collection, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class StepResult(NamedTuple):
    """Scalars on the device; reading them is the caller's host sync. skipped: 1 if the step was not finite
    or its norm over the limit. clipped: 1 if the gradients were scaled down."""

    grad_norm: Tensor
    skipped: Tensor
    clipped: Tensor


class Watch(Protocol):
    """Who looks at an update from both sides; both calls stay on the device."""

    def before(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """This rank's shards and clipped gradients, by name."""
        ...

    def after(self, weights: Mapping[str, Tensor]) -> None: ...


@torch.no_grad()
def exchange(live: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Swap the values of tensors of equal names, one at a time: no second model in memory."""
    for name, tensor in live.items():
        kept = tensor.clone()
        tensor.copy_(others[name])
        others[name].copy_(kept)


class Engine(Protocol):
    """A sharded model with its optimizer. Names are those of the muP table; a shard is this rank's local tensor."""

    model: nn.Module

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; `last` marks the step's last micro-batch, at which they are reduced (mean)."""
        ...

    def step(self, lr: float, watch: Watch | None = None, max_norm: Tensor | None = None) -> StepResult:
        """Clip, update with base learning rate `lr`, clear gradients; a step with a non-finite norm, or one over
        `max_norm` (a scalar on the device), changes nothing. watch: is shown the update."""
        ...

    def optimizer_settings(self) -> dict[str, tuple[float, float, float]]:
        """(lr, weight decay, epsilon) that the sharded optimizer uses for each parameter, by name."""
        ...

    def master_shards(self) -> dict[str, Tensor]:
        """This rank's part of every master weight, by name (live: the optimizer writes into them)."""
        ...

    def full(self, name: str) -> Tensor:
        """One whole parameter, on every rank."""
        ...

    def state(self) -> dict[str, dict[str, Tensor]]:
        """This rank's live shards of the weights ("model") and of what their optimizer keeps (AdamW "exp_avg" and
        "exp_avg_sq", and the count of updates, "step"; Muon "momentum"), by parameter name. The shards of one parameter
        have one shape, which is the engine's own."""
        ...

    def cut(self, name: str, full: Tensor) -> Tensor:
        """This rank's shard of a whole tensor that has the shape of parameter `name`."""
        ...

    def whole(self, name: str, shard: Tensor) -> Tensor:
        """The inverse of `cut`: the whole tensor, on every rank, of which each rank gives its shard."""
        ...

    def swapped(self, shards: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Within it the model computes with `shards`, which hold the live weights meanwhile."""
        ...

    def save(self, folder: Path, extra: Mapping[str, Tensor], averages_only: bool = False) -> Future[None]:
        """Write weights, optimizer and `extra`. A tensor of `extra` named like `group/parameter` is a shard of
        that parameter's layout; any other is the same on all ranks. averages_only: write `extra` alone.

        When it returns, a copy is made and training may go on; the future ends when this rank's files are written,
        with CheckpointError where any rank's cannot be. One save at a time.
        """
        ...

    def load(self, folder: Path, extra: Mapping[str, Tensor]) -> None:
        """Read in place what `save` wrote, at any world size."""
        ...

    def load_weights(self, folder: Path, group: str = "model", names: Collection[str] | None = None) -> None:
        """Read the weights alone: "model", or an average such as "ema_0.9999". names: of these parameters, or all."""
        ...
