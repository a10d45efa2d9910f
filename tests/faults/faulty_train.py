"""launch/train.py with faults planted on one rank: what FAULTS in the environment says, as JSON.

{"rank": 1, "nan": [5, 6], "slow_data": [3], "slow_model": [4], "hang": 8, "kill": 8, "kill_torchrun": 8,
"kill_after_rollback": true}: the rank (null: every one); data steps (from 0) whose batch holds a NaN, whose batch
comes late, in which a block takes long, at which it sleeps for ever, kills itself (once the last save has ended, which
goes on in the background; not after a restart by torchrun), or kills its torchrun; and whether it kills itself once the
run has gone back. "slow_store": seconds that the store takes for each answer to the watchdog.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

import launch.train
import trainer.build.run
import trainer.recovery.watchdog
from launch.common import run as run_command
from trainer.config.schema import TrainConfig
from trainer.input.stream import follow
from trainer.parallel.mesh import World, open_board
from trainer.recovery.skipped_ranges import FILE
from trainer.run import Run
from trainer.step import Encoded, MicroBatch

DELAY_S = 2.0
FAULTS = json.loads(os.environ["FAULTS"])


class Faults:
    """Follows a run's data steps and does at each what FAULTS says."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._present = -1
        layer = run.engine.model.get_submodule("blocks.0.image.qkv")
        layer.register_forward_pre_hook(self._before_layer)

    def follow(
        self, batches: Callable[[int], Iterator[tuple[int, list[MicroBatch]]]], wanted: Callable[[], int]
    ) -> Iterator[list[MicroBatch]]:
        for micro_batches in follow(batches, wanted):
            self._present = wanted()
            if self._present in FAULTS.get("slow_data", ()):
                time.sleep(DELAY_S)
            yield [MicroBatch(batch, partial(self._encode, encoded)) for batch, encoded in micro_batches]

    def _encode(self, finish: Callable[[], Encoded]) -> Encoded:
        encoded, present = finish(), self._present
        if present == FAULTS.get("kill") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            self._run.checkpointer.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULTS.get("kill_after_rollback") and (self._run.folder / FILE).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if present == FAULTS.get("kill_torchrun"):
            os.kill(os.getppid(), signal.SIGKILL)
        if present == FAULTS.get("hang"):
            print(f"hanging at {time.time()}", flush=True)
            time.sleep(1000)
        if present in FAULTS.get("nan", ()):
            encoded.x0[0] = float("nan")
        return encoded

    def _before_layer(self, *_: Any) -> None:
        if self._present in FAULTS.get("slow_model", ()):
            time.sleep(DELAY_S)


class SlowStore:
    """A store that takes a while for each answer, in which the thread that asks is outside of Python."""

    def __init__(self, store: dist.Store, seconds: float) -> None:
        self._store, self._time = store, timedelta(seconds=seconds)

    def __getattr__(self, name: str) -> Any:
        with contextlib.suppress(RuntimeError):
            self._store.wait(["never"], self._time)
        return getattr(self._store, name)


def slow_board(world: World) -> Any:
    return SlowStore(open_board(world), FAULTS["slow_store"])


build_run = trainer.build.run.build_run


def faulty_run(config: TrainConfig, world: World, hold: Callable[[Path], None], fitting: Sequence[float | None]) -> Run:
    run = build_run(config, world, hold, fitting)
    if FAULTS["rank"] in (None, world.rank):
        trainer.build.run.follow = Faults(run).follow
    return run


if __name__ == "__main__":
    trainer.build.run.build_run = faulty_run
    if "slow_store" in FAULTS:
        trainer.recovery.watchdog.open_board = slow_board
    run_command(launch.train.main)
