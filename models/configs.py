"""The keys of each backbone as frozen dataclasses, with what follows from them: conflicts and FLOPs. No torch.

d is the width, n the number of image tokens; a pair of query and key costs 2 d multiply-adds: one dot product and one
weighted sum.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.config import JsonDict
from pydantic.dataclasses import dataclass

from .model_config import CONFIG, ModelConfig, Route, RouteConfig

_STAGED: JsonDict = {"class": "identity", "stage": True}  # a stage may change it (see trainer.config.schema)

# Keys that several kinds have: type, range and help are declared here once, the default is each kind's own.
Width = Annotated[int, Field(ge=1, description="Features per token; it grows by whole heads of model.head_dim.")]
HeadDim = Annotated[int, Field(ge=1, description="Features per attention head; fixed while the width grows.")]
PatchSize = Annotated[int, Field(ge=1, description="Latent pixels along a side of an image token.")]
MLPRatio = Annotated[int, Field(ge=1, description="Hidden features of a block's MLP per feature of the width.")]
NumClasses = Annotated[int, Field(ge=1, description="Number of class labels; one more label stands for no class.")]
LearnSigma = Annotated[
    bool, Field(description="Predict the variance beside the noise (objective.kind ddpm), in as many more channels.")
]
LabelInitStd = Annotated[
    float, Field(ge=0, description="Initial standard deviation of the label embedding, at the base width.")
]


def check_shape(config: Any, more_blocks: int = 0) -> None:
    """What the backbones ask of their numbers beside the ranges of the keys. more_blocks: than model.depth."""
    if config.width % config.head_dim:
        raise ValueError(
            f"model.width {config.width} is not a multiple of model.head_dim {config.head_dim}: "
            "under muP the width grows by whole heads"
        )
    if config.width % 4:
        raise ValueError(f"model.width {config.width} must be a multiple of 4 (two axes, sine and cosine)")
    if getattr(config, "time_freq_shift", 0.0) not in (0.0, 1.0):
        raise ValueError(f"model.time_freq_shift must be 0 or 1, got {config.time_freq_shift}")
    route: RouteConfig | None = config.route
    blocks = config.depth + more_blocks
    if route is not None and not route.start < route.end < blocks:
        raise ValueError(
            f"model.route from {route.start} to {route.end} does not fit {blocks} blocks: start must be less than end, "
            "and end less than that, because the last block sees all tokens"
        )


def _by_tokens(route: RouteConfig | None, blocks: int, tokens: int, kept: int | None) -> list[tuple[int, int]]:
    """(how many of the blocks, how many image tokens they see): outside the route, and in it."""
    inside = 0 if route is None else route.end - route.start
    return [(blocks - inside, tokens), (inside, tokens if kept is None else kept)]


def _fuse(config: ModelConfig, tokens: int) -> int:
    """Multiply-adds of the layer that ends the route."""
    return tokens * 2 * config.width**2 if config.route and config.route.fuse == "sprint" else 0


def _stream(config: ModelConfig) -> int:
    """Weights of qkv, output projection and MLP, which every token of a stream meets."""
    return (3 + 1 + 2 * config.mlp_ratio) * config.width**2


@dataclass(frozen=True, config=CONFIG)
class MMDiTConfig:
    """Two-stream MMDiT of Stable Diffusion 3 (Esser et al., arXiv 2403.03206, Figure 2), with QK-RMSNorm."""

    residual = True
    condition = "text"
    num_classes = 0
    learn_sigma = False
    micro_conditions = False
    pooled_text = True  # forward reads a PooledTextCondition as well; a kind that does not say so takes none

    kind: Literal["mmdit"] = "mmdit"
    """The backbone."""
    width: Width = 512
    depth: int = Field(default=19, ge=1)
    """Number of blocks; the last one has no text output."""
    single_depth: int = Field(default=0, ge=0)
    """How many of the blocks, the last ones, are FLUX.1's with a single stream: image and text are one sequence with
    the same weights, attention and MLP side by side."""
    head_dim: HeadDim = 64
    patch_size: PatchSize = 2
    mlp_ratio: MLPRatio = 4
    positions: Literal["sincos", "rope"] = "sincos"
    """Where a token is: `sincos` adds a table's row to each image token once; `rope` turns queries and keys in every
    block by row and column, as FLUX.1 does, and no image is too large."""
    pos_embed_max_size: int = Field(default=64, ge=1)
    """Tokens along a side of the table of model.positions sincos, which bounds the image (SD3: 192)."""
    pos_embed_base_size: int = Field(default=16, ge=1, json_schema_extra=_STAGED)
    """Neighbouring tokens lie pos_embed_base_size / pos_embed_max_size apart in the table of positions (SD3: 64 /
    192)."""
    time_freq_shift: float = Field(default=0.0, ge=0, le=1)
    """The time's frequencies are 10000^(-i / (128 - shift)): 0 as in SD3, 1 as in diffusers' DiT."""
    adaln_init: Literal["zero", "fan_in"] = "zero"
    """Initial modulation of the blocks: `zero` starts each as the identity (adaLN-zero), `fan_in` as the muP paper's
    DiT."""
    qk_norm: bool = True
    """Normalise queries and keys (RMSNorm with a gain for each of a head's features) before attention; SD3-medium does
    not."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """MLP of the blocks: `gelu`, or `swiglu`, whose hidden features a gate multiplies (Shazeer, arXiv 2002.05202). Its
    three matrices have about as many weights as the two of `gelu`: 2/3 as many hidden features."""
    route: Route = None

    def __post_init__(self) -> None:
        check_shape(self)
        if self.single_depth > self.depth:
            raise ValueError(f"model.single_depth {self.single_depth} is more than model.depth {self.depth}")
        if self.positions == "rope" and self.head_dim % 4:
            raise ValueError(
                f"model.head_dim {self.head_dim} must be a multiple of 4 with model.positions rope (two axes, pairs)"
            )

    @property
    def mlp_hidden(self) -> int:
        """Hidden features of a block's MLP. Those of SwiGLU are a multiple of 8 for each head, so that they grow with
        the width exactly."""
        if self.mlp == "gelu":
            return self.mlp_ratio * self.width
        return max(round(2 / 3 * self.mlp_ratio * self.head_dim / 8), 1) * 8 * (self.width // self.head_dim)

    def conflicts(self, resolution: int, side: int, text_length: int) -> Iterator[str]:
        """An image that is larger than the table of positions."""
        if self.positions == "sincos" and side > self.pos_embed_max_size:
            yield (
                f"data.resolution {resolution} gives {side} tokens a side, more than "
                f"model.pos_embed_max_size {self.pos_embed_max_size}"
            )
        double = self.depth - self.single_depth
        if self.route is not None and self.single_depth and self.route.end > double:
            yield (
                f"model.route.end {self.route.end} is among the blocks of model.single_depth {self.single_depth}, in "
                f"which image and text are one sequence: end it after block {double} at the latest"
            )

    def multiply_adds(
        self, in_channels: int, text_width: int, image_tokens: int, text_tokens: int, kept: int | None = None
    ) -> int:
        """See ModelConfig."""
        d, n, length = self.width, image_tokens, text_tokens
        stream = 4 * d * d + (3 if self.mlp == "swiglu" else 2) * d * self.mlp_hidden
        full_blocks = sum(
            times * ((m + length) * stream + (m + length) ** 2 * 2 * d + 2 * 6 * d * d)
            for times, m in _by_tokens(self.route, self.depth - max(1, self.single_depth), n, kept)
        )
        last_block = n * stream + length * 2 * d * d + n * (n + length) * 2 * d + (6 + 2) * d * d
        single_block = (n + length) * stream + (n + length) ** 2 * 2 * d + 3 * d * d
        patch = in_channels * self.patch_size**2
        ends = n * patch * d * 2 + length * text_width * d + (256 + text_width + 2 * d) * d + 2 * d * d
        last_blocks = self.single_depth * single_block if self.single_depth else last_block
        return full_blocks + last_blocks + ends + _fuse(self, n)


@dataclass(frozen=True, config=CONFIG)
class DiTConfig:
    """DiT (Peebles & Xie, arXiv 2212.09748, Figure 3, adaLN-zero block) on class labels."""

    residual = True
    qk_norm = False
    condition = "label"
    micro_conditions = False

    kind: Literal["dit"] = "dit"
    """The backbone."""
    width: Width = 288
    depth: int = Field(default=28, ge=1)
    """Number of blocks."""
    head_dim: HeadDim = 72
    patch_size: PatchSize = 2
    mlp_ratio: MLPRatio = 4
    num_classes: NumClasses = 1000
    learn_sigma: LearnSigma = True
    time_freq_shift: float = Field(default=0.0, ge=0, le=1)
    """The time's frequencies are 10000^(-i / (128 - shift)): 0 as published, 1 as in diffusers."""
    adaln_init: Literal["zero", "fan_in"] = "fan_in"
    """Initial modulation of the blocks: `fan_in` as the muP paper's DiT, `zero` (adaLN-zero) as the original."""
    linear_init: Literal["fan_in", "xavier_uniform"] = "fan_in"
    """Initial weights of linear layers: `fan_in` normals as the muP paper's DiT, or `xavier_uniform` as the original,
    with 0.02 in the time MLP."""
    label_init_std: LabelInitStd = 1.0
    route: Route = None

    def __post_init__(self) -> None:
        check_shape(self)

    def conflicts(self, resolution: int, side: int, text_length: int) -> Iterator[str]:
        """None: positions are computed for any grid."""
        yield from ()

    def multiply_adds(
        self, in_channels: int, text_width: int, image_tokens: int, text_tokens: int, kept: int | None = None
    ) -> int:
        """See ModelConfig."""
        d, n, patch = self.width, image_tokens, in_channels * self.patch_size**2
        blocks = sum(
            times * (m * _stream(self) + m * m * 2 * d + 6 * d * d)
            for times, m in _by_tokens(self.route, self.depth, n, kept)
        )
        ends = n * patch * d * (2 + self.learn_sigma) + (256 + d) * d + 2 * d * d
        return blocks + ends + _fuse(self, n)


@dataclass(frozen=True, config=CONFIG)
class PixArtConfig:
    """PixArt-alpha (Chen et al., arXiv 2310.00426, Figure 4): DiT with cross-attention to T5 and adaLN-single."""

    residual = True
    qk_norm = False
    condition = "text"
    num_classes = 0

    kind: Literal["pixart"] = "pixart"
    """The backbone."""
    width: Width = 288
    depth: int = Field(default=28, ge=1)
    """Number of blocks."""
    head_dim: HeadDim = 72
    patch_size: PatchSize = 2
    mlp_ratio: MLPRatio = 4
    learn_sigma: LearnSigma = True
    pos_embed_base_size: int = Field(default=16, ge=1, json_schema_extra=_STAGED)
    """A side of n tokens is at positions 0 to pos_embed_base_size / pos_embed_interpolation, whatever n (256 px: 16
    and 1; 512 px: 32 and 1; 1024 px: 64 and 2)."""
    pos_embed_interpolation: float = Field(default=1.0, gt=0, json_schema_extra=_STAGED)
    """Divides the positions; see model.pos_embed_base_size."""
    micro_conditions: bool = False
    """Add the image's size and aspect ratio to the time (for aspect-ratio buckets; off at 256 px)."""
    pixels_per_latent: int = Field(default=8, ge=1)
    """Image pixels along a side of a latent pixel, for the size of an image that comes without one."""
    time_freq_shift: float = Field(default=0.0, ge=0, le=1)
    """The time's frequencies are 10000^(-i / (128 - shift)): 0 as published, 1 as in diffusers."""
    route: Route = None

    def __post_init__(self) -> None:
        check_shape(self)
        if self.micro_conditions and self.width % 3:
            raise ValueError(
                f"model.width {self.width} must be a multiple of 3 with model.micro_conditions: height, width and "
                "aspect ratio get a third each"
            )

    def conflicts(self, resolution: int, side: int, text_length: int) -> Iterator[str]:
        """None: positions are computed for any grid."""
        yield from ()

    def multiply_adds(
        self, in_channels: int, text_width: int, image_tokens: int, text_tokens: int, kept: int | None = None
    ) -> int:
        """See ModelConfig."""
        d, n, length, patch = self.width, image_tokens, text_tokens, in_channels * self.patch_size**2
        blocks = sum(  # in cross-attention q and out of the image, k and v of the text
            times * (m * _stream(self) + m * m * 2 * d + (m + length) * 2 * d * d + m * length * 2 * d)
            for times, m in _by_tokens(self.route, self.depth, n, kept)
        )
        time = (256 + d) * d + 6 * d * d
        size = 3 * (256 + d // 3) * (d // 3) if self.micro_conditions else 0  # height, width, aspect ratio
        text = length * (text_width + d) * d
        return blocks + n * patch * d * (2 + self.learn_sigma) + time + size + text + _fuse(self, n)


@dataclass(frozen=True, config=CONFIG)
class UViTConfig:
    """U-ViT (Bao et al., arXiv 2209.12152, Figure 1): everything is a token, long skips join the two halves."""

    residual = False  # the long skips' layers stand in the stream itself
    qk_norm = False
    learn_sigma = False
    micro_conditions = False

    kind: Literal["uvit"] = "uvit"
    """The backbone."""
    width: Width = 288
    depth: int = Field(default=28, ge=1)
    """Blocks without the middle one: half before it, and half after it, each of these with a long skip."""
    head_dim: HeadDim = 72
    patch_size: PatchSize = 2
    mlp_ratio: MLPRatio = 4
    input_size: int = Field(default=16, ge=1)
    """Tokens along the longest side of the images; the learned positions of other shapes are a centre crop."""
    condition: Literal["text", "label"] = "label"
    """What an image is conditioned on: `label` (one token) or `text` (up to model.text_length tokens)."""
    num_classes: NumClasses = 1000
    text_length: int = Field(default=77, ge=1)
    """Learned positions for text tokens (model.condition text)."""
    final_conv: bool = False
    """End in a 3 x 3 convolution over the output (off in U-ViT-H/2)."""
    time_mlp: bool = False
    """Send the time through a trained MLP (off in U-ViT-H/2)."""
    qkv_bias: bool = False
    """Give query and value a bias (off in U-ViT-H/2)."""
    time_freq_shift: float = Field(default=0.0, ge=0, le=1)
    """The time's frequencies are 10000^(-i / (width / 2 - shift))."""
    label_init_std: LabelInitStd = 1.0
    route: Route = None

    def __post_init__(self) -> None:
        check_shape(self, more_blocks=1)
        if self.depth % 2:
            raise ValueError(f"model.depth {self.depth} must be even: half before the middle block, half after it")
        if self.route is not None and self.route.end != (end := self.depth + 1 - self.route.start):
            raise ValueError(
                f"model.route.end {self.route.end} must be {end} with start {self.route.start}, as far from the last "
                "block as that from the first: a long skip joins blocks that see the same tokens"
            )

    def conflicts(self, resolution: int, side: int, text_length: int) -> Iterator[str]:
        """Images or captions that the learned positions do not fit."""
        if side != self.input_size:
            yield (
                f"data.resolution {resolution} gives {side} tokens a side, but the learned positions are of "
                f"model.input_size {self.input_size}"
            )
        if self.condition == "text" and text_length > self.text_length:
            yield f"text_encoder.max_length {text_length} is more than model.text_length {self.text_length}"

    def multiply_adds(
        self, in_channels: int, text_width: int, image_tokens: int, text_tokens: int, kept: int | None = None
    ) -> int:
        """See ModelConfig."""
        d, n, patch = self.width, image_tokens, in_channels * self.patch_size**2
        others = 1 + (text_tokens if self.condition == "text" else 1)
        parts = [(times, m + others) for times, m in _by_tokens(self.route, self.depth + 1, n, kept)]
        blocks = sum(times * (m * _stream(self) + m * m * 2 * d) for times, m in parts)
        skips = sum(times // 2 * m * 2 * d * d for times, m in parts)  # the middle block has none
        text = text_tokens * text_width * d if self.condition == "text" else 0
        time = 8 * d * d if self.time_mlp else 0
        conv = n * self.patch_size**2 * in_channels**2 * 9 if self.final_conv else 0
        return blocks + skips + n * patch * d * 2 + text + time + conv + _fuse(self, n + others)


ShippedConfig = MMDiTConfig | DiTConfig | PixArtConfig | UViTConfig  # for code that knows the kinds one by one


@dataclass(frozen=True)
class ProjectorConfig:
    """Projector of representation alignment (models.repa). Neither number grows with the width."""

    hidden: int
    """Features of its inner layers."""
    features: int
    """Features of the encoder that it projects to."""
    kind: Literal["mlp", "conv"] = "mlp"
    """REPA's three linear layers, or iREPA's convolution, which has no inner layers."""
