"""Climb to a target: the coordinate check of its config, then short runs at growing widths; wider must be better.

python launch/ladder.py --config mmdit_18b_mup.yaml --widths 512,1024,2048 --steps 1000 [--processes 8] [key=value ...]

Leaves runs/NAME_ladder with ladder.json, ladder.png, the coordinate check and a run folder for each width; the same
command again goes on where it stopped. Exits 0 where the check passes and each wider model has the lower validation
loss at the same step (within --tolerance), else 1. launch/submit.py warns of a target without one.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.common import command, run
from launch.processes import kill_tree
from trainer.config.load import load_config
from trainer.errors import ConfigError
from trainer.files import json_text, write_atomically


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--widths", required=True, help="at least three, with commas between")
    parser.add_argument("--steps", type=int, required=True, help="per run")
    parser.add_argument("--processes", type=int, default=1, help="per run, on this node: one per GPU (default: 1)")
    parser.add_argument("--lr", type=float, help="of the coordinate check; it finds one unless given")
    parser.add_argument(
        "--tolerance", type=float, default=0.002, help="share by which a wider model may be worse (0.002)"
    )
    a = parser.parse_args()
    widths = sorted({int(width) for width in a.widths.split(",")})
    if len(widths) < 3 or a.steps < 1:
        raise ConfigError(f"--widths needs at least three different widths and --steps at least 1, got {a.widths}")
    config = load_config(a.config, a.overrides)
    from trainer.coord_check.ladder import final_loss, plot, rung, verdict

    folder = Path(config.run.dir) / f"{config.run.name}_ladder"
    rungs = {width: rung(config, folder, width, a.steps, a.overrides) for width in widths}
    for overrides in rungs.values():
        load_config(a.config, overrides)  # refuses a bad width before anything runs

    check = folder / "coord_check"
    checking = [sys.executable, "launch/coord_check.py", "--config", a.config, "--widths", a.widths]
    checking += ["--output", str(check), "--overwrite", *([] if a.lr is None else ["--lr", str(a.lr)])]
    checked = call(checking, a.overrides)
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
    write_atomically(folder / "ladder.json", json_text({**found, **settings}, indent=1) + "\n")
    if losses:
        plot(folder, widths, folder / "ladder.png")
    print(f"ladder of {config.run.name}: {'PASSED' if found['passed'] else 'FAILED'}. {found['reason']}")
    return 0 if found["passed"] else 1


def call(command: list[str], overrides: Sequence[str]) -> int:
    """Run a command and return its exit code. It is killed where this process ends first."""
    process = subprocess.Popen([*command, *overrides])
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            kill_tree(process.pid)


if __name__ == "__main__":
    run(main)
