"""MMDiT with options that Stable Diffusion 3 does not have: each against a second computation, and what all must do."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed, FluxTransformer2DModel
from torch import Tensor, nn

import models.mmdit
from models.configs import MMDiTConfig
from models.layers import SwiGLU, TextCondition, grid_places, patchify, rotate, unpatchify
from models.mmdit import MMDiT
from tests.helpers.backbones import (
    CHANNELS,
    TEXT_WIDTH,
    check_bfloat16,
    check_flops,
    check_gradients,
    count,
    image,
    random_model,
    relative,
    text,
)

CONFIG = MMDiTConfig(width=48, depth=3, head_dim=16, pos_embed_max_size=12, pos_embed_base_size=4)
OPTIONS = {
    "no QK-norm": replace(CONFIG, qk_norm=False),
    "swiglu": replace(CONFIG, mlp="swiglu"),
    "rope": replace(CONFIG, positions="rope"),
    "single": replace(CONFIG, single_depth=1),
    "single alone": replace(CONFIG, depth=2, single_depth=2),
    "as FLUX.1": replace(CONFIG, positions="rope", single_depth=2),
    "all": replace(CONFIG, positions="rope", single_depth=1, mlp="swiglu", qk_norm=False),
}
every_option = pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)


@pytest.mark.slow
@every_option
def test_every_parameter_gets_a_gradient(config: MMDiTConfig) -> None:
    check_gradients(config, {"final.weight", "final.bias"})


@pytest.mark.slow
@every_option
@pytest.mark.parametrize(("height", "width", "length"), [(8, 8, 7), (8, 12, 3)])
def test_flops_equal_those_of_the_counter(config: MMDiTConfig, height: int, width: int, length: int) -> None:
    check_flops(config, height, width, length)


@pytest.mark.slow
@every_option
def test_bfloat16(config: MMDiTConfig) -> None:
    check_bfloat16(config)


@every_option
@torch.no_grad()
def test_features_are_the_image_tokens_after_a_block(config: MMDiTConfig) -> None:
    model = random_model(config)
    x, t = image()
    plain, _ = model(x, t, text())
    for number, block in enumerate(model.shard_units()):
        seen: list[Any] = []
        handle = block.register_forward_hook(lambda _, args, output, seen=seen: seen.append(output))
        prediction, features = model(x, t, text(), features_at=number)
        handle.remove()
        tokens = seen[0] if isinstance(seen[0], Tensor) else seen[0][0]
        assert torch.equal(features, tokens[:, :16])
        assert torch.equal(prediction, plain)


@every_option
@torch.no_grad()
def test_padding_has_no_effect(config: MMDiTConfig) -> None:
    model = random_model(config, torch.float64)
    x, t = image()
    states = text(length=7).states.double()
    mask = torch.ones(2, 7, dtype=torch.bool)
    prediction, _ = model(x.double(), t, TextCondition(states, mask))
    padded, longer = F.pad(states, (0, 0, 0, 5), value=3.0), F.pad(mask, (0, 5))
    assert relative(model(x.double(), t, TextCondition(padded, longer))[0], prediction) <= 1e-12
    assert relative(model(x.double(), t, TextCondition(padded, longer | True))[0], prediction) > 1e-3


# ------------------------------------------------------------------------------------------------- FLUX.1 of diffusers
def flux_weights(model: MMDiT) -> dict[str, Tensor]:
    """Our parameters under diffusers' names for FLUX.1; every one of ours is used."""
    ours = {name: p.detach() for name, p in model.named_parameters()}
    theirs: dict[str, Tensor] = {}

    def move(name: str, *new: str) -> None:
        for leaf in ("weight", "bias"):
            rows = ours.pop(f"{name}.{leaf}").chunk(len(new))
            theirs.update({f"{n}.{leaf}": row for n, row in zip(new, rows, strict=True)})

    def move_norms(name: str, new: str) -> None:
        for c in "qk":
            theirs[new.format(c)] = ours.pop(f"{name}.norm_{c}.weight")

    move("patch_embed", "x_embedder")
    for name, new in (("time_embed", "timestep_embedder"), ("pooled_embed", "text_embedder")):
        for n in (1, 2):
            move(f"{name}.fc{n}", f"time_text_embed.{new}.linear_{n}")
    move("text_embed", "context_embedder")
    move("final_modulation", "norm_out.linear")
    move("final", "proj_out")
    doubles = model.config.depth - model.config.single_depth
    for i in range(doubles):
        to = f"transformer_blocks.{i}"
        for stream, norm, qkv, gain, out, mlp in (
            ("image", "norm1", "to_{}", "norm_{}", "to_out.0", "ff"),
            ("text", "norm1_context", "add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
        ):
            name = f"blocks.{i}.{stream}"
            move(f"{name}.modulation", f"{to}.{norm}.linear")
            move(f"{name}.qkv", *(f"{to}.attn.{qkv.format(c)}" for c in "qkv"))
            move_norms(name, f"{to}.attn.{gain}.weight")
            move(f"{name}.out", f"{to}.attn.{out}")
            move(f"{name}.mlp.fc1", f"{to}.{mlp}.net.0.proj")
            move(f"{name}.mlp.fc2", f"{to}.{mlp}.net.2")
    for i in range(model.config.single_depth):
        name, to = f"blocks.{doubles + i}", f"single_transformer_blocks.{i}"
        move(f"{name}.modulation", f"{to}.norm.linear")
        move(f"{name}.qkv", *(f"{to}.attn.to_{c}" for c in "qkv"))
        move_norms(name, f"{to}.attn.norm_{{}}.weight")
        move(f"{name}.mlp.fc1", f"{to}.proj_mlp")
        both = [ours.pop(f"{name}.{layer}.weight") for layer in ("out", "mlp.fc2")]
        theirs[f"{to}.proj_out.weight"] = torch.cat(both, dim=1)
        theirs[f"{to}.proj_out.bias"] = ours.pop(f"{name}.mlp.fc2.bias")
    assert not ours, f"not mapped: {sorted(ours)}"
    return theirs


@torch.no_grad()
def difference_to_flux(height: int, width: int, dtype: torch.dtype = torch.float64) -> float:
    c = OPTIONS["as FLUX.1"]
    model, patch = random_model(c, dtype), CHANNELS * c.patch_size**2
    twin = FluxTransformer2DModel(
        in_channels=patch, num_layers=c.depth - c.single_depth, num_single_layers=c.single_depth,
        attention_head_dim=c.head_dim, num_attention_heads=c.width // c.head_dim, joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH, axes_dims_rope=(0, c.head_dim // 2, c.head_dim // 2),
    )  # fmt: skip
    twin.load_state_dict(flux_weights(model))
    nn.Module.to(twin, dtype)
    x, t = image(height, width)
    x, (states, mask) = x.to(dtype), text()
    states, rows, columns = states.to(dtype), height // c.patch_size, width // c.patch_size
    places = torch.cartesian_prod(torch.zeros(1).long(), torch.arange(rows), torch.arange(columns))
    reference = twin(
        patchify(x, c.patch_size), states, states.mean(1), t.to(dtype), places, torch.zeros(7, 3), return_dict=False
    )[0]
    found, _ = model(x, t, TextCondition(states, mask))
    return relative(found, unpatchify(reference, c.patch_size, rows, columns))


# In float64 what is left is the float32 of angles and sinusoids.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 5e-7)])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12), (40, 6)])
def test_equals_flux_of_diffusers(height: int, width: int, dtype: torch.dtype, tolerance: float) -> None:
    """Its first axis, of frames, has no features here, and so no table of positions bounds the image (12 tokens)."""
    assert difference_to_flux(height, width, dtype) <= tolerance


def columns_first(height: int, width: int, others: int, device: torch.device) -> Tensor:
    return grid_places(height, width, others, device).flip(1)


def text_behind_the_image(height: int, width: int, others: int, device: torch.device) -> Tensor:
    places = grid_places(height, width, others, device)
    places[height * width :] = max(height, width) + torch.arange(others)[:, None]
    return places


def halves(x: Tensor, places: Tensor) -> Tensor:
    """Pairs of features half a head apart, as in language models."""
    apart = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return rotate(apart, places).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize(
    ("name", "fault"),
    [("grid_places", columns_first), ("grid_places", text_behind_the_image), ("rotate", halves)],
)
def test_the_comparison_with_flux_sees_other_positions(
    name: str, fault: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.mmdit, name, fault)
    assert difference_to_flux(8, 12) > 1e-4


# ------------------------------------------------------------------------------------------------------ positions: rope
@torch.no_grad()
def test_rope_is_that_of_diffusers() -> None:
    places = grid_places(3, 5, 4, torch.device("cpu"))
    assert places[:15].tolist() == [[row, column] for row in range(3) for column in range(5)]
    assert not places[15:].any()
    x = torch.randn(2, 19, 3, 16, generator=torch.Generator().manual_seed(0))
    angles = FluxPosEmbed(theta=10000, axes_dim=[8, 8])(places)
    expected = apply_rotary_emb(x, angles, sequence_dim=1)
    assert isinstance(expected, Tensor)
    assert relative(rotate(x, places), expected) <= 1e-6
    assert torch.equal(rotate(x, places)[:, 15:], x[:, 15:])  # the text is not turned
    of_each = places.expand(2, -1, -1).clone()
    of_each[1] = places.flip(0)
    assert torch.equal(rotate(x, of_each)[1], rotate(x[1:].flip(1), places)[0].flip(0))


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 15, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    places = grid_places(3, 5, 0, torch.device("cpu"))

    def scores(shift: list[int]) -> Tensor:
        at = places + torch.tensor(shift)
        return torch.einsum("bnhk,bmhk->bhnm", rotate(q, at), rotate(k, at))

    assert relative(scores([7, 31]), scores([0, 0])) <= 1e-5
    assert relative(torch.einsum("bnhk,bmhk->bhnm", rotate(q, places + 1), rotate(k, places)), scores([0, 0])) > 1e-2


def test_rope_has_no_table_and_bounds_no_image() -> None:
    rope = OPTIONS["rope"]
    assert not list(random_model(rope).buffers())
    assert list(CONFIG.conflicts(512, 32, 7))
    assert not list(rope.conflicts(512, 32, 7))
    with pytest.raises(ValueError, match=r"head_dim 6 must be a multiple of 4 with model\.positions rope"):
        MMDiTConfig(width=24, head_dim=6, positions="rope")


# ---------------------------------------------------------------------------------------------------- single-stream
def test_single_depth_is_a_part_of_the_depth() -> None:
    for depth, single, classes in ((3, 0, "BBL"), (3, 1, "BBS"), (3, 3, "SSS")):
        units = random_model(replace(CONFIG, depth=depth, single_depth=single)).shard_units()
        assert "".join(type(unit).__name__[0] for unit in units) == classes
    with pytest.raises(ValueError, match=r"model\.single_depth 4 is more than model\.depth 3"):
        replace(CONFIG, single_depth=4)


# ---------------------------------------------------------------------------------------------------------- mlp: swiglu
@torch.no_grad()
def test_swiglu_is_its_formula() -> None:
    mlp = SwiGLU(8, 24).double()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gate, features = (mlp.fc1.weight[rows] @ x.mT + mlp.fc1.bias[rows, None] for rows in (slice(24), slice(24, 48)))
    expected = (gate / (1 + (-gate).exp()) * features).mT @ mlp.fc2.weight.T + mlp.fc2.bias
    assert relative(mlp(x), expected) <= 1e-12
    assert relative(F.silu(features).mT @ mlp.fc2.weight.T, expected) > 1e-2  # gate and features are told apart


@pytest.mark.parametrize(("head_dim", "hidden"), [(64, 168), (72, 192), (128, 344), (16, 40), (4, 8)])
def test_swiglu_grows_with_the_width_exactly(head_dim: int, hidden: int) -> None:
    for heads in (1, 3, 8):
        config = MMDiTConfig(width=heads * head_dim, head_dim=head_dim, mlp="swiglu")
        assert config.mlp_hidden == heads * hidden


def test_swiglu_has_about_as_many_parameters() -> None:
    plain, gated = (count(MMDiTConfig(width=512, mlp=mlp), in_channels=16) for mlp in ("gelu", "swiglu"))
    assert plain != gated
    assert abs(gated / plain - 1) < 0.01
