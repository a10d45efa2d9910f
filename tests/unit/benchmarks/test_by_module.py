"""Factors by module against the best global rate: what is compared, and the judgement on losses that are known."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks.by_module import LOG2_LR, SWEEP, Job, jobs, judge, searched, settings
from trainer.config.load import load_config

pytestmark = pytest.mark.slow


def test_arms_differ_in_what_was_found(tmp_path: Path) -> None:
    found = tmp_path / "found.yaml"
    found.write_text(f"extends: {SWEEP.config}\nmup: {{factors: {{mlp: {{lr: 1.5}}, time: {{init: 2}}}}}}\n")
    keys = searched(found)
    assert keys == {"mup.factors.mlp.lr": 1.5, "mup.factors.time.init": 2.0}
    one, two = (load_config(SWEEP.config, settings(keys, Job(arm, 256, 1))) for arm in ("global", "modules"))
    assert one.optim.lr == two.optim.lr == 2**LOG2_LR, "not the target's own"
    assert two.model_copy(update={"mup": one.mup}) == one
    found.write_text(found.read_text() + "optim: {lr: 0.01}\n")
    assert searched(found)["optim.lr"] == 0.01


def test_the_gain_is_told_in_deviations_of_a_seed() -> None:
    def loss(job: Job) -> float:
        gain = {64: 0.002, 256: 0.001}[job.width] if job.arm == "modules" else 0.0
        return 0.06 + 0.0003 * (job.seed % 3) - gain

    found = judge([{**dataclasses.asdict(job), "loss": loss(job)} for job in jobs()])
    assert found["widths"]["64"]["gain"]["value"] == pytest.approx(0.002)
    assert found["widths"]["64"]["gain_over_seed_std"] == pytest.approx(0.002 / 0.000251, rel=0.01)
    assert found["gain_left_at_widest"] == pytest.approx(0.5)
