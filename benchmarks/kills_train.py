"""Random SIGKILLs of a run, resumed each time, against an unbroken one: every loss and every weight must be equal.

The run is the demo's small sibling (its data and text encoder at a small width), on two processes.
"""

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from launch.processes import kill_tree
from tests.distributed.runs import exact, last_step, train, weights
from tests.faults.harness import Job, job, kill, saving, status, wait_until, workers
from trainer.checkpoint.find import complete_checkpoints
from trainer.monitor.metrics import read_metrics

CONFIG = "mmdit_demo_mup.yaml"
STEPS, CHECKPOINT_EVERY, VALIDATE_EVERY = 120, 10, 20
SETTINGS = (
    "model.width=128", "model.depth=2", "train.global_batch_size=16", "optim.warmup_steps=10", "validation.samples=16",
    f"train.steps={STEPS}", f"train.checkpoint_every={CHECKPOINT_EVERY}", "train.log_every=1",
    f"train.validate_every={VALIDATE_EVERY}", f"train.sample_every={VALIDATE_EVERY}", "sample.count=4",
)  # fmt: skip
MOMENTS = ("start", "step", "one rank", "save", "first step after a resume", "validation")
KILLS_A_RUN = 12
PATIENCE_S = 180.0


def newest(folder: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    found = complete_checkpoints(folder / "checkpoints")
    return int(found[-1].name.removeprefix("step_")) if found else 0


def strike(run: Job, folder: Path, moment: str, chance: random.Random) -> bool:
    """Wait for the moment, kill; whether the kill came at the moment that was meant."""
    resumed, began = newest(folder), time.time()

    def training() -> bool:
        assert run.process.poll() is None, run.text()[-3000:]
        path = folder / "status.json"
        return path.exists() and path.stat().st_mtime > began and status(folder)["state"] == "running"

    def next_to_a_validation() -> bool:
        return last_step(folder) % VALIDATE_EVERY == VALIDATE_EVERY - 1

    if moment == "start":
        time.sleep(chance.uniform(0.5, 8))
        early = not training()
        kill_tree(run.process.pid)
        return early
    wait_until(training, PATIENCE_S, "the first step")
    pids = workers(run.process.pid)
    assert len(pids) == 2, pids
    if moment == "first step after a resume":
        time.sleep(chance.uniform(0, 0.02))
    elif moment == "save":
        wait_until(lambda: saving(folder), PATIENCE_S, "a save", poll_s=0.0005)
        time.sleep(chance.uniform(0, 0.01))
    elif moment == "validation":
        wait_until(next_to_a_validation, PATIENCE_S, "a validation", poll_s=0.002)
        time.sleep(chance.uniform(0.1, 0.6))  # a step takes less, validation and samples more
    else:
        until = resumed + chance.randint(1, 2 * CHECKPOINT_EVERY - 1)
        wait_until(lambda: last_step(folder) >= until, PATIENCE_S, f"step {until}")
        time.sleep(chance.uniform(0, 0.1))
    kill([chance.choice(pids)] if moment == "one rank" else pids, 9)
    if moment != "one rank":
        kill_tree(run.process.pid)
    run.wait(60)
    if moment == "first step after a resume":
        return resumed > 0 and last_step(folder) == resumed
    return {"save": saving(folder), "validation": next_to_a_validation()}.get(moment, True)


def kills(seed: int, count: int, scratch: Path, more: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """`count` kills at random moments, of as many runs as that takes: each kill with its moment, and each run with
    whether it was equal to the unbroken one. more: overrides."""
    chance, settings = random.Random(seed), (*SETTINGS, *more)
    whole = scratch / "whole"
    lines = exact(train(2, whole, *settings, config=CONFIG))
    final = weights(whole)
    done = number = 0
    while done < count:
        folder, number, kills_of_run = scratch / f"run_{number}", number + 1, 0
        while done < count and kills_of_run < KILLS_A_RUN and newest(folder) < STEPS - 2 * CHECKPOINT_EVERY:
            # A resume needs a checkpoint, and a moment that was missed is a kill of its own kind.
            moment = chance.choice([m for m in MOMENTS if newest(folder) or m != "first step after a resume"])
            with job(folder, *settings, config=CONFIG) as started:
                hit = strike(started, folder, moment, chance)
            yield {"moment": moment if hit else "another than was meant"}
            done, kills_of_run = done + 1, kills_of_run + 1
        same = exact(train(2, folder, *settings, config=CONFIG)) == lines
        ours = weights(folder)
        same &= all(torch.equal(ours[name], final[name]) for name in final)
        yield {"equal": same and len(read_metrics(folder)) == STEPS + 1}
