"""Pictures of metrics.jsonl: the losses and the evaluation's metrics by step."""

import io
from pathlib import Path
from typing import Any

import matplotlib.figure

from ..files import write_atomically

VALIDATION = "val_"
_LEVEL = "val_loss_ema_t"


def plot_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Training and validation losses against the step, as a PNG."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("val_loss", "validation"), ("val_loss_ema", "validation, EMA")):
        points = _points(records, key)
        if points:
            axes.plot(*zip(*points, strict=True), label=label, lw=1, marker="" if key == "loss" else ".")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    if axes.has_data():
        axes.legend()
    _save(figure, path)


def plot_evaluation(records: list[dict[str, Any]], path: Path) -> None:
    """Against the step, of the EMA weights: the loss at each noise level, and each figure of train.evaluate_suite."""
    keys = {key: None for record in records for key in record if key.startswith(VALIDATION)}  # in their order
    measured = [key for key in keys if _points(records, key)]
    losses = [key for key in measured if key.startswith(_LEVEL)]
    figures = [key for key in measured if not key.startswith("val_loss")]
    panels = ([losses] if losses else []) + [[key] for key in figures]
    if not panels:
        return
    figure = matplotlib.figure.Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, keys in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for key in keys:
            axes.plot(
                *zip(*_points(records, key), strict=True), label=f"t = {key.removeprefix(_LEVEL)}", lw=1, marker="."
            )
        axes.grid(True, which="both", alpha=0.3)
        axes.set(xlabel="step", ylabel="loss by time" if keys is losses else keys[0].removeprefix(VALIDATION))
        if keys is losses:
            axes.set_yscale("log")
            axes.legend(fontsize="small")
    _save(figure, path)


def _points(records: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]


def _save(figure: matplotlib.figure.Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    write_atomically(path, image.getvalue())
