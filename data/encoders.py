"""Frozen encoders: captions -> text states, images <-> latents."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    MT5EncoderModel,
    T5EncoderModel,
    UMT5EncoderModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.utils import logging as transformers_logging

from .config import NONE, AutoencoderConfig, DataError, TextEncoderConfig

# Of an encoder-decoder only the encoder is wanted; every other kind is loaded whole by AutoModel.
_ENCODERS: dict[str, Any] = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}
# fmt: off
_TEXT_FIELDS = (
    "model_type", "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "hidden_size",
    "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "feed_forward_proj", "relative_attention_num_buckets", "relative_attention_max_distance",
    "max_position_embeddings", "layer_norm_epsilon", "layer_norm_eps",
)
_VAE_FIELDS = (
    "in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block",
    "norm_num_groups", "act_fn", "scaling_factor", "shift_factor", "use_quant_conv",
    "use_post_quant_conv", "mid_block_add_attention",
)
_SD1_SCALE = 0.18215
_PIXELS = 2**21  # that an autoencoder takes at once
_DINO_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "use_swiglu_ffn",
    "hidden_act", "layer_norm_eps", "image_size", "patch_size", "num_register_tokens",
)
# fmt: on
_PROBE_TEXT = "The 2 quick brown foxes; \u00b5 'caf\u00e9' \u732b"  # tells tokenizers apart


class Moments(NamedTuple):
    """Posterior of scaled latents: mean [b, C, h, w]; logvar of the same shape, or None (a point)."""

    mean: torch.Tensor
    logvar: torch.Tensor | None


def quieten() -> None:
    """Load without progress bars and advice; rank 0's own messages are the user's log."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    # Reader processes are forked after the tokenizer was used; its threads would print a warning in each.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _load_error(key: str, path: str, subfolder: str | None, error: Exception) -> DataError:
    where = f"{path}/{subfolder}" if subfolder else path
    if Path(path).is_dir():
        detail = str(error).strip().splitlines()[0]
        return DataError(f"{key}: {where!r} cannot be loaded ({detail}); expected config.json and *.safetensors there")
    detail = str(error).strip().partition("\n")[0]
    return DataError(
        f"{key}: there is no folder {where!r}, and no model of that name can be had from the hub ({detail}); give a "
        "local folder with config.json and *.safetensors, or a hub id that this machine can reach and may read"
    )


def _fingerprint(config: Mapping[str, Any], names: Sequence[str], module: nn.Module, extra: object) -> str:
    """sha256 of architecture fields and of every parameter's name, shape and first 16 values.

    Values are compared as bf16, so that the precision of a run does not change the identity of its encoder.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([{n: config.get(n) for n in names}, extra], sort_keys=True).encode())
    for name, parameter in sorted(module.named_parameters()):
        values = parameter.detach().reshape(-1)[:16].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def model_fingerprint(model: Any, extra: object) -> str:
    """Identity of a Hugging Face model that only measures, whatever the path: its class, its weights, and `extra`, what
    else of its config and tokenizer moves figures."""
    return _fingerprint({}, (), model, [type(model).__name__, extra])


class TextEncoder:
    """A frozen Hugging Face text encoder.

    model: called with input_ids and attention_mask. tokenizer: of Hugging Face. width: its hidden size D.
    max_length: L, tokens a caption. fingerprint: identity of weights and tokenizer, whatever the path. in_step: the
    model is sharded over ranks, so every call runs it equally often, whatever the captions are.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, width: int, max_length: int, fingerprint: str) -> None:
        self.model = model
        self.width, self.max_length, self.fingerprint = width, max_length, fingerprint
        self.in_step = False
        self.tokenizer = tokenizer
        self._empty: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def encode(self, captions: list[str], length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Captions -> (states [b, L, D] in the encoder's dtype, zeros past a caption's end; mask bool [b, L]).

        length: L, where it is less than max_length. Equal captions are encoded once, the empty caption once for ever.
        Nothing waits for the device.
        """
        length = length or self.max_length
        if self._empty is None:
            self._empty = self._encode([""], self.max_length)
        distinct = [c for c in dict.fromkeys(captions) if c]
        parts = [(self._empty[0][:, :length], self._empty[1][:, :length])]
        if next(self.model.parameters()).dtype == torch.float64:
            # T5 takes its norms and softmax in fp32, which turns the last bits of a padded batch into 1e-8.
            # One by one, a caption's states do not depend on what else is in the batch.
            unused = [""] * (len(captions) - len(distinct)) if self.in_step else []
            parts += [self._encode([c], length) for c in [*distinct, *unused]]
        elif distinct or self.in_step:
            parts.append(self._encode(distinct or [""], length))
        states, mask = (torch.cat(tensors) for tensors in zip(*parts, strict=True))  # [1 + distinct, L, ...]
        row_of = {"": 0} | {caption: row for row, caption in enumerate(distinct, 1)}
        rows = torch.tensor([row_of[c] for c in captions]).to(states.device, non_blocking=True)
        return states[rows], mask[rows]

    def _encode(self, captions: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(states [n, L, D], mask [n, L]) from one forward at the longest true length, L = `length` tokens at most."""
        device = next(self.model.parameters()).device
        tokens = self.tokenizer(
            captions,
            padding="longest",
            padding_side="right",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        ids, mask = (tokens[key].to(device, non_blocking=True) for key in ("input_ids", "attention_mask"))
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # [n, longest, D]
        states = states.masked_fill(mask[..., None] == 0, 0.0)
        missing = length - mask.shape[1]
        return F.pad(states, (0, 0, 0, missing)), F.pad(mask.bool(), (0, missing))

    def save(self, model_folder: Path, tokenizer_folder: Path) -> None:
        """Write model and tokenizer as from_pretrained reads them."""
        self.model.save_pretrained(model_folder)  # type: ignore[operator]
        self.tokenizer.save_pretrained(tokenizer_folder)


def _freeze(module: nn.Module, device: torch.device | str) -> None:
    module.requires_grad_(False).eval().to(device)


def tokenizer_subfolder(cfg: TextEncoderConfig) -> str | None:
    """A diffusers pipeline keeps the tokenizer of text_encoder_3 in tokenizer_3."""
    return cfg.subfolder.replace("text_encoder", "tokenizer") if cfg.subfolder else None


def stored_text_encoder(cfg: TextEncoderConfig) -> tuple[str, torch.dtype]:
    """(class of transformers that loads it, type of its stored weights), from its config alone; DataError as below."""
    try:
        config = AutoConfig.from_pretrained(cfg.path, **({"subfolder": cfg.subfolder} if cfg.subfolder else {}))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _load_error("text_encoder.path", cfg.path, cfg.subfolder, error) from error
    return _ENCODERS.get(config.model_type, AutoModel).__name__, getattr(config, "dtype", None) or torch.float32


def _mask_unseen(*sizes: Any, **options: Any) -> torch.Tensor:
    """transformers' mask, but never left out where no token is masked: to find that out is a host sync in each call."""
    return eager_mask(*sizes, **options | {"allow_is_bidirectional_skip": False})


def load_text_encoder(
    cfg: TextEncoderConfig, device: torch.device | str, dtype: torch.dtype, shapes_only: bool = False
) -> TextEncoder:
    """Load the encoder of a T5 model, or any other Hugging Face encoder, from safetensors only.

    shapes_only: read no weights; the model is on the meta device and has no fingerprint.
    Raises DataError where it cannot be loaded or its width or length is not what the config says.
    """
    if cfg.path == NONE:
        raise DataError("text_encoder.path is 'none': give the folder or hub id of a text encoder")
    quieten()
    where = {"subfolder": cfg.subfolder} if cfg.subfolder else {}
    tokenizer_where = {"subfolder": folder} if (folder := tokenizer_subfolder(cfg)) else {}
    try:
        config = AutoConfig.from_pretrained(cfg.path, **where)
        width = getattr(config, "hidden_size", None)
        if width is None:
            raise DataError(
                f"text_encoder.path: {cfg.path!r} is a {config.model_type}, not a text encoder alone: name the folder "
                "of one (its config.json has a hidden_size)"
            )
        model_class = _ENCODERS.get(config.model_type, AutoModel)
        ALL_MASK_ATTENTION_FUNCTIONS.register("eager", _mask_unseen)
        kind: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
        if shapes_only:
            device = "meta"
            with torch.device(device):
                model = getattr(model_class, "_from_config", AutoModel.from_config)(config, **kind)
        else:
            model = model_class.from_pretrained(cfg.path, use_safetensors=True, **kind, **where)
        tokenizer = AutoTokenizer.from_pretrained(cfg.path, **tokenizer_where)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _load_error("text_encoder.path", cfg.path, cfg.subfolder, error) from error

    if width != cfg.width:
        raise DataError(f"text_encoder.width is {cfg.width}, but {cfg.path!r} has width {width}: set it to {width}")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and cfg.max_length > longest:
        raise DataError(
            f"text_encoder.max_length is {cfg.max_length}, but {cfg.path!r} has {longest} positions: set at most that"
        )
    _freeze(model, device)
    probe = tokenizer(_PROBE_TEXT)["input_ids"]
    fingerprint = "" if shapes_only else _fingerprint(config.to_dict(), _TEXT_FIELDS, model, probe)
    return TextEncoder(model, tokenizer, width, cfg.max_length, fingerprint)


def _unit_range(images: torch.Tensor, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """uint8 images -> [-1, 1] in dtype."""
    return images.to(device).to(dtype) / 127.5 - 1.0


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _few(tensor: torch.Tensor, downsample: int = 1) -> tuple[torch.Tensor, ...]:
    """Parts [b, C, h, w] of so many images that an autoencoder's widest layer stays near 1 GiB (fp32, 128 channels)."""
    pixels = tensor.shape[-2] * tensor.shape[-1] * downsample**2
    return tensor.split(max(1, _PIXELS // pixels))


class PixelAutoencoder:
    """No autoencoder: the latents are the pixels in [-1, 1]."""

    channels, downsample = 3, 1
    fingerprint = "pixels"

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, _at_least_float32(dtype)

    def encode(self, images: torch.Tensor) -> Moments:
        """uint8 [b, 3, R, R] -> pixels [b, 3, R, R], fp32 (fp64 where the dtype is), no variance."""
        return Moments(_unit_range(images, self._device, self._dtype), None)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [b, 3, R, R] -> images [b, 3, R, R], clamped to [-1, 1]."""
        return latents.to(self._dtype).clamp(-1.0, 1.0)


class Autoencoder:
    """A frozen diffusers AutoencoderKL whose latents are (z - shift) * scale.

    channels: C; downsample: pixels a latent side; fingerprint: identity of the weights, whatever the path.
    """

    def __init__(self, model: AutoencoderKL, scale: float, shift: float, fingerprint: str) -> None:
        self.model, self.scale, self.shift, self.fingerprint = model, scale, shift, fingerprint
        self.channels = int(model.config["latent_channels"])
        self.downsample = 2 ** (len(model.config["block_out_channels"]) - 1)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> Moments:
        """uint8 [b, 3, R, R] -> Moments [b, C, R / downsample, R / downsample], fp32 (fp64 where the dtype is)."""
        wide = _at_least_float32(self.model.dtype)
        parts = []
        for part in _few(images):
            pixels = _unit_range(part, self.model.device, wide).to(self.model.dtype)
            posterior = self.model.encode(pixels).latent_dist  # type: ignore[union-attr] (a tuple if asked for)
            parts.append((posterior.mean.to(wide), posterior.logvar.to(wide)))
        mean, logvar = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Moments((mean - self.shift) * self.scale, logvar + 2.0 * math.log(self.scale))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [b, C, h, w] -> images [b, 3, R, R], clamped to [-1, 1]; fp32 (fp64 where the dtype is)."""
        wide = _at_least_float32(self.model.dtype)
        z = latents.to(self.model.device, wide) / self.scale + self.shift
        parts = _few(z.to(self.model.dtype), self.downsample)
        images = [self.model.decode(part).sample.to(wide) for part in parts]  # type: ignore[union-attr] (as above)
        return torch.cat(images).clamp(-1.0, 1.0)


def load_autoencoder(
    cfg: AutoencoderConfig, device: torch.device | str, dtype: torch.dtype
) -> Autoencoder | PixelAutoencoder:
    """Load an AutoencoderKL from safetensors with the scale and shift of its own config.json, or none.

    SD 1's autoencoders come with a config.json that is older than the field: their scale is known. Raises DataError
    where it cannot be loaded, otherwise names no scaling_factor, or has other channels or downsampling than the config
    says.
    """
    if cfg.path == NONE:
        loaded: Autoencoder | PixelAutoencoder = PixelAutoencoder(device, dtype)
    else:
        quieten()
        where: dict[str, Any] = {"subfolder": cfg.subfolder} if cfg.subfolder else {}
        try:
            # The file itself: the model's config fills a missing scaling_factor with that of SD 1.
            stored = AutoencoderKL.load_config(cfg.path, **where)
            model = AutoencoderKL.from_pretrained(cfg.path, torch_dtype=dtype, use_safetensors=True, **where)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise _load_error("autoencoder.path", cfg.path, cfg.subfolder, error) from error
        assert isinstance(stored, dict)
        if "scaling_factor" not in stored and _is_of_sd1(stored):
            stored = {**stored, "scaling_factor": _SD1_SCALE}
        scale, shift = stored.get("scaling_factor"), stored.get("shift_factor")
        if scale is None:
            raise DataError(
                f"autoencoder.path: config.json of {cfg.path!r} has no scaling_factor; add the value that belongs "
                "to these weights (SD 0.18215, SDXL 0.13025, SD3 1.5305 with shift_factor 0.0609)"
            )
        _freeze(model, device)
        fingerprint = _fingerprint(stored, _VAE_FIELDS, model, "AutoencoderKL")
        loaded = Autoencoder(model, float(scale), float(shift or 0.0), fingerprint)
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


def _is_of_sd1(stored: Mapping[str, Any]) -> bool:
    """Whether a config is older than the field scaling_factor (diffusers 0.13) and of SD's shape, as sd-vae-ft-ema's.

    That field came with two values: SD's, and that of the 4x upscaler (0.08333), which has three blocks.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", str(stored.get("_diffusers_version", "")))[:2])
    shape = stored.get("latent_channels"), len(stored.get("block_out_channels", ()))
    return () < version < (0, 13) and shape == (4, 4)


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pixels that DINOv2 was trained on


class FeatureEncoder:
    """A frozen DINOv2. width: F, of its features. fingerprint: identity of the weights, whatever the path."""

    def __init__(self, model: Any, fingerprint: str) -> None:
        self.model, self.fingerprint = model, fingerprint
        self.width = int(model.config.hidden_size)
        wide = {"device": model.device, "dtype": _at_least_float32(model.dtype)}
        self._mean, self._std = (torch.tensor(v, **wide)[:, None, None] for v in (_IMAGENET_MEAN, _IMAGENET_STD))

    @torch.no_grad()
    def encode(self, images: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """uint8 [b, 3, H, W] -> features [b, rows * columns, F] in the encoder's dtype, row by row.

        The images are resized so that a patch of the encoder covers what one of rows x columns tokens does.
        """
        patch = self.model.config.patch_size
        pixels = images.to(self._mean.device).to(self._mean.dtype) / 255.0
        size = (rows * patch, columns * patch)
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        pixels = ((pixels - self._mean) / self._std).to(self.model.dtype)
        states = self.model(pixels).last_hidden_state  # [b, 1 + registers + N, F]
        return states[:, -rows * columns :]


def load_feature_encoder(path: str, width: int, device: torch.device | str, dtype: torch.dtype) -> FeatureEncoder:
    """Load a DINOv2 (with registers or without) from safetensors. Raises DataError where it cannot be loaded, is
    another kind of model, or has features other than `width`."""
    if path == NONE:
        raise DataError("objective.repa_encoder is none: REPA needs the folder or hub id of a DINOv2")
    quieten()
    try:
        config = AutoConfig.from_pretrained(path)
        if config.model_type not in ("dinov2", "dinov2_with_registers"):
            raise DataError(f"objective.repa_encoder: {path!r} is a {config.model_type}; expected a DINOv2")
        model = AutoModel.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except DataError:
        raise
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _load_error("objective.repa_encoder", path, None, error) from error
    if config.hidden_size != width:
        raise DataError(
            f"objective.repa_width is {width}, but {path!r} has {config.hidden_size} features: "
            f"set it to {config.hidden_size}"
        )
    _freeze(model, device)
    return FeatureEncoder(model, _fingerprint(config.to_dict(), _DINO_FIELDS, model, "DINOv2"))
