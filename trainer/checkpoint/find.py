"""Complete checkpoints of a run folder: found, verified, set aside."""

import contextlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..collectives import together
from ..errors import CheckpointError
from ..files import write_atomically
from ..parallel.mesh import rank
from .checksums import META, verify_files
from .meta import NAME, read_meta

logger = logging.getLogger(__name__)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a `checkpoints` folder, oldest first."""
    found = [p for p in folder.glob("step_*") if NAME.fullmatch(p.name) and (p / META).is_file()]
    return sorted(found, key=step_of)


Newest = tuple[Path | None, dict[Path, str]]


def find_checkpoint(path: Path, group: dist.ProcessGroup | None = None) -> Path:
    """The checkpoint that a user means: the folder itself, or the newest undamaged one of a run folder.

    It is verified (see verify), and newer ones that are damaged are told and left as they are: a run may be training in
    this folder. group: as for verify; its ranks take what rank 0 finds. Raises CheckpointError where there is none.
    """
    if (path / META).is_file():
        found = [path]
    else:
        found = complete_checkpoints(path / "checkpoints") or complete_checkpoints(path)
    checkpoint, damaged = _newest_good(found, group)
    if checkpoint is not None:
        for damage in damaged.values() if rank() == 0 else ():
            logger.warning("warning: %s; passed over, %s is taken", damage, checkpoint)
        return checkpoint
    if path in damaged:
        raise CheckpointError(f"{damaged[path]}; use another checkpoint, or copy this one again")
    if damaged:
        raise CheckpointError(f"no checkpoint of {path} is undamaged: {'; '.join(damaged.values())}")
    raise CheckpointError(f'no complete checkpoint in "{path}": expected step_*/{META} there or in checkpoints/')


def weights_of(meta: Mapping[str, Any]) -> str:
    """Name of the weights to go on from, as Engine.load_weights takes it: of a snapshot the first decay's average."""
    return f"ema_{meta['config']['ema']['decays'][0]}" if meta.get("averages_only") else "model"


def verify(checkpoint: Path, group: dist.ProcessGroup | None = None) -> None:
    """Check meta.json and compare every file with its checksum. Whatever is read of a checkpoint was verified by this.

    group: of ranks that each take a share, with one outcome for all; None: of this process alone. Raises
    CheckpointError that names a damaged or missing file. In checkpoints from before there were checksums meta.json
    alone is checked.
    """
    number, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def check() -> None:
        if (files := read_meta(checkpoint).get("files")) is not None:
            verify_files(checkpoint, files, number, size)

    try:
        together(check, group) if group is not None else check()
    except OSError as error:
        raise CheckpointError(str(error)) from None


def _newest_good(checkpoints: Sequence[Path], group: dist.ProcessGroup | None) -> tuple[Path | None, dict[Path, str]]:
    """(the last of `checkpoints` that verifies, or None; what is wrong with each after it), on all ranks."""
    found: list[Any] = [list(checkpoints)]
    if group is not None:
        dist.broadcast_object_list(found, src=0, group=group)
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(found[0]):
        try:
            verify(checkpoint, group)
        except CheckpointError as error:
            damaged[checkpoint] = str(error)
        else:
            return checkpoint, damaged
    return None, damaged


def newest_good(folder: Path, group: dist.ProcessGroup) -> Newest:
    """(newest complete checkpoint of a run folder that verifies, what is wrong with each newer one), on all ranks.

    None where there is no checkpoint; raises CheckpointError where there are some and all are damaged.
    """
    checkpoint, damaged = _newest_good(complete_checkpoints(folder / "checkpoints"), group)
    if checkpoint is not None:
        return checkpoint, damaged
    if damaged:
        raise CheckpointError(
            f"no checkpoint of {folder} is undamaged: {'; '.join(damaged.values())}. Restore one from a copy, or use "
            "another run.name to start anew."
        )
    return None, {}


def set_aside(checkpoint: Path, reason: str) -> None:
    """Rename a damaged checkpoint, so that it is neither resumed from nor counted among those to keep; its reason.txt
    says why."""
    aside = checkpoint.with_name(f"{checkpoint.name}.corrupt")
    shutil.rmtree(aside, ignore_errors=True)  # of this step, set aside before
    checkpoint.rename(aside)
    with contextlib.suppress(OSError):  # without room for it the checkpoint is set aside all the same
        write_atomically(aside / "reason.txt", f"{reason}\n")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))
