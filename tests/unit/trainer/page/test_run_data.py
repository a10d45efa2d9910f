"""What a page shows of a run folder: what the folder has, without secrets, and a word where something is missing."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.errors import DataError
from tests.helpers.paths import ROOT
from trainer.checkpoint.meta import seal
from trainer.monitor.records import METRICS, metrics_line, read_metrics, write_status
from trainer.page.panels import panels
from trainer.page.run_data import RunFolder, read_prompts, read_sample

REAL = ROOT / "tests" / "integration" / "run_of_0db30ff"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that was trained, as an older version has left it."""
    return Path(shutil.copytree(REAL, tmp_path / "run"))


def kinds(data: dict[str, Any]) -> list[tuple[int, str]]:
    return [(event["step"], event["kind"]) for event in data["events"]]


def test_a_real_run(folder: Path) -> None:
    data = RunFolder(folder).data()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    records = read_metrics(folder)
    for key in ("loss", "val_loss_ema", "mup/hidden/update_to_weight", "val_loss_ema_t0.0625"):
        expected = [(r["step"], pytest.approx(r[key], rel=1e-5)) for r in records if key in r]
        assert list(zip(data["curves"][key]["x"], data["curves"][key]["y"], strict=True)) == expected, key
    assert (data["state"], data["step"], data["steps"], data["problem"], data["notes"]) == ("finished", 4, 4, "", [])
    assert data["config"]["model.width"] == "16"
    assert kinds(data) == [(4, "finished"), (4, "save")]
    assert data["holes"] == [{"step": 4, "read": 32, "holes": {}}]


def test_every_figure_of_a_run_has_its_panel() -> None:
    keys = {key for record in read_metrics(REAL) for key in record} - {"step", "samples_seen", "val_set"}
    keys -= {key for key in keys if key.endswith("_slowest_rank")}
    found = panels([*keys, "val_fid", "new/figure", "mfu"])
    in_panels = {line["key"]: panel for panel in found for line in panel["lines"]}
    assert keys <= in_panels.keys()
    assert in_panels["val_fid"]["title"] == "fid"
    unplaced = {key for key, panel in in_panels.items() if panel["title"] == key}
    assert unplaced == {"new/figure"}
    assert [line["label"] for line in in_panels["mup/input/weight_norm"]["lines"]] == [
        "fixed", "hidden", "input", "output", "vector"
    ]  # fmt: skip


def test_a_run_with_stages_rollbacks_holes_and_other_samples(folder: Path) -> None:
    at = [0, 10, 20, 30]
    lines = [{"step": s, "samples_seen": 8 * s, "stage": f"stage {s // 20 + 1}", "val_loss_ema": 1.0 + s,
              "val_set": "ab"[s // 20], "perf/forward_median_s": 1.0, "perf/forward_max_s": 1.0 + s,
              "perf/forward_slowest_rank": 3} for s in at]  # fmt: skip
    (folder / METRICS).write_bytes(b"".join(map(metrics_line, [*lines, {"step": 40, "loss": float("nan")}])))
    jumps = [{"at_step": 20, "steps": 7, "reason": "5 steps in a row were skipped"}]
    (folder / "jumps.json").write_text(json.dumps(jumps))
    write_status(folder, "failed", 40, "loss is not finite")
    old = folder / "checkpoints" / "step_00000004"
    meta = json.loads((old / "meta.json").read_text())
    reads = [[{"image: truncated": 3, "caption: none": 1}, 160], [{"image: truncated": 2}, 160]]
    new = Path(shutil.copytree(old, folder / "checkpoints" / "step_00000040"))
    (new / "meta.json").write_text(seal({**meta, "step": 40, "reads": reads}))
    shutil.copytree(old, folder / "checkpoints" / "step_00000050.corrupt")
    data = RunFolder(folder).data()
    assert data["curves"]["val_loss_ema"] == {"x": [0, 10, 20, 20, 30], "y": [1.0, 11.0, None, 21.0, 31.0]}
    assert data["curves"]["loss"] == {"x": [40], "y": [None]}
    assert [stage["step"] for stage in data["stages"]] == [0, 20]
    assert data["slowest"] == {"perf/forward": [[3, 3]]}, "not at step 0, where it was no slower than the median"
    assert data["holes"][-1] == {"step": 40, "read": 320, "holes": {"image: truncated": 5, "caption: none": 1}}
    assert set(kinds(data)) == {(50, "set aside"), (40, "failed"), (40, "save"), (40, "not finite"), (20, "rollback"),
                                (20, "stage"), (4, "save"), (0, "stage")}  # fmt: skip


def test_the_band_is_that_of_the_forecast_or_of_the_validations(folder: Path) -> None:
    lines = [{"step": s, "forecast/loss": 1.0, "forecast/low": 0.9, "forecast/high": 1.1} for s in (1, 2)]
    (folder / METRICS).write_bytes(b"".join(map(metrics_line, lines)))
    assert RunFolder(folder).data()["band"] == [[1, 1.0, 0.9, 1.1], [2, 1.0, 0.9, 1.1]]
    not_finite = [{**lines[1], "step": s, name: float(figure)} for s, name, figure in (
        (3, "forecast/loss", "nan"), (4, "forecast/low", "nan"), (5, "forecast/high", "inf"))]  # fmt: skip
    (folder / METRICS).write_bytes(b"".join(map(metrics_line, [*lines, *not_finite])))
    assert [row[0] for row in RunFolder(folder).data()["band"]] == [1, 2]
    course = [[1, 1.0, 0.9, 1.1], [100, 0.5, 0.4, 0.6]]
    forecast = {"course": course, "refused": False, "reasons": [], "target": {}, "optimal_parameters": None,
                "optimal_images": None, "fingerprints": {}}  # fmt: skip
    (folder / "forecast.json").write_text(json.dumps(forecast))
    assert RunFolder(folder).data()["band"] == course
    (folder / "forecast.json").write_text(json.dumps({**forecast, "course": "none"}))
    data = RunFolder(folder).data()
    assert len(data["band"]) == 2
    assert any("forecast.json" in note for note in data["notes"])


def test_no_secret_leaves_the_folder(folder: Path) -> None:
    with (folder / "config.yaml").open("a") as file:
        file.write(
            "storage:\n  password: hunter2\n  url: s3://me:hunter2@store/shards\n  list: ['hf_" + "a" * 30 + "']\n"
        )
        file.write("  signed: https://store/a.tar?X-Amz-Signature=hunter2&part=1\n  nested: [{api_key: hunter2}]\n")
    write_status(folder, "failed", 4, "cannot read https://me:hunter2@store/a.tar")
    (folder / "jumps.json").write_text(json.dumps([{"at_step": 1, "steps": 1, "reason": "token=x secret=hunter2"}]))
    data = RunFolder(folder).data()
    text = json.dumps(data)
    assert "hunter2" not in text
    assert "a" * 30 not in text
    assert data["config"]["storage.url"] == "s3://***@store/shards"
    assert data["config"]["storage.password"] == "***"


def test_samples_are_read_in_their_folder_alone(folder: Path) -> None:
    samples = folder / "samples"
    samples.mkdir()
    Image.new("RGB", (8, 8), "red").save(samples / "step_00000010.png")
    Image.new("RGB", (8, 8), "blue").save(folder / "elsewhere.png")
    (samples / "step_00000020.png").symlink_to(folder / "elsewhere.png")
    (samples / "step_00000030.png").write_text("no picture")
    os.mkfifo(samples / "step_00000040.png")
    (samples / "prompts.txt").write_text("a cat\na <b>dog</b>\n")
    data = RunFolder(folder).data()
    assert [step for step, _ in data["samples"]] == [10, 30]
    assert data["prompts"] == ["a cat", "a <b>dog</b>"]
    assert read_sample(folder, 10).startswith(b"\x89PNG")
    for step in (20, 30, 40):
        with pytest.raises(DataError):
            read_sample(folder, step)
    with pytest.raises(OSError, match="No such file"):
        read_sample(folder, 50)
    samples.rename(folder / "away")
    samples.symlink_to(folder / "away")
    assert RunFolder(folder).data()["samples"] == read_prompts(folder) == []
    with pytest.raises(DataError, match="link"):
        read_sample(folder, 10)


def test_a_word_where_there_is_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert "There is no folder" in run.data()["problem"]
    (tmp_path / "run").mkdir()
    assert "holds no run" in run.data()["problem"]
    (tmp_path / "run" / "config.yaml").write_text("train: {steps: 10}\n")
    assert "logged nothing yet" in run.data()["problem"]
    before = run.stamp()
    (tmp_path / "run" / METRICS).write_bytes(metrics_line({"step": 1, "loss": 1.0}))
    assert run.stamp() != before
    assert run.data()["problem"] == ""


META = "checkpoints/step_00000004/meta.json"
GARBAGE = [
    b"",
    b"\0" * 100,
    b"\xff" * 100,
    b"[" * 5_000,
    b"{}",
    b"[1]",
    b'{"step": "x"}',
    b"a: &a [*a, *a]\n",
    b"9" * 5000,
    b'[{"at_step": 1, "steps": Infinity, "reason": ""}]',
]


@pytest.mark.parametrize("content", GARBAGE, ids=lambda content: repr(content[:12]))
def test_garbage_in_every_file_is_no_traceback(folder: Path, content: bytes) -> None:
    for name in (
        "config.yaml",
        "status.json",
        "jumps.json",
        "forecast.json",
        METRICS,
        META,
    ):
        (folder / name).write_bytes(content)
    data = RunFolder(folder).data()
    json.dumps(data, allow_nan=False)
    assert data["problem"]
    for name in ("config.yaml", "status.json", "jumps.json", "forecast.json", METRICS, META):
        (folder / name).unlink()
        os.mkfifo(folder / name)  # it would wait for a writer
    assert RunFolder(folder).data()["notes"]
