"""What should a model put out, in pixels: the velocity or the clean image? Both at equal steps, each at its best rate.

    python -m benchmarks.targets --folder runs/targets --output docs/targets_emoji.json

MMDiT on the demo's emoji without an autoencoder; both arms have the velocity's loss (JiT, arXiv 2511.13720).

1. Each arm's learning rate: the best of a sweep on a seed of its own.
2. Each arm at it on other seeds. Reported, seed for seed, is what predicting the clean image changes: the EMA's
   validation loss on the same images, times and noise, at each noise level too, and FID and KID of pictures made from
   captions that were not trained on.

Every finished run is stored in FOLDER/results.jsonl: the same command again goes on. Beside the output lie the pictures
of the first compared seed.
"""

import argparse
import dataclasses
import functools
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import convergence
from benchmarks.convergence import COMMON, LOSS, image_measures, mean_and_interval, write_references
from benchmarks.machine import write
from benchmarks.runs import add_study_arguments, claim_folder, run_jobs, trained, worker_pool
from benchmarks.stages import side_by_side
from trainer.config.load import load_config
from trainer.monitor.metrics import read_metrics

ARMS = ("velocity", "x")  # of objective.predict
IMAGES = ("fid", "kid")
_TUNING_SEED = 0


@dataclasses.dataclass(frozen=True)
class Study:
    """log2_lrs: of both sweeps. images: made by each compared run. references: real images. network: of the features;
    "pixels" takes 4 x 4 means, for tests."""

    overrides: tuple[str, ...]
    steps: int
    log2_lrs: tuple[float, ...] = (-8.0, -7.0, -6.0)
    images: int = 256
    references: int = 1024
    network: str = ".cache/inception.pt"
    seeds: int = 3
    workers: int = 2
    config: str = "mmdit_demo_mup.yaml"

    @property
    def measured(self) -> convergence.Study:
        """How benchmarks.convergence measures a run's last images."""
        return convergence.Study(
            self.config, self.overrides, 0, 0, self.steps, eighths=(8,), images=self.images, references=self.references,
            network=self.network,
        )  # fmt: skip


STUDIES = {
    "emoji_cpu": Study(("model.width=128", "model.depth=3", "train.global_batch_size=32"), steps=500),
    # Seconds: a test that the machinery works.
    "tiny": Study(("model.depth=1", "model.width=32", "mup.base_width=32", "train.global_batch_size=4",
                   "validation.samples=4", "optim.warmup_steps=1", "sample.steps=2"), steps=8, log2_lrs=(-9.0, -7.0),
                  images=8, references=16, network="pixels", seeds=2, workers=1),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. compared: its images are measured; else its last loss alone."""

    arm: str
    log2_lr: float
    seed: int
    compared: bool


def sweeps(study: Study) -> list[Job]:
    return [Job(arm, lr, _TUNING_SEED, False) for arm in ARMS for lr in study.log2_lrs]


def best_rates(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """log2 of the learning rate with the lowest last loss of each arm's sweep."""
    swept = [r for r in results if not r["compared"] and r[LOSS] is not None]
    return {arm: min((r for r in swept if r["arm"] == arm), key=lambda r: r[LOSS])["log2_lr"] for arm in ARMS}


def compared(study: Study, rates: dict[str, float]) -> list[Job]:
    """Seed after seed, so that a study that was stopped is a whole one with fewer seeds."""
    seeds = range(_TUNING_SEED + 1, _TUNING_SEED + 1 + study.seeds)
    return [Job(arm, rates[arm], seed, True) for seed in seeds for arm in ARMS]


def settings(study: Study, job: Job) -> list[str]:
    """A job's overrides."""
    pictures = job.compared and job.seed == _TUNING_SEED + 1
    return [
        *COMMON, "optim.schedule=linear", "sample.guidance=1", *study.overrides, f"objective.predict={job.arm}",
        f"optim.lr={2.0**job.log2_lr}", f"train.seed={job.seed}", f"train.steps={study.steps}",
        f"train.log_every={study.steps}", f"train.validate_every={study.steps}",
        f"train.sample_every={study.steps if pictures else 0}",
        f"train.ema_snapshot_every={study.steps if job.compared else 0}",
    ]  # fmt: skip


def run_job(study: Study, folder: Path, job: Job) -> dict[str, Any]:
    """Train it; {**job, seconds, the last loss (None where it is not finite), and of a compared run the loss at each
    noise level, FID and KID}. folder: the study's, with the features of the real images."""
    began, config = time.perf_counter(), load_config(study.config, settings(study, job))
    with trained(config) as (run, world):
        last = read_metrics(run)[-1]
        found: dict[str, Any] = {LOSS: last[LOSS] if math.isfinite(last[LOSS]) else None}
        if job.compared:
            found |= {key: value for key, value in last.items() if key.startswith(f"{LOSS}_t")}
            curves = image_measures(study.measured, config, run / "ema", folder / "references.pt", world)
            found |= {measure: curves[measure][study.steps] for measure in IMAGES}
        if pictures := sorted((run / "samples").glob("*.png")):
            shutil.copy(pictures[-1], folder / f"{job.arm}.png")
    return {**dataclasses.asdict(job), "seconds": round(time.perf_counter() - began, 1), **found}


def judge(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By measure: the mean of each arm, and what x changes, seed for seed, with a 95 % interval (None of one seed)."""
    runs = {(r["arm"], r["seed"]): r for r in results if r["compared"]}
    seeds = sorted(seed for arm, seed in runs if arm == ARMS[0] and (ARMS[1], seed) in runs)
    measures = [key for key in runs[ARMS[0], seeds[0]] if key.startswith(LOSS) or key in IMAGES]
    verdict: dict[str, dict[str, Any]] = {}
    for measure in measures:
        of_arm = {arm: [runs[arm, seed][measure] for seed in seeds] for arm in ARMS}
        changes = [x - velocity for velocity, x in zip(of_arm["velocity"], of_arm["x"], strict=True)]
        change, interval = mean_and_interval(changes)
        means = {arm: round(statistics.fmean(values), 5) for arm, values in of_arm.items()}
        verdict[measure] = {**means, "change": change, "interval": interval}
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="emoji_cpu")
    add_study_arguments(parser)
    arguments = parser.parse_args()
    study, folder = STUDIES[arguments.study], arguments.folder
    claim_folder(folder, dataclasses.asdict(study))
    if not (folder / "references.pt").is_file():
        write_references(
            study.measured, load_config(study.config, settings(study, sweeps(study)[0])), folder / "references.pt"
        )
    workers = arguments.workers or study.workers
    with worker_pool(workers) as pool:
        go_on = functools.partial(
            run_jobs, pool, workers, work=functools.partial(run_job, study, folder), file=folder / "results.jsonl",
            deadline=time.monotonic() + 60 * arguments.budget_minutes,
        )  # fmt: skip
        rates = best_rates(go_on(sweeps(study)))
        results = go_on(compared(study, rates))
    verdict = judge(results)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    side_by_side([folder / f"{arm}.png" for arm in ARMS], arguments.output.with_suffix(".png"))
    write(arguments.output, {"study": dataclasses.asdict(study), "log2_lr": rates, "x_against_velocity": verdict,
                             "runs": results})  # fmt: skip
    for measure, row in verdict.items():
        print(measure, row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
