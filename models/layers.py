"""Parts that the backbones share, and the names by which they tell muP what a weight is.

Shapes: B batch, N image tokens, L text tokens, D width, H heads, K head_dim, C channels, P patch size.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
TIME_FEATURES = 256


class Declaration(NamedTuple):
    """What a model says about the parameters whose name matches `pattern` (fnmatch; the first match wins).

    init: "zeros", "ones", "normal" (standard deviation `std`) or "fan_in" (std / sqrt(fan_in)).
    role: only where the shape cannot tell (an output weight and an embedding table look alike).
    """

    pattern: str
    init: Literal["zeros", "ones", "normal", "fan_in"]
    std: float = 1.0
    role: Literal["input", "hidden", "output", "vector", "fixed"] | None = None


class TextCondition(NamedTuple):
    """Text states [B, L, E] of a frozen encoder and the mask [B, L], True where there is a token."""

    states: Tensor
    mask: Tensor


class OutputLinear(nn.Linear):
    """Linear layer from width to a fixed size; muP multiplies its input by `multiplier` = 1 / m, not its bias."""

    multiplier: float = 1.0

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input * self.multiplier, self.weight, self.bias)


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them: [..., fan_in] -> [..., hidden] -> [..., fan_out]."""

    def __init__(self, fan_in: int, hidden: int, fan_out: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(fan_in, hidden)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, fan_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without gains, then scale and shift a sample: x [B, N, D], shift and scale [B, D] -> [B, N, D]."""
    x = F.layer_norm(x, (x.shape[-1],), eps=NORM_EPS)
    return x * (1 + scale[:, None]) + shift[:, None]


def time_sinusoids(t: Tensor, freq_shift: float = 0.0) -> Tensor:
    """[cos, sin] of 1000 t at 128 frequencies: t [B] in [0, 1] -> [B, 256], always float32.

    bfloat16 would round 900.1 and 901.2 to one value, so neither t nor the table is ever cast.
    """
    half = TIME_FEATURES // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(10000.0) * i / (half - freq_shift))
    angle = 1000.0 * t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def axis_sinusoids(width: int, max_size: int, base_size: int, device: torch.device | str) -> Tensor:
    """Sin-cos table of one image axis: [max_size, width / 2] float32, half of a token's 2-D position."""
    position = torch.arange(max_size, dtype=torch.float64, device=device) * (base_size / max_size)
    i = torch.arange(width // 4, dtype=torch.float64, device=device)
    angle = position[:, None] * 10000.0 ** (-i / (width // 4))
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def crop_positions(axis: Tensor, height: int, width: int) -> Tensor:
    """Centre crop of the 2-D table as SD3 takes it: axis [max, D/2] -> [height * width, D], column half first."""
    max_size = axis.shape[0]
    if max(height, width) > max_size:
        raise ValueError(f"{height} x {width} tokens do not fit model.pos_embed_max_size {max_size}: raise it")
    rows = axis[(max_size - height) // 2 :][:height]  # [height, D/2]
    columns = axis[(max_size - width) // 2 :][:width]  # [width, D/2]
    table = torch.cat(
        [columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)], dim=-1
    )  # [height, width, D]
    return table.reshape(height * width, -1)


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, C, h P, w P] -> [B, h w, C P P], a patch flattened in the order of a convolution's weight (C, P, P)."""
    b, c, height, width = x.shape
    x = x.reshape(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)


def unpatchify(x: Tensor, patch: int, height: int, width: int) -> Tensor:
    """[B, h w, P P C] -> [B, C, h P, w P]; the output's patch order is (P, P, C) as in DiT and SD3."""
    b, _, features = x.shape
    c = features // (patch * patch)
    x = x.reshape(b, height, width, patch, patch, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, height * patch, width * patch)
