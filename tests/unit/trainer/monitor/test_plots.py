"""Pictures of metrics.jsonl: whatever was logged is drawn, and series that do not compare stand apart."""

from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from trainer.monitor import plots
from trainer.monitor.plots import plot_evaluation, plot_loss


@pytest.mark.slow
@pytest.mark.parametrize(
    "records",
    [
        pytest.param([], id="nothing"),
        pytest.param([{"step": 0, "val_loss": 1.0, "val_loss_ema": 1.1}], id="one point"),
        pytest.param([{"step": n, "loss": 1.0 / n} for n in range(1, 9)], id="training alone"),
        pytest.param([{"step": 1, "loss": float("nan")}, {"step": 2, "skipped_steps": 3}], id="all skipped"),
    ],
)
def test_plot_loss(records: list[dict[str, Any]], tmp_path: Path) -> None:
    plot_loss(records, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.parametrize(("losses", "scale"), [([1.0, 0.1], "log"), ([1.0, -0.1], "linear")])
def test_a_negative_loss_is_drawn(
    losses: list[float], scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[matplotlib.figure.Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plot_loss([{"step": step, "loss": loss} for step, loss in enumerate(losses)], tmp_path)
    assert figures[0].axes[0].get_yscale() == scale


@pytest.mark.parametrize("count", [1, 3])
def test_the_band_of_a_forecast(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[matplotlib.figure.Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    band = [(10, 1.0, 0.9, 1.1), (20, 0.8, 0.7, 0.9), (30, 0.6, 0.5, 0.7)][-count:]
    plot_loss([{"step": 1, "val_loss_ema": 1.0}], tmp_path, band)
    (axes,) = figures[0].axes
    legend = axes.get_legend()
    assert legend is not None
    assert "forecast, 90 %" in [text.get_text() for text in legend.get_texts()]
    drawn: Any = axes.get_lines()[-1].get_ydata()
    assert [*map(float, drawn)] == [loss for _, loss, _, _ in band]


def test_a_new_series_begins_with_other_validation_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[matplotlib.figure.Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    sets = [None, "a", None, "a", "b", "b"]  # None: lines of an older version
    records = [
        {"step": step, "loss": 1.0, "val_loss": 2.0, "val_loss_ema_t0.5": 3.0, "val_set": val_set}
        for step, val_set in enumerate(sets)
    ]
    plot_loss(records, tmp_path)
    plot_evaluation(records, tmp_path)
    lines = [
        {str(line.get_label()): list(line.get_xdata()) for line in figure.axes[0].get_lines()}  # type: ignore[arg-type]
        for figure in figures
    ]
    assert lines[0] == {
        "training": [0, 1, 2, 3, 4, 5],
        "validation": [0, 1, 2, 3],
        "validation, other samples from step 4": [4, 5],
    }
    assert sorted(lines[1].values()) == [[0, 1, 2, 3], [4, 5]]
