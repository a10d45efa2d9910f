"""CPU time of the host in a step: the proxy's depth at a tiny width, so that arithmetic is next to nothing.

    python -m benchmarks.host --output benchmarks/results/host.json

What is left is Python, dispatch and hooks, which a GPU waits for at small sizes: milliseconds of process time, medians
over the steps, of the whole step and of its parts.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import write
from tests.helpers.steps import built
from trainer.loop import train_step

DEPTH, WARM_UP = 19, 5
SMALL = (
    f"model.depth={DEPTH}", "model.width=32", "mup.base_width=32", "data.resolution=16", "text_encoder.max_length=4",
    "train.global_batch_size=2", "train.log_every=1000000",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, list[float]] = defaultdict(list)

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*given: Any, **named: Any) -> Any:
            began = time.process_time()
            result = call(*given, **named)
            parts[part].append(time.process_time() - began)
            return result

        return measured

    with tempfile.TemporaryDirectory() as folder, built("mmdit_debug_mup.yaml", Path(folder), *SMALL) as run:
        engine: Any = run.engine
        tensors = len(engine.master_shards())
        batches = [*islice(run.batches(), WARM_UP + arguments.steps)]
        engine.model.forward = timed("forward", engine.model.forward)
        for owner, name, part in (
            (engine, "backward", "backward"),
            (engine, "step", "norm, clipping, AdamW"),
            (run.ema, "update", "EMA"),
        ):
            setattr(owner, name, timed(part, getattr(owner, name)))
        for micro_batches in batches:
            timed("step", train_step)(run, micro_batches)
    milliseconds = {part: round(1e3 * statistics.median(taken[WARM_UP:]), 2) for part, taken in parts.items()}
    write(arguments.output, {"depth": DEPTH, "parameters": tensors, "cpu_ms": milliseconds})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
