"""How many steps, and how much time, does Muon save? A wide model, each optimizer at the rate found at the base width.

    python -m benchmarks.muon --study dit_cpu --folder runs/muon_dit --output docs/muon_dit.json

1. AdamW's learning rate: the best of a sweep at the base width. Then Muon's, beside AdamW at that rate for the weights
   that Muon leaves to it.
2. The target on other seeds, under muP with these rates. The learning rate is constant after a short warm-up, so that
   losses of different steps compare. Reported: when the loss of Muon is that of AdamW at its end, in steps, and in time
   by the median step of each; the time is that of a busy CPU.

Every finished run is stored in FOLDER/results.jsonl: the same command again goes on.
"""

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.convergence import COMMON, curves_of, mean_curve, number, speed_up
from benchmarks.machine import write
from benchmarks.runs import add_study_arguments, claim_folder, run_jobs, trained, worker_pool
from trainer.config.load import load_config
from trainer.monitor.metrics import read_metrics

LOSS = "val_loss_ema"
_POINTS = 24  # of each curve


@dataclasses.dataclass(frozen=True)
class Study:
    """log2_lrs: of each optimizer's sweep at the base width. seeds: of the target."""

    config: str
    overrides: tuple[str, ...]
    base_width: int
    width: int
    steps: int
    log2_lrs: dict[str, tuple[float, ...]]
    seeds: int = 3
    workers: int = 2


_LRS = {"adamw": (-9.0, -8.0, -7.0, -6.0, -5.0), "muon": (-7.0, -6.0, -5.0, -4.0, -3.0)}
STUDIES = {
    "mmdit_cpu": Study(
        "mmdit_demo_mup.yaml",
        ("model.depth=3", "train.global_batch_size=32", "data.resolution=16", "objective.shift_base_tokens=16"),
        64, 256, 480, _LRS,
    ),
    "dit_cpu": Study(
        "dit_cifar_mup.yaml",
        ("model.depth=3", "train.global_batch_size=32", "data.resolution=16"), 64, 256, 480, _LRS,
    ),
    # Seconds: a test that the machinery works, not that Muon does.
    "tiny": Study(
        "mmdit_debug_mup.yaml", ("model.depth=1", "validation.samples=4", "optim.warmup_steps=1"),
        32, 64, 24, {"adamw": (-9.0, -7.0), "muon": (-7.0,)}, seeds=2, workers=1,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. adamw: log2 of AdamW's learning rate; muon: of Muon's, or None without it."""

    width: int
    adamw: float
    muon: float | None
    seed: int


def settings(study: Study, job: Job) -> list[str]:
    """A job's overrides."""
    every = study.steps // _POINTS
    muon = [] if job.muon is None else ["optim.kind=muon", f"optim.muon.lr={2.0**job.muon}"]
    return [
        *COMMON, *study.overrides, *muon, f"optim.lr={2.0**job.adamw}",
        f"model.width={job.width}", f"mup.base_width={study.base_width}", f"train.seed={job.seed}",
        f"train.steps={study.steps}", f"train.log_every={every}",
        f"train.validate_every={every if job.width == study.width else study.steps}",
    ]  # fmt: skip


def run_job(study: Study, job: Job) -> dict[str, Any]:
    """Train it; {**job, loss (None where it is not finite), step_s: median seconds of a step, val_loss_ema: {step}}."""
    with trained(load_config(study.config, settings(study, job))) as (folder, _):
        records = read_metrics(folder)
    curve = {r["step"]: r[LOSS] for r in records if math.isfinite(r.get(LOSS, math.nan))}
    step_s = statistics.median(r["step_time_s"] for r in records if "step_time_s" in r)
    return {**dataclasses.asdict(job), "loss": curve.get(study.steps), "step_s": step_s, LOSS: curve}


def best_rate(results: Sequence[dict[str, Any]], jobs: Sequence[Job], key: str) -> float:
    """log2 of the rate with the lowest last loss of a sweep; `key`: of the job."""
    of_sweep = [r for r in results if any(dataclasses.asdict(job).items() <= r.items() for job in jobs)]
    return min((r for r in of_sweep if r["loss"] is not None), key=lambda r: r["loss"])[key]


def sweep(study: Study, adamw: float | None = None) -> list[Job]:
    """AdamW's at the base width, or, where its rate is known, Muon's beside it; on a seed that decides nothing else."""
    if adamw is None:
        return [Job(study.base_width, lr, None, 0) for lr in study.log2_lrs["adamw"]]
    return [Job(study.base_width, adamw, lr, 0) for lr in study.log2_lrs["muon"]]


def arms(study: Study, adamw: float, muon: float) -> dict[str, list[Job]]:
    """The compared runs, seed after seed."""
    seeds = range(1, 1 + study.seeds)
    rates = {"adamw": None, "muon": muon}
    return {arm: [Job(study.width, adamw, rate, seed) for seed in seeds] for arm, rate in rates.items()}


def judge(study: Study, results: Sequence[dict[str, Any]], found: dict[str, list[Job]]) -> dict[str, Any]:
    """When Muon has AdamW's last loss, with an interval over the seeds; and both losses at the end."""
    adamw, muon = (curves_of(results, found[arm], LOSS) for arm in ("adamw", "muon"))
    reached, times = speed_up(adamw, muon)
    rows = {arm: [r for r in results for job in jobs if dataclasses.asdict(job).items() <= r.items()]
            for arm, jobs in found.items()}  # fmt: skip
    step_s = {arm: statistics.median(r["step_s"] for r in of_arm) for arm, of_arm in rows.items()}
    slower = step_s["muon"] / step_s["adamw"]
    ends = {arm: [curve[study.steps] for curve in curves] for arm, curves in (("adamw", adamw), ("muon", muon))}
    return {
        "reached": str(reached),
        "fewer_steps": {key: number(value) for key, value in dataclasses.asdict(times).items()},
        "less_time": {key: number(value / slower) for key, value in dataclasses.asdict(times).items()},
        "step_s": {arm: round(value, 4) for arm, value in step_s.items()},
        "last_loss": {arm: [round(value, 5) for value in values] for arm, values in ends.items()},
        "last_loss_ratio": round(statistics.fmean(ends["muon"]) / statistics.fmean(ends["adamw"]), 4),
    }


def plot(results: Sequence[dict[str, Any]], found: dict[str, list[Job]]) -> Figure:
    """Mean and seeds of both optimizers by step."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for place, (arm, jobs) in enumerate(found.items()):
        curves = curves_of(results, jobs, LOSS)
        mean = mean_curve(curves)
        rate = jobs[0].adamw if jobs[0].muon is None else jobs[0].muon
        axes.plot(list(mean), list(mean.values()), color=f"C{place}", label=f"{arm}, 2^{rate:g}")
        for curve in curves:
            axes.plot(list(mean), [curve[step] for step in mean], color=f"C{place}", lw=0.6, alpha=0.6)
    axes.set(xlabel="step", ylabel=LOSS, yscale="log")
    axes.grid(True, alpha=0.25, which="both")
    axes.legend()
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, required=True)
    add_study_arguments(parser)
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    claim_folder(arguments.folder, dataclasses.asdict(study))
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    workers, file = arguments.workers or study.workers, arguments.folder / "results.jsonl"
    with worker_pool(workers) as pool:

        def done(jobs: list[Job]) -> list[dict[str, Any]]:
            return run_jobs(pool, workers, jobs, functools.partial(run_job, study), file, deadline)

        swept = sweep(study)
        adamw = best_rate(done(swept), swept, "adamw")
        swept = sweep(study, adamw)
        muon = best_rate(done(swept), swept, "muon")
        found = arms(study, adamw, muon)
        results = done([job for jobs in zip(*found.values(), strict=True) for job in jobs])
    verdict = judge(study, results, found)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    plot(results, found).savefig(arguments.output.with_suffix(".png"), dpi=120)
    write(arguments.output, {"study": dataclasses.asdict(study), "log2_lr": {"adamw": adamw, "muon": muon},
                             "muon_against_adamw": verdict, "runs": results})  # fmt: skip
    print(verdict)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
