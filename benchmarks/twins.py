"""The models of diffusers that compute what ours do, trained by our own engine and loop: the model is all that differs.

U-ViT has no twin there.
"""

from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from export.diffusers_folder import twin_config
from export.forms import TWINS
from models.layers import ClassCondition
from trainer.build.engine import native_engine
from trainer.config.schema import TrainConfig
from trainer.mup.table import MuTable
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import World
from trainer.parallel.precision import precision_of


class Twin(nn.Module):
    """A model of diffusers behind the signature of our backbones."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.kind = config.model.kind
        self.model: Any = getattr(diffusers, TWINS[self.kind])(**twin_config(config))
        self.model.eval()  # no dropout of labels by chance: the data have done that

    def forward(self, x: Tensor, t: Tensor, condition: Any, features_at: int | None = None) -> tuple[Tensor, None]:
        """x [B, C, h P, w P], t [B] in [0, 1] -> prediction [B, O, h P, w P]."""
        x = x.to(self.model.pos_embed.proj.weight.dtype)
        common = {"hidden_states": x, "timestep": 1000 * t, "return_dict": False}
        if isinstance(condition, ClassCondition):
            return self.model(class_labels=condition.labels, **common)[0], None
        states, mask = condition.states.to(x.dtype), condition.mask  # [B, L, E], [B, L]
        if self.kind == "pixart":
            return self.model(encoder_hidden_states=states, encoder_attention_mask=mask, **common)[0], None
        # SD3 knows no mask: padding takes part.
        return self.model(encoder_hidden_states=states, pooled_projections=states.mean(1), **common)[0], None

    def shard_units(self) -> list[nn.Module]:
        return [*self.model.transformer_blocks]


def build_twin(config: TrainConfig, table: MuTable, world: World) -> Engine:
    """In place of trainer.build.build_engine: the twin. Its weights are random numbers: time does not depend on them.

    With parallel.compile its blocks are compiled for the shapes at hand.
    """
    with torch.device("meta"):
        model = Twin(config)
    if config.parallel.compile:
        for block in model.shard_units():
            block.forward = torch.compile(block.forward)

    def initialise(materialised: nn.Module) -> None:
        for parameter in materialised.parameters():
            whole = parameter.detach()
            (whole.to_local() if isinstance(whole, DTensor) else whole).normal_(std=0.02)
        for buffer in materialised.buffers():
            buffer.zero_()

    def groups(named: dict[str, Tensor]) -> list[dict[str, Any]]:
        settings = {"lr": config.optim.lr, "weight_decay": config.optim.weight_decay, "eps": config.optim.eps}
        return [{"optimizer": "adamw", "params": list(named.values()), "lr_scale": 1.0, **settings}]

    return native_engine(
        config,
        model=model,
        units=[],  # gathered whole, once a step: diffusers' DiT reads weights of its first block from outside of it
        world=world,
        precision=precision_of(config.parallel.precision, world.device),
        initialise=initialise,
        groups=groups,
        betas=config.optim.betas,
        clip_norm=config.optim.clip_norm,
    )
