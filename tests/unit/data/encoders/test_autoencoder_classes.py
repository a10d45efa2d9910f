"""Each class of autoencoders against diffusers' own use of it, on random weights of small configs."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_img2img import QwenImageImg2ImgPipeline
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.batch import Batch, split
from data.config import AutoencoderConfig
from data.debug import ensure_debug_assets
from data.encoders.autoencoder import Autoencoder, load_autoencoder
from data.encoders.text import load_text_encoder
from data.errors import DataError
from data.index import ImageTextIndex
from data.precomputed_write import Precompute
from data.reader import ImageTextReader
from data.storage import open_shards
from data.write_shards import write_shards
from trainer.config.load import load_config

_KL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "latent_channels": 4,
}
_HALVES = ("encoder", "decoder")
_DC_HALF: dict[str, Any] = {
    "block_types": ("ResBlock", "EfficientViTBlock"),
    "block_out_channels": (8, 16),
    "layers_per_block": (1, 1),
    "qkv_multiscales": ((), (5,)),
}
_MEAN, _STD = [0.5, -0.25, 1.0, -2.0], [2.0, 0.5, 1.5, 3.0]


def flux2() -> AutoencoderKLFlux2:
    model = AutoencoderKLFlux2(**_KL)
    assert model.bn.running_mean is not None
    assert model.bn.running_var is not None
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.3, 4.0)
    return model


def dc() -> AutoencoderDC:
    halves = {f"{half}_{key}": value for half in _HALVES for key, value in _DC_HALF.items()}
    return AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.41407, **halves)


def qwen() -> AutoencoderKLQwenImage:
    sizes: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1}
    return AutoencoderKLQwenImage(**sizes, temperal_downsample=[True], latents_mean=_MEAN, latents_std=_STD)


def per_channel_kl() -> AutoencoderKL:
    given: dict[str, Any] = {**_KL, "scaling_factor": 0.5, "latents_mean": _MEAN, "latents_std": _STD}
    return AutoencoderKL(**given)


# class -> (channels, downsample)
MADE: dict[str, tuple[Callable[[], Any], int, int]] = {
    "AutoencoderKLFlux2": (flux2, 16, 4),
    "AutoencoderDC": (dc, 4, 2),
    "AutoencoderKLQwenImage": (qwen, 4, 2),
    "AutoencoderKL": (per_channel_kl, 4, 2),
}


def saved(folder: Path, name: str) -> Any:
    torch.manual_seed(0)
    model = MADE[name][0]().eval()
    model.save_pretrained(folder)
    return model


def loaded(folder: Path, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Autoencoder:
    _, channels, downsample = MADE[name]
    cfg = AutoencoderConfig(**{"path": str(folder), "channels": channels, "downsample": downsample} | options)
    autoencoder = load_autoencoder(cfg, "cpu", dtype)
    assert isinstance(autoencoder, Autoencoder)
    return autoencoder


def rewrite_config(folder: Path, **changes: Any) -> None:
    """None takes the field out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def theirs(name: str, model: Any, pixels: Tensor, noise: Tensor) -> Tensor:
    """Latents as diffusers' pipelines make them. noise: with which a distribution is sampled, where it is."""
    if name == "AutoencoderKLFlux2":  # its pipeline takes the mean
        pipe: Any = SimpleNamespace(vae=model, _patchify_latents=Flux2Pipeline._patchify_latents)
        return Flux2Pipeline._encode_vae_image(pipe, pixels, None)  # type: ignore[arg-type] (no generator: it takes the mean)
    if name == "AutoencoderKLQwenImage":
        pipe = SimpleNamespace(vae=model, latent_channels=4)
        encode: Any = QwenImageImg2ImgPipeline._encode_vae_image
        return encode(pipe, pixels[:, :, None], torch.Generator().manual_seed(5))[:, :, 0]
    if name == "AutoencoderDC":
        return model.encode(pixels).latent * model.config.scaling_factor
    posterior, mean, std = model.encode(pixels).latent_dist, *(torch.tensor(x).view(1, -1, 1, 1) for x in (_MEAN, _STD))
    return (posterior.mean + posterior.std * noise - mean) * model.config.scaling_factor / std


def their_images(name: str, model: Any, latents: Tensor) -> Tensor:
    """The last lines of the pipelines, up to [-1, 1]."""
    if name == "AutoencoderKLFlux2":
        std = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)
        z = Flux2Pipeline._unpatchify_latents(latents * std + model.bn.running_mean.view(1, -1, 1, 1))
        return model.decode(z, return_dict=False)[0]
    if name == "AutoencoderKLQwenImage":
        mean = torch.tensor(model.config.latents_mean).view(1, 4, 1, 1, 1)
        std = 1.0 / torch.tensor(model.config.latents_std).view(1, 4, 1, 1, 1)
        return model.decode(latents[:, :, None] / std + mean, return_dict=False)[0][:, :, 0]
    if name == "AutoencoderDC":
        return model.decode(latents / model.config.scaling_factor, return_dict=False)[0]
    mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (_MEAN, _STD))
    return model.decode(latents * std / model.config.scaling_factor + mean, return_dict=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_latents_and_images_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    model, (_, channels, downsample) = saved(tmp_path, name).double(), MADE[name]
    ours = loaded(tmp_path, name, torch.float64)
    assert (ours.channels, ours.downsample) == (channels, downsample)
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pixels: Any = VaeImageProcessor.normalize(images.double() / 255)
    mean, logvar = ours.encode(images)
    assert mean.shape == (2, channels, 16 // downsample, 24 // downsample)
    latents = mean
    noise = randn_tensor((2, 4, 1, 8, 12), generator=torch.Generator().manual_seed(5), dtype=torch.float64)[:, :, 0]
    if name == "AutoencoderDC":
        assert logvar is None
    else:
        assert logvar is not None
        assert logvar.shape == mean.shape
        if name != "AutoencoderKLFlux2":  # whose pipeline never samples
            latents = mean + (0.5 * logvar).exp() * noise
    torch.testing.assert_close(latents, theirs(name, model, pixels, noise), rtol=1e-6, atol=1e-6)
    expected = their_images(name, model, latents).clamp(-1, 1)
    torch.testing.assert_close(ours.decode(latents), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_variance_of_flux2_is_that_of_its_mean(tmp_path: Path) -> None:
    """Normalised as the mean is: a sample of the posterior, patchified and normalised, is one of the moments."""
    model = saved(tmp_path, "AutoencoderKLFlux2").double()
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    mean, logvar = loaded(tmp_path, "AutoencoderKLFlux2", torch.float64).encode(images)
    assert logvar is not None
    posterior = model.encode(images.double() / 127.5 - 1).latent_dist
    noise = torch.randn(posterior.mean.shape, dtype=torch.float64)
    z = Flux2Pipeline._patchify_latents(posterior.mean + posterior.std * noise)
    std = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)
    expected = (z - model.bn.running_mean.view(1, -1, 1, 1)) / std
    ours = mean + (0.5 * logvar).exp() * Flux2Pipeline._patchify_latents(noise)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_one_message_where_channels_or_downsample_differ(name: str, tmp_path: Path) -> None:
    saved(tmp_path, name)
    _, channels, downsample = MADE[name]
    with pytest.raises(DataError, match=rf"autoencoder\.channels is 7, .* has {channels}: set it to {channels}"):
        loaded(tmp_path, name, channels=7)
    with pytest.raises(DataError, match=rf"autoencoder\.downsample is 64, .* has {downsample}: set it"):
        loaded(tmp_path, name, downsample=64)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("AutoencoderDC", "scaling_factor"),
        ("AutoencoderKLQwenImage", "latents_mean"),
        ("AutoencoderKLQwenImage", "latents_std"),
    ],
)
def test_statistics_that_are_missing_are_not_made_up(name: str, missing: str, tmp_path: Path) -> None:
    """The classes have defaults, which belong to other weights."""
    saved(tmp_path, name)
    rewrite_config(tmp_path, **{missing: None})
    with pytest.raises(DataError, match=f"has no {missing}; fetch config.json again"):
        loaded(tmp_path, name)


@pytest.mark.parametrize(("std", "said"), [([1.0] * 3, "of 3 channels, and latents of 4"), ([1.0, 0, 1, 1], "above 0")])
def test_statistics_that_cannot_be(std: list[float], said: str, tmp_path: Path) -> None:
    saved(tmp_path, "AutoencoderKLQwenImage")
    rewrite_config(tmp_path, latents_std=std)
    with pytest.raises(DataError, match=said):
        loaded(tmp_path, "AutoencoderKLQwenImage")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("AutoencoderKLQwenImage", "latents_std", [1, "x"]),
        ("AutoencoderKLQwenImage", "latents_mean", [1, [2, 3]]),
        ("AutoencoderDC", "scaling_factor", "abc"),
        ("AutoencoderKL", "latents_std", {"0": 1}),
    ],
)
def test_statistics_that_are_no_numbers(name: str, field: str, value: Any, tmp_path: Path) -> None:
    saved(tmp_path, name)
    rewrite_config(tmp_path, **{field: value})
    with pytest.raises(DataError, match=rf"must normalise latents by numbers.*{re.escape(f'{field!r}: {value}'[:9])}"):
        loaded(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [("AutoencoderKLFlux2", "patch_size", [1, 1]), ("AutoencoderKLQwenImage", "input_channels", 4)],
)
def test_values_that_are_not_supported(name: str, field: str, value: Any, tmp_path: Path) -> None:
    saved(tmp_path, name)
    rewrite_config(tmp_path, **{field: value})
    with pytest.raises(DataError, match=rf"config\.json of '{tmp_path}' has {field} {re.escape(str(value))}; "):
        loaded(tmp_path, name)


def test_the_fingerprint_knows_the_statistics(tmp_path: Path) -> None:
    """They are no parameters, which alone it looked at."""
    saved(tmp_path / "a", "AutoencoderKLFlux2")
    saved(tmp_path / "b", "AutoencoderKLFlux2")
    one, same = (loaded(tmp_path / part, "AutoencoderKLFlux2") for part in "ab")
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint == loaded(tmp_path / "a", "AutoencoderKLFlux2", torch.float64).fingerprint
    file = tmp_path / "b" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["bn.running_var"][15] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    assert loaded(tmp_path / "b", "AutoencoderKLFlux2").fingerprint != one.fingerprint
    tensors["bn.running_var"][15] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match="not finite numbers"):
        loaded(tmp_path / "b", "AutoencoderKLFlux2")


@pytest.mark.slow
def test_latents_without_a_variance_are_stored_without_one(tmp_path: Path) -> None:
    """DC-AE's: training on the stored ones is given what training on the images is, but for fp16."""
    assets = ensure_debug_assets(tmp_path / "debug")
    saved(tmp_path / "vae", "AutoencoderDC")
    rng = np.random.default_rng(0)
    pictures = []
    for number in range(8):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        pictures.append((f"{number}", buffer.getvalue(), "png", f"caption {number}"))
    write_shards(pictures, tmp_path / "source" / "s", 8)
    where = f"autoencoder={{path: {tmp_path / 'vae'}, channels: 4, downsample: 2}}"
    config = load_config("mmdit_debug_mup", [f"text_encoder.path={assets}/t5", where, "data.resolution=32"])
    source = ImageTextIndex(open_shards(str(tmp_path / "source")))
    text = load_text_encoder(config.text_encoder, "cpu", torch.float32)
    autoencoder = loaded(tmp_path / "vae", "AutoencoderDC")
    prefix = tmp_path / "out" / "train"
    Precompute(source, config.data, autoencoder, text, None, prefix, None, False, 8, "fp32").run(0, 1, lambda _: None)
    stored = ImageTextIndex(open_shards(str(tmp_path / "out")))
    assert stored.dataset is not None
    stored.dataset.check_encoder("autoencoder", autoencoder.fingerprint)
    assert stored.dataset.latents_shape == (1, 1, 4, 16, 16)

    def first(index: ImageTextIndex) -> Batch:
        reader = ImageTextReader(index, config.data, 3, 4, 0.0, 0, 1, 4)
        return next(reader.batches(0))[1][0]

    of_images, of_latents = first(source), first(stored)
    assert of_images.images is not None
    assert of_latents.latents is not None
    assert of_latents.logvar is None
    assert torch.equal(of_images.keys, of_latents.keys)
    mean, _ = autoencoder.encode(of_images.images)
    torch.testing.assert_close(of_latents.latents.float(), mean, rtol=2e-3, atol=1e-3)
    assert torch.equal(split(of_latents, 2)[1].latents, of_latents.latents[2:])  # type: ignore[arg-type] (it has latents)
