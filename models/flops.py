"""Floating-point operations of a forward pass, a multiply and an add counted as two."""

from .configs import ModelConfig


def forward_flops(config: ModelConfig, in_channels: int, text_width: int, image_tokens: int, text_tokens: int) -> int:
    """FLOPs of one image's forward pass: matrix products and attention; elementwise work is left out."""
    d, n, length = config.width, image_tokens, text_tokens
    stream = (3 + 1 + 2 * config.mlp_ratio) * d * d  # weights that every token of a stream meets
    attention = 2 * d  # a query and a key: one dot product, one weighted sum
    full_block = (n + length) * stream + (n + length) ** 2 * attention + 2 * 6 * d * d
    last_block = n * stream + length * 2 * d * d + n * (n + length) * attention + (6 + 2) * d * d
    patch = in_channels * config.patch_size**2
    ends = n * patch * d * 2 + length * text_width * d + (256 + text_width + 2 * d) * d + 2 * d * d
    return 2 * ((config.depth - 1) * full_block + last_block + ends)
