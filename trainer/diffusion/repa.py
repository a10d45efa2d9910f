"""Representation alignment (REPA, Yu et al., arXiv 2410.06940): a term beside the denoising loss that draws the tokens
of an early block towards what a frozen image encoder sees in the clean image."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def spatially_normalised(features: Tensor, share: float) -> Tensor:
    """Features [b, N, F] less `share` of their mean over the N tokens, over their standard deviation over them (iREPA,
    Singh et al., arXiv 2512.10794), in float32 or better."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    deviation, mean = torch.std_mean(wide, dim=1, correction=0, keepdim=True)  # 2 x [b, 1, F]
    return (wide - share * mean) / (deviation + 1e-6)


@dataclass(frozen=True)
class Alignment:
    """weight: of the term in the loss that is trained. features_at: block (from 0) whose tokens are projected.
    features: micro-batch -> [b, N, F], what the encoder sees at each of the N tokens. until: the first update (from 0)
    without the term; None where all have it."""

    weight: float
    features_at: int
    features: Callable[[Any], Tensor]
    until: int | None = None

    def on(self, step: int) -> bool:
        """Whether update number `step` (from 0) has the term."""
        return self.until is None or step < self.until

    def losses(self, projected: Tensor, features: Tensor) -> Tensor:
        """projected, features [b, N, F] -> per sample [b] minus the mean cosine over tokens, -1 (aligned) to 1."""
        wide = torch.promote_types(projected.dtype, torch.float32)  # in bf16 a squared norm would keep 3 digits
        return -F.cosine_similarity(projected.to(wide), features.to(wide), dim=-1).mean(1)
