"""The frozen DINOv2 or DINOv3 with whose features REPA aligns the model's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel

from ..config import NONE
from ..errors import DataError
from .loading import at_least_float32, fingerprint_of, freeze, load_error, quieten, weights_digest
from .weights import load_whole

_KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit")
_DINO_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "mlp_ratio",
    "use_swiglu_ffn",
    "hidden_act",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_register_tokens",
)
_DINO_V3_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "use_gated_mlp",
    "hidden_act",
    "layer_norm_eps",
    "rope_theta",
    "patch_size",
    "num_register_tokens",
)
# Of the pixels that DINOv2 was trained on, and DINOv3 on images of the web.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureEncoder:
    """A frozen DINOv2 or DINOv3. width: F, the size of its features. fingerprint: identifies the weights, whatever
    their path; weights: their digest (see weights_digest)."""

    def __init__(self, model: Any, fingerprint: str) -> None:
        self.model, self.fingerprint = model, fingerprint
        self.weights: str | None = None
        self.width = int(model.config.hidden_size)
        wide = {"device": model.device, "dtype": at_least_float32(model.dtype)}
        self._mean, self._std = (torch.tensor(v, **wide)[:, None, None] for v in (_IMAGENET_MEAN, _IMAGENET_STD))

    @torch.no_grad()
    def encode(self, images: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """uint8 [b, 3, H, W] -> features [b, rows * columns, F] in the encoder's dtype, one row of tokens after the
        other.

        The images are resized so that one patch of the encoder covers what one of the model's rows x columns tokens
        does.
        """
        patch = self.model.config.patch_size
        pixels = images.to(self._mean.device).to(self._mean.dtype) / 255.0
        size = (rows * patch, columns * patch)
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        pixels = ((pixels - self._mean) / self._std).to(self.model.dtype)
        states = self.model(pixels).last_hidden_state  # [b, 1 + registers + N, F]
        return states[:, -rows * columns :]


def load_feature_encoder(path: str, width: int, device: torch.device | str, dtype: torch.dtype) -> FeatureEncoder:
    """Load a DINOv2 or a ViT of DINOv3, with registers or without, from safetensors. Raises DataError where it cannot
    be loaded, is another kind of model, or its features are not of size `width`."""
    if path == NONE:
        raise DataError("objective.repa_encoder is none: REPA needs the folder or hub id of a DINOv2 or DINOv3")
    quieten()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type not in _KINDS:
            raise DataError(
                f"objective.repa_encoder: {path!r} is a {config.model_type}; expected a DINOv2, or a ViT of DINOv3"
            )
    except DataError:
        raise
    except Exception as error:  # a config.json of wrong types raises errors of the library's own
        raise load_error("objective.repa_encoder", path, None, error) from error
    model = load_whole(
        AutoModel, "objective.repa_encoder", path, dtype=dtype, use_safetensors=True, attn_implementation="sdpa"
    )
    if config.hidden_size != width:
        raise DataError(
            f"objective.repa_width is {width}, but {path!r} has {config.hidden_size} features: "
            f"set it to {config.hidden_size}"
        )
    freeze(model, device)
    name, fields = ("DINOv3", _DINO_V3_FIELDS) if config.model_type == "dinov3_vit" else ("DINOv2", _DINO_FIELDS)
    encoder = FeatureEncoder(model, fingerprint_of(config.to_dict(), fields, model, name))
    encoder.weights = weights_digest(model, path)
    return encoder
