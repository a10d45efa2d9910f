"""Muon with fixed norms: a run that really has them, and the verdict."""

from typing import Any

import pytest
import torch

from benchmarks.fixed_norm import fix_norms, judge
from benchmarks.muon import STUDIES, Job, settings
from benchmarks.runs import trained, worker_pool
from trainer.build.engine import build_mup_table
from trainer.config.load import load_config
from trainer.run import Run


def norms_before_and_after(fixed: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Of Muon's matrices in a small run: [parameters], and how many of the other weights have moved."""
    study = STUDIES["tiny"]
    config = load_config(study.config, settings(study, Job(study.base_width, -7.0, -5.0, 0)))
    rows = build_mup_table(config).rows
    ours = [name for name, row in rows.items() if row.optimizer == "muon"]
    held: list[Run] = []
    first: dict[str, torch.Tensor] = {}

    def prepare(run: Run) -> None:
        held.append(run)
        first.update({name: shard.clone() for name, shard in run.engine.master_shards().items()})
        if fixed:
            fix_norms(config, run)

    with trained(config, prepare):
        last = held[0].engine.master_shards()
        moved = sum(not torch.equal(last[name], first[name]) for name in last.keys() - set(ours))
        before, after = (torch.stack([each[name].norm() for name in ours]) for each in (first, last))
        assert all(not torch.equal(first[name], last[name]) for name in ours)
    return before, after, moved


@pytest.mark.slow
def test_norms_stay_and_weights_move() -> None:
    with worker_pool(1) as pool:  # a study's process keeps its process group
        before, after, moved = pool.submit(norms_before_and_after, True).result()
        _, free, as_many = pool.submit(norms_before_and_after, False).result()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)
    assert not torch.allclose(free, before, rtol=1e-3)
    assert moved == as_many > 0


def test_the_change_is_seed_for_seed() -> None:
    jobs = [Job(64, -7.0, -5.0, seed) for seed in (1, 2, 3)]
    results: list[dict[str, Any]] = [{**vars(job), "loss": 0.5 + job.seed / 10} for job in jobs]
    race = {"muon_against_adamw": {"last_loss": {"adamw": [1.0, 1.0, 1.0], "muon": [0.8, 0.9, 1.0]}}}
    found = judge(results[::-1], race, jobs)
    assert found["change"] == -0.2
    assert found["interval"] == [-0.2, -0.2]
    assert found["last_loss"] == {"adamw": 1.0, "muon": 0.9, "fixed norms": 0.7}
