"""What an image costs in a step of training."""

from data.config import Bucket
from models.flops import forward_flops

from ..config.resolve import image_tokens
from ..config.schema import TrainConfig


def image_flops(config: TrainConfig, text_tokens: float | None = None, bucket: Bucket | None = None) -> int:
    """True FLOPs of one image in a forward and a backward pass, which costs twice the forward; nothing is recomputed.

    text_tokens: of its caption, or a mean over images; the full length by default. bucket: of the image; by default the
    square of data.resolution.
    """
    text = config.text_encoder
    return 3 * forward_flops(
        config.model,
        config.autoencoder.channels,
        text.width,
        image_tokens(config, bucket) if bucket else config.image_tokens,
        text.max_length if text_tokens is None else round(text_tokens),
        config.projector,
    )
