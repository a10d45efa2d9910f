"""Pictures of metrics.jsonl: the losses and the evaluation's metrics by step."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure

from ..files import write_atomically

VALIDATION = "val_"
_LEVEL = "val_loss_ema_t"
_LOSSES = {"loss": "training", "val_loss": "validation", "val_loss_ema": "validation, EMA"}


def plot_loss(records: list[dict[str, Any]], path: Path, band: Sequence[tuple[int, float, float, float]] = ()) -> None:
    """Training and validation losses against the step, as a PNG. band: (step, loss, low, high) of a forecast."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in _LOSSES.items():
        for number, points in enumerate(_series(records, key)):
            later = f", other samples from step {points[0][0]}" if number else ""
            axes.plot(*zip(*points, strict=True), label=label + later, lw=1, marker="" if key == "loss" else ".")
    if band:
        steps, losses, low, high = zip(*band, strict=True)
        axes.fill_between(steps, low, high, color="C7", alpha=0.3, lw=0, label="forecast, 90 %")
        axes.plot(steps, losses, color="C7", lw=1, ls=":", marker="." if len(band) == 1 else "")
    # A loss less a contrastive term may be negative, where a logarithm would leave gaps.
    drawn = [loss for key in _LOSSES for points in _series(records, key) for _, loss in points]
    axes.set(xlabel="step", ylabel="loss", yscale="linear" if any(loss <= 0 for loss in drawn) else "log")
    axes.grid(True, which="both", alpha=0.3)
    if axes.has_data():
        axes.legend()
    _save(figure, path)


def plot_evaluation(records: list[dict[str, Any]], path: Path) -> None:
    """Against the step, of the EMA weights: the loss at each noise level, and each figure of train.evaluate_suite."""
    keys = {key: None for record in records for key in record if key.startswith(VALIDATION)}  # in their order
    measured = [key for key in keys if _series(records, key)]
    losses = [key for key in measured if key.startswith(_LEVEL)]
    figures = [key for key in measured if not key.startswith("val_loss")]
    panels = ([losses] if losses else []) + [[key] for key in figures]
    if not panels:
        return
    figure = matplotlib.figure.Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, keys in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for color, key in enumerate(keys):
            for number, points in enumerate(_series(records, key)):
                label = "_" if number else f"t = {key.removeprefix(_LEVEL)}"  # "_": not in the legend
                axes.plot(*zip(*points, strict=True), label=label, color=f"C{color}", lw=1, marker=".")
        axes.grid(True, which="both", alpha=0.3)
        axes.set(xlabel="step", ylabel="loss by time" if keys is losses else keys[0].removeprefix(VALIDATION))
        if keys is losses:
            axes.set_yscale("log")
            axes.legend(fontsize="small")
    _save(figure, path)


def _series(records: list[dict[str, Any]], key: str) -> list[list[tuple[int, float]]]:
    """(step, figure) of the records that have the figure. A validation loss on other samples (val_set) compares with
    nothing before: there a new series begins."""
    series: list[list[tuple[int, float]]] = []
    val_set = None
    for record in records:
        if not isinstance(record.get(key), int | float):
            continue
        now = record.get("val_set") if key.startswith("val_loss") else None
        if not series or (None not in (val_set, now) and val_set != now):
            series.append([])
        series[-1].append((record["step"], record[key]))
        val_set = now or val_set
    return series


def _save(figure: matplotlib.figure.Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    write_atomically(path, image.getvalue())
