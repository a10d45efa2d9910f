"""Does the best learning rate stay where it is as the model grows? Learning rate x width under muP and under SP.

    python -m benchmarks.transfer --study mmdit_cpu --folder runs/transfer_mmdit --output docs/transfer_mmdit.json

Both parametrizations have the same weights at the base width, which is the narrowest; there their runs are the same
and done once. Real data. The studies of Muon sweep its learning rate, beside one of AdamW for the other weights. Every
finished run is stored in FOLDER/results.jsonl: the same command again goes on, and --budget-minutes stops in time.
`--axis batch` and `--axis steps` sweep these at the base width instead.
The statistics are those of trainer.search.statistics; the figure lies beside the output. Exit code 1: muP falls short.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.machine import write
from benchmarks.runs import add_study_arguments, claim_folder, run_jobs, trained, worker_pool
from trainer.config.load import load_config
from trainer.monitor.metrics import read_metrics
from trainer.search.statistics import Estimate, Transfer, transfer

LARGEST_SHIFT, WIDEST_INTERVAL = 0.35, 0.5  # octaves a doubling
_AXES = {"width": "model.width", "batch": "train.global_batch_size", "steps": "train.steps"}
_SHORT = (
    "train.sample_every=0", "train.checkpoint_every=0", "run.keep_last=1", "validation.samples=128",
    "ema.decays=[0.98]", "optim.warmup_steps=20",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sweep:
    """values: of each axis, the base first. log2_lrs: base learning rates, of the key `swept`. controls: rules that are
    swept beside muP. wrong: rules that are muP with the base rate times m to this power, by name; the runs are those of
    muP, read at other base rates."""

    config: str
    overrides: tuple[str, ...]
    values: dict[str, tuple[int, ...]]
    log2_lrs: tuple[float, ...] = (-10, -9, -8, -7, -6, -5)
    seeds: int = 3
    workers: int = 2
    swept: str = "optim.lr"
    controls: tuple[str, ...] = ("sp",)
    wrong: dict[str, float] = dataclasses.field(default_factory=dict)


# AdamW's rule for hidden weights, and Muon's scale of equal root mean squares, 0.2 sqrt(max(fan_out, fan_in)).
_WRONG = {"lr / m": -1.0, "equal rms": 0.5}
TITLES = {"mup": "μP", "sp": "SP"}
_SIZES = {"width": (64, 128, 256), "batch": (32, 64, 128), "steps": (300, 600, 1200)}
SWEEPS = {
    # At 16 pixels a step has a quarter of the image tokens: 90 runs fit into an hour on two cores.
    "mmdit_cpu": Sweep(
        "mmdit_demo_mup.yaml", ("model.depth=3", "data.resolution=16", "objective.shift_base_tokens=16"), _SIZES
    ),
    # The clean image is predicted, in pixels: has the output the right role for it? Two widths, and muP alone.
    "mmdit_x": Sweep(
        "mmdit_demo_mup.yaml",
        ("model.depth=3", "data.resolution=16", "objective.shift_base_tokens=16", "objective.predict=x"),
        {**_SIZES, "width": (64, 128)},
        seeds=2,
        controls=(),
    ),
    "dit_cpu": Sweep("dit_cifar_mup.yaml", ("model.depth=3", "data.resolution=16"), _SIZES, (-9, -8, -7, -6, -5, -4)),
    "mmdit_muon": Sweep(
        "mmdit_demo_mup.yaml",
        ("model.depth=3", "data.resolution=16", "objective.shift_base_tokens=16", "optim.kind=muon", "optim.lr=0.009"),
        _SIZES,
        (-6, -5, -4, -3, -2),
        swept="optim.muon.lr",
        controls=(),
        wrong=_WRONG,
    ),
    "dit_muon": Sweep(
        "dit_cifar_mup.yaml",
        ("model.depth=3", "data.resolution=16", "optim.kind=muon", "optim.lr=0.017"),
        _SIZES,
        (-8, -7, -6, -5, -4, -3),
        swept="optim.muon.lr",
        controls=(),
        wrong=_WRONG,
    ),
    "mmdit_gpu": Sweep(
        "mmdit_demo_mup.yaml",
        ("model.depth=6", "model.head_dim=72"),
        {"width": (144, 288, 576, 1152), "batch": (64, 128, 256), "steps": (1000, 2000, 4000)},
        (-12, -11, -10, -9, -8, -7, -6),
        workers=3,
    ),
    # Seconds: tests that the machinery works, not that muP does.
    "tiny": Sweep(
        "mmdit_debug_mup.yaml",
        ("model.depth=1", "validation.samples=8", "optim.warmup_steps=1"),
        {"width": (32, 48, 64), "batch": (4, 8, 16), "steps": (4, 8, 12)},
        (-9, -7, -5),
        seeds=2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. value: of the axis."""

    parametrization: str
    axis: str
    value: int
    log2_lr: float
    seed: int


def jobs(sweep: Sweep, axis: str) -> Iterator[Job]:
    """All seeds one after the other, so that a sweep that was stopped is a whole one with fewer seeds."""
    for seed, parametrization in itertools.product(range(sweep.seeds), ("mup", *sweep.controls)):
        for value, lr in itertools.product(sweep.values[axis], sweep.log2_lrs):
            if parametrization == "mup" or (axis == "width" and value != sweep.values[axis][0]):
                yield Job(parametrization, axis, value, lr, seed)


def settings(sweep: Sweep, job: Job) -> list[str]:
    """A job's overrides: the base of every axis, and the job's own value of one."""
    sizes = {axis: values[0] for axis, values in sweep.values.items()} | {job.axis: job.value}
    return [
        *_SHORT, *sweep.overrides,
        *(f"{_AXES[axis]}={value}" for axis, value in sizes.items()),
        f"mup.base_width={sweep.values['width'][0]}", f"mup.parametrization={job.parametrization}",
        f"{sweep.swept}={2.0**job.log2_lr}", f"train.seed={job.seed}",
        f"train.validate_every={sizes['steps']}", f"train.log_every={max(1, sizes['steps'] // 10)}",
    ]  # fmt: skip


def run_job(sweep: Sweep, job: Job) -> dict[str, Any]:
    """Train it; {**job, loss (None where it is not finite), seconds}."""
    began = time.perf_counter()
    with trained(load_config(sweep.config, settings(sweep, job))) as (folder, _):
        loss = read_metrics(folder)[-1]["val_loss_ema"]
    seconds = round(time.perf_counter() - began, 1)
    return {**dataclasses.asdict(job), "loss": loss if math.isfinite(loss) else None, "seconds": seconds}


def run_all(sweep: Sweep, axis: str, folder: Path, deadline: float, workers: int) -> list[dict[str, Any]]:
    """Results of the jobs that are done when the time is over, those of earlier calls among them."""
    with worker_pool(workers) as pool:
        work = functools.partial(run_job, sweep)
        results = run_jobs(pool, workers, list(jobs(sweep, axis)), work, folder / "results.jsonl", deadline)
    return [r for r in results if r["axis"] == axis]


def judge(sweep: Sweep, axis: str, results: list[dict[str, Any]]) -> dict[str, Transfer]:
    """Statistics by parametrization, of the seeds that are complete."""
    wanted = list(jobs(sweep, axis))
    have = {(r["parametrization"], r["value"], r["log2_lr"], r["seed"]): r["loss"] for r in results}
    seeds = [s for s in range(sweep.seeds)
             if all((j.parametrization, j.value, j.log2_lr, s) in have for j in wanted if j.seed == s)]  # fmt: skip
    if not seeds:
        return {}
    base = sweep.values[axis][0]

    def losses(parametrization: str, value: int, lr: float) -> list[float]:
        kind = "mup" if value == base else parametrization
        found = [have[kind, value, lr, seed] for seed in seeds]
        return [math.inf if loss is None else loss for loss in found]

    def swept(kind: str, power: float = 0.0) -> Transfer:
        def base_rate(value: int, lr: float) -> float:
            return lr - power * math.log2(value / base) if power else lr

        values = sweep.values[axis]
        return transfer({v: {base_rate(v, lr): losses(kind, v, lr) for lr in sweep.log2_lrs} for v in values})

    kinds = sorted({job.parametrization for job in wanted})
    wrong = sweep.wrong if axis == "width" else {}
    return {**{kind: swept(kind) for kind in kinds}, **{name: swept("mup", power) for name, power in wrong.items()}}


def verdict(found: dict[str, Transfer]) -> dict[str, bool]:
    """What the transfer study must show."""
    mup, wrong = found["mup"], [kind for kind in _WRONG if kind in found]
    checks = {
        f"muP: shift within ±{LARGEST_SHIFT} octave a doubling": mup.shift.low > -LARGEST_SHIFT
        and mup.shift.high < LARGEST_SHIFT,
        f"muP: interval narrower than {WIDEST_INTERVAL}": mup.shift.high - mup.shift.low < WIDEST_INTERVAL,
        "muP: larger is at least as good at every learning rate": mup.wider_at_least_as_good,
    }
    if "sp" in found:
        shift = found["sp"].shift
        checks["SP: shift differs from 0"] = not shift.low <= 0 <= shift.high
    for kind in wrong:
        shift = found[kind].shift
        checks[f"{kind}: shift beyond ±{LARGEST_SHIFT}"] = shift.high < -LARGEST_SHIFT or shift.low > LARGEST_SHIFT
    return checks


def plot(sweep: Sweep, axis: str, results: list[dict[str, Any]], found: dict[str, Transfer], path: Path) -> None:
    """As the paper's Figure 3: a panel a parametrization, a curve a width, its optimum with the interval."""
    found = {kind: statistic for kind, statistic in found.items() if kind not in sweep.wrong}  # the same curves, moved
    figure = Figure(figsize=(5.2 * len(found), 4.2), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    finite = [r["loss"] for r in results if r["loss"] is not None]
    for axes, (kind, statistic) in zip(panels, found.items(), strict=True):
        for place, value in enumerate(sweep.values[axis]):
            colour = f"C{place}"
            rows = [r for r in results if r["value"] == value and r["loss"] is not None
                    and r["parametrization"] == ("mup" if value == sweep.values[axis][0] else kind)]  # fmt: skip
            lrs = sorted({r["log2_lr"] for r in rows})
            means = [sum(v) / len(v) for v in ([r["loss"] for r in rows if r["log2_lr"] == lr] for lr in lrs)]
            axes.scatter([r["log2_lr"] for r in rows], [r["loss"] for r in rows], s=9, color=colour, alpha=0.5)
            axes.plot(lrs, means, color=colour, label=f"{axis} {value}")
            best = statistic.optima[value]
            axes.axvspan(best.low, best.high, color=colour, alpha=0.12, lw=0)
            axes.axvline(best.value, color=colour, ls="--", lw=1)
        axes.set_title(f"{TITLES.get(kind, kind)}: optimum moves {statistic.shift} octaves a doubling", fontsize=10)
        axes.set(xlabel=f"log2 of the base {sweep.swept}", ylim=(0.97 * min(finite), min(max(finite), 3 * min(finite))))
        axes.grid(True, alpha=0.25)
        axes.legend()
    panels[0].set_ylabel("val_loss_ema")
    figure.savefig(path, dpi=120, format="png")


def to_json(found: Transfer) -> dict[str, Any]:
    def plain(estimate: Estimate) -> dict[str, float]:
        return {key: round(value, 4) for key, value in dataclasses.asdict(estimate).items()}

    return {
        "log2_optimum": {str(value): plain(estimate) for value, estimate in found.optima.items()},
        "optimum_at_edge_of_the_grid": found.at_edge,
        "shift_per_doubling_octaves": plain(found.shift),
        "regret_at_largest": plain(found.regret),
        "regret_over_gain": round(found.regret.value / found.gain, 3) if found.gain > 0 else None,
        "regret_over_seed_std": round(found.regret.value / found.seed_std, 2) if found.seed_std else None,
        "gain_of_largest_over_base": round(found.gain, 5),
        "seed_std": round(found.seed_std, 6),
        "largest_rise_with_size": {str(lr): [round(x, 5) for x in pair] for lr, pair in found.wider_is_better.items()},
        "larger_at_least_as_good": found.wider_at_least_as_good,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=SWEEPS, required=True)
    parser.add_argument("--axis", choices=_AXES, default="width")
    add_study_arguments(parser)
    arguments = parser.parse_args()
    sweep, axis = SWEEPS[arguments.study], arguments.axis
    claim_folder(arguments.folder, dataclasses.asdict(sweep))
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    results = run_all(sweep, axis, arguments.folder, deadline, arguments.workers or sweep.workers)
    found = judge(sweep, axis, results)
    wanted = list(jobs(sweep, axis))
    print(f"{len(results)} of {len(wanted)} runs, {sum(r['seconds'] for r in results) / 3600:.2f} worker-hours")
    if not found:
        print("not one seed is complete: run the same command again")
        return 1
    checks = verdict(found)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    plot(sweep, axis, results, found, arguments.output.with_suffix(".png"))
    table = {kind: to_json(statistic) for kind, statistic in found.items()}
    write(arguments.output, {"sweep": dataclasses.asdict(sweep), "axis": axis, "statistics": table, "checks": checks,
                             "runs": results})  # fmt: skip
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
