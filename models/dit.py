"""DiT (arXiv 2212.09748, Figure 3): image tokens in blocks that time and class label scale, shift and gate (adaLN).

Shapes: B batch, N image tokens, D width, H heads, K head_dim, C channels, P patch size, O output channels (C or 2 C).
"""

from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone
from .configs import DiTConfig
from .layers import (
    MLP,
    TIME_FEATURES,
    ClassCondition,
    Declaration,
    OutputLinear,
    SelfAttention,
    TokenLinear,
    add_gated,
    axis_sinusoids,
    grid_positions,
    modulate,
    patchify,
    time_sinusoids,
    unpatchify,
)
from .repa import Unprojected
from .route import ends, keep, rejoin


class Block(nn.Module):
    """Attention, then MLP, both modulated before and gated after."""

    branch_scale: float = 1.0  # multiplies what a block adds to the residual stream; see mup.base_depth

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d = config.width
        self.modulation = nn.Linear(d, 6 * d)
        self.attention = SelfAttention(d, config.head_dim)
        self.mlp = MLP(d, config.mlp_ratio * d, d, nn.GELU(approximate="tanh"), TokenLinear)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [B, N, D], c [B, D] (after SiLU) -> [B, N, D]."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(c).chunk(6, dim=-1)  # 6 x [B, D]
        x = add_gated(x, gate, self.attention(modulate(x, shift, scale)), self.branch_scale)  # [B, N, D]
        return add_gated(x, gate_mlp, self.mlp(modulate(x, shift_mlp, scale_mlp)), self.branch_scale)  # [B, N, D]


class DiT(Backbone):
    """Noise (and variance) of an image given time and class label.

    in_channels: C of the image or latent. text_width: of no use here; every backbone is called alike.
    """

    KINDS = MappingProxyType(
        {
            "attention": ("blocks.*.attention.*",),
            "mlp": ("blocks.*.mlp.*",),
            "modulation": ("blocks.*.modulation.*",),
            "label": ("label_embed.*",),
            "time": ("time_embed.*",),
            "patch": ("patch_embed.*",),
            "skip": ("rejoin.*",),
            "final": ("final_modulation.*", "final.*"),
        }
    )

    def __init__(self, config: DiTConfig, in_channels: int, text_width: int) -> None:
        super().__init__()
        d, patch = config.width, config.patch_size
        out_channels = in_channels * (1 + config.learn_sigma)
        self.config = config
        self.patch_embed = nn.Linear(in_channels * patch * patch, d)
        self.time_embed = MLP(TIME_FEATURES, d, d, nn.SiLU())
        self.label_embed = nn.Embedding(config.num_classes + 1, d)  # the last one is the null label
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.final_modulation = nn.Linear(d, 2 * d)
        self.final = OutputLinear(d, patch * patch * out_channels)
        self.projector = Unprojected()
        self.rejoin = rejoin(config.route, d)

    def fill_buffers(self) -> None:
        """No buffers: positions are computed for the grid at hand."""

    def shard_units(self) -> list[nn.Module]:
        """The parts that are gathered, and compiled, one at a time."""
        return list(self.blocks)

    @staticmethod
    def declarations(config: DiTConfig) -> tuple[Declaration, ...]:
        """Init of each parameter at the base width, and the roles that its shape cannot tell."""
        stock = config.linear_init == "xavier_uniform"
        adaln = "zeros" if config.adaln_init == "zero" else config.linear_init
        return (
            Declaration("final.weight", "zeros", role="output"),
            Declaration("*bias", "zeros"),
            Declaration("label_embed.weight", "normal", std=config.label_init_std),
            *([Declaration("time_embed.*.weight", "normal", std=0.02)] if stock else []),
            Declaration("*modulation.weight", adaln),
            Declaration("*.qkv.weight", config.linear_init, projections=3),
            Declaration("*.weight", config.linear_init),
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: ClassCondition,
        features_at: int | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, C, h P, w P], t [B] in [0, 1] (step / 1000), kept [B, K] of the tokens -> prediction [B, O, h P, w P],
        and the tokens after block `features_at`."""
        config, dtype = self.config, self.patch_embed.weight.dtype
        height, width = x.shape[-2] // config.patch_size, x.shape[-1] // config.patch_size

        tokens = self.patch_embed(patchify(x, config.patch_size).to(dtype))  # [B, N, D]
        axes = (axis_sinusoids(config.width, n, n, x.device) for n in (height, width))  # [h, D/2], [w, D/2]
        tokens = (tokens + grid_positions(*axes)).to(dtype)  # [B, N, D]
        time = self.time_embed(time_sinusoids(t, config.time_freq_shift).to(dtype))  # [B, D]
        c = F.silu(time + self.label_embed(condition.labels))  # [B, D]

        features, before = None, tokens
        first, last = ends(config.route, kept)
        for number, block in enumerate(self.blocks):
            if number == first:
                before, tokens = tokens, keep(tokens, kept)  # [B, N, D], [B, K, D]
            tokens = block(tokens, c)  # [B, N or K, D]
            if number == features_at:
                features = self.projector(tokens, height, width)
            if number == last:
                tokens = self.rejoin(before, tokens, kept)  # [B, N, D]
        shift, scale = self.final_modulation(c).chunk(2, dim=-1)  # 2 x [B, D]
        patches = self.final(modulate(tokens, shift, scale))  # [B, N, P P O]
        return unpatchify(patches, config.patch_size, height, width), features
