"""Our parameters under the names that diffusers and the official repositories give them, as plain correspondences.

A layout lists the tensors of the other code base and which numbers in them are ours: a TensorSlice says that `size`
numbers of our parameter, in memory's order, are those of theirs. So a fused qkv is three slices, a patch embedding is
one (a convolution's weight is ours with another shape), and a tensor that is stored in every block has a slice for each
copy. Numbers of theirs without a slice are zeros to us: a bias of the key, which softmax ignores, and what nothing
reads.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from trainer.mup.table import MuTable

from .forms import FLUX, Format, twin_of

Shape = tuple[int, ...]
# The last layer of each residual branch takes the branch's scale; see mup.base_depth.
_BRANCH_ENDS = ("blocks.*.out.weight", "blocks.*.out.bias", "blocks.*.mlp.fc2.weight", "blocks.*.mlp.fc2.bias")


def fold(table: MuTable, name: str) -> float:
    """What the forward pass multiplies by, and another code base does not: the factor on the exported parameter."""
    if any(fnmatchcase(name, pattern) for pattern in _BRANCH_ENDS):
        return table.settings.branch_scale
    return table.rows[name].multiplier


class TensorSlice(NamedTuple):
    """`size` numbers of our parameter from `ours_at` on, which are those of `theirs` from `at` on."""

    ours: str
    ours_at: int
    theirs: str
    at: int
    size: int


class Layout:
    """The tensors of one other format. shapes: of theirs, by name. tables: names of sin-cos position tables, which are
    computed. unread: patterns of names that an import may find and has no use for."""

    def __init__(self, ours: Mapping[str, Shape], kernel: Shape) -> None:
        """ours: shapes of our parameters; kernel: [C, P, P] of a patch."""
        self.ours = dict(ours)
        self.shapes: dict[str, Shape] = {}
        self.slices: list[TensorSlice] = []
        self.tables: list[str] = []
        self.unread: list[str] = []
        self._kernel = kernel

    def tensor(self, ours: str, theirs: str, shape: Shape | None = None) -> None:
        """One whole tensor."""
        self.shapes[theirs] = shape or self.ours[ours]
        self.slices.append(TensorSlice(ours, 0, theirs, 0, math.prod(self.ours[ours])))

    def rows(self, ours: str, theirs: str, pairs: Sequence[tuple[int, int, int]], shape: Shape) -> None:
        """Blocks of rows (first of ours, first of theirs, how many) of a tensor of that shape."""
        width = math.prod(self.ours[ours][1:])
        self.shapes[theirs] = shape
        self.slices += [TensorSlice(ours, a * width, theirs, b * width, n * width) for a, b, n in pairs]

    def layer(self, ours: str, *theirs: str) -> None:
        """Weight and bias; our rows are dealt evenly to the layers `theirs`."""
        for leaf in ("weight", "bias"):
            whole = self.ours[f"{ours}.{leaf}"]
            count = whole[0] // len(theirs)
            for number, name in enumerate(theirs):
                self.rows(f"{ours}.{leaf}", f"{name}.{leaf}", [(number * count, 0, count)], (count, *whole[1:]))

    def mlp(self, ours: str, first: str, second: str) -> None:
        self.layer(f"{ours}.fc1", first)
        self.layer(f"{ours}.fc2", second)

    def swapped(self, ours: str, theirs: str) -> None:
        """A layer whose two halves of rows stand in the other order: (scale, shift) and (shift, scale)."""
        for leaf in ("weight", "bias"):
            shape = self.ours[f"{ours}.{leaf}"]
            half = shape[0] // 2
            self.rows(f"{ours}.{leaf}", f"{theirs}.{leaf}", [(0, half, half), (half, 0, half)], shape)

    def beside(self, theirs: str, *ours: str) -> None:
        """Weights without bias whose columns lie beside each other in one layer of theirs."""
        fan_in = [self.ours[f"{name}.weight"][1] for name in ours]
        rows, row = self.ours[f"{ours[0]}.weight"][0], sum(fan_in)
        self.shapes[f"{theirs}.weight"] = (rows, row)
        for number, (name, n) in enumerate(zip(ours, fan_in, strict=True)):
            at = sum(fan_in[:number])
            self.slices += [
                TensorSlice(f"{name}.weight", i * n, f"{theirs}.weight", i * row + at, n) for i in range(rows)
            ]

    def patches(self, theirs: str) -> None:
        self.tensor("patch_embed.weight", f"{theirs}.weight", (self.ours["patch_embed.weight"][0], *self._kernel))
        self.tensor("patch_embed.bias", f"{theirs}.bias")

    def split(self, ours: str, theirs: Mapping[str, str]) -> None:
        """A projection without key bias as one layer for each of "q", "k", "v"; they have a key bias."""
        rows, fan_in = self.ours[f"{ours}.weight"]
        d = rows // len(theirs)
        for number, (part, name) in enumerate(theirs.items()):
            self.rows(f"{ours}.weight", f"{name}.weight", [(number * d, 0, d)], (d, fan_in))
            if part == "k":
                self.shapes[f"{name}.bias"] = (d,)
            else:
                self.tensor(f"{ours}.{part}_bias", f"{name}.bias")

    def fused(self, ours: str, theirs: str, parts: str = "qkv") -> None:
        """A projection without key bias as one layer, whose bias has a part for the key (or no bias at all)."""
        rows, _ = self.ours[f"{ours}.weight"]
        d = rows // len(parts)
        self.tensor(f"{ours}.weight", f"{theirs}.weight")
        for number, part in enumerate(parts):
            if f"{ours}.{part}_bias" in self.ours:
                self.rows(f"{ours}.{part}_bias", f"{theirs}.bias", [(0, number * d, d)], (rows,))

    def table(self, theirs: str, shape: Shape) -> None:
        self.shapes[theirs] = shape
        self.tables.append(theirs)


def layout(config: Any, channels: int, ours: Mapping[str, Shape], form: Format, tokens: int) -> Layout:
    """config: the backbone's, whose `kind` has a layout in that form. tokens: along a side of the trained images.

    Raises KeyError where there is none, AssertionError where a parameter of ours would be lost.
    """
    made = Layout(ours, (channels, config.patch_size, config.patch_size))
    LAYOUTS[config.kind, form](made, config, tokens)
    lost = made.ours.keys() - {piece.ours for piece in made.slices}
    assert not lost, f"no place for {', '.join(sorted(lost)[:5])}"
    return made


def _mmdit_diffusers(to: Layout, config: Any, tokens: int) -> None:
    """SD3Transformer2DModel, its qk_norm rms_norm or none; or FluxTransformer2DModel."""
    if twin_of(config) == FLUX:
        _flux(to, config)
        return
    to.patches("pos_embed.proj")
    to.table("pos_embed.pos_embed", (1, config.pos_embed_max_size**2, config.width))
    for ours, theirs in (("time_embed", "timestep_embedder"), ("pooled_embed", "text_embedder")):
        to.mlp(ours, f"time_text_embed.{theirs}.linear_1", f"time_text_embed.{theirs}.linear_2")
    to.layer("text_embed", "context_embedder")
    to.layer("final_modulation", "norm_out.linear")
    to.layer("final", "proj_out")
    for i in range(config.depth):
        block, last = f"transformer_blocks.{i}", i == config.depth - 1
        for stream, norm, qkv, gain, out, mlp in (
            ("image", "norm1", "to_{}", "norm_{}", "to_out.0", "ff"),
            ("text", "norm1_context", "add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
        ):
            ours = f"blocks.{i}.{stream}"
            parts = "kv" if last and stream == "text" else "qkv"
            to.layer(f"{ours}.modulation", f"{block}.{norm}.linear")
            to.layer(f"{ours}.{parts}", *(f"{block}.attn.{qkv.format(part)}" for part in parts))
            for part in parts[:-1] if config.qk_norm else "":
                to.tensor(f"{ours}.norm_{part}.weight", f"{block}.attn.{gain.format(part)}.weight")
            if parts == "qkv":
                to.layer(f"{ours}.out", f"{block}.attn.{out}")
                to.mlp(f"{ours}.mlp", f"{block}.{mlp}.net.0.proj", f"{block}.{mlp}.net.2")
    # The last block has a text query, which nothing reads.
    dead = f"transformer_blocks.{config.depth - 1}.attn"
    to.shapes[f"{dead}.add_q_proj.weight"] = (config.width, config.width)
    to.shapes[f"{dead}.add_q_proj.bias"] = (config.width,)
    if config.qk_norm:
        to.shapes[f"{dead}.norm_added_q.weight"] = (config.head_dim,)


def _flux(to: Layout, config: Any) -> None:
    """FluxTransformer2DModel, whose patches are (C, P, P) on both sides."""
    to.layer("patch_embed", "x_embedder")
    for ours, theirs in (("time_embed", "timestep_embedder"), ("pooled_embed", "text_embedder")):
        to.mlp(ours, f"time_text_embed.{theirs}.linear_1", f"time_text_embed.{theirs}.linear_2")
    to.layer("text_embed", "context_embedder")
    to.layer("final_modulation", "norm_out.linear")
    doubles, area = config.depth - config.single_depth, config.patch_size**2
    rows = to.ours["final.bias"][0]
    channels = rows // area
    moved = [(p * channels + c, c * area + p, 1) for p in range(area) for c in range(channels)]
    for leaf, rest in (("weight", (config.width,)), ("bias", ())):
        to.rows(f"final.{leaf}", f"proj_out.{leaf}", moved, (rows, *rest))
    for i in range(doubles):
        for stream, norm, qkv, gain, out, mlp in (
            ("image", "norm1", "to_{}", "norm_{}", "to_out.0", "ff"),
            ("text", "norm1_context", "add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
        ):
            ours, block = f"blocks.{i}.{stream}", f"transformer_blocks.{i}"
            to.layer(f"{ours}.modulation", f"{block}.{norm}.linear")
            to.layer(f"{ours}.qkv", *(f"{block}.attn.{qkv.format(part)}" for part in "qkv"))
            for part in "qk":
                to.tensor(f"{ours}.norm_{part}.weight", f"{block}.attn.{gain.format(part)}.weight")
            to.layer(f"{ours}.out", f"{block}.attn.{out}")
            to.mlp(f"{ours}.mlp", f"{block}.{mlp}.net.0.proj", f"{block}.{mlp}.net.2")
    for i in range(config.single_depth):
        ours, block = f"blocks.{doubles + i}", f"single_transformer_blocks.{i}"
        to.layer(f"{ours}.modulation", f"{block}.norm.linear")
        to.layer(f"{ours}.qkv", *(f"{block}.attn.to_{part}" for part in "qkv"))
        for part in "qk":
            to.tensor(f"{ours}.norm_{part}.weight", f"{block}.attn.norm_{part}.weight")
        to.layer(f"{ours}.mlp.fc1", f"{block}.proj_mlp")
        to.beside(f"{block}.proj_out", f"{ours}.out", f"{ours}.mlp.fc2")
        to.tensor(f"{ours}.mlp.fc2.bias", f"{block}.proj_out.bias")


def _mmdit_official(to: Layout, config: Any, tokens: int) -> None:
    """Stability AI's Stable Diffusion 3, whose modulations are (shift, scale) throughout."""
    to.patches("x_embedder.proj")
    to.table("pos_embed", (1, config.pos_embed_max_size**2, config.width))
    to.mlp("time_embed", "t_embedder.mlp.0", "t_embedder.mlp.2")
    to.mlp("pooled_embed", "y_embedder.mlp.0", "y_embedder.mlp.2")
    to.layer("text_embed", "context_embedder")
    to.swapped("final_modulation", "final_layer.adaLN_modulation.1")
    to.layer("final", "final_layer.linear")
    d = config.width
    for i in range(config.depth):
        for stream, name in (("image", "x_block"), ("text", "context_block")):
            ours, theirs = f"blocks.{i}.{stream}", f"joint_blocks.{i}.{name}"
            if i == config.depth - 1 and stream == "text":
                to.swapped(f"{ours}.modulation", f"{theirs}.adaLN_modulation.1")
                for leaf, rest in (("weight", (d,)), ("bias", ())):
                    to.rows(f"{ours}.kv.{leaf}", f"{theirs}.attn.qkv.{leaf}", [(0, d, 2 * d)], (3 * d, *rest))
                if config.qk_norm:
                    to.shapes[f"{theirs}.attn.ln_q.weight"] = (config.head_dim,)
                    to.tensor(f"{ours}.norm_k.weight", f"{theirs}.attn.ln_k.weight")
                continue
            to.layer(f"{ours}.modulation", f"{theirs}.adaLN_modulation.1")
            to.layer(f"{ours}.qkv", f"{theirs}.attn.qkv")
            for part in "qk" if config.qk_norm else "":
                to.tensor(f"{ours}.norm_{part}.weight", f"{theirs}.attn.ln_{part}.weight")
            to.layer(f"{ours}.out", f"{theirs}.attn.proj")
            to.mlp(f"{ours}.mlp", f"{theirs}.mlp.fc1", f"{theirs}.mlp.fc2")


def _dit_diffusers(to: Layout, config: Any, tokens: int) -> None:
    """DiTTransformer2DModel, which keeps the embedders of time and label in every block."""
    to.patches("pos_embed.proj")
    to.layer("final_modulation", "proj_out_1")
    to.layer("final", "proj_out_2")
    for i in range(config.depth):
        ours, block = f"blocks.{i}", f"transformer_blocks.{i}"
        embedders = f"{block}.norm1.emb"
        to.tensor("label_embed.weight", f"{embedders}.class_embedder.embedding_table.weight")
        to.mlp("time_embed", *(f"{embedders}.timestep_embedder.linear_{n}" for n in (1, 2)))
        to.layer(f"{ours}.modulation", f"{block}.norm1.linear")
        to.split(f"{ours}.attention.qkv", {part: f"{block}.attn1.to_{part}" for part in "qkv"})
        to.layer(f"{ours}.attention.out", f"{block}.attn1.to_out.0")
        to.mlp(f"{ours}.mlp", f"{block}.ff.net.0.proj", f"{block}.ff.net.2")


def _dit_official(to: Layout, config: Any, tokens: int) -> None:
    to.patches("x_embedder.proj")
    to.table("pos_embed", (1, tokens**2, config.width))
    to.mlp("time_embed", "t_embedder.mlp.0", "t_embedder.mlp.2")
    to.tensor("label_embed.weight", "y_embedder.embedding_table.weight")
    to.layer("final_modulation", "final_layer.adaLN_modulation.1")
    to.layer("final", "final_layer.linear")
    for i in range(config.depth):
        block = f"blocks.{i}"
        to.layer(f"{block}.modulation", f"{block}.adaLN_modulation.1")
        to.fused(f"{block}.attention.qkv", f"{block}.attn.qkv")
        to.layer(f"{block}.attention.out", f"{block}.attn.proj")
        to.mlp(f"{block}.mlp", f"{block}.mlp.fc1", f"{block}.mlp.fc2")


def _pixart_diffusers(to: Layout, config: Any, tokens: int) -> None:
    """PixArtTransformer2DModel."""
    to.patches("pos_embed.proj")
    embedders = {"time_embed": "timestep_embedder"}
    if config.micro_conditions:
        embedders |= {"size_embed": "resolution_embedder", "aspect_embed": "aspect_ratio_embedder"}
    for ours, theirs in embedders.items():
        to.mlp(ours, f"adaln_single.emb.{theirs}.linear_1", f"adaln_single.emb.{theirs}.linear_2")
    to.layer("time_modulation", "adaln_single.linear")
    to.mlp("text_embed", "caption_projection.linear_1", "caption_projection.linear_2")
    to.unread.append("caption_projection.y_embedding")  # of conversions before 2024: the null caption, as below
    to.tensor("scale_shift_table", "scale_shift_table")
    to.layer("final", "proj_out")
    for i in range(config.depth):
        ours, block = f"blocks.{i}", f"transformer_blocks.{i}"
        to.tensor(f"{ours}.scale_shift_table", f"{block}.scale_shift_table")
        to.split(f"{ours}.attention.qkv", {part: f"{block}.attn1.to_{part}" for part in "qkv"})
        to.layer(f"{ours}.attention.out", f"{block}.attn1.to_out.0")
        to.layer(f"{ours}.cross_attention.q", f"{block}.attn2.to_q")
        to.split(f"{ours}.cross_attention.kv", {part: f"{block}.attn2.to_{part}" for part in "kv"})
        to.layer(f"{ours}.cross_attention.out", f"{block}.attn2.to_out.0")
        to.mlp(f"{ours}.mlp", f"{block}.ff.net.0.proj", f"{block}.ff.net.2")


def _pixart_official(to: Layout, config: Any, tokens: int) -> None:
    to.patches("x_embedder.proj")
    to.table("pos_embed", (1, config.pos_embed_base_size**2, config.width))
    to.unread.append("y_embedder.y_embedding")  # the null caption's states; here the empty caption is encoded
    embedders = {"time_embed": "t_embedder"}
    if config.micro_conditions:
        embedders |= {"size_embed": "csize_embedder", "aspect_embed": "ar_embedder"}
    for ours, theirs in embedders.items():
        to.mlp(ours, f"{theirs}.mlp.0", f"{theirs}.mlp.2")
    to.layer("time_modulation", "t_block.1")
    to.mlp("text_embed", "y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2")
    to.tensor("scale_shift_table", "final_layer.scale_shift_table")
    to.layer("final", "final_layer.linear")
    for i in range(config.depth):
        block = f"blocks.{i}"
        to.tensor(f"{block}.scale_shift_table", f"{block}.scale_shift_table")
        to.fused(f"{block}.attention.qkv", f"{block}.attn.qkv")
        to.layer(f"{block}.attention.out", f"{block}.attn.proj")
        to.layer(f"{block}.cross_attention.q", f"{block}.cross_attn.q_linear")
        to.fused(f"{block}.cross_attention.kv", f"{block}.cross_attn.kv_linear", "kv")
        to.layer(f"{block}.cross_attention.out", f"{block}.cross_attn.proj")
        to.mlp(f"{block}.mlp", f"{block}.mlp.fc1", f"{block}.mlp.fc2")


def _uvit_official(to: Layout, config: Any, tokens: int) -> None:
    """Its class label stands before the time token, ours behind it; with text the order is ours."""
    to.patches("patch_embed.proj")
    rows, d = to.ours["pos_embed"]
    if config.condition == "label":
        to.tensor("label_embed.weight", "label_emb.weight")
        to.rows("pos_embed", "pos_embed", [(0, 1, 1), (1, 0, 1), (2, 2, rows - 2)], (1, rows, d))
    else:
        to.layer("text_embed", "context_embed")
        to.tensor("pos_embed", "pos_embed", (1, rows, d))
    if config.time_mlp:
        to.mlp("time_embed", "time_embed.0", "time_embed.2")
    half = range(config.depth // 2)
    for block in (*(f"in_blocks.{i}" for i in half), "mid_block", *(f"out_blocks.{i}" for i in half)):
        to.layer(f"{block}.norm_attention", f"{block}.norm1")
        to.fused(f"{block}.attention.qkv", f"{block}.attn.qkv")
        to.layer(f"{block}.attention.out", f"{block}.attn.proj")
        to.layer(f"{block}.norm_mlp", f"{block}.norm2")
        to.mlp(f"{block}.mlp", f"{block}.mlp.fc1", f"{block}.mlp.fc2")
        if block.startswith("out_"):
            to.layer(f"{block}.skip", f"{block}.skip_linear")
    to.layer("norm", "norm")
    to.layer("final", "decoder_pred")
    if config.final_conv:
        to.layer("final_conv", "final_layer")


LAYOUTS: dict[tuple[str, Format], Callable[[Layout, Any, int], None]] = {
    ("mmdit", "diffusers"): _mmdit_diffusers,
    ("mmdit", "official"): _mmdit_official,
    ("dit", "diffusers"): _dit_diffusers,
    ("dit", "official"): _dit_official,
    ("pixart", "diffusers"): _pixart_diffusers,
    ("pixart", "official"): _pixart_official,
    ("uvit", "official"): _uvit_official,
}
