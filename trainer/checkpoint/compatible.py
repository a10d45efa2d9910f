"""Whether a checkpoint may be used by a config, a muP table and an engine."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

OF_DATA = ("data", "order", "images", "begin")
"""The fingerprints that say which samples a run reads."""
_OTHER_DATA = "go on from here as with other data (launch/branch.py --new-data)"
_OLDER_READING = {
    "order": "data.sources had another order, in which single batches did not keep their weights",
    "images": "ICC profiles of images were passed over, and the EXIF orientation of PNG did not count in the index, "
    "and the data hold such images",
}


def lasting(names: Iterable[str]) -> list[str]:
    """The parameters that another run can take over and an export has: all but those of REPA's projector."""
    return [name for name in names if not name.startswith("projector.")]


def check_same_model(meta: Mapping[str, Any], table: Mapping[str, Any], checkpoint: Path, rules: bool) -> None:
    """Raise CheckpointError unless the checkpoint's muP table has the (lasting) parameters, shapes and multipliers of
    `table`, and, where `rules` is set, is the same table."""
    old, new = meta["mup"]["rows"], table["rows"]
    names = old.keys() | new.keys()
    wrong = sorted(
        n for n in (names if rules else lasting(names)) if old.get(n, {}).get("shape") != new.get(n, {}).get("shape")
    )
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{checkpoint} is of another model: {len(wrong)} parameters differ, first {name}: "
            f"{old.get(name, {}).get('shape', 'absent')} in the checkpoint, "
            f"{new.get(name, {}).get('shape', 'absent')} in the config. Use the config it was trained with."
        )
    if not rules and (other := _other_function(meta["mup"], table)):
        raise CheckpointError(
            f"{checkpoint} would compute another function under this config: {other}. Keep its model.* and mup.*; to "
            "go on under others, export it (launch/export.py folds the multipliers into the weights) and import that"
        )
    if rules and meta["mup"]["sha256"] != table["sha256"]:
        changed = [n for n in new if old[n] != new[n]]
        raise CheckpointError(
            f"{checkpoint} was trained with another muP table (first difference: {(changed or ['settings'])[0]}). "
            "Its learning rates or multipliers would change in mid-run; start another run with run.init_from."
        )


def check_usable(meta: Mapping[str, Any], table: Mapping[str, Any], predicts: str, checkpoint: Path) -> None:
    """Raise CheckpointError unless the checkpoint's weights mean under the config what they were trained as: another
    run may start from them, and they may be sampled from. predicts: objective.predict of the config."""
    check_same_model(meta, table, checkpoint, rules=False)
    trained = meta["config"]["objective"].get("predict", "velocity")  # older ones predict the velocity, or noise
    if trained != predicts:
        raise CheckpointError(
            f"{checkpoint} was trained with objective.predict {trained}, and the config says {predicts}: its output "
            f"would be taken for something else; set objective.predict={trained}"
        )
    check_weights_readable(meta, checkpoint)


def _other_function(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first difference of two tables in what multiplies weights or branches."""
    factors = [
        {f"the multiplier of {name}": table["rows"][name].get("multiplier", 1.0) for name in lasting(table["rows"])}
        | {"the scale of branches": table.get("settings", {}).get("branch_scale", 1.0)}
        for table in (old, new)
    ]
    for what, value in factors[1].items():
        if factors[0][what] != value:
            return f"{what} is {factors[0][what]:g} in the checkpoint, {value:g} in the config"
    return None


def check_same_engine(meta: Mapping[str, Any], engine: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise CheckpointError unless the checkpoint can be resumed by `engine` (see engine_of)."""
    written = engine_of(meta)
    if written != engine:
        to = f"--engine {engine['name']}" + (f" --zero-stage {engine['stage']}" if engine["name"] == "zero" else "")
        if written["name"] == engine["name"] == "zero":
            to = "--engine fsdp2 (and from there to zero again)"
        raise CheckpointError(
            f"{checkpoint} was written by {_described(written)}, this run has {_described(engine)}: go on as it was "
            f"written, or convert it to a new run folder: {convert_command(meta, engine, checkpoint)} {to}"
        )


def check_weights_readable(meta: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise CheckpointError for a checkpoint of DeepSpeed's own files, which only training can read."""
    if engine_of(meta)["name"] == "zero":
        raise CheckpointError(
            f"{checkpoint} was written by {_described(engine_of(meta))}, whose files only a resumed run reads: convert "
            f"it first: {convert_command(meta, {'name': 'fsdp2'}, checkpoint)} --engine fsdp2"
        )


def check_same_contents(meta: Mapping[str, Any], fingerprints: Mapping[str, str], checkpoint: Path) -> None:
    """Raise CheckpointError unless data and encoders are those that the checkpoint was trained with. Digests of all
    weights of an encoder are not in checkpoints from before there were any."""
    trained = meta["fingerprints"]
    for part, fingerprint in fingerprints.items():
        if trained.get(part) != fingerprint and (part in trained or not part.endswith("_weights")):
            if part in _OLDER_READING:
                raise CheckpointError(
                    f"{checkpoint} was begun when {_OLDER_READING[part]}: go on with the code that it was begun with "
                    f"(commit {meta.get('commit') or 'unknown'}), or {_OTHER_DATA}, or start a new run from "
                    "its weights with run.init_from"
                )
            if part == "begin":
                raise CheckpointError(
                    f"{checkpoint} is of a stage that went on with what the stages before it had left over of the "
                    "data, and these read other samples, shares or batches now: keep their data as they were"
                )
            what = part.removesuffix("_weights").replace("_", " ")
            why = "use another run.name for a new run"
            if part == "data":
                why += f", or {_OTHER_DATA}"
            if part.endswith("_weights"):
                why = f"a file is damaged, or of another version: fetch it again, or {why}"
            raise CheckpointError(f"{checkpoint} was trained with other {what} contents than there are now: {why}")


def check_pickles(meta: Mapping[str, Any], checkpoint: Path, trusted: bool, flag: str) -> None:
    """Raise CheckpointError for a checkpoint of pickles that another user may have made, unless it is `trusted`.

    flag: by which a user says so. Files that the user has copied or unpacked belong to the user: there the docs warn.
    """
    if trusted or engine_of(meta)["name"] != "zero":
        return
    for path in (checkpoint, *checkpoint.rglob("*")):
        if path.lstat().st_uid != os.geteuid():
            raise CheckpointError(
                f"{path} is not a file of this user, and a checkpoint of parallel.engine zero is DeepSpeed's pickles, "
                f"which can run any code when they are read: if you trust who made it, add {flag}"
            )


def engine_of(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """What wrote a checkpoint: {"name": "fsdp2"}, or {"name": "zero", "stage": S, "world_size": W}."""
    return meta.get("engine", {"name": "fsdp2"})


def convert_command(meta: Mapping[str, Any], engine: Mapping[str, Any], checkpoint: Path) -> str:
    """How to start launch/convert.py: on the processes of the zero side."""
    world_size = engine_of(meta).get("world_size") or engine.get("world_size", 1)
    return f"torchrun --nproc-per-node {world_size} launch/convert.py --checkpoint {checkpoint} --output FOLDER"


def _described(engine: Mapping[str, Any]) -> str:
    if engine["name"] == "zero":
        return f"parallel.engine zero with parallel.zero_stage {engine['stage']} on {engine['world_size']} processes"
    return f"parallel.engine {engine['name']}"
