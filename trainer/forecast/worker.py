"""A worker of a forecast: takes trunks, one after another, and trains each with its branches."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from data.files import parse_json

from ..build.branch import branch
from ..collectives import from_rank_0, on_rank_0
from ..config.schema import TrainConfig
from ..errors import CheckpointError, ConfigError, DivergedError
from ..estimate.micro_batch import Fitting
from ..files import json_text, lock_folder, write_atomically
from ..monitor.records import read_status
from ..parallel.mesh import World
from ..search.training import train_quietly
from .rungs import Rungs, Trunk, decay_steps

RUNGS = "rungs.json"


def open_folder(rungs: Rungs) -> None:
    """Make the folder of the rungs, or go on in it. Raises ConfigError where it is of another target."""
    rungs.folder.mkdir(parents=True, exist_ok=True)
    path, own = rungs.folder / RUNGS, rungs.identity()
    try:
        held = parse_json(path.read_bytes())
        before = {**held["config"], "the seed": held["seed"], "the decay's share": held["decay_share"]}
    except FileNotFoundError:
        write_atomically(path, json_text(own, indent=1) + "\n")
        return
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"{path} is damaged: remove {rungs.folder}, or restore the file") from None
    now = {**own["config"], "the seed": own["seed"], "the decay's share": own["decay_share"]}
    if differ := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        lines = [f"  {key}: {before.get(key)} there, {now.get(key)} now" for key in differ]
        raise ConfigError(
            "\n".join([f"{rungs.folder} holds the rungs of another target:", *lines, "Use another run.name."])
        )


class Worker:
    """One process, or all ranks of a torchrun. Several may work in one folder, also on several machines."""

    def __init__(self, rungs: Rungs, world: World, say: Callable[[str], None], fitting: Fitting | None = None) -> None:
        """say: a line for the person at the terminal (called on rank 0). fitting: micro-batch of the widest rung."""
        self._rungs, self._world, self._say, self._fitting = rungs, world, say, fitting

    def work(self) -> bool:
        """Train every trunk that no other worker has, until all are done or a signal asks to stop; what runs is saved
        then. Returns whether every rung is finished, or has diverged."""
        done = True
        for trunk in self._rungs.trunks():
            with self._held(trunk) as mine:
                if not mine:
                    self._tell(f"{trunk.name}: another worker has it")
                    done = False
                elif not self._train(trunk):
                    return False
        return done

    @contextlib.contextmanager
    def _held(self, trunk: Trunk) -> Iterator[bool]:
        """Whether this worker holds the trunk, for a block of code."""
        with contextlib.ExitStack() as stack:

            def hold() -> bool:
                try:
                    stack.enter_context(lock_folder(self._rungs.folder / trunk.name, wait_s=0.0))
                    return True
                except CheckpointError:
                    return False

            yield from_rank_0(self._world, hold)

    def _train(self, trunk: Trunk) -> bool:
        """All branches of a trunk, which is trained on to where each begins. False where a signal asked to stop."""
        rungs = self._rungs
        for steps in rungs.steps:
            output = rungs.branch_folder(trunk, steps)
            if not from_rank_0(self._world, output.is_dir):
                config = rungs.trunk_config(trunk, steps - decay_steps(rungs.target, steps))
                if (ended := self._run(config, trunk)) != "finished":
                    return ended == "failed"  # and so is done with
                on_rank_0(self._world, partial(branch, config.run.folder, output, rungs.branch_overrides(steps)))
            if self._run(rungs.branch_config(trunk, steps), trunk) == "preempted":
                return False
        return True

    def _run(self, config: TrainConfig, trunk: Trunk) -> str:
        """finished, failed (it has diverged, now or before) or preempted."""
        folder = config.run.folder
        status = from_rank_0(self._world, lambda: read_status(folder))
        if status is not None and status[0] == "failed":
            self._tell(f"{folder} has failed: {status[1]} (remove it to train it again)")
            return "failed"
        log = self._rungs.folder / "logs" / f"{trunk.name}_rank{self._world.rank}.log"
        try:
            ended = train_quietly(config, self._world, log, self._fitting)
        except DivergedError as error:
            self._tell(f"{folder} has failed: {error}")
            return "failed"
        self._tell(f"{folder} is {ended.outcome} at step {ended.step}")
        return ended.outcome

    def _tell(self, text: str) -> None:
        if self._world.rank == 0:
            self._say(text)


class Progress:
    """What the workers of one machine do: a line for each rung that ends."""

    def __init__(self, rungs: Rungs) -> None:
        self._rungs = rungs
        self._told = set(self._ended())

    def __enter__(self) -> "Progress":
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
        return len(self._rungs.steps) * len(list(self._rungs.trunks()))

    def _ended(self) -> dict[Path, str]:
        folders = (self._rungs.branch_folder(t, steps) for t in self._rungs.trunks() for steps in self._rungs.steps)
        states = {folder: status[0] for folder in folders if (status := read_status(folder)) is not None}
        return {folder: state for folder, state in states.items() if state in ("finished", "failed")}
