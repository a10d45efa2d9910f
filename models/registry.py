"""The backbones by `model.kind`: the one place that maps a config to a class."""

from torch import nn

from .configs import ConditionKind, ModelConfig
from .dit import DiT
from .layers import Declaration
from .mmdit import MMDiT
from .pixart import PixArt
from .uvit import UViT

BACKBONES = {"mmdit": MMDiT, "dit": DiT, "pixart": PixArt, "uvit": UViT}


def build_model(config: ModelConfig, in_channels: int, text_width: int) -> nn.Module:
    """The backbone of `config` on the current default device (use `torch.device("meta")` for shapes only)."""
    return BACKBONES[config.kind](config, in_channels, text_width)


def declarations(config: ModelConfig) -> tuple[Declaration, ...]:
    """What the backbone says about its parameters' roles and init."""
    return BACKBONES[config.kind].declarations(config)


def condition_kind(config: ModelConfig) -> ConditionKind:
    """Whether forward takes a TextCondition ("text") or a ClassCondition ("label")."""
    return config.condition


def out_channels(config: ModelConfig, in_channels: int) -> int:
    """Channels of the prediction: twice those of the input where the variance is learned."""
    return in_channels * (1 + config.learn_sigma)
