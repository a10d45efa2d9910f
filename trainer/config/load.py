"""From a file and overrides to a TrainConfig. No torch: a wrong key stops a run before a device is touched.

A value goes one way: YAML file (which may extend one other) -> `key=value` overrides -> TrainConfig -> conflicts ->
`resolve(world size)`. Nothing changes it afterwards.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from data.config import secret_in
from data.redaction import one_line, quote
from models.model_config import ModelConfig
from models.registry import DEFAULT_KIND, MODEL_KINDS

from ..errors import ConfigError
from .conflicts import conflicts
from .keys import flatten, keys_of, leaf_keys, plain
from .messages import MOST_PROBLEMS, explain
from .schema import NAME_FORM, Section, TrainConfig, is_name
from .stages import as_trained, stage_problems
from .yaml_files import find_config, nearest, override_all, read

S = TypeVar("S", bound=Section)


def load_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a config by path or name, apply `section.key=value` overrides, validate; raises ConfigError."""
    path = find_config(name)
    config = parse(read(path), path.name, overrides)
    name = config.run.name or path.stem
    # Asked of runs that are to start, not of checkpoints, which may be older than this rule.
    if not is_name(name):
        raise refused(path.name, [f"run.name: {quote(name)} names no folder; expected {NAME_FORM}: give run.name=..."])
    run = config.run.model_copy(update={"name": name})
    return config.model_copy(update={"run": run})


def parse(data: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Plain data and overrides -> TrainConfig; all problems are reported at once in a ConfigError."""
    data = override_all(data, overrides)
    source += " with overrides" if overrides else ""
    config = validated(TrainConfig, data, source)
    if problems := [*conflicts(config), *stage_problems(config)]:
        raise refused(source, problems)
    return config


def parse_trained(meta: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config that a checkpoint's weights were trained with, as `parse` reads it: in a run of stages, that of the
    stage which the checkpoint is of. meta: its meta.json."""
    return parse(as_trained(meta["config"], meta["step"]), source, overrides)


def validated(section: type[S], data: Mapping[str, Any], source: str) -> S:
    """Plain data -> a section, each key by itself; all problems are reported at once in a ConfigError."""
    if secrets := [p for key, value in flatten(data).items() for p in _secrets(one_line(key, 100), value)]:
        raise refused(source, secrets)
    model = _kind_of(data.get("model"))
    unknown = dict(islice(_unknown_keys(data, section, section, "", model), MOST_PROBLEMS))
    try:
        return section.model_validate(data)
    except ValidationError as error:
        wrong = [sentence for key, sentence in explain(error, section, model) if key not in unknown]
        raise refused(source, [*unknown.values(), *wrong]) from None


def _secrets(key: str, value: Any) -> Iterator[str]:
    """What is wrong with a value, or the items of a list, that would store a secret with the run."""
    for item in value if isinstance(value, list | tuple | set) else [value]:
        if isinstance(item, Mapping | list | tuple | set):
            yield from _secrets(key, list(item.values()) if isinstance(item, Mapping) else item)
        elif problem := secret_in(key, item):
            yield problem


def refused(source: str, problems: Sequence[str]) -> ConfigError:
    """The error that lists the problems of a config, one per line."""
    shown = [one_line(problem) for problem in problems[:MOST_PROBLEMS]]
    return ConfigError(f"{source}:\n  " + "\n  ".join([*shown, *(["..."] if len(problems) > len(shown) else [])]))


def _kind_of(data: Any) -> type[ModelConfig]:
    """The kind of model that data are, or come nearest to: by the kind's name, else by the keys."""
    keys = dict(data) if isinstance(data, Mapping) else {}
    if near := difflib.get_close_matches(str(keys.get("kind", DEFAULT_KIND)), MODEL_KINDS, 1, 0.5):
        return MODEL_KINDS[near[0]]
    return max(MODEL_KINDS.values(), key=lambda kind: len(keys.keys() & keys_of(kind, kind).keys()))


def _unknown_keys(
    data: Mapping[str, Any], section: type, root: type, prefix: str, model: type[ModelConfig]
) -> Iterator[tuple[str, str]]:
    """(key, sentence) of each key that does not exist, with the nearest one that does; also under an unknown
    model.kind. root: the section in which the whole config is searched for that name."""
    known = keys_of(section, model)
    for name, value in data.items():
        key = f"{prefix}{one_line(str(name), 100)}"
        if name not in known:
            elsewhere = [k for k in leaf_keys(root, model) if k.rpartition(".")[2] == str(name)]
            hint = nearest(key, elsewhere, cutoff=0.0) or nearest(str(name), list(known), prefix)
            yield key, f"{key}: unknown key{hint}"
        elif (inner := known[name].section) and isinstance(value, Mapping):
            yield from _unknown_keys(value, inner, root, f"{key}.", model)


def to_yaml(config: TrainConfig) -> str:
    """The config as the run folder's config.yaml holds it."""
    return yaml.safe_dump(plain(config), sort_keys=False)
