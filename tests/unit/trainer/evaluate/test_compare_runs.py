"""The table of evaluations, on results that are written here: the figures of the paper, and wrong ones."""

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from data.errors import DataError
from launch import evaluate
from trainer.evaluate.curves import first_reached

ORIGINAL = {400_000: 20.4, 800_000: 14.7, 1_200_000: 12.8, 1_600_000: 11.8, 2_000_000: 10.9, 2_400_000: 10.7,
            7_000_000: 9.6}  # fmt: skip
MUP = {400_000: 18.6, 800_000: 12.9, 1_200_000: 11.3, 1_600_000: 10.2, 2_000_000: 9.7, 2_400_000: 9.4}


def write(folder: Path, step: int, fid: float | None, suite: str = "fid50k", **more: Any) -> Path:
    file = folder / "evaluate" / suite / f"step_{step:08d}" / "results.json"
    file.parent.mkdir(parents=True)
    metrics = {"fid": {"value": fid, "standard_error": None}, "clip_score": {"value": 20 + step / 1e6,
               "standard_error": 0.125}}  # fmt: skip
    checkpoint = {"run": folder.name, "step": step, "weights": "ema", "table_hash": "0" * 64}
    file.write_text(
        json.dumps({"suite": suite, "protocol_hash": "p", "checkpoint": checkpoint, "metrics": metrics} | more)
    )
    return file


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    for name, values in (("original", ORIGINAL), ("mup", MUP)):
        for step, fid in values.items():
            write(tmp_path / name, step, fid)
    return [tmp_path / "original", tmp_path / "mup"]


def test_first_reached() -> None:
    assert first_reached({0: 4.0, 10: 2.0, 20: 3.0}, 3.0) == (5.0, True)
    assert first_reached({20: 1.0, 10: 2.0}, 1.5) == (15.0, True)
    assert first_reached({10: 2.0, 20: 1.0}, 3.0) == (10.0, False)
    assert first_reached({10: 2.0}, 2.0) == (10.0, True)
    assert first_reached({10: 2.0, 20: 1.5}, 1.0) is None
    assert first_reached({}, 1.0) is None
    assert first_reached({0: 0.0, 10: 5.0}, 4.0, lower_is_better=False) == (8.0, True)


@pytest.mark.slow
def test_table(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    output = runs[0].parent / "table"
    assert evaluate.table([*map(str, runs), "--output", str(output)]) == 0
    text = capsys.readouterr().out
    # Between 2.0 M (9.7) and 2.4 M (9.4): 9.6 at a third of the way.
    assert "fid50k fid: mup reaches the baseline's final value 9.6 at step 2133333 (interpolated): 3.28 times" in text
    assert "fid50k clip_score: mup does not reach the baseline's final value 27" in text
    lines = text.splitlines()
    assert lines[0].split() == ["step", "method", "fid", "clip_score"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["400000", "original"], ["400000", "mup"], ["800000", "original"], ["800000", "mup"]
    ]  # fmt: skip
    assert lines[2].split() == ["400000", "mup", "18.6", "*", "20.4", "±", "0.12", "*"]
    assert "| 400000 | mup | 18.6 * | 20.4 ± 0.12 * |" in (output / "table.md").read_text()
    found = json.loads((output / "table.json").read_text())
    assert found["reached"][0]["times_earlier"] == pytest.approx(7 / (32 / 15))
    assert len(found["values"]) == 2 * (len(ORIGINAL) + len(MUP))
    assert matplotlib.image.imread(output / "table.png").std() > 0.05


@pytest.mark.slow
def test_a_baseline_that_gets_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the paper's PixArt-α: it is compared from where it first was as good as at its end."""
    for name, values in (("one", {10: 38.4, 20: 35.0, 30: 36.7}), ("two", {10: 33.4, 20: 33.0, 30: 30.0})):
        for step, fid in values.items():
            write(tmp_path / name, step, fid)
    assert (
        evaluate.table([str(tmp_path / "one"), str(tmp_path / "two"), "--overwrite", "--output", str(tmp_path / "t")])
        == 0
    )
    assert "two reaches the baseline's final value 36.7 at or before step 10: at least 1.50 times" in (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_suites_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several suites in one table; runs of one folder name are told apart; one run alone has nothing to reach."""
    for parent in ("x", "y"):
        write(tmp_path / parent / "run", 10, 5.0)
    write(tmp_path / "x" / "run", 20, 4.0, suite="geneval", protocol_hash="other")
    assert (
        evaluate.table([str(tmp_path / p / "run") for p in "xy"] + ["--overwrite", "--output", str(tmp_path / "t")])
        == 0
    )
    text = capsys.readouterr().out
    assert "x/run" in text
    assert "y/run" in text
    assert "geneval fid" in text.splitlines()[0]
    assert evaluate.table([str(tmp_path / "x" / "run"), "--overwrite", "--output", str(tmp_path / "t")]) == 0


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (
            {"protocol_hash": "q"},
            r"step_00900000/results\.json cannot be compared with .*protocol q, against protocol p",
        ),
        ({"checkpoint": {}}, r"results\.json has no key 'step'"),
        ({"metrics": {"fid": {"value": float("nan"), "standard_error": None}}}, r"fid is not a finite number"),
        ({"metrics": {"fid": 3}}, r"results\.json cannot be read"),
    ],
)
def test_refused(runs: list[Path], results: dict[str, Any], message: str) -> None:
    write(runs[1], 900_000, 12.0, **results)
    with pytest.raises(DataError, match=message):
        evaluate.table([*map(str, runs), "--output", str(runs[0].parent / "table")])
    assert not (runs[0].parent / "table").exists()


@pytest.mark.slow
def test_weights_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run", 10, 5.0)
    with pytest.raises(DataError, match=r"results\.json of live weights: run .* --weights live first"):
        evaluate.table([str(tmp_path / "run"), "--weights", "live", "--overwrite", "--output", str(tmp_path / "t")])
    live = write(tmp_path / "run", 20, 7.0, checkpoint={"step": 10, "weights": "live"}).parent
    live.rename(live.with_name("step_00000010_live"))
    for weights, fid in (("ema", "5"), ("live", "7")):
        options = ["--weights", weights, "--overwrite", "--output", str(tmp_path / "t")]
        assert evaluate.table([str(tmp_path / "run"), *options]) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["10", "run", fid]
        assert f"{weights} weights" in (tmp_path / "t/table.md").read_text()


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no evaluate/SUITE"):
        evaluate.table([str(tmp_path)])
    with pytest.raises(DataError, match=r"given twice"):
        evaluate.table([str(tmp_path), str(tmp_path)])
