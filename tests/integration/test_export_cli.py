"""Exported folders sample as launch/sample.py does; what was exported comes back and trains on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline, PixArtAlphaPipeline
from diffusers.pipelines.dit import pipeline_dit

from data.debug import ensure_debug_assets
from tests.distributed.runs import weights
from tests.helpers.exports import config_of, random_checkpoint, run_export
from trainer.build.inference import Inference, build_inference
from trainer.build.run import build_run
from trainer.checkpoint.find import find_checkpoint
from trainer.checkpoint.meta import read_meta
from trainer.config.load import parse
from trainer.evaluate.generate import images_from_prompts, initial_noise
from trainer.parallel.mesh import World

FOLDED_HERE = {
    kind: {"final.weight"} for kind in ("mmdit", "mmdit, FLUX.1", "pixart", "dit", "uvit")
}  # others by a power of two
CAPTIONS = ["a red circle on a blue background", "a Green cross", "a red circle on a blue background"]
CLASSES = ["3", "23", "0"]
RUNS: dict[str, tuple[str, ...]] = {
    "mmdit": ("model.width=96", "objective.shift_base_tokens=16", "mup.base_depth=1"),
    "mmdit, FLUX.1": (
        "model.width=96",
        "objective.shift_base_tokens=16",
        "mup.base_depth=1",
        "model.positions=rope",
        "model.single_depth=1",
    ),
    "pixart": ("model.width=96", "model.micro_conditions=true", "mup.base_width=48"),
    "dit": ("model.width=96", "model.time_freq_shift=1", "sample.guidance_channels=2", "sample.sampler=ddim"),
    "uvit": ("model.width=96",),
}
TWINS = ("mmdit", "mmdit, FLUX.1", "pixart", "dit")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights of each backbone."""
    folder = tmp_path_factory.mktemp("checkpoints")
    ensure_debug_assets()
    for kind, overrides in RUNS.items():
        random_checkpoint(folder / kind, config_of(kind, *overrides))
    return {kind: folder / kind for kind in RUNS}


def inference_of(folder: Path, world: World, *overrides: str) -> Inference:
    checkpoint = find_checkpoint(folder)
    return build_inference(parse(read_meta(checkpoint)["config"], "checkpoint", overrides), checkpoint, world)


def our_images(made: Inference, world: World, prompts: list[str], seed: int) -> torch.Tensor:
    """What launch/sample.py makes of the prompts, before it is rounded to 8 bits: [n, H, W, 3] in [0, 1]."""
    seen = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        seen.append(made.encoders.decode(latents))
        return seen[-1]

    images_from_prompts(dataclasses.replace(made.generate, decode=decode), prompts, seed, world.control)
    return (seen[0].permute(0, 2, 3, 1) + 1) / 2


def load(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # DPM-Solver's use of numpy
@pytest.mark.parametrize("kind", TWINS)
def test_the_folders_pipeline_samples_as_we_do(
    kind: str, checkpoints: dict[str, Path], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_export(monkeypatch, "--checkpoint", checkpoints[kind], "--output", tmp_path / "out")
    prompts = CLASSES if kind == "dit" else CAPTIONS
    # In float64: float32's rounding grows over the steps of a sampler, on each processor another way.
    made = inference_of(checkpoints[kind], world, "parallel.precision=fp64")
    ours = our_images(made, world, prompts, seed=5)
    assert ours.std() > 0.05
    shape = (3, 32, 32)
    _, noise = initial_noise(5, range(len(prompts)), shape, torch.device("cpu"))
    pipeline = load(tmp_path / "out").to(torch.float64)
    theirs = pipeline(prompts, latents=noise, output_type="np").images
    assert np.abs(theirs - ours.numpy()).max() <= 3e-5
    pipeline.to(torch.float32)
    # The test would see the prompts in another order, and the live weights.
    assert (
        np.abs(pipeline([*prompts[1:], prompts[0]], latents=noise, output_type="np").images - ours.numpy()).max() > 1e-3
    )
    own = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert own["_class_name"] == ["pipeline", "MuDiTPipeline"]
    card = (tmp_path / "out" / "README.md").read_text()
    meta = read_meta(find_checkpoint(checkpoints[kind]))
    assert meta["mup"]["sha256"] in card


def test_the_folders_pipeline_does_what_users_of_diffusers_expect(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_export(monkeypatch, "--checkpoint", checkpoints["mmdit"], "--output", tmp_path / "out")
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} >= {"pipeline.py", "model_index.json", "transformer"}
    pipeline = load(tmp_path / "again")
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def sample(prompt: Any, start: torch.Tensor = noise[:1], **options: Any) -> np.ndarray:
        return pipeline(prompt, latents=start, output_type="np", **options).images

    plain = sample("a cross")
    assert np.array_equal(plain, load(tmp_path / "out")("a cross", latents=noise[:1], output_type="np").images)
    assert np.array_equal(plain, sample("a cross", negative_prompt=""))
    assert np.abs(sample("a cross", negative_prompt="a red circle") - plain).max() > 1e-3
    # Away from what it goes to is nowhere: guidance does nothing.
    same = sample("a cross", negative_prompt="a cross", guidance_scale=3.0)
    assert np.abs(same - sample("a cross", guidance_scale=1.0)).max() < 1e-4
    several = sample(["a cross"], noise, num_images_per_prompt=2)
    assert np.abs(several - sample(["a cross", "a cross"], noise)).max() < 1e-5
    seen: list[int] = []

    def stop_after_two(pipe: Any, step: int, t: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert np.all(sample("a cross", callback_on_step_end=stop_after_two) == 0.5)
    assert seen == [0, 1]
    for wrong, message in (
        ({"height": 30}, "multiples of 4"),
        ({"height": 64, "width": 32}, r"multiples of 4 of at most 32, got 64 x 32"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"latents": noise}, r"of shape \[1, 3, 32, 32\], got \[2, 3, 32, 32\]"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "alone"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline("a cross", **wrong)


def test_encoders_by_reference(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for way in ("copy", "reference"):
        run_export(monkeypatch, "--checkpoint", checkpoints["mmdit"], "--output", tmp_path / way, "--encoders", way)
    assert not (tmp_path / "reference" / "text_encoder").exists()
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    copied, referred = (
        load(tmp_path / way)("a cross", latents=noise, output_type="np").images for way in ("copy", "reference")
    )
    assert np.array_equal(copied, referred)


# -------------------------------------------------------------------------------------------------- stock pipelines


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings: dict[str, Any] = {
            "block_out_channels": (4,) * 4, "norm_num_groups": 2, "latent_channels": 4, "scaling_factor": 0.3,
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        }  # fmt: skip
        AutoencoderKL(**settings).save_pretrained(folder)
    return folder


STOCK = {
    "dit": ("model.width=96", "model.time_freq_shift=1", "model.num_classes=1000", "sample.steps=5"),
    "pixart": ("text_encoder.max_length=120", "model.pos_embed_base_size=8", "sample.steps=5"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", STOCK)
def test_stock_pipelines_sample_as_we_do(
    kind: str, vae: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = (f"autoencoder.path={vae}", "autoencoder.channels=4", "autoencoder.downsample=8", "data.resolution=256")
    random_checkpoint(tmp_path / "run", config_of(kind, *latents, *STOCK[kind]))
    run_export(monkeypatch, "--checkpoint", tmp_path / "run", "--output", tmp_path / "out")
    assert not (tmp_path / "out" / "pipeline.py").exists()
    prompts = ["3", "999"] if kind == "dit" else ["a red circle", "a green cross"]
    made = inference_of(tmp_path / "run", world)
    ours = our_images(made, world, prompts, seed=5).numpy()
    _, noise = initial_noise(5, range(2), (4, 32, 32), torch.device("cpu"))
    pipeline: Any = load(tmp_path / "out")
    given = {"num_inference_steps": 5, "guidance_scale": made.config.sample.guidance, "output_type": "np"}
    if kind == "dit":
        assert type(pipeline).__name__ == DiTPipeline.__name__
        monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda **_: noise)  # it takes no latents
        theirs = pipeline([int(p) for p in prompts], **given).images
    else:
        assert type(pipeline).__name__ == PixArtAlphaPipeline.__name__
        theirs = pipeline(prompts, latents=noise, clean_caption=False, **given).images
    assert ours.std() > 0.01
    assert np.abs(theirs - ours).max() <= 1e-4


# ------------------------------------------------------------------------------------------------ out, and in again


def validated(kind: str, start: Path, world: World, folder: Path) -> float:
    """Loss on the fixed bank of a new run that starts from a checkpoint's weights."""
    config = config_of(kind, *RUNS[kind], f"run.init_from={start}", f"run.dir={folder}", "train.sample_every=0")
    made = build_run(config, world)
    loss = made.validate()["val_loss"]
    made.metrics.close()
    assert made.lock is not None
    made.lock.close()
    return loss


@pytest.mark.parametrize(("kind", "form"), [*((kind, "diffusers") for kind in TWINS), ("uvit", "official")])
def test_what_was_exported_trains_on(
    kind: str, form: str, checkpoints: dict[str, Path], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight comes back, the one that is folded to a rounding (m is 3), and so does the loss."""
    out, back = tmp_path / "out", tmp_path / "back"
    config = f"{kind.partition(',')[0]}_debug_mup.yaml"
    run_export(monkeypatch, "--checkpoint", checkpoints[kind], "--output", out, "--weights", "live", "--format", form)
    run_export(monkeypatch, "--import", out, "--config", config, "--output", back, *RUNS[kind])
    before, after = weights(checkpoints[kind]), weights(back)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= FOLDED_HERE[kind]
    assert all(torch.allclose(before[name], after[name], rtol=2.4e-7, atol=0) for name in changed)
    losses = [validated(kind, start, world, tmp_path / start.name) for start in (checkpoints[kind], back)]
    assert abs(losses[0] - losses[1]) <= 1e-6 * losses[0]
