"""The losses of a micro-batch: what is minimised, and what an alignment adds to it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.steps import built
from trainer.diffusion.flow import RectifiedFlow
from trainer.diffusion.repa import Alignment
from trainer.loop import train_step
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


@pytest.mark.slow
def test_features_are_those_of_the_batch_that_was_read(tmp_path: Path) -> None:
    """Of each micro-batch its own. Here they are noise by the keys of its rows."""
    seen: list[tuple[Tensor, Tensor]] = []

    def passes(encoded: Encoded, features: Tensor, *, last: bool) -> Tensor:
        seen.append((encoded.keys, features))
        return run.passes(encoded, features, last=last)

    repa = ("objective.repa_weight=0.5", "objective.repa_layer=1")
    rows = ("train.global_batch_size=6", "train.micro_batch_size=0.03125")  # two at 32 pixels
    with built("mmdit_debug_mup.yaml", tmp_path, *rows, *repa) as run:
        micro_batches, alignment = next(run.batches()), run.alignment
        assert alignment is not None
        read = [(batch.keys, alignment.features(batch)) for batch, _ in micro_batches]
        train_step(replace(run, passes=passes), micro_batches)
    assert len(read) == len(seen) == 3
    assert all(torch.equal(a, b) for one, two in zip(read, seen, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(read[0][1], read[1][1])
