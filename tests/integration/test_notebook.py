"""The notebook of first steps: every cell runs, with fewer steps than it says, and shows what it promises."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers.paths import ROOT

NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"


def test_it_is_kept_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert cells
    assert not [cell for cell in cells if cell.outputs or cell.execution_count]


@pytest.mark.slow
def test_every_cell_runs_and_the_pictures_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("configs", ".cache"):  # as in the root of the repository, of which runs/ is left alone
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "examples").mkdir()
    for variable, value in (("STEPS", "6"), ("TRIALS", "2"), ("TRIAL_STEPS", "6"), ("PYTHONPATH", str(ROOT))):
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "examples")}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    said = "".join(output.get("text", "") for output in outputs)
    assert len(pictures) == 6, "data, loss, samples, coordinate check, two of the search"
    assert "The coordinate check has passed" in said
    assert "2 complete; best: trial" in said
    assert "lr:" in (tmp_path / "runs" / "first_steps_found.yaml").read_text()
