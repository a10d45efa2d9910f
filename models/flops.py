"""Floating-point operations of a forward pass, a multiply and an add counted as two."""

from .configs import ProjectorConfig
from .model_config import ModelConfig


def forward_flops(
    config: ModelConfig,
    in_channels: int,
    text_width: int,
    image_tokens: int,
    text_tokens: int,
    projector: ProjectorConfig | None = None,
    pooled_width: int = 0,
) -> int:
    """FLOPs of one image's forward pass: matrix products and attention; elementwise work is left out."""
    macs = config.multiply_adds(in_channels, text_width, image_tokens, text_tokens)
    if pooled_width:  # of which the first layer is not as wide as that of the states' mean
        macs += (pooled_width - text_width) * config.width
    if projector is not None:
        hidden = projector.hidden
        macs += image_tokens * hidden * (config.width + hidden + projector.features)
    return 2 * macs
