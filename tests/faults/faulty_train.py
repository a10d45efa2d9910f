"""launch/train.py with faults planted on one rank: what FAULTS in the environment says, as JSON.

{"rank": 1, "nan": [5, 6], "slow_data": [3], "slow_model": [4], "hang": 8, "kill": 8, "kill_torchrun": 8,
"kill_after_rollback": true}: the rank (null: every one); data steps (from 0) whose batch holds a NaN, whose batch
comes late, in which a block takes long, at which it sleeps for ever, kills itself (once the last save has ended, which
goes on in the background), or kills its torchrun; and whether it kills itself once the run has gone back.
"""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import launch.train
import trainer.build.run
from launch.common import run as run_command
from trainer.recovery.skipped_ranges import FILE
from trainer.run import Encoded, Run

DELAY_S = 2.0
FAULTS = json.loads(os.environ["FAULTS"])
build_run = trainer.build.run.build_run


def with_faults(run: Run) -> Run:
    if FAULTS["rank"] not in (None, run.world.rank):
        return run
    present = -1

    def batches(first: int) -> Iterator[tuple[int, list[Any]]]:
        nonlocal present
        for step, micro_batches in run.batches(first):
            present = step
            if step in FAULTS.get("slow_data", ()):
                time.sleep(DELAY_S)
            yield step, micro_batches

    def encode(batch: Any) -> Encoded:
        encoded = run.encode(batch)
        if present == FAULTS.get("kill"):
            run.checkpointer.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULTS.get("kill_after_rollback") and (run.folder / FILE).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if present == FAULTS.get("kill_torchrun"):
            os.kill(os.getppid(), signal.SIGKILL)
        if present == FAULTS.get("hang"):
            print(f"hanging at {time.time()}", flush=True)
            time.sleep(1000)
        if present in FAULTS.get("nan", ()):
            encoded.x0[0] = float("nan")
        return encoded

    def before_layer(*_: Any) -> None:
        if present in FAULTS.get("slow_model", ()):
            time.sleep(DELAY_S)

    run.engine.model.get_submodule("blocks.0.image.qkv").register_forward_pre_hook(before_layer)
    return dataclasses.replace(run, batches=batches, encode=encode)


if __name__ == "__main__":
    trainer.build.run.build_run = lambda config, world: with_faults(build_run(config, world))
    run_command(launch.train.main)
