"""Floating-point operations of a forward pass, a multiply and an add counted as two."""

from .configs import DiTConfig, MMDiTConfig, ModelConfig, PixArtConfig, ProjectorConfig, UViTConfig


def forward_flops(
    config: ModelConfig,
    in_channels: int,
    text_width: int,
    image_tokens: int,
    text_tokens: int,
    projector: ProjectorConfig | None = None,
) -> int:
    """FLOPs of one image's forward pass: matrix products and attention; elementwise work is left out."""
    match config:
        case MMDiTConfig():
            macs = _mmdit(config, in_channels, text_width, image_tokens, text_tokens)
        case DiTConfig():
            macs = _dit(config, in_channels, image_tokens)
        case PixArtConfig():
            macs = _pixart(config, in_channels, text_width, image_tokens, text_tokens)
        case UViTConfig():
            macs = _uvit(config, in_channels, text_width, image_tokens, text_tokens)
    if projector is not None:
        hidden = projector.hidden
        macs += image_tokens * hidden * (config.width + hidden + projector.features)
    return 2 * macs


# Multiply-adds. d width, n image tokens; a pair of query and key costs 2 d: one dot product, one weighted sum.


def _stream(config: ModelConfig) -> int:
    """Weights of qkv, output projection and MLP, which every token of a stream meets."""
    return (3 + 1 + 2 * config.mlp_ratio) * config.width**2


def _mmdit(config: MMDiTConfig, in_channels: int, text_width: int, n: int, length: int) -> int:
    d = config.width
    full_block = (n + length) * _stream(config) + (n + length) ** 2 * 2 * d + 2 * 6 * d * d
    last_block = n * _stream(config) + length * 2 * d * d + n * (n + length) * 2 * d + (6 + 2) * d * d
    patch = in_channels * config.patch_size**2
    ends = n * patch * d * 2 + length * text_width * d + (256 + text_width + 2 * d) * d + 2 * d * d
    return (config.depth - 1) * full_block + last_block + ends


def _dit(config: DiTConfig, in_channels: int, n: int) -> int:
    d, patch = config.width, in_channels * config.patch_size**2
    block = n * _stream(config) + n * n * 2 * d + 6 * d * d
    ends = n * patch * d * (2 + config.learn_sigma) + (256 + d) * d + 2 * d * d
    return config.depth * block + ends


def _pixart(config: PixArtConfig, in_channels: int, text_width: int, n: int, length: int) -> int:
    d, patch = config.width, in_channels * config.patch_size**2
    cross = (n + length) * 2 * d * d + n * length * 2 * d  # q and out of the image, k and v of the text
    block = n * _stream(config) + n * n * 2 * d + cross
    time = (256 + d) * d + 6 * d * d
    size = 3 * (256 + d // 3) * (d // 3) if config.micro_conditions else 0  # height, width, aspect ratio
    text = length * (text_width + d) * d
    return config.depth * block + n * patch * d * (2 + config.learn_sigma) + time + size + text


def _uvit(config: UViTConfig, in_channels: int, text_width: int, n: int, length: int) -> int:
    d, patch = config.width, in_channels * config.patch_size**2
    tokens = n + 1 + (length if config.condition == "text" else 1)
    block = tokens * _stream(config) + tokens**2 * 2 * d
    skips = config.depth // 2 * tokens * 2 * d * d
    text = length * text_width * d if config.condition == "text" else 0
    time = 8 * d * d if config.time_mlp else 0
    conv = n * config.patch_size**2 * in_channels**2 * 9 if config.final_conv else 0
    return (config.depth + 1) * block + skips + n * patch * d * 2 + text + time + conv
