"""Embeddings of images by the networks of newer metrics: DINOv2 (FD-DINOv2) and CLIP (CMMD). Images are resized as the
papers' own programs do it: by PIL's bicubic filter, to whole numbers."""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, CLIPModel, Dinov2Model

from data.encoders.loading import freeze, load_error, model_fingerprint, quieten
from data.encoders.weights import load_whole
from data.errors import DataError
from data.image_sets import resized_bicubic

from .inception import Features, full_float32

CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # mean, standard deviation
_IMAGENET_PIXELS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DINO_SIDE = 224
_OFFSET = 0.1  # with which DINOv2's own code resizes its positions, and transformers' does not


def normalised(
    images: Tensor, side: int, pixels: tuple[Sequence[float], Sequence[float]], device: torch.device
) -> Tensor:
    """uint8 [b, H, W, 3] -> float32 [b, 3, side, side]. pixels: mean and standard deviation of the network's."""
    x = torch.from_numpy(resized_bicubic(images.numpy(), side)).permute(0, 3, 1, 2).to(device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in pixels)
    return (x.float() / 255 - mean) / std


class Dino:
    """A DINOv2 by the protocol of dgm-eval (Stein et al., 2023): class tokens at 224 pixels. fingerprint: identity of
    the weights, whatever the path. widths: as of Inception. float32 throughout."""

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        quieten()
        try:
            kind = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
        except Exception as error:  # a config.json of wrong types raises errors of the library's own
            raise load_error("dino", path, None, error) from None
        if kind != "dinov2":
            raise DataError(f"dino: {path!r} is a {kind}; expected a DINOv2 without registers (facebook/dinov2-large)")
        self._model: Any = load_whole(Dinov2Model, "dino", path, dtype=torch.float32, attn_implementation="sdpa")
        config = self._model.config
        self.fingerprint = model_fingerprint(
            self._model, [config.num_attention_heads, config.layer_norm_eps, config.hidden_act, _OFFSET]
        )
        self.widths: tuple[int, int] = config.hidden_size, 0
        resize_positions(self._model.embeddings, _DINO_SIDE // config.patch_size)
        freeze(self._model, device)
        self._device = torch.device(device)

    @torch.no_grad()
    @full_float32()
    def __call__(self, images: Tensor) -> Features:
        """images: uint8 [b, H, W, 3]."""
        pixels = normalised(images, _DINO_SIDE, _IMAGENET_PIXELS, self._device)
        return _pooled(self._model(pixels).last_hidden_state[:, 0])


def resize_positions(embeddings: Any, cells: int) -> None:
    """Resize the positions of a Dinov2Embeddings to cells x cells as DINOv2's own code does: its scale is a little
    larger than the ratio of the sizes, so that the results differ from transformers' by more than rounding."""
    old = embeddings.position_embeddings.data  # [1, 1 + n², d], the class token's first
    side = isqrt(old.shape[1] - 1)
    if side == cells:
        return
    grid = old[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = (cells + _OFFSET) / side
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    embeddings.position_embeddings = nn.Parameter(torch.cat([old[:, :1], grid.flatten(2).transpose(1, 2)], dim=1))


class ClipImages:
    """The images' half of a CLIP, by the protocol of CMMD (Jayasumana et al., 2024): at the model's own side, 336
    pixels of ViT-L/14@336. fingerprint, widths: as of Dino. float32 throughout."""

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        quieten()
        self._model: Any = load_whole(CLIPModel, "cmmd_clip", path, dtype=torch.float32, attn_implementation="sdpa")
        vision = self._model.config.vision_config
        self.fingerprint = model_fingerprint(
            self._model, [vision.hidden_act, vision.num_attention_heads, vision.layer_norm_eps]
        )
        self.widths: tuple[int, int] = self._model.config.projection_dim, 0
        self._side: int = vision.image_size
        freeze(self._model, device)
        self._device = torch.device(device)

    @torch.no_grad()
    @full_float32()
    def __call__(self, images: Tensor) -> Features:
        """images: uint8 [b, H, W, 3]."""
        pixels = normalised(images, self._side, CLIP_PIXELS, self._device)
        return _pooled(self._model.visual_projection(self._model.vision_model(pixel_values=pixels).pooler_output))


def _pooled(features: Tensor) -> Features:
    return Features(features.float(), features.new_empty(len(features), 0), None)
