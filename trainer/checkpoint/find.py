"""Complete checkpoints of a run folder: found, verified, set aside."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..collectives import together
from ..errors import CheckpointError
from .checksums import META, verify_files

_NAME = re.compile(r"step_(\d{8,})")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a `checkpoints` folder, oldest first."""
    found = [p for p in folder.glob("step_*") if _NAME.fullmatch(p.name) and (p / META).is_file()]
    return sorted(found, key=step_of)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means: the folder itself, or the newest one of a run folder."""
    if (path / META).is_file():
        return path
    found = complete_checkpoints(path / "checkpoints") or complete_checkpoints(path)
    if not found:
        raise CheckpointError(f'no complete checkpoint in "{path}": expected step_*/{META} there or in checkpoints/')
    return found[-1]


def read_meta(checkpoint: Path) -> dict[str, Any]:
    try:
        meta = json.loads((checkpoint / META).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / META} cannot be read: {error}") from None
    if not isinstance(meta, dict):
        raise CheckpointError(f"{checkpoint / META} cannot be read: expected a JSON object")
    return meta


def weights_of(meta: Mapping[str, Any]) -> str:
    """Name of the weights to go on from, as Engine.load_weights takes it: of a snapshot the first decay's average."""
    return f"ema_{meta['config']['ema']['decays'][0]}" if meta.get("averages_only") else "model"


def verify(checkpoint: Path, group: dist.ProcessGroup) -> None:
    """Compare every file with its checksum, each rank a share; the same on all ranks.

    Raises CheckpointError that names a damaged or missing file. Checkpoints from before there were checksums pass.
    """
    if damage := _damage_of(checkpoint, group):
        raise CheckpointError(f"{damage}; use another checkpoint, or copy this one again")


def _damage_of(checkpoint: Path, group: dist.ProcessGroup) -> str | None:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    try:
        together(lambda: verify_files(checkpoint, read_meta(checkpoint).get("files", {}), rank, size), group)
    except CheckpointError as error:
        return str(error)
    return None


def newest_good(folder: Path, group: dist.ProcessGroup) -> tuple[Path | None, dict[Path, str]]:
    """(newest complete checkpoint of a run folder that verifies, what is wrong with each newer one), on all ranks.

    None where there is no checkpoint; raises CheckpointError where there are some and all are damaged.
    """
    found: list[Any] = [complete_checkpoints(folder / "checkpoints")]
    dist.broadcast_object_list(found, src=0, group=group)
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(found[0]):
        damage = _damage_of(checkpoint, group)
        if damage is None:
            return checkpoint, damaged
        damaged[checkpoint] = damage
    if damaged:
        raise CheckpointError(
            f"no checkpoint of {folder} is undamaged: {'; '.join(damaged.values())}. Restore one from a copy, or use "
            "another run.name to start anew."
        )
    return None, {}


def set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, so that it is neither resumed from nor counted among those to keep."""
    aside = checkpoint.with_name(f"{checkpoint.name}.corrupt")
    shutil.rmtree(aside, ignore_errors=True)  # of this step, set aside before
    checkpoint.rename(aside)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))
