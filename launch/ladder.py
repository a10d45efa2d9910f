"""Climb to a target: the coordinate check on its config, then short runs at growing widths; wider must be better.

python launch/ladder.py --config mmdit_18b_mup.yaml --widths 512,1024,2048 --steps 1000 [--processes 8] [key=value ...]

Leaves runs/NAME_ladder with ladder.json, ladder.png, the coordinate check and a run folder for each width; the same
command again goes on where it stopped. Exits 0 where the check passes and each wider model has the lower validation
loss at the same step (within --tolerance), 1 where not. launch/submit.py warns of a target without one.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.figure

from launch.common import kill_tree, run
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.files import write_atomically
from trainer.monitor.metrics import read_metrics


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a name under configs/")
    parser.add_argument("--widths", required=True, help="at least three, with commas between")
    parser.add_argument("--steps", type=int, required=True, help="of each run")
    parser.add_argument("--processes", type=int, default=1, help="of a run on this node: its GPUs")
    parser.add_argument("--lr", type=float, help="of the coordinate check, which finds its own unless given")
    parser.add_argument("--tolerance", type=float, default=0.002, help="share by which a wider model may be worse")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    a = parser.parse_intermixed_args()
    widths = sorted({int(width) for width in a.widths.split(",")})
    if len(widths) < 3 or a.steps < 1:
        raise ConfigError(f"--widths needs at least three different widths and --steps at least 1, got {a.widths}")
    config = load_config(a.config, a.overrides)
    folder = Path(config.run.dir) / f"{config.run.name}_ladder"
    rungs = {width: rung(config, folder, width, a.steps, a.overrides) for width in widths}
    for overrides in rungs.values():
        load_config(a.config, overrides)  # refuses a bad width before anything runs

    check = folder / "coord_check"
    command = [sys.executable, "launch/coord_check.py", "--config", a.config, "--widths", a.widths]
    command += ["--output", str(check), *([] if a.lr is None else ["--lr", str(a.lr)])]
    checked = call(command, a.overrides)
    losses: dict[int, float] = {}
    if checked == 0:
        launcher = [sys.executable]
        if a.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={a.processes}"]
        for width, overrides in rungs.items():
            if call([*launcher, "launch/train.py", "--config", a.config], overrides) != 0:
                raise SystemExit(1)  # its message stands above
            losses[width] = final_loss(folder / f"width_{width}", a.steps)
    found = verdict(checked == 0, losses, a.tolerance)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"config": a.config, "widths": widths, "steps": a.steps, "overrides": a.overrides}
    write_atomically(folder / "ladder.json", json.dumps({**found, **settings}, indent=1) + "\n")
    if losses:
        plot(folder, widths, folder / "ladder.png")
    print(f"ladder of {config.run.name}: {'PASSED' if found['passed'] else 'FAILED'}. {found['reason']}")
    return 0 if found["passed"] else 1


def rung(config: TrainConfig, folder: Path, width: int, steps: int, overrides: Sequence[str]) -> list[str]:
    """Overrides of a short run: the target's own but for width, length, and a schedule that fits into it."""
    return [
        *overrides,
        f"run.dir={folder}", f"run.name=width_{width}", f"model.width={width}", f"train.steps={steps}",
        f"optim.warmup_steps={min(config.optim.warmup_steps, steps // 4)}", "optim.schedule=constant",
        "optim.decay_steps=0", f"train.validate_every={steps}", "train.sample_every=0", "train.checkpoint_every=0",
    ]  # fmt: skip


def call(command: list[str], overrides: Sequence[str]) -> int:
    process = subprocess.Popen([*command, *overrides])
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            kill_tree(process.pid)


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
    """Training loss over the step, a line a width."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for width in widths:
        points = [(r["step"], r["loss"]) for r in read_metrics(folder / f"width_{width}") if "loss" in r]
        axes.plot(*zip(*points, strict=True), label=f"width {width}", lw=1)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main)
