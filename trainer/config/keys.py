"""The keys of a config as dotted names, and what is declared at each."""

import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from models.model_config import ModelConfig
from models.registry import DEFAULT_KIND, MODEL_KINDS

from .schema import TrainConfig

KeyClass = Literal["identity", "schedule", "runtime"]


class Key(NamedTuple):
    """A key of a section."""

    field: FieldInfo
    """Its declaration."""
    section: type | None
    """The section that it holds; None where it holds a value."""


def keys_of(section: Any, model: type[ModelConfig]) -> dict[str, Key]:
    """The keys of a section by name; model: the kind that the section `model` is of."""
    fields: dict[str, FieldInfo] = section.__pydantic_fields__
    keys = {name: Key(field, section_in(field.annotation)) for name, field in fields.items()}
    return keys | {"model": Key(fields["model"], model)} if section is TrainConfig else keys


def section_in(annotation: Any, or_list: bool = False) -> type | None:
    """The section that a type means, be it optional. or_list: or a list of such sections, or a mapping to them."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return annotation
    parts = [part for part in get_args(annotation) if part not in (type(None), ...)]
    if get_origin(annotation) is dict and or_list:
        return section_in(parts[1])
    if get_origin(annotation) in (Union, types.UnionType, *((tuple,) if or_list else ())) and len(parts) == 1:
        return section_in(parts[0])
    return None


def leaf_keys(section: type, model: type[ModelConfig], prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys that hold a value."""
    for name, key in keys_of(section, model).items():
        if key.section is None:
            yield f"{prefix}{name}"
        else:
            yield from leaf_keys(key.section, model, f"{prefix}{name}.")


def declaration(section: type, path: Sequence[str | int], model: type[ModelConfig]) -> FieldInfo | None:
    """What is declared at the end of a path of names, and of indexes in lists; None where the path leads nowhere."""
    field, inside, in_mapping = None, section, False
    for part in path:
        if isinstance(part, int) or in_mapping:  # an index, or a name that the user gives
            in_mapping = False
            continue
        key = keys_of(inside, model).get(part) if inside else None
        if key is None:
            return None
        field, inside = key.field, key.section or section_in(key.field.annotation, or_list=True)
        in_mapping = get_origin(field.annotation) is dict
    return field


def key_class(key: str) -> KeyClass:
    """identity, schedule or runtime, as declared at the key, else at its section (see trainer.config.schema)."""
    section, _, rest = key.partition(".")
    found = class_at(TrainConfig.model_fields[section])
    # No key of a model has a class of its own, so that any kind of model will do here.
    parts = rest.split(".") if rest else ()
    path = [int(part) if part.isdecimal() else part for part in parts]  # numbers are places in lists
    field = declaration(TrainConfig, [section, *path], MODEL_KINDS[DEFAULT_KIND])
    found = (field and class_at(field)) or found
    assert found is not None, f"{section} declares no class"
    return found


def class_at(field: FieldInfo) -> KeyClass | None:
    """The class that is declared at this very key."""
    extra: Any = field.json_schema_extra or {}
    return extra.get("class")


def may_be_staged(field: FieldInfo) -> bool:
    """Whether a stage may change this key, although another value at the start would make another run."""
    extra: Any = field.json_schema_extra or {}
    return extra.get("stage", False)


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def plain(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON data (tuples are lists)."""
    return config.model_dump(mode="json")
