"""Projector of representation alignment (REPA, Yu et al., arXiv 2410.06940): image tokens -> features of an encoder.

A backbone that is trained with REPA has one as its `projector`, in place of `Unprojected`; nothing else uses it.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .configs import ProjectorConfig
from .layers import Declaration, OutputLinear


class Unprojected(nn.Module):
    """The tokens themselves."""

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """tokens [B, height * width or fewer, D], which are given back."""
        return tokens


class Projector(nn.Module):
    """Three linear layers with SiLU between them."""

    def __init__(self, width: int, config: ProjectorConfig) -> None:
        super().__init__()
        self.fc1 = OutputLinear(width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.hidden)
        self.fc3 = nn.Linear(config.hidden, config.features)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """tokens [B, N, D] of any places -> [B, N, F]."""
        hidden = F.silu(self.fc1(tokens))  # [B, N, hidden]
        # A copy: a linear layer returns a view, and FSDP2 warns of views among the root's outputs.
        return self.fc3(F.silu(self.fc2(hidden))).clone()  # [B, N, F]


class OutputConv(nn.Conv2d):
    """Convolution from the width to a fixed size, 3 x 3 on the tokens' grid; see OutputLinear."""

    multiplier: float = 1.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * self.multiplier)


class ConvProjector(nn.Module):
    """One convolution, which keeps more of where things are (iREPA, Singh et al., arXiv 2512.10794)."""

    def __init__(self, width: int, config: ProjectorConfig) -> None:
        super().__init__()
        self.conv = OutputConv(width, config.features, 3, padding=1)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """tokens [B, height * width, D], one row of the grid after the other -> [B, height * width, F]."""
        grid = tokens.transpose(1, 2).unflatten(2, (height, width))  # [B, D, h, w]
        return self.conv(grid).flatten(2).transpose(1, 2).contiguous()  # [B, N, F]


def build_projector(width: int, config: ProjectorConfig) -> nn.Module:
    """The projector of tokens of `width` features."""
    return (ConvProjector if config.kind == "conv" else Projector)(width, config)


def declarations(config: ProjectorConfig) -> tuple[Declaration, ...]:
    """Init and roles of its parameters. None starts at zero: the cosine of a zero vector has no meaningful gradient."""
    first = "projector.conv.weight" if config.kind == "conv" else "projector.fc1.weight"
    return (
        Declaration(first, "fan_in", role="output", inner=True),
        Declaration("projector.*.bias", "zeros"),
        *(() if config.kind == "conv" else (Declaration("projector.*.weight", "fan_in"),)),
    )
