"""What an image costs in a step of training."""

from data.config import Bucket
from models.flops import forward_flops

from ..config.resolve import image_tokens
from ..config.schema import TrainConfig
from ..config.stages import stages_of


def image_flops(
    config: TrainConfig, text_tokens: float | None = None, bucket: Bucket | None = None, aligned: bool = True
) -> int:
    """True FLOPs of one image in a forward and a backward pass, which costs twice the forward; nothing is recomputed.

    text_tokens: of its caption, or a mean over images; the full length by default. bucket: of the image; by default the
    square of data.resolution. aligned: with REPA, where the config has it. Blocks of model.route see
    the tokens that go through them.
    """
    text = config.text_encoder
    return 3 * forward_flops(
        config.model,
        config.autoencoder.channels,
        text.total_width,
        image_tokens(config, bucket) if bucket else config.image_tokens,
        text.total_length if text_tokens is None else round(text_tokens),
        config.projector if aligned else None,
        config.objective.repa_layer - 1,
        text.total_pooled,
        routed=True,
    )


def training_flops(config: TrainConfig) -> float:
    """True FLOPs of a whole run, all its stages; captions at their full length."""
    total = 0.0
    for stage in stages_of(config):
        c = stage.alone()
        aligned = min(c.train.steps, c.objective.repa_until or c.train.steps)
        per_step = [
            steps * image_flops(c, aligned=on) for steps, on in ((aligned, True), (c.train.steps - aligned, False))
        ]
        total += c.train.global_batch_size * sum(per_step)
    return total
