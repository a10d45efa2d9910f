"""Embeddings of images and captions by a frozen CLIP model (Radford et al., 2021)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from data.encoders.loading import load_error, model_fingerprint, quieten
from data.encoders.weights import load_whole

from .embeddings import CLIP_PIXELS
from .inception import full_float32

_PROBE = "a photo of two red Bicycles, and 1 café"


class Clip:
    """fingerprint: identity of weights and tokenizer, whatever the path. float32 throughout."""

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        quieten()
        # ViT-B/32 is published as pytorch_model.bin alone, which transformers reads without running what is in it.
        self._model: Any = load_whole(CLIPModel, "clip", path, dtype=torch.float32, attn_implementation="sdpa")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # damaged files raise errors of any kind
            raise load_error("clip", path, None, error) from None
        self._model.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)
        config: Any = self._model.config
        self._side: int = config.vision_config.image_size
        self._longest: int = config.text_config.max_position_embeddings
        text, vision = config.text_config, config.vision_config
        computed = [(c.hidden_act, c.num_attention_heads, c.layer_norm_eps) for c in (text, vision)]
        tokens = self._tokenizer(_PROBE, padding="max_length", max_length=self._longest)["input_ids"]
        self.fingerprint = model_fingerprint(self._model, [*computed, text.eos_token_id, tokens])

    @torch.no_grad()
    @full_float32()
    def images(self, images: Tensor) -> Tensor:
        """uint8 [b, H, W, 3] -> embeddings [b, d]: shorter side to the model's, bicubic, then the centre."""
        x = images.permute(0, 3, 1, 2).to(self._device).float()
        height, width = x.shape[-2:]
        scale = self._side / min(height, width)
        size = max(self._side, round(height * scale)), max(self._side, round(width * scale))
        x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 255).round() / 255
        top, left = (size[0] - self._side) // 2, (size[1] - self._side) // 2
        x = x[:, :, top : top + self._side, left : left + self._side]
        mean, std = (torch.tensor(v, device=self._device)[:, None, None] for v in CLIP_PIXELS)
        pooled = self._model.vision_model(pixel_values=(x - mean) / std).pooler_output
        return self._model.visual_projection(pooled)

    @torch.no_grad()
    @full_float32()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Whole captions, cut at what the model can read -> embeddings [b, d]. Padded to one length, so that a
        caption's embedding does not depend on the others."""
        tokens = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._longest, return_tensors="pt"
        ).to(self._device)
        output = self._model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return self._model.text_projection(output.pooler_output)
