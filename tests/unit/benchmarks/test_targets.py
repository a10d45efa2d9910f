"""The benchmark of what a model puts out: its arms, the verdict, and a small study from end to end."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.targets import ARMS, STUDIES, Job, best_rates, compared, judge, main, settings, sweeps
from trainer.config.load import load_config


def test_arms_differ_in_the_target_alone() -> None:
    study = STUDIES["emoji_cpu"]
    velocity, x, *_ = compared(study, dict.fromkeys(ARMS, -7.0))
    one, two = (load_config(study.config, settings(study, job)) for job in (velocity, x))
    assert (one.objective.predict, two.objective.predict) == ARMS
    assert two.model_copy(update={"objective": one.objective}) == one
    assert velocity.seed not in {job.seed for job in sweeps(study)}, "a rate is chosen on another seed"


def test_the_best_rate_is_of_the_sweep_and_finite() -> None:
    swept: list[tuple[str, float, float | None]] = [
        ("velocity", -8.0, 0.2), ("velocity", -7.0, None), ("x", -8.0, 0.3), ("x", -7.0, 0.2),
    ]  # fmt: skip
    results = [{**vars(Job(arm, lr, 0, False)), "val_loss_ema": loss} for arm, lr, loss in swept]
    results.append({**vars(Job("x", -6.0, 1, True)), "val_loss_ema": 0.1})
    assert best_rates(results) == {"velocity": -8.0, "x": -7.0}


def test_the_change_is_told_with_its_interval() -> None:
    def run(arm: str, seed: int, fid: float) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "compared": True, "fid": fid}

    found = judge([run("velocity", seed, 10.0) for seed in (1, 2, 3)] + [run("x", s, 10.0 - s) for s in (1, 2, 3)])
    half = 4.303 / math.sqrt(3)
    interval = [round(-2 - half, 5), round(-2 + half, 5)]
    assert found["fid"] == {"velocity": 10.0, "x": 8.0, "change": -2.0, "interval": interval}


@pytest.mark.slow
def test_a_small_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["targets", "--study", "tiny", "--folder", str(tmp_path), "--output", str(output)])
    assert main() == 0
    verdict = json.loads(output.read_text())["x_against_velocity"]
    assert {"val_loss_ema", "fid", "kid"} <= verdict.keys()
    assert len(verdict) > 5
    assert output.with_suffix(".png").is_file()
