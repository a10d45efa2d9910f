"""Does the model read its captions? Losses with the own caption against those with another image's, paired."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from data.batch import Batch

from .val_loss import Banked, DrawsAt, sample_losses


def caption_margins(
    model: nn.Module, objective: DrawsAt, batches: Sequence[Batch], encode: Callable[[Batch], Banked]
) -> np.ndarray:
    """Per image: loss with the caption of the next image of its batch minus loss with its own, float64 [n].

    Same times and noise for both, so that the difference is the caption's alone; positive is as it should be.
    Images whose neighbour has the same caption are left out.
    """
    margins = []
    for batch in batches:
        encoded = encode(batch)
        order = torch.arange(len(batch.captions)).roll(-1)
        permuted = type(encoded.condition)(*(part[order.to(part.device)] for part in encoded.condition))
        losses = sample_losses(model, objective, encoded, [encoded.condition, permuted]).mean(1).double()  # [2, b]
        others = [batch.captions[i] for i in order.tolist()]
        differ = torch.tensor([own != other for own, other in zip(batch.captions, others, strict=True)])
        counts = (encoded.weight.cpu() > 0) & (encoded.weight.cpu()[order] > 0) & differ
        margins.append((losses[1] - losses[0]).cpu()[counts].numpy())
    return np.concatenate(margins)


def sign_flip_p(differences: np.ndarray, flips: int = 20_000, seed: int = 0) -> float:
    """One-sided p that the mean of paired differences is above 0: how often random signs give a mean as large."""
    generator = np.random.default_rng(seed)
    as_large = 0
    for _ in range(flips // 1000):
        signs = generator.integers(0, 2, (1000, len(differences))) * 2 - 1
        as_large += int(((signs * differences).mean(1) >= differences.mean()).sum())
    return (as_large + 1) / (flips // 1000 * 1000 + 1)
