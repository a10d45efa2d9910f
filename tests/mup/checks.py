"""Checkers that name the parameters of a small backbone which do not follow the rules written down here."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import QKVLinear
from trainer.mup.apply import param_groups
from trainer.mup.rules import Optimizer
from trainer.mup.table import BaseRates, MuTable

from .cases import Case

LR = 1e-3
WEIGHT_DECAY = 0.1


class Scale(NamedTuple):
    """init: on the std; decay: rule "independent", where the weight decays; eps_width: under eps_rule "width"."""

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
        "vector": Scale(1.0, 1.0, 1.0, 1.0, 0.25),
        "fixed": Scale(1.0, 1.0, 1.0, 1.0, 1.0),
    },
    2.5: {
        "input": Scale(1.0, 1.0, 1.0, 1.0, 0.4),
        "hidden": Scale(0.6324555320336759, 1.0, 0.4, 2.5, 0.4),
        "output": Scale(1.0, 0.4, 1.0, 1.0, 0.4),
        "vector": Scale(1.0, 1.0, 1.0, 1.0, 0.4),
        "fixed": Scale(1.0, 1.0, 1.0, 1.0, 1.0),
    },
}


def scale_of(case: Case, m: float, name: str) -> Scale:
    """What muP makes of this parameter at m times the base width, decaying matrices only."""
    row = case.snapshot[name]
    scale = SCALES[m][row.role]
    if row.inner:
        scale = scale._replace(init={4.0: 2.0, 2.5: 1.5811388300841898}[m])  # sqrt(m)
    return scale if row.decays else scale._replace(decay=0.0)


def adamw(model: nn.Module, table: MuTable, weight_decay: float, eps: float, lr: float = LR) -> torch.optim.AdamW:
    """torch's AdamW on the table's groups."""
    base: dict[Optimizer, BaseRates] = {"adamw": BaseRates(lr, weight_decay, eps)}
    return torch.optim.AdamW(param_groups(model.named_parameters(), table, base), betas=(0.9, 0.95))


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def wrong_updates(case: Case, table: MuTable, m: float) -> list[str]:
    """T4: parameters whose first Adam step (lr x sign of g) is not lr x the expected factor."""
    model = case.model(m, table)
    case.randomise_zeros(model)
    before = values(model)
    optimizer = adamw(model, table, weight_decay=0.0, eps=1e-16)
    case.loss(model).backward()
    optimizer.step()
    wrong = []
    for name, p in model.named_parameters():
        assert p.grad is not None
        moved = (p.detach() - before[name]).abs()[p.grad != 0]
        expected = LR * scale_of(case, m, name).lr
        # No gradient at all is a fault of this check's set-up, and named too.
        if moved.numel() == 0 or abs(moved.median().item() / expected - 1) > 2e-3:
            wrong.append(name)
    return wrong


def decay_shares(case: Case, table: MuTable, m: float) -> dict[str, float]:
    """T5: share of lr x weight decay by which a step with zero gradients shrinks each parameter."""
    model = case.model(m, table)
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


def wrong_decays(case: Case, table: MuTable, m: float, hidden_share: float = 1.0) -> list[str]:
    """T5: parameters whose lr x weight decay is not the expected share of the base one."""
    found = decay_shares(case, table, m)
    wrong = []
    for name, row in case.snapshot.items():
        expected = (hidden_share if row.role == "hidden" else 1.0) if row.decays else 0.0
        if abs(found[name] - expected) > 1e-3:
            wrong.append(name)
    return wrong


def wrong_init(case: Case, table: MuTable, m: float) -> list[str]:
    """T6: parameters whose values are over 4 standard errors off the expected mean or std, or of another law."""
    wrong = []
    for name, p in case.model(m, table, torch.float32).named_parameters():
        base_std, x = case.std(name), p.detach().double()
        if base_std is None or base_std == 0.0:
            good = bool((x == (1.0 if base_std is None else 0.0)).all())
        else:
            std, n = base_std * scale_of(case, m, name).init, x.numel()
            good = abs(x.std().item() / std - 1) < 4 / (2 * n) ** 0.5
            good = good and abs(x.mean().item()) < 4 * std / n**0.5
            # A uniform distribution ends at sqrt(3) std, and nearly reaches it; a normal one goes on.
            end = x.abs().max().item() / (3**0.5 * std)
            good = good and (0.95 < end <= 1 + 1e-6 if case.snapshot[name].uniform else end > 1.05)
        if not good:
            wrong.append(name)
    return wrong


def wrong_multipliers(case: Case, table: MuTable, m: float) -> list[str]:
    """Weights of linear layers whose output is not multiplier x W x + b with the expected multiplier."""
    model = case.model(m, table)
    generator = torch.Generator().manual_seed(3)
    wrong = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for p in module.parameters(recurse=False):
                p.data.normal_(generator=generator)
            bias = module.bias
            if isinstance(module, QKVLinear) and module.v_bias is not None:
                query = [] if module.q_bias is None else [module.q_bias]
                bias = torch.cat([*query, torch.zeros_like(module.v_bias), module.v_bias])
            x = torch.randn(2, module.in_features, dtype=torch.float64, generator=generator)
            multiplier = scale_of(case, m, f"{path}.weight").multiplier
            expected = F.linear(x, module.weight * multiplier, bias)  # the bias is never multiplied
            if not torch.allclose(module(x), expected, rtol=1e-9, atol=1e-9):
                wrong.append(f"{path}.weight")
    return wrong


def wrong_eps(case: Case, table: MuTable, m: float) -> list[str]:
    """Parameters whose epsilon is not that of eps_rule "width", seen from a step which it dominates."""
    model = case.model(m, table)
    case.randomise_zeros(model)
    before = values(model)
    eps = 1e6  # far above every gradient: the step is lr x g / eps
    optimizer = adamw(model, table, weight_decay=0.0, eps=eps, lr=1e6)
    case.loss(model).backward()
    optimizer.step()
    wrong = []
    for name, p in model.named_parameters():
        assert p.grad is not None
        moved = (p.detach() - before[name]).norm().item()
        expected = table.rows[name].lr * p.grad.norm().item() / scale_of(case, m, name).eps_width
        if expected == 0.0 or abs(moved / expected - 1) > 1e-3:
            wrong.append(name)
    return wrong


def train(
    case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, clip: float | None = None,
    clip_weights: Mapping[str, float] | None = None,
) -> list[float]:  # fmt: skip
    """Losses of `steps` steps; with `clip`, by the global norm of gradients times their `clip_weights`."""
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = case.loss(model, step)
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
