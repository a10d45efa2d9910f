"""How many trials are enough, on a study whose losses are made up."""

import json
import random
import sys
from pathlib import Path

import pytest

from benchmarks import search_budget
from benchmarks.search_budget import enough, row
from tests.helpers.studies import fill, search
from trainer.search.report import completed
from trainer.search.space import Point
from trainer.search.study import Study


def test_enough_is_from_where_on_all_agree() -> None:
    rows = [
        {"trials": n, "fit_within": w, "best_within": 0.0 if n < 40 else 1.0}
        for n, w in ((10, 0.95), (20, 0.5), (30, 0.92), (40, 1.0))
    ]
    assert enough(rows, "fit") == 30
    assert enough(rows, "best") == 40


@pytest.mark.slow
def test_a_planted_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The more of the trials, the more subsets agree with all of them; all of them agree."""
    chance = random.Random(0)

    def loss(point: Point) -> float | None:
        lr = float(point["optim.lr"] or 0)
        return None if lr > 0.04 else 0.2 + 0.1 * (lr / 0.01 - 1) ** 2 * (0.01 / lr) ** 0.5 + chance.gauss(0, 0.003)

    study = Study.open(search(tmp_path, trials=40, space={"optim.lr": {"log_uniform": [1e-3, 1e-1]}}))
    fill(study, loss)
    ended = [trial for trial in study.trials() if trial.state in ("complete", "diverged")]
    assert {trial.state for trial in ended} == {"complete", "diverged"}
    few, half, whole = (row(study, ended, completed(study), size, 50, 0.1) for size in (5, 20, 40))
    assert few["fit_within"] < half["fit_within"] < 1.0 == whole["fit_within"]
    assert few["best_within"] < half["best_within"] < 1.0 == whole["best_within"]
    assert few["by_the_fit"] < half["by_the_fit"] <= 1.0

    output = tmp_path / "budget.json"
    arguments = ["search_budget", "--study", str(study.folder), "--draws", "20", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert search_budget.main() == 0
    written = json.loads(output.read_text())
    assert [r["trials"] for r in written["rows"]] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert 5 < written["enough"]["fit"] <= 40
    assert len(written["trials"]) == 40
