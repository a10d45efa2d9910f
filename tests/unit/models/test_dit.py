"""DiT against diffusers' DiTTransformer2DModel with copied weights; labels, variance, gradients, FLOPs, counts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from models.backbone import declarations, out_channels
from models.configs import DiTConfig
from models.dit import DiT
from models.layers import ClassCondition, time_sinusoids
from tests.helpers.backbones import (
    CHANNELS,
    check_bfloat16,
    check_features,
    check_flops,
    check_gradients,
    count,
    image,
    labels,
    random_model,
    relative,
)

CONFIG = DiTConfig(width=32, depth=3, head_dim=16, num_classes=10, time_freq_shift=1.0)


def official_names(model: DiT) -> dict[str, Tensor]:
    """Our parameters under diffusers' names; every one of ours is used. Its key biases are zero."""
    ours = {name: p.detach() for name, p in model.named_parameters()}
    d, patch = model.config.width, model.config.patch_size
    theirs: dict[str, Tensor] = {}

    def move(name: str, new: str) -> None:
        for leaf in ("weight", "bias"):
            theirs[f"{new}.{leaf}"] = ours.pop(f"{name}.{leaf}")

    theirs["pos_embed.proj.weight"] = ours.pop("patch_embed.weight").unflatten(1, (CHANNELS, patch, patch))
    theirs["pos_embed.proj.bias"] = ours.pop("patch_embed.bias")
    move("final_modulation", "proj_out_1")
    move("final", "proj_out_2")
    table = ours.pop("label_embed.weight")
    time = {name: ours.pop(f"time_embed.{name}") for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
    for i in range(model.config.depth):
        block, to = f"blocks.{i}", f"transformer_blocks.{i}"
        theirs[f"{to}.norm1.emb.class_embedder.embedding_table.weight"] = table
        for name, value in time.items():
            layer = {"fc1": "linear_1", "fc2": "linear_2"}[name[:3]]
            theirs[f"{to}.norm1.emb.timestep_embedder.{layer}{name[3:]}"] = value
        move(f"{block}.modulation", f"{to}.norm1.linear")
        weights = ours.pop(f"{block}.attention.qkv.weight").chunk(3)
        q_bias, v_bias = (ours.pop(f"{block}.attention.qkv.{part}_bias") for part in "qv")
        for part, weight, bias in zip("qkv", weights, (q_bias, torch.zeros(d), v_bias), strict=True):
            theirs |= {f"{to}.attn1.to_{part}.weight": weight, f"{to}.attn1.to_{part}.bias": bias}
        move(f"{block}.attention.out", f"{to}.attn1.to_out.0")
        move(f"{block}.mlp.fc1", f"{to}.ff.net.0.proj")
        move(f"{block}.mlp.fc2", f"{to}.ff.net.2")
    assert not ours, f"not mapped: {sorted(ours)}"
    return theirs


def twin_of(model: DiT, size: int) -> DiTTransformer2DModel:
    c = model.config
    twin = DiTTransformer2DModel(
        num_attention_heads=c.width // c.head_dim,
        attention_head_dim=c.head_dim,
        in_channels=CHANNELS,
        out_channels=out_channels(c, CHANNELS),
        num_layers=c.depth,
        sample_size=size,
        patch_size=c.patch_size,
        num_embeds_ada_norm=c.num_classes,
        norm_eps=1e-6,
    )
    twin.load_state_dict(official_names(model))
    return twin.eval()


@torch.no_grad()
def difference(
    size: int, config: DiTConfig, dtype: torch.dtype, change: Callable[[DiT], None] = lambda model: None
) -> float:
    """Largest relative difference of the two predictions; `change` is made to ours alone."""
    model = random_model(config, dtype)
    twin = nn.Module.to(twin_of(model, size), dtype)
    change(model)
    x, t = image(size, size)
    condition = labels(2, config.num_classes)
    prediction, _ = model(x.to(dtype), t, condition)
    reference = twin(x.to(dtype), timestep=1000 * t, class_labels=condition.labels, return_dict=False)[0]
    return relative(prediction, reference)


# In float64 what is left is the float32 of both position tables and sinusoids.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 2e-7)])
@pytest.mark.parametrize("size", [8, 20])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_equals_dit_of_diffusers(size: int, learn_sigma: bool, dtype: torch.dtype, tolerance: float) -> None:
    assert difference(size, replace(CONFIG, learn_sigma=learn_sigma), dtype) <= tolerance


def exact_gelu(model: DiT) -> None:
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "none"


def swapped_final_modulation(model: DiT) -> None:
    for p in model.final_modulation.parameters():
        p.copy_(p.roll(CONFIG.width, 0))


def published_frequencies(model: DiT) -> None:
    model.config = replace(model.config, time_freq_shift=0.0)


@pytest.mark.parametrize("change", [exact_gelu, swapped_final_modulation, published_frequencies])
def test_the_comparison_sees_faults(change: Callable[[DiT], None]) -> None:
    assert difference(8, CONFIG, torch.float64, change) > 1e-6


def test_t_is_the_step_over_1000() -> None:
    """In float32 1000 (n / 1000) is n to 6e-5, so its sinusoids are those of the integer step."""
    n = torch.arange(1000)
    angles = 1000.0 * (n.float() / 1000)
    assert (angles - n).abs().max() <= 2**-14
    frequency = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    exact = n[:, None] * frequency
    reference = torch.cat([exact.cos(), exact.sin()], dim=1)
    assert (time_sinusoids(n.float() / 1000) - reference).abs().max() < 2e-4  # of it 1e-4: frequencies in float32


@torch.no_grad()
def test_positions_are_those_of_the_given_grid() -> None:
    """A token's position is its row and column, whatever the size and form of the image."""
    model = random_model(CONFIG)
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for height, width in ((8, 8), (12, 4)):
        x, t = image(height, width)
        model(torch.zeros_like(x), t, labels(2, 10))
    square, tall = seen[0].unflatten(1, (4, 4)), seen[1].unflatten(1, (6, 2))
    torch.testing.assert_close(square[:, :, :2], tall[:, :4])
    assert not torch.allclose(square[:, 0, 1], square[:, 1, 0])


@torch.no_grad()
def test_labels_and_the_null_label_count() -> None:
    model = random_model(CONFIG)
    x, t = image(batch=1)
    predictions = [model(x, t, ClassCondition(torch.tensor([label])))[0] for label in (0, 9, 10)]
    assert relative(predictions[0], predictions[1]) > 1e-2
    assert relative(predictions[1], predictions[2]) > 1e-2
    with pytest.raises(IndexError):
        model(x, t, ClassCondition(torch.tensor([11])))


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_output_channels(learn_sigma: bool) -> None:
    config = replace(CONFIG, learn_sigma=learn_sigma)
    x, t = image(8, 12)
    prediction, _ = random_model(config)(x, t, labels(2, 10))
    assert prediction.shape == (2, out_channels(config, CHANNELS), 8, 12) == (2, 8 if learn_sigma else 4, 8, 12)
    assert config.condition == "label"


@pytest.mark.parametrize("adaln", ["zero", "fan_in"])
def test_every_parameter_gets_a_gradient(adaln: Any) -> None:
    check_gradients(replace(CONFIG, depth=2, adaln_init=adaln), {"final.weight", "final.bias"})


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12)])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_flops(height: int, width: int, learn_sigma: bool) -> None:
    check_flops(replace(CONFIG, mlp_ratio=3, learn_sigma=learn_sigma), height, width, 7)


def test_features() -> None:
    check_features(CONFIG)


def test_bfloat16() -> None:
    check_bfloat16(CONFIG)


@pytest.mark.parametrize(
    ("width", "paper", "official"),
    [(144, 10.8e6, 10_799_168), (288, 42.6e6, 42_624_608), (576, 169e6, 169_354_400), (1152, 675e6, 675_129_632)],
)
def test_parameter_counts(width: int, paper: float, official: int) -> None:
    """675,129,632 is what the official code prints for XL/2; it counts the frozen table of 256 positions, and key
    biases, which we have not."""
    ours = count(DiTConfig(width=width))
    assert ours + 28 * width + 256 * width == official
    assert ours == pytest.approx(paper, rel=5e-3)


def test_recipes() -> None:
    """The paper's muP recipe and the original's, which its SP baseline has."""

    def inits(config: DiTConfig) -> dict[str, tuple[str, float]]:
        return {d.pattern: (d.init, d.std) for d in declarations(config)}

    mup = inits(DiTConfig())
    assert mup["*.weight"] == mup["*modulation.weight"] == ("fan_in", 1.0)
    assert mup["label_embed.weight"] == ("normal", 1.0)
    stock = inits(DiTConfig(adaln_init="zero", linear_init="xavier_uniform", label_init_std=0.02))
    assert stock["*.weight"] == ("xavier_uniform", 1.0)
    assert stock["*modulation.weight"][0] == "zeros"
    assert stock["label_embed.weight"] == stock["time_embed.*.weight"] == ("normal", 0.02)


def test_shard_units_are_the_blocks() -> None:
    model = random_model(CONFIG)
    assert model.shard_units() == list(model.blocks)
