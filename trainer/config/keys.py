"""The keys of a config as dotted names, and the class of each: identity, schedule or runtime."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel

from models.configs import ModelConfig

from .schema import TrainConfig

KeyClass = Literal["identity", "schedule", "runtime"]

# Decision 10: a change of an identity key is refused on resume, of a schedule key unless it is listed in
# run.allow_change, of a runtime key never. Paths are runtime: what lies there is compared by fingerprint.
_CLASSES: dict[str, KeyClass] = {
    "run": "runtime",
    "train": "runtime",
    "train.steps": "schedule",
    "train.global_batch_size": "identity",
    "train.seed": "identity",
    "model": "identity",
    "mup": "identity",
    "optim": "schedule",
    "ema": "schedule",
    "objective": "identity",
    "objective.repa_encoder": "runtime",
    "parallel": "runtime",
    "data": "identity",
    "data.shards": "runtime",
    "data.val_shards": "runtime",
    "data.num_workers": "runtime",
    **{f"data.{key}": "runtime" for key in ("sources", "captions", "index_cache", "prefetch_mib", "timeout_s")},
    **{f"data.{key}": "runtime" for key in ("retries", "cache_dir", "cache_gib")},
    "data.max_bad_share": "runtime",
    "text_encoder": "identity",
    "text_encoder.path": "runtime",
    "text_encoder.subfolder": "runtime",
    "text_encoder.device": "runtime",
    "text_encoder.shard": "runtime",
    "autoencoder": "identity",
    "autoencoder.path": "runtime",
    "autoencoder.subfolder": "runtime",
    "validation": "runtime",
    "sample": "runtime",
    "wandb": "runtime",
}


def key_class(key: str) -> KeyClass:
    """identity, schedule or runtime."""
    return _CLASSES.get(key) or _CLASSES[key.partition(".")[0]]


def fields_of(section: type, model: type[ModelConfig]) -> dict[str, Any]:
    """Key -> type of a section (pydantic model or dataclass), with this kind of model."""
    if issubclass(section, BaseModel):
        fields = {name: field.annotation for name, field in section.model_fields.items()}
        return fields | {"model": model} if section is TrainConfig else fields
    return {field.name: field.type for field in dataclasses.fields(section)}


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation))


def leaf_keys(section: type, model: type[ModelConfig], prefix: str = "") -> Iterator[str]:
    for key, inner in fields_of(section, model).items():
        if is_section(inner):
            yield from leaf_keys(inner, model, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON data (tuples are lists)."""
    return config.model_dump(mode="json")
