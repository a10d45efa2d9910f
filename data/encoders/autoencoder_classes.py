"""How each class of diffusers' autoencoders is used: what its latents are, and how its own pipelines normalise them.

Another class is one more row of CLASSES.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

Config = Mapping[str, Any]

STATISTICS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Fields of a config.json that may say how latents are normalised."""


class Normalisation(NamedTuple):
    """A model is trained on (z - shift) * scale: numbers, or float64 tensors [C, 1, 1] of a number for each channel."""

    scale: float | torch.Tensor
    shift: float | torch.Tensor


class MissingStatistics(ValueError):
    """A config.json does not say how its latents are normalised; the text names what is missing."""


@dataclass(frozen=True)
class AutoencoderClass:
    """model: the class. fields: of its config.json, which tell architectures apart. latent_channels: its field that
    counts the channels of its own latents. sides: how many of its pixels make one side of such a latent.

    normalisation: (config.json, the loaded model) -> of its latents; raises MissingStatistics. variance: whether
    latents are distributions, and not the encoder's output itself. video: images are videos of one frame. patch:
    latents of patch x patch neighbours are stacked as channels, and then normalised. fixed: fields of config.json with
    the only value that is supported.
    """

    model: type[Any]
    fields: tuple[str, ...]
    latent_channels: str
    sides: Callable[[Config], int]
    normalisation: Callable[[Config, Any], Normalisation]
    variance: bool = True
    video: bool = False
    patch: int = 1
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _by_blocks(field: str) -> Callable[[Config], int]:
    """Each block but the last halves the sides."""
    return lambda config: 2 ** (len(config[field]) - 1)


def _scaling_factor(config: Config, model: Any) -> Normalisation:
    """scaling_factor and shift_factor; or, where latents_mean and latents_std are given, these and the factor."""
    scale = config.get("scaling_factor")
    if scale is None:
        raise MissingStatistics("scaling_factor")
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return Normalisation(float(scale), float(config.get("shift_factor") or 0.0))
    per_channel = _mean_and_std(config, model)
    return Normalisation(float(scale) * per_channel.scale, per_channel.shift)


def _mean_and_std(config: Config, model: Any) -> Normalisation:
    """latents_mean and latents_std, a number for each channel."""
    for field in ("latents_mean", "latents_std"):
        if config.get(field) is None:
            raise MissingStatistics(field)
    mean, std = (
        torch.tensor(config[field], dtype=torch.float64).flatten() for field in ("latents_mean", "latents_std")
    )
    return Normalisation((1 / std)[:, None, None], mean[:, None, None])


def _batch_norm(config: Config, model: Any) -> Normalisation:
    """The running statistics of the layer bn, which are stored as weights."""
    mean, variance = (buffer.double() for buffer in (model.bn.running_mean, model.bn.running_var))
    return Normalisation((1 / (variance + model.bn.eps).sqrt())[:, None, None], mean[:, None, None])


_BLOCKS = ("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block")
_CONVOLUTIONS = ("norm_num_groups", "act_fn", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
_DC_HALF = ("block_types", "block_out_channels", "layers_per_block", "qkv_multiscales")

CLASSES: dict[str, AutoencoderClass] = {
    "AutoencoderKL": AutoencoderClass(
        AutoencoderKL,
        (*_BLOCKS, *_CONVOLUTIONS[:2], "scaling_factor", "shift_factor", *_CONVOLUTIONS[2:]),
        "latent_channels",
        _by_blocks("block_out_channels"),
        _scaling_factor,
    ),
    "AutoencoderKLFlux2": AutoencoderClass(
        AutoencoderKLFlux2,
        (*_BLOCKS, *_CONVOLUTIONS, "decoder_block_out_channels"),
        "latent_channels",
        _by_blocks("block_out_channels"),
        _batch_norm,
        patch=2,
        fixed={"patch_size": [2, 2]},
    ),
    "AutoencoderDC": AutoencoderClass(
        AutoencoderDC,
        (
            "latent_channels",
            "attention_head_dim",
            *(f"encoder_{field}" for field in _DC_HALF),
            *(f"decoder_{field}" for field in _DC_HALF),
            "upsample_block_type",
            "downsample_block_type",
            "decoder_norm_types",
            "decoder_act_fns",
            "scaling_factor",
        ),
        "latent_channels",
        _by_blocks("encoder_block_out_channels"),
        _scaling_factor,
        variance=False,
    ),
    "AutoencoderKLQwenImage": AutoencoderClass(
        AutoencoderKLQwenImage,
        ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", "input_channels"),
        "z_dim",
        _by_blocks("dim_mult"),
        _mean_and_std,
        video=True,
        fixed={"input_channels": 3},
    ),
}
