"""MMDiT (Stable Diffusion 3, arXiv 2403.03206, Figure 2): image and text tokens in two streams, one attention.

Both streams have their own weights and meet in the attention only. The conditioning vector (time + pooled text)
scales, shifts and gates each stream (adaLN). The last block has no text output, so no weight there is dead.

Shapes: B batch, N image tokens, L text tokens, D width, H heads, K head_dim, C channels, P patch size, E text width.
"""

from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Visible, attend, visible, visible_from
from .backbone import Backbone
from .configs import MMDiTConfig
from .layers import (
    MLP,
    NORM_EPS,
    TIME_FEATURES,
    Declaration,
    OutputLinear,
    PooledTextCondition,
    QKVLinear,
    SwiGLU,
    TextCondition,
    TokenLinear,
    add_gated,
    axis_sinusoids,
    crop_positions,
    grid_places,
    modulate,
    patchify,
    rotate,
    split_heads,
    time_sinusoids,
    unpatchify,
)
from .repa import Unprojected
from .route import ends, keep, rejoin


class Modulation(NamedTuple):
    """What the conditioning vector does to one stream of a block, each [B, D]: to the attention, then to the MLP."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


def head_norm(config: MMDiTConfig) -> nn.Module:
    """QK-norm of the heads of queries or keys [B, N, H, K]; the identity without it."""
    return nn.RMSNorm(config.head_dim, eps=NORM_EPS) if config.qk_norm else nn.Identity()


def place(q: Tensor, k: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
    """q [B, N, H, K] and k [B, M, H, K] with RoPE by places [M, 2] or [B, M, 2] of the keys, the first N of them
    the queries'."""
    return (q, k) if places is None else (rotate(q, places[..., : q.shape[1], :]), rotate(k, places))


def keep_places(places: Tensor | None, kept: Tensor | None, image_tokens: int) -> Tensor | None:
    """Places [N + L, 2] of all tokens -> [B, K + L, 2] of those that go through a route. kept: [B, K] of the N tokens
    of the image, or None for all."""
    if places is None or kept is None:
        return places
    text = places[image_tokens:]  # [L, 2]
    return torch.cat([places[kept], text.expand(len(kept), -1, -1)], dim=1)


def block_mlp(config: MMDiTConfig) -> nn.Module:
    """The MLP of a stream [B, N, D] -> [B, N, D]."""
    if config.mlp == "swiglu":
        return SwiGLU(config.width, config.mlp_hidden)
    return MLP(config.width, config.mlp_hidden, config.width, nn.GELU(approximate="tanh"), TokenLinear)


class Stream(nn.Module):
    """One stream's weights in a block: modulation, qkv with QK-norm, output projection, MLP.

    Keys keep their bias without QK-norm, too: each stream has its own, so that their difference moves the scores.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        d = config.width
        self.head_dim = config.head_dim
        self.modulation = nn.Linear(d, 6 * d)
        self.qkv = TokenLinear(d, 3 * d)
        self.norm_q = head_norm(config)
        self.norm_k = head_norm(config)
        self.out = TokenLinear(d, d)
        self.mlp = block_mlp(config)

    def before_attention(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Modulation]:
        """x [B, N, D], c [B, D] (after SiLU) -> q, k, v [B, N, H, K] and the modulation for `after_attention`."""
        mod = Modulation(*self.modulation(c).chunk(6, dim=-1))  # 6 x [B, D]
        qkv = self.qkv(modulate(x, mod.shift, mod.scale))  # [B, N, 3 D]
        q, k, v = split_heads(qkv, 3, self.head_dim)  # 3 x [B, N, H, K]
        return self.norm_q(q), self.norm_k(k), v, mod

    def after_attention(self, x: Tensor, attended: Tensor, mod: Modulation, branch_scale: float) -> Tensor:
        """x, attended [B, N, D] -> [B, N, D]; branch_scale multiplies what is added to x."""
        x = add_gated(x, mod.gate, self.out(attended), branch_scale)  # [B, N, D]
        modulated = modulate(x, mod.shift_mlp, mod.scale_mlp)  # [B, N, D]
        return add_gated(x, mod.gate_mlp, self.mlp(modulated), branch_scale)  # [B, N, D]


class LastTextStream(nn.Module):
    """The text stream of the last block: only keys and values, since nothing reads its output."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        d = config.width
        self.head_dim = config.head_dim
        self.modulation = nn.Linear(d, 2 * d)
        self.kv = TokenLinear(d, 2 * d)
        self.norm_k = head_norm(config)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, L, D], c [B, D] -> k, v [B, L, H, K]."""
        scale, shift = self.modulation(c).chunk(2, dim=-1)  # 2 x [B, D], scale first as in SD3
        kv = self.kv(modulate(x, shift, scale))  # [B, L, 2 D]
        k, v = split_heads(kv, 2, self.head_dim)  # 2 x [B, L, H, K]
        return self.norm_k(k), v


class Block(nn.Module):
    """Joint attention of both streams, then an MLP in each."""

    branch_scale: float = 1.0  # multiplies what a block adds to the residual stream; see mup.base_depth
    joins_streams: bool = True  # q, k, v of two streams lie behind each other: for the compiler to write them so

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.image = Stream(config)
        self.text = Stream(config)

    def forward(
        self, x: Tensor, y: Tensor, c: Tensor, seen: Visible, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, N, D], y [B, L, D], c [B, D], seen: of N + L keys, places [N + L, 2] of RoPE -> x, y."""
        q_x, k_x, v_x, mod_x = self.image.before_attention(x, c)
        q_y, k_y, v_y, mod_y = self.text.before_attention(y, c)
        q, k, v = (torch.cat(pair, dim=1) for pair in ((q_x, q_y), (k_x, k_y), (v_x, v_y)))  # [B, N + L, H, K]
        q, k = place(q, k, places)  # [B, N + L, H, K]
        attended_x, attended_y = attend(q, k, v, seen).split([x.shape[1], y.shape[1]], dim=1)  # [B, N, D], [B, L, D]
        x = self.image.after_attention(x, attended_x, mod_x, self.branch_scale)  # [B, N, D]
        y = self.text.after_attention(y, attended_y, mod_y, self.branch_scale)  # [B, L, D]
        return x, y


class LastBlock(nn.Module):
    """The image attends to both streams; the text goes no further."""

    branch_scale: float = 1.0
    joins_streams: bool = True

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.image = Stream(config)
        self.text = LastTextStream(config)

    def forward(
        self, x: Tensor, y: Tensor, c: Tensor, seen: Visible, places: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """As Block.forward, without a text output."""
        q, k_x, v_x, mod = self.image.before_attention(x, c)  # [B, N, H, K]
        k_y, v_y = self.text(y, c)  # [B, L, H, K]
        k, v = torch.cat([k_x, k_y], dim=1), torch.cat([v_x, v_y], dim=1)  # [B, N + L, H, K]
        q, k = place(q, k, places)  # [B, N, H, K], [B, N + L, H, K]
        attended = attend(q, k, v, visible_from(x, seen))  # [B, N, D]
        return self.image.after_attention(x, attended, mod, self.branch_scale), None


class SingleBlock(nn.Module):
    """FLUX.1's single-stream block: attention and MLP read the same modulated tokens, and one gate adds both.

    Its layers are apart where FLUX.1 fuses them (qkv with the MLP's first, the output with its second), so that each
    has its kind, its init and its matrices for Muon. The sum of the last two has one bias, the MLP's. Without QK-norm
    keys have no bias, which softmax would ignore.
    """

    branch_scale: float = 1.0

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        d = config.width
        self.head_dim = config.head_dim
        self.modulation = nn.Linear(d, 3 * d)
        self.qkv = TokenLinear(d, 3 * d) if config.qk_norm else QKVLinear(d, d)
        self.norm_q = head_norm(config)
        self.norm_k = head_norm(config)
        self.out = TokenLinear(d, d, bias=False)
        self.mlp = block_mlp(config)

    def forward(self, x: Tensor, c: Tensor, seen: Visible, places: Tensor | None) -> Tensor:
        """x [B, N + L, D], the image before the text, c [B, D], seen: of N + L keys, places [N + L, 2] of RoPE -> x."""
        shift, scale, gate = self.modulation(c).chunk(3, dim=-1)  # 3 x [B, D]
        modulated = modulate(x, shift, scale)  # [B, N + L, D]
        q, k, v = split_heads(self.qkv(modulated), 3, self.head_dim)  # 3 x [B, N + L, H, K]
        q, k = place(self.norm_q(q), self.norm_k(k), places)  # [B, N + L, H, K]
        branch = self.out(attend(q, k, v, seen)) + self.mlp(modulated)  # [B, N + L, D]
        return add_gated(x, gate, branch, self.branch_scale)  # [B, N + L, D]


class MMDiT(Backbone):
    """Velocity (or noise) of an image given time and text.

    in_channels: C of the image or latent. text_width: E, the features of a text state. pooled_width: P of a
    PooledTextCondition; 0 takes the mean of the states.
    """

    KINDS = MappingProxyType(
        {
            "attention": ("blocks.*.qkv.*", "blocks.*.kv.*", "blocks.*.norm_[qk].*", "blocks.*.out.*"),
            "mlp": ("blocks.*.mlp.*",),
            "modulation": ("blocks.*.modulation.*",),
            "text": ("text_embed.*", "pooled_embed.*", "blocks.*.text.*"),
            "image": ("blocks.*.image.*",),
            "time": ("time_embed.*",),
            "patch": ("patch_embed.*",),
            "skip": ("rejoin.*",),
            "final": ("final_modulation.*", "final.*"),
        }
    )

    axis_table: Tensor

    def __init__(self, config: MMDiTConfig, in_channels: int, text_width: int, pooled_width: int = 0) -> None:
        super().__init__()
        d, patch = config.width, config.patch_size
        self.config = config
        self.patch_embed = nn.Linear(in_channels * patch * patch, d)
        self.time_embed = MLP(TIME_FEATURES, d, d, nn.SiLU())
        self.pooled_embed = MLP(pooled_width or text_width, d, d, nn.SiLU())
        self.text_embed = nn.Linear(text_width, d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth - max(config.single_depth, 1)))
        self.blocks.extend([SingleBlock(config) for _ in range(config.single_depth)] or [LastBlock(config)])
        self.final_modulation = nn.Linear(d, 2 * d)
        self.final = OutputLinear(d, patch * patch * in_channels)
        self.projector = Unprojected()
        if config.positions == "sincos":
            self.register_buffer("axis_table", torch.empty(config.pos_embed_max_size, d // 2), persistent=False)
        self.rejoin = rejoin(config.route, d)
        self.fill_buffers()

    def fill_buffers(self) -> None:
        """Compute the position table; called again after the model has left the meta device."""
        c = self.config
        if c.positions == "rope":
            return
        self.axis_table = axis_sinusoids(c.width, c.pos_embed_max_size, c.pos_embed_base_size, self.axis_table.device)

    def shard_units(self) -> list[nn.Module]:
        """The parts that are gathered, and compiled, one at a time."""
        return list(self.blocks)

    @staticmethod
    def declarations(config: MMDiTConfig) -> tuple[Declaration, ...]:
        """Init of each parameter at the base width, and the roles that its shape cannot tell."""
        adaln = Declaration("*modulation.weight", "zeros" if config.adaln_init == "zero" else "fan_in")
        last = [] if config.single_depth else [Declaration("*.kv.weight", "fan_in", projections=2)]
        norms = [Declaration("*.norm_[qk].weight", "ones")] if config.qk_norm else []
        gated = Declaration("*.mlp.fc1.weight", "fan_in", projections=2, heads=False)
        return (
            Declaration("final.weight", "zeros", role="output"),
            Declaration("*bias", "zeros"),
            *norms,
            Declaration("time_embed.*.weight", "normal", std=0.02),
            adaln,
            Declaration("*.qkv.weight", "fan_in", projections=3),
            *last,
            *([gated] if config.mlp == "swiglu" else []),
            Declaration("*.weight", "fan_in"),
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: TextCondition | PooledTextCondition,
        features_at: int | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, C, h P, w P], t [B] in [0, 1], kept [B, K] of the image tokens -> prediction like x, and the image
        tokens after block `features_at`."""
        config, dtype = self.config, self.patch_embed.weight.dtype
        height, width = x.shape[-2] // config.patch_size, x.shape[-1] // config.patch_size
        states, mask = condition.states.to(dtype), condition.mask  # [B, L, E], [B, L]

        tokens = self.patch_embed(patchify(x, config.patch_size).to(dtype))  # [B, N, D]
        places = None
        if config.positions == "rope":
            places = grid_places(height, width, states.shape[1], x.device)  # [N + L, 2], the text's at 0 as FLUX.1's
        else:
            tokens = (tokens + crop_positions(self.axis_table, height, width)).to(dtype)  # [B, N, D]
        if isinstance(condition, PooledTextCondition):
            pooled = condition.pooled.to(dtype)  # [B, P]
        else:
            weights = mask[..., None].to(dtype) / mask.sum(1).clamp(min=1)[:, None, None].to(dtype)  # [B, L, 1]
            pooled = (states * weights).sum(1)  # [B, E], masked mean
        c = self.time_embed(time_sinusoids(t, config.time_freq_shift).to(dtype)) + self.pooled_embed(pooled)
        c = F.silu(c)  # [B, D]
        y = self.text_embed(states)  # [B, L, D]
        seen = seen_by_all = visible(mask, before=tokens.shape[1])

        features, before, places_of_all = None, tokens, places
        first, last = ends(config.route, kept)
        for number, block in enumerate(self.blocks):
            if number == first:
                before, tokens = tokens, keep(tokens, kept)  # [B, N, D], [B, K, D]
                seen, places = visible(mask, before=tokens.shape[1]), keep_places(places_of_all, kept, height * width)
            if isinstance(block, SingleBlock):
                tokens = tokens if y is None else torch.cat([tokens, y], dim=1)  # [B, N + L, D]
                tokens, y = block(tokens, c, seen, places), None  # [B, N + L, D]
            else:
                tokens, y = block(tokens, y, c, seen, places)  # [B, N or K, D], [B, L, D]
            if number == features_at:
                features = self.projector(tokens[:, : height * width], height, width)
            if number == last:
                tokens, seen = self.rejoin(before, tokens, kept), seen_by_all  # [B, N, D]
                places = places_of_all
        tokens = tokens[:, : height * width]  # [B, N, D]
        scale, shift = self.final_modulation(c).chunk(2, dim=-1)  # 2 x [B, D], scale first as in SD3
        patches = self.final(modulate(tokens, shift, scale))  # [B, N, P P C]
        return unpatchify(patches, config.patch_size, height, width), features
