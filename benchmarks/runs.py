"""Many small runs, each in a process of a pool, stored one by one: a study that was stopped goes on."""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gc
import itertools
import json
import math
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from trainer.build.run import build_run
from trainer.config.resolve import resolve
from trainer.config.schema import TrainConfig
from trainer.files import write_atomically
from trainer.loop import train
from trainer.parallel.mesh import World, init_world
from trainer.run import Run

J = TypeVar("J")  # a frozen dataclass of numbers and strings
_world: World | None = None  # of this process: one process group for all its runs
_MAY_GROW = (
    "seeds",
    "log2_lrs",
    "cells",
    "workers",
    "controls",
)  # of a study: which runs there are, not what one of them is


@contextlib.contextmanager
def trained(config: TrainConfig, prepare: Callable[[Run], None] = lambda run: None) -> Iterator[tuple[Path, World]]:
    """Train in this process; (the run's folder, which is gone after the block, and the process's world). prepare: may
    change a run that is built."""
    global _world
    torch.set_num_threads(1)
    gc.collect()  # a sharded model holds itself in cycles, and with it its memory
    folder = tempfile.mkdtemp()
    try:
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": folder, "name": "run"})})
        _world = _world or init_world(resolve(config, 1).shard)
        while (outcome := _train_stage(config, _world, prepare)) == "running":
            pass
        if outcome != "finished":  # a signal has stopped it: its figures are not those of the whole run
            raise RuntimeError(f"a run ended as {outcome}")
        yield config.run.folder, _world
    finally:
        shutil.rmtree(folder)


def _train_stage(config: TrainConfig, world: World, prepare: Callable[[Run], None]) -> str:
    with contextlib.redirect_stdout(None):  # a muP table of each of many runs is no news
        run = build_run(config, world)
    prepare(run)
    run.metrics.say = lambda text: None
    # Nobody sees the folder, and a picture costs more than a small run's steps.
    run.metrics.plot = lambda last=False: None
    try:
        return train(run)
    finally:
        run.metrics.close()
        if run.lock is not None:
            run.lock.close()


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a study is stored and how much of the machine it takes."""
    parser.add_argument(
        "--folder", type=Path, required=True, help="of results.jsonl, which a further call goes on with"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON; the figure lies beside it")
    parser.add_argument("--budget-minutes", type=float, default=math.inf, help="start no run after so long")
    parser.add_argument("--workers", type=int, help="runs side by side")


def claim_folder(folder: Path, study: Mapping[str, Any]) -> None:
    """Begin a study in its folder or go on there; SystemExit where it holds runs of another one, which have the same
    names. study: its fields."""
    file = folder / "identity.json"
    identity = json.loads(json.dumps({key: value for key, value in study.items() if key not in _MAY_GROW}))
    held = json.loads(file.read_text()) if file.is_file() else None
    if held is None and not (folder / "results.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(identity, indent=1) + "\n")
    elif held is None:
        raise SystemExit(f"--folder {folder} holds runs of a study that it does not name: choose another folder")
    elif held != identity:
        changed = sorted(key for key in identity | held if identity.get(key) != held.get(key))
        raise SystemExit(
            f"--folder {folder} holds runs of another study ({', '.join(changed)} differ): choose another folder"
        )


def worker_pool(workers: int) -> concurrent.futures.Executor:
    return concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def run_jobs(
    pool: concurrent.futures.Executor,
    workers: int,
    jobs: Sequence[J],
    work: Callable[[J], dict[str, Any]],
    file: Path,
    deadline: float,
) -> list[dict[str, Any]]:
    """All results that the file holds when these jobs are done, or when the time is over (what runs then still ends).

    work: job -> {**job's fields, ...}, a line of the file; a job that has its line is not done again. deadline: of
    time.monotonic(). workers: jobs side by side.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    text = file.read_text() if file.is_file() else ""
    whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
    if whole != text:
        file.write_text(whole)
    results = [json.loads(line) for line in whole.splitlines()]
    todo = [job for job in jobs if not any(dataclasses.asdict(job).items() <= r.items() for r in results)]  # pyright: ignore[reportArgumentType]
    left, waiting = len(todo), iter(todo)
    with open(file, "a") as out:
        running = {pool.submit(work, job) for job in itertools.islice(waiting, workers)}
        while running:
            finished, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                results.append(future.result())
                out.write(json.dumps(results[-1]) + "\n")
                out.flush()
                left -= 1
                print(f"{json.dumps(results[-1])}  {left} left", flush=True)
                if time.monotonic() < deadline and (job := next(waiting, None)):
                    running.add(pool.submit(work, job))
    return results
