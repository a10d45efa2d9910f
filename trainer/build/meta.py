"""A model and its inputs without memory, for what follows from their shapes alone."""

from typing import Any

import torch

from models.backbone import Backbone, build_model
from models.layers import ClassCondition, SizedTextCondition, TextCondition

from ..config.schema import TrainConfig
from ..parallel.precision import DTYPES


def meta_model(config: TrainConfig) -> Backbone:
    """The backbone on the meta device, in the precision that a GPU computes in."""
    with torch.device("meta"):
        model = build_model(config.model, config.autoencoder.channels, config.text_encoder.width, config.projector)
        return model.to(DTYPES[config.parallel.precision or "bf16"])


def meta_inputs(config: TrainConfig, rows: int) -> tuple[Any, ...]:
    """What the backbone is called with, on the meta device: `rows` square images, captions of full length."""
    text, side = config.text_encoder, config.latent_size
    with torch.device("meta"):
        x, t = torch.empty(rows, config.autoencoder.channels, side, side), torch.empty(rows)
        if config.label_classes is not None:
            condition: Any = ClassCondition(torch.empty(rows, dtype=torch.int64))
        else:
            states = torch.empty(rows, text.max_length, text.width, dtype=DTYPES[config.parallel.precision or "bf16"])
            mask = torch.empty(rows, text.max_length, dtype=torch.bool)
            sized = config.model.micro_conditions
            condition = SizedTextCondition(states, mask, torch.empty(rows, 2)) if sized else TextCondition(states, mask)
        return x, t, condition, None if config.projector is None else config.objective.repa_layer - 1
