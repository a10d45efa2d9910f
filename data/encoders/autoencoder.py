"""Frozen image autoencoders of diffusers: images become latents, given by their moments, and latents become images."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from ..config import NONE, AutoencoderConfig
from ..errors import DataError
from .autoencoder_classes import CLASSES, STATISTICS, AutoencoderClass, MissingStatistics, Normalisation
from .loading import at_least_float32, fingerprint_of, freeze, load_error, quieten, unit_range, weights_digest
from .weights import check_whole

_SD1_SCALE = 0.18215
_PIXELS = 2**21  # the most that an autoencoder takes at once


class Moments(NamedTuple):
    """The posterior of scaled latents: mean [b, C, h, w], and logvar of the same shape (None: no variance)."""

    mean: torch.Tensor
    logvar: torch.Tensor | None


def _few(tensor: torch.Tensor, downsample: int = 1) -> tuple[torch.Tensor, ...]:
    """A batch [b, C, h, w] in parts of so many images that an autoencoder's widest layer (128 channels in fp32) takes
    about 1 GiB. downsample: pixels per latent side, where the batch is of latents."""
    pixels = tensor.shape[-2] * tensor.shape[-1] * downsample**2
    return tensor.split(max(1, _PIXELS // pixels))


class PixelAutoencoder:
    """No autoencoder: the latents are the pixels in [-1, 1]."""

    channels, downsample = 3, 1
    fingerprint, weights = "pixels", None

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, at_least_float32(dtype)

    def encode(self, images: torch.Tensor) -> Moments:
        """uint8 [b, 3, R, R] -> pixels [b, 3, R, R], fp32 (fp64 where the dtype is fp64), without a variance."""
        return Moments(unit_range(images, self._device, self._dtype), None)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [b, 3, R, R] -> images [b, 3, R, R], clamped to [-1, 1]."""
        return latents.to(self._dtype).clamp(-1.0, 1.0)


class Autoencoder:
    """A frozen autoencoder of diffusers, of one of CLASSES, whose latents are (z - shift) * scale.

    channels: C. downsample: pixels per latent side. scale, shift: as of Normalisation. variance: whether images are
    encoded as distributions. fingerprint: identifies the weights, whatever their path. weights: their digest (see
    weights_digest).
    """

    def __init__(self, model: Any, normalisation: Normalisation, fingerprint: str) -> None:
        self.model, self.fingerprint = model, fingerprint
        # On the device once, so that no step copies them there.
        self.scale, self.shift = (
            each.to(model.device) if isinstance(each, torch.Tensor) else each for each in normalisation
        )
        self.weights: str | None = None
        self._class = CLASSES[type(model).__name__]
        self.variance = self._class.variance
        self.channels = int(model.config[self._class.latent_channels]) * self._class.patch**2
        self.downsample = self._class.sides(model.config) * self._class.patch

    def declared(self) -> dict[str, Any]:
        """What a set of precomputed latents notes of them, as JSON can hold it."""
        scale, shift = (
            each.flatten().tolist() if isinstance(each, torch.Tensor) else each for each in (self.scale, self.shift)
        )
        return {"scale": scale, "shift": shift, **({} if self.variance else {"variance": False})}

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> Moments:
        """uint8 [b, 3, R, R] -> Moments [b, C, R / downsample, R / downsample], fp32 (fp64 where the dtype is fp64)."""
        wide = at_least_float32(self.model.dtype)
        parts = []
        for part in _few(images):
            pixels = unit_range(part, self.model.device, wide).to(self.model.dtype)
            parts.append([each.to(wide) for each in self._moments(pixels)])
        moments = [F.pixel_unshuffle(torch.cat(tensors), self._class.patch) for tensors in zip(*parts, strict=True)]
        scale, shift = self._normalisation(moments[0])
        mean = (moments[0] - shift) * scale
        if not self.variance:
            return Moments(mean, None)
        log_scale = scale.log() if isinstance(scale, torch.Tensor) else math.log(scale)
        return Moments(mean, moments[1] + 2.0 * log_scale)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [b, C, h, w] -> images [b, 3, R, R], clamped to [-1, 1], fp32 (fp64 where the dtype is fp64)."""
        wide = at_least_float32(self.model.dtype)
        z = latents.to(self.model.device, wide)
        scale, shift = self._normalisation(z)
        z = F.pixel_shuffle(z / scale + shift, self._class.patch)
        parts = _few(z.to(self.model.dtype), self.downsample // self._class.patch)
        images = []
        for part in parts:
            decoded = self.model.decode(part[:, :, None] if self._class.video else part).sample.to(wide)
            images.append(decoded[:, :, 0] if self._class.video else decoded)
        return torch.cat(images).clamp(-1.0, 1.0)

    def _moments(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """What the model itself gives for images [b, 3, R, R]: mean and log variance, or latents alone."""
        encoded = self.model.encode(pixels[:, :, None] if self._class.video else pixels)
        moments = [encoded.latent_dist.mean, encoded.latent_dist.logvar] if self.variance else [encoded.latent]
        return [each[:, :, 0] for each in moments] if self._class.video else moments

    def _normalisation(self, like: torch.Tensor) -> Normalisation:
        """Scale and shift in the type of a tensor."""
        scale, shift = (each.to(like) if isinstance(each, torch.Tensor) else each for each in (self.scale, self.shift))
        return Normalisation(scale, shift)


def load_autoencoder(
    cfg: AutoencoderConfig, device: torch.device | str, dtype: torch.dtype
) -> Autoencoder | PixelAutoencoder:
    """Load an autoencoder of one of CLASSES from safetensors, with what its own files say of its latents' scale;
    PixelAutoencoder where autoencoder.path is none.

    The config.json of SD 1's autoencoders is older than the field scaling_factor: their scale is known. Raises
    DataError where the autoencoder cannot be loaded, where another does not say how its latents are normalised, and
    where its channels or its downsampling are not those of the config.
    """
    loaded = PixelAutoencoder(device, dtype) if cfg.path == NONE else _load(cfg, device, dtype)
    for name, wanted, found in (
        ("channels", cfg.channels, loaded.channels),
        ("downsample", cfg.downsample, loaded.downsample),
    ):
        if wanted != found:
            raise DataError(
                f"autoencoder.{name} is {wanted}, but the autoencoder at path {cfg.path!r} has {found}: "
                f"set it to {found}"
            )
    return loaded


def _load(cfg: AutoencoderConfig, device: torch.device | str, dtype: torch.dtype) -> Autoencoder:
    quieten()
    where: dict[str, Any] = {"subfolder": cfg.subfolder} if cfg.subfolder else {}
    try:
        # The file itself is read: the model's config would replace what is missing by the defaults of its class.
        stored: Any = AutoencoderKL.load_config(cfg.path, **where)
        if not isinstance(stored, dict):
            raise ValueError("config.json holds no object")
        name, kind = _class_of(cfg.path, stored)
        _check_fixed(cfg.path, stored, name, kind)
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}
        autoencoder_class: Any = kind.model
        model, found = autoencoder_class.from_pretrained(
            cfg.path, torch_dtype=dtype, use_safetensors=True, **told, **where
        )
    except DataError:
        raise
    except Exception as error:  # damaged files raise errors of the library's own
        raise load_error("autoencoder.path", cfg.path, cfg.subfolder, error) from error
    check_whole(model, found, "autoencoder.path", cfg.path)
    if "scaling_factor" not in stored and name == "AutoencoderKL" and _is_of_sd1(stored):
        stored = {**stored, "scaling_factor": _SD1_SCALE}
    try:
        normalisation = kind.normalisation(stored, model)
    except MissingStatistics as missing:
        remedy = "fetch config.json again"
        if name == "AutoencoderKL":
            remedy = (
                "add the value that belongs to these weights (SD 0.18215, SDXL 0.13025, SD3 1.5305 with shift_factor "
                "0.0609)"
            )
        raise DataError(f"autoencoder.path: config.json of {cfg.path!r} has no {missing}; {remedy}") from None
    except (TypeError, ValueError, RuntimeError):
        given = {field: stored[field] for field in STATISTICS if field in stored}
        raise DataError(
            f"autoencoder.path: config.json of {cfg.path!r} must normalise latents by numbers, or lists of one for "
            f"each channel, got {given}; fetch config.json again"
        ) from None
    freeze(model, device)
    per_channel = [each.flatten().tolist() for each in normalisation if isinstance(each, torch.Tensor)]
    fingerprint = fingerprint_of(stored, kind.fields, model, [name, per_channel] if per_channel else name)
    loaded = Autoencoder(model, normalisation, fingerprint)
    _check_normalisation(loaded, cfg.path)
    loaded.weights = weights_digest(model, cfg.path, cfg.subfolder)
    return loaded


def _class_of(path: str, stored: Mapping[str, Any]) -> tuple[str, AutoencoderClass]:
    """The class that a config.json names; DataError where it is none of CLASSES, as that of a pipeline."""
    name = str(stored.get("_class_name", AutoencoderKL.__name__))
    if name not in CLASSES:
        raise DataError(
            f"autoencoder.path: {path!r} is a {name}; only these are supported: AutoencoderKL (SD 1, SDXL, SD 3, "
            "FLUX.1), AutoencoderKLFlux2 (FLUX.2), AutoencoderDC (DC-AE, Sana) and AutoencoderKLQwenImage (of a "
            "pipeline name the folder vae: autoencoder.subfolder=vae)"
        )
    return name, CLASSES[name]


def _check_fixed(path: str, stored: Mapping[str, Any], name: str, kind: AutoencoderClass) -> None:
    """Raise DataError where a config.json has another value than the only one that is supported."""
    for field, value in kind.fixed.items():
        if stored.get(field, value) != value:
            raise DataError(
                f"autoencoder.path: config.json of {path!r} has {field} {stored[field]}; of a {name} only {value} is "
                "supported"
            )


def _check_normalisation(autoencoder: Autoencoder, path: str) -> None:
    """Raise DataError where the statistics of the latents cannot be those of these channels."""
    for each in (autoencoder.scale, autoencoder.shift):
        values = torch.as_tensor(each)
        if values.ndim and len(values) != autoencoder.channels:
            raise DataError(
                f"autoencoder.path: {path!r} has statistics of {len(values)} channels, and latents of "
                f"{autoencoder.channels}: fetch it again"
            )
        if not bool(values.isfinite().all()) or (each is autoencoder.scale and not bool((values > 0).all())):
            raise DataError(
                f"autoencoder.path: the statistics by which {path!r} normalises latents are not finite numbers with "
                "standard deviations above 0: fetch it again"
            )


def _is_of_sd1(stored: Mapping[str, Any]) -> bool:
    """Whether a config.json is older than the field scaling_factor (diffusers 0.13) and has the shape of SD 1's
    autoencoders, as sd-vae-ft-ema has.

    Two values were in use when the field came: SD 1's, and 0.08333 of the 4x upscaler, which has three blocks.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", str(stored.get("_diffusers_version", "")))[:2])
    shape = stored.get("latent_channels"), len(stored.get("block_out_channels", ()))
    return () < version < (0, 13) and shape == (4, 4)
