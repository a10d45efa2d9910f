"""The denoising loss on a fixed bank of (image, time, noise): the same numbers for every run on the same data.

Eight equidistant times, unweighted, without auxiliary losses; nothing that is searched changes the bank.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

LEVELS = 8


class Banked(Protocol):
    """A micro-batch on the device, as trainer.state.Encoded."""

    @property
    def x0(self) -> Tensor: ...
    @property
    def condition(self) -> Any: ...
    @property
    def keys(self) -> Tensor: ...
    @property
    def weight(self) -> Tensor: ...


class DrawsAt(Protocol):
    def draw_at(self, x0: Tensor, keys: Tensor, t: Tensor) -> Any: ...
    def denoising_loss(self, prediction: Tensor, draw: Any) -> Tensor: ...


def levels() -> list[float]:
    """The middle of each of LEVELS equal parts of [0, 1]."""
    return [(i + 0.5) / LEVELS for i in range(LEVELS)]


@torch.no_grad()
def sample_losses(model: nn.Module, objective: DrawsAt, batch: Banked, conditions: Sequence[Any]) -> Tensor:
    """Losses [len(conditions), LEVELS, b] of a batch under each condition, at equal times and noise."""
    losses = []
    for condition in conditions:
        for t in levels():
            draw = objective.draw_at(batch.x0, batch.keys, torch.full_like(batch.weight, t))
            prediction, _ = model(draw.x_t, draw.t, condition)
            losses.append(objective.denoising_loss(prediction, draw))
    return torch.stack(losses).unflatten(0, (len(conditions), LEVELS))


def bank_losses(model: nn.Module, objective: DrawsAt, bank: Sequence[Banked]) -> list[float]:
    """Mean loss at each level over all ranks' parts of the bank; the same number of batches on all ranks."""
    total: Tensor | None = None
    for batch in bank:
        losses = sample_losses(model, objective, batch, [batch.condition])[0].double()  # [LEVELS, b]
        sums = torch.cat([(losses * batch.weight).sum(1), batch.weight.sum()[None].double()])
        total = sums if total is None else total + sums
    assert total is not None, "an empty validation bank"
    dist.all_reduce(total)
    return (total[:-1] / total[-1]).tolist()


def figures(name: str, losses: Sequence[float]) -> dict[str, float]:
    """The mean, and one value per level, under the names that metrics.jsonl has for them."""
    by_level = {f"{name}_t{t:.4f}": loss for t, loss in zip(levels(), losses, strict=True)}
    return {name: sum(losses) / len(losses), **by_level}


def validation(
    model: nn.Module, objective: DrawsAt, bank: Sequence[Banked], with_average: Callable[[], Any]
) -> dict[str, float]:
    """val_loss of the live weights and val_loss_ema, within the context that puts the averages in."""
    result = figures("val_loss", bank_losses(model, objective, bank))
    with with_average():
        return result | figures("val_loss_ema", bank_losses(model, objective, bank))
