"""Config files as plain data: YAML 1.2 scalars, `extends:`, `key=value` overrides; the only keys known here
are two that stand in each other's place."""

import contextlib
import difflib
import itertools
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError

from data.redaction import one_line, quote

from ..errors import ConfigError

# Of one file. The largest shipped one has 4 kB, 100 values and 4 levels; an alias counts as what it stands for.
_MOST_BYTES, _MOST_VALUES, _DEEPEST = 1 << 20, 20_000, 20
_CHARACTERS_PER_VALUE = 100  # a longer text counts as several values
_MOST_FILES = 20  # of a chain of `extends:`
_MOST_PARTS = 20  # of the key of an override
_SECTION, _EXCLUDING = "data", ("shards", "sources")
CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


# ruamel.yaml 0.19 was tried in place of this loader. It takes the words 2024-01-01, 2024_01_05 and 0x12, which are good
# names of runs, for a date and two numbers; it needs 5.2 ms of CPU time per shipped config instead of 3.7 ms; and it
# would be a second library, because config.yaml is written by PyYAML.
class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: 1e-3 is a number, `off` a word; a key given twice is an error.

    A file of a few hundred bytes whose lists repeat each other by aliases may stand for billions of values, so that
    values are counted while they are read.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values: dict[yaml.Node, int] = {}  # in each node that is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        start = self.peek_event().start_mark
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ComposerError(None, None, f"there are more than {_DEEPEST} levels", start)
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if node not in self._values:
            if is_alias:
                raise ComposerError(None, None, "a value holds itself by an alias", start)
            self._values[node] = self._count(node)
        if max(self._values[node], len(self._values)) > _MOST_VALUES:
            raise ComposerError(None, None, f"there are more than {_MOST_VALUES} values", start)
        return node

    def _count(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1 + len(node.value) // _CHARACTERS_PER_VALUE
        inner = itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
        return 1 + sum(self._values[each] for each in inner)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, TypeError):  # of a tag, as in !!int abc
            what = f"{quote(node.value)} is no {one_line(node.tag.rpartition(':')[2], 40)}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None

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
                raise yaml.constructor.ConstructorError(None, None, f"{quote(key)} is no key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'key "{one_line(str(key), 100)}" is given twice', key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# Decimal alone, so that 010 is ten and 1:30 is text. Before the float, which would match as well.
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: _int64(node.value))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def _int64(text: str) -> int:
    """Raises ValueError where it does not fit: Python's own integers know no end, and what computes with them does."""
    if len(text) > 40 or not -(2**63) <= int(text) < 2**63:
        raise ValueError
    return int(text)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        # Without PyYAML's own excerpt: cut in the middle of a URL, it cannot be redacted any more.
        problem = ", ".join(one_line(part, 200) for part in (error.context, error.problem) if part)
        where = ""
        if (mark := error.problem_mark) is not None:
            line = text.split("\n", mark.line + 1)[mark.line]
            where = f" (line {mark.line + 1}, column {mark.column + 1}: {quote(line)})"
        raise ConfigError(f"{source} is not valid YAML: {problem}{where}") from None
    except yaml.YAMLError as error:  # of a character
        raise ConfigError(f"{source} is not valid YAML: {one_line(str(error), 200)}") from None


def find_config(name: str, near: Path | None = None) -> Path:
    """The file of a config: a path, or a name under configs/ (or in the folder `near`), with or without .yaml."""
    folders = [*([near] if near else []), Path(), CONFIG_DIR]
    for folder in folders:
        for candidate in (folder / name, folder / f"{name}.yaml"):
            with contextlib.suppress(OSError, ValueError):  # a name that is too long, or holds a zero
                if candidate.is_file():
                    return candidate
    known = [str(p.relative_to(CONFIG_DIR)) for p in sorted(CONFIG_DIR.rglob("*.yaml"))]
    raise ConfigError(
        f'config "{one_line(name, 200)}" was found neither as a path nor under configs/{nearest(name, known)}'
    )


def read(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A config file merged into those that it extends. chain: the files that extend this one."""
    if path.resolve() in chain:
        raise ConfigError(f"{path}: extends itself through {' -> '.join(p.name for p in chain)}")
    if len(chain) > _MOST_FILES:
        raise ConfigError(f"{path}: it is extended by a chain of more than {_MOST_FILES} files")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ConfigError(f"{path} is no config: it has more than {_MOST_BYTES >> 20} MiB")
        data = _parse_yaml(text, str(path)) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping of sections, got {type(data).__name__}")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends must name one config, got {quote(parent)}")
    return lay(read(find_config(parent, path.parent), (*chain, path.resolve())), data)


def lay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A file over the one that it extends, or overrides over a file. Where it gives one of two keys that exclude each
    other, that one stands in the place of the other; where it gives both, both stay, and are refused."""
    lower, upper = below.get(_SECTION), above.get(_SECTION)
    if isinstance(lower, dict) and isinstance(upper, dict):
        gone = {other for one, other in itertools.permutations(_EXCLUDING) if upper.get(one) and other not in upper}
        below = {**below, _SECTION: {key: value for key, value in lower.items() if key not in gone}}
    return _merge(below, above)


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
        raise ConfigError(f'override "{one_line(text, 200)}" must have the form section.key=value')
    if len(text) > _MOST_BYTES or key.count(".") >= _MOST_PARTS:
        raise ConfigError(f'override "{one_line(text, 200)}" is too long')
    nested: Any = _parse_yaml(value, f'override "{one_line(text, 200)}"') if value else None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return _merge(data, nested)


def override_all(data: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """The data with all `section.key=value` of a command line laid over it."""
    given: dict[str, Any] = {}
    for text in texts:
        given = override(given, text)
    return lay(data, given)


def refuse_duplicates(overrides: Sequence[str]) -> None:
    """Raise a ConfigError if a key is given twice on a command line. Programs that build a list of overrides may repeat
    a key: the last one counts."""
    given: dict[str, list[str]] = {}
    for text in overrides:
        given.setdefault(text.partition("=")[0], []).append(one_line(text, 200))
    twice = [
        f"{one_line(key, 200)} is given {len(texts)} times: {' '.join(texts)}"
        for key, texts in given.items()
        if len(texts) > 1
    ]
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
