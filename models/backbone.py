"""What every backbone has, and how one is built from its config."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from .configs import ProjectorConfig
from .layers import Declaration
from .model_config import ModelConfig
from .registry import BACKBONES, class_of
from .repa import build_projector
from .repa import declarations as of_projector
from .route import DECLARATIONS as OF_ROUTE


class Backbone(nn.Module, ABC):
    """A denoiser: the noisy image, the time and a condition -> the prediction. Single-device mathematics alone.

    A subclass is built as `Kind(config, in_channels, text_width)`: in_channels C of the image or latent, text_width E
    of a text state (of no use to a backbone of class labels). Modules with an attribute `branch_scale` multiply what
    they add to the residual stream by it (mup.base_depth); one of class OutputLinear takes muP's output multiplier.
    """

    KINDS: ClassVar[Mapping[str, tuple[str, ...]]]
    """Kinds of module, each with the patterns (fnmatch) of its parameters' names: attention, mlp, modulation, text,
    image, label, time, patch, skip, final, as far as the backbone has them. They may overlap. Muon takes the matrices
    of attention and mlp."""

    projector: nn.Module
    """Applied to the tokens that forward returns as features and to their grid's height and width: repa.Unprojected, or
    REPA's projector. A backbone that lacks it cannot be trained with REPA."""

    @abstractmethod
    def forward(
        self, x: Tensor, t: Tensor, condition: Any, features_at: int | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, C, H, W], t [B] in [0, 1], condition as config.condition says -> (prediction [B, O, H, W], features).

        O is C, or 2 C where config.learn_sigma. features: the tokens [B, N, D] after block `features_at`, projected;
        None where features_at is None. kept: int64 [B, K], the image tokens that go through the blocks of config.route,
        rising; None: all do. It is given where the config has a route, and features in the route are those of the K.
        """

    @abstractmethod
    def shard_units(self) -> list[nn.Module]:
        """The parts that are gathered, checkpointed and compiled one at a time, in the order of the forward pass."""

    @abstractmethod
    def fill_buffers(self) -> None:
        """Compute the buffers; called again once the model has left the meta device."""

    @staticmethod
    @abstractmethod
    def declarations(config: Any) -> tuple[Declaration, ...]:
        """Init of each parameter at the base width by name, and the muP roles that its shape cannot tell."""


def build_model(
    config: ModelConfig,
    in_channels: int,
    text_width: int,
    projector: ProjectorConfig | None = None,
    pooled_width: int = 0,
) -> Backbone:
    """The backbone of `config` on the current default device (use `torch.device("meta")` for shapes only).

    projector: of REPA, which projects the features that forward returns (features_at). It is a part of the backbone
    because an engine that shards weights gathers those outside the blocks during the forward pass alone. pooled_width:
    of a PooledTextCondition, for a backbone whose config says that it reads one (pooled_text). Raises TypeError where
    the backbone has no place for one of them.
    """
    pooled = {"pooled_width": pooled_width} if pooled_width else {}
    model: Backbone = class_of(BACKBONES[config.kind].backbone)(config, in_channels, text_width, **pooled)
    if projector is not None:
        if not hasattr(model, "projector"):
            raise TypeError(f"model.kind {config.kind} has no projector")
        model.projector = build_projector(config.width, projector)
    return model


def declarations(config: ModelConfig, projector: ProjectorConfig | None = None) -> tuple[Declaration, ...]:
    """What the backbone, and its projector, say about their parameters' roles and init."""
    own = () if projector is None else of_projector(projector)
    of_route = OF_ROUTE if config.route is not None and config.route.fuse == "sprint" else ()
    return (*own, *of_route, *class_of(BACKBONES[config.kind].backbone).declarations(config))


def kinds(config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
    """The backbone's kinds of module; see Backbone.KINDS."""
    return class_of(BACKBONES[config.kind].backbone).KINDS


def out_channels(config: ModelConfig, in_channels: int) -> int:
    """Channels of the prediction: twice those of the input where the variance is learned."""
    return in_channels * (1 + config.learn_sigma)
