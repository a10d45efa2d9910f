"""TrainConfig: everything a run is told, frozen and strict. No torch: a wrong key stops before a device is touched.

A value goes one way: YAML file (with at most one `extends:` a file) -> `key=value` overrides -> TrainConfig ->
`resolve(world size)`. Nothing changes it afterwards.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from models.configs import DEFAULT_KIND, MODEL_KINDS, ModelConfig

from ..errors import ConfigError
from .conflicts import conflicts
from .keys import fields_of, is_section, leaf_keys, plain
from .schema import TrainConfig
from .yaml_files import find_config, nearest, override, read


def load_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a config by path or name, apply `section.key=value` overrides, validate; raises ConfigError."""
    path = find_config(name)
    config = parse(read(path), path.name, overrides)
    run = config.run.model_copy(update={"name": config.run.name or path.stem})
    return config.model_copy(update={"run": run})


def parse(data: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Plain data and overrides -> TrainConfig; all problems are reported at once in a ConfigError."""
    for text in overrides:
        data = override(data, text)
    source += " with overrides" if overrides else ""
    problems = list(_unknown_keys(data, TrainConfig, "", _model_section(data.get("model"))))
    unknown = {line.partition(":")[0] for line in problems}
    try:
        config = TrainConfig.model_validate(data)
    except ValidationError as error:
        for item in error.errors():
            key = _key(item["loc"])
            if item["type"].startswith("union_tag"):
                kind = data["model"]["kind"]
                expected = f"{', '.join(MODEL_KINDS)}{nearest(str(kind), list(MODEL_KINDS))}"
                problems.append(f"{key}.kind: {kind!r} is none of {expected}")
                continue
            if key in unknown:
                continue
            if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
                problems.append(f"{key}: unknown key")  # inside a list
                continue
            message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            got = "" if item["type"] == "value_error" else f", got {item['input']!r}"
            problems.append(f"{key}: {message}{got}" if key else message)
        raise ConfigError(f"{source}:\n  " + "\n  ".join(problems)) from None
    problems += conflicts(config)
    if problems:
        raise ConfigError(f"{source}:\n  " + "\n  ".join(problems))
    return config


def _key(location: Sequence[int | str]) -> str:
    """pydantic's location of an error as a key; the kind between `model` and its keys is left out."""
    of_model = location[:1] == ("model",) and len(location) > 1 and location[1] in MODEL_KINDS
    return ".".join(str(part) for part in (("model", *location[2:]) if of_model else location))


def _model_section(data: Any) -> type[ModelConfig]:
    """The kind of model that data are, or come nearest to: by the kind's name, else by the keys."""
    keys = dict(data) if isinstance(data, Mapping) else {}
    if near := difflib.get_close_matches(str(keys.get("kind", DEFAULT_KIND)), MODEL_KINDS, 1, 0.5):
        return MODEL_KINDS[near[0]]
    return max(MODEL_KINDS.values(), key=lambda kind: len(keys.keys() & {f.name for f in dataclasses.fields(kind)}))


def _unknown_keys(data: Mapping[str, Any], section: type, prefix: str, model: type[ModelConfig]) -> Iterator[str]:
    """A line for each key that does not exist, with the nearest one that does; also under an unknown model.kind."""
    fields = fields_of(section, model)
    for key, value in data.items():
        path = f"{prefix}{key}"
        if key not in fields:
            everywhere = [k for k in leaf_keys(TrainConfig, model) if k.rpartition(".")[2] == str(key)]
            hint = nearest(path, everywhere, cutoff=0.0) or nearest(str(key), list(fields), prefix)
            yield f"{path}: unknown key{hint}"
            continue
        inner = fields[key]
        if is_section(inner) and isinstance(value, dict):
            yield from _unknown_keys(value, inner, f"{path}.", model)


def to_yaml(config: TrainConfig) -> str:
    return yaml.safe_dump(plain(config), sort_keys=False)
