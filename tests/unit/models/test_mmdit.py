"""The MMDiT against diffusers' SD3 with copied weights; text mask, patch orders, time, gradients, FLOPs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import models.mmdit
from models.backbone import build_model, declarations
from models.configs import MMDiTConfig
from models.flops import forward_flops
from models.layers import TextCondition, patchify, time_sinusoids, unpatchify
from models.mmdit import MMDiT
from tests.helpers.backbones import relative
from trainer.mup.apply import build_table, init_parameters
from trainer.mup.rules import Settings

CHANNELS, TEXT_WIDTH = 4, 24
CONFIG = MMDiTConfig(width=32, depth=3, head_dim=16, pos_embed_max_size=12, pos_embed_base_size=4)


def random_model(config: MMDiTConfig = CONFIG, dtype: torch.dtype = torch.float32) -> MMDiT:
    """No weight is zero or one, so that none can be swapped, dropped or misplaced unseen."""
    model = MMDiT(config, CHANNELS, TEXT_WIDTH)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        std = p.shape[-1] ** -0.5 if p.ndim == 2 else 0.3
        p.data.normal_(float("norm" in name), std, generator=generator)
    return model.to(dtype)


def inputs(height: int = 8, width: int = 8, length: int = 7, batch: int = 2) -> tuple[Tensor, Tensor, TextCondition]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, CHANNELS, height, width, generator=generator)
    states = torch.randn(batch, length, TEXT_WIDTH, generator=generator)
    t = torch.linspace(0.03, 0.97, batch)
    return x, t, TextCondition(states, torch.ones(batch, length, dtype=torch.bool))


def sd3_weights(model: MMDiT) -> dict[str, Tensor]:
    """Our parameters under diffusers' names; every one of ours is used."""
    ours = {name: p.detach() for name, p in model.named_parameters()}
    theirs: dict[str, Tensor] = {}

    def move(name: str, *new: str) -> None:
        """Weight and bias of a layer, its rows split evenly over the layers `new`."""
        for leaf in ("weight", "bias"):
            rows = ours.pop(f"{name}.{leaf}").chunk(len(new))
            theirs.update({f"{n}.{leaf}": row for n, row in zip(new, rows, strict=True)})

    def move_mlp(name: str, first: str, second: str) -> None:
        move(f"{name}.fc1", first)
        move(f"{name}.fc2", second)

    kernel = (CHANNELS, model.config.patch_size, model.config.patch_size)
    theirs["pos_embed.proj.weight"] = ours.pop("patch_embed.weight").unflatten(1, kernel)
    theirs["pos_embed.proj.bias"] = ours.pop("patch_embed.bias")
    for name, new in (("time_embed", "timestep_embedder"), ("pooled_embed", "text_embedder")):
        move_mlp(name, f"time_text_embed.{new}.linear_1", f"time_text_embed.{new}.linear_2")
    move("text_embed", "context_embedder")
    move("final_modulation", "norm_out.linear")
    move("final", "proj_out")
    for i in range(model.config.depth):
        block, to = f"blocks.{i}", f"transformer_blocks.{i}"
        last = i == model.config.depth - 1
        for stream, norm, qkv, gain, out, mlp in (
            ("image", "norm1", "to_{}", "norm_{}", "to_out.0", "ff"),
            ("text", "norm1_context", "add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
        ):
            move(f"{block}.{stream}.modulation", f"{to}.{norm}.linear")
            kept = "kv" if last and stream == "text" else "qkv"
            move(f"{block}.{stream}.{kept}", *(f"{to}.attn.{qkv.format(c)}" for c in kept))
            for c in kept[:-1] if model.config.qk_norm else "":
                theirs[f"{to}.attn.{gain.format(c)}.weight"] = ours.pop(f"{block}.{stream}.norm_{c}.weight")
            if kept == "qkv":
                move(f"{block}.{stream}.out", f"{to}.attn.{out}")
                move_mlp(f"{block}.{stream}.mlp", f"{to}.{mlp}.net.0.proj", f"{to}.{mlp}.net.2")
    assert not ours, f"not mapped: {sorted(ours)}"
    return theirs


def sd3_twin(model: MMDiT) -> SD3Transformer2DModel:
    c = model.config
    twin = SD3Transformer2DModel(
        sample_size=c.pos_embed_base_size * c.patch_size,
        patch_size=c.patch_size,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=c.depth,
        attention_head_dim=c.head_dim,
        num_attention_heads=c.width // c.head_dim,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=c.width,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=c.pos_embed_max_size,
        qk_norm="rms_norm" if c.qk_norm else None,
    )
    weights = sd3_weights(model)
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    # Nothing reads the last block's text queries: their random values cannot matter; the table is computed.
    dead = f"transformer_blocks.{c.depth - 1}.attn"
    expected = {f"{dead}.add_q_proj.weight", f"{dead}.add_q_proj.bias"}
    expected |= {f"{dead}.norm_added_q.weight"} if c.qk_norm else set()
    assert set(missing) == expected | {"pos_embed.pos_embed"}
    assert not unexpected
    return twin.eval()


@torch.no_grad()
def difference_to_sd3(
    height: int,
    width: int,
    dtype: torch.dtype,
    change: Callable[[MMDiT], None] = lambda model: None,
    config: MMDiTConfig = CONFIG,
) -> float:
    """Largest difference of the two predictions relative to the largest value; `change` is made to ours alone."""
    model = random_model(config, dtype)
    twin = nn.Module.to(sd3_twin(model), dtype)
    change(model)
    x, t, (states, mask) = inputs(height, width)
    x, states = x.to(dtype), states.to(dtype)
    prediction, _ = model(x, t, TextCondition(states, mask))
    reference = twin(
        hidden_states=x,
        timestep=1000 * t,
        encoder_hidden_states=states,
        pooled_projections=states.mean(1),
        return_dict=False,
    )[0]
    assert prediction.shape == x.shape
    return relative(prediction, reference)


# In float64 what is left is the float32 of both position tables and sinusoids (measured 2e-8).
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 2e-7)])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12), (20, 6), (24, 24)])
def test_equals_sd3_of_diffusers(height: int, width: int, dtype: torch.dtype, tolerance: float) -> None:
    assert difference_to_sd3(height, width, dtype) <= tolerance


def test_without_qk_norm_it_equals_sd3_medium() -> None:
    without = replace(CONFIG, qk_norm=False)
    assert difference_to_sd3(8, 12, torch.float64, config=without) <= 2e-7
    assert not any("norm_q" in name for name, _ in random_model(without).named_parameters())


def rms_norm_eps(model: MMDiT) -> None:
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = 1e-5


def exact_gelu(model: MMDiT) -> None:
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "none"


def swapped_final_modulation(model: MMDiT) -> None:
    for p in model.final_modulation.parameters():
        p.copy_(p.roll(CONFIG.width, 0))


@pytest.mark.parametrize("change", [rms_norm_eps, exact_gelu, swapped_final_modulation])
def test_the_comparison_with_sd3_sees_small_faults(change: Callable[[MMDiT], None]) -> None:
    assert difference_to_sd3(8, 12, torch.float64, change) > 1e-6


@torch.no_grad()
def test_padding_has_no_effect() -> None:
    model = random_model(dtype=torch.float64)
    x, t, (states, mask) = inputs(length=6)
    x, states = x.double(), states.double()
    prediction, _ = model(x, t, TextCondition(states, mask))

    padded = F.pad(states, (0, 0, 0, 5), value=3.0)
    long_mask = F.pad(mask, (0, 5))
    longer, _ = model(x, t, TextCondition(padded, long_mask))
    assert relative(longer, prediction) <= 1e-12

    other = padded.clone()
    other[:, 6:] = 100 * torch.randn(2, 5, TEXT_WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.equal(model(x, t, TextCondition(other, long_mask))[0], longer)
    # The same content does change the prediction where the mask lets it through, and so does one more token.
    full = torch.ones_like(long_mask)
    assert not torch.allclose(model(x, t, TextCondition(other, full))[0], longer, rtol=1e-2)
    assert not torch.allclose(model(x, t, TextCondition(padded, full))[0], longer, rtol=1e-2)


@torch.no_grad()
def test_each_sample_has_its_own_length() -> None:
    model = random_model(dtype=torch.float64)
    x, t, (states, mask) = inputs(length=6)
    x, states = x.double(), states.double()
    mask = mask.clone()
    mask[0, 2:] = False
    together, _ = model(x, t, TextCondition(states, mask))
    short, _ = model(x[:1], t[:1], TextCondition(states[:1, :2], mask[:1, :2]))
    assert relative(together[:1], short) <= 1e-12


def test_patchify_is_a_convolution() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 6, 9, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 3, 3, 3, generator=generator, dtype=torch.float64)
    reference = F.conv2d(x, weight, stride=3).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(x, 3) @ weight.flatten(1).T, reference, rtol=1e-12, atol=1e-12)


def test_unpatchify_is_the_einsum_of_sd3() -> None:
    x = torch.arange(2 * 6 * 12, dtype=torch.float64).reshape(2, 6, 12)
    reference = torch.einsum("nhwpqc->nchpwq", x.reshape(2, 2, 3, 2, 2, 3)).reshape(2, 3, 4, 6)
    assert torch.equal(unpatchify(x, 2, 2, 3), reference)


def test_unpatchify_inverts_patchify_up_to_the_order_of_a_patch() -> None:
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(x, 2)  # (C, P, P)
    assert patches.shape == (2, 6, 12)
    channels_last = patches.unflatten(-1, (3, 2, 2)).permute(0, 1, 3, 4, 2).flatten(2)  # (P, P, C)
    assert torch.equal(unpatchify(channels_last, 2, 2, 3), x)
    assert not torch.equal(unpatchify(patches, 2, 2, 3), x)


def test_bfloat16_computes_float32_sinusoids(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Tensor, Tensor]] = []

    def recorded(t: Tensor, freq_shift: float = 0.0) -> Tensor:
        calls.append((t, time_sinusoids(t, freq_shift)))
        return calls[-1][1]

    monkeypatch.setattr(models.mmdit, "time_sinusoids", recorded)
    x, _, condition = inputs()
    t = torch.tensor([0.9001, 0.9012])
    # What must not happen: 1000 t is one number in bfloat16, and the sinusoids of a rounded t are others.
    assert (1000 * t).bfloat16().unique().numel() == 1
    assert (time_sinusoids(t.bfloat16()) - time_sinusoids(t)).abs().max() > 0.5
    embedded: list[Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(dtype=dtype)
        model.time_embed.register_forward_pre_hook(lambda _, args: embedded.append(args[0]))
        prediction, _ = model(x.to(dtype), t, condition)
        assert prediction.dtype == dtype
    (t32, full), (t16, half) = calls
    assert t32.dtype == t16.dtype == full.dtype == half.dtype == torch.float32
    assert torch.equal(t16, t)
    assert torch.equal(full, half)
    assert (half[0] - half[1]).abs().max() > 0.5
    # Only the finished table is rounded, on its way into the MLP.
    assert torch.equal(embedded[1], embedded[0].bfloat16())
    assert not torch.equal(embedded[1][0], embedded[1][1])


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_time_sinusoids(shift: float) -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    i = torch.arange(128, dtype=torch.float64)
    angle = 1000 * t.double()[:, None] * 10000 ** (-i / (128 - shift))
    reference = torch.cat([angle.cos(), angle.sin()], dim=1)
    assert (time_sinusoids(t, shift) - reference).abs().max() < 2e-4  # 1000 rad in float32


def test_every_parameter_gets_a_gradient() -> None:
    config = replace(CONFIG, depth=2)
    assert config.adaln_init == "zero"

    def factory(width: int) -> nn.Module:
        return build_model(replace(config, width=width), CHANNELS, TEXT_WIDTH)

    table = build_table(factory, config.width, config.width, config.head_dim, declarations(config), Settings())
    model = build_model(config, CHANNELS, TEXT_WIDTH)
    init_parameters(model, table, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-12)
    without = {name for name, _ in model.named_parameters()}
    x, t, condition = inputs(batch=4)
    for step in range(4):
        optimizer.zero_grad()
        F.mse_loss(model(x, t, condition)[0], x.flip(0)).backward()
        without -= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        if step == 0:  # adaLN-zero and a zero final weight: at first only the final layer learns
            assert len(without) == len(table.rows) - 2
        optimizer.step()
    assert not without


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "length"), [(8, 8, 7), (8, 12, 3)])
@pytest.mark.parametrize("depth", [1, 3])
def test_flops_equal_those_of_the_counter(height: int, width: int, length: int, depth: int) -> None:
    config = MMDiTConfig(width=48, depth=depth, head_dim=16, mlp_ratio=3, pos_embed_max_size=12)
    x, t, condition = inputs(height, width, length)
    with torch.device("meta"):
        model = MMDiT(config, CHANNELS, TEXT_WIDTH)
    meta = TextCondition(*(part.to("meta") for part in condition))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x.to("meta"), t.to("meta"), meta)
    tokens = height * width // config.patch_size**2
    assert 2 * forward_flops(config, CHANNELS, TEXT_WIDTH, tokens, length) == counter.get_total_flops()


@pytest.mark.parametrize("number", range(3))
@torch.no_grad()
def test_features_are_the_tokens_after_a_block(number: int) -> None:
    model = random_model()
    x, t, condition = inputs()
    seen: list[Any] = []
    model.blocks[number].register_forward_hook(lambda _, args, output: seen.append(output[0]))
    prediction, features = model(x, t, condition, features_at=number)
    assert features is not None
    assert features.shape == (2, 16, CONFIG.width)
    assert torch.equal(features, seen[0])
    plain, none = model(x, t, condition)
    assert none is None
    assert torch.equal(plain, prediction)


@pytest.mark.parametrize(("width", "low", "high"), [(5120, 17.5e9, 18.5e9), (512, 0.17e9, 0.19e9)])
def test_parameter_counts(width: int, low: float, high: float) -> None:
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig(width=width, depth=19, head_dim=64), in_channels=16, text_width=4096)
    assert low <= sum(p.numel() for p in model.parameters()) <= high
    assert all(buffer.is_meta for buffer in model.buffers())


def test_buffers_are_refilled_after_meta() -> None:
    with torch.device("meta"):
        model = MMDiT(CONFIG, CHANNELS, TEXT_WIDTH)
    model.to_empty(device="cpu")
    model.axis_table.fill_(float("nan"))
    model.fill_buffers()
    assert torch.equal(model.axis_table, random_model().axis_table)
    assert "axis_table" not in model.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 100, "head_dim": 64}, r"model\.width 100 is not a multiple of model\.head_dim 64"),
        ({"width": 6, "head_dim": 3}, r"model\.width 6 must be a multiple of 4"),
        ({"depth": 0}, r"depth\n.*greater than or equal to 1"),  # a config file's message: test_load
        ({"time_freq_shift": 0.5}, r"model\.time_freq_shift must be 0 or 1"),
    ],
)
def test_impossible_configs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMDiTConfig(**arguments)


@pytest.mark.parametrize(("height", "width"), [(26, 8), (8, 26)])
def test_an_image_larger_than_the_position_table(height: int, width: int) -> None:
    x, t, condition = inputs(height, width)
    with pytest.raises(ValueError, match=r"do not fit model\.pos_embed_max_size 12"):
        random_model()(x, t, condition)


def test_shard_units_are_the_blocks() -> None:
    model = random_model()
    assert model.shard_units() == list(model.blocks)
