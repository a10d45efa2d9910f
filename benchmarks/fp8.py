"""Does training in fp8 end where training in bf16 ends? The demo, smaller and shorter, in both from the same seeds.

    python -m benchmarks.fp8 --output benchmarks/results/fp8_cpu.json [section.key=value ...]

The gate: the means of the last validation loss lie no further apart than bf16's runs of different seeds do, by their
standard deviation. Exit code 1 where it is missed. On a CPU fp8 is emulated, which has the same rounding and tells
nothing about speed.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import write
from benchmarks.runs import trained
from trainer.config.load import load_config
from trainer.monitor.metrics import read_metrics

CONFIG = "mmdit_demo_mup.yaml"
SHORT = (
    "model.width=128", "model.depth=2", "train.global_batch_size=16", "train.steps=200", "optim.warmup_steps=20",
    "train.validate_every=200", "train.sample_every=0", "train.checkpoint_every=0", "validation.samples=64",
)  # fmt: skip
PRECISIONS = ("bf16", "fp8")


def final_losses(precision: str, seed: int, overrides: Sequence[str]) -> dict[str, float]:
    """Validation losses of the live and of the averaged weights after the last step, and CPU seconds."""
    began = time.process_time()
    config = load_config(CONFIG, [*SHORT, *overrides, f"parallel.precision={precision}", f"train.seed={seed}"])
    with trained(config) as (folder, _):
        last = [record for record in read_metrics(folder) if "val_loss" in record][-1]
    losses = {name: last[name] for name in ("val_loss", "val_loss_ema")}
    return {**losses, "cpu_s": round(time.process_time() - began, 1)}


def judge(losses: Mapping[str, Sequence[float]]) -> dict[str, float | bool]:
    """losses: by precision, of the same seeds. deviation: of bf16's runs."""
    means = {precision: statistics.fmean(losses[precision]) for precision in PRECISIONS}
    difference, deviation = means["fp8"] - means["bf16"], statistics.stdev(losses["bf16"])
    paired = statistics.fmean(abs(fp8 - bf16) for bf16, fp8 in zip(losses["bf16"], losses["fp8"], strict=True))
    return {
        **{f"mean_{precision}": mean for precision, mean in means.items()},
        "difference": difference,
        "mean_difference_of_equal_seeds": paired,
        "deviation": deviation,
        "passed": abs(difference) <= deviation,  # not of NaN
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds: a deviation needs at least 2")
    runs: dict[str, list[dict[str, float]]] = {precision: [] for precision in PRECISIONS}
    for seed in range(arguments.seeds):
        for precision in PRECISIONS:
            runs[precision].append(final_losses(precision, seed, arguments.overrides))
            print(precision, seed, runs[precision][-1], flush=True)
    names = ("val_loss", "val_loss_ema")
    judged = {name: judge({key: [run[name] for run in of] for key, of in runs.items()}) for name in names}
    results: dict[str, Any] = {
        "config": CONFIG,
        "overrides": [*SHORT, *arguments.overrides],
        "emulated": not torch.cuda.is_available(),
        "runs": runs,
        "judged": judged,
    }
    write(arguments.output, results)
    return 0 if all(each["passed"] for each in judged.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
