"""U-ViT (arXiv 2209.12152, Figure 1): time, condition and patches are all tokens; long skips join the two halves.

Shapes: B batch, N image tokens, L text tokens, T all tokens (1 + 1 or L + N), D width, H heads, K head_dim,
C channels, P patch size, E text width.
"""

from types import MappingProxyType

import torch
from torch import Tensor, nn

from .attention import Visible, visible
from .backbone import Backbone
from .configs import UViTConfig
from .layers import (
    MLP,
    ClassCondition,
    Declaration,
    OutputLinear,
    SelfAttention,
    TextCondition,
    TokenLinear,
    patchify,
    time_sinusoids,
    unpatchify,
)
from .route import ends, keep, rejoin

NORM_EPS = 1e-5  # as published; the other backbones have 1e-6


class Block(nn.Module):
    """Attention, then MLP, each after a LayerNorm."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        d = config.width
        self.norm_attention = nn.LayerNorm(d, eps=NORM_EPS)
        self.attention = SelfAttention(d, config.head_dim, bias=config.qkv_bias)
        self.norm_mlp = nn.LayerNorm(d, eps=NORM_EPS)
        self.mlp = MLP(d, config.mlp_ratio * d, d, nn.GELU(), TokenLinear)

    def forward(self, x: Tensor, seen: Visible) -> Tensor:
        """x [B, T, D], seen: of T keys -> [B, T, D]."""
        x = x + self.attention(self.norm_attention(x), seen)  # [B, T, D]
        return x + self.mlp(self.norm_mlp(x))  # [B, T, D]


class SkipBlock(Block):
    """A block of the second half: first its input is joined with that of its mirror image in the first half."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__(config)
        self.skip = nn.Linear(2 * config.width, config.width)

    def forward(self, x: Tensor, seen: Visible, skipped: Tensor | None = None) -> Tensor:
        """x, skipped [B, T, D], seen: of T keys -> [B, T, D]."""
        assert skipped is not None
        return super().forward(self.skip(torch.cat([x, skipped], dim=-1)), seen)  # [B, T, D]


class UViT(Backbone):
    """Noise of an image given time and class label or text.

    in_channels: C of the image or latent. text_width: E, the features of a text state.
    """

    KINDS = MappingProxyType(
        {
            "attention": ("*_block*.norm_attention.*", "*_block*.attention.*"),
            "mlp": ("*_block*.norm_mlp.*", "*_block*.mlp.*"),
            "text": ("text_embed.*",),
            "label": ("label_embed.*",),
            "time": ("time_embed.*",),
            "patch": ("patch_embed.*",),
            "skip": ("out_blocks.*.skip.*", "rejoin.*"),
            "final": ("norm.*", "final.*", "final_conv.*"),
        }
    )

    def __init__(self, config: UViTConfig, in_channels: int, text_width: int) -> None:
        super().__init__()
        d, patch, half = config.width, config.patch_size, config.depth // 2
        self.config = config
        self.patch_embed = nn.Linear(in_channels * patch * patch, d)
        if config.time_mlp:
            self.time_embed = MLP(d, 4 * d, d, nn.SiLU())
        if config.condition == "label":
            self.label_embed = nn.Embedding(config.num_classes + 1, d)  # the last one is the null label
        else:
            self.text_embed = nn.Linear(text_width, d)
        self.first = 1 + (1 if config.condition == "label" else config.text_length)  # table row of the first patch
        self.pos_embed = nn.Parameter(torch.zeros(self.first + config.input_size**2, d))
        self.in_blocks = nn.ModuleList([Block(config) for _ in range(half)])
        self.mid_block = Block(config)
        self.out_blocks = nn.ModuleList([SkipBlock(config) for _ in range(half)])
        self.norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.final = OutputLinear(d, patch * patch * in_channels)
        self.rejoin = rejoin(config.route, d)
        if config.final_conv:
            self.final_conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def fill_buffers(self) -> None:
        """No buffers: positions are learned."""

    def shard_units(self) -> list[nn.Module]:
        """The parts that are gathered, and compiled, one at a time: the blocks in their order."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    @staticmethod
    def declarations(config: UViTConfig) -> tuple[Declaration, ...]:
        """Init of each parameter at the base width, and the roles that its shape cannot tell.

        As published: 0.02 for linear layers and positions; torch's default, std 1 / sqrt(3 fan_in), for convolutions
        (a patch embedding is one), and 1 for labels. The final layer is zero here, as muP wants it.
        """
        labels = config.condition == "label"
        return (
            Declaration("final.weight", "zeros", role="output"),
            Declaration("*bias", "zeros"),
            Declaration("*norm*.weight", "ones"),
            Declaration("patch_embed.weight", "fan_in", std=3**-0.5),
            *([Declaration("final_conv.weight", "fan_in", std=3**-0.5)] if config.final_conv else []),
            *([Declaration("label_embed.weight", "normal", std=config.label_init_std)] if labels else []),
            Declaration("*.qkv.weight", "normal", std=0.02, projections=3),
            Declaration("*", "normal", std=0.02),
        )

    def condition_tokens(
        self, condition: ClassCondition | TextCondition, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, 1 or L, D] of label or text, and the text's mask [B, L]."""
        if isinstance(condition, ClassCondition):
            return self.label_embed(condition.labels)[:, None], None  # [B, 1, D]
        length = condition.states.shape[1]
        if length > self.config.text_length:
            raise ValueError(f"{length} text tokens do not fit model.text_length {self.config.text_length}: raise it")
        return self.text_embed(condition.states.to(dtype)), condition.mask  # [B, L, D], [B, L]

    def image_positions(self, height: int, width: int) -> Tensor:
        """Centre crop of the learned grid: [height * width, D]."""
        side = self.config.input_size
        if max(height, width) > side:
            raise ValueError(f"{height} x {width} tokens do not fit model.input_size {side}")
        top, left = (side - height) // 2, (side - width) // 2
        grid = self.pos_embed[self.first :].unflatten(0, (side, side))  # [side, side, D]
        return grid[top : top + height, left : left + width].flatten(0, 1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: ClassCondition | TextCondition,
        features_at: int | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, C, h P, w P], t [B] in [0, 1] (step / 1000), kept [B, K] of the image tokens -> prediction like x, and
        the image tokens after block `features_at` (in the order of shard_units)."""
        config, dtype = self.config, self.patch_embed.weight.dtype
        height, width = x.shape[-2] // config.patch_size, x.shape[-1] // config.patch_size

        patches = self.patch_embed(patchify(x, config.patch_size).to(dtype))  # [B, N, D]
        time = time_sinusoids(t, config.time_freq_shift, config.width).to(dtype)  # [B, D]
        if config.time_mlp:
            time = self.time_embed(time)  # [B, D]
        given, text_mask = self.condition_tokens(condition, dtype)  # [B, 1 or L, D], [B, L]
        extras = 1 + given.shape[1]
        positions = torch.cat([self.pos_embed[:extras], self.image_positions(height, width)])  # [T, D]
        tokens = torch.cat([time[:, None], given, patches], dim=1) + positions  # [B, T, D]
        seen, image = None, slice(extras, extras + patches.shape[1])
        if text_mask is not None:
            # The text goes to the end, because a packed row has its padding there.
            tokens, image = tokens.roll(-extras, dims=1), slice(0, patches.shape[1])
            seen = visible(text_mask, before=patches.shape[1] + 1)

        features, skipped, half = None, [], config.depth // 2
        first, last = ends(config.route, kept)
        places = None if kept is None else places_of(kept, image, tokens.shape[1])  # [B, T'], T' = T - N + K
        before, seen_by_all, image_of_all = tokens, seen, image
        for number, block in enumerate(self.shard_units()):
            if number == first:
                before, tokens = tokens, keep(tokens, places)  # [B, T, D], [B, T', D]
                image = slice(image.start, image.start + tokens.shape[1] - extras)
                seen = None if text_mask is None else visible(text_mask, before=image.stop + 1)
            if number <= half:
                tokens = block(tokens, seen)  # [B, T or T', D]
            else:
                tokens = block(tokens, seen, skipped.pop())  # [B, T or T', D]
            if number < half:
                skipped.append(tokens)
            if number == features_at:
                features = tokens[:, image]
            if number == last:
                tokens, seen, image = self.rejoin(before, tokens, places), seen_by_all, image_of_all  # [B, T, D]
        prediction = unpatchify(self.final(self.norm(tokens[:, image])), config.patch_size, height, width)
        if config.final_conv:
            prediction = self.final_conv(prediction)  # [B, C, h P, w P]
        return prediction, features


def places_of(kept: Tensor, image: slice, count: int) -> Tensor:
    """Where in a row of `count` tokens, of which `image` are the image's, the kept ones [B, K] and all others lie:
    [B, count - N + K]."""
    row = torch.arange(count, device=kept.device).expand(len(kept), -1)  # [B, T]
    return torch.cat([row[:, : image.start], kept + image.start, row[:, image.stop :]], dim=1)
