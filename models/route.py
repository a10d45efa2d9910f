"""The route of tokens: what leaves before its blocks and comes back after them (see model_config.RouteConfig).

Shapes: B batch, N tokens, K of them kept, D width.
"""

import torch
from torch import Tensor, nn

from .layers import Declaration
from .model_config import RouteConfig

# The original's, where the mask token is not trained.
DECLARATIONS = (
    Declaration("rejoin.mask_token", "normal", std=0.02),
    Declaration("rejoin.linear.bias", "zeros"),
    Declaration("rejoin.linear.weight", "xavier_uniform"),
)


def keep(tokens: Tensor, kept: Tensor | None) -> Tensor:
    """tokens [B, N, D], kept int64 [B, K] or None for all -> [B, K, D]."""
    return tokens if kept is None else tokens.gather(1, _wide(kept, tokens))


def _wide(kept: Tensor, tokens: Tensor) -> Tensor:
    return kept[..., None].expand(-1, -1, tokens.shape[-1])  # [B, K, D]


class Rejoin(nn.Module):
    """Tokens that skipped the route come back as they left it."""

    def forward(self, before: Tensor, after: Tensor, kept: Tensor | None) -> Tensor:
        """before [B, N, D], after [B, K, D], kept int64 [B, K] or None where K is N -> [B, N, D]."""
        return after if kept is None else before.scatter(1, _wide(kept, after), after)


class FusedRejoin(nn.Module):
    """All tokens by a linear layer from before and after the route; a mask token stands for those that skipped it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.linear = nn.Linear(2 * width, width)

    def forward(self, before: Tensor, after: Tensor, kept: Tensor | None) -> Tensor:
        """As Rejoin.forward."""
        if kept is not None:
            masked = self.mask_token.to(after.dtype).expand_as(before)  # [B, N, D]
            after = masked.scatter(1, _wide(kept, after), after)  # [B, N, D]
        return self.linear(torch.cat([before, after], dim=-1))  # [B, N, D]


def rejoin(route: RouteConfig | None, width: int) -> nn.Module:
    """What ends the route."""
    return FusedRejoin(width) if route is not None and route.fuse == "sprint" else Rejoin()


def ends(route: RouteConfig | None, kept: Tensor | None) -> tuple[int, int]:
    """The first and the last block of the route, from 0; -1 where there is none."""
    if route is None:
        if kept is not None:
            raise ValueError("tokens are kept for a route, and the model has none (model.route)")
        return -1, -1
    return route.start, route.end - 1
