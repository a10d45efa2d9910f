"""Checkpoints that are complete or absent: written beside, flushed, renamed. Found again by the same command.

A checkpoint is a folder `step_00001000` with the tensors (torch's distributed checkpoint) and `meta.json`: step,
config, muP table and its hash, fingerprints of data and encoders, versions, size and SHA-256 of each file, and a digest
of all that. No classes, no pickled objects. A snapshot is the same with the EMA weights alone.
"""

import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from ..collectives import together
from ..errors import CheckpointError
from ..files import sync_folder, write_atomically
from ..parallel.engine import Engine
from .checksums import META, bytes_of, digest_files, superseded
from .find import complete_checkpoints, step_of
from .meta import seal

_MOST_FAILURES = 3
T = TypeVar("T")


class Checkpointer:
    """Writes and reads the checkpoints of one run folder; the same calls on all ranks.

    A save copies the tensors and returns; a thread writes the copies while training goes on. At most one save is in
    flight, and meanwhile `group` belongs to its threads: a collective of the training thread would mix with theirs.

    keep_last, keep_every: see checksums.superseded. asynchronous: False waits for every save. tell: called
    with the warning that a save failed.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        group: dist.ProcessGroup,
        keep_last: int,
        keep_every: int,
        asynchronous: bool,
        tell: Callable[[str], None],
    ) -> None:
        self._checkpoints, self._snapshots = folder / "checkpoints", folder / "ema"
        self._engine = engine
        self._group = group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._keep_last, self._keep_every = keep_last, keep_every
        self._asynchronous = asynchronous
        self._tell = tell
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[Path, Future[float]] | None = None
        self._failures: Counter[Path] = Counter()  # in a row, by folder
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        wait: bool = False,
        healthy_before: int | None = None,
    ) -> None:
        """Start to write checkpoint `step`; once it is complete, older ones are cleared away. wait: until then.
        healthy_before: see checksums.superseded.

        A failed save is told and leaves the older checkpoints as they are. CheckpointError is raised where `wait` is
        set, or at the third failure in a row.
        """
        self._start(self._checkpoints, step, tensors, meta, wait, healthy_before)

    def save_averages(self, step: int, averages: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Start to write a snapshot of `averages` (see EMA.tensors) alone, which is kept for good; fails as `save`."""
        self._start(self._snapshots, step, averages, {**meta, "averages_only": True}, wait=False)

    def wait(self) -> None:
        """Wait for the save in flight, if there is one."""
        self._end(required=False)

    def load(self, checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
        """Read weights, optimizer and `tensors` in place."""
        self.wait()
        self._engine.load(checkpoint, tensors)

    def figures(self) -> dict[str, float]:
        """Seconds since the last call in which saves kept training waiting, and that finished saves took to write;
        nothing where there was no save."""
        if self._saving is not None and self._saving[1].done():
            self.wait()
        seconds, self._seconds = self._seconds, defaultdict(float)
        return dict(seconds)

    def _start(
        self,
        folder: Path,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        wait: bool,
        healthy_before: int | None = None,
    ) -> None:
        began = time.perf_counter()
        self.wait()
        beside = folder / f".step_{step:08d}.tmp"
        saving: Future[float] = Future()
        try:
            together(lambda: self._make_room(beside, healthy_before) if self._rank == 0 else None, self._group)
            written = self._engine.save(beside, tensors, averages_only=folder == self._snapshots)
            saving = self._thread.submit(self._finish, written, beside, meta, healthy_before)
        except CheckpointError as error:
            saving.set_exception(_not_written(beside, error))
        self._saving = folder, saving
        # The third failure in a row raises, which all ranks must do at the same point.
        last_try = self._failures[folder] == _MOST_FAILURES - 1
        if wait or last_try or not self._asynchronous:
            self._end(required=wait)
        self._seconds["checkpoint_blocked_s"] += time.perf_counter() - began

    def _end(self, required: bool) -> None:
        if self._saving is None:
            return
        (folder, saving), self._saving = self._saving, None
        try:
            self._seconds["checkpoint_write_s"] += saving.result()
            if self._failures.pop(folder, 0):
                self._tell(f"{folder} can be written again")
        except (CheckpointError, RuntimeError) as error:  # RuntimeError: a collective broke, another rank has died
            self._failures[folder] += 1
            if required or self._failures[folder] == _MOST_FAILURES:
                raise CheckpointError(f"{error} (failure {self._failures[folder]} in a row)") from None
            self._tell(f"warning: {error}; training goes on, and the next save tries again")

    def _finish(
        self, written: Future[None], beside: Path, meta: Mapping[str, Any], healthy_before: int | None
    ) -> float:
        """In the thread: complete a checkpoint once every rank has written its files; returns the seconds it took."""
        began = time.perf_counter()
        try:
            together(written.result, self._group)
            shares = together(lambda: digest_files(beside, self._rank, self._size), self._group)
            files = {name: digest for share in shares for name, digest in share.items()}
            complete = {**meta, "files": files}
            together(lambda: self._publish(beside, complete, healthy_before) if self._rank == 0 else None, self._group)
        except CheckpointError as error:
            if self._rank == 0:
                shutil.rmtree(beside, ignore_errors=True)
            raise _not_written(beside, error) from None
        return time.perf_counter() - began

    def _make_room(self, beside: Path, healthy_before: int | None) -> None:
        """An empty folder for the next checkpoint. What need not be kept goes first, so that it takes no room: steps
        that were taken since have shown that a newer one is healthy."""
        self._clear(beside.parent, healthy_before)
        beside.mkdir(parents=True)

    def _clear(self, folder: Path, healthy_before: int | None) -> None:
        """Delete checkpoints that are superseded, and what is left of saves that were cut off."""
        if folder == self._checkpoints:
            complete = {step_of(path): path for path in complete_checkpoints(folder)}
            for step in superseded(list(complete), self._keep_last, self._keep_every, healthy_before):
                complete[step].rename(folder / f".{complete[step].name}.old")  # absent at once, then deleted
        for path in folder.glob(".step_*"):
            shutil.rmtree(path, ignore_errors=True)

    def _publish(self, beside: Path, meta: dict[str, Any], healthy_before: int | None) -> None:
        folder, name = beside.parent, beside.name[1 : -len(".tmp")]
        final = folder / name
        write_atomically(beside / META, seal(meta))
        sync_folder(beside)
        if final.exists():  # a run that was reset to an earlier checkpoint writes this step again
            old = folder / f".{name}.old"
            shutil.rmtree(old, ignore_errors=True)  # of a process that was killed here
            final.rename(old)
        beside.rename(final)
        sync_folder(folder)
        self._clear(folder, healthy_before)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a run folder that this process holds: it may fill the disk."""
    for path in (*folder.glob("checkpoints/.step_*"), *folder.glob("ema/.step_*")):
        shutil.rmtree(path, ignore_errors=True)
    for path in (*folder.glob(".*.tmp"), *folder.glob("samples/.*.tmp")):
        if path.is_file():
            path.unlink()


def _not_written(beside: Path, error: CheckpointError) -> CheckpointError:
    folder = beside.parent
    return CheckpointError(f"{folder / beside.name[1 : -len('.tmp')]} was not written: {error}{_room_in(folder)}")


def _room_in(folder: Path) -> str:
    """Where a checkpoint takes more than is free: which ones may be removed, and which one a restart needs."""
    complete = complete_checkpoints(folder)
    sizes = {path: bytes_of(path) for path in [*folder.glob("step_*.corrupt"), *complete]}
    if not complete or sizes[complete[-1]] < shutil.disk_usage(folder).free:
        return ""
    told = [f"{path.name} ({size / 1e9:.3g} GB)" for path, size in sizes.items()]
    if may_go := told[:-1]:
        return f". These may be removed: {', '.join(may_go)}; keep {told[-1]}, from which a restart goes on"
    return f". Make room elsewhere on this disk: a restart needs {told[-1]}, and the next one as much again"
