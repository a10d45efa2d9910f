"""Parts that the backbones share, and the names by which they tell muP what a weight is.

Shapes: B batch, N image tokens, L text tokens, D width, H heads, K head_dim, C channels, P patch size.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Visible, attend

NORM_EPS = 1e-6
TIME_FEATURES = 256


class Declaration(NamedTuple):
    """What a model says about the parameters whose name matches `pattern` (fnmatch; the first match wins).

    init: "zeros", "ones", "normal" (standard deviation `std`), "fan_in" (std / sqrt(fan_in)) or "xavier_uniform"
        (uniform with standard deviation std x sqrt(2 / (fan_in + fan_out))).
    role: only where the shape cannot tell (an output weight and an embedding table look alike).
    inner: an output weight that more layers follow, so that its output must not shrink with the width at init.
    projections: number of matrices that lie behind each other along fan_out: 3 for a fused query, key and value, 1 for
        a query alone, 2 for a fused gate and its MLP; 0 where the weight is one matrix without heads.
    heads: whether the rows of these are those of whole heads.
    """

    pattern: str
    init: Literal["zeros", "ones", "normal", "fan_in", "xavier_uniform"]
    std: float = 1.0
    role: Literal["input", "hidden", "output", "vector", "fixed"] | None = None
    inner: bool = False
    projections: int = 0
    heads: bool = True


class TextCondition(NamedTuple):
    """Text states [B, L, E] of a frozen encoder and the mask [B, L], True where there is a token. Padding follows the
    tokens."""

    states: Tensor
    mask: Tensor


class SizedTextCondition(NamedTuple):
    """As TextCondition, with the images' (height, width) in pixels before they were cropped: size [B, 2]."""

    states: Tensor
    mask: Tensor
    size: Tensor


class PooledTextCondition(NamedTuple):
    """As TextCondition, with a vector of the whole caption that takes the place of the states' mean: pooled [B, P]."""

    states: Tensor
    mask: Tensor
    pooled: Tensor


class ClassCondition(NamedTuple):
    """Class labels int64 [B]; the null label (no condition) is num_classes."""

    labels: Tensor


class OutputLinear(nn.Linear):
    """Linear layer from the width to a fixed size. muP multiplies its input, not its bias, by `multiplier` = 1 / m."""

    multiplier: float = 1.0

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input * self.multiplier, self.weight, self.bias)


class TokenLinear(nn.Linear):
    """Linear layer of a block that every token goes through: query, key and value, attention's output, and the MLP's
    two. These are most of a model's arithmetic, and what parallel.precision fp8 narrows.

    Everything else is a plain nn.Linear: modulation and embeddings, which have few products and great leverage, U-ViT's
    skips, which lie in the residual stream itself, and the layer that ends the model.
    """

    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)
    """(input [..., fan_in], weight [fan_out, fan_in], bias [fan_out]) -> [..., fan_out], in the run's precision."""

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input, self.weight, self.bias)


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them: [..., fan_in] -> [..., hidden] -> [..., fan_out].

    linear: the class of both; that of a block is TokenLinear.
    """

    def __init__(
        self, fan_in: int, hidden: int, fan_out: int, activation: nn.Module, linear: type[nn.Linear] = nn.Linear
    ) -> None:
        super().__init__()
        self.fc1 = linear(fan_in, hidden)
        self.activation = activation
        self.fc2 = linear(hidden, fan_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class SwiGLU(nn.Module):
    """MLP of a block whose hidden features are gated (Shazeer, arXiv 2002.05202): [..., D] -> [..., D].

    One product makes gate and features, the gate's rows first: declare it with two projections without heads.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = TokenLinear(width, 2 * hidden)
        self.fc2 = TokenLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, features = self.fc1(x).chunk(2, dim=-1)  # 2 x [..., hidden]
        return self.fc2(F.silu(gate) * features)


class QKVLinear(TokenLinear):
    """Fused projection to query, key and value without a bias of the key: [..., E] -> [..., 3 D] (2 D without query).

    For attention without QK-norm. A bias of the key adds the same number to all scores of a query, which softmax
    ignores, so its true gradient is zero; Adam with a tiny epsilon would turn the rounding noise in its place into
    full steps. So there is none here; in checkpoints of other code bases it is set to zero.
    """

    def __init__(self, fan_in: int, width: int, query: bool = True, bias: bool = True) -> None:
        super().__init__(fan_in, (2 + query) * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width)) if query and bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        if self.v_bias is None:
            return self.multiply(input, self.weight, None)
        q_bias = [] if self.q_bias is None else [self.q_bias]
        bias = torch.cat([*q_bias, torch.zeros_like(self.v_bias), self.v_bias])  # [3 D]
        return self.multiply(input, self.weight, bias)


class SelfAttention(nn.Module):
    """Attention of tokens among themselves, without QK-norm: x [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, head_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = QKVLinear(width, width, bias=bias)
        self.out = TokenLinear(width, width)

    def forward(self, x: Tensor, seen: Visible = None) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.head_dim)  # 3 x [B, N, H, K]
        return self.out(attend(q, k, v, seen))  # [B, N, D]


def split_heads(x: Tensor, parts: int, head_dim: int) -> tuple[Tensor, ...]:
    """A fused projection [B, N, parts D] -> its parts, each [B, N, H, K].

    The heads stay behind the tokens until `attend`: norms and concatenations then run over whole rows of memory, and
    one copy writes the parts' gradients into that of x.
    """
    return x.unflatten(-1, (parts, -1, head_dim)).unbind(2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without gains, then each sample's scale and shift: x [B, N, D], shift and scale [B, D] -> [B, N, D]."""
    x = F.layer_norm(x, (x.shape[-1],), eps=NORM_EPS)
    return x * (1 + scale[:, None]) + shift[:, None]


def add_gated(x: Tensor, gate: Tensor, branch: Tensor, branch_scale: float) -> Tensor:
    """x, branch [B, N, D], gate [B, D] -> x + branch_scale * gate * branch: [B, N, D]."""
    if branch_scale != 1:  # a product with 1 would be a kernel of its own
        gate = branch_scale * gate
    return x + gate[:, None] * branch


def sinusoids(x: Tensor, features: int = TIME_FEATURES, freq_shift: float = 0.0) -> Tensor:
    """[cos, sin] of numbers at features / 2 frequencies from 1 to 1e-4: x [...] -> [..., features], always float32."""
    half = features // 2
    i = torch.arange(half, dtype=torch.float32, device=x.device)
    frequency = torch.exp(-math.log(10000.0) * i / (half - freq_shift))
    angle = x.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def time_sinusoids(t: Tensor, freq_shift: float = 0.0, features: int = TIME_FEATURES) -> Tensor:
    """Sinusoids of 1000 t: t [B] in [0, 1] -> [B, features], always float32.

    bfloat16 would round 900.1 and 901.2 to one value, so neither t nor the table is ever cast. The discrete step n
    of a schedule with 1000 steps is t = n / 1000, from which float32 recovers n to within 6e-5.
    """
    return sinusoids(1000.0 * t.float(), features, freq_shift)


def axis_sinusoids(width: int, max_size: int, base_size: float, device: torch.device | str) -> Tensor:
    """Sin-cos table of one image axis: [max_size, width / 2] float32, half of a token's 2-D position.

    The tokens lie base_size / max_size apart.
    """
    position = torch.arange(max_size, dtype=torch.float64, device=device) * (base_size / max_size)
    i = torch.arange(width // 4, dtype=torch.float64, device=device)
    angle = position[:, None] * 10000.0 ** (-i / (width // 4))
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def grid_places(height: int, width: int, others: int, device: torch.device) -> Tensor:
    """(row, column) of the tokens of an image, then (0, 0) of `others`: int64 [height * width + others, 2]."""
    rows = torch.arange(height, device=device).repeat_interleave(width)  # [h w]
    columns = torch.arange(width, device=device).repeat(height)  # [h w]
    return F.pad(torch.stack([rows, columns], dim=1), (0, 0, 0, others))


def rotate(x: Tensor, places: Tensor) -> Tensor:
    """RoPE on two axes as FLUX.1 has it: x [B, N, H, K], queries or keys, turned by their places [N, 2] or [B, N, 2].

    Neighbouring features are a pair. The first K / 4 pairs turn by the row and the others by the column, pair i of an
    axis by 10000^(-4 i / K) a step, so that a score depends on the distance of two tokens alone. Angles are integers
    times float32 in any precision.
    """
    pairs = x.shape[-1] // 4
    frequency = 10000.0 ** (-torch.arange(pairs, dtype=torch.float32, device=x.device) / pairs)  # [K / 4]
    angle = (places[..., None] * frequency).flatten(-2)[..., None, :]  # [N, 1, K / 2]
    cos, sin = angle.cos(), angle.sin()
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # 2 x [B, N, H, K / 2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)  # [B, N, H, K / 2, 2]
    return turned.flatten(-2).to(x.dtype)


def crop_positions(axis: Tensor, height: int, width: int) -> Tensor:
    """Centre crop of the 2-D table as SD3 takes it, of any shape: axis [max, D/2] -> [height * width, D]."""
    max_size = axis.shape[0]
    if max(height, width) > max_size:
        raise ValueError(f"{height} x {width} tokens do not fit model.pos_embed_max_size {max_size}: raise it")
    rows = axis[(max_size - height) // 2 :][:height]  # [height, D/2]
    columns = axis[(max_size - width) // 2 :][:width]  # [width, D/2]
    return grid_positions(rows, columns)


def grid_positions(rows: Tensor, columns: Tensor) -> Tensor:
    """Positions of a grid, column half first: rows [h, D/2], columns [w, D/2] -> [h w, D]."""
    h, w = rows.shape[0], columns.shape[0]
    table = torch.cat([columns[None].expand(h, -1, -1), rows[:, None].expand(-1, w, -1)], dim=-1)  # [h, w, D]
    return table.reshape(h * w, -1)


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, C, h P, w P] -> [B, h w, C P P], a patch flattened in the order of a convolution's weight (C, P, P)."""
    b, c, height, width = x.shape
    x = x.reshape(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)


def unpatchify(x: Tensor, patch: int, height: int, width: int) -> Tensor:
    """[B, h w, P P C] -> [B, C, h P, w P]; the output's patch order is (P, P, C) as in DiT and SD3."""
    b, _, features = x.shape
    c = features // (patch * patch)
    x = x.reshape(b, height, width, patch, patch, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, height * patch, width * patch)
