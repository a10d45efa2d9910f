"""PixArt-alpha (arXiv 2310.00426, Figure 4): DiT that reads its caption by cross-attention, with adaLN-single.

One linear of the time (adaLN-single) gives all blocks the same six modulations; each block adds its own small table.

Shapes: B batch, N image tokens, L text tokens, D width, H heads, K head_dim, C channels, P patch size, E text width,
O output channels (C or 2 C).
"""

from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Visible, attend, visible, visible_from
from .backbone import Backbone
from .configs import PixArtConfig
from .layers import (
    MLP,
    TIME_FEATURES,
    Declaration,
    OutputLinear,
    QKVLinear,
    SelfAttention,
    SizedTextCondition,
    TextCondition,
    TokenLinear,
    add_gated,
    axis_sinusoids,
    grid_positions,
    modulate,
    patchify,
    sinusoids,
    split_heads,
    time_sinusoids,
    unpatchify,
)
from .repa import Unprojected
from .route import ends, keep, rejoin


class CrossAttention(nn.Module):
    """Image tokens read the text."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = TokenLinear(width, width)
        self.kv = QKVLinear(width, width, query=False)
        self.out = TokenLinear(width, width)

    def forward(self, x: Tensor, y: Tensor, seen: Visible) -> Tensor:
        """x [B, N, D], y [B, L, D], seen: of L keys -> [B, N, D]."""
        [q] = split_heads(self.q(x), 1, self.head_dim)  # [B, N, H, K]
        k, v = split_heads(self.kv(y), 2, self.head_dim)  # 2 x [B, L, H, K]
        return self.out(attend(q, k, v, seen))  # [B, N, D]


class Block(nn.Module):
    """Self-attention and MLP, modulated and gated by time; between them cross-attention, which is neither."""

    branch_scale: float = 1.0  # multiplies what a block adds to the residual stream; see mup.base_depth

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        d = config.width
        self.scale_shift_table = nn.Parameter(torch.zeros(6, d))
        self.attention = SelfAttention(d, config.head_dim)
        self.cross_attention = CrossAttention(d, config.head_dim)
        self.mlp = MLP(d, config.mlp_ratio * d, d, nn.GELU(approximate="tanh"), TokenLinear)

    def forward(self, x: Tensor, y: Tensor, modulation: Tensor, seen: Visible) -> Tensor:
        """x [B, N, D], y [B, L, D], modulation [B, 6, D], seen: of L keys -> [B, N, D]."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (self.scale_shift_table + modulation).unbind(1)  # [B, D]
        x = add_gated(x, gate, self.attention(modulate(x, shift, scale)), self.branch_scale)  # [B, N, D]
        x = x + self.branch_scale * self.cross_attention(x, y, seen)  # [B, N, D]
        return add_gated(x, gate_mlp, self.mlp(modulate(x, shift_mlp, scale_mlp)), self.branch_scale)  # [B, N, D]


class PixArt(Backbone):
    """Noise (and variance) of an image given time and text.

    in_channels: C of the image or latent. text_width: E, the features of a text state.
    """

    KINDS = MappingProxyType(
        {
            "attention": ("blocks.*.attention.*", "blocks.*.cross_attention.*"),
            "mlp": ("blocks.*.mlp.*",),
            "modulation": ("time_modulation.*", "blocks.*.scale_shift_table"),
            "text": ("text_embed.*", "blocks.*.cross_attention.kv.*"),
            "time": ("time_embed.*",),
            "patch": ("patch_embed.*",),
            "skip": ("rejoin.*",),
            "final": ("scale_shift_table", "final.*"),
        }
    )

    def __init__(self, config: PixArtConfig, in_channels: int, text_width: int) -> None:
        super().__init__()
        d, patch = config.width, config.patch_size
        out_channels = in_channels * (1 + config.learn_sigma)
        self.config = config
        self.patch_embed = nn.Linear(in_channels * patch * patch, d)
        self.time_embed = MLP(TIME_FEATURES, d, d, nn.SiLU())
        if config.micro_conditions:
            self.size_embed = MLP(TIME_FEATURES, d // 3, d // 3, nn.SiLU())
            self.aspect_embed = MLP(TIME_FEATURES, d // 3, d // 3, nn.SiLU())
        self.time_modulation = nn.Linear(d, 6 * d)
        self.text_embed = MLP(text_width, d, d, nn.GELU(approximate="tanh"))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.scale_shift_table = nn.Parameter(torch.zeros(2, d))
        self.final = OutputLinear(d, patch * patch * out_channels)
        self.projector = Unprojected()
        self.rejoin = rejoin(config.route, d)

    def fill_buffers(self) -> None:
        """No buffers: positions are computed for the grid at hand."""

    def shard_units(self) -> list[nn.Module]:
        """The parts that are gathered, and compiled, one at a time."""
        return list(self.blocks)

    @staticmethod
    def declarations(config: PixArtConfig) -> tuple[Declaration, ...]:
        """Init of each parameter at the base width, and the roles that its shape cannot tell.

        The std of the scale-shift tables does not depend on the width, because they are vectors; the original's does
        (randn / sqrt(width)).
        """
        small = ["time_*.weight", "text_embed.*.weight"]  # time MLP and adaLN-single; caption MLP
        small += ["size_embed.*.weight", "aspect_embed.*.weight"] if config.micro_conditions else []
        return (
            Declaration("final.weight", "zeros", role="output"),
            Declaration("*bias", "zeros"),
            Declaration("*scale_shift_table", "normal", std=0.02),
            Declaration("*cross_attention.out.weight", "zeros"),
            *(Declaration(pattern, "normal", std=0.02) for pattern in small),
            Declaration("*.qkv.weight", "xavier_uniform", projections=3),
            Declaration("*.q.weight", "xavier_uniform", projections=1),
            Declaration("*.kv.weight", "xavier_uniform", projections=2),
            Declaration("*.weight", "xavier_uniform"),
        )

    def embed_size(self, x: Tensor, condition: TextCondition | SizedTextCondition, dtype: torch.dtype) -> Tensor:
        """Height, width and aspect ratio of the images, a third of the features each: [B, D].

        The size is the condition's, or that of x where it has none (as in sampling); the ratio is that of x.
        """
        height, width = x.shape[-2:]
        if isinstance(condition, SizedTextCondition):
            size = condition.size  # [B, 2]
        else:
            sides = (self.config.pixels_per_latent * side for side in (height, width))
            size = torch.cat([torch.full((x.shape[0], 1), side, device=x.device) for side in sides], dim=1)  # [B, 2]
        aspect = torch.full((x.shape[0],), height / width, device=x.device)  # [B]
        sizes = self.size_embed(sinusoids(size).to(dtype)).flatten(1)  # [B, 2 D / 3]
        return torch.cat([sizes, self.aspect_embed(sinusoids(aspect).to(dtype))], dim=-1)  # [B, D]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: TextCondition | SizedTextCondition,
        features_at: int | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, C, h P, w P], t [B] in [0, 1] (step / 1000), kept [B, K] of the image tokens -> prediction
        [B, O, h P, w P], and the image tokens after block `features_at`."""
        config, dtype = self.config, self.patch_embed.weight.dtype
        height, width = x.shape[-2] // config.patch_size, x.shape[-1] // config.patch_size
        extent = config.pos_embed_base_size / config.pos_embed_interpolation

        tokens = self.patch_embed(patchify(x, config.patch_size).to(dtype))  # [B, N, D]
        axes = (axis_sinusoids(config.width, n, extent, x.device) for n in (height, width))  # [h, D/2], [w, D/2]
        tokens = (tokens + grid_positions(*axes)).to(dtype)  # [B, N, D]
        c = self.time_embed(time_sinusoids(t, config.time_freq_shift).to(dtype))  # [B, D]
        if config.micro_conditions:
            c = c + self.embed_size(x, condition, dtype)  # [B, D]
        modulation = self.time_modulation(F.silu(c)).unflatten(-1, (6, -1))  # [B, 6, D]
        y = self.text_embed(condition.states.to(dtype))  # [B, L, D]
        mask = condition.mask
        # Softmax over nothing is NaN, which a weight of 0 does not undo: a row without tokens attends to its padding.
        text = visible(mask | ~mask.any(1, keepdim=True))
        seen = seen_by_all = visible_from(tokens, text)

        features, before = None, tokens
        first, last = ends(config.route, kept)
        for number, block in enumerate(self.blocks):
            if number == first:
                before, tokens = tokens, keep(tokens, kept)  # [B, N, D], [B, K, D]
                seen = visible_from(tokens, text)
            tokens = block(tokens, y, modulation, seen)  # [B, N or K, D]
            if number == features_at:
                features = self.projector(tokens, height, width)
            if number == last:
                tokens, seen = self.rejoin(before, tokens, kept), seen_by_all  # [B, N, D]
        shift, scale = (self.scale_shift_table + c[:, None]).unbind(1)  # 2 x [B, D]
        patches = self.final(modulate(tokens, shift, scale))  # [B, N, P P O]
        return unpatchify(patches, config.patch_size, height, width), features
