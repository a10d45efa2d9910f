"""T14: with the factors folded into the weights, code that knows no muP computes the same."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from export import write as export_write
from export.diffusers_folder import twin_config
from models.backbone import build_model
from models.layers import ClassCondition, SizedTextCondition, TextCondition, patchify
from tests.distributed.runs import weights
from tests.helpers.backbones import relative
from tests.helpers.exports import FOLDED, OWN, config_of, load_exactly, random_checkpoint, run_export
from trainer.build.engine import build_mup_table
from trainer.config.schema import TrainConfig
from trainer.mup.apply import apply_multipliers

MICRO = (
    "model.width=144",
    "mup.base_width=48",
    "model.micro_conditions=true",
    "model.pos_embed_base_size=4",
    "model.pos_embed_interpolation=2",
)
SIZE = 48  # pixels: 12 tokens a side, while the configs' images have 8


def inputs(dtype: torch.dtype, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, 3, size, size], t [2] (steps of 1000), text states [2, 5, 64]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
    states = torch.randn(2, 5, 64, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.tensor([0.03, 0.97]), states


def sd3(folder: Path, model: Any, dtype: torch.dtype) -> float:
    twin = load_exactly(SD3Transformer2DModel, folder, dtype)
    x, t, states = inputs(dtype, 32)  # as many tokens as the position table holds
    ours, _ = model(x, t, TextCondition(states, torch.ones(2, 5, dtype=torch.bool)))
    pooled = states.mean(1)
    theirs = twin(x, states, pooled_projections=pooled, timestep=1000 * t, return_dict=False)[0]
    return relative(ours, theirs)


def flux(folder: Path, model: Any, dtype: torch.dtype) -> float:
    twin = load_exactly(FluxTransformer2DModel, folder, dtype)
    x, t, states = inputs(dtype, SIZE)
    ours, _ = model(x, t, TextCondition(states, torch.ones(2, 5, dtype=torch.bool)))
    patch = model.config.patch_size
    rows = torch.arange(SIZE // patch)
    places = torch.cartesian_prod(torch.zeros(1).long(), rows, rows)
    tokens = patchify(x, patch)  # (C, P, P), as on the way out
    theirs = twin(tokens, states, states.mean(1), t.to(dtype), places, torch.zeros(5, 3), return_dict=False)[0]
    return relative(patchify(ours, patch), theirs)


def pixart(folder: Path, model: Any, dtype: torch.dtype) -> float:
    twin = load_exactly(PixArtTransformer2DModel, folder, dtype)
    x, t, states = inputs(dtype, SIZE)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    sizes = torch.tensor([[48.0, 48.0], [1500.0, 2250.0]])
    sized = model.config.micro_conditions
    condition = SizedTextCondition(states, mask, sizes) if sized else TextCondition(states, mask)
    ours, _ = model(x, t, condition)
    added = {"resolution": sizes, "aspect_ratio": torch.ones(2, 1)}
    theirs = twin(
        x, states, timestep=1000 * t, added_cond_kwargs=added, encoder_attention_mask=mask.to(dtype), return_dict=False
    )[0]
    return relative(ours, theirs)


def dit(folder: Path, model: Any, dtype: torch.dtype) -> float:
    twin = load_exactly(DiTTransformer2DModel, folder, dtype)
    x, t, _ = inputs(dtype, 32)  # the twin stretches its positions over other sizes, ours go on
    labels = torch.tensor([3, model.config.num_classes])
    ours, _ = model(x, t, ClassCondition(labels))
    return relative(ours, twin(x, timestep=1000 * t, class_labels=labels, return_dict=False)[0])


COMPARED: dict[str, tuple[Callable[[Path, Any, torch.dtype], float], str, tuple[str, ...]]] = {
    "mmdit": (sd3, "mmdit", ()),
    "mmdit, FLUX.1": (flux, "mmdit", ("model.positions=rope", "model.single_depth=2")),
    "mmdit, no QK-norm": (sd3, "mmdit", ("model.qk_norm=false",)),
    "pixart": (pixart, "pixart", ()),
    "pixart, sizes": (pixart, "pixart", MICRO),
    "dit": (dit, "dit", ()),
}


@torch.no_grad()
def difference(name: str, tmp_path: Path, patch: pytest.MonkeyPatch, dtype: torch.dtype) -> float:
    compare, kind, overrides = COMPARED[name]
    model, _ = random_checkpoint(tmp_path / "from", config_of(kind, *FOLDED, *overrides), dtype)
    run_export(patch, "--checkpoint", tmp_path / "from", "--output", tmp_path / "to", "--weights", "live")
    return compare(tmp_path / "to" / "transformer", model, dtype)


# In float64 what is left is the float32 of position tables and sinusoids.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.slow
def test_twins_of_diffusers(
    name: str, dtype: torch.dtype, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert difference(name, tmp_path, monkeypatch, dtype) <= tolerance


TWINS = {"mmdit": SD3Transformer2DModel, "pixart": PixArtTransformer2DModel, "dit": DiTTransformer2DModel}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", COMPARED)
def test_diffusers_own_weights_come_in(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that diffusers made and saved, with random numbers everywhere, in ours after --import."""
    compare, kind, overrides = COMPARED[name]
    config, folder = config_of(kind, *FOLDED, *overrides), tmp_path / "theirs" / "transformer"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin: Any = (FluxTransformer2DModel if compare is flux else TWINS[kind])(**twin_config(config))
        for parameter in twin.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    if kind == "dit":  # whose copies of the embedders in every block are one in published weights
        for block in twin.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(twin.transformer_blocks[0].norm1.emb.state_dict())
    if kind == "pixart":  # as PixArt-alpha's are published
        twin.caption_projection.register_buffer("y_embedding", torch.ones(120, 64))
    twin.save_pretrained(folder)
    arguments = ("--config", f"{kind}_debug_mup.yaml", "--output", tmp_path / "ours", *OWN.get(kind, ()))
    run_export(monkeypatch, "--import", tmp_path / "theirs", *arguments, *FOLDED, *overrides)
    if kind == "pixart":
        del twin.caption_projection.y_embedding
        twin.save_pretrained(folder)
    model = build_model(config.model, config.autoencoder.channels, config.text_encoder.width)
    apply_multipliers(model, build_mup_table(config))
    model.load_state_dict(weights(tmp_path / "ours"))
    assert compare(folder, model.eval(), torch.float32) <= 1e-5


def without_multiplier(table: Any, name: str) -> float:
    return table.settings.branch_scale if ".out." in name or "fc2" in name else 1.0


def without_branches(table: Any, name: str) -> float:
    return table.rows[name].multiplier


def with_biases(table: Any, name: str) -> float:
    return table.rows["final.weight"].multiplier if name == "final.bias" else FOLD(table, name)


FOLD = export_write.fold


@pytest.mark.parametrize("fault", [without_multiplier, without_branches, with_biases])
@pytest.mark.parametrize("name", ["mmdit", "pixart", "dit"])
@pytest.mark.slow
def test_a_factor_that_is_lost_is_seen(
    name: str, fault: Callable[[Any, str], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_write, "fold", fault)
    assert difference(name, tmp_path, monkeypatch, torch.float32) > 1e-3


# ------------------------------------------------------------------------------------------- by the official names


class Official:
    """Forward passes as the official repositories define them, from a state dict alone."""

    def __init__(self, weights: dict[str, Tensor], config: TrainConfig) -> None:
        self.w, self.c = weights, config.model
        self.t_features = 256

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps=1e-5)

    def attention(self, name: str, x: Tensor) -> Tensor:
        q, k, v = self.linear(f"{name}.qkv", x).unflatten(-1, (3, -1, self.c.head_dim)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.c.head_dim)
        return self.linear(f"{name}.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def patches(self, name: str, x: Tensor) -> Tensor:
        kernel, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return F.conv2d(x, kernel, bias, stride=self.c.patch_size).flatten(2).transpose(1, 2)

    def time(self, steps: Tensor, features: int, dtype: torch.dtype) -> Tensor:
        half = features // 2
        angle = steps.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        return torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)

    def image(self, x: Tensor) -> Tensor:
        side, p = math.isqrt(x.shape[1]), self.c.patch_size
        x = x.reshape(len(x), side, side, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, side * p, side * p)

    def dit(self, x: Tensor, steps: Tensor, labels: Tensor) -> Tensor:
        def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

        dtype = x.dtype
        x = self.patches("x_embedder.proj", x) + self.w["pos_embed"]
        c = self.linear("t_embedder.mlp.2", F.silu(self.linear("t_embedder.mlp.0", self.time(steps, 256, dtype))))
        c = F.silu(c + self.w["y_embedder.embedding_table.weight"][labels])
        for i in range(self.c.depth):
            shift, scale, gate, *rest = self.linear(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, dim=1)
            x = x + gate[:, None] * self.attention(f"blocks.{i}.attn", modulated(x, shift, scale))
            hidden = self.linear(f"blocks.{i}.mlp.fc1", modulated(x, rest[0], rest[1]))
            x = x + rest[2][:, None] * self.linear(f"blocks.{i}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
        shift, scale = self.linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
        return self.image(self.linear("final_layer.linear", modulated(x, shift, scale)))

    def uvit(self, x: Tensor, steps: Tensor, labels: Tensor | None, context: Tensor | None) -> Tensor:
        d, half, count = self.c.width, self.c.depth // 2, (x.shape[-1] // self.c.patch_size) ** 2
        tokens = [self.time(steps, d, x.dtype)[:, None], self.patches("patch_embed.proj", x)]
        if "time_embed.0.weight" in self.w:
            tokens[0] = self.linear("time_embed.2", F.silu(self.linear("time_embed.0", tokens[0])))
        if labels is not None:
            tokens.insert(0, self.w["label_emb.weight"][labels][:, None])  # before the time
        if context is not None:
            tokens.insert(1, self.linear("context_embed", context))
        v = torch.cat(tokens, dim=1) + self.w["pos_embed"]
        kept: list[Tensor] = []
        names = [*(f"in_blocks.{i}" for i in range(half)), "mid_block", *(f"out_blocks.{i}" for i in range(half))]
        for number, name in enumerate(names):
            if number > half:
                v = self.linear(f"{name}.skip_linear", torch.cat([v, kept.pop()], dim=-1))
            v = v + self.attention(f"{name}.attn", self.norm(f"{name}.norm1", v))
            hidden = F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", v)))
            v = v + self.linear(f"{name}.mlp.fc2", hidden)
            if number < half:
                kept.append(v)
        out = self.image(self.linear("decoder_pred", self.norm("norm", v)[:, -count:]))
        if "final_layer.weight" in self.w:
            out = F.conv2d(out, self.w["final_layer.weight"], self.w["final_layer.bias"], padding=1)
        return out


OPTIONS = ("model.time_mlp=true", "model.qkv_bias=true", "model.final_conv=true")
CAPTIONED = ("model.condition=text", "model.text_length=5", "text_encoder.width=64", "text_encoder.max_length=5",
             "text_encoder.path=.cache/debug/t5")  # fmt: skip
NARROW = ("model.width=96", "mup.base_width=32", "mup.output_multiplier=1.7")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("dit", (*FOLDED, "model.time_freq_shift=0")),
        ("dit", (*FOLDED, "model.time_freq_shift=0", "model.learn_sigma=false")),
        ("uvit", NARROW),
        ("uvit", (*NARROW, *OPTIONS)),
        ("uvit", (*NARROW, *CAPTIONED, *OPTIONS)),
    ],
)
@torch.no_grad()
def test_official_names(kind: str, overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(kind, *overrides)
    model, _ = random_checkpoint(tmp_path / "from", config)
    arguments = ("--weights", "live", "--format", "official")
    run_export(monkeypatch, "--checkpoint", tmp_path / "from", "--output", tmp_path / "to", *arguments)
    official = Official(load_file(tmp_path / "to" / "model.safetensors"), config)
    x, t, states = inputs(torch.float32, 32)
    steps, labels = (1000 * t).round(), torch.tensor([3, config.model.num_classes])
    text = TextCondition(states, torch.ones(2, 5, dtype=torch.bool))
    ours, _ = model(x, t, text if config.model.condition == "text" else ClassCondition(labels))
    if kind == "dit":
        theirs = official.dit(x, steps, labels)
    elif config.model.condition == "text":
        theirs = official.uvit(x, steps, None, states)
    else:
        theirs = official.uvit(x, steps, labels, None)
    assert relative(ours, theirs) <= 1e-5
    # A test that is blind to the order of the first two tokens would not see the published one.
    if kind == "uvit" and config.model.condition == "label":
        official.w["pos_embed"][:, :2] = official.w["pos_embed"][:, :2].flip(1)
        assert relative(ours, official.uvit(x, steps, labels, None)) > 1e-4
