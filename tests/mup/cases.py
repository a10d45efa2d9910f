"""Small backbones and what their muP tables must say of every parameter.

The expectations are written by hand, not computed by trainer.mup: a wrong rule cannot agree with itself. Standard
deviations are those at the base width 48 with 3 channels, 2 x 2 patches and text states of 20 features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import build_model, declarations, kinds, out_channels
from models.configs import DiTConfig, MMDiTConfig, PixArtConfig, ProjectorConfig, UViTConfig
from models.layers import ClassCondition, TextCondition
from models.model_config import ModelConfig, RouteConfig
from trainer.diffusion.random import subset
from trainer.diffusion.repa import Alignment
from trainer.mup.apply import apply_multipliers, build_table, init_parameters
from trainer.mup.rules import Settings
from trainer.mup.table import MuTable

BASE_WIDTH = 48
HEAD_DIM = 12
CHANNELS = 3
TEXT_WIDTH = 20
CLASSES = 10
TEXT_LENGTH = 5
PROJECTOR = ProjectorConfig(hidden=24, features=16)

AdaLN = Literal["zero", "fan_in"]


class Expected(NamedTuple):
    """std: standard deviation at the base width; None for ones. decays: under optim.decay matrices.
    uniform: drawn from a uniform distribution, not a normal one. inner: an output that more layers follow."""

    role: str
    std: float | None
    decays: bool = False
    uniform: bool = False
    inner: bool = False


def hidden(std: float) -> Expected:
    return Expected("hidden", std, decays=True)


def read_in(std: float) -> Expected:
    """An input weight."""
    return Expected("input", std, decays=True)


def xavier(role: str, fan_in: int, fan_out: int) -> Expected:
    return Expected(role, (2 / (fan_in + fan_out)) ** 0.5, decays=True, uniform=True)


def vector(std: float | None = 0.0) -> Expected:
    """A table or embedding with a std, a bias, or a gain (None)."""
    return Expected("vector", std)


HIDDEN = hidden(48**-0.5)
BIAS = vector()
GAIN = Expected("fixed", None)  # of a head
FINAL = {
    "final.weight": Expected("output", 0.0, decays=True),
    "final.bias": Expected("fixed", 0.0),
}

Snapshot = dict[str, Expected]


def linear(name: str, weight: Expected) -> Snapshot:
    """A layer's weight and its bias, which starts at zero."""
    return {f"{name}.weight": weight, f"{name}.bias": BIAS}


def under(prefix: str, rows: Snapshot) -> Snapshot:
    return {f"{prefix}.{name}": row for name, row in rows.items()}


MLP = {**linear("mlp.fc1", HIDDEN), **linear("mlp.fc2", hidden(192**-0.5))}  # fan_in 4 x 48

STREAM = {
    **linear("modulation", HIDDEN),
    **linear("qkv", HIDDEN),
    "norm_q.weight": GAIN,
    "norm_k.weight": GAIN,
    **linear("out", HIDDEN),
    **MLP,
}
MMDIT = {
    **linear("patch_embed", read_in(12**-0.5)),  # fan_in 3 channels x 2 x 2
    **linear("time_embed.fc1", read_in(0.02)),
    **linear("time_embed.fc2", hidden(0.02)),
    **linear("pooled_embed.fc1", read_in(20**-0.5)),
    **linear("pooled_embed.fc2", HIDDEN),
    **linear("text_embed", read_in(20**-0.5)),
    **under("blocks.0.image", STREAM),
    **under("blocks.0.text", STREAM),
    **under("blocks.1.image", STREAM),
    **linear("blocks.1.text.modulation", HIDDEN),
    **linear("blocks.1.text.kv", HIDDEN),
    "blocks.1.text.norm_k.weight": GAIN,
    **linear("final_modulation", HIDDEN),
    **FINAL,
}

# MMDiT with RoPE, gated MLPs and a single-stream block, without QK-norm; a gated MLP has 128 hidden features.
GATED = {**linear("mlp.fc1", HIDDEN), **linear("mlp.fc2", hidden(128**-0.5))}
GATED_STREAM = {**linear("modulation", HIDDEN), **linear("qkv", HIDDEN), **linear("out", HIDDEN), **GATED}
SINGLE_BLOCK = {
    **linear("modulation", HIDDEN),
    "qkv.weight": HIDDEN,
    "qkv.q_bias": BIAS,
    "qkv.v_bias": BIAS,
    "out.weight": HIDDEN,
    **GATED,
}
MMDIT_OPTIONS = {
    **{name: row for name, row in MMDIT.items() if not name.startswith("blocks.")},
    **under("blocks.0.image", GATED_STREAM),
    **under("blocks.0.text", GATED_STREAM),
    **under("blocks.1", SINGLE_BLOCK),
}

DIT_BLOCK = {
    **linear("modulation", HIDDEN),
    "attention.qkv.weight": HIDDEN,
    "attention.qkv.q_bias": BIAS,
    "attention.qkv.v_bias": BIAS,
    **linear("attention.out", HIDDEN),
    **MLP,
}
DIT = {
    **linear("patch_embed", read_in(12**-0.5)),
    **linear("time_embed.fc1", read_in(256**-0.5)),
    **linear("time_embed.fc2", HIDDEN),
    "label_embed.weight": read_in(1.0),
    **under("blocks.0", DIT_BLOCK),
    **under("blocks.1", DIT_BLOCK),
    **linear("final_modulation", HIDDEN),
    **FINAL,
}

PIXART_BLOCK = {
    "scale_shift_table": vector(0.02),
    "attention.qkv.weight": xavier("hidden", 48, 3 * 48),
    "attention.qkv.q_bias": BIAS,
    "attention.qkv.v_bias": BIAS,
    **linear("attention.out", xavier("hidden", 48, 48)),
    **linear("cross_attention.q", xavier("hidden", 48, 48)),
    "cross_attention.kv.weight": xavier("hidden", 48, 2 * 48),
    "cross_attention.kv.v_bias": BIAS,
    **linear("cross_attention.out", hidden(0.0)),
    **linear("mlp.fc1", xavier("hidden", 48, 4 * 48)),
    **linear("mlp.fc2", xavier("hidden", 4 * 48, 48)),
}
PIXART = {
    **linear("patch_embed", xavier("input", 12, 48)),
    **linear("time_embed.fc1", read_in(0.02)),
    **linear("time_embed.fc2", hidden(0.02)),
    **linear("size_embed.fc1", read_in(0.02)),
    **linear("size_embed.fc2", hidden(0.02)),
    **linear("aspect_embed.fc1", read_in(0.02)),
    **linear("aspect_embed.fc2", hidden(0.02)),
    **linear("time_modulation", hidden(0.02)),
    **linear("text_embed.fc1", read_in(0.02)),
    **linear("text_embed.fc2", hidden(0.02)),
    **under("blocks.0", PIXART_BLOCK),
    **under("blocks.1", PIXART_BLOCK),
    "scale_shift_table": vector(0.02),
    **FINAL,
}

SMALL = hidden(0.02)
NORM = {"weight": vector(None), "bias": BIAS}
QKV_BIASES = {"attention.qkv.q_bias": BIAS, "attention.qkv.v_bias": BIAS}
UVIT_BLOCK = {
    **under("norm_attention", NORM),
    "attention.qkv.weight": SMALL,
    **linear("attention.out", SMALL),
    **under("norm_mlp", NORM),
    **linear("mlp.fc1", SMALL),
    **linear("mlp.fc2", SMALL),
}
UVIT_TEXT = {
    **linear("patch_embed", read_in(36**-0.5)),  # torch's default of a convolution: 1 / sqrt(3 x fan_in 12)
    **linear("text_embed", read_in(0.02)),
    "pos_embed": vector(0.02),
    **under("in_blocks.0", UVIT_BLOCK),
    **under("mid_block", UVIT_BLOCK),
    **under("out_blocks.0", UVIT_BLOCK),
    **linear("out_blocks.0.skip", SMALL),
    **under("norm", NORM),
    **FINAL,
}
UVIT = {
    **{name: row for name, row in UVIT_TEXT.items() if "text_embed" not in name},
    "label_embed.weight": read_in(1.0),
    **linear("time_embed.fc1", SMALL),
    **linear("time_embed.fc2", SMALL),
    **under("in_blocks.0", QKV_BIASES),
    **under("mid_block", QKV_BIASES),
    **under("out_blocks.0", QKV_BIASES),
    "final_conv.weight": Expected("fixed", 81**-0.5, decays=True),  # 1 / sqrt(3 x fan_in 3 x 3 x 3)
    "final_conv.bias": Expected("fixed", 0.0),
}


ALIGNED = {  # what REPA adds; fan_in 48, then 24 hidden features
    "projector.fc1.weight": Expected("output", 48**-0.5, decays=True, inner=True),
    "projector.fc1.bias": Expected("fixed", 0.0),
    "projector.fc2.weight": Expected("fixed", 24**-0.5, decays=True),
    "projector.fc2.bias": Expected("fixed", 0.0),
    "projector.fc3.weight": Expected("fixed", 24**-0.5, decays=True),
    "projector.fc3.bias": Expected("fixed", 0.0),
}


@dataclass(frozen=True)
class Case:
    """A small backbone.

    config: at a width, with two blocks (U-ViT: one before the middle, one after); non-zero gates under "fan_in", so
        that every weight has a gradient at the first step. snapshot: every parameter under "fan_in".
    zeroed: names that adaLN-zero starts at zero. input_name, hidden_part: a weight and a part of names for faults.
    sp_std: std under SP at four times the base width, where it differs from muP's.
    projector: of REPA, whose loss is then added.
    """

    config: Callable[[int, AdaLN], ModelConfig]
    snapshot: Snapshot
    input_name: str
    hidden_part: str
    sp_std: Mapping[str, float] = field(default_factory=dict)
    zeroed: str | None = None
    projector: ProjectorConfig | None = None

    def names_of(self, *roles: str) -> set[str]:
        return {name for name, row in self.snapshot.items() if row.role in roles}

    def std(self, name: str, adaln: AdaLN = "fan_in") -> float | None:
        """Standard deviation at the base width."""
        zero = adaln == "zero" and self.zeroed is not None and name.endswith(self.zeroed)
        return 0.0 if zero else self.snapshot[name].std

    def random(self) -> set[str]:
        """Names that do not start at zero or one."""
        return {name for name, row in self.snapshot.items() if row.std}

    def table(self, m: float, settings: Settings | None = None, adaln: AdaLN = "fan_in") -> MuTable:
        """At m times the base width."""
        return build_table(
            lambda width: build_model(self.config(width, adaln), CHANNELS, TEXT_WIDTH, self.projector),
            BASE_WIDTH,
            round(m * BASE_WIDTH),
            HEAD_DIM,
            declarations(self.config(BASE_WIDTH, adaln), self.projector),
            settings or Settings(),
            kinds(self.config(BASE_WIDTH, adaln)),
        )

    def build(self, m: float, dtype: torch.dtype = torch.float64) -> nn.Module:
        config = self.config(round(m * BASE_WIDTH), "fan_in")
        return build_model(config, CHANNELS, TEXT_WIDTH, self.projector).to(dtype)

    def model(self, m: float, table: MuTable, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """With the table's multipliers and init."""
        model = self.build(m, dtype)
        apply_multipliers(model, table)
        init_parameters(model, table, seed)
        return model

    @torch.no_grad()
    def randomise_zeros(self, model: nn.Module) -> None:
        """Zero weights would leave others without gradient at the first step."""
        generator = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if self.snapshot[name].std == 0.0 and name.endswith(".weight"):
                p.normal_(0.0, BASE_WIDTH**-0.5, generator=generator)

    def loss(self, model: nn.Module, step: int = 0) -> Tensor:
        """Mean squared error on a batch that depends on the step alone; one of the texts is padded."""
        generator = torch.Generator().manual_seed(1000 + step)
        dtype, config = next(model.parameters()).dtype, self.config(BASE_WIDTH, "fan_in")

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        x, target = draw(4, CHANNELS, 8, 8), draw(4, out_channels(config, CHANNELS), 8, 8)
        states, t = draw(4, TEXT_LENGTH, TEXT_WIDTH), torch.rand(4, generator=generator)
        mask = torch.ones(4, TEXT_LENGTH, dtype=torch.bool)
        mask[0, 3:] = False
        labels = torch.randint(CLASSES + 1, (4,), generator=generator)
        condition = TextCondition(states, mask) if config.condition == "text" else ClassCondition(labels)
        if config.route is not None:
            kept = subset(torch.arange(4) + 4 * step, 16, config.route.kept(16), "route")  # of 4 x 4 tokens
            return F.mse_loss(model(x, t, condition, kept=kept)[0], target)
        if self.projector is None:
            return F.mse_loss(model(x, t, condition)[0], target)
        features = draw(4, 16, self.projector.features)  # of 4 x 4 tokens
        prediction, projected = model(x, t, condition, features_at=1)
        return F.mse_loss(prediction, target) + Alignment(0.5, 1, lambda _: features).losses(projected, features).mean()


def mmdit(width: int, adaln: AdaLN) -> ModelConfig:
    return MMDiTConfig(
        width=width, depth=2, head_dim=HEAD_DIM, pos_embed_max_size=8, pos_embed_base_size=4, adaln_init=adaln
    )


def mmdit_options(width: int, adaln: AdaLN) -> ModelConfig:
    return MMDiTConfig(
        width=width, depth=2, head_dim=HEAD_DIM, adaln_init=adaln, positions="rope", mlp="swiglu", single_depth=1,
        qk_norm=False,
    )  # fmt: skip


def dit(width: int, adaln: AdaLN) -> ModelConfig:
    return DiTConfig(width=width, depth=2, head_dim=HEAD_DIM, num_classes=CLASSES, adaln_init=adaln)


def pixart(width: int, adaln: AdaLN) -> ModelConfig:
    return PixArtConfig(width=width, depth=2, head_dim=HEAD_DIM, pos_embed_base_size=4, micro_conditions=True)


def uvit(width: int, adaln: AdaLN) -> ModelConfig:
    return UViTConfig(
        width=width, depth=2, head_dim=HEAD_DIM, input_size=4, num_classes=CLASSES, final_conv=True, time_mlp=True,
        qkv_bias=True,
    )  # fmt: skip


def uvit_text(width: int, adaln: AdaLN) -> ModelConfig:
    return UViTConfig(width=width, depth=2, head_dim=HEAD_DIM, input_size=4, condition="text", text_length=TEXT_LENGTH)


def constant(snapshot: Snapshot) -> dict[str, float]:
    """Hidden weights with a constant std, which SP leaves alone."""
    return {name: 0.02 for name, row in snapshot.items() if row.role == "hidden" and row.std == 0.02}


CASES: dict[str, Case] = {
    "mmdit": Case(mmdit, MMDIT, "time_embed.fc1.weight", "modulation", constant(MMDIT), "modulation.weight"),
    "mmdit_options": Case(
        mmdit_options, MMDIT_OPTIONS, "time_embed.fc1.weight", "modulation", constant(MMDIT_OPTIONS),
        "modulation.weight",
    ),
    "dit": Case(dit, DIT, "label_embed.weight", "modulation", {}, "modulation.weight"),
    # The patch embedding's Xavier formula at the trained shape: fan_out 4 x 48.
    "pixart": Case(
        pixart, PIXART, "text_embed.fc1.weight", "time_modulation",
        {**constant(PIXART), "patch_embed.weight": (2 / (12 + 4 * 48)) ** 0.5},
    ),
    "uvit": Case(uvit, UVIT, "label_embed.weight", "skip", constant(UVIT)),
    "uvit_text": Case(uvit_text, UVIT_TEXT, "text_embed.weight", "skip", constant(UVIT_TEXT)),
}  # fmt: skip

CONVOLVED = {  # what iREPA's projector adds; fan_in 48 x 3 x 3
    "projector.conv.weight": Expected("output", (9 * 48) ** -0.5, decays=True, inner=True),
    "projector.conv.bias": Expected("fixed", 0.0),
}
# The backbones that REPA is for, with its projector.
REPA_CASES = {
    name: replace(CASES[name], snapshot={**CASES[name].snapshot, **ALIGNED}, projector=PROJECTOR)
    for name in ("mmdit", "dit", "pixart")
}

JOINED = {  # what a fused route adds; fan_in 2 x 48
    "rejoin.mask_token": vector(0.02),
    **linear("rejoin.linear", xavier("hidden", 2 * 48, 48)),
}


CONV_CASES = {
    name: replace(case, snapshot={**CASES[name].snapshot, **CONVOLVED}, projector=replace(PROJECTOR, kind="conv"))
    for name, case in REPA_CASES.items()
}


def routed(name: str) -> Case:
    """A case one of whose blocks sees half of the tokens, and whose tokens are fused after it."""
    case, start = CASES[name], int(name.startswith("uvit"))
    route = RouteConfig(share=0.5, start=start, end=start + 1, fuse="sprint")

    def config(width: int, adaln: AdaLN) -> ModelConfig:
        return replace(case.config(width, adaln), route=route)

    return replace(case, config=config, snapshot={**case.snapshot, **JOINED})


ROUTED_CASES = {name: routed(name) for name in CASES}
