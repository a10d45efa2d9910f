"""U-ViT against a second computation from its parameters; masks, sizes, gradients, FLOPs, counts."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.configs import UViTConfig
from models.layers import ClassCondition, TextCondition
from models.uvit import UViT
from tests.helpers.backbones import (
    check_bfloat16,
    check_features,
    check_flops,
    check_gradients,
    condition_of,
    count,
    image,
    labels,
    random_model,
    relative,
    text,
)

LABEL = UViTConfig(width=32, depth=4, head_dim=16, input_size=4, num_classes=10)
TEXT = replace(LABEL, condition="text", text_length=9)
OPTIONS = {"final_conv": True, "time_mlp": True, "qkv_bias": True}
CONFIGS = [LABEL, TEXT, replace(LABEL, **OPTIONS), replace(TEXT, **OPTIONS)]
IDS = ["label", "text", "label, options", "text, options"]


def recomputed(p: dict[str, Tensor], c: UViTConfig, x: Tensor, t: Tensor, condition: Any) -> Tensor:
    """The published forward pass from the parameters alone, a sample and a head at a time, without a mask: padded
    text is left out."""
    half, patch, d = c.depth // 2, c.patch_size, c.width

    def linear(name: str, v: Tensor) -> Tensor:
        out = v @ p[f"{name}.weight"].T
        return out + p[f"{name}.bias"] if f"{name}.bias" in p else out

    def norm(name: str, v: Tensor) -> Tensor:
        centred = v - v.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def attend(name: str, v: Tensor) -> Tensor:
        q, k, value = (v @ w.T for w in p[f"{name}.qkv.weight"].split(d))
        if c.qkv_bias:
            q, value = q + p[f"{name}.qkv.q_bias"], value + p[f"{name}.qkv.v_bias"]
        heads = []
        for first in range(0, d, c.head_dim):
            one = slice(first, first + c.head_dim)
            scores = q[:, one] @ k[:, one].T / math.sqrt(c.head_dim)
            heads.append(scores.softmax(-1) @ value[:, one])
        return linear(f"{name}.out", torch.cat(heads, dim=-1))

    def block(name: str, v: Tensor) -> Tensor:
        v = v + attend(f"{name}.attention", norm(f"{name}.norm_attention", v))
        hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm_mlp", v))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # exact GELU
        return v + linear(f"{name}.mlp.fc2", hidden)

    predictions = []
    for b in range(x.shape[0]):
        kernel = p["patch_embed.weight"].unflatten(1, (-1, patch, patch))
        patches = F.conv2d(x[b : b + 1], kernel, p["patch_embed.bias"], stride=patch)[0].flatten(1).T
        frequency = 10000.0 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2))
        angle = (1000 * t[b].double()).round() * frequency
        time = torch.cat([angle.cos(), angle.sin()]).to(x.dtype)
        if c.time_mlp:
            hidden = linear("time_embed.fc1", time)
            time = linear("time_embed.fc2", hidden * torch.sigmoid(hidden))
        if c.condition == "label":
            given, room = p["label_embed.weight"][condition.labels[b]][None], 1
        else:
            given, room = linear("text_embed", condition.states[b][condition.mask[b]].to(x.dtype)), c.text_length
        rows = [0, *range(1, 1 + len(given)), *range(1 + room, 1 + room + len(patches))]
        v = torch.cat([time[None], given, patches]) + p["pos_embed"][rows]
        kept = []
        for i in range(half):
            v = block(f"in_blocks.{i}", v)
            kept.append(v)
        v = block("mid_block", v)
        for i in range(half):
            v = linear(f"out_blocks.{i}.skip", torch.cat([v, kept[half - 1 - i]], dim=-1))
            v = block(f"out_blocks.{i}", v)
        v = norm("norm", v)[1 + len(given) :]
        v = linear("final", v)  # [N, P P C]
        side, channels = c.input_size, x.shape[1]
        out = torch.zeros(channels, side * patch, side * patch, dtype=x.dtype)
        for n in range(side * side):
            top, left = n // side * patch, n % side * patch
            out[:, top : top + patch, left : left + patch] = v[n].reshape(patch, patch, channels).permute(2, 0, 1)
        if c.final_conv:
            out = F.conv2d(out[None], p["final_conv.weight"], p["final_conv.bias"], padding=1)[0]
        predictions.append(out)
    return torch.stack(predictions)


def given(config: UViTConfig) -> ClassCondition | TextCondition:
    """Labels, or two texts of different length."""
    if config.condition == "label":
        return labels(2, config.num_classes)
    states, mask = text()
    mask = mask.clone()
    mask[0, 3:] = False
    return TextCondition(states, mask)


@torch.no_grad()
def difference(config: UViTConfig, dtype: torch.dtype, change: Callable[[UViT], None] = lambda model: None) -> float:
    """Largest relative difference of the two computations; `change` is made to the model alone."""
    model = random_model(config, dtype)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    change(model)
    x, t = image()
    prediction, _ = model(x.to(dtype), t, given(config))
    return relative(prediction, recomputed(parameters, config, x.to(dtype), t, given(config)))


# In float64 what is left is the float32 of the time's sinusoids.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-5)])
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_equals_the_second_computation(config: UViTConfig, dtype: torch.dtype, tolerance: float) -> None:
    assert difference(config, dtype) <= tolerance


def norm_eps(model: UViT) -> None:
    model.norm.eps = 1e-3


def skips_in_order(model: UViT) -> None:
    weights = [block.skip.weight for block in model.out_blocks]  # type: ignore[union-attr]
    a, b = (w.clone() for w in weights)  # type: ignore[operator]
    weights[0].copy_(b)  # type: ignore[operator]
    weights[1].copy_(a)  # type: ignore[operator]


def shifted_positions(model: UViT) -> None:
    model.pos_embed.copy_(model.pos_embed.roll(1, 0))


@pytest.mark.parametrize("change", [norm_eps, skips_in_order, shifted_positions])
def test_the_comparison_sees_faults(change: Callable[[UViT], None]) -> None:
    assert difference(LABEL, torch.float64, change) > 1e-4


@torch.no_grad()
def test_padding_has_no_effect() -> None:
    model = random_model(TEXT, torch.float64)
    x, t = image()
    states, mask = text(length=6)
    x, states = x.double(), states.double()
    prediction, _ = model(x, t, TextCondition(states, mask))
    longer = TextCondition(F.pad(states, (0, 0, 0, 3), value=3.0), F.pad(mask, (0, 3)))
    assert relative(model(x, t, longer)[0], prediction) <= 1e-12
    assert relative(model(x, t, longer._replace(mask=torch.ones(2, 9, dtype=torch.bool)))[0], prediction) > 1e-2


@torch.no_grad()
def test_labels_and_the_null_label_count() -> None:
    model = random_model(LABEL)
    x, t = image(batch=1)
    predictions = [model(x, t, ClassCondition(torch.tensor([label])))[0] for label in (0, 9, 10)]
    assert relative(predictions[0], predictions[1]) > 1e-2
    assert relative(predictions[1], predictions[2]) > 1e-2


@pytest.mark.parametrize(("height", "width"), [(8, 12), (16, 16), (4, 16)])
def test_larger_images_than_the_learned_positions(height: int, width: int) -> None:
    x, t = image(height, width)
    with pytest.raises(ValueError, match=r"do not fit model\.input_size 4"):
        random_model(LABEL)(x, t, given(LABEL))


def test_too_long_a_text() -> None:
    x, t = image()
    with pytest.raises(ValueError, match=r"10 text tokens do not fit model\.text_length 9"):
        random_model(TEXT)(x, t, text(length=10))


def test_an_odd_depth_has_no_halves() -> None:
    with pytest.raises(ValueError, match=r"model\.depth 3 must be even"):
        UViTConfig(depth=3)


def test_conflicts_are_known_before_a_model_is_built() -> None:
    assert list(TEXT.conflicts(64, 4, 9)) == list(LABEL.conflicts(64, 4, 1000)) == []
    size, length = TEXT.conflicts(128, 8, 10)
    assert size.startswith("data.resolution 128 gives 8 tokens a side")
    assert length == "text_encoder.max_length 10 is more than model.text_length 9"


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_every_parameter_gets_a_gradient(config: UViTConfig) -> None:
    # Behind a zero final weight the convolution sees zeros: of it only the bias learns at once.
    conv = {"final_conv.bias"} if config.final_conv else set()
    check_gradients(replace(config, depth=2, text_length=7), {"final.weight", "final.bias"} | conv)


@pytest.mark.slow
@pytest.mark.parametrize("config", [*CONFIGS, replace(LABEL, mlp_ratio=3, depth=2)])
def test_flops(config: UViTConfig) -> None:
    check_flops(config, 8, 8, 7)


@pytest.mark.parametrize("config", [LABEL, TEXT], ids=["label", "text"])
def test_features(config: UViTConfig) -> None:
    check_features(config, first=0 if config.condition == "text" else -16)


def test_bfloat16() -> None:
    check_bfloat16(LABEL)
    assert [config.condition for config in (LABEL, TEXT)] == ["label", "text"]
    assert condition_of(TEXT).states.shape[1] <= TEXT.text_length


def test_parameter_counts() -> None:
    """U-ViT-H/2 is exactly the published one: it has no qkv biases."""
    ours = count(UViTConfig(width=1152))
    assert ours == 500_832_016
    assert ours == pytest.approx(501e6, rel=1e-3)
    blocks, d = 29, 1152
    options = {"qkv_bias": 2 * blocks * d, "time_mlp": 8 * d * d + 5 * d, "final_conv": 4 * 4 * 9 + 4}
    for name, more in options.items():
        assert count(replace(UViTConfig(width=1152), **{name: True})) == ours + more, name


def test_shard_units_are_the_blocks_in_order() -> None:
    model = random_model(LABEL)
    assert model.shard_units() == [*model.in_blocks, model.mid_block, *model.out_blocks]
