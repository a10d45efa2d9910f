"""How many steps does muP save? A wide model with the hyperparameters of a narrow proxy, against the SP recipe.

    python -m benchmarks.convergence --study mmdit_cpu --folder runs/convergence --output docs/convergence_mmdit.json

1. muP's learning rate: the best of a sweep of the proxy, which has the base width, where muP and SP are the same.
2. SP's best learning rate: of the same sweep at the target's width, which nobody can pay for with a large model.
3. The target on other seeds: muP with the proxy's learning rate, SP with its recipe's default one, and SP with its best
   one, the fair control. Loss of the EMA weights, FID and KID by step.

Data, weights at the base width and all else are the same. The learning rate is constant after a short warm-up, so that
losses of different steps compare. Reported: when muP is as good as SP at its end. Every finished run is stored in
FOLDER/results.jsonl: the same command again goes on, and --budget-minutes stops in time.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.machine import write
from benchmarks.runs import J, add_study_arguments, claim_folder, run_jobs, trained, worker_pool
from data.files import temporary_beside
from data.image_sets import open_image_set
from trainer.build.inference import build_inference
from trainer.checkpoint.find import complete_checkpoints, find_checkpoint
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.evaluate.curves import Curve, Reached, compare
from trainer.evaluate.inception import Inception
from trainer.evaluate.metrics import MetricError, fid, kid, statistics_of
from trainer.monitor.metrics import read_metrics
from trainer.parallel.mesh import World
from trainer.search.statistics import REPLICATES, Estimate, interval

LOSS = "val_loss_ema"
MEASURES = (LOSS, "fid", "kid")
ARMS = {"mup": "μP, the proxy's rate", "sp_best": "SP, its best rate", "sp_default": "SP, its default rate"}
_TUNING_SEED = 0  # the arms are compared on the seeds after it, so that no rate was chosen on them
_NORMAL, STUDENT = (
    1.96,
    {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571},
)  # 97.5 % quantiles, t by degrees of freedom
_BATCH = 64  # images that the network sees at once


@dataclasses.dataclass(frozen=True)
class Study:
    """log2_lrs: of both sweeps. default_log2_lr: what the SP recipe says, 1e-4 for DiT and for SD3's MMDiT. eighths: of
    the steps after which images are made; losses are measured after each eighth. images: generated at each of them.
    references: real images. network: of the features; "pixels" takes 4 x 4 means, for tests."""

    config: str
    overrides: tuple[str, ...]
    base_width: int
    width: int
    steps: int
    log2_lrs: tuple[float, ...] = (-10, -9, -8, -7, -6, -5)
    default_log2_lr: float = -13.3
    seeds: int = 3
    eighths: tuple[int, ...] = (1, 2, 4, 6, 8)
    images: int = 256
    references: int = 1024
    network: str = ".cache/inception.pt"
    workers: int = 2


# At 16 pixels a step has a quarter of the image tokens; half of a compared run's time is then the network of FID.
STUDIES = {
    "mmdit_cpu": Study(
        "mmdit_demo_mup.yaml",
        ("model.depth=3", "train.global_batch_size=32", "sample.guidance=1", "data.resolution=16",
         "objective.shift_base_tokens=16"),
        64, 256, 600, eighths=(2, 4, 6, 8), images=128,
    ),
    "dit_cpu": Study(
        "dit_cifar_mup.yaml",
        ("model.depth=3", "train.global_batch_size=32", "sample.guidance=1", "sample.steps=20", "data.resolution=16"),
        64, 256, 1200, eighths=(2, 4, 6, 8), images=128,
    ),
    "mmdit_gpu": Study("mmdit_demo_mup.yaml", ("model.depth=6", "model.head_dim=72", "sample.guidance=1"),
                       144, 1152, 4000, (-12, -11, -10, -9, -8, -7, -6), images=2048, references=8192, workers=3),
    # Seconds: tests that the machinery works, not that muP does.
    "tiny": Study("mmdit_debug_mup.yaml", ("model.depth=1", "validation.samples=4", "optim.warmup_steps=1"),
                  32, 64, 8, (-9, -7), -9, seeds=1, eighths=(8,), images=8, references=16, network="pixels",
                  workers=1),
}  # fmt: skip

COMMON = (
    "train.sample_every=0", "train.checkpoint_every=0", "run.keep_last=1", "validation.samples=128",
    "ema.decays=[0.98]", "optim.warmup_steps=20", "optim.schedule=constant",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. compared: its course is measured; else its last loss alone."""

    parametrization: str
    width: int
    log2_lr: float
    seed: int
    compared: bool


def sweeps(study: Study) -> list[Job]:
    """The proxy's, and SP's at the target's width, with the default learning rate among them."""
    proxy = [Job("mup", study.base_width, lr, _TUNING_SEED, False) for lr in study.log2_lrs]
    rates = sorted({*study.log2_lrs, study.default_log2_lr})
    return [*proxy, *(Job("sp", study.width, lr, _TUNING_SEED, False) for lr in rates)]


def best_rate(study: Study, results: Sequence[dict[str, Any]], parametrization: str, width: int) -> float:
    """log2 of the learning rate with the lowest last loss of a sweep."""
    swept = [r for r in results if (r["parametrization"], r["width"], r["compared"]) == (parametrization, width, False)]
    return min((r for r in swept if r["loss"] is not None), key=lambda r: r["loss"])["log2_lr"]


def arms(study: Study, results: Sequence[dict[str, Any]]) -> dict[str, list[Job]]:
    """{arm: its runs}, seed after seed. SP's best learning rate may be its default one: then both arms are the same."""
    rates = {
        "mup": best_rate(study, results, "mup", study.base_width),
        "sp_best": best_rate(study, results, "sp", study.width),
        "sp_default": study.default_log2_lr,
    }
    seeds = range(_TUNING_SEED + 1, _TUNING_SEED + 1 + study.seeds)
    return {
        arm: [Job(arm.partition("_")[0], study.width, rate, seed, True) for seed in seeds]
        for arm, rate in rates.items()
    }


def settings(study: Study, job: Job) -> list[str]:
    """A job's overrides. SP and muP differ in the parametrization and the learning rate alone."""
    every = study.steps // 8
    return [
        *COMMON, *study.overrides,
        f"model.width={job.width}", f"mup.base_width={study.base_width}", f"mup.parametrization={job.parametrization}",
        f"optim.lr={2.0**job.log2_lr}", f"train.seed={job.seed}", f"train.steps={study.steps}",
        f"train.log_every={every}", f"train.validate_every={every if job.compared else study.steps}",
        f"train.ema_snapshot_every={every if job.compared else 0}",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- one run


def run_job(study: Study, references: Path, job: Job) -> dict[str, Any]:
    """Train it; {**job, loss (None where it is not finite), seconds, and for runs that are compared a curve of each
    measure}. references: file of the real images' features."""
    began = time.perf_counter()
    config = load_config(study.config, settings(study, job))
    curves: dict[str, Curve] = {}
    with trained(config) as (folder, world):
        losses = {r["step"]: r[LOSS] for r in read_metrics(folder) if math.isfinite(r.get(LOSS, math.nan))}
        if job.compared:
            curves = {LOSS: losses, **image_measures(study, config, folder / "ema", references, world)}
    seconds = round(time.perf_counter() - began, 1)
    return {**dataclasses.asdict(job), "loss": losses.get(study.steps), "seconds": seconds, **curves}


def image_measures(
    study: Study, config: TrainConfig, snapshots: Path, references: Path, world: World
) -> dict[str, Curve]:
    """{"fid": {step: ...}, "kid": ...} of a run's averages. Steps whose images have no FID (all the same) are left
    out. Every run has the same noise, prompts and real images."""
    real = torch.load(references)  # [images, features]
    real_statistics = statistics_of(real)
    features = feature_network(study.network, world.device)
    curves: dict[str, dict[int, float]] = {"fid": {}, "kid": {}}
    for snapshot in complete_checkpoints(snapshots):
        step = int(snapshot.name.removeprefix("step_"))
        if step * 8 // study.steps not in study.eighths:
            continue
        model = build_inference(config, find_checkpoint(snapshot), world)
        made = features(torch.from_numpy(model.images(prompts(study, config), 0)))
        try:
            curves["fid"][step] = fid(statistics_of(made), real_statistics)
            curves["kid"][step] = kid(made, real, subset_size=len(made)).value
        except MetricError:
            continue
    return {**curves}


def prompts(study: Study, config: TrainConfig) -> list[str]:
    """Captions that were not trained on, or the classes in turn."""
    if config.label_classes is not None:
        return [str(number % config.label_classes) for number in range(study.images)]
    assert isinstance(config.data.val_shards, str)
    return open_image_set(config.data.val_shards, "data.val_shards", study.images).captions()


def feature_network(network: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Images uint8 [n, H, W, 3] -> features [n, d]."""
    if network == "pixels":
        return lambda images: F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2) / 255, 4).flatten(1)
    inception = Inception(network, "tf1_bilinear", device)
    return lambda images: torch.cat([inception(part).pooled.cpu() for part in images.split(_BATCH)])


def write_references(study: Study, config: TrainConfig, file: Path) -> None:
    """Features of real images: of those that are trained on."""
    assert isinstance(config.data.shards, str)
    real = open_image_set(config.data.shards, "data.shards", study.references)
    pixels = torch.from_numpy(real.pixels(range(len(real)), config.data.resolution))
    features = feature_network(study.network, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with temporary_beside(file) as beside:
        torch.save(features(pixels), beside)


# ----------------------------------------------------------------------------------------------------------- judgement


def curves_of(results: Sequence[dict[str, Any]], jobs: Sequence[J], measure: str) -> list[Curve]:
    """A curve a run, with numbers for keys (JSON makes strings of them); none where a run is not finished."""
    found = [next((r for r in results if dataclasses.asdict(job).items() <= r.items()), None) for job in jobs]  # pyright: ignore[reportArgumentType]
    return [{int(step): value for step, value in r[measure].items()} for r in found if r is not None]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """At the steps that all have."""
    steps = set.intersection(*(set(curve) for curve in curves))
    return {step: statistics.fmean(curve[step] for curve in curves) for step in sorted(steps)}


def speed_up(baseline: Sequence[Curve], other: Sequence[Curve]) -> tuple[Reached, Estimate]:
    """(when the mean of `other` is as good as the baseline's at its end, how many times earlier that is).

    A curve a seed, the same seeds in both. The interval resamples seeds, for both together. Three seeds resampled as
    they are give an interval that holds the truth three times in four: their deviations are widened to what Student's
    t makes of so few. Never reached counts as 0 times, and better at its first measurement as unboundedly many for the
    upper end: how much earlier that was is not known.
    """
    n = len(baseline)
    widen = math.sqrt(n / (n - 1)) * STUDENT.get(n - 1, _NORMAL) / _NORMAL if n > 1 else 1.0
    reached = compare(mean_curve(baseline), mean_curve(other))
    wide = [_spread(curves, widen) for curves in (baseline, other)]
    chance = random.Random(0)
    replicates = []  # (at least, at most)
    for _ in range(REPLICATES):
        drawn = chance.choices(range(n), k=n)
        means = [mean_curve([curves[i] for i in drawn]) for curves in wide]
        replicates.append(_bounds(compare(means[0], means[1])))
    low, high = ([pair[end] for pair in replicates] for end in (0, 1))
    value = _bounds(reached)[0]
    return reached, Estimate(value, interval(low, value).low, interval(high, value).high)


def _bounds(reached: Reached) -> tuple[float, float]:
    """How many times earlier at least and at most."""
    if reached.step is None:
        return 0.0, 0.0
    times = math.inf if reached.times_earlier is None else reached.times_earlier
    return times, times if reached.exact else math.inf


def _spread(curves: Sequence[Curve], factor: float) -> list[Curve]:
    """The same mean, deviations from it times `factor`."""
    mean = mean_curve(curves)
    return [{step: mean[step] + factor * (curve[step] - mean[step]) for step in mean} for curve in curves]


def judge(study: Study, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What goes into the JSON: the rates, and muP against each control in each measure."""
    found = arms(study, results)
    rates = {arm: jobs[0].log2_lr for arm, jobs in found.items()}
    against: dict[str, Any] = {}
    for control, measure in itertools.product(("sp_best", "sp_default"), MEASURES):
        curves = curves_of(results, found[control], measure)
        if not all(study.steps in curve for curve in curves):  # a run diverged, or its images are all the same
            against.setdefault(control, {})[measure] = {
                "times_earlier": None, "text": f"no comparison: a run of {control} has no {measure} at its end",
            }  # fmt: skip
            continue
        reached, times = speed_up(curves, curves_of(results, found["mup"], measure))
        against.setdefault(control, {})[measure] = {
            **dataclasses.asdict(reached),
            "times_earlier": {key: number(value) for key, value in dataclasses.asdict(times).items()},
            "text": f"μP {reached}",
        }
    return {
        "log2_lr": rates,
        "at_edge_of_the_sweep": [
            arm for arm in ("mup", "sp_best") if not min(study.log2_lrs) < rates[arm] < max(study.log2_lrs)
        ],
        "mup_against": against,
    }


def mean_and_interval(values: Sequence[float]) -> tuple[float, list[float] | None]:
    """The mean of a few seeds, and its 95 % interval (None of one), to five digits after the point."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return round(mean, 5), None
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return round(mean, 5), [round(mean - half, 5), round(mean + half, 5)]


def number(value: float) -> float | None:
    """None: without bound, which JSON has no number for."""
    return round(value, 3) if math.isfinite(value) else None


def plot(study: Study, results: Sequence[dict[str, Any]], found: dict[str, Any], path: Path) -> None:
    """The sweeps, then a panel a measure: mean and seeds of each arm; a line where each control ends."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    first, *panels = figure.subplots(1, 1 + len(MEASURES))
    swept = [r for r in results if not r["compared"] and r["loss"] is not None]
    for kind, label, colour in (
        ("mup", f"proxy, width {study.base_width}", "C0"),
        ("sp", f"SP, width {study.width}", "C1"),
    ):
        points = sorted((r["log2_lr"], r["loss"]) for r in swept if r["parametrization"] == kind)
        first.plot(*zip(*points, strict=True), "o-", ms=4, color=colour, label=label)
    losses = [r["loss"] for r in swept]
    limits = 0.97 * min(losses), min(1.03 * max(losses), 3 * min(losses))
    first.set(xlabel="log2 of the learning rate", ylabel=f"last {LOSS}", ylim=limits)
    for place, (arm, jobs) in enumerate(arms(study, results).items()):
        for axes, measure in zip(panels, MEASURES, strict=True):
            curves = curves_of(results, jobs, measure)
            mean = mean_curve(curves)
            label = f"{ARMS[arm]}: 2^{jobs[0].log2_lr:g}"
            axes.plot(list(mean), list(mean.values()), "o-", ms=4, color=f"C{place}", label=label)
            for curve in curves:
                axes.plot(list(mean), [curve[step] for step in mean], color=f"C{place}", lw=0.6, alpha=0.6)
            if arm != "mup" and study.steps in mean:
                axes.axhline(mean[study.steps], color=f"C{place}", ls=":", lw=1)
    for axes, measure in zip(panels, MEASURES, strict=True):
        titles = [_times(found["mup_against"][control][measure], control) for control in ("sp_best", "sp_default")]
        axes.set_title("\n".join(titles), fontsize=9)
        axes.set(xlabel="step", ylabel=measure, yscale="log")
    for axes in (first, *panels):
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, format="png")


def _times(against: dict[str, Any], control: str) -> str:
    if against["times_earlier"] is None:
        return f"{control}: {against['text']}"
    times = {key: "∞" if value is None else f"{value:.2f}" for key, value in against["times_earlier"].items()}
    value = f"{'' if against['exact'] else '≥ '}{times['value']}x earlier"
    return f"{control}: {'not reached' if against['step'] is None else value} [{times['low']}, {times['high']}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, required=True)
    add_study_arguments(parser)
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    workers = arguments.workers or study.workers
    claim_folder(arguments.folder, dataclasses.asdict(study))
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    references = arguments.folder / "references.pt"
    if not references.is_file():
        write_references(study, load_config(study.config, settings(study, sweeps(study)[0])), references)
    with worker_pool(workers) as pool:
        work = functools.partial(run_job, study, references)
        go_on = functools.partial(run_jobs, pool, workers, work=work, file=arguments.folder / "results.jsonl",
                                  deadline=deadline)  # fmt: skip
        results = go_on(sweeps(study))
        if complete := _has(results, sweeps(study)):
            jobs = list(dict.fromkeys(job for runs in arms(study, results).values() for job in runs))
            results = go_on(sorted(jobs, key=lambda job: job.seed))
            complete = _has(results, jobs)
    print(f"{len(results)} runs, {sum(r['seconds'] for r in results) / 3600:.2f} worker-hours")
    if not complete:
        print("the study is not complete: run the same command again")
        return 1
    found = judge(study, results)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    plot(study, results, found, arguments.output.with_suffix(".png"))
    write(arguments.output, {"study": dataclasses.asdict(study), **found, "runs": results})
    return 0


def _has(results: Sequence[dict[str, Any]], jobs: Sequence[Job]) -> bool:
    return all(any(dataclasses.asdict(job).items() <= r.items() for r in results) for job in jobs)


if __name__ == "__main__":
    raise SystemExit(main())
