"""CPU time that a batch of precomputed text states costs the thread that trains, and this process's other threads.

python -m benchmarks.batches --output benchmarks/results/batches_cpu.json

The reader is that of training, with reader processes, which are not counted. Between two batches the thread that trains
sleeps, so that nothing is waited for: what is measured is what the host cannot use to launch kernels. On a GPU the
batches are page-locked, on a CPU they are not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import TEXT_WIDTH, precomputed_shard
from benchmarks.machine import write
from data.batch import Batch
from data.config import DataConfig
from data.index import ImageTextIndex
from data.reader import ImageTextReader

ROWS, TOKENS, CHANNELS, WORKERS = 128, 256, 16, 2
SAMPLES = 256
WARM_UP = 3  # the first batches: page-locked memory is got, and kept


def cpu_ms(index: ImageTextIndex, steps: int, pause_s: float) -> dict[str, list[float]]:
    """Milliseconds of CPU time of each step: of the thread that trains, to get a batch and to let go of an old one,
    and of all other threads."""
    cfg = DataConfig(shards="unused", num_workers=WORKERS, flip=0.0)
    stream = ImageTextReader(index, cfg, 0, ROWS, 0.0, 0, 1, ROWS).batches(0)
    taken: dict[str, list[float]] = {"next": [], "free": [], "other_threads": []}
    held: list[Batch] = []  # else the reader's reference would be the last, and next() would be charged with it
    for step in range(WARM_UP + steps):
        began, all_began = time.thread_time(), time.process_time()
        _, [batch] = next(stream)
        given = time.thread_time()
        assert batch.text_states is not None
        assert batch.text_states.shape == (ROWS, TOKENS, TEXT_WIDTH)
        held.append(batch)
        del held[:-2], batch
        freed = time.thread_time()
        time.sleep(pause_s)  # a training step, in which other threads may work
        others = time.process_time() - all_began - (time.thread_time() - began)
        if step >= WARM_UP:
            for name, seconds in zip(taken, (given - began, freed - given, others), strict=True):
                taken[name].append(1e3 * seconds)
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--pause-s", type=float, default=1.5, help="between two batches")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        shard = precomputed_shard(Path(scratch) / "set", SAMPLES, CHANNELS, True, TOKENS, TOKENS)
        taken = cpu_ms(ImageTextIndex([shard]), arguments.steps, arguments.pause_s)
    results: dict[str, Any] = {
        "text_states": f"{ROWS} x {TOKENS} x {TEXT_WIDTH} bf16",
        "workers": WORKERS,
        "page_locked": torch.cuda.is_available(),
        "median_cpu_ms": {name: round(statistics.median(each), 2) for name, each in taken.items()},
        "cpu_ms": {name: [round(ms, 2) for ms in each] for name, each in taken.items()},
    }
    write(arguments.output, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
