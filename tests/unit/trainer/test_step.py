"""The losses of a micro-batch: what is minimised, and what an alignment adds to it."""

from typing import Any

import torch
from torch import Tensor

from trainer.diffusion.flow import RectifiedFlow
from trainer.diffusion.repa import Alignment
from trainer.step import Encoded, micro_batch_losses

KEYS = torch.tensor([3, 5, 8])
ENCODED = Encoded(
    x0=torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)),
    condition="a condition",
    keys=KEYS,
    weight=torch.tensor([1.0, 0.0, 1.0]),
    text_tokens=torch.tensor(5),
)
OBJECTIVE = RectifiedFlow(0.0, 1.0, 1.0)


class Model:
    """Predicts its input; its features are ones."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, int | None]] = []

    def __call__(
        self, x_t: Tensor, t: Tensor, condition: Any, features_at: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        self.asked.append((condition, features_at))
        return x_t, None if features_at is None else torch.ones(len(x_t), 4, 8)


def test_rows_of_weight_0_do_not_count() -> None:
    model = Model()
    losses = micro_batch_losses(model, OBJECTIVE, None, ENCODED)
    draw = OBJECTIVE.draw(ENCODED.x0, KEYS)
    per_sample = OBJECTIVE.loss(draw.x_t, draw)
    assert torch.equal(losses.per_sample, per_sample)
    assert torch.equal(losses.draw.t, draw.t)
    assert float(losses.loss) == float(per_sample[0] + per_sample[2])
    assert losses.total is losses.loss
    assert float(losses.repa_loss) == 0.0
    assert model.asked == [("a condition", None)]


def test_an_alignment_is_a_second_term() -> None:
    """Here its features are what the model gives, so its cosine is 1."""
    model, features = Model(), torch.ones(3, 4, 8)
    plain = micro_batch_losses(model, OBJECTIVE, None, ENCODED)
    aligned = micro_batch_losses(model, OBJECTIVE, Alignment(0.5, 1, lambda _: features), ENCODED, features)
    assert torch.equal(aligned.loss, plain.loss)
    assert torch.allclose(aligned.repa_loss, torch.tensor(-2.0))
    assert torch.equal(aligned.total, aligned.loss + 0.5 * aligned.repa_loss)
    assert model.asked[-1] == ("a condition", 1)
