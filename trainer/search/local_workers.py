"""Workers of one machine as processes, each of which takes runs until none is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from ..estimate.micro_batch import WORKERS_PER_GPU


class Shown(Protocol):
    """What the workers do, for the person at the terminal."""

    def show(self) -> None: ...


def run_workers(
    folder: Path,
    table: AbstractContextManager[Shown],
    command: Sequence[str],
    count: int,
    kill: Callable[[int], None],
) -> int:
    """Run `count` workers and a table of what they do; returns 0 where all ended well, else 1.

    folder: of all runs, whose logs/ gets the workers'. command: starts a worker. kill: ends a process, by its number,
    with all that descend from it; the workers end with this process. Ctrl-C and SIGTERM ask them to save and stop.
    """
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    workers: list[subprocess.Popen[bytes]] = []
    expected = {0}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with table as shown:
        try:
            for number in range(count):
                workers.append(_start(command, number, count, _log(logs, number)))
            while any(worker.poll() is None for worker in workers):
                shown.show()
                time.sleep(1)
        except KeyboardInterrupt:
            print("asking the workers to save and stop", flush=True)
            expected.add(-signal.SIGTERM)  # of one that was between two trials
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait()
        finally:
            for worker in workers:
                if worker.poll() is None:
                    kill(worker.pid)
    failed = [number for number, worker in enumerate(workers) if worker.returncode not in expected]
    for number in failed:
        log = _log(logs, number)
        said = log.read_text().splitlines()[-1:]
        print(f"worker {number}: exit code {workers[number].returncode}, {' '.join(said)} ({log})", file=sys.stderr)
    return 1 if failed else 0


def _log(folder: Path, worker: int) -> Path:
    return folder / f"worker_{worker}.log"


def _start(command: Sequence[str], number: int, workers: int, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **_device(number, workers)}
    with open(log, "a") as file:
        # In a session of its own a worker does not get the terminal's Ctrl-C, which would not let it save.
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def _device(worker: int, workers: int) -> dict[str, str]:
    """The environment that gives a worker one of this process's GPUs, in turn, and says how many of `workers` have
    one."""
    count = torch.cuda.device_count()
    if not count:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(device) for device in range(count)]
    return {"CUDA_VISIBLE_DEVICES": devices[worker % len(devices)], WORKERS_PER_GPU: str(-(-workers // len(devices)))}
