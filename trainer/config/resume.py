"""Which keys of a config may differ from the config that the run was started with."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from models.registry import DEFAULT_KIND, MODEL_KINDS

from ..errors import ConfigError
from .keys import KeyClass, flatten, key_class, plain
from .schema import TrainConfig
from .stages import as_trained, borders_before, may_change, trained_stages
from .yaml_files import override


class Difference(NamedTuple):
    """A key of which two configs have other values."""

    key: str
    kind: KeyClass
    before: Any
    now: Any


def differences(old: Mapping[str, Any], new: TrainConfig) -> list[Difference]:
    """The keys of `new` that differ from the config stored in a checkpoint, which is plain data."""
    return _differences(old, plain(new))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    # A key that the checkpoint's code did not have yet acted then as its default acts now.
    model = MODEL_KINDS[old["model"].get("kind", DEFAULT_KIND)]()
    given = flatten(new)
    defaults = {key: value for key, value in flatten(plain(TrainConfig(model=model))).items() if key in given}
    before, now = (_listed(without_factors_of_1(keys)) for keys in (defaults | flatten(old), given))
    pairs = {key: (before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys())}
    return [Difference(key, key_class(key), *pair) for key, pair in pairs.items() if pair[0] != pair[1]]


def _listed(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config, those of each of text_encoder.more by themselves, since their classes differ."""
    more = keys.get("text_encoder.more") or []
    own = {name: value for name, value in keys.items() if name != "text_encoder.more"}
    return own | {f"text_encoder.more.{i}.{name}": value for i, one in enumerate(more) for name, value in one.items()}


def without_factors_of_1(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config but those of mup.factors that are 1, which do what none does."""
    return {key: value for key, value in keys.items() if not (key.startswith("mup.factors") and value in (1, {}))}


def of_data(key: str) -> bool:
    """Whether a key of class identity may change where the data change: all of the data's but the resolution, which is
    also the model's."""
    return key.startswith("data.") and key != "data.resolution"


def has_new_data(config: TrainConfig, step: int) -> bool:
    """Whether the run goes on with other data from this step on."""
    return 0 < step == config.data.first_step


def check_resume(old: Mapping[str, Any], new: TrainConfig, step: int) -> list[str]:
    """The keys that changed, as text for the log; raises ConfigError for changes that are refused.

    old: the config stored in the checkpoint, as plain data. step: the checkpoint's. Where data.first_step is this step,
    the run goes on with other data, and their keys may change. Stages are compared as far as they are trained; those to
    come are free.
    """
    found, allowed = trained_differences(old, plain(new), step), new.run.allow_change
    free = [each for each in found if has_new_data(new, step) and of_data(each.key)]
    identity = [each for each in found if each.kind == "identity" and each not in free]
    schedule = [each for each in found if each.kind == "schedule" and each.key not in allowed]
    if identity or schedule:
        lines = [
            "this run folder was started with another config:",
            *(f"  {e.key}: {e.before} in the checkpoint, {e.now} now; it is part of what the run is" for e in identity),
            *(f"  {e.key}: {e.before} in the checkpoint, {e.now} now" for e in schedule),
        ]
        if schedule:  # quoted, because shells read [...] as a pattern
            keys = ",".join([*allowed, *(each.key for each in schedule)])
            lines.append(f"To go on with the new schedule, add 'run.allow_change=[{keys}]'")
        if staged := [each for each in identity if may_change(each.key, type(new.model))]:
            lines.append(
                f"To go on with another {' or '.join(each.key for each in staged)} from step {step} on, keep what was "
                f"and add a stage (docs/stages.md): {_example(old, step, staged)}"
            )
        raise ConfigError("\n".join([*lines, "Use another run.name for a new run."]))
    changed = [f"{each.key}: {each.before} -> {each.now}" for each in found if not each.key.startswith("run.")]
    stages = [json.dumps(config.get("stages") or []) for config in (old, plain(new))]
    return changed + ([f"stages: {stages[0]} -> {stages[1]}"] if stages[0] != stages[1] else [])


def _example(old: Mapping[str, Any], step: int, changed: Sequence[Difference]) -> str:
    """The stages that were trained, and one more that makes the changes from this step on, as an override."""
    stages = [{key: value for key, value in stage.items() if value} for stage in trained_stages(old, step)]
    stages[-1]["until"] = max(1, step)
    new: dict[str, Any] = {}
    for each in changed:
        new = override(new, f"{each.key}={json.dumps(each.now)}")
    return f"'stages={yaml.safe_dump([*stages, new], default_flow_style=True, width=math.inf).strip()}'"


def trained_differences(old: Mapping[str, Any], new: Mapping[str, Any], step: int) -> list[Difference]:
    """Where two configs differ up to a step: in all keys of the stage that is trained there, and in those of class
    identity of the stages before it."""
    ends = sorted({*borders_before(old, step), *borders_before(new, step), step})
    found = [_differences(as_trained(old, end), as_trained(new, end)) for end in ends]
    last = found.pop()
    past = {each.key: each for stage in found for each in stage if each.kind == "identity"}
    return [*last, *(each for key, each in past.items() if key not in {one.key for one in last})]
