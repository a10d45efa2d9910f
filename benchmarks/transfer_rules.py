"""Do the rules of `search.py transfer --rules` keep the best learning rate where it is? Learning rate x batch x images.

    python -m benchmarks.transfer_rules --study dit_cpu --folder runs/rules --output docs/transfer_rules.json

One model throughout. A cell is a ratio of the batch and one of the images trained on (the duration) to the reference
run; its steps follow. In each cell the base learning rate is swept with its four values as trainer.mup.transfer_rules
moves them from the reference, and with the values as they are. The optimum in octaves of the base learning rate should
not move under a rule; without one the rule expects it to move by log2(r) / 2.
Warm-up is the same share of every run, and the live weights are judged, which have settled as the rate fell to zero: an
average's decay would belong to a number of steps too. Real data; a stopped study goes on with the same command.
Exit code 1: completed-p was not shown to hold in every cell.
"""

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.machine import write
from benchmarks.runs import add_study_arguments, claim_folder, run_jobs, trained, worker_pool
from benchmarks.transfer import LARGEST_SHIFT, to_json
from trainer.config.load import load_config
from trainer.monitor.metrics import read_metrics
from trainer.mup.transfer_rules import RULES, Rates, Rules, Size, ratio, scaled, untested
from trainer.search.statistics import Estimate, Transfer, quadratic_minimum, transfer

_SHORT = (
    "train.sample_every=0", "train.checkpoint_every=0", "run.keep_last=1", "validation.samples=128",
    "optim.schedule=linear",
)  # fmt: skip
_WARMUP = 10  # of so many parts of a run
_PANELS: tuple[Rules, ...] = ("none", "completed-p")


class Cell(NamedTuple):
    """Ratios to the reference run."""

    batch: float
    images: float

    def __str__(self) -> str:
        return f"batch x {self.batch:g}, images x {self.images:g}"


REFERENCE = Cell(1, 1)
# Each ratio with the other at 1. At a batch of one size sqrt-batch is `none`, at equal images it is completed-p.
_AXES = (REFERENCE, Cell(1 / 4, 1), Cell(2, 1), Cell(4, 1), Cell(1, 1 / 2), Cell(1, 2))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """batch, steps: of the reference run. cells: the reference first. log2_lrs: base learning rates."""

    config: str
    overrides: tuple[str, ...]
    batch: int
    steps: int
    log2_lrs: tuple[float, ...]
    cells: tuple[Cell, ...] = _AXES
    seeds: int = 3
    workers: int = 1


SWEEPS = {
    # Weight decay is 0 in the config, and nothing would be left of its rule.
    "dit_cpu": Sweep(
        "dit_cifar_mup.yaml",
        ("model.width=64", "model.depth=2", "data.resolution=16", "optim.weight_decay=0.1"),
        16,
        200,
        (-8, -7, -6, -5, -4, -3),
    ),
    # Seconds: tests that the machinery works, not that the rules do.
    "tiny": Sweep(
        "dit_debug_mup.yaml",
        ("model.width=32", "model.depth=1", "validation.samples=8", "optim.weight_decay=0.1"),
        4,
        8,
        (-9, -7, -5),
        seeds=2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. r: by which the rules move its values; 1 leaves them as they are."""

    batch: int
    steps: int
    r: float
    log2_lr: float
    seed: int


def size(sweep: Sweep, cell: Cell) -> Size:
    """Batch and steps of a cell. Width and depth are those of the reference, so any will do."""
    batch, steps = sweep.batch * cell.batch, sweep.steps * cell.images / cell.batch
    if batch % 1 or steps % 1:
        raise ValueError(f"{cell}: {batch:g} samples and {steps:g} steps are not whole numbers")
    return Size(int(batch), int(steps), width=1, depth=1, base_depth=1)


def r_of(sweep: Sweep, cell: Cell, rules: Rules) -> float:
    return ratio(rules, size(sweep, REFERENCE), size(sweep, cell))


def jobs(sweep: Sweep) -> Iterator[Job]:
    """All seeds one after the other, so that a sweep that was stopped is a whole one with fewer seeds. Rules that agree
    in a cell share its runs."""
    for seed in range(sweep.seeds):
        for cell in cells_of(sweep):
            batch, steps, *_ = size(sweep, cell)
            for r in sorted({r_of(sweep, cell, rules) for rules in RULES}):
                yield from (Job(batch, steps, r, lr, seed) for lr in sweep.log2_lrs)


def settings(sweep: Sweep, job: Job) -> list[str]:
    """A job's overrides."""
    rates = rates_of(sweep, job.log2_lr, job.r)
    return [
        *_SHORT, *sweep.overrides,
        f"train.global_batch_size={job.batch}", f"train.steps={job.steps}", f"train.seed={job.seed}",
        f"train.validate_every={job.steps}", f"train.log_every={max(1, job.steps // 10)}",
        f"optim.warmup_steps={job.steps // _WARMUP}",
        f"optim.lr={rates.lr}", f"optim.betas={list(rates.betas)}", f"optim.eps={rates.eps}",
        f"optim.weight_decay={rates.weight_decay}",
    ]  # fmt: skip


def rates_of(sweep: Sweep, log2_lr: float, r: float) -> Rates:
    """What the rules make of the config's values and a base learning rate."""
    optim = load_config(sweep.config, sweep.overrides).optim
    return scaled(Rates(2.0**log2_lr, optim.betas, optim.eps, optim.weight_decay), r)


def run_job(sweep: Sweep, job: Job) -> dict[str, Any]:
    """Train it; {**job, loss (None where it is not finite), seconds}."""
    began = time.perf_counter()
    with trained(load_config(sweep.config, settings(sweep, job))) as (folder, _):
        loss = read_metrics(folder)[-1]["val_loss"]
    seconds = round(time.perf_counter() - began, 1)
    return {**dataclasses.asdict(job), "loss": loss if math.isfinite(loss) else None, "seconds": seconds}


def run_all(sweep: Sweep, folder: Path, deadline: float, workers: int) -> list[dict[str, Any]]:
    """Results of the jobs that are done when the time is over, those of earlier calls among them."""
    with worker_pool(workers) as pool:
        return run_jobs(
            pool, workers, list(jobs(sweep)), functools.partial(run_job, sweep), folder / "results.jsonl", deadline
        )


def curves(sweep: Sweep, results: list[dict[str, Any]]) -> dict[tuple[int, int, float], dict[float, list[float]]]:
    """{(batch, steps, r): {log2 lr: loss of each seed}}, of the seeds that are complete."""
    have = {Job(*(r[field.name] for field in dataclasses.fields(Job))): r["loss"] for r in results}
    wanted = list(jobs(sweep))
    seeds = [seed for seed in range(sweep.seeds) if all(job in have for job in wanted if job.seed == seed)]
    found: dict[tuple[int, int, float], dict[float, list[float]]] = {}
    for job in (job for job in wanted if job.seed in seeds):
        loss = math.inf if have[job] is None else have[job]
        found.setdefault((job.batch, job.steps, job.r), {}).setdefault(job.log2_lr, []).append(loss)
    return found


def judge(sweep: Sweep, results: list[dict[str, Any]]) -> dict[Rules, dict[Cell, Transfer]]:
    """Statistics of each cell against the reference; {} where no seed is complete."""
    found = curves(sweep, results)
    if not found:
        return {}
    reference = found[sweep.batch, sweep.steps, 1.0]

    @functools.cache
    def against_reference(cell: Cell, r: float) -> Transfer:
        batch, steps, *_ = size(sweep, cell)
        # The reference as size 1, the cell as size 2: the shift a doubling is then the shift between the two.
        return transfer({1: reference, 2: found[batch, steps, r]})

    return {
        rules: {cell: against_reference(cell, r_of(sweep, cell, rules)) for cell in cells_of(sweep)[1:]}
        for rules in RULES
    }


def cells_of(sweep: Sweep) -> list[Cell]:
    return [Cell(*cell) for cell in sweep.cells]


def word(shift: Estimate) -> str:
    """Whether a rule keeps the optimum in its place, as far as the interval tells."""
    if shift.low > -LARGEST_SHIFT and shift.high < LARGEST_SHIFT:
        return "holds"
    return "fails" if shift.low >= LARGEST_SHIFT or shift.high <= -LARGEST_SHIFT else "open"


def best_loss(curve: dict[float, list[float]]) -> float:
    """The lowest mean over the seeds that was measured."""
    return min(statistics.fmean(losses) for losses in curve.values())


def three_points(curve: dict[float, list[float]]) -> float:
    """The optimum by the best rate and its two neighbours alone: how much a shift owes to the fit's window."""
    return quadratic_minimum(list(curve), [statistics.fmean(losses) for losses in curve.values()], window=1)


def table(
    sweep: Sweep, results: list[dict[str, Any]], found: dict[Rules, dict[Cell, Transfer]]
) -> dict[str, dict[str, Any]]:
    """{cell: {rules: figures}}."""
    losses = curves(sweep, results)

    def row(cell: Cell, rules: Rules) -> dict[str, Any]:
        statistic, r = found[rules][cell], r_of(sweep, cell, rules)
        batch, steps, *_ = size(sweep, cell)
        curve, reference = losses[batch, steps, r], losses[sweep.batch, sweep.steps, 1.0]
        best = best_loss(curve)
        figures = to_json(statistic)
        rates = rates_of(sweep, sweep.log2_lrs[0], r)
        return {
            "r": r,
            "shift_octaves": figures["shift_per_doubling_octaves"],
            "shift_by_three_points": round(three_points(curve) - three_points(reference), 4),
            "within_0.35": word(statistic.shift),
            "log2_optimum": figures["log2_optimum"]["2"],
            "at_edge_of_the_grid": 2 in statistic.at_edge,
            "best_loss": round(best, 5),
            "loss_at_the_references_optimum": round(best + statistic.regret.value, 5),
            "regret_at_the_references_optimum": figures["regret_at_largest"],
            "seed_std": figures["seed_std"],
            "outside_what_was_tested": list(untested(rules, size(sweep, REFERENCE), size(sweep, cell), rates)),
        }

    return {
        str(cell): {"steps": size(sweep, cell).steps, "expected_without_octaves": expected(sweep, cell)}
        | {rules: row(cell, rules) for rules in found}
        for cell in cells_of(sweep)[1:]
    }


def expected(sweep: Sweep, cell: Cell) -> float:
    """By how much completed-p expects the optimum to move where no rule is applied, in octaves."""
    return math.log2(r_of(sweep, cell, "completed-p")) / 2


def plot(sweep: Sweep, results: list[dict[str, Any]], found: dict[Rules, dict[Cell, Transfer]], path: Path) -> None:
    """A panel a set of rules, a curve a cell, its optimum with the interval."""
    losses = curves(sweep, results)
    figure = Figure(figsize=(5.2 * len(_PANELS), 4.2), layout="constrained")
    panels = figure.subplots(1, len(_PANELS), sharey=True, squeeze=False)[0]
    lowest = min(map(best_loss, losses.values()))
    for axes, rules in zip(panels, _PANELS, strict=True):
        for place, cell in enumerate(cells_of(sweep)):
            batch, steps, *_ = size(sweep, cell)
            curve = losses[batch, steps, r_of(sweep, cell, rules)]
            means = [statistics.fmean(values) for values in curve.values()]
            axes.plot(list(curve), means, color=f"C{place}", marker=".", label=str(cell))
            one = next(iter(found[rules].values())).optima[1] if place == 0 else found[rules][cell].optima[2]
            axes.axvspan(one.low, one.high, color=f"C{place}", alpha=0.12, lw=0)
            axes.axvline(one.value, color=f"C{place}", ls="--", lw=1)
        axes.set_title({"none": "values carried as they are"}.get(rules, f"--rules {rules}"), fontsize=10)
        axes.set(xlabel="log2 of the base learning rate", ylim=(0.95 * lowest, 3 * lowest))
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize=8)
    panels[0].set_ylabel("val_loss")
    figure.savefig(path, dpi=120, format="png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=SWEEPS, required=True)
    add_study_arguments(parser)
    arguments = parser.parse_args()
    sweep = SWEEPS[arguments.study]
    claim_folder(arguments.folder, dataclasses.asdict(sweep))
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    results = run_all(sweep, arguments.folder, deadline, arguments.workers or sweep.workers)
    found = judge(sweep, results)
    print(f"{len(results)} of {len(list(jobs(sweep)))} runs, {sum(r['seconds'] for r in results) / 3600:.2f} hours")
    if not found:
        print("not one seed is complete: run the same command again")
        return 1
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    plot(sweep, results, found, arguments.output.with_suffix(".png"))
    optimum = to_json(next(iter(found["none"].values())))["log2_optimum"]["1"]
    best = round(best_loss(curves(sweep, results)[sweep.batch, sweep.steps, 1.0]), 5)
    write(arguments.output, {"sweep": dataclasses.asdict(sweep), "log2_optimum_of_the_reference": optimum,
                             "best_loss_of_the_reference": best, "cells": table(sweep, results, found),
                             "runs": results})  # fmt: skip
    return 0 if all(word(statistic.shift) == "holds" for statistic in found["completed-p"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
