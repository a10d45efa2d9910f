"""A small MMDiT, what its muP table must say, and checkers that name the parameters which do not follow it.

The expectations are written by hand, not computed by trainer.mup: a wrong rule cannot agree with itself.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import MMDiTConfig
from models.layers import TextCondition
from models.mmdit import MMDiT
from trainer.mup.apply import apply_multipliers, build_table, init_parameters, param_groups
from trainer.mup.rules import Settings
from trainer.mup.table import MuTable

BASE_WIDTH = 32
HEAD_DIM = 8
CHANNELS = 3
TEXT_WIDTH = 20
LR = 1e-3
WEIGHT_DECAY = 0.1

AdaLN = Literal["zero", "fan_in"]


class Expected(NamedTuple):
    """std: standard deviation at the base width; None for ones."""

    role: str
    std: float | None


HIDDEN = Expected("hidden", 32**-0.5)
ADALN_ZERO = Expected("hidden", 0.0)
BIAS = Expected("vector", 0.0)
GAIN = Expected("fixed", None)

STREAM = {
    "modulation.weight": ADALN_ZERO,
    "modulation.bias": BIAS,
    "qkv.weight": HIDDEN,
    "qkv.bias": BIAS,
    "norm_q.weight": GAIN,
    "norm_k.weight": GAIN,
    "out.weight": HIDDEN,
    "out.bias": BIAS,
    "mlp.fc1.weight": HIDDEN,
    "mlp.fc1.bias": BIAS,
    "mlp.fc2.weight": Expected("hidden", 128**-0.5),  # fan_in 4 x 32
    "mlp.fc2.bias": BIAS,
}

# Every parameter of the two-block model under adaLN-zero; a name that only one of the two has fails.
SNAPSHOT: dict[str, Expected] = {
    "patch_embed.weight": Expected("input", 12**-0.5),  # fan_in 3 channels x 2 x 2
    "patch_embed.bias": BIAS,
    "time_embed.fc1.weight": Expected("input", 0.02),
    "time_embed.fc1.bias": BIAS,
    "time_embed.fc2.weight": Expected("hidden", 0.02),
    "time_embed.fc2.bias": BIAS,
    "pooled_embed.fc1.weight": Expected("input", 20**-0.5),
    "pooled_embed.fc1.bias": BIAS,
    "pooled_embed.fc2.weight": HIDDEN,
    "pooled_embed.fc2.bias": BIAS,
    "text_embed.weight": Expected("input", 20**-0.5),
    "text_embed.bias": BIAS,
    **{f"blocks.0.image.{name}": row for name, row in STREAM.items()},
    **{f"blocks.0.text.{name}": row for name, row in STREAM.items()},
    **{f"blocks.1.image.{name}": row for name, row in STREAM.items()},
    "blocks.1.text.modulation.weight": ADALN_ZERO,
    "blocks.1.text.modulation.bias": BIAS,
    "blocks.1.text.kv.weight": HIDDEN,
    "blocks.1.text.kv.bias": BIAS,
    "blocks.1.text.norm_k.weight": GAIN,
    "final_modulation.weight": ADALN_ZERO,
    "final_modulation.bias": BIAS,
    "final.weight": Expected("output", 0.0),
    "final.bias": Expected("fixed", 0.0),
}


class Scale(NamedTuple):
    """init: on the std; decay: rule "independent", matrices only; eps_width: under eps_rule "width"."""

    init: float
    multiplier: float
    lr: float
    decay: float
    eps_width: float


SCALES: dict[float, dict[str, Scale]] = {
    4.0: {
        "input": Scale(1.0, 1.0, 1.0, 1.0, 0.25),
        "hidden": Scale(0.5, 1.0, 0.25, 4.0, 0.25),
        "output": Scale(1.0, 0.25, 1.0, 1.0, 0.25),
        "vector": Scale(1.0, 1.0, 1.0, 0.0, 0.25),
        "fixed": Scale(1.0, 1.0, 1.0, 0.0, 1.0),
    },
    2.5: {
        "input": Scale(1.0, 1.0, 1.0, 1.0, 0.4),
        "hidden": Scale(0.6324555320336759, 1.0, 0.4, 2.5, 0.4),
        "output": Scale(1.0, 0.4, 1.0, 1.0, 0.4),
        "vector": Scale(1.0, 1.0, 1.0, 0.0, 0.4),
        "fixed": Scale(1.0, 1.0, 1.0, 0.0, 1.0),
    },
}


def names_of(*roles: str) -> set[str]:
    """Names with one of `roles` in the snapshot."""
    return {name for name, row in SNAPSHOT.items() if row.role in roles}


def expected_std(name: str, adaln: AdaLN) -> float | None:
    """Standard deviation at the base width."""
    return HIDDEN.std if adaln == "fan_in" and name.endswith("modulation.weight") else SNAPSHOT[name].std


def small_config(width: int, adaln: AdaLN = "fan_in") -> MMDiTConfig:
    """Two blocks; non-zero gates unless asked, so that every weight has a gradient at the first step."""
    return MMDiTConfig(
        width=width, depth=2, head_dim=HEAD_DIM, pos_embed_max_size=8, pos_embed_base_size=4, adaln_init=adaln
    )


def small_table(m: float, settings: Settings | None = None, adaln: AdaLN = "fan_in") -> MuTable:
    """Table of the small model at m times the base width."""
    return build_table(
        lambda width: MMDiT(small_config(width, adaln), CHANNELS, TEXT_WIDTH),
        BASE_WIDTH,
        round(m * BASE_WIDTH),
        HEAD_DIM,
        MMDiT.declarations(small_config(BASE_WIDTH, adaln)),
        settings or Settings(),
    )


def small_model(m: float, table: MuTable, dtype: torch.dtype = torch.float64, seed: int = 0) -> MMDiT:
    """The small model with the table's multipliers and init."""
    model = MMDiT(small_config(round(m * BASE_WIDTH)), CHANNELS, TEXT_WIDTH).to(dtype)
    apply_multipliers(model, table)
    init_parameters(model, table, seed)
    return model


@torch.no_grad()
def randomise_final(model: MMDiT) -> None:
    """A zero final weight would leave every other tensor without gradient at the first step."""
    model.final.weight.normal_(0.0, BASE_WIDTH**-0.5, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    """Mean squared error on a batch that depends on the step alone; one of the texts is padded."""
    generator = torch.Generator().manual_seed(1000 + step)
    dtype = next(model.parameters()).dtype

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, target, states = draw(4, CHANNELS, 8, 8), draw(4, CHANNELS, 8, 8), draw(4, 5, TEXT_WIDTH)
    t = torch.rand(4, generator=generator)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0, 3:] = False
    prediction, _ = model(x, t, TextCondition(states, mask))
    return F.mse_loss(prediction, target)


def adamw(model: nn.Module, table: MuTable, weight_decay: float, eps: float, lr: float = LR) -> torch.optim.AdamW:
    """torch's AdamW on the table's groups."""
    return torch.optim.AdamW(param_groups(model.named_parameters(), table, lr, weight_decay, eps), betas=(0.9, 0.95))


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def wrong_updates(table: MuTable, m: float) -> list[str]:
    """T4: parameters whose first Adam step (lr x sign of g) is not lr x the expected factor."""
    model = small_model(m, table)
    randomise_final(model)
    before = values(model)
    optimizer = adamw(model, table, weight_decay=0.0, eps=1e-16)
    loss_of(model).backward()
    optimizer.step()
    wrong = []
    for name, p in model.named_parameters():
        assert p.grad is not None
        moved = (p.detach() - before[name]).abs()[p.grad != 0]
        expected = LR * SCALES[m][SNAPSHOT[name].role].lr
        # No gradient at all is a fault of this check's set-up, and named too.
        if moved.numel() == 0 or abs(moved.median().item() / expected - 1) > 2e-3:
            wrong.append(name)
    return wrong


def decay_shares(table: MuTable, m: float) -> dict[str, float]:
    """T5: share of lr x weight decay by which a step with zero gradients shrinks each parameter."""
    model = small_model(m, table)
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.data.uniform_(0.5, 1.5, generator=generator)
        p.grad = torch.zeros_like(p)
    before = values(model)
    adamw(model, table, WEIGHT_DECAY, eps=1e-12).step()
    shrunk = {name: 1 - p.detach() / before[name] for name, p in model.named_parameters()}
    for name, share in shrunk.items():
        assert share.max() - share.min() < 1e-9, f"{name} does not decay evenly"
    return {name: share.mean().item() / (LR * WEIGHT_DECAY) for name, share in shrunk.items()}


def wrong_decays(table: MuTable, m: float, hidden_share: float = 1.0) -> list[str]:
    """T5: parameters whose lr x weight decay is not the expected share of the base one."""
    shares = {"hidden": hidden_share, "input": 1.0, "output": 1.0, "vector": 0.0, "fixed": 0.0}
    found = decay_shares(table, m)
    return [name for name, share in found.items() if abs(share - shares[SNAPSHOT[name].role]) > 1e-3]


def wrong_init(table: MuTable, m: float) -> list[str]:
    """T6: parameters whose values are over 4 standard errors off the expected mean or std."""
    wrong = []
    for name, p in small_model(m, table, torch.float32).named_parameters():
        base_std, x = expected_std(name, "fan_in"), p.detach().double()
        if base_std is None or base_std == 0.0:
            good = bool((x == (1.0 if base_std is None else 0.0)).all())
        else:
            std, n = base_std * SCALES[m][SNAPSHOT[name].role].init, x.numel()
            good = abs(x.std().item() / std - 1) < 4 / (2 * n) ** 0.5
            good = good and abs(x.mean().item()) < 4 * std / n**0.5
        if not good:
            wrong.append(name)
    return wrong


def wrong_multipliers(table: MuTable, m: float) -> list[str]:
    """Weights of linear layers whose output is not multiplier x W x + b with the expected multiplier."""
    model = small_model(m, table)
    randomise_final(model)
    generator = torch.Generator().manual_seed(3)
    wrong = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(generator=generator)
            module.bias.data.normal_(generator=generator)
            x = torch.randn(2, module.in_features, dtype=torch.float64, generator=generator)
            multiplier = SCALES[m][SNAPSHOT[f"{path}.weight"].role].multiplier
            expected = F.linear(x, module.weight * multiplier, module.bias)  # the bias is never multiplied
            if not torch.allclose(module(x), expected, rtol=1e-9, atol=1e-9):
                wrong.append(f"{path}.weight")
    return wrong


def wrong_eps(table: MuTable, m: float) -> list[str]:
    """Parameters whose epsilon is not that of eps_rule "width", seen from a step which it dominates."""
    model = small_model(m, table)
    randomise_final(model)
    before = values(model)
    eps = 1e6  # far above every gradient: the step is lr x g / eps
    optimizer = adamw(model, table, weight_decay=0.0, eps=eps, lr=1e6)
    loss_of(model).backward()
    optimizer.step()
    wrong = []
    for name, p in model.named_parameters():
        assert p.grad is not None
        moved = (p.detach() - before[name]).norm().item()
        expected = table.rows[name].lr * p.grad.norm().item() / SCALES[m][SNAPSHOT[name].role].eps_width
        if expected == 0.0 or abs(moved / expected - 1) > 1e-3:
            wrong.append(name)
    return wrong


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, clip: float | None = None,
    clip_weights: Mapping[str, float] | None = None,
) -> list[float]:  # fmt: skip
    """Losses of `steps` steps; with `clip`, by the global norm of gradients times their `clip_weights`."""
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        losses.append(loss.item())
        if clip is not None:
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            weights = clip_weights or {}
            norm = torch.stack([g.norm() * weights.get(name, 1.0) for name, g in grads.items()]).norm()
            for g in grads.values():
                g.mul_(torch.clamp(clip / norm, max=1.0))
        optimizer.step()
    return losses


def largest_difference(a: nn.Module, b: nn.Module, scale: Mapping[str, float] | None = None) -> float:
    """Largest difference of two models' parameters by name, those of b times `scale`."""
    theirs = values(b)
    assert theirs.keys() == values(a).keys()
    return max((p - theirs[name] * (scale or {}).get(name, 1.0)).abs().max().item() for name, p in values(a).items())
