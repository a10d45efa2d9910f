"""The convergence study's plan and judgement, on curves whose truth is known; the tiny study for real."""

import concurrent.futures
import dataclasses
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch.distributed as dist

from benchmarks import convergence, runs
from benchmarks.convergence import ARMS, STUDIES, Job, Study, arms, best_rate, judge, plot, settings, speed_up, sweeps
from tests.helpers.paths import ROOT
from trainer.config.load import load_config

pytestmark = pytest.mark.slow

CPU = STUDIES["mmdit_cpu"]
BEST = {"mup": -7.0, "sp": -9.0}


def swept() -> list[dict[str, Any]]:
    return [
        {**dataclasses.asdict(job), "loss": 0.3 + 0.01 * (job.log2_lr - BEST[job.parametrization]) ** 2, "seconds": 1.0}
        for job in sweeps(CPU)
    ]


def decay(rate: float, noise: float = 0.0, end: float = 0.0) -> dict[int, float]:
    return {step: end + math.exp(-rate * step) * (1 + noise) for step in range(0, 801, 100)}


def results(mup: float, sp_best: float, sp_default: float) -> list[dict[str, Any]]:
    """Curves that fall at these rates; keys are strings, as they come from JSON."""
    rows = swept()
    for (arm, jobs), rate in zip(arms(CPU, rows).items(), (mup, sp_best, sp_default), strict=True):
        for job in jobs:
            curve = {str(step): loss for step, loss in decay(rate, 0.01 * job.seed).items()}
            rows.append({**dataclasses.asdict(job), "loss": 0.1, "seconds": 1.0,
                         "val_loss_ema": curve, "fid": curve, "kid": curve})  # fmt: skip
            assert job.parametrization == arm[: len(job.parametrization)]
    return rows


# ------------------------------------------------------------------------------------------------------------ the plan
def test_rates_come_from_the_sweeps() -> None:
    """muP's from the narrow proxy alone; arms run on seeds that no rate was chosen on."""
    rows = swept()
    assert (best_rate(CPU, rows, "mup", 64), best_rate(CPU, rows, "sp", 256)) == (-7, -9)
    found = arms(CPU, rows)
    assert {arm: jobs[0].log2_lr for arm, jobs in found.items()} == {"mup": -7, "sp_best": -9, "sp_default": -13.3}
    assert {job.seed for jobs in found.values() for job in jobs} == {1, 2, 3}
    assert {job.seed for job in sweeps(CPU)} == {0}
    assert {job.width for jobs in found.values() for job in jobs} == {256}
    assert {job.width for job in sweeps(CPU) if job.parametrization == "mup"} == {64}
    rows[0]["loss"] = None  # diverged
    assert best_rate(CPU, rows, "mup", 64) == -7


@pytest.mark.parametrize("study", STUDIES)
def test_settings_are_configs(study: str) -> None:
    """SP differs from muP in the parametrization alone."""
    it = STUDIES[study]
    job = Job("mup", it.width, -8, 1, True)
    config = load_config(it.config, settings(it, job))
    assert (config.model.width, config.mup.base_width, config.optim.schedule) == (it.width, it.base_width, "constant")
    assert config.train.ema_snapshot_every * 8 == config.train.steps
    twin = load_config(it.config, settings(it, dataclasses.replace(job, parametrization="sp")))
    assert config.mup.parametrization == "mup"
    assert config.model_copy(update={"mup": twin.mup}) == twin
    assert config.mup.model_copy(update={"parametrization": "sp"}) == twin.mup


# ------------------------------------------------------------------------------------------------------- the judgement
def test_speed_up_of_known_curves() -> None:
    """Where one falls twice as fast, it is there in half the time; equal noise on both adds no uncertainty."""
    slow = [decay(0.002, noise) for noise in (-0.02, 0.0, 0.02)]
    fast = [decay(0.004, noise) for noise in (-0.02, 0.0, 0.02)]
    reached, times = speed_up(slow, fast)
    assert reached.exact
    assert times.value == pytest.approx(2, rel=1e-9)
    assert (times.low, times.high) == pytest.approx((2, 2), rel=0.01)
    early = [{step: measure for step, measure in curve.items() if step >= 500} for curve in fast]
    censored, times = speed_up(slow, early)  # at its first measurement already better
    assert not censored.exact
    assert (times.value, times.low, times.high) == (1.6, 1.6, math.inf)
    diverged = [{0: 1.0, 800: 2.0}] * 3
    _, times = speed_up(diverged, fast)
    assert times.value == times.low == times.high == math.inf
    _, same = speed_up(slow, slow)
    assert (same.value, same.low, same.high) == (1, 1, 1)
    never, times = speed_up(fast, slow)
    assert never.step is None
    assert (times.value, times.low, times.high) == (0, 0, 0)


def test_interval_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With three seeds, of which each arm's noise is its own."""
    monkeypatch.setattr(convergence, "REPLICATES", 300)
    chance = random.Random(0)
    covered = 0
    for _ in range(40):
        slow = [decay(0.002 * (1 + chance.gauss(0, 0.03))) for _ in range(3)]
        fast = [decay(0.004 * (1 + chance.gauss(0, 0.03))) for _ in range(3)]
        _, times = speed_up(slow, fast)
        covered += times.low <= 2 <= times.high
    assert covered >= 36  # without the widening to t 32


def test_judgement_and_figure(tmp_path: Path) -> None:
    rows = results(mup=0.004, sp_best=0.002, sp_default=0.0001)
    found = judge(CPU, rows)
    assert found["log2_lr"] == {"mup": -7, "sp_best": -9, "sp_default": -13.3}
    assert found["at_edge_of_the_sweep"] == []
    assert found["mup_against"]["sp_best"]["fid"]["times_earlier"]["value"] == pytest.approx(2, rel=0.01)
    assert found["mup_against"]["sp_best"]["fid"]["text"].startswith("μP reaches the baseline's final value")
    default = found["mup_against"]["sp_default"]["val_loss_ema"]
    assert default["times_earlier"]["value"] > 20
    cut = [{**r, "fid": {k: v for k, v in r["fid"].items() if r["parametrization"] == "sp" or int(k) >= 200}}
           if r["compared"] else r for r in rows]  # fmt: skip
    found = judge(CPU, cut)
    assert found["mup_against"]["sp_default"]["fid"]["times_earlier"] == {"value": 4, "low": 4, "high": None}
    plot(CPU, cut, found, tmp_path / "figure.png")
    # A control that ends without a figure is not compared, and does not end the study; what muP lacks is not reached.
    diverged = [{**r, "fid": {} if r["parametrization"] == "sp" or r["seed"] == 1 else r["fid"]} if r["compared"] else r
                for r in rows]  # fmt: skip
    found = judge(CPU, diverged)
    assert found["mup_against"]["sp_best"]["fid"] == {
        "times_earlier": None, "text": "no comparison: a run of sp_best has no fid at its end",
    }  # fmt: skip
    assert found["mup_against"]["sp_best"]["kid"]["times_earlier"]["value"] == pytest.approx(2, rel=0.01)
    plot(CPU, diverged, found, tmp_path / "figure.png")
    early = [{**r, "kid": {"75": 1.0}} if r["compared"] and r["parametrization"] == "sp" and r["seed"] == 2 else r
             for r in rows]  # fmt: skip
    assert judge(CPU, early)["mup_against"]["sp_default"]["kid"]["times_earlier"] is None, "its end is not step 75"
    without = [{**r, "fid": {}} if r["compared"] and r["parametrization"] == "mup" else r for r in rows]
    assert judge(CPU, without)["mup_against"]["sp_best"]["fid"]["step"] is None
    worse = judge(CPU, results(mup=0.002, sp_best=0.004, sp_default=0.0001))["mup_against"]["sp_best"]["val_loss_ema"]
    assert (worse["step"], worse["times_earlier"]["value"]) == (None, 0)
    plot(CPU, rows, found, tmp_path / "figure.png")
    assert matplotlib.image.imread(tmp_path / "figure.png").std() > 0.05
    json.dumps(found, allow_nan=False)
    lowest = [{**r, "loss": 0.1} if r["log2_lr"] == CPU.default_log2_lr else r for r in rows]
    assert best_rate(CPU, lowest, "sp", 256) == CPU.default_log2_lr
    assert judge(CPU, [*lowest, *({**r, "log2_lr": -13.3} for r in rows if r["compared"])])[
        "at_edge_of_the_sweep"] == ["sp_best"]  # fmt: skip


NAMES = {"val_loss_ema": "loss", "fid": "FID", "kid": "KID"}


def test_the_committed_study_says_what_its_runs_say() -> None:
    """Judgement and the page's table follow from the runs that lie beside them."""
    docs = ROOT / "docs"
    stored = json.loads((docs / "convergence_mmdit.json").read_text())
    study = Study(**stored["study"])
    found = judge(study, stored["runs"])
    assert found == {key: stored[key] for key in found}
    assert found["at_edge_of_the_sweep"] == []
    assert len([r for r in stored["runs"] if r["compared"]]) == 3 * study.seeds
    page = (docs / "convergence.md").read_text()
    for control, measures in found["mup_against"].items():
        for measure, against in measures.items():
            times = [against["times_earlier"][key] for key in ("value", "low", "high")]
            value, low, high = ("∞" if time is None else f"{time:.2f}" for time in times)
            least, at_most = ("", "") if against["exact"] else ("≥ ", "≤ ")
            row = (
                f"| {ARMS[control]} | 2^{found['log2_lr'][control]:g} | {NAMES[measure]} | {against['value']:.4g} | "
                f"{at_most}{against['step']:.0f} | {least}{value} [{low}, {high}] |"
            )
            assert row in page, row


# ---------------------------------------------------------------------------------------------------------- real runs
class Inline(concurrent.futures.Executor):
    """Runs in this process: one of their own would import torch first."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except RuntimeError as error:
            future.set_exception(error)
        return future


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(convergence, "worker_pool", Inline)
    yield
    if runs._world is not None:
        dist.destroy_process_group()
    runs._world = None


@pytest.mark.usefixtures("in_this_process")
def test_tiny_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that a signal stops is not stored; the same command again goes on after a cut line, and then does nothing
    anew."""
    file = tmp_path / "results.jsonl"
    command = ["convergence", "--study", "tiny", "--folder", str(tmp_path), "--output", str(tmp_path / "study.json")]
    monkeypatch.setattr(sys, "argv", command)
    real = runs.train
    monkeypatch.setattr(runs, "train", lambda run: "preempted")
    with pytest.raises(RuntimeError, match="a run ended as preempted"):
        convergence.main()
    assert file.read_text() == ""
    monkeypatch.setattr(runs, "train", real)
    monkeypatch.setattr(sys, "argv", [*command, "--budget-minutes", "0"])
    assert convergence.main() == 1
    assert len(file.read_text().splitlines()) == 1
    file.write_text(file.read_text() + '{"cut": ')
    monkeypatch.setattr(sys, "argv", command)
    assert convergence.main() == 0
    stored = file.read_text()
    study = STUDIES["tiny"]
    assert len(stored.splitlines()) == len(sweeps(study)) + 3 * study.seeds
    assert convergence.main() == 0
    assert file.read_text() == stored
    capsys.readouterr()
    monkeypatch.setitem(STUDIES, "other", dataclasses.replace(study, steps=16))
    monkeypatch.setattr(sys, "argv", [word if word != "tiny" else "other" for word in command])
    with pytest.raises(SystemExit, match=r"holds runs of another study \(steps differ\)"):
        convergence.main()
    found = json.loads((tmp_path / "study.json").read_text())
    assert found["mup_against"]["sp_default"]["val_loss_ema"]["times_earlier"]["value"] > 1
    compared = [r for r in found["runs"] if r["compared"]]
    assert all(list(r["fid"]) == ["8"] and len(r["val_loss_ema"]) == 9 for r in compared)
    assert all(r["val_loss_ema"]["8"] == r["loss"] < r["val_loss_ema"]["0"] for r in compared)
    assert matplotlib.image.imread(tmp_path / "study.png").std() > 0.05
