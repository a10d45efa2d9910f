"""The backbones by `model.kind`: the one place that maps a config to a class."""

from torch import nn

from .configs import ModelConfig
from .layers import Declaration
from .mmdit import MMDiT

BACKBONES = {"mmdit": MMDiT}


def build_model(config: ModelConfig, in_channels: int, text_width: int) -> nn.Module:
    """The backbone of `config` on the current default device (use `torch.device("meta")` for shapes only)."""
    return BACKBONES[config.kind](config, in_channels, text_width)


def declarations(config: ModelConfig) -> tuple[Declaration, ...]:
    """What the backbone says about its parameters' roles and init."""
    return BACKBONES[config.kind].declarations(config)
