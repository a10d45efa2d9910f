"""Coordinate check: is what a few training steps do independent of the width? With an SP control at equal settings.

python launch/coord_check.py --config mmdit_debug_mup.yaml --widths 64,128,256,512 --steps 5 --seeds 2 --output DIR

Goes through the trainer's own composition (muP table, FSDP2, fused AdamW), at a constant learning rate, on a fixed
batch of synthetic data that is the same at every width. Writes coord_check.json and coord_check.png; exits 0 where
muP passes, 1 where it fails or where the control shows that the settings could not have shown a fault.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launch.common import run
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.coord_check.plot import plot
from trainer.coord_check.slopes import (
    CONTROL,
    LIMITS,
    FigureSlope,
    Judgement,
    Measured,
    judge,
    measure,
    shows_faults,
    strongest_control,
)
from trainer.coord_check.subject import build_subject, check_config, without_repa
from trainer.errors import ConfigError
from trainer.parallel.mesh import init_world

LEAST_WIDTHS = 3
_MOST_LR = 2.0**-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a path, or a name under configs/")
    parser.add_argument("--widths", type=_widths, default="64,128,256,512", help="at least three, with commas between")
    parser.add_argument("--steps", type=int, default=5, help="the first 5 are judged, more are reported")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, help="optim.lr, doubled until a fault would show in SP, unless given")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", required=True, type=Path, help="folder of coord_check.json and coord_check.png")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()  # overrides may stand between options
    arguments.overrides = without_repa(arguments.config, arguments.overrides)
    widths, steps, seeds = arguments.widths, arguments.steps, arguments.seeds
    if steps < 1 or seeds < 1:
        raise ConfigError(f"--steps and --seeds must be at least 1, got {steps} and {seeds}")
    if len(widths) < LEAST_WIDTHS:
        raise ConfigError(f"--widths needs at least {LEAST_WIDTHS} different widths to fit a slope, got {widths}")

    def config_at(width: int, seed: int, lr: float, parametrization: str | None = None) -> TrainConfig:
        return check_config(
            arguments.config, arguments.overrides, width, seed, lr, arguments.batch_size, parametrization
        )

    lr = load_config(arguments.config, arguments.overrides).optim.lr if arguments.lr is None else arguments.lr
    (checked,) = {config_at(width, 0, lr).mup.parametrization for width in widths}  # refuses a bad width at once
    began = time.perf_counter()
    world = init_world(1)
    try:

        def sweep(lr: float, parametrization: str | None) -> Measured:
            return measure(
                lambda w, s: build_subject(config_at(w, s, lr, parametrization), world), widths, seeds, steps
            )

        # A rate so small that SP looks well would hide a fault, one much larger than it takes is beyond what the rules
        # are of: the first order in what a step changes. How large that is depends on base width and backbone.
        control = sweep(lr, "sp")
        while arguments.lr is None and not shows_faults(control) and lr < _MOST_LR:
            lr *= 2
            control = sweep(lr, "sp")
        measured = control if checked == "sp" else sweep(lr, None)
    finally:
        dist.destroy_process_group()
    report = judge(measured, control)
    settings = {
        "config": arguments.config, "overrides": arguments.overrides, "parametrization": checked, "widths": widths,
        "steps": steps, "seeds": seeds, "lr": lr, "batch_size": arguments.batch_size,
        "limits": LIMITS, "control_limit": CONTROL, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    written = to_json(report, strongest_control(control), settings)
    (arguments.output / "coord_check.json").write_text(json.dumps(written, indent=1) + "\n")
    plot(report, checked, f"{Path(arguments.config).stem}, {steps} steps", arguments.output / "coord_check.png")
    print(summary(report, strongest_control(control), checked))
    found = "" if arguments.lr is not None else f", found from optim.lr (at most {_MOST_LR:g})"
    print(f"  at learning rate {lr:.3g}{found}")
    print(f"{arguments.output}/coord_check.json, coord_check.png ({settings['seconds']} s)")
    return 0 if report.verdict == "passed" else 1


def _widths(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def to_json(report: Judgement, control: FigureSlope | None, settings: dict[str, Any]) -> dict[str, Any]:
    def short(row: FigureSlope | None) -> dict[str, Any] | None:
        if row is None:
            return None
        return {"name": row.figure.name, "step": row.figure.step, "slope": row.slope, "note": row.note}

    rows = [{"run": "checked", **row.to_json()} for row in report.rows]
    rows += [{"run": "control", **row.to_json()} for row in report.control]
    return {
        "passed": report.verdict == "passed",
        "verdict": report.verdict,
        "reason": report.reason,
        "worst": {**{kind: short(row) for kind, row in report.worst.items()}, "control": short(control)},
        "culprits": {kind: [short(row) for row in found] for kind, found in report.culprits.items()},
        "settings": settings,
        "rows": [_finite(row) for row in rows],
    }


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    values = {w: [v if abs(v) < float("inf") else None for v in seeds] for w, seeds in row["values"].items()}
    return {**row, "values": values}


def summary(report: Judgement, control: FigureSlope | None, parametrization: str) -> str:
    lines = [f"coordinate check of {parametrization}: {report.verdict.upper()}"]
    for kind, row in report.worst.items():
        slope = row.note if row.slope is None else f"{row.slope:+.2f} ± {row.error:.2f}"
        lines.append(f"  worst {kind:<10} slope {slope} (limit {row.limit})  {row.figure.name}, step {row.figure.step}")
        others = [r.figure.name for r in report.culprits[kind] if r is not row]
        if others:
            lines.append(f"    also over the limit: {', '.join(others[:8])}{' ...' if len(others) > 8 else ''}")
    if control is not None and control.slope is not None:
        lines.append(f"  SP control        slope {control.slope:+.2f} (must exceed {CONTROL})  {control.figure.name}")
    if report.verdict == "inconclusive":
        lines.append(f"  {report.reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
