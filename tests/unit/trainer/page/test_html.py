"""The page as one file, before a browser sees it."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.monitor.records import METRICS, metrics_line
from trainer.page import html
from trainer.page.html import page_data, report_page
from trainer.page.run_data import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with 200 sample grids."""
    samples = tmp_path / "samples"
    samples.mkdir()
    (tmp_path / METRICS).write_bytes(metrics_line({"step": 1, "loss": 1.0, "</script><b>": 2.0}))
    Image.new("RGB", (8, 8)).save(samples / "step_00000001.png")
    for step in range(2, 201):
        (samples / f"step_{step:08d}.png").write_bytes((samples / "step_00000001.png").read_bytes())
    return tmp_path


def held_by(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_samples_of_a_long_run_are_thinned_with_both_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = RunFolder(folder).data()
    (run,) = held_by(report_page([data], [folder], {}))["sources"]
    steps = [step for step, _ in run["samples"]]
    assert (len(steps), steps[0], steps[-1]) == (60, 1, 200)
    assert max(b - a for a, b in pairwise(steps)) <= 4
    assert run["pictures"].keys() == {str(step) for step in steps}
    assert "60 of the 200 sample grids are in this file" in run["notes"]
    monkeypatch.setattr(html, "_MOST_PICTURE_BYTES", 3 * (folder / "samples" / "step_00000001.png").stat().st_size)
    (run,) = held_by(report_page([data], [folder], {}))["sources"]
    assert [step for step, _ in run["samples"]] == steps[-3:], "the newest, as far as there is room"


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("w64", "w128"):
        (tmp_path / name / "trunk").mkdir(parents=True)
    data = page_data([RunFolder(tmp_path / name / "trunk").data() for name in ("w64", "w128")])
    assert [each["name"] for each in data["sources"]] == ["w64/trunk", "w128/trunk"]
