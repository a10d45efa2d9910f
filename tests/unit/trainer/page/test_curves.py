"""Curves stay short and lose no spike; a log that is read on says what reading it anew says."""

import math
import random
from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError
from trainer.monitor.records import METRICS, metrics_line
from trainer.page import curves
from trainer.page.curves import MOST_POINTS, Curve, Log


@pytest.mark.parametrize("count", [1, 999, MOST_POINTS + 1, 123_457])
def test_a_long_curve_is_short_and_has_its_ends_its_spike_and_its_dip(count: int) -> None:
    chance = random.Random(0)
    figures = [1 + chance.random() for _ in range(count)]
    figures[count // 3], figures[count // 2] = 50.0, -50.0
    curve = Curve()
    for step, figure in enumerate(figures):
        curve.add(step, figure)
    points = curve.points()
    assert len(points) <= min(count, MOST_POINTS + 3)
    assert len(points) >= min(count, MOST_POINTS // 3)
    assert points == sorted(points), "steps in their order"
    assert len({step for step, _ in points}) == len(points), "no step twice"
    assert {(step, figures[step]) for step in (count // 3, count // 2, count - 1)} <= set(points)
    assert points[0][0] <= max(1, count // 100)


def test_the_newest_point_is_there_at_every_count() -> None:
    curve, chance = Curve(), random.Random(0)
    for step in range(6000):  # groups of 1, 4, 8 and 16 points
        curve.add(step, math.nan if step % 7 == 0 else chance.random())
        newest = curve.points()[-2:]
        assert newest[-1][0] == step
        assert newest[0][0] < step or step == 0, "once"


def test_what_is_not_finite_hides_no_finite_figure() -> None:
    curve = Curve()
    for step in range(4 * MOST_POINTS):
        curve.add(step, math.nan if step % 2 else float(step))
    finite = [figure for _, figure in curve.points() if math.isfinite(figure)]
    assert finite[0] < 20
    assert finite[-1] > 4 * MOST_POINTS - 20
    assert len(finite) > MOST_POINTS // 3


def record(step: int, **more: Any) -> bytes:
    return metrics_line({"step": step, "samples_seen": 8 * step, "loss": 2.0 / (step + 1), **more})


def said(log: Log) -> dict[str, Any]:
    curves = {key: [curve.points() for curve in curves] for key, curves in log.curves.items()}
    return {"curves": curves, "images": log.images, "stages": log.stages, "lines": log.lines, "damaged": log.damaged}


def anew(folder: Path) -> dict[str, Any]:
    log = Log(folder)
    log.read()
    return said(log)


def test_reading_on_is_reading_anew(tmp_path: Path) -> None:
    """However the writer's pieces are cut, and over a resume, which cuts the file and writes other lines."""
    path, log, chance = tmp_path / METRICS, Log(tmp_path), random.Random(1)
    log.read()
    lines = [record(step, stage=f"stage {step // 20}", val_set="ab"[step // 30]) for step in range(60)]
    lines.insert(7, b"{damaged\n")
    content, at = b"".join(lines), 0
    while at < len(content):
        at += chance.randrange(1, 400)
        path.write_bytes(content[:at])
        log.read()
        assert said(log) == anew(tmp_path), at
    assert (log.lines, log.damaged) == (60, 1)
    path.write_bytes(b"".join(lines[:31]))  # cut
    log.read()
    assert log.lines == 30
    path.write_bytes(
        b"".join([*lines[:20], *(record(step, lr=0.1) for step in range(19, 90))])
    )  # cut, and longer since
    log.read()
    assert said(log) == anew(tmp_path)
    path.unlink()
    log.read()
    assert log.lines == 0


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    path, log = tmp_path / METRICS, Log(tmp_path)
    whole, half = record(1), record(2)
    path.write_bytes(whole + half[:20])
    log.read()
    assert (log.step, log.damaged) == (1, 0)
    path.write_bytes(whole + half)
    log.read()
    assert (log.step, log.damaged) == (2, 0)


def test_of_a_long_file_lines_are_passed_over_but_no_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [record(step, **({"val_loss": 1.0} if step % 100 == 1 else {}), text="x" * 200) for step in range(20_000)]
    (tmp_path / METRICS).write_bytes(b"".join(lines))
    monkeypatch.setattr(curves, "_MOST_AT_ONCE", 1 << 20)
    log = Log(tmp_path)
    log.read()
    assert log.every == 1 + (tmp_path / METRICS).stat().st_size // (1 << 20) > 4
    assert log.lines < 8_000
    assert log.curves["val_loss"][0].count == 200
    assert log.step == 19_999
    with (tmp_path / METRICS).open("ab") as file:
        file.writelines(record(step) for step in range(20_000, 20_010))
    before = log.lines
    log.read()
    assert log.lines == before + 10, "what comes later is read line by line"


def test_images_lie_on_few_lines(tmp_path: Path) -> None:
    batch = {step: 8 if step < 500 else 32 for step in range(1000)}
    seen, lines = 0, []
    for step in range(1000):
        lines.append(metrics_line({"step": step, "samples_seen": seen}))
        seen += batch[step]
    (tmp_path / METRICS).write_bytes(b"".join(lines))
    log = Log(tmp_path)
    log.read()
    assert log.images == [(0, 0), (500, 4000), (999, 4000 + 499 * 32)]


def test_hostile_lines_are_damaged_or_left_out(tmp_path: Path) -> None:
    numbers = b"9" * 4000
    lines = [b'{"step": -1}', b'{"step": 1e3}', b'{"step": ' + numbers + b"}", b"[]", b"\xff\xfe", b"x" * (3 << 20)]
    good = [
        b'{"step": 5, "loss": ' + numbers + b', "lr": 1, "perf/step_slowest_rank": 1e308, "stage": [3], "val_set": {}}'
    ]
    (tmp_path / METRICS).write_bytes(b"\n".join([*lines, *good]) + b"\n")
    log = Log(tmp_path)
    log.read()
    assert (log.lines, log.damaged) == (1, len(lines))
    assert log.newest == {"lr": 1.0}


def test_a_log_behind_a_link_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(record(1))
    (tmp_path / METRICS).symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="link"):
        Log(tmp_path).read()
