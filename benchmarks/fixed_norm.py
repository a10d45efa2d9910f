"""Is Muon better with the norm of each matrix fixed, as MuonH has it? Beside the race of benchmarks.muon.

    python -m benchmarks.fixed_norm --race docs/muon_mmdit.json --folder runs/fixed_norm --output docs/fixed_norm.json

After each step every matrix of Muon is scaled back to its Frobenius norm at initialization, so that weight decay has
nothing left to do. All else is the race's: data, steps, seeds, AdamW's rate for the other weights. The rate is swept at
the base width on the race's seed for it; then the wide model is trained on the seeds of the race, and its last loss is
compared with that of Muon, seed for seed. Every finished run is stored in FOLDER/results.jsonl.
"""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.convergence import mean_and_interval
from benchmarks.machine import write
from benchmarks.muon import LOSS, Job, Study, arms, best_rate, settings, sweep
from benchmarks.runs import add_study_arguments, claim_folder, run_jobs, trained, worker_pool
from trainer.build.engine import build_mup_table
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.monitor.metrics import read_metrics
from trainer.parallel.engine import StepResult, Watch
from trainer.run import Run


def fix_norms(config: TrainConfig, run: Run) -> None:
    """Let every step of the run end with Muon's matrices at the norms that they have now; in one process, in fp32."""
    rows, weights = build_mup_table(config).rows, run.engine.master_shards()
    names = [name for name, row in rows.items() if row.optimizer == "muon"]

    def matrices(name: str) -> Tensor:
        """Those of one parameter, [matrices, rows, columns], which share its memory."""
        return weights[name].view(rows[name].matrices, -1, weights[name].shape[-1])

    def norms(name: str) -> Tensor:
        return torch.linalg.matrix_norm(matrices(name), keepdim=True)

    first, step = {name: norms(name) for name in names}, run.engine.step
    assert all(norm.min() > 0 for norm in first.values()), "a matrix that begins as zeros has no norm to keep"

    def step_and_scale(lr: float, watch: Watch | None = None, max_norm: Tensor | None = None) -> StepResult:
        result = step(lr, watch, max_norm)
        with torch.no_grad():
            for name in names:
                matrices(name).mul_(first[name] / norms(name))
        return result

    run.engine.step = step_and_scale


def run_job(study: Study, job: Job) -> dict[str, Any]:
    """Train it; {**job, loss: the last one, None where it is not finite}."""
    config = load_config(study.config, settings(study, job))
    with trained(config, functools.partial(fix_norms, config)) as (folder, _):
        loss = read_metrics(folder)[-1][LOSS]
    return {**dataclasses.asdict(job), "loss": loss if math.isfinite(loss) else None}


def judge(results: Sequence[dict[str, Any]], race: dict[str, Any], jobs: Sequence[Job]) -> dict[str, Any]:
    """What fixed norms add to Muon's last loss, seed for seed, with a 95 % interval, beside Muon's and AdamW's loss."""
    fixed = [r["loss"] for job in jobs for r in results if dataclasses.asdict(job).items() <= r.items()]
    ends = race["muon_against_adamw"]["last_loss"]
    change, interval = mean_and_interval([a - b for a, b in zip(fixed, ends["muon"], strict=True)])
    means = {arm: round(statistics.fmean(losses), 5) for arm, losses in {**ends, "fixed norms": fixed}.items()}
    return {"last_loss": means, "change": change, "interval": interval}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--race", type=Path, required=True, help="JSON of benchmarks.muon")
    add_study_arguments(parser)
    arguments = parser.parse_args()
    race = json.loads(arguments.race.read_text())
    study, adamw = Study(**race["study"]), race["log2_lr"]["adamw"]
    claim_folder(arguments.folder, dataclasses.asdict(study))
    workers, swept = arguments.workers or study.workers, sweep(study, adamw)
    with worker_pool(workers) as pool:
        go_on = functools.partial(
            run_jobs, pool, workers, work=functools.partial(run_job, study), file=arguments.folder / "results.jsonl",
            deadline=time.monotonic() + 60 * arguments.budget_minutes,
        )  # fmt: skip
        rate = best_rate(go_on(swept), swept, "muon")
        jobs = arms(study, adamw, rate)["muon"]
        results = go_on(jobs)
    verdict = judge(results, race, jobs)
    write(arguments.output, {"race": arguments.race.name, "log2_lr": rate, "fixed_against_muon": verdict,
                             "runs": results})  # fmt: skip
    print(verdict)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
