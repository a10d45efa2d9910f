"""Checkpoints that are complete or absent: written beside, flushed, renamed. Found again by the same command.

A checkpoint is a folder `step_00001000` with the tensors (torch's distributed checkpoint) and `meta.json`: step,
config, muP table and its hash, fingerprints of data and encoders, versions. No classes, no pickled objects.
"""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from torch import Tensor

from .parallel.engine import CheckpointError, Engine

META = "meta.json"
_NAME = re.compile(r"step_(\d{8,})")


def write_atomically(path: Path, text: str) -> None:
    """The whole text or nothing, also after a crash of the machine."""
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a `checkpoints` folder, oldest first."""
    found = [p for p in folder.glob("step_*") if _NAME.fullmatch(p.name) and (p / META).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


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
        return json.loads((checkpoint / META).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / META} cannot be read: {error}") from None


def check_same_model(meta: Mapping[str, Any], table: Mapping[str, Any], checkpoint: Path, rules: bool) -> None:
    """Raise CheckpointError unless the checkpoint's muP table has the parameters and shapes of `table`, and, where
    `rules` is set, is the same table."""
    old, new = meta["mup"]["rows"], table["rows"]
    wrong = sorted(n for n in old.keys() | new.keys() if old.get(n, {}).get("shape") != new.get(n, {}).get("shape"))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{checkpoint} is of another model: {len(wrong)} parameters differ, first {name}: "
            f"{old.get(name, {}).get('shape', 'absent')} in the checkpoint, "
            f"{new.get(name, {}).get('shape', 'absent')} in the config. Use the config it was trained with."
        )
    if rules and meta["mup"]["sha256"] != table["sha256"]:
        changed = [n for n in new if old[n] != new[n]]
        raise CheckpointError(
            f"{checkpoint} was trained with another muP table (first difference: {(changed or ['settings'])[0]}). "
            "Its learning rates or multipliers would change in mid-run; start another run with run.init_from."
        )


def lock_folder(folder: Path, wait_s: float = 30.0) -> IO[str]:
    """Hold the run folder as long as the returned file is open; two runs in one folder would mix their lines.

    Waits for a predecessor that is ending; raises CheckpointError where the folder stays in use. The system lets go
    of the lock when the process ends, however it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 (open as long as the run)
    except OSError as error:
        raise CheckpointError(f"the run folder {folder} cannot be written ({error}): choose another run.dir") from None
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise CheckpointError(
                    f"{folder} is in use by another run that has not ended: stop it, or use another run.name"
                ) from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return file


class Checkpointer:
    """Writes and reads the checkpoints of one run folder; the same call on all ranks."""

    def __init__(self, folder: Path, engine: Engine, group: dist.ProcessGroup, keep_last: int) -> None:
        self._folder = folder / "checkpoints"
        self._engine = engine
        self._group = group
        self._keep_last = keep_last

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write checkpoint `step`; it is there, complete, when this returns, and older ones are cleared away."""
        final = self._folder / f"step_{step:08d}"
        beside = self._folder / f".{final.name}.tmp"
        if dist.get_rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        dist.barrier(group=self._group)
        self._engine.save(beside, tensors)
        dist.barrier(group=self._group)
        if dist.get_rank() == 0:
            write_atomically(beside / META, json.dumps(dict(meta)))
            if final.exists():  # a run that was reset to an earlier checkpoint writes this step again
                old = self._folder / f".{final.name}.old"
                shutil.rmtree(old, ignore_errors=True)  # of a process that was killed here
                final.rename(old)
            beside.rename(final)
            _sync_folder(self._folder)
            self._clear()
        dist.barrier(group=self._group)

    def wait(self) -> None:
        """Until no save is in flight: none is once save() has returned."""

    def load(self, checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
        """Read weights, optimizer and `tensors` in place."""
        self._engine.load(checkpoint, tensors)

    def _clear(self) -> None:
        for path in complete_checkpoints(self._folder)[: -self._keep_last]:
            path = path.rename(self._folder / f".{path.name}.old")  # absent at once, then deleted
        for path in self._folder.glob(".step_*"):
            shutil.rmtree(path, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
