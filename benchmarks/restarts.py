"""Restarts under torchrun: a rank, or an agent with its rank, is killed again and again; the run must go on each time.

    python -m benchmarks.restarts --kills 10 --output benchmarks/results/restarts.json

Ranks are killed in one job of 2 and one of 4 processes under --max-restarts; agents in a job of --nnodes 1:2, in which
a new agent takes the place of each one that is killed. A restart is right if it goes on from the newest checkpoint.
"""

import argparse
import contextlib
import json
import random
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from launch.processes import kill_tree
from tests.distributed.runs import last_step
from tests.faults.harness import Job, job, kill, lives, status, wait_until, workers
from trainer.checkpoint.find import complete_checkpoints, step_of

SETTINGS = (
    "train.steps=1000000", "train.log_every=1", "train.checkpoint_every=5", "train.validate_every=0",
    "train.sample_every=0",
)  # fmt: skip
PATIENCE_S = 150.0
# An agent that joins later waits for an address that torchrun tells only once, unless each round has its own store.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# A dead agent is noticed after 4 x 2 s; a round with one agent waits 10 s for a second.
CONF = "last_call_timeout=10,keep_alive_interval=2,keep_alive_max_attempt=4,is_host={}"


def newest(folder: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    return max((step_of(path) for path in complete_checkpoints(folder / "checkpoints")), default=0)


def trained_on(folder: Path, run: Job, since: float) -> None:
    """Wait until a start of this run after `since` (a time of day) has taken steps and saved."""

    def saved() -> bool:
        assert run.process.poll() is None, run.text()[-3000:]
        path = folder / "status.json"
        begun = path.exists() and path.stat().st_mtime > since and status(folder)["state"] == "running"
        return begun and any(p.stat().st_mtime > since for p in complete_checkpoints(folder / "checkpoints"))

    wait_until(saved, PATIENCE_S, "steps and a checkpoint after a start", poll_s=0.1)


def resumed_from(run: Job) -> list[int]:
    return [int(step) for step in re.findall(r"resuming \S*step_(\d+)", run.text())]


def entry_of(run: Job, folder: Path, before: list[int], began: float) -> dict[str, Any]:
    """How the restart went that followed a kill, for which it waits."""
    expected, killed = newest(folder), time.time()
    try:
        trained_on(folder, run, killed)
        new = resumed_from(run)[len(before) :]
        right = bool(new) and new[0] >= expected  # a save that was under way at the kill may have become complete
        return {"right": right, "newest": expected, "resumed": new, "seconds": round(time.monotonic() - began, 1)}
    except AssertionError as error:
        return {"right": False, "newest": expected, "error": str(error)[-1500:]}


def of_ranks(scratch: Path, processes: int, kills: int, chance: random.Random) -> list[dict[str, Any]]:
    """`kills` kills of a rank in one job of one agent; a list of how each restart went, up to the first that failed."""
    folder, table = scratch / f"of_{processes}", []
    launcher = ("--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(kills))
    with job(folder, *SETTINGS, launcher=launcher) as run:
        trained_on(folder, run, 0.0)
        for _ in range(kills):
            pids = workers(run.process.pid)
            rank, before, began = chance.randrange(processes), resumed_from(run), time.monotonic()
            until = last_step(folder) + chance.randint(1, 10)
            wait_until(lambda: last_step(folder) >= until, PATIENCE_S, f"step {until}")  # noqa: B023
            kill([pids[rank]], 9)
            wait_until(lambda: not any(lives(pid) for pid in pids), PATIENCE_S, "all ranks end")  # noqa: B023
            table.append({"ranks": processes, "killed": rank, **entry_of(run, folder, before, began)})
            print(table[-1], flush=True)
            if not table[-1]["right"]:
                break
    return table


def of_agents(scratch: Path, kills: int) -> list[dict[str, Any]]:
    """`kills` kills of the agent without the store, each followed by a new agent that joins the one which stayed."""
    folder, table = scratch / "agents", []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = (
        "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", str(2 * kills), "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "restarts",
    )  # fmt: skip

    @contextlib.contextmanager
    def agent(host: int) -> Iterator[Job]:
        launcher = (*common, "--rdzv-conf", CONF.format(host))
        with job(folder, *SETTINGS, launcher=launcher, more_environment=OWN_STORE) as started:
            yield started

    with agent(1) as stays:
        for _ in range(kills):
            with agent(0) as dies:
                wait_until(lambda: len(workers(dies.process.pid)) == 1, PATIENCE_S, "a second agent")
                trained_on(folder, stays, time.time())
                before, began = resumed_from(stays) + resumed_from(dies), time.monotonic()
                kill_tree(dies.process.pid)
            table.append({"agents": 2, **entry_of(stays, folder, before, began)})
            print(table[-1], flush=True)
            if not table[-1]["right"]:
                break
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--kinds", default="2,4,agents", help="which of 2, 4 (ranks) and agents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    chance, began, kinds = random.Random(arguments.seed), time.monotonic(), arguments.kinds.split(",")
    # Kinds that are not run now stay as they were measured before.
    table = json.loads(arguments.output.read_text())["restarts"] if arguments.output.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in kinds:
            if kind == "agents":
                table[kind] = of_agents(Path(scratch), arguments.kills)
            else:
                table[kind] = of_ranks(Path(scratch), int(kind), arguments.kills, chance)
    right = {kind: sum(entry["right"] for entry in entries) for kind, entries in table.items()}
    minutes = round((time.monotonic() - began) / 60, 1)
    write(
        arguments.output,
        {"kills": arguments.kills, "right": right, "minutes_of_the_kinds_run_last": minutes, "restarts": table},
    )
    return 0 if all(count == arguments.kills for count in right.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
