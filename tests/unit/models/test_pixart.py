"""PixArt-alpha against diffusers' PixArtTransformer2DModel with copied weights; masks, sizes, gradients, FLOPs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

import models.pixart
from models.backbone import out_channels
from models.configs import PixArtConfig
from models.layers import SizedTextCondition, TextCondition
from models.pixart import PixArt
from tests.helpers.backbones import (
    CHANNELS,
    TEXT_WIDTH,
    check_bfloat16,
    check_features,
    check_flops,
    check_gradients,
    count,
    image,
    random_model,
    relative,
    text,
)

CONFIG = PixArtConfig(width=48, depth=3, head_dim=16, pos_embed_base_size=4)
MICRO = replace(CONFIG, micro_conditions=True)


def official_names(model: PixArt) -> dict[str, Tensor]:
    """Our parameters under diffusers' names; every one of ours is used. Its key biases are zero."""
    ours = {name: p.detach() for name, p in model.named_parameters()}
    d, patch = model.config.width, model.config.patch_size
    theirs: dict[str, Tensor] = {}

    def move(name: str, new: str) -> None:
        for leaf in ("weight", "bias"):
            theirs[f"{new}.{leaf}"] = ours.pop(f"{name}.{leaf}")

    def move_fused(name: str, parts: str, to: str) -> None:
        weights = ours.pop(f"{name}.weight").chunk(len(parts))
        for part, weight in zip(parts, weights, strict=True):
            bias = torch.zeros(d) if part == "k" else ours.pop(f"{name}.{part}_bias")
            theirs.update({f"{to}.to_{part}.weight": weight, f"{to}.to_{part}.bias": bias})

    theirs["pos_embed.proj.weight"] = ours.pop("patch_embed.weight").unflatten(1, (CHANNELS, patch, patch))
    theirs["pos_embed.proj.bias"] = ours.pop("patch_embed.bias")
    embedders = {"time_embed": "timestep_embedder"}
    if model.config.micro_conditions:
        embedders |= {"size_embed": "resolution_embedder", "aspect_embed": "aspect_ratio_embedder"}
    for name, new in embedders.items():
        move(f"{name}.fc1", f"adaln_single.emb.{new}.linear_1")
        move(f"{name}.fc2", f"adaln_single.emb.{new}.linear_2")
    move("time_modulation", "adaln_single.linear")
    move("text_embed.fc1", "caption_projection.linear_1")
    move("text_embed.fc2", "caption_projection.linear_2")
    theirs["scale_shift_table"] = ours.pop("scale_shift_table")
    move("final", "proj_out")
    for i in range(model.config.depth):
        block, to = f"blocks.{i}", f"transformer_blocks.{i}"
        theirs[f"{to}.scale_shift_table"] = ours.pop(f"{block}.scale_shift_table")
        move_fused(f"{block}.attention.qkv", "qkv", f"{to}.attn1")
        move(f"{block}.attention.out", f"{to}.attn1.to_out.0")
        move(f"{block}.cross_attention.q", f"{to}.attn2.to_q")
        move_fused(f"{block}.cross_attention.kv", "kv", f"{to}.attn2")
        move(f"{block}.cross_attention.out", f"{to}.attn2.to_out.0")
        move(f"{block}.mlp.fc1", f"{to}.ff.net.0.proj")
        move(f"{block}.mlp.fc2", f"{to}.ff.net.2")
    assert not ours, f"not mapped: {sorted(ours)}"
    return theirs


def twin_of(model: PixArt) -> PixArtTransformer2DModel:
    c = model.config
    twin = PixArtTransformer2DModel(
        num_attention_heads=c.width // c.head_dim,
        attention_head_dim=c.head_dim,
        in_channels=CHANNELS,
        out_channels=out_channels(c, CHANNELS),
        num_layers=c.depth,
        cross_attention_dim=c.width,
        sample_size=c.pos_embed_base_size * c.patch_size,
        patch_size=c.patch_size,
        interpolation_scale=c.pos_embed_interpolation,  # type: ignore[arg-type]
        use_additional_conditions=c.micro_conditions,
        caption_channels=TEXT_WIDTH,
    )
    twin.load_state_dict(official_names(model))
    return twin.eval()


def padded_text() -> TextCondition:
    """Two texts of different length."""
    states, mask = text()
    mask = mask.clone()
    mask[0, 3:] = False
    return TextCondition(states, mask)


@torch.no_grad()
def difference(
    size: tuple[int, int],
    config: PixArtConfig,
    dtype: torch.dtype,
    change: Callable[[PixArt], None] = lambda model: None,
) -> float:
    """Largest relative difference of the two predictions; `change` is made to ours alone."""
    model = random_model(config, dtype)
    twin = nn.Module.to(twin_of(model), dtype)
    change(model)
    x, t = image(*size)
    states, mask = padded_text()
    resolution = torch.tensor([[64.0, 96.0], [1500.0, 2250.0]])
    aspect = torch.full((2, 1), size[0] / size[1])
    condition = SizedTextCondition(states.to(dtype), mask, resolution)
    prediction, _ = model(x.to(dtype), t, condition if config.micro_conditions else TextCondition(*condition[:2]))
    reference = twin(
        x.to(dtype),
        encoder_hidden_states=states.to(dtype),
        timestep=1000 * t,
        added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect},
        encoder_attention_mask=mask.to(dtype),
        return_dict=False,
    )[0]
    return relative(prediction, reference)


# In float64 what is left is the float32 of both position tables and sinusoids.
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 2e-7)])
@pytest.mark.parametrize("size", [(8, 8), (12, 8), (6, 20)])
@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, learn_sigma=False), MICRO, replace(CONFIG, pos_embed_interpolation=2.0)],
    ids=["alpha", "no sigma", "micro", "interpolation"],
)
def test_equals_pixart_of_diffusers(
    config: PixArtConfig, size: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    assert difference(size, config, dtype) <= tolerance


def no_interpolation(model: PixArt) -> None:
    model.config = replace(model.config, pos_embed_base_size=8)


def shifted_frequencies(model: PixArt) -> None:
    model.config = replace(model.config, time_freq_shift=1.0)


def swapped_final_table(model: PixArt) -> None:
    model.scale_shift_table.copy_(model.scale_shift_table.flip(0))


@pytest.mark.parametrize("change", [no_interpolation, shifted_frequencies, swapped_final_table])
def test_the_comparison_sees_faults(change: Callable[[PixArt], None]) -> None:
    assert difference((8, 8), MICRO, torch.float64, change) > 1e-6


@torch.no_grad()
def test_padding_has_no_effect() -> None:
    model = random_model(CONFIG, torch.float64)
    x, t = image()
    states, mask = text(length=6)
    x, states = x.double(), states.double()
    prediction, _ = model(x, t, TextCondition(states, mask))
    longer = TextCondition(F.pad(states, (0, 0, 0, 5), value=3.0), F.pad(mask, (0, 5)))
    assert relative(model(x, t, longer)[0], prediction) <= 1e-12
    # The same content does change the prediction where the mask lets it through.
    assert relative(model(x, t, longer._replace(mask=torch.ones(2, 11, dtype=torch.bool)))[0], prediction) > 1e-2


@torch.no_grad()
def test_each_sample_has_its_own_length() -> None:
    model = random_model(CONFIG, torch.float64)
    x, t = image()
    states, mask = padded_text()
    x, states = x.double(), states.double()
    together, _ = model(x, t, TextCondition(states, mask))
    alone, _ = model(x[:1], t[:1], TextCondition(states[:1, :3], mask[:1, :3]))
    assert relative(together[:1], alone) <= 1e-12


def test_a_text_without_tokens_gives_numbers() -> None:
    """A hole's NaN would survive its weight of 0, and reach the gradient."""
    model = random_model(CONFIG)
    x, t = image()
    states, mask = text()
    mask = mask.clone()
    mask[0] = False
    prediction, _ = model(x, t, TextCondition(states, mask))
    (prediction[1] ** 2).sum().backward()
    assert prediction.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_sizes_without_a_condition_are_those_of_the_image() -> None:
    model = random_model(MICRO)
    x, t = image(8, 12)
    states, mask = text()
    own, _ = model(x, t, TextCondition(states, mask))
    given, _ = model(x, t, SizedTextCondition(states, mask, torch.tensor([[64, 96], [64, 96]])))
    assert torch.equal(own, given)
    other, _ = model(x, t, SizedTextCondition(states, mask, torch.tensor([[1500, 2250], [64, 96]])))
    assert relative(other[:1], own[:1]) > 1e-3
    assert torch.equal(other[1], own[1])


def test_micro_conditions_need_a_width_in_three_parts() -> None:
    with pytest.raises(ValueError, match=r"model\.width 64 must be a multiple of 3 with model\.micro_conditions"):
        PixArtConfig(width=64, head_dim=16, micro_conditions=True)
    PixArtConfig(width=64, head_dim=16)


def test_text_condition_and_sinusoids_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    check_bfloat16(CONFIG)
    seen: list[Tensor] = []
    plain = models.pixart.sinusoids
    monkeypatch.setattr(models.pixart, "sinusoids", lambda x: seen.append(plain(x)) or seen[-1])
    x, t = image()
    random_model(MICRO, torch.bfloat16)(x.bfloat16(), t, text())
    assert [s.dtype for s in seen] == [torch.float32, torch.float32]
    assert CONFIG.condition == "text"


@pytest.mark.parametrize("config", [CONFIG, MICRO], ids=["alpha", "micro"])
def test_every_parameter_gets_a_gradient(config: PixArtConfig) -> None:
    check_gradients(replace(config, depth=2), {"final.weight", "final.bias"})


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "length"), [(8, 8, 7), (8, 12, 3)])
@pytest.mark.parametrize("config", [CONFIG, MICRO, replace(CONFIG, learn_sigma=False, mlp_ratio=3)])
def test_flops(config: PixArtConfig, height: int, width: int, length: int) -> None:
    check_flops(config, height, width, length)


def test_features() -> None:
    check_features(CONFIG)


@pytest.mark.parametrize(("width", "paper", "official"), [(288, 39.2e6, 39_246_656), (1152, 611e6, 610_856_096)])
def test_parameter_counts(width: int, paper: float, official: int) -> None:
    """Of the official model we have all but the key biases of both attentions, which are zero without them. Its null
    caption (120 x 4096) is a buffer there; here an empty caption is encoded."""
    ours = count(PixArtConfig(width=width))
    assert ours + 2 * 28 * width == official
    assert ours == pytest.approx(paper, rel=1e-3)
    micro = 2 * (256 + width // 3 + 2) * (width // 3)
    assert count(PixArtConfig(width=width, micro_conditions=True)) == ours + micro


def test_shard_units_are_the_blocks() -> None:
    model = random_model(CONFIG)
    assert model.shard_units() == list(model.blocks)
