"""A worker of trunks: takes one after another, and trains each with its branches."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic

from data.files import parse_json

from ..build.branch import branch
from ..checkpoint.find import complete_checkpoints, step_of
from ..collectives import from_rank_0, on_rank_0
from ..config.resolve import resolve
from ..config.schema import TrainConfig
from ..errors import CheckpointError, ConfigError, DivergedError
from ..estimate.micro_batch import Fitting, find_fitting
from ..files import json_text, lock_folder, write_atomically
from ..monitor.records import read_status
from ..parallel.mesh import World, open_world, world_size
from .local_workers import run_workers
from .training import train_quietly
from .trunks import T, Trunks, decay_steps

_DIVERGED = "diverged.txt"


def open_folder(trunks: Trunks[Any]) -> None:
    """Make the folder of the trunks, or go on in it. Raises ConfigError where those that it holds are others."""
    trunks.folder.mkdir(parents=True, exist_ok=True)
    path, own = trunks.folder / trunks.RECORD, trunks.identity()
    try:
        before = _flat(parse_json(path.read_bytes()))
    except FileNotFoundError:
        write_atomically(path, json_text(own, indent=1) + "\n")
        return
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(f"{path} is damaged: remove {trunks.folder}, or restore the file") from None
    now = _flat(parse_json(json_text(own).encode()))
    if differ := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        lines = [f"  {key}: {before.get(key)} there, {now.get(key)} now" for key in differ]
        others, remedy = trunks.OTHERS
        raise ConfigError("\n".join([f"{trunks.folder} holds {others}:", *lines, remedy]))


def recorded_steps(path: Path) -> tuple[int, ...]:
    """The durations that a folder's record names; () where there is none, or a damaged one."""
    try:
        return tuple(int(steps) for steps in parse_json(path.read_bytes())["durations"])
    except (OSError, ValueError, LookupError, TypeError):
        return ()


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    named = {f"the {key.replace('_', ' ')}": value for key, value in identity.items() if key != "config"}
    return {**identity["config"], **named}


def train_trunks(
    trunks: Trunks[T], largest: T, command: Sequence[str], workers: int, kill: Callable[[int], None]
) -> int:
    """Train all trunks that nobody else has, in this process (or this torchrun) or in `workers` processes of this
    machine; returns 0, or 1 where one of these failed.

    largest: the trunk that needs the most memory. command: starts a worker, after Python's own name. kill: ends a
    process, by its number, with all that descend from it.
    """
    if workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}")
    if workers > 1:
        if world_size() > 1:
            raise ConfigError("--workers starts processes of its own: use it without torchrun")
        return run_workers(trunks.folder, Progress(trunks), [sys.executable, *command], workers, kill)
    config = trunks.trunk_config(largest, trunks.steps[0])
    find = find_fitting(config, world_size(), trunks.folder)  # before the world opens, as in launch/train.py
    with open_world(resolve(config, world_size()).shard) as world:
        fitting = from_rank_0(world, find)
        terminal = sys.stdout  # what training prints goes to the logs of its trunk
        if not Worker(trunks, world, lambda text: print(text, file=terminal, flush=True), fitting).work():
            print(f"not all of {trunks.folder} is done: the same command goes on with it")
    return 0


def has_diverged(folder: Path) -> bool:
    """Whether a worker has seen this run diverge."""
    return (folder / _DIVERGED).is_file()


class Worker(Generic[T]):
    """One process, or all ranks of a torchrun. Several may work in one folder, also on several machines."""

    def __init__(
        self, trunks: Trunks[T], world: World, say: Callable[[str], None], fitting: Fitting | None = None
    ) -> None:
        """say: a line for the person at the terminal (called on rank 0). fitting: micro-batch of the largest trunk."""
        self._trunks, self._world, self._say, self._fitting = trunks, world, say, fitting

    def work(self) -> bool:
        """Train every trunk that no other worker has, until all are done or a signal asks to stop; what runs is saved
        then. Returns whether every branch is finished, or has diverged."""
        done = True
        for trunk in self._trunks.trunks():
            with self._held(trunk) as mine:
                if not mine:
                    self._tell(f"{trunk.name}: another worker has it")
                    done = False
                elif not self._train(trunk):
                    return False
        return done

    @contextlib.contextmanager
    def _held(self, trunk: T) -> Iterator[bool]:
        """Whether this worker holds the trunk, for a block of code."""
        with contextlib.ExitStack() as stack:

            def hold() -> bool:
                held = self._trunks.folder / trunk.name
                held.mkdir(parents=True, exist_ok=True)
                if not os.access(held, os.W_OK):
                    raise CheckpointError(f"{held} cannot be written: give rights, or choose another run.dir")
                try:
                    stack.enter_context(lock_folder(held, wait_s=0.0))
                    return True
                except CheckpointError:
                    return False

            yield from_rank_0(self._world, hold)

    def _train(self, trunk: T) -> bool:
        """All branches of a trunk, which is trained on to where each begins. False where a signal asked to stop."""
        trunks = self._trunks
        for steps in trunks.steps:
            output = trunks.branch_folder(trunk, steps)
            if not from_rank_0(self._world, output.is_dir):
                config = trunks.trunk_config(trunk, steps - decay_steps(trunks.target, steps))
                if (ended := self._run(config, trunk)) != "finished":
                    return ended == "failed"  # and so is done with
                on_rank_0(self._world, partial(self._branch, config, output, steps))
            if self._run(trunks.branch_config(trunk, steps), trunk) == "preempted":
                return False
        return True

    def _branch(self, trunk: TrainConfig, output: Path, steps: int) -> None:
        """Make the branch of `steps` from the end of its trunk. Raises ConfigError where the trunk is further."""
        newest = complete_checkpoints(trunk.run.folder / "checkpoints")[-1]
        if step_of(newest) != trunk.train.steps:
            raise ConfigError(
                f"{trunk.run.folder} is at step {step_of(newest)}, and the decay of {output.name} begins at "
                f"{trunk.train.steps}: remove {trunk.run.folder.parent}, and the same command trains it again"
            )
        branch(newest, output, self._trunks.branch_overrides(steps))

    def _run(self, config: TrainConfig, trunk: T) -> str:
        """finished, failed (it has diverged, now or before) or preempted."""
        folder = config.run.folder
        status = from_rank_0(self._world, lambda: read_status(folder))
        if status is not None and status[0] == "failed":
            self._tell(f"{folder} has failed: {status[1]} (remove {folder.parent} to train it again)")
            return "failed"
        log = self._trunks.folder / "logs" / f"{trunk.name}_rank{self._world.rank}.log"
        try:
            ended = train_quietly(config, self._world, log, self._fitting)
        except DivergedError as error:
            reason = str(error)
            on_rank_0(self._world, lambda: write_atomically(folder / _DIVERGED, reason + "\n"))
            self._tell(f"{folder} has failed: {reason}")
            return "failed"
        self._tell(f"{folder} is {ended.outcome} at step {ended.step}")
        return ended.outcome

    def _tell(self, text: str) -> None:
        if self._world.rank == 0:
            self._say(text)


class Progress(Generic[T]):
    """What the workers of one machine do: a line for each branch that ends."""

    def __init__(self, trunks: Trunks[T]) -> None:
        self._trunks = trunks
        self._told = set(self._ended())

    def __enter__(self) -> "Progress[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self.show()

    def show(self) -> None:
        """Tell what has ended since."""
        for folder, state in self._ended().items():
            if folder not in self._told:
                self._told.add(folder)
                print(f"{folder} is {state} ({len(self._told)} of {self._count})", flush=True)

    @property
    def _count(self) -> int:
        return len(self._trunks.steps) * len(list(self._trunks.trunks()))

    def _ended(self) -> dict[Path, str]:
        trunks = self._trunks
        folders = (trunks.branch_folder(t, steps) for t in trunks.trunks() for steps in trunks.steps)
        states = {folder: status[0] for folder in folders if (status := read_status(folder)) is not None}
        return {folder: state for folder, state in states.items() if state in ("finished", "failed")}
