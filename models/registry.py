"""The backbones by `model.kind`: the one place that maps a config to a class."""

from torch import nn

from .configs import ConditionKind, ModelConfig, ProjectorConfig
from .dit import DiT
from .layers import Declaration
from .mmdit import MMDiT
from .pixart import PixArt
from .repa import DECLARATIONS, Projector
from .uvit import UViT

BACKBONES = {"mmdit": MMDiT, "dit": DiT, "pixart": PixArt, "uvit": UViT}


def build_model(
    config: ModelConfig, in_channels: int, text_width: int, projector: ProjectorConfig | None = None
) -> nn.Module:
    """The backbone of `config` on the current default device (use `torch.device("meta")` for shapes only).

    projector: the features that forward gives (features_at) are projected. It is a part of the backbone, because an
    engine that shards weights has the root's own whole only during its forward pass.
    """
    model = BACKBONES[config.kind](config, in_channels, text_width)
    if projector is not None:
        if not hasattr(model, "projector"):
            raise TypeError(f"model.kind {config.kind} has no projector")
        model.projector = Projector(config.width, projector)
    return model


def declarations(config: ModelConfig, projector: ProjectorConfig | None = None) -> tuple[Declaration, ...]:
    """What the backbone, and its projector, say about their parameters' roles and init."""
    of_projector = () if projector is None else DECLARATIONS
    return (*of_projector, *BACKBONES[config.kind].declarations(config))


def condition_kind(config: ModelConfig) -> ConditionKind:
    """Whether forward takes a TextCondition ("text") or a ClassCondition ("label")."""
    return config.condition


def out_channels(config: ModelConfig, in_channels: int) -> int:
    """Channels of the prediction: twice those of the input where the variance is learned."""
    return in_channels * (1 + config.learn_sigma)
