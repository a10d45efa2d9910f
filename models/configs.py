"""Shapes of the backbones as frozen dataclasses. Stdlib only: the config file is read without torch.

Every kind has `kind`, `width`, `depth`, `head_dim`, `patch_size`. `condition` says what it is conditioned on ("text",
or "label" with `num_classes`), `learn_sigma` whether it predicts the variance beside the mean, `micro_conditions`
whether it reads the images' sizes, `residual` whether it is deep by residual branches alone, and `conflicts` which
images and texts do not fit it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

ConditionKind = Literal["text", "label"]


def _check_shape(config: Any, *more: str) -> None:
    """What all backbones ask of their numbers; `more`: other keys that are counts."""
    for key in ("width", "depth", "head_dim", "patch_size", "mlp_ratio", *more):
        if getattr(config, key) < 1:
            raise ValueError(f"model.{key} must be at least 1, got {getattr(config, key)}")
    if config.width % config.head_dim:
        raise ValueError(
            f"model.width {config.width} is not a multiple of model.head_dim {config.head_dim}: "
            "under muP the width grows by whole heads"
        )
    if config.width % 4:
        raise ValueError(f"model.width {config.width} must be a multiple of 4 (two axes, sine and cosine)")
    if config.time_freq_shift not in (0.0, 1.0):
        raise ValueError(f"model.time_freq_shift must be 0 or 1, got {config.time_freq_shift}")


@dataclass(frozen=True)
class MMDiTConfig:
    """Two-stream MMDiT of Stable Diffusion 3 (Esser et al., arXiv 2403.03206, Figure 2), with QK-RMSNorm.

    width: features of a token; it grows by the number of heads at a fixed head_dim.
    depth: number of blocks; the last one has no text output.
    patch_size: pixels (of the latent) along a side of a token.
    pos_embed_max_size / pos_embed_base_size: tokens along a side of the sin-cos table, and of the image at
        which neighbouring tokens lie base_size / max_size apart in it (SD3: 192 and 64).
    time_freq_shift: frequencies are i / (128 - shift); 0 as in SD3, 1 as in diffusers' DiT.
    adaln_init: "zero" starts every block as the identity (adaLN-zero), "fan_in" as the paper's DiT.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    residual: ClassVar[bool] = True
    condition: ClassVar[ConditionKind] = "text"
    num_classes: ClassVar[int] = 0
    learn_sigma: ClassVar[bool] = False
    micro_conditions: ClassVar[bool] = False

    kind: Literal["mmdit"] = "mmdit"
    width: int = 512
    depth: int = 19
    head_dim: int = 64
    patch_size: int = 2
    mlp_ratio: int = 4
    pos_embed_max_size: int = 64
    pos_embed_base_size: int = 16
    time_freq_shift: float = 0.0
    adaln_init: Literal["zero", "fan_in"] = "zero"

    def __post_init__(self) -> None:
        _check_shape(self, "pos_embed_max_size")

    def conflicts(self, resolution: int, side: int, text_length: int) -> Iterator[str]:
        """What is wrong with images of `resolution` pixels, `side` tokens on the longest side, and captions of
        `text_length` tokens."""
        if side > self.pos_embed_max_size:
            yield (
                f"data.resolution {resolution} gives {side} tokens a side, more than "
                f"model.pos_embed_max_size {self.pos_embed_max_size}"
            )


@dataclass(frozen=True)
class DiTConfig:
    """DiT (Peebles & Xie, arXiv 2212.09748, Figure 3, adaLN-zero block) on class labels.

    depth: number of blocks. num_classes: labels 0 .. num_classes - 1; num_classes is the null label.
    learn_sigma: the output has 2 C channels, noise and the variance's interpolation.
    time_freq_shift: frequencies are i / (128 - shift); 0 as published, 1 as in diffusers.
    adaln_init: "fan_in" as the muP paper's DiT, "zero" (adaLN-zero) as the original.
    linear_init: "fan_in" normals as the muP paper's DiT, "xavier_uniform" as the original, with 0.02 in the time MLP.
    label_init_std: 1 in the muP paper, 0.02 in the original.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    residual: ClassVar[bool] = True
    condition: ClassVar[ConditionKind] = "label"
    micro_conditions: ClassVar[bool] = False

    kind: Literal["dit"] = "dit"
    width: int = 288
    depth: int = 28
    head_dim: int = 72
    patch_size: int = 2
    mlp_ratio: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True
    time_freq_shift: float = 0.0
    adaln_init: Literal["zero", "fan_in"] = "fan_in"
    linear_init: Literal["fan_in", "xavier_uniform"] = "fan_in"
    label_init_std: float = 1.0

    def __post_init__(self) -> None:
        _check_shape(self, "num_classes")

    def conflicts(self, resolution: int, side: int, text_length: int) -> Iterator[str]:
        """Positions are computed for any grid."""
        yield from ()


@dataclass(frozen=True)
class PixArtConfig:
    """PixArt-alpha (Chen et al., arXiv 2310.00426, Figure 4): DiT with cross-attention to T5 and adaLN-single.

    learn_sigma: the output has 2 C channels, noise and the variance's interpolation.
    pos_embed_base_size / pos_embed_interpolation: a side of n tokens is at positions 0 .. base_size / interpolation,
        whatever n (256 px: 16 and 1; 512 px: 32 and 1; 1024 px: 64 and 2).
    micro_conditions: the image's size and aspect ratio join the time (aspect-ratio buckets; off at 256 px).
    pixels_per_latent: pixels along a side of a cell of x, for the size of an image that comes without one.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    residual: ClassVar[bool] = True
    condition: ClassVar[ConditionKind] = "text"
    num_classes: ClassVar[int] = 0

    kind: Literal["pixart"] = "pixart"
    width: int = 288
    depth: int = 28
    head_dim: int = 72
    patch_size: int = 2
    mlp_ratio: int = 4
    learn_sigma: bool = True
    pos_embed_base_size: int = 16
    pos_embed_interpolation: float = 1.0
    micro_conditions: bool = False
    pixels_per_latent: int = 8
    time_freq_shift: float = 0.0

    def __post_init__(self) -> None:
        _check_shape(self, "pos_embed_base_size", "pixels_per_latent")
        if self.pos_embed_interpolation <= 0:
            raise ValueError(f"model.pos_embed_interpolation must be positive, got {self.pos_embed_interpolation}")
        if self.micro_conditions and self.width % 3:
            raise ValueError(
                f"model.width {self.width} must be a multiple of 3 with model.micro_conditions: height, width and "
                "aspect ratio get a third each"
            )

    def conflicts(self, resolution: int, side: int, text_length: int) -> Iterator[str]:
        """Positions are computed for any grid."""
        yield from ()


@dataclass(frozen=True)
class UViTConfig:
    """U-ViT (Bao et al., arXiv 2209.12152, Figure 1): everything is a token, long skips join the two halves.

    depth: blocks without the middle one: half before it, half after it, each of these with a long skip.
    input_size: tokens along the longest side of the images; the learned positions of other shapes are a centre crop.
    condition: "label" (one token, num_classes is the null label) or "text" (up to text_length tokens).
    final_conv, time_mlp, qkv_bias: off in U-ViT-H/2. A 3 x 3 convolution on the output, a trained time embedding,
        biases of query and value.
    time_freq_shift: frequencies of the time token are i / (width / 2 - shift).
    label_init_std: 1 as published.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    residual: ClassVar[bool] = False  # the long skips' layers stand in the stream itself
    learn_sigma: ClassVar[bool] = False
    micro_conditions: ClassVar[bool] = False

    kind: Literal["uvit"] = "uvit"
    width: int = 288
    depth: int = 28
    head_dim: int = 72
    patch_size: int = 2
    mlp_ratio: int = 4
    input_size: int = 16
    condition: ConditionKind = "label"
    num_classes: int = 1000
    text_length: int = 77
    final_conv: bool = False
    time_mlp: bool = False
    qkv_bias: bool = False
    time_freq_shift: float = 0.0
    label_init_std: float = 1.0

    def __post_init__(self) -> None:
        _check_shape(self, "input_size", "num_classes", "text_length")
        if self.depth % 2:
            raise ValueError(f"model.depth {self.depth} must be even: half before the middle block, half after it")

    def conflicts(self, resolution: int, side: int, text_length: int) -> Iterator[str]:
        """What is wrong with images of `resolution` pixels, `side` tokens on the longest side, and captions of
        `text_length` tokens."""
        if side != self.input_size:
            yield (
                f"data.resolution {resolution} gives {side} tokens a side, but the learned positions are of "
                f"model.input_size {self.input_size}"
            )
        if self.condition == "text" and text_length > self.text_length:
            yield f"text_encoder.max_length {text_length} is more than model.text_length {self.text_length}"


@dataclass(frozen=True)
class ProjectorConfig:
    """Projector of representation alignment (models.repa). hidden: features of its inner layers; features: of the
    encoder that it projects to. Neither grows with the width."""

    hidden: int
    features: int


ModelConfig = MMDiTConfig | DiTConfig | PixArtConfig | UViTConfig
MODEL_KINDS: dict[str, type[ModelConfig]] = {
    "mmdit": MMDiTConfig,
    "dit": DiTConfig,
    "pixart": PixArtConfig,
    "uvit": UViTConfig,
}
DEFAULT_KIND = "mmdit"  # where a config does not name one
