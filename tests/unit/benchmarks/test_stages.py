"""The benchmark of stages: equal FLOPs, the verdict, and a small study from end to end."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.runs import run_jobs, worker_pool
from benchmarks.stages import STUDIES, Job, config_of, jobs, judge, run_job, side_by_side
from trainer.build.flops import image_flops, training_flops
from trainer.config.stages import stages_of


def test_both_arms_cost_the_same_to_half_a_step() -> None:
    staged, whole = (config_of(STUDIES["emoji_cpu"], Job(arm, 0)) for arm in ("staged", "whole"))
    assert [stage.config.data.resolution for stage in stages_of(staged)] == [16, 32]
    assert whole.data.resolution == 32
    half_a_step = 0.5 * whole.train.global_batch_size * image_flops(whole)
    assert abs(training_flops(staged) - training_flops(whole)) <= half_a_step


def results(*gains: float) -> list[dict[str, Any]]:
    losses = [(("staged", 0.25 - gain), ("whole", 0.25)) for gain in gains]
    return [{"arm": arm, "seed": seed, "loss": loss} for seed, pair in enumerate(losses) for arm, loss in pair]


def test_the_gain_is_told_with_its_interval() -> None:
    found = judge(results(0.01, 0.02, 0.03))
    assert found["gain"] == 0.02
    half = 4.303 * 0.01 / math.sqrt(3)
    assert found["interval"] == [round(0.02 - half, 5), round(0.02 + half, 5)]
    assert judge(results(0.01))["interval"] is None


@pytest.mark.slow
def test_a_small_study(tmp_path: Path) -> None:
    study = STUDIES["tiny"]
    with worker_pool(1) as pool:
        work = functools.partial(run_job, study, tmp_path)
        found = run_jobs(pool, 1, list(jobs(study))[:2], work, tmp_path / "results.jsonl", math.inf)
    assert {r["arm"] for r in found} == {"staged", "whole"}
    side_by_side([tmp_path / f"{arm}.png" for arm in ("staged", "whole")], tmp_path / "both.png")
    with Image.open(tmp_path / "both.png") as both:
        assert both.width > 64
