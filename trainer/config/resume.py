"""Which keys of a config may differ from the config that the run was started with."""

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .keys import flatten, key_class, plain
from .schema import TrainConfig


def check_resume(old: Mapping[str, Any], new: TrainConfig) -> list[str]:
    """The schedule and runtime keys that changed, as text for the log; raises ConfigError for changes that are refused.

    old: the config stored in the checkpoint, as plain data.
    """
    # A key that the checkpoint's code did not have yet acted then as its default acts now.
    defaults = {k: v for k, v in flatten(plain(TrainConfig())).items() if not k.startswith("model.")}
    before, after = defaults | flatten(old), flatten(plain(new))
    changed, refused = [], []
    for key in sorted(before.keys() | after.keys()):
        if (a := before.get(key)) == (b := after.get(key)):
            continue
        kind = key_class(key)
        if kind == "identity":
            refused.append(f"{key}: {a} in the checkpoint, {b} now; it is part of what the run is")
        elif kind == "schedule" and key not in new.run.allow_change:
            refused.append(f"{key}: {a} in the checkpoint, {b} now; allow it with run.allow_change=[{key}]")
        elif not key.startswith("run."):
            changed.append(f"{key}: {a} -> {b}")
    if refused:
        raise ConfigError(
            "this run folder was started with another config:\n  "
            + "\n  ".join(refused)
            + "\nUse another run.name for a new run."
        )
    return changed
