"""Coordinate check: is what a few training steps do independent of the width? An SP control has equal settings.

python launch/coord_check.py --config mmdit_debug_mup.yaml --widths 64,128,256,512 --steps 5 --seeds 2 --output DIR

The models are built as in training (muP table, FSDP2, fused AdamW) and train at a constant learning rate on one fixed
batch of synthetic data, the same at every width. Writes coord_check.json and coord_check.png. Exits 0 where muP passes,
1 where it fails, or where the control says that these settings could not have shown a fault.
"""

import time
from pathlib import Path

from launch.common import add_overwrite, command, keep_files, run
from launch.processes import importing
from trainer.config.load import load_config
from trainer.errors import ConfigError
from trainer.files import json_text, write_atomically

LEAST_WIDTHS = 3


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--widths", type=_widths, default="64,128,256,512", help="at least three, with commas between")
    parser.add_argument("--steps", type=int, default=5, help="the first 5 are judged, more are reported (default: 5)")
    parser.add_argument("--seeds", type=int, default=2, help="runs per width (default: 2)")
    parser.add_argument("--lr", type=float, help="optim.lr; unless given, it is doubled until SP would show a fault")
    parser.add_argument("--batch-size", type=int, default=8, help="samples per step (default: 8)")
    parser.add_argument("--output", required=True, type=Path, help="folder of coord_check.json and coord_check.png")
    add_overwrite(parser)
    a = parser.parse_args()
    if a.steps < 1 or a.seeds < 1:
        raise ConfigError(f"--steps and --seeds must be at least 1, got {a.steps} and {a.seeds}")
    if len(a.widths) < LEAST_WIDTHS:
        raise ConfigError(f"--widths needs at least {LEAST_WIDTHS} different widths to fit a slope, got {a.widths}")
    load_config(a.config, a.overrides)
    keep_files(a.overwrite, a.output / "coord_check.json", a.output / "coord_check.png")
    with importing():
        from trainer.coord_check.check import MOST_LR, Settings, check
        from trainer.coord_check.plot import plot
        from trainer.coord_check.report import describe, to_json
        from trainer.coord_check.slopes import CONTROL, LIMITS
        from trainer.coord_check.subject import without_repa

    began = time.perf_counter()
    overrides = without_repa(a.config, a.overrides)
    report, control, checked, lr = check(Settings(a.config, overrides, a.widths, a.steps, a.seeds, a.batch_size, a.lr))
    settings = {
        "config": a.config, "overrides": overrides, "parametrization": checked, "widths": a.widths,
        "steps": a.steps, "seeds": a.seeds, "lr": lr, "batch_size": a.batch_size,
        "limits": LIMITS, "control_limit": CONTROL, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    a.output.mkdir(parents=True, exist_ok=True)
    write_atomically(a.output / "coord_check.json", json_text(to_json(report, control, settings), indent=1) + "\n")
    plot(report, checked, f"{Path(a.config).stem}, {a.steps} steps", a.output / "coord_check.png")
    print(describe(report, control, checked))
    found = "" if a.lr is not None else f", found from optim.lr (at most {MOST_LR:g})"
    print(f"  at learning rate {lr:.3g}{found}")
    print(f"{a.output}/coord_check.json, coord_check.png ({settings['seconds']} s)")
    return 0 if report.verdict == "passed" else 1


def _widths(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


if __name__ == "__main__":
    run(main)
