"""What each key of a config means, from its declaration: for docs/config.md and for `--help-config`."""

import inspect
import json
import textwrap
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from models.model_config import ModelConfig
from models.registry import DEFAULT_KIND, MODEL_KINDS

from ..errors import ConfigError
from .keys import KeyClass, class_at, keys_of, may_be_staged, section_in
from .messages import range_text
from .schema import TrainConfig
from .yaml_files import nearest

_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
_WIDTH = 100  # columns of a terminal
_REQUIRED = "required"  # in place of a default


class KeyHelp(NamedTuple):
    """A key as it is shown. range, key_class and help may be empty."""

    name: str
    type: str
    default: str
    range: str
    key_class: str
    help: str


class SectionHelp(NamedTuple):
    """A section as it is shown. title: its name, and of which models."""

    title: str
    help: str
    keys: list[KeyHelp]


def section_help(
    title: str,
    section: type,
    prefix: str = "",
    key_class: KeyClass | None = None,
    model: type[ModelConfig] | None = None,
) -> SectionHelp:
    """prefix: what the names of its keys begin with. key_class: of keys that declare none."""
    keys = _keys(section, prefix, key_class, model or MODEL_KINDS[DEFAULT_KIND])
    return SectionHelp(title, _one_line(section.__doc__), list(keys))


def sections() -> Iterator[SectionHelp]:
    """All sections of a TrainConfig; the keys that every kind of model has come once."""
    for name, key in keys_of(TrainConfig, MODEL_KINDS[DEFAULT_KIND]).items():
        if name == "model":
            yield from _models(class_at(key.field))
        elif key.section is not None:
            yield section_help(name, key.section, f"{name}.", class_at(key.field))
        elif element := section_in(key.field.annotation, or_list=True):
            listed = section_help(name, element, f"{name}[].", class_at(key.field))
            yield listed._replace(keys=[_key_help(name, key.field, class_at(key.field)), *listed.keys])


def describe_keys(wanted: str | None = None) -> str:
    """Help for all keys, for those of a section ("optim"), or for one ("optim.lr"), as text for a terminal; raises
    ConfigError where there is none of that name."""
    every = list(sections())
    names = [key.name for section in every for key in section.keys]
    if wanted and not any(_below(name, wanted) for name in names):
        known = [*dict.fromkeys(name.partition(".")[0] for name in names), *names]
        raise ConfigError(f'no config key or section is called "{wanted}"{nearest(wanted, known)}')
    parts = []
    for section in every:
        if keys := [key for key in section.keys if not wanted or _below(key.name, wanted)]:
            parts.append("\n".join([_filled(f"{section.title}: {section.help}"), *map(_described, keys)]))
    return "\n\n".join(parts)


def _below(name: str, wanted: str) -> bool:
    return f"{name.replace('[]', '')}.".startswith(f"{wanted}.")


def _described(key: KeyHelp) -> str:
    default = key.default if key.default == _REQUIRED else f"default {key.default}"
    facts = [key.type, key.range, default, key.key_class]
    return "\n".join([f"  {key.name}: {'; '.join(fact for fact in facts if fact)}", _filled(key.help, "      ")])


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _keys(section: type, prefix: str, above: KeyClass | None, model: type[ModelConfig]) -> Iterator[KeyHelp]:
    for name, (field, inner) in keys_of(section, model).items():
        found = class_at(field) or above
        if not isinstance(field.annotation, type) or inner is None:  # a value, or a section that may be left out
            yield _key_help(f"{prefix}{name}", field, found)
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}.", found, model)
        elif element := section_in(field.annotation, or_list=True):
            of_each = ".NAME." if get_origin(field.annotation) is dict else "[]."
            yield from _keys(element, f"{prefix}{name}{of_each}", found, model)


def _key_help(name: str, field: FieldInfo, key_class: KeyClass | None) -> KeyHelp:
    default = _REQUIRED if field.is_required() else json.dumps(field.default)
    type_, help_ = _type_text(field.annotation), _one_line(field.description)
    by_stage = " (a stage may change it)" if may_be_staged(field) else ""
    return KeyHelp(name, type_, default, range_text(field), f"{key_class or ''}{by_stage}", help_)


def _models(key_class: KeyClass | None) -> Iterator[SectionHelp]:
    """The keys that all kinds of model declare alike, then each kind's own."""
    kinds = {
        kind: section_help(f"model, kind {kind}", model, "model.", key_class, model)
        for kind, model in MODEL_KINDS.items()
    }
    tables = {kind: {key.name: key for key in section.keys} for kind, section in kinds.items()}
    first = next(iter(kinds.values()))
    shared = [
        merged
        for key in first.keys
        if (merged := _merged({kind: table[key.name] for kind, table in tables.items() if key.name in table}))
        is not None
    ]
    common = {key.name for key in shared}
    yield SectionHelp("model", "The backbone. Every kind has these keys, and more of its own.", shared)
    for section in kinds.values():
        yield section._replace(keys=[key for key in section.keys if key.name not in common])


def _merged(keys: dict[str, KeyHelp]) -> KeyHelp | None:
    """One key for all kinds of model; None where a kind lacks it, or gives it another meaning or range."""
    first = next(iter(keys.values()))
    if len(keys) < len(MODEL_KINDS) or len({(key.range, key.help) for key in keys.values()}) > 1:
        return None
    if first.name == "model.kind":
        return first._replace(type=_or([key.type for key in keys.values()]), default=json.dumps(DEFAULT_KIND))
    kinds: dict[str, list[str]] = {}
    for kind, key in keys.items():
        kinds.setdefault(key.default, []).append(kind)
    by_kind = ", ".join(f"{default} ({', '.join(names)})" for default, names in kinds.items())
    return first._replace(default=by_kind if len(kinds) > 1 else first.default)


def _type_text(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _or([_choice(part) for part in parts])
    if origin in (Union, types.UnionType):
        choices = [part for part in parts if get_origin(part) is Literal]
        words = [word for part in choices for word in get_args(part)]
        return _or([*map(_choice, words), *(_type_text(part) for part in parts if part not in choices)])
    if origin is tuple and ... not in parts:
        return f"list of {len(parts)} {_type_text(parts[0])}s"
    if origin is dict:
        return "sections by name" if section_in(annotation, or_list=True) else "keys"
    if origin is tuple:
        return f"list of {_plural(parts[0])}"
    return _WORDS.get(annotation, "section")


def _choice(value: object) -> str:
    return f"`{value}`" if isinstance(value, str) else str(value)


def _or(words: Sequence[str]) -> str:
    """a, b or c"""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _plural(annotation: Any) -> str:
    choices = get_origin(annotation) is Literal
    return _type_text(annotation) if choices or annotation is str else f"{_type_text(annotation)}s"


def _one_line(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").split())
