"""One run of many in a process: trained to its end, with what it prints in a log, and nothing left of it in memory."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from ..build.run import build_run, release_memory
from ..config.schema import TrainConfig
from ..estimate.micro_batch import Fitting, telling_out_of_memory
from ..loop import train
from ..monitor.metrics import Metrics
from ..parallel.mesh import World
from ..run import Run


class Trained(NamedTuple):
    """How a run ended."""

    outcome: str
    """finished or preempted."""
    step: int
    folder: Path
    meta: Mapping[str, Any]
    """What its checkpoints carry beside its state."""


class WatchedMetrics:
    """The metrics of a run; `look` is shown every line after it is written."""

    def __init__(self, metrics: Metrics, look: Callable[[Mapping[str, Any]], None]) -> None:
        self._metrics, self._look = metrics, look

    def __getattr__(self, name: str) -> Any:
        return getattr(self._metrics, name)

    def write(self, record: Mapping[str, Any]) -> None:
        self._metrics.write(record)
        self._look(record)


def train_quietly(
    config: TrainConfig,
    world: World,
    log: Path,
    fitting: Fitting | None = None,
    begin: Callable[[Run], None] = lambda run: None,
    look: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> Trained:
    """Train a config, or go on with its run folder.

    log: file that this rank's output is appended to. fitting: the micro-batch, which is told of memory that ran out
    beside it. begin: called when the run is built. look: called with each line of metrics. Raises what either raises,
    and the errors of build_run and train.
    """
    release_memory()  # of the runs before
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", buffering=1) as file, contextlib.redirect_stdout(file):
        run = build_run(config, world, fitting=[fitting and fitting.size])
        try:
            begin(run)
            watched = dataclasses.replace(run, metrics=cast(Metrics, WatchedMetrics(run.metrics, look)))
            with telling_out_of_memory(config, fitting, world.size, log.parent.parent):
                outcome = train(watched)
        finally:
            run.metrics.close()
            if run.lock is not None:
                run.lock.close()
    trained = Trained(outcome, run.state.step, run.folder, run.meta)
    del run, watched
    release_memory()
    return trained
