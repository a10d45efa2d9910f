"""A run that begins at another run's checkpoint and goes on under other schedule and runtime keys."""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.checksums import META
from ..checkpoint.compatible import check_pickles
from ..checkpoint.find import find_checkpoint
from ..checkpoint.meta import read_meta
from ..config.keys import plain
from ..config.load import parse, to_yaml
from ..config.resume import differences, of_data, trained_differences
from ..config.schema import NAME_FORM, TrainConfig, is_name
from ..errors import CheckpointError, ConfigError
from ..monitor.records import METRICS, read_lines
from ..recovery.skipped_ranges import read_skipped_ranges, write_skipped_ranges


def branch(
    source: Path, output: Path, overrides: Sequence[str], trust_pickles: bool = False, new_data: bool = False
) -> list[str]:
    """Make the run folder `output`, which appears whole or not at all. It holds the checkpoint `source` (of a run
    folder: its newest) and a config.yaml that goes on from it; returns what is to be told.

    overrides: `section.key=value` of class schedule or runtime. new_data: it goes on with other data, whose order
    begins there, and keys of the data may change too. Raises ConfigError for others, CheckpointError for a
    checkpoint that is damaged, or of averages alone.
    """
    checkpoint = find_checkpoint(source)
    meta = read_meta(checkpoint)
    check_pickles(meta, checkpoint, trust_pickles, "--trust-pickles")
    if meta.get("averages_only"):
        raise CheckpointError(
            f"{checkpoint} holds averages of the weights alone, without the optimizer's moments: start a new run from "
            f"it with run.init_from={checkpoint}, or branch from a checkpoint in checkpoints/"
        )
    if new_data:
        overrides = [*overrides, f"data.first_step={meta['step']}"]
    config, changes = _config(meta, checkpoint, output, overrides, new_data)
    beside = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)  # of a command that was killed
    try:
        (beside / "checkpoints").mkdir(parents=True)
        _write(beside, checkpoint, meta, config)
        beside.rename(output)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is gone: has its run removed the checkpoint meanwhile?") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return [f"{output} begins at step {meta['step']} of {checkpoint}", *(f"changed: {change}" for change in changes)]


def _config(
    meta: dict[str, Any], checkpoint: Path, output: Path, overrides: Sequence[str], new_data: bool
) -> tuple[TrainConfig, list[str]]:
    """The config of the branch, which allows the schedule keys that change, and the changes as text."""
    if not is_name(output.name):
        raise ConfigError(f"--output: {output.name!r} names no run folder; expected {NAME_FORM}")
    if {text.partition("=")[0] for text in overrides} & {"run.name", "run.dir"}:
        raise ConfigError("run.name and run.dir follow from --output: leave them out")
    config = parse(meta["config"], f"the config of {checkpoint}", overrides)
    found = trained_differences(meta["config"], plain(config), meta["step"])
    keys = {each.key for each in found}
    if hidden := [e.key for e in differences(meta["config"], config) if e.key not in keys | {"stages"}]:
        raise ConfigError(f"{', '.join(hidden)}: the stage at step {meta['step']} gives its own; change it in stages")
    if wrong := [each for each in found if each.kind == "identity" and not (new_data and of_data(each.key))]:
        raise ConfigError(
            "a branch keeps what the run is:\n  "
            + "\n  ".join(f"{each.key}: {each.before} in the checkpoint, {each.now} now" for each in wrong)
            + "\nChange keys of class schedule or runtime (docs/config.md), with --new-data also those of the data, or "
            "start a new run with run.init_from."
        )
    allowed = tuple(each.key for each in found if each.kind == "schedule")
    if config.train.steps < meta["step"]:
        raise ConfigError(f"train.steps {config.train.steps} is before step {meta['step']}, at which {checkpoint} is")
    own = {"name": output.name, "dir": str(output.parent), "resume": True, "allow_change": allowed}
    changes = [f"{each.key}: {each.before} -> {each.now}" for each in found if not each.key.startswith("run.")]
    return config.model_copy(update={"run": config.run.model_copy(update=own)}), changes


def _write(folder: Path, checkpoint: Path, meta: dict[str, Any], config: TrainConfig) -> None:
    step = meta["step"]
    copied = folder / "checkpoints" / f"step_{step:08d}"
    # Those from before there were checksums list no files.
    listed = meta.get("files") or [path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()]
    for name in {META, *map(str, listed)}:
        path, target = checkpoint / name, copied / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(path, target)
    (folder / "mup.json").write_text(json.dumps(meta["mup"], indent=1))
    (folder / "config.yaml").write_text(to_yaml(config))
    if checkpoint.parent.name == "checkpoints":  # in a run folder: what belongs to the steps up to here
        source = checkpoint.parent.parent
        lines = [line.raw for line in read_lines(source) if line.record is not None and line.record["step"] <= step]
        (folder / METRICS).write_bytes(b"".join(lines))
        if config.data.first_step != step and (
            skipped := [each for each in read_skipped_ranges(source) if each.at_step <= step]
        ):
            write_skipped_ranges(folder, skipped)


def _link_or_copy(path: Path, target: Path) -> None:
    """Give the file a second name, which takes no room: nobody writes into a checkpoint, it is renamed and removed as a
    whole. Copy it where the file system has no second names, or the file is another user's."""
    with contextlib.suppress(OSError):
        os.link(path.resolve(), target)
        return
    shutil.copy2(path, target)
