"""Checkpoints that are complete or absent: written beside, flushed, renamed. Found again by the same command.

A checkpoint is a folder `step_00001000` with the tensors (torch's distributed checkpoint) and `meta.json`: step,
config, muP table and its hash, fingerprints of data and encoders, versions, size and SHA-256 of each file. No classes,
no pickled objects. A snapshot is the same with the EMA weights alone.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from .checkpoint_files import META, digest_files, superseded, verify_files
from .parallel.engine import CheckpointError, Engine

_NAME = re.compile(r"step_(\d{8,})")
_MOST_FAILURES = 3
T = TypeVar("T")


def write_atomically(path: Path, text: str) -> None:
    """The whole text or nothing, also after a crash of the machine, and whoever else writes it at the same time."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a `checkpoints` folder, oldest first."""
    found = [p for p in folder.glob("step_*") if _NAME.fullmatch(p.name) and (p / META).is_file()]
    return sorted(found, key=_step_of)


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


def together(action: Callable[[], T], group: dist.ProcessGroup) -> list[T]:
    """action() on every rank; the results by rank. Where it fails on any rank, CheckpointError is raised on all: none
    waits for one that has given up."""
    mine: tuple[Any, str | None]
    try:
        mine = action(), None
    except CheckpointError as error:
        mine = None, str(error)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        mine = None, f"{type(error).__name__}: {error}"
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for _, error in everyone:
        if error is not None:
            raise CheckpointError(error)
    return [result for result, _ in everyone]


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


def lock_folder(folder: Path, wait_s: float = 30.0, other: str = "another run.name or run.dir") -> IO[str]:
    """Hold a folder as long as the returned file is open; two runs in one folder would mix their lines.

    other: what a user can choose in its place.

    Waits for a predecessor that is ending; raises CheckpointError where the folder stays in use. The system lets go
    of the lock when the process ends, however it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 (open as long as the run)
    except OSError as error:
        raise CheckpointError(f"the folder {folder} cannot be written ({error}): choose {other}") from None
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise CheckpointError(
                    f"{folder} is in use by another process that has not ended: stop it, or choose {other}"
                ) from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return file


class Checkpointer:
    """Writes and reads the checkpoints of one run folder; the same calls on all ranks.

    A save copies the tensors and returns; a thread writes the copies while training goes on. At most one save is in
    flight, and meanwhile `group` belongs to its threads: a collective of the training thread would mix with theirs.

    keep_last, keep_every: see checkpoint_files.superseded. asynchronous: False waits for every save. tell: is given
    the warning that a save failed.
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

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], wait: bool = False) -> None:
        """Start to write checkpoint `step`; once it is complete, older ones are cleared away. wait: until then.

        A failed save is told and leaves the older checkpoints as they are. CheckpointError is raised where `wait` is
        set, or at the third failure in a row.
        """
        self._start(self._checkpoints, step, tensors, meta, wait)

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
        self, folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], wait: bool
    ) -> None:
        began = time.perf_counter()
        self.wait()
        beside = folder / f".step_{step:08d}.tmp"
        saving: Future[float] = Future()
        try:
            together(lambda: _make_empty(beside) if self._rank == 0 else None, self._group)
            written = self._engine.save(beside, tensors, averages_only=folder == self._snapshots)
            saving = self._thread.submit(self._finish, written, beside, meta)
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

    def _finish(self, written: Future[None], beside: Path, meta: Mapping[str, Any]) -> float:
        """In the thread: complete a checkpoint once every rank has written its files; returns the seconds it took."""
        began = time.perf_counter()
        try:
            together(written.result, self._group)
            shares = together(lambda: digest_files(beside, self._rank, self._size), self._group)
            files = {name: digest for share in shares for name, digest in share.items()}
            complete = {**meta, "files": files}
            together(lambda: self._publish(beside, complete) if self._rank == 0 else None, self._group)
        except CheckpointError as error:
            if self._rank == 0:
                shutil.rmtree(beside, ignore_errors=True)
            raise _not_written(beside, error) from None
        return time.perf_counter() - began

    def _publish(self, beside: Path, meta: dict[str, Any]) -> None:
        folder, name = beside.parent, beside.name[1 : -len(".tmp")]
        final = folder / name
        write_atomically(beside / META, json.dumps(meta))
        _sync_folder(beside)
        if final.exists():  # a run that was reset to an earlier checkpoint writes this step again
            old = folder / f".{name}.old"
            shutil.rmtree(old, ignore_errors=True)  # of a process that was killed here
            final.rename(old)
        beside.rename(final)
        _sync_folder(folder)
        if folder == self._checkpoints:
            complete = {_step_of(path): path for path in complete_checkpoints(folder)}
            for step in superseded(list(complete), self._keep_last, self._keep_every):
                complete[step].rename(folder / f".{complete[step].name}.old")  # absent at once, then deleted
        for path in folder.glob(".step_*"):
            shutil.rmtree(path, ignore_errors=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _make_empty(folder: Path) -> None:
    if folder.exists():  # of a process that was killed
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _not_written(beside: Path, error: CheckpointError) -> CheckpointError:
    return CheckpointError(f"{beside.parent / beside.name[1 : -len('.tmp')]} was not written: {error}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
