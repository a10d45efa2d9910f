"""A model and its inputs without memory, for what follows from their shapes alone."""

from typing import Any

import torch

from models.backbone import Backbone, build_model
from models.layers import ClassCondition, PooledTextCondition, SizedTextCondition, TextCondition

from ..config.schema import TrainConfig
from ..parallel.precision import DTYPES


def meta_model(config: TrainConfig) -> Backbone:
    """The backbone on the meta device, in the precision that a GPU computes in."""
    with torch.device("meta"):
        model = build_model(
            config.model,
            config.autoencoder.channels,
            config.text_encoder.total_width,
            config.projector,
            config.text_encoder.total_pooled,
        )
        return model.to(DTYPES[config.parallel.precision or "bf16"])


def meta_inputs(config: TrainConfig, rows: int) -> tuple[Any, ...]:
    """What the backbone is called with, on the meta device: `rows` square images, captions of full length."""
    text, side = config.text_encoder, config.latent_size
    with torch.device("meta"):
        x, t = torch.empty(rows, config.autoencoder.channels, side, side), torch.empty(rows)
        if config.label_classes is not None:
            condition: Any = ClassCondition(torch.empty(rows, dtype=torch.int64))
        else:
            dtype = DTYPES[config.parallel.precision or "bf16"]
            states = torch.empty(rows, text.total_length, text.total_width, dtype=dtype)
            mask = torch.empty(rows, text.total_length, dtype=torch.bool)
            condition = TextCondition(states, mask)
            if config.model.micro_conditions:
                condition = SizedTextCondition(states, mask, torch.empty(rows, 2))
            elif text.total_pooled:
                condition = PooledTextCondition(states, mask, torch.empty(rows, text.total_pooled, dtype=dtype))
        features_at = None if config.projector is None else config.objective.repa_layer - 1
        if (route := config.model.route) is None:
            return x, t, condition, features_at
        return x, t, condition, features_at, torch.empty(rows, route.kept(config.image_tokens), dtype=torch.int64)
