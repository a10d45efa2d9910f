"""Frozen image autoencoders of diffusers: images become latents, given by their moments, and latents become images."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from ..config import NONE, AutoencoderConfig
from ..errors import DataError
from .loading import at_least_float32, fingerprint_of, freeze, load_error, quieten, unit_range, weights_digest
from .weights import check_whole

_VAE_FIELDS = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "act_fn",
    "scaling_factor",
    "shift_factor",
    "use_quant_conv",
    "use_post_quant_conv",
    "mid_block_add_attention",
)
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
    """A frozen diffusers AutoencoderKL whose latents are (z - shift) * scale.

    channels: C. downsample: pixels per latent side. fingerprint: identifies the weights, whatever their path. weights:
    their digest (see weights_digest).
    """

    def __init__(self, model: AutoencoderKL, scale: float, shift: float, fingerprint: str) -> None:
        self.model, self.scale, self.shift, self.fingerprint = model, scale, shift, fingerprint
        self.weights: str | None = None
        self.channels = int(model.config["latent_channels"])
        self.downsample = 2 ** (len(model.config["block_out_channels"]) - 1)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> Moments:
        """uint8 [b, 3, R, R] -> Moments [b, C, R / downsample, R / downsample], fp32 (fp64 where the dtype is fp64)."""
        wide = at_least_float32(self.model.dtype)
        parts = []
        for part in _few(images):
            pixels = unit_range(part, self.model.device, wide).to(self.model.dtype)
            posterior = self.model.encode(pixels).latent_dist  # type: ignore[union-attr] (a tuple if asked for)
            parts.append((posterior.mean.to(wide), posterior.logvar.to(wide)))
        mean, logvar = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Moments((mean - self.shift) * self.scale, logvar + 2.0 * math.log(self.scale))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [b, C, h, w] -> images [b, 3, R, R], clamped to [-1, 1], fp32 (fp64 where the dtype is fp64)."""
        wide = at_least_float32(self.model.dtype)
        z = latents.to(self.model.device, wide) / self.scale + self.shift
        parts = _few(z.to(self.model.dtype), self.downsample)
        images = [self.model.decode(part).sample.to(wide) for part in parts]  # type: ignore[union-attr] (as above)
        return torch.cat(images).clamp(-1.0, 1.0)


def load_autoencoder(
    cfg: AutoencoderConfig, device: torch.device | str, dtype: torch.dtype
) -> Autoencoder | PixelAutoencoder:
    """Load an AutoencoderKL from safetensors, with the scale and shift of its own config.json; PixelAutoencoder where
    autoencoder.path is none.

    The config.json of SD 1's autoencoders is older than the field scaling_factor: their scale is known. Raises
    DataError where the autoencoder cannot be loaded, where another names no scaling_factor, and where its channels or
    its downsampling are not those of the config.
    """
    if cfg.path == NONE:
        loaded: Autoencoder | PixelAutoencoder = PixelAutoencoder(device, dtype)
    else:
        quieten()
        where: dict[str, Any] = {"subfolder": cfg.subfolder} if cfg.subfolder else {}
        try:
            # The file itself is read: the model's config would replace a missing scaling_factor by that of SD 1.
            stored: Any = AutoencoderKL.load_config(cfg.path, **where)
            if not isinstance(stored, dict):
                raise ValueError("config.json holds no object")
            _check_kind(cfg.path, stored)
            told = {"output_loading_info": True, "ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}
            loading: Any = AutoencoderKL.from_pretrained(
                cfg.path, torch_dtype=dtype, use_safetensors=True, **told, **where
            )
            model, found = loading
        except DataError:
            raise
        except Exception as error:  # damaged files raise errors of the library's own
            raise load_error("autoencoder.path", cfg.path, cfg.subfolder, error) from error
        check_whole(model, found, "autoencoder.path", cfg.path)
        if "scaling_factor" not in stored and _is_of_sd1(stored):
            stored = {**stored, "scaling_factor": _SD1_SCALE}
        scale, shift = stored.get("scaling_factor"), stored.get("shift_factor")
        if scale is None:
            raise DataError(
                f"autoencoder.path: config.json of {cfg.path!r} has no scaling_factor; add the value that belongs "
                "to these weights (SD 0.18215, SDXL 0.13025, SD3 1.5305 with shift_factor 0.0609)"
            )
        freeze(model, device)
        fingerprint = fingerprint_of(stored, _VAE_FIELDS, model, "AutoencoderKL")
        loaded = Autoencoder(model, float(scale), float(shift or 0.0), fingerprint)
        loaded.weights = weights_digest(model, cfg.path, cfg.subfolder)
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


def _check_kind(path: str, stored: Mapping[str, Any]) -> None:
    """Raise DataError where a config.json is that of another kind of autoencoder, or of a pipeline."""
    kind = stored.get("_class_name", AutoencoderKL.__name__)
    if kind != AutoencoderKL.__name__:
        raise DataError(
            f"autoencoder.path: {path!r} is a {kind}; only AutoencoderKL is supported, the kind of SD 1, SDXL, SD 3 "
            "and FLUX.1 (of a pipeline name the folder vae: autoencoder.subfolder=vae)"
        )


def _is_of_sd1(stored: Mapping[str, Any]) -> bool:
    """Whether a config.json is older than the field scaling_factor (diffusers 0.13) and has the shape of SD 1's
    autoencoders, as sd-vae-ft-ema has.

    Two values were in use when the field came: SD 1's, and 0.08333 of the 4x upscaler, which has three blocks.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", str(stored.get("_diffusers_version", "")))[:2])
    shape = stored.get("latent_channels"), len(stored.get("block_out_channels", ()))
    return () < version < (0, 13) and shape == (4, 4)
