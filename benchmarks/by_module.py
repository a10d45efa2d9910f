"""Factors on the learning rate by kind of module against the best global rate, at the width they were found and wider.

    python launch/search.py run --config search/modules_cifar.yaml
    python launch/search.py transfer --study runs/modules_cifar --to dit_cifar_mup.yaml --output runs/modules.yaml
    python -m benchmarks.by_module --found runs/modules.yaml --folder runs/by_module --output docs/by_module.json

DiT on CIFAR-10 as in docs/transfer.md, on seeds that the search has not seen, the same for both. Reported: the gain in
loss at each width in standard deviations of a seed, with an interval, and how much of it is left at the widest. Every
finished run is stored in FOLDER/results.jsonl: the same command again goes on. Exit code 1: no gain of two standard
deviations where the factors were found.
"""

import argparse
import dataclasses
import functools
import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from benchmarks.runs import add_study_arguments, claim_folder, run_jobs, trained, worker_pool
from benchmarks.transfer import SWEEPS
from benchmarks.transfer import Job as SweepJob
from benchmarks.transfer import settings as sweep_settings
from trainer.config.load import load_config
from trainer.monitor.metrics import read_metrics
from trainer.search.statistics import REPLICATES, interval

SWEEP = SWEEPS["dit_cpu"]
WIDTHS = (64, 256)
LOG2_LR = -5.88  # the best global rate at width 64 (docs/transfer.md)
SEEDS = range(1, 6)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. arm: "global" or "modules"."""

    arm: str
    width: int
    seed: int


def jobs() -> Iterator[Job]:
    """All arms and widths of a seed before the next one."""
    for seed in SEEDS:
        for width in WIDTHS:
            yield from (Job(arm, width, seed) for arm in ("global", "modules"))


def settings(found: dict[str, Any], job: Job) -> list[str]:
    """A job's overrides. found: what the search found, by key."""
    common = sweep_settings(SWEEP, SweepJob("mup", "width", job.width, LOG2_LR, job.seed))
    if job.arm == "global":
        return common
    keys = {text.partition("=")[0] for text in common} & found.keys()
    return [text for text in common if text.partition("=")[0] not in keys] + [f"{k}={v}" for k, v in found.items()]


def run_job(found: dict[str, Any], job: Job) -> dict[str, Any]:
    """Train it; {**job, loss, seconds}."""
    began = time.perf_counter()
    with trained(load_config(SWEEP.config, settings(found, job))) as (folder, _):
        loss = read_metrics(folder)[-1]["val_loss_ema"]
    return {**dataclasses.asdict(job), "loss": loss, "seconds": round(time.perf_counter() - began, 1)}


def judge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By width: gain is what the factors lower the mean loss by, seed for seed; its interval resamples seeds."""
    loss = {(r["arm"], r["width"], r["seed"]): r["loss"] for r in results}
    seeds = [s for s in SEEDS if all((arm, w, s) in loss for arm in ("global", "modules") for w in WIDTHS)]
    chance, widths = random.Random(0), {}
    for width in WIDTHS:
        gains = [loss["global", width, s] - loss["modules", width, s] for s in seeds]
        std = statistics.stdev(loss["global", width, s] for s in seeds)
        widen = math.sqrt(len(gains) / (len(gains) - 1))
        mean = statistics.fmean(gains)
        drawn = [statistics.fmean(chance.choices(gains, k=len(gains))) for _ in range(REPLICATES)]
        bounds = interval([mean + widen * (each - mean) for each in drawn], mean)
        widths[str(width)] = {
            "global": round(statistics.fmean(loss["global", width, s] for s in seeds), 6),
            "modules": round(statistics.fmean(loss["modules", width, s] for s in seeds), 6),
            "gain": {key: round(value, 6) for key, value in dataclasses.asdict(bounds).items()},
            "seed_std": round(std, 6),
            "gain_over_seed_std": round(mean / std, 2),
        }
    narrow, wide = (widths[str(width)]["gain"]["value"] for width in WIDTHS)
    return {
        "seeds": len(seeds),
        "widths": widths,
        "gain_left_at_widest": round(wide / narrow, 3) if narrow > 0 else None,
    }


def searched(file: Path) -> dict[str, Any]:
    """What a YAML of `search.py transfer` sets differently from the config that it extends, by key."""
    ours, base = (load_config(name, []).model_dump() for name in (str(file), SWEEP.config))
    # A rate that was not searched is the target's own; the factors were found beside that of LOG2_LR.
    found: dict[str, Any] = {} if ours["optim"]["lr"] == base["optim"]["lr"] else {"optim.lr": ours["optim"]["lr"]}
    for kind, factors in ours["mup"]["factors"].items():
        for key, value in factors.items():
            if value is not None and value != 1.0:
                found[f"mup.factors.{kind}.{key}"] = value
    assert base["mup"]["factors"] == {}, "the base has no factors"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--found", type=Path, required=True, help="YAML of search.py transfer")
    add_study_arguments(parser)
    arguments = parser.parse_args()
    found = searched(arguments.found)
    claim_folder(arguments.folder, {"found": found})
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    workers = arguments.workers or SWEEP.workers
    with worker_pool(workers) as pool:
        work = functools.partial(run_job, found)
        results = run_jobs(pool, workers, list(jobs()), work, arguments.folder / "results.jsonl", deadline)
    verdict = judge(results)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write(arguments.output, {"found": found, "log2_lr": LOG2_LR, "verdict": verdict, "runs": results})
    print(verdict)
    return 0 if verdict["widths"][str(WIDTHS[0])]["gain_over_seed_std"] > 2 else 1


if __name__ == "__main__":
    raise SystemExit(main())
