"""The transfer study's bookkeeping and judgement, on losses whose truth is known; one run for real."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from benchmarks.transfer import SWEEPS, TITLES, Job, Sweep, jobs, judge, plot, run_all, settings, to_json, verdict
from tests.helpers.paths import ROOT
from trainer.config.load import load_config

pytestmark = pytest.mark.slow

CPU = SWEEPS["mmdit_cpu"]
DOCS = ROOT / "docs"


def results(shift: dict[str, float], better: float = 0.05) -> list[dict[str, Any]]:
    """Parabolas whose optimum moves by `shift` octaves a doubling, by parametrization."""
    rows = []
    for job in jobs(CPU, "width"):
        doublings = CPU.values["width"].index(job.value)
        off = job.log2_lr + 7.5 - shift[job.parametrization] * doublings
        noise = 0.001 * ((hash(dataclasses.astuple(job)[2:]) % 7) - 3) / 3
        loss = 0.3 - better * doublings + 0.01 * off**2 + 0.02 * job.seed + noise
        rows.append({**dataclasses.asdict(job), "loss": loss, "seconds": 1.0})
    return rows


def test_every_job_once_and_the_base_width_once_for_both() -> None:
    planned = list(jobs(CPU, "width"))
    assert len(planned) == len(set(planned)) == 3 * 6 * (3 + 2)
    assert not any(job.parametrization == "sp" and job.value == 64 for job in planned)
    assert [job.seed for job in planned] == sorted(job.seed for job in planned)
    assert {job.parametrization for job in jobs(CPU, "batch")} == {"mup"}


@pytest.mark.parametrize("study", SWEEPS)
@pytest.mark.parametrize("axis", ["width", "batch", "steps"])
def test_settings_are_configs(study: str, axis: str) -> None:
    """SP differs from muP in the parametrization alone: equal weights at the base width."""
    sweep = SWEEPS[study]
    job = list(jobs(sweep, axis))[-1]
    config = load_config(sweep.config, settings(sweep, job))
    assert config.mup.base_width == sweep.values["width"][0]
    assert config.mup.parametrization == ("sp" if axis == "width" and "sp" in sweep.controls else "mup")
    assert config.train.validate_every == config.train.steps
    assert getattr({"width": config.model, "batch": config.train, "steps": config.train}[axis],
                   {"width": "width", "batch": "global_batch_size", "steps": "steps"}[axis]) == job.value  # fmt: skip
    twin = load_config(sweep.config, settings(sweep, dataclasses.replace(job, parametrization="mup")))
    assert config.model_copy(update={"mup": twin.mup}) == twin
    assert (config.optim.kind == "muon") == study.endswith("muon")


def test_rules_that_are_wrong_for_muon_are_told_from_its_own() -> None:
    """The same runs at other base rates: an octave a doubling for lr / m, half of one for equal rms."""
    sweep = dataclasses.replace(CPU, controls=(), wrong=SWEEPS["dit_muon"].wrong)
    rows = [row for row in results({"mup": 0.0, "sp": 0.0}) if row["parametrization"] == "mup"]
    found = judge(sweep, "width", rows)
    shifts = {kind: round(statistic.shift.value, 1) for kind, statistic in found.items()}
    assert shifts["lr / m"] - shifts["mup"] == pytest.approx(1, abs=0.11)
    assert shifts["equal rms"] - shifts["mup"] == pytest.approx(-0.5, abs=0.11)
    assert all(verdict(found).values())
    right = dataclasses.replace(sweep, wrong={"lr / m": 0.1})
    assert not verdict(judge(right, "width", rows))["lr / m: shift beyond ±0.35"]


def test_judgement() -> None:
    good = judge(CPU, "width", results({"mup": 0.0, "sp": -1.0}))
    assert good["mup"].shift.value == pytest.approx(0, abs=0.1)
    assert good["sp"].shift.value == pytest.approx(-1, abs=0.1)
    assert all(verdict(good).values())
    shifted = verdict(judge(CPU, "width", results({"mup": -0.5, "sp": -1.0})))
    assert not shifted["muP: shift within ±0.35 octave a doubling"]
    blind = verdict(judge(CPU, "width", results({"mup": 0.0, "sp": 0.0})))
    assert not blind["SP: shift differs from 0"]
    worse = verdict(judge(CPU, "width", results({"mup": 0.0, "sp": -1.0}, better=-0.05)))
    assert not worse["muP: larger is at least as good at every learning rate"]


def test_a_seed_that_is_not_complete_is_left_out() -> None:
    rows = results({"mup": 0.0, "sp": -1.0})
    assert judge(CPU, "width", rows[:-1]).keys() == {"mup", "sp"}
    assert judge(CPU, "width", [r for r in rows if r["log2_lr"] != -5]) == {}


def test_figure_and_json(tmp_path: Path) -> None:
    rows = results({"mup": 0.0, "sp": -1.0})
    rows[5]["loss"] = None  # diverged
    found = judge(CPU, "width", rows)
    plot(CPU, "width", rows, found, tmp_path / "figure.png")
    assert matplotlib.image.imread(tmp_path / "figure.png").std() > 0.05
    text = json.dumps({kind: to_json(statistic) for kind, statistic in found.items()})
    assert "NaN" not in text
    assert "Infinity" not in text


def test_runs_are_stored_and_not_done_again(tmp_path: Path) -> None:
    sweep = SWEEPS["tiny"]
    first, second = list(jobs(sweep, "width"))[:2]
    stored = {**dataclasses.asdict(first), "loss": 1.0, "seconds": 0.5}
    (tmp_path / "results.jsonl").write_text(json.dumps(stored) + "\n")
    rows = run_all(sweep, "width", tmp_path, deadline=0.0, workers=1)  # no time: what is started ends
    assert rows[0] == stored
    assert Job(**{field.name: rows[1][field.name] for field in dataclasses.fields(Job)}) == second
    assert 0 < rows[1]["loss"] < 10
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows) == 2


@pytest.mark.parametrize(
    ("study", "name"),
    [("mmdit", "MMDiT"), ("dit", "DiT"), ("muon_dit", "DiT, Muon"), ("muon_mmdit", "MMDiT, Muon")],
)
def test_the_committed_study_says_what_its_runs_say(study: str, name: str) -> None:
    """Statistics, verdict and the page's table follow from the runs that lie beside them."""
    stored = json.loads((DOCS / f"transfer_{study}.json").read_text())
    sweep = Sweep(**stored["sweep"])
    seeds = {run["seed"] for run in stored["runs"]}  # a study that was stopped is a whole one with fewer seeds
    assert len(stored["runs"]) == sum(job.seed in seeds for job in jobs(sweep, "width"))
    found = judge(sweep, "width", stored["runs"])
    assert {kind: to_json(statistic) for kind, statistic in found.items()} == stored["statistics"]
    assert verdict(found) == stored["checks"]
    page = (DOCS / "transfer.md").read_text()
    for kind, statistic in found.items():
        optima = " | ".join(f"{estimate.value:.2f}" for estimate in statistic.optima.values())
        end = f"{statistic.regret.value:.4f} | {'yes' if statistic.wider_at_least_as_good else 'no'} |"
        row = f"| {name} | {TITLES.get(kind, kind)} | {optima} | {statistic.shift} | {end}"
        assert row in page, row
