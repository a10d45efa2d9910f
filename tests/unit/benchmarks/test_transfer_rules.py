"""The study of the transfer rules: its plan, and its judgement on losses whose truth is known; one run for real."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from benchmarks.transfer_rules import (
    SWEEPS,
    Cell,
    Job,
    Sweep,
    cells_of,
    expected,
    jobs,
    judge,
    plot,
    run_all,
    settings,
    size,
    table,
    word,
)  # fmt: skip
from tests.helpers.paths import ROOT
from trainer.config.load import load_config
from trainer.search.statistics import Estimate

pytestmark = pytest.mark.slow

CPU = SWEEPS["dit_cpu"]
DOCS = ROOT / "docs"


def results(missed: float = 0.0) -> list[dict[str, Any]]:
    """Parabolas over the log2 of the learning rate that a run has, whose optimum follows its number of steps as
    completed-p expects, `missed` octaves an octave of steps aside."""
    rows = []
    for job in jobs(CPU):
        used = job.log2_lr + math.log2(job.r) / 2
        best = -5.6 - (0.5 + missed) * math.log2(job.steps / CPU.steps)
        noise = 0.0005 * ((hash(dataclasses.astuple(job)) % 7) - 3) / 3
        loss = 0.08 + 0.01 * (used - best) ** 2 + 0.02 * job.seed + noise
        rows.append({**dataclasses.asdict(job), "loss": loss, "seconds": 1.0})
    return rows


def test_every_job_once_and_the_reference_once_for_all_rules() -> None:
    planned = list(jobs(CPU))
    assert len(planned) == len(set(planned)) == CPU.seeds * len(CPU.log2_lrs) * (1 + 2 * 5)
    assert {job.r for job in planned if (job.batch, job.steps) == (CPU.batch, CPU.steps)} == {1.0}
    assert [job.seed for job in planned] == sorted(job.seed for job in planned)


def test_a_cell_has_the_images_that_it_is_named_after() -> None:
    for cell in cells_of(CPU):
        batch, steps, *_ = size(CPU, cell)
        assert (batch, batch * steps) == (CPU.batch * cell.batch, CPU.batch * CPU.steps * cell.images)
    with pytest.raises(ValueError, match="not whole numbers"):
        size(CPU, Cell(1 / 32, 1))


@pytest.mark.parametrize("study", SWEEPS)
def test_settings_move_the_four_values_and_no_other(study: str) -> None:
    """At a quarter of the batch and equal images r is 1/4: written out by hand."""
    sweep = SWEEPS[study]
    quarter = {job.r: job for job in jobs(sweep) if job.batch * 4 == sweep.batch and job.log2_lr == sweep.log2_lrs[0]}
    assert quarter.keys() == {0.25, 1.0}
    ruled, carried = (load_config(sweep.config, settings(sweep, quarter[r])) for r in (0.25, 1.0))
    assert ruled.train == carried.train
    assert ruled.train.steps == 4 * sweep.steps
    assert ruled.optim.warmup_steps == ruled.train.steps // 10
    assert (carried.optim.lr, carried.optim.betas) == (2.0 ** sweep.log2_lrs[0], (0.9, 0.95))
    assert (carried.optim.eps, carried.optim.weight_decay) == (1e-12, 0.1)
    # The rules write four significant digits.
    assert ruled.optim.lr == pytest.approx(carried.optim.lr / 2, rel=1e-3)
    assert ruled.optim.betas == (0.975, 0.9875)
    assert (ruled.optim.eps, ruled.optim.weight_decay) == (2e-12, 0.05)
    four = {key: getattr(carried.optim, key) for key in ("lr", "betas", "eps", "weight_decay")}
    assert ruled.model_copy(update={"optim": ruled.optim.model_copy(update=four)}) == carried


def test_planted_shifts_are_found() -> None:
    found = judge(CPU, results())
    for cell in cells_of(CPU)[1:]:
        assert found["completed-p"][cell].shift.value == pytest.approx(0, abs=0.1)
        assert word(found["completed-p"][cell].shift) == "holds"
        assert found["none"][cell].shift.value == pytest.approx(expected(CPU, cell), abs=0.1)
        # Of a longer run sqrt-batch says nothing; at equal images it is completed-p.
        twin = "completed-p" if cell.images == 1 else "none"
        assert found["sqrt-batch"][cell] == found[twin][cell]
    assert {str(cell): expected(CPU, cell) for cell in cells_of(CPU)[1:]} == {
        "batch x 0.25, images x 1": -1, "batch x 2, images x 1": 0.5, "batch x 4, images x 1": 1,
        "batch x 1, images x 0.5": 0.5, "batch x 1, images x 2": -0.5,
    }  # fmt: skip


def test_a_rule_that_misses_is_told() -> None:
    found = judge(CPU, results(missed=0.5))
    shift = found["completed-p"][Cell(1 / 4, 1)].shift  # four times the steps: an octave too low
    assert shift.value == pytest.approx(-1, abs=0.15)
    assert word(shift) == "fails"


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(-0.3, 0.34, "holds"), (-0.3, 0.35, "open"), (-1.0, 0.0, "open"), (0.35, 1.0, "fails"), (-1.0, -0.36, "fails")],
)
def test_word(low: float, high: float, said: str) -> None:
    assert word(Estimate((low + high) / 2, low, high)) == said


def test_a_seed_that_is_not_complete_is_left_out() -> None:
    rows = results()
    for row in rows:
        row["loss"] += 0.1 * (row["log2_lr"] < -6) * (row["seed"] == 2)  # the last seed has another optimum
    others = judge(dataclasses.replace(CPU, seeds=2), rows)
    assert judge(CPU, rows[:-1]) == others != judge(CPU, rows)
    assert judge(CPU, [row for row in rows if row["log2_lr"] != CPU.log2_lrs[0]]) == {}


def test_table_and_figure(tmp_path: Path) -> None:
    rows = results()
    rows[5]["loss"] = None  # diverged
    found = judge(CPU, rows)
    one = table(CPU, rows, found)["batch x 4, images x 1"]
    assert one["none"]["shift_by_three_points"] == pytest.approx(1, abs=0.1)
    assert one["completed-p"]["shift_by_three_points"] == pytest.approx(0, abs=0.1)
    plot(CPU, rows, found, tmp_path / "figure.png")
    assert matplotlib.image.imread(tmp_path / "figure.png").std() > 0.05
    cells = table(CPU, rows, found)
    assert "NaN" not in json.dumps(cells)
    assert "Infinity" not in json.dumps(cells)
    outside = cells["batch x 4, images x 1"]
    assert outside["sqrt-batch"]["outside_what_was_tested"] == ["beta2 would be 0.8, tested is at least 0.9"]
    assert outside["completed-p"]["outside_what_was_tested"] == []


def test_runs_are_stored_and_not_done_again(tmp_path: Path) -> None:
    sweep = SWEEPS["tiny"]
    first, second = list(jobs(sweep))[:2]
    stored = {**dataclasses.asdict(first), "loss": 1.0, "seconds": 0.5}
    (tmp_path / "results.jsonl").write_text(json.dumps(stored) + "\n")
    rows = run_all(sweep, tmp_path, deadline=0.0, workers=1)  # no time: what is started ends
    assert rows[0] == stored
    assert Job(**{field.name: rows[1][field.name] for field in dataclasses.fields(Job)}) == second
    assert 0 < rows[1]["loss"] < 10
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows) == 2


def test_the_committed_study_says_what_its_runs_say() -> None:
    """Statistics and the page's table follow from the runs that lie beside them."""
    stored = json.loads((DOCS / "transfer_rules.json").read_text())
    sweep = Sweep(**stored["sweep"])
    assert len(stored["runs"]) == len(list(jobs(sweep)))
    found = judge(sweep, stored["runs"])
    cells = table(sweep, stored["runs"], found)
    assert cells == stored["cells"]
    page = (DOCS / "transfer.md").read_text()
    for cell in cells_of(sweep)[1:]:
        carried, ruled = found["none"][cell], found["completed-p"][cell]
        both = [cells[str(cell)][rules] for rules in ("none", "completed-p")]
        near, at = ([one[key] for one in both] for key in ("shift_by_three_points", "loss_at_the_references_optimum"))
        row = (
            f"| {cell.batch:g} | {cell.images:g} | {size(sweep, cell).steps} | {expected(sweep, cell):+.1f} | "
            f"{carried.shift} | {ruled.shift} | {word(ruled.shift)} | {near[0]:+.2f} | {near[1]:+.2f} | "
            f"{at[0]:.4f} | {at[1]:.4f} |"
        )
        assert row in page, row
