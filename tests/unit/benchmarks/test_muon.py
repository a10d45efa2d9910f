"""The race of the optimizers: its bookkeeping, one run for real, and what the page says of the committed one."""

import dataclasses
import json

import pytest

from benchmarks.muon import STUDIES, Study, arms, best_rate, judge, run_job, settings, sweep
from benchmarks.runs import worker_pool
from tests.helpers.paths import ROOT
from trainer.config.load import load_config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("study", STUDIES.values(), ids=list(STUDIES))
def test_arms_differ_in_the_optimizer_alone(study: Study) -> None:
    found = arms(study, -7.0, -6.0)
    for adamw, muon in zip(found["adamw"], found["muon"], strict=True):
        one, two = (load_config(study.config, settings(study, job)) for job in (adamw, muon))
        assert (one.optim.kind, two.optim.kind) == ("adamw", "muon")
        kept = {"kind": "adamw", "muon": one.optim.muon}
        assert two.model_copy(update={"optim": two.optim.model_copy(update=kept)}) == one
    assert {job.seed for job in found["muon"]}.isdisjoint({job.seed for job in sweep(study)}), "chosen on another seed"


def test_a_run_and_the_best_of_a_sweep() -> None:
    study = STUDIES["tiny"]
    first, second = sweep(study)
    with worker_pool(1) as pool:  # a study's process keeps its process group
        one = pool.submit(run_job, study, first).result()
    other = {**dataclasses.asdict(second), "loss": one["loss"] / 2}
    diverged = {**dataclasses.asdict(dataclasses.replace(first, adamw=-3.0)), "loss": None}
    assert 0 < one["loss"] < 10
    assert best_rate([one, other, diverged], [first, second], "adamw") == second.adamw


@pytest.mark.parametrize("model", ["DiT", "MMDiT"])
def test_the_committed_race_says_what_its_runs_say(model: str) -> None:
    stored = json.loads((ROOT / "docs" / f"muon_{model.lower()}.json").read_text())
    study = Study(**stored["study"])
    found = arms(study, stored["log2_lr"]["adamw"], stored["log2_lr"]["muon"])
    verdict = judge(study, stored["runs"], found)
    assert verdict == stored["muon_against_adamw"]
    steps, time = (verdict[key] for key in ("fewer_steps", "less_time"))
    told = [f"{each['value']:.2f} [{each['low']:.2f}, {each['high']:.2f}]" for each in (steps, time)]
    seconds = [f"{verdict['step_s'][arm]:.3f} s" for arm in ("adamw", "muon")]
    assert f"| {model} | {' | '.join([*told, *seconds])} |" in (ROOT / "docs" / "transfer.md").read_text()
