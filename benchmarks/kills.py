"""Random SIGKILLs of a run, resumed each time, against an uninterrupted one: every loss and every weight must be equal.

    python -m benchmarks.kills --kills 50 --output benchmarks/results/kills.json

The run is the demo's small sibling (its data and text encoder at a small width). Kills are dealt among four kinds: of
all processes at a random moment, of one rank alone, inside a save, and in the first step after a resume.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import write
from launch.processes import kill_tree
from tests.distributed.runs import exact, last_step, train, weights
from tests.faults.harness import Job, job, kill, saving, status, wait_until, workers
from trainer.checkpoint.find import complete_checkpoints
from trainer.monitor.metrics import read_metrics

CONFIG = "mmdit_demo_mup.yaml"
STEPS, CHECKPOINT_EVERY = 120, 10
SETTINGS = (
    "model.width=128", "model.depth=2", "train.global_batch_size=16", "optim.warmup_steps=10", "validation.samples=16",
    f"train.steps={STEPS}", f"train.checkpoint_every={CHECKPOINT_EVERY}", "train.log_every=1", "train.sample_every=0",
    "train.validate_every=40",
)  # fmt: skip
KINDS = {"all": 0.34, "one rank": 0.26, "in a save": 0.24, "first step after a resume": 0.16}  # shares of the kills
KILLS_A_RUN = 10
PATIENCE_S = 180.0


def deal(kills: int, chance: random.Random) -> list[str]:
    """The kinds of `kills` kills in random order, each as often as its share says, rounded up for all but the first."""
    dealt = [kind for kind, share in list(KINDS.items())[1:] for _ in range(-int(-share * kills // 1))]
    dealt = (dealt + ["all"] * kills)[:kills]
    chance.shuffle(dealt)
    return dealt


def newest(folder: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    found = complete_checkpoints(folder / "checkpoints")
    return int(found[-1].name.removeprefix("step_")) if found else 0


def kill_in_mid_run(run: Job, folder: Path, kind: str, chance: random.Random) -> dict[str, Any]:
    """Wait for the moment of this kind, kill; returns what was hit."""
    resumed, began = newest(folder), time.time()

    def training() -> bool:
        assert run.process.poll() is None, run.text()[-3000:]
        path = folder / "status.json"
        return path.exists() and path.stat().st_mtime > began and status(folder)["state"] == "running"

    wait_until(training, PATIENCE_S, "the first step")
    pids = workers(run.process.pid)
    assert len(pids) == 2, pids
    if kind == "first step after a resume":
        time.sleep(chance.uniform(0, 0.02))
    elif kind == "in a save":
        wait_until(lambda: saving(folder), PATIENCE_S, "a save", poll_s=0.0005)
        time.sleep(chance.uniform(0, 0.01))
    else:
        until = resumed + chance.randint(1, 2 * CHECKPOINT_EVERY - 1)
        wait_until(lambda: last_step(folder) >= until, PATIENCE_S, f"step {until}")
        time.sleep(chance.uniform(0, 0.1))
    victims = [chance.choice(pids)] if kind == "one rank" else pids
    kill(victims, 9)
    killed = time.monotonic()
    if kind != "one rank":
        kill_tree(run.process.pid)
    run.wait(60)
    return {
        "kind": kind,
        "resumed_from": resumed,
        "logged_step": last_step(folder),
        "half_a_checkpoint_left": saving(folder),
        "newest_checkpoint": newest(folder),
        "job_ended_after_s": round(time.monotonic() - killed, 1),
    }


def hit(entry: dict[str, Any]) -> bool:
    """Whether the kill came at the moment that its kind names."""
    if entry["kind"] == "in a save":
        return entry["half_a_checkpoint_left"]
    if entry["kind"] == "first step after a resume":
        return entry["resumed_from"] > 0 and entry["logged_step"] == entry["resumed_from"]
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    chance, began = random.Random(arguments.seed), time.monotonic()
    left = deal(arguments.kills, chance)
    table: list[dict[str, Any]] = []
    missed, run, equal = 0, 0, True
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        lines = exact(train(2, whole, *SETTINGS, config=CONFIG))
        final = weights(whole)
        while left:
            folder, kills = Path(scratch) / f"run_{run}", 0
            while left and kills < KILLS_A_RUN and newest(folder) < STEPS - 2 * CHECKPOINT_EVERY:
                # A resume needs a checkpoint: until there is one, another kind takes its turn.
                ready = [k for k in left if newest(folder) or k != "first step after a resume"]
                kind = ready[0] if ready else "all"
                with job(folder, *SETTINGS, config=CONFIG) as started:
                    entry = {"run": run, **kill_in_mid_run(started, folder, kind, chance)}
                if kind in left and hit(entry):
                    left.remove(kind)
                    table.append(entry)
                    print(f"{len(table):3} {entry}", flush=True)
                else:
                    missed += 1  # a kill as well, at another moment than was meant
                kills += 1
            same = exact(train(2, folder, *SETTINGS, config=CONFIG)) == lines
            ours = weights(folder)
            same &= all(torch.equal(ours[name], final[name]) for name in final)
            equal &= same and len(read_metrics(folder)) == STEPS + 1
            print(f"run {run}: {'equal' if same else 'DIFFERENT'} after {kills} kills", flush=True)
            run += 1
    write(
        arguments.output,
        {
            "config": CONFIG,
            "settings": SETTINGS,
            "counts": Counter(entry["kind"] for entry in table),
            "missed_their_moment": missed,
            "runs": run,
            "all_losses_and_weights_equal": equal,
            "minutes": round((time.monotonic() - began) / 60, 1),
            "kills": table,
        },
    )
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
