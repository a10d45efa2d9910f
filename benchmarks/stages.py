"""Is it worth to begin at a low resolution? 16 and then 32 pixels beside 32 from the start, at equal FLOPs.

    python -m benchmarks.stages --folder runs/stages --output docs/stages_emoji.json

MMDiT on the demo's emoji, one config for the stages (configs/recipes/emoji_stages.yaml) and the demo's for the other
arm, which takes as many steps at 32 pixels as the same FLOPs pay for. Reported: the EMA's validation loss at 32 pixels
on the same images, times and noise, seed for seed, and the pictures of the first seed. Every finished run is stored in
FOLDER/results.jsonl: the same command again goes on.
"""

import argparse
import dataclasses
import functools
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.convergence import mean_and_interval
from benchmarks.machine import write
from benchmarks.runs import add_study_arguments, claim_folder, run_jobs, trained, worker_pool
from trainer.build.flops import image_flops, training_flops
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.monitor.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class Study:
    """steps: of the staged arm; until: of its first stage."""

    overrides: tuple[str, ...]
    steps: int
    until: int
    seeds: int = 3
    workers: int = 2


STUDIES = {
    "emoji_cpu": Study(("model.depth=3", "train.global_batch_size=32"), steps=1000, until=700),
    # Seconds: a test that the machinery works.
    "tiny": Study(("model.depth=1", "model.width=32", "mup.base_width=32", "train.global_batch_size=4",
                   "validation.samples=4", "optim.warmup_steps=1", "sample.steps=2"), steps=6, until=4, seeds=2,
                  workers=1),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. arm: "staged" or "whole"."""

    arm: str
    seed: int


def jobs(study: Study) -> Iterator[Job]:
    for seed in range(study.seeds):
        yield from (Job(arm, seed) for arm in ("staged", "whole"))


def config_of(study: Study, job: Job) -> TrainConfig:
    def load(name: str, steps: int, *more: str) -> TrainConfig:
        common = (f"train.steps={steps}", f"train.validate_every={steps}", f"train.log_every={max(1, steps // 10)}",
                  f"train.seed={job.seed}", "train.checkpoint_every=0", "run.keep_last=1",
                  f"train.sample_every={0 if job.seed else steps}")  # fmt: skip
        return load_config(name, [*study.overrides, *common, *more])

    staged = load(
        "recipes/emoji_stages.yaml", study.steps, f"stages=[{{until: {study.until}}}, {{data: {{resolution: 32}}}}]"
    )
    if job.arm == "staged":
        return staged
    a_step = staged.train.global_batch_size * image_flops(load("mmdit_demo_mup.yaml", study.steps))
    return load("mmdit_demo_mup.yaml", round(training_flops(staged) / a_step))


def run_job(study: Study, pictures: Path, job: Job) -> dict[str, Any]:
    """Train it; {**job, steps, flops, loss at 32 pixels, seconds}. pictures: folder for the first seed's samples."""
    began, config = time.perf_counter(), config_of(study, job)
    with trained(config) as (folder, _):
        loss = read_metrics(folder)[-1]["val_loss_ema"]
        if job.seed == 0:
            shutil.copy(sorted((folder / "samples").glob("*.png"))[-1], pictures / f"{job.arm}.png")
    seconds = round(time.perf_counter() - began, 1)
    facts = {"steps": config.train.steps, "flops": training_flops(config), "loss": loss, "seconds": seconds}
    return {**dataclasses.asdict(job), **facts}


def judge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Both mean losses, and what stages lower the loss by, seed for seed, with a 95 % interval (None of one)."""
    loss = {(r["arm"], r["seed"]): r["loss"] for r in results}
    seeds = sorted(seed for arm, seed in loss if arm == "staged" and ("whole", seed) in loss)
    gains = [loss["whole", seed] - loss["staged", seed] for seed in seeds]
    gain, interval = mean_and_interval(gains)
    means = {arm: round(statistics.fmean(loss[arm, seed] for seed in seeds), 5) for arm in ("staged", "whole")}
    return {"seeds": len(seeds), "loss": means, "gain": gain, "interval": interval}


def side_by_side(pictures: Sequence[Path], path: Path) -> None:
    """Two pictures as one."""
    left, right = (Image.open(picture).convert("RGB") for picture in pictures)
    both = Image.new("RGB", (left.width + right.width + 16, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 16, 0))
    both.save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="emoji_cpu")
    add_study_arguments(parser)
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    claim_folder(arguments.folder, dataclasses.asdict(study))
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    workers = arguments.workers or study.workers
    with worker_pool(workers) as pool:
        work = functools.partial(run_job, study, arguments.folder)
        results = run_jobs(pool, workers, list(jobs(study)), work, arguments.folder / "results.jsonl", deadline)
    verdict = judge(results)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    side_by_side([arguments.folder / f"{arm}.png" for arm in ("staged", "whole")], arguments.output.with_suffix(".png"))
    write(arguments.output, {"study": dataclasses.asdict(study), "verdict": verdict, "runs": results})
    print(verdict)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
