"""Networks of the layout that evaluation expects, small enough for tests."""

import hashlib
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Mask2FormerConfig,
    SwinConfig,
)

from data.encoders.loading import quieten
from trainer.evaluate.detector import Segmenter


class TinyInception(nn.Module):
    """`layers` up to 64 pooled features by way of mixed_6 at 5 x 5, and `output`: the layout of NVIDIA's file."""

    def __init__(self) -> None:
        super().__init__()
        layers = {
            "conv": nn.Conv2d(3, 16, 19, stride=60),
            "mixed_6": nn.Tanh(),
            "pool": nn.AdaptiveAvgPool2d(2),
            "mixed_10": nn.Conv2d(16, 64, 2),
        }
        self.layers = nn.Sequential(OrderedDict(layers))
        self.output = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layers(x).flatten(1))


def save_inception(path: Path) -> Path:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        torch.jit.script(TinyInception()).save(str(path))
    return path


def pinned(path: Path) -> dict[str, str]:
    """The keys of a suite that name a network."""
    return {"network": str(path), "network_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def save_clip(folder: Path) -> Path:
    """A seeded CLIP of width 32 for images of 32 pixels, and a tokenizer of single letters."""
    quieten()
    letters = [chr(c) for c in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**text, "max_position_embeddings": 48},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    return folder


def _spread(model: Any, deviation: float) -> Any:
    """A model whose weights are so large that its output depends on all of its input."""
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=deviation)
    return model


def save_dino(folder: Path) -> Path:
    """A seeded DINOv2 of width 24 for patches of 14 pixels, whose positions are those of 518 pixels, as published."""
    quieten()
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=518, patch_size=14
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _spread(Dinov2Model(config), 0.4).save_pretrained(folder)
    return folder


def save_blip(folder: Path, words: list[str]) -> Path:
    """A seeded BLIP that answers questions of these words about images of 32 pixels, with some of them."""
    quieten()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    small = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(vocabulary), "encoder_hidden_size": 24, "max_position_embeddings": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    config = BlipConfig(
        text_config={**text, **ids},
        vision_config={**small, "image_size": 32, "patch_size": 8},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _spread(BlipForQuestionAnswering(config), 1.5).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


def save_detector(folder: Path, names: list[str]) -> Path:
    """A seeded Mask2Former for these classes."""
    quieten()
    backbone: Any = SwinConfig
    backbone = backbone(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=8,
        id2label=dict(enumerate(names)),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Segmenter(config).save_pretrained(folder)
    return folder
