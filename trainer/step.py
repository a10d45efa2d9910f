"""The mathematics of a training step, written once: training, the estimate, the coordinate check and tests call it."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Encoded(NamedTuple):
    """A micro-batch of b rows on the device, as the model sees it."""

    x0: Tensor
    """Clean latents [b, C, h, w]."""
    condition: Any
    """What the model is conditioned on: one of the conditions in models.layers."""
    keys: Tensor
    """int64 [b]: all randomness of a row is a function of its key."""
    weight: Tensor
    """[b]: 1, or 0 for a row that does not count."""
    text_tokens: Tensor
    """How many text tokens the rows that count have together, a scalar."""


class MicroBatch(NamedTuple):
    """A micro-batch as the loop gets it."""

    batch: Any
    """The data.batch.Batch that was read."""
    encoded: Callable[[], Encoded]
    """Its tensors on the device; waits for them where they are still being computed."""


class Objective(Protocol):
    """A diffusion objective, such as trainer.diffusion.flow.RectifiedFlow."""

    def draw(self, x0: Tensor, keys: Tensor) -> Any:
        """x0 [b, C, h, w], keys [b] -> times t [b], noised latents x_t [b, C, h, w], and what `loss` compares with."""
        ...

    def loss(self, prediction: Tensor, draw: Any, counts: Tensor | None = None) -> Tensor:
        """The model's prediction -> loss per sample [b]. counts [b]: 0 for rows that no other row's loss may use."""
        ...


class Alignment(Protocol):
    """A second term of the loss; see trainer.diffusion.repa.Alignment."""

    @property
    def weight(self) -> float: ...
    @property
    def features_at(self) -> int: ...
    @property
    def features(self) -> Callable[[Any], Tensor]: ...
    def on(self, step: int) -> bool: ...
    def losses(self, projected: Tensor, features: Tensor) -> Tensor: ...


class Route(Protocol):
    """Blocks that see a part of the image tokens; see trainer.diffusion.route.Route."""

    @property
    def blocks(self) -> range: ...
    def kept(self, x0: Tensor, keys: Tensor) -> Tensor: ...


class MicroBatchLosses(NamedTuple):
    """The losses of b rows. `loss`, `repa_loss` and `total` are scalars: sums over the rows, times their weights."""

    loss: Tensor
    repa_loss: Tensor
    """The alignment's loss; 0 without one."""
    total: Tensor
    """What is minimised: loss + the alignment's weight x repa_loss."""
    draw: Any
    """What the objective has drawn; `draw.t` [b] are the times."""
    per_sample: Tensor
    """[b], unweighted and without the alignment."""


def micro_batch_losses(
    model: Callable[..., Any],
    objective: Objective,
    alignment: Alignment | None,
    encoded: Encoded,
    features: Tensor | None = None,
    route: Route | None = None,
) -> MicroBatchLosses:
    """The forward pass. features: what the alignment compares with, see Alignment.features. route: the model's."""
    draw = objective.draw(encoded.x0, encoded.keys)
    features_at = None if alignment is None else alignment.features_at
    routed = {} if route is None else {"kept": route.kept(encoded.x0, encoded.keys)}  # [b, K]
    prediction, projected = model(draw.x_t, draw.t, encoded.condition, features_at=features_at, **routed)
    per_sample = objective.loss(prediction, draw, encoded.weight)  # [b]
    total = loss = (encoded.weight * per_sample).sum()
    repa_loss = torch.zeros_like(loss)
    if alignment is not None:
        assert features is not None
        if route is not None and features_at in route.blocks:
            features = torch.take_along_dim(features, routed["kept"][..., None], dim=1)  # [b, K, F]
        repa_loss = (encoded.weight * alignment.losses(projected, features)).sum()
        total = loss + alignment.weight * repa_loss
    return MicroBatchLosses(loss, repa_loss, total, draw, per_sample)
