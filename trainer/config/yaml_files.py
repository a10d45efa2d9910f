"""Config files as plain data: YAML 1.2 scalars, `extends:`, `key=value` overrides; no key is known here."""

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..errors import ConfigError

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: 1e-3 is a number, `off` a word; a key given twice is an error."""

    yaml_implicit_resolvers: ClassVar = {
        first: [
            (tag, regexp) for tag, regexp in resolvers if not tag.endswith((":int", ":float", ":bool", ":timestamp"))
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):  # {{placeholder}} is a mapping as the key of a mapping
                raise yaml.constructor.ConstructorError(None, None, f"{key} is no key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f'key "{key}" is given twice', key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# Decimal alone, so that 010 is ten and 1:30 is text. Before the float, which would match as well.
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None


def find_config(name: str, near: Path | None = None) -> Path:
    """A path, or a name under configs/ (or beside the file that extends it), with or without .yaml."""
    folders = [*([near] if near else []), Path(), CONFIG_DIR]
    for folder in folders:
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    known = [str(p.relative_to(CONFIG_DIR)) for p in sorted(CONFIG_DIR.rglob("*.yaml"))]
    raise ConfigError(f'config "{name}" was found neither as a path nor under configs/{nearest(name, known)}')


def read(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in chain:
        raise ConfigError(f"{path}: extends itself through {' -> '.join(p.name for p in chain)}")
    try:
        data = _parse_yaml(path.read_text(), str(path)) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping of sections, got {type(data).__name__}")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends must name one config, got {parent!r}")
    return _merge(read(find_config(parent, path.parent), (*chain, path.resolve())), data)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def override(data: Mapping[str, Any], text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f'override "{text}" must have the form section.key=value')
    nested: Any = _parse_yaml(value, f'override "{text}"') if value else None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return _merge(data, nested)


def refuse_duplicates(overrides: Sequence[str]) -> None:
    """ConfigError where a key is given twice: which of the two values is meant cannot be told."""
    given: dict[str, str] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        if key in given:
            raise ConfigError(
                f"{key} is given twice: {given[key]} and {value}; a shell makes two overrides of unquoted braces "
                "({a,b}), so put quotes around such a value"
            )
        given[key] = value


def nearest(key: str, known: Sequence[str], prefix: str = "", cutoff: float = 0.5) -> str:
    """ "; did you mean ...?", or nothing where no known key is near."""
    matches = difflib.get_close_matches(key, known, 1, cutoff)
    return f'; did you mean "{prefix}{matches[0]}"?' if matches else ""
