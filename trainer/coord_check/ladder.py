"""A ladder: the same short run at growing widths, of which each wider model must be the better one."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..config.schema import TrainConfig
from ..errors import ConfigError
from ..monitor.metrics import read_metrics


def rung(config: TrainConfig, folder: Path, width: int, steps: int, overrides: Sequence[str]) -> list[str]:
    """Overrides of a short run: the target's own but for folder, width, length, and a schedule that fits into it."""
    own = [
        f"run.dir={folder}", f"run.name=width_{width}", f"model.width={width}", f"train.steps={steps}",
        f"optim.warmup_steps={min(config.optim.warmup_steps, steps // 4)}", "optim.schedule=constant",
        "optim.decay_steps=0", f"train.validate_every={steps}", "train.sample_every=0", "train.checkpoint_every=0",
        "stages=[]",
    ]  # fmt: skip
    set_here = {text.partition("=")[0] for text in own}
    return [*(text for text in overrides if text.partition("=")[0] not in set_here), *own]


def final_loss(folder: Path, steps: int) -> float:
    """Validation loss of the live weights after the last step."""
    found = [record["val_loss"] for record in read_metrics(folder) if record["step"] == steps and "val_loss" in record]
    if not found:
        raise ConfigError(f"{folder} has no validation loss at step {steps}: it was stopped, or is of another ladder")
    return found[-1]


def verdict(coordinates: bool, losses: dict[int, float], tolerance: float) -> dict[str, Any]:
    """passed, the reason in words, and what it rests on."""
    worse = [
        f"width {wide} has {losses[wide]:.4g}, width {narrow} {losses[narrow]:.4g}"
        for narrow, wide in pairwise(sorted(losses))
        if not losses[wide] <= losses[narrow] * (1 + tolerance)  # also of a loss that is not finite
    ]
    if not coordinates:
        reason = "The coordinate check failed: see coord_check/coord_check.png. No run was started."
    elif worse:
        reason = f"Wider is not better: {'; '.join(worse)}."
    else:
        reason = "Wider is better: " + ", ".join(f"{w}: {loss:.4g}" for w, loss in sorted(losses.items())) + "."
    return {
        "passed": coordinates and not worse,
        "reason": reason,
        "coord_check": coordinates,
        "val_loss": {str(width): loss for width, loss in losses.items()},
    }


def plot(folder: Path, widths: Sequence[int], path: Path) -> None:
    """Training loss over the step, a line per width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for width in widths:
        points = [(r["step"], r["loss"]) for r in read_metrics(folder / f"width_{width}") if "loss" in r]
        axes.plot(*zip(*points, strict=True), label=f"width {width}", lw=1)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
