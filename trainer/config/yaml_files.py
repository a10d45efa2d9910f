"""Config files as plain data: YAML 1.2 scalars, `extends:`, `key=value` overrides; no key is known here."""

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from data.config import redact

from ..errors import ConfigError

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


# ruamel.yaml 0.19 was tried in place of this loader. It takes the words 2024-01-01, 2024_01_05 and 0x12, which are good
# names of runs, for a date and two numbers; it needs 5.2 ms of CPU time per shipped config instead of 3.7 ms; and it
# would be a second library, because config.yaml is written by PyYAML.
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
    """The file of a config: a path, or a name under configs/ (or in the folder `near`), with or without .yaml."""
    folders = [*([near] if near else []), Path(), CONFIG_DIR]
    for folder in folders:
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    known = [str(p.relative_to(CONFIG_DIR)) for p in sorted(CONFIG_DIR.rglob("*.yaml"))]
    raise ConfigError(f'config "{name}" was found neither as a path nor under configs/{nearest(name, known)}')


def read(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A config file merged into those that it extends. chain: the files that extend this one."""
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
    """Both, key by key; where both have a value, the one above counts."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def override(data: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The data with one `section.key=value` laid over it."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f'override "{text}" must have the form section.key=value')
    nested: Any = _parse_yaml(value, f'override "{text}"') if value else None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return _merge(data, nested)


def refuse_duplicates(overrides: Sequence[str]) -> None:
    """Raise a ConfigError if a key is given twice on a command line. Programs that build a list of overrides may repeat
    a key: the last one counts."""
    given: dict[str, list[str]] = {}
    for text in overrides:
        given.setdefault(text.partition("=")[0], []).append(redact(text))
    twice = [f"{key} is given {len(texts)} times: {' '.join(texts)}" for key, texts in given.items() if len(texts) > 1]
    if twice:
        raise ConfigError(
            "\n".join(twice)
            + "\nGive each key once. The shell makes several words of one with braces: quote it, as in "
            "'data.shards=train-{000..004}.tar'"
        )


def nearest(key: str, known: Sequence[str], prefix: str = "", cutoff: float = 0.5) -> str:
    """ "; did you mean ...?", or nothing where no known key is near."""
    matches = difflib.get_close_matches(key, known, 1, cutoff)
    return f'; did you mean "{prefix}{matches[0]}"?' if matches else ""
