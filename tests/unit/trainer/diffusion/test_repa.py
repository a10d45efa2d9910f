"""Representation alignment: its loss, the encoder's features, what a run logs, keeps and leaves behind."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, DINOv3ViTConfig, DINOv3ViTModel

from data.debug import ensure_debug_assets
from data.encoders.dino import FeatureEncoder, load_feature_encoder
from data.errors import DataError
from launch import sample
from models.configs import ProjectorConfig
from models.flops import forward_flops
from models.repa import ConvProjector
from tests.distributed.runs import exact
from tests.helpers.backbones import CHANNELS, TEXT_WIDTH, condition_of, image
from tests.mup.cases import REPA_CASES
from trainer.build.flops import image_flops
from trainer.build.meta import meta_inputs, meta_model
from trainer.build.run import build_run
from trainer.checkpoint.find import find_checkpoint
from trainer.config.keys import plain
from trainer.config.load import load_config
from trainer.config.resume import check_resume
from trainer.config.schema import TrainConfig
from trainer.diffusion.repa import Alignment, spatially_normalised
from trainer.errors import ConfigError
from trainer.estimate.arithmetic import count_passes, products_flops
from trainer.loop import train
from trainer.monitor.metrics import read_metrics
from trainer.parallel.mesh import init_world
from trainer.run import Run

pytestmark = pytest.mark.slow

ENCODER = ".cache/debug/dinov2"
REPA = (
    "objective.repa_weight=0.5", "objective.repa_layer=1", f"objective.repa_encoder={ENCODER}",
    "objective.repa_width=32", "objective.repa_hidden=48",
)  # fmt: skip
SHORT = (
    "train.steps=4", "train.validate_every=4", "train.checkpoint_every=4", "train.sample_every=4",
    "optim.warmup_steps=0", "validation.samples=4", "sample.count=2", "sample.steps=2",
)  # fmt: skip
Weights = dict[str, torch.Tensor]
BACKBONES = ("mmdit", "dit", "pixart")


def configured(kind: str, folder: Path, *overrides: str) -> TrainConfig:
    return load_config(f"{kind}_debug_mup.yaml", [f"run.dir={folder}", *SHORT, *overrides])


@contextmanager
def built(config: TrainConfig) -> Iterator[Run]:
    flash = torch.backends.cuda.flash_sdp_enabled()
    run = build_run(config, init_world(1))
    try:
        yield run
    finally:
        run.metrics.close()
        if run.lock is not None:
            run.lock.close()
        dist.destroy_process_group()
        torch.backends.cuda.enable_flash_sdp(flash)  # init_world turns it off; other tests run in this process


def trained(config: TrainConfig) -> tuple[list[dict[str, Any]], Weights, Weights]:
    """Logged lines, weights at the start and at the end."""
    with built(config) as run:
        start = {name: run.engine.full(name).clone() for name in run.engine.master_shards()}
        assert train(run) == "finished"
        return read_metrics(run.folder), start, {name: run.engine.full(name) for name in start}


def test_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    projected, features = (torch.randn(3, 5, 8, generator=generator) for _ in range(2))
    alignment = Alignment(0.5, 0, lambda _: features)
    losses = alignment.losses(projected, features)
    expected = [
        -sum((p @ f / (p.norm() * f.norm())).item() for p, f in zip(*pair, strict=True)) / 5
        for pair in zip(projected, features, strict=True)
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert alignment.losses(projected, 3 * projected).tolist() == pytest.approx([-1.0] * 3)
    # In fp32 of bf16 features: bf16's own cosine is off by more.
    half = alignment.losses(projected.bfloat16(), projected.bfloat16())
    assert half.dtype == torch.float32
    assert half.tolist() == pytest.approx([-1.0] * 3, abs=1e-6)


def test_features_lie_on_the_token_grid() -> None:
    """A white quarter of a black image changes its own quarter of the features most, at any size of the image."""
    ensure_debug_assets()
    encoder = load_feature_encoder(ENCODER, 32, "cpu", torch.float64)
    images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    images[1, :, :32, 48:] = 255  # above, right
    features = encoder.encode(images, 4, 6)
    assert features.shape == (2, 24, 32)
    moved = (features[1] - features[0]).norm(dim=-1).reshape(4, 6)
    assert moved[:2, 3:].min() > moved[2:, :3].max()
    # Alone or in a batch; not bit for bit, because a kernel may sum in another order for another batch.
    torch.testing.assert_close(encoder.encode(images[1:], 4, 6)[0], features[1], rtol=0, atol=1e-12)


def test_registers_are_no_patches(tmp_path: Path) -> None:
    config = Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, num_register_tokens=3
    )
    model = Dinov2WithRegistersModel(config).eval()
    model.save_pretrained(tmp_path / "dinov2")
    encoder = load_feature_encoder(str(tmp_path / "dinov2"), 16, "cpu", torch.float32)
    seen: list[torch.Tensor] = []
    encoder.model.register_forward_hook(lambda _, args, output: seen.append(output.last_hidden_state))
    features = encoder.encode(torch.zeros(1, 3, 28, 28, dtype=torch.uint8), 2, 2)
    assert seen[0].shape == (1, 1 + 3 + 4, 16)
    assert torch.equal(features, seen[0][:, 4:])


def test_dinov3_gives_the_patches_that_the_library_gives(tmp_path: Path) -> None:
    """A small random one: patches of 16 pixels, on any grid, without the class token and the registers."""
    config = DINOv3ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16,
        num_register_tokens=3, pos_embed_rescale=2.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DINOv3ViTModel(config).eval()
    model.save_pretrained(tmp_path / "dinov3")
    encoder = load_feature_encoder(str(tmp_path / "dinov3"), 16, "cpu", torch.float32)
    images = torch.randint(256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features = encoder.encode(images, 2, 3)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        states = model((images / 255.0 - mean) / std).last_hidden_state
    assert states.shape == (2, 1 + 3 + 6, 16)
    torch.testing.assert_close(features, states[:, 4:], rtol=0, atol=1e-5)
    assert not features[:, 0].allclose(features[:, 1], atol=1e-3)
    with pytest.raises(DataError, match=r"objective\.repa_width is 24"):
        load_feature_encoder(str(tmp_path / "dinov3"), 24, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("path", "width", "message"),
    [
        (ENCODER, 768, "objective.repa_width is 768"),
        (".cache/debug/t5", 64, "is a t5; expected a DINOv2"),
        ("nowhere/at-all", 32, "objective.repa_encoder"),
        ("none", 32, "objective.repa_encoder is none"),
    ],
)
def test_a_wrong_encoder(path: str, width: int, message: str) -> None:
    ensure_debug_assets()
    with pytest.raises(DataError, match=message):
        load_feature_encoder(path, width, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("uvit", REPA, "objective.repa_weight does not fit model.kind uvit: its long skips"),
        ("mmdit", (*REPA, "objective.repa_layer=3"), "objective.repa_layer 3 is more than model.depth 2"),
        ("mmdit", ("objective.repa_weight=-1",), "objective.repa_weight"),
        ("mmdit", (*REPA, "objective.repa_projector=conv"), "repa_hidden 48 does nothing under repa_projector conv"),
        (
            "mmdit",
            (
                *("objective.repa_weight=1", "objective.repa_layer=1", "objective.repa_projector=conv"),
                *("model.route.share=0.5", "model.route.start=0", "model.route.end=1"),
            ),
            "conv needs whole grids of tokens, and block 1 lies in model.route",
        ),
        ("mmdit", (*REPA, "objective.repa_spatial_norm=1.5"), "objective.repa_spatial_norm"),
        ("mmdit", ("objective.repa_until=3",), "objective.repa_until 3 does nothing without objective.repa_weight"),
        ("mmdit", (*REPA, "objective.repa_until=0"), "objective.repa_until"),
        ("mmdit", (*REPA, "objective.repa_until=3", "parallel.engine=zero"), "repa_until needs parallel.engine fsdp2"),
        ("mmdit", (*REPA, "objective.repa_until=3", "parallel.cuda_graph=true"), "not go with parallel.cuda_graph"),
    ],
)
def test_a_wrong_config(kind: str, overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(kind, tmp_path, *overrides)


@pytest.mark.parametrize("kind", BACKBONES)
def test_flops(kind: str) -> None:
    """The projector's matrix products: 16 tokens x (48 x 24 + 24 x 24 + 24 x 16), a multiply and an add each."""
    config, projector = REPA_CASES[kind].config(48, "zero"), REPA_CASES[kind].projector
    plain = forward_flops(config, CHANNELS, TEXT_WIDTH, 16, 7)
    more = forward_flops(config, CHANNELS, TEXT_WIDTH, 16, 7, projector)
    assert more - plain == 2 * 16 * (48 * 24 + 24 * 24 + 24 * 16)


@pytest.mark.parametrize("kind", BACKBONES)
def test_flops_of_the_convolution(kind: str) -> None:
    """As torch counts them, and as the estimate does, in both passes."""
    keys = ("objective.repa_weight=0.5", "objective.repa_layer=1", "objective.repa_projector=conv")
    config = load_config(f"{kind}_debug_mup.yaml", keys)
    model, inputs = meta_model(config), meta_inputs(config, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    assert 3 * counter.get_total_flops() == image_flops(config)
    passes = count_passes(model, inputs)
    assert products_flops(passes.blocks) + products_flops(passes.rest) == counter.get_total_flops()
    plain = count_passes(model, inputs[:3])
    forward = counter.get_total_flops() - image_flops(load_config(f"{kind}_debug_mup.yaml")) // 3
    assert products_flops(passes.backward) - products_flops(plain.backward) == 2 * forward


def test_the_convolution_sees_neighbours_on_the_grid() -> None:
    """Of 4 x 6 tokens; a token's feature depends on those around it, and on no other."""
    projector = ConvProjector(8, ProjectorConfig(0, 5, "conv"))
    projector.conv.multiplier = 0.5
    tokens = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = projector(tokens, 4, 6)
        moved = tokens.clone()
        moved[:, 2 * 6 + 3] += 1.0
        changed = (projector(moved, 4, 6) - features).abs().amax(-1).reshape(2, 4, 6) > 1e-6
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1:4, 2:5] = True
    assert torch.equal(changed, expected.expand(2, -1, -1))
    weight, bias = projector.conv.weight, projector.conv.bias
    assert bias is not None
    around = tokens.reshape(2, 4, 6, 8)[:, 1:4, 2:5].permute(0, 3, 1, 2)  # of token 2, 3
    by_hand = 0.5 * torch.einsum("bdij,fdij->bf", around, weight) + bias
    assert torch.allclose(features[:, 2 * 6 + 3], by_hand, atol=1e-5)


def test_spatial_norm() -> None:
    features = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    found = spatially_normalised(features, 0.6)
    deviation = features.std(dim=1, keepdim=True, correction=0)
    assert torch.allclose(found, (features - 0.6 * features.mean(1, keepdim=True)) / deviation, atol=1e-5)
    assert torch.allclose(
        spatially_normalised(features, 1.0).mean(1), torch.zeros(3, 5, dtype=torch.float64), atol=1e-9
    )
    assert spatially_normalised(features.half(), 0.6).dtype == torch.float32
    assert spatially_normalised(torch.full((1, 1, 4), 7.0), 1.0).isfinite().all()


@pytest.mark.parametrize("kind", BACKBONES)
def test_irepa_trains(kind: str, tmp_path: Path) -> None:
    keys = tuple(key for key in REPA if "hidden" not in key)
    irepa = (*keys, "objective.repa_projector=conv", "objective.repa_spatial_norm=0.8")
    config = configured(kind, tmp_path, *irepa, "run.name=a", "train.steps=12", "optim.lr=8e-3", "train.sample_every=0")
    records, _, weights = trained(config)
    logged = [record["repa_loss"] for record in records if "repa_loss" in record]
    assert logged[-1] < logged[0] - 0.02
    assert [name for name in weights if name.startswith("projector.")] == [
        "projector.conv.weight",
        "projector.conv.bias",
    ]


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_prediction_does_not_see_the_projector(kind: str) -> None:
    case = REPA_CASES[kind]
    model = case.model(1.0, case.table(1.0), torch.float32)
    config = case.config(48, "zero")
    x, t = image()
    inputs = (x[:, :3], t, condition_of(config))
    if kind != "dit":
        inputs = (x[:, :3], t, type(inputs[2])(inputs[2].states[..., :20], inputs[2].mask))
    with torch.no_grad():
        prediction, features = model(*inputs, features_at=0)
        plain, none = model(*inputs)
    assert none is None
    assert features.shape == (2, 16, 16)
    assert torch.equal(prediction, plain)


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_run_aligns_and_another_takes_over_all_but_the_projector(kind: str, tmp_path: Path) -> None:
    """A short run through samples, EMA and a checkpoint; from it one without a projector, and one with another."""
    config = configured(kind, tmp_path, *REPA, "run.name=a", "train.steps=12", "optim.lr=8e-3")
    records, _, weights = trained(config)
    logged = [record for record in records if "repa_loss" in record]
    assert len(logged) == 12
    assert -1 <= logged[-1]["repa_loss"] < logged[0]["repa_loss"] - 0.1
    assert all("repa_loss" not in record for record in records if record["step"] == 0)
    source = find_checkpoint(tmp_path / "a")
    for name, keys in (("b", ()), ("c", (*REPA, "objective.repa_hidden=40"))):
        with built(configured(kind, tmp_path, *keys, f"run.init_from={source}", f"run.name={name}")) as run:
            start = {parameter: run.engine.full(parameter).clone() for parameter in run.engine.master_shards()}
        assert any(n.startswith("projector.") for n in start) == bool(keys)
        for parameter, value in start.items():
            if not parameter.startswith("projector."):
                assert torch.equal(value, weights[parameter]), parameter


def test_a_resume_is_exact_also_with_checkpointed_activations_and_can_be_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the checkpoint in the middle of a run; the encoder is not needed for images."""
    keys = (*REPA, "train.checkpoint_every=2", "train.sample_every=0")
    records, _, weights = trained(configured("mmdit", tmp_path, *keys, "run.name=whole"))
    for mode in ("none", "selective", "full"):
        shutil.copytree(tmp_path / "whole", tmp_path / mode)
        shutil.rmtree(tmp_path / mode / "checkpoints" / "step_00000004")
        more = (f"run.name={mode}", f"parallel.activation_checkpointing={mode}")
        resumed, start, end = trained(configured("mmdit", tmp_path, *keys, *more))
        assert exact(resumed) == exact(records), mode
        assert all(torch.equal(end[name], weights[name]) for name in weights), mode
        assert not torch.equal(start["projector.fc1.weight"], end["projector.fc1.weight"])
    command = ["sample.py", "--checkpoint", tmp_path / "full", "--prompt", "a cross", "--output", tmp_path / "a.png"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "sample.steps=2", "objective.repa_encoder=nowhere"])
    assert sample.main() == 0
    assert (tmp_path / "a.png").stat().st_size > 100


def test_the_term_is_trained_and_not_logged_as_the_loss(tmp_path: Path) -> None:
    """The first step's loss is that of a run without it; its gradient is not; later the weights differ."""
    plain, _, _ = trained(configured("dit", tmp_path, "run.name=plain"))
    aligned, _, _ = trained(configured("dit", tmp_path, "run.name=aligned", *REPA))
    assert plain[1]["loss"] == aligned[1]["loss"]
    assert plain[0]["val_loss"] == aligned[0]["val_loss"]
    assert plain[1]["grad_norm"] != aligned[1]["grad_norm"]
    assert plain[-1]["loss"] != aligned[-1]["loss"]
    assert not any("repa_loss" in record for record in plain)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_after_repa_until_the_projector_stays_and_nothing_is_encoded(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then the run is that without the key; from then on its steps are those of a run without REPA. A resume from
    a checkpoint before, at or after the border is exact."""
    keys = (*REPA, "train.steps=6", "train.checkpoint_every=1", "run.keep_last=9", "train.sample_every=0")
    keys = (*keys, "optim.weight_decay=0.1", f"parallel.precision={precision}", "optim.lr=8e-3")
    encoded: list[int] = []
    encode = FeatureEncoder.encode
    monkeypatch.setattr(FeatureEncoder, "encode", lambda *given: encoded.append(1) or encode(*given))
    always, _, _ = trained(configured("mmdit", tmp_path, *keys, "run.name=always"))
    assert len(encoded) == 6
    records, _, weights = trained(configured("mmdit", tmp_path, *keys, "objective.repa_until=3", "run.name=whole"))
    assert len(encoded) == 6 + 3
    assert exact(records[:4]) == exact(always[:4])
    assert [record["step"] for record in records if "repa_loss" in record] == [1, 2, 3]
    assert records[4]["loss"] == always[4]["loss"]  # the fourth step begins from the same weights
    assert records[4]["grad_norm"] != always[4]["grad_norm"]
    assert records[5]["loss"] != always[5]["loss"]
    for step in (2, 3, 4):
        shutil.copytree(tmp_path / "whole", tmp_path / f"from_{step}")
        for later in range(step + 1, 7):
            shutil.rmtree(tmp_path / f"from_{step}" / "checkpoints" / f"step_{later:08d}")
        config = configured("mmdit", tmp_path, *keys, "objective.repa_until=3", f"run.name=from_{step}")
        resumed, start, end = trained(config)
        assert exact(resumed) == exact(records), step
        assert all(torch.equal(end[name], weights[name]) for name in weights), step
        moved = {name for name in weights if not torch.equal(start[name], end[name])}
        assert any(name.startswith("projector.") for name in moved) == (step < 3), step
        assert any(name.startswith("blocks.") for name in moved), step


def test_repa_until_is_a_key_of_the_schedule(tmp_path: Path) -> None:
    keys = (*REPA, "train.sample_every=0", "run.name=a")
    first = configured("dit", tmp_path, *keys, "train.steps=2")
    trained(first)
    with pytest.raises(ConfigError, match=r"objective.repa_until: None in the checkpoint, 3 now"):
        check_resume(plain(first), configured("dit", tmp_path, *keys, "train.steps=2", "objective.repa_until=3"), 2)
    longer = ("run.allow_change=[train.steps,objective.repa_until]", "objective.repa_until=3")
    records, _, _ = trained(configured("dit", tmp_path, *keys, *longer))
    assert [record["step"] for record in records if "repa_loss" in record] == [1, 2, 3]


def test_model_flops_of_a_step_are_without_the_projector_once_it_is_off(tmp_path: Path) -> None:
    with built(configured("dit", tmp_path, *REPA, "objective.repa_until=3", "run.name=a")) as run:
        assert [run.alignment_at(step) is not None for step in range(5)] == [True, True, True, False, False]
        aligned, plain = (run.plan.image_flops(0, None, on) for on in (True, False))
        assert plain == image_flops(configured("dit", tmp_path)) < aligned


def test_zero_weight_is_no_projector(tmp_path: Path) -> None:
    config = configured("dit", tmp_path, *REPA, "objective.repa_weight=0")
    assert config.projector is None
    assert configured("dit", tmp_path, *REPA).projector == ProjectorConfig(48, 32)


def test_the_features_see_the_crop_and_flip_that_are_trained_on(tmp_path: Path) -> None:
    """Flipped images give the features of flipped images: what is encoded is the batch itself."""
    config = configured("dit", tmp_path, *REPA, "data.flip=1.0", "run.name=flipped")
    with built(config) as run:
        assert run.alignment is not None
        batch = next(run.batches())[0].batch
        encoder = load_feature_encoder(ENCODER, 32, "cpu", torch.float32)
        features = encoder.encode(batch.images, 8, 8)
        turned = replace(batch, images=batch.images.flip(-1))
        aligned = run.alignment.losses(features, run.alignment.features(batch))
        assert aligned.tolist() == pytest.approx([-1.0] * len(batch.names), abs=1e-5)
        assert (run.alignment.losses(features, run.alignment.features(turned)) > aligned).all()
