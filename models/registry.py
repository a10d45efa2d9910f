"""The backbones by `model.kind`: one line each, from which all else about a backbone is found. No torch.

A line names the class of its keys (models.model_config.ModelConfig: ranges, conflicts, FLOPs) and the class of its
modules (models.backbone.Backbone: forward, shard units, declarations); both may stand in one file. The config
configs/KIND_debug_mup.yaml is what tests train. docs/extending.md adds a backbone step by step.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .model_config import ModelConfig


class Entry(NamedTuple):
    """Two classes as "module:name"."""

    config: str
    backbone: str


BACKBONES: dict[str, Entry] = {
    "mmdit": Entry("models.configs:MMDiTConfig", "models.mmdit:MMDiT"),
    "dit": Entry("models.configs:DiTConfig", "models.dit:DiT"),
    "pixart": Entry("models.configs:PixArtConfig", "models.pixart:PixArt"),
    "uvit": Entry("models.configs:UViTConfig", "models.uvit:UViT"),
}
DEFAULT_KIND = "mmdit"  # where a config does not name one


def class_of(name: str) -> Any:
    """The class behind "module:name". Its module is imported now, so that a config is read without torch."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


class _ModelKinds(Mapping[str, type[ModelConfig]]):
    """Kind -> class of its keys. Looked up when asked for, because a file with both classes imports this module."""

    def __getitem__(self, kind: str) -> type[ModelConfig]:
        return class_of(BACKBONES[kind].config)

    def __iter__(self) -> Iterator[str]:
        return iter(BACKBONES)

    def __len__(self) -> int:
        return len(BACKBONES)


MODEL_KINDS = _ModelKinds()
