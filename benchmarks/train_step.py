"""Time, images/s, model FLOP/s and peak memory of a whole training step (clip, AdamW and EMA inside).

    python -m benchmarks.train_step --output benchmarks/results/train_step_cpu.json

Synthetic latents and text states, so that no encoder is in the figure. On a GPU: the proxies of the ladder in bf16
with per-block compile; on a CPU: the debug and the demo shape.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.machine import write
from trainer.build import build_run
from trainer.config import load_config, resolve
from trainer.loop import train_step
from trainer.parallel.mesh import init_world
from trainer.state import Totals

ON_CPU = {"mmdit_debug_mup.yaml": 8, "mmdit_demo_mup.yaml": 32}
ON_GPU = {"mmdit_0.18b_mup.yaml": 128, "mmdit_0.7b_mup.yaml": 64, "mmdit_2b_mup.yaml": 24}
WARM_UP, TIMED = 3, 10


def measure(name: str, batch: int, overrides: list[str]) -> dict[str, Any]:
    """Median step of one config at a global batch size, in a fresh run folder."""
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            *("data.shards=synthetic", f"train.global_batch_size={batch}", f"run.dir={folder}"),
            *("train.validate_every=0", "train.sample_every=0", "train.checkpoint_every=0"),
            f"parallel.compile={str(cuda).lower()}",
        ]
        config = load_config(name, [*settings, *overrides])
        world = init_world(resolve(config, 1).shard)
        run = build_run(config, world)
        batches = [micro_batches for _, (_, micro_batches) in zip(range(2), run.batches(0), strict=False)]
        seconds = []
        for step in range(WARM_UP + TIMED):
            if cuda:
                torch.cuda.synchronize()
            if cuda and step == WARM_UP:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            train_step(run, step, batches[step % len(batches)])
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[WARM_UP:])
        totals = Totals.unpacked(run.state.totals)
        tokens = float(totals.text_tokens / totals.counted)
        flops_per_s = run.plan.image_flops(tokens, None) * batch / median
        run.metrics.close()
        dist.destroy_process_group()
    return {
        "config": name,
        "parameters": sum(p.numel() for p in run.engine.model.parameters()),
        "batch": batch,
        "image_tokens": config.image_tokens,
        "text_tokens_mean": tokens,
        "precision": config.parallel.precision or ("bf16" if cuda else "fp32"),
        "step_time_s": median,
        "images_per_s": batch / median,
        "model_tflops_per_s": flops_per_s / 1e12,
        "mfu": flops_per_s / run.plan.peak_flops if run.plan.peak_flops else None,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--config", action="append", help="NAME=BATCH; may be given several times")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    chosen = ON_GPU if torch.cuda.is_available() else ON_CPU
    if arguments.config:
        chosen = {name: int(batch) for name, _, batch in (text.partition("=") for text in arguments.config)}
    results = [measure(name, batch, arguments.overrides) for name, batch in chosen.items()]
    write(arguments.output, {"steps": results})


if __name__ == "__main__":
    main()
