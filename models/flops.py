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
    features_at: int | None = None,
    pooled_width: int = 0,
    routed: bool = False,
) -> int:
    """FLOPs of one image's forward pass: matrix products and attention; elementwise work is left out.

    projector: of the tokens after block features_at (from 0). pooled_width: of the text's pooled vector, where the
    model reads one. routed: as in training, where the blocks of the config's route see a part of the image tokens.
    """
    route = config.route if routed else None
    kept = None if route is None else route.kept(image_tokens)
    part = () if kept is None else (kept,)  # which a backbone without routes need not take
    macs = config.multiply_adds(in_channels, text_width, image_tokens, text_tokens, *part)
    if pooled_width:  # of which the first layer is not as wide as that of the states' mean
        macs += (pooled_width - text_width) * config.width
    if route is not None and kept is not None and features_at is not None and features_at in route.blocks:
        image_tokens = kept
    if projector is not None and projector.kind == "conv":
        macs += image_tokens * 9 * config.width * projector.features  # 3 x 3 neighbours
    elif projector is not None:
        hidden = projector.hidden
        macs += image_tokens * hidden * (config.width + hidden + projector.features)
    return 2 * macs
