"""Checks that every backbone must pass, whatever it computes; and inputs, weights and tables for their tests."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.backbone import build_model, declarations, out_channels
from models.flops import forward_flops
from models.layers import ClassCondition, TextCondition
from models.model_config import ModelConfig
from trainer.mup.apply import build_table, init_parameters
from trainer.mup.rules import Settings

CHANNELS, TEXT_WIDTH = 4, 24


def random_weights(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """No weight is zero or one, so that none can be swapped, dropped or misplaced unseen."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        gain = "norm" in name and name.endswith("weight")
        std = p.shape[-1] ** -0.5 if p.ndim == 2 else 0.3
        p.data.normal_(float(gain), std, generator=generator)
    model.to(dtype)


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The backbone with random weights; Any, because a test knows which class it is."""
    model = build_model(config, CHANNELS, TEXT_WIDTH)
    random_weights(model, dtype)
    return model


def text(batch: int = 2, length: int = 7) -> TextCondition:
    """Text without padding."""
    states = torch.randn(batch, length, TEXT_WIDTH, generator=torch.Generator().manual_seed(2))
    return TextCondition(states, torch.ones(batch, length, dtype=torch.bool))


def labels(batch: int, classes: int) -> ClassCondition:
    """Different labels, the null label among them."""
    return ClassCondition(torch.arange(classes, classes - batch, -1))


def condition_of(config: ModelConfig, batch: int = 2, length: int = 7) -> Any:
    return text(batch, length) if config.condition == "text" else labels(batch, config.num_classes)


def image(height: int = 8, width: int = 8, batch: int = 2) -> tuple[Tensor, Tensor]:
    """x [B, C, h, w] and t [B]; the t are steps of 1000."""
    x = torch.randn(batch, CHANNELS, height, width, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(30, 970, batch).round() / 1000


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of b."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def check_gradients(config: ModelConfig, first: set[str]) -> None:
    """No parameter is dead: each gets a gradient within four steps from its own init, at the first step `first` alone
    (what stands behind the zero weight of the final layer)."""

    def factory(width: int) -> nn.Module:
        return build_model(replace(config, width=width), CHANNELS, TEXT_WIDTH)

    table = build_table(factory, config.width, config.width, config.width, declarations(config), Settings())
    model = factory(config.width)
    init_parameters(model, table, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-12)
    without = {name for name, _ in model.named_parameters()}
    x, t = image(batch=4)
    target = torch.randn(4, out_channels(config, CHANNELS), 8, 8, generator=torch.Generator().manual_seed(3))
    for step in range(4):
        optimizer.zero_grad()
        F.mse_loss(model(x, t, condition_of(config, 4))[0], target).backward()
        without -= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        if step == 0:
            assert table.rows.keys() - without == first
        optimizer.step()
    assert not without


def check_flops(config: ModelConfig, height: int, width: int, length: int) -> None:
    """Ours is a forward pass of one image, the counter's of two."""
    x, t = image(height, width)
    condition = condition_of(config, length=length)
    with torch.device("meta"):
        model = build_model(config, CHANNELS, TEXT_WIDTH)
    meta = type(condition)(*(part.to("meta") for part in condition))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x.to("meta"), t.to("meta"), meta)
    tokens = height * width // config.patch_size**2
    assert 2 * forward_flops(config, CHANNELS, TEXT_WIDTH, tokens, length) == counter.get_total_flops()


@torch.no_grad()
def check_features(config: ModelConfig, first: int = -16) -> None:
    """features_at gives the 16 image tokens after that block, which begin at `first`, and changes nothing else."""
    model = random_model(config)
    x, t = image()
    condition = condition_of(config)
    plain, none = model(x, t, condition)
    assert none is None
    for number, unit in enumerate(model.shard_units()):
        seen: list[Tensor] = []
        handle = unit.register_forward_hook(lambda _, args, output, seen=seen: seen.append(output))
        prediction, features = model(x, t, condition, features_at=number)
        handle.remove()
        assert features.shape == (2, 16, config.width)
        assert torch.equal(features, seen[0][:, first:][:, :16])
        assert torch.equal(prediction, plain)


def check_bfloat16(config: ModelConfig) -> None:
    """In bfloat16 the prediction is bfloat16 and near that of float32: only finished sinusoids are rounded."""
    x, t = image()
    condition = condition_of(config)
    with torch.no_grad():
        exact = random_model(config)(x, t, condition)[0]
        rounded = random_model(config, torch.bfloat16)(x.bfloat16(), t, condition)[0]
        coarse = random_model(config)(x, t.bfloat16().float(), condition)[0]
    assert rounded.dtype == torch.bfloat16
    # A rounded t is another time: were t cast, the difference would be of that size.
    assert relative(rounded.float(), exact) < 0.03 < relative(coarse, exact)


def count(config: ModelConfig, in_channels: int = 4, text_width: int = 4096) -> int:
    """Number of parameters."""
    with torch.device("meta"):
        model = build_model(config, in_channels, text_width)
    return sum(p.numel() for p in model.parameters())
