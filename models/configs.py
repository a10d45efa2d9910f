"""Shapes of the backbones as frozen dataclasses. Stdlib only: the config file is read without torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal


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
        for key in ("width", "depth", "head_dim", "patch_size", "mlp_ratio", "pos_embed_max_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key} must be at least 1, got {getattr(self, key)}")
        if self.width % self.head_dim:
            raise ValueError(
                f"model.width {self.width} is not a multiple of model.head_dim {self.head_dim}: "
                "under muP the width grows by whole heads"
            )
        if self.width % 4:
            raise ValueError(f"model.width {self.width} must be a multiple of 4 (two axes, sine and cosine)")
        if self.time_freq_shift not in (0.0, 1.0):
            raise ValueError(f"model.time_freq_shift must be 0 or 1, got {self.time_freq_shift}")


ModelConfig = MMDiTConfig
