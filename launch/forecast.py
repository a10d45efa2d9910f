"""Know the target's loss, its right size and its course before it is paid for: train narrow rungs, fit their law.

python launch/forecast.py run --config mmdit_2b_mup.yaml --widths 256,512,768,1024 --steps 5000,10000,20000 --seeds 3
python launch/forecast.py fit --config mmdit_2b_mup.yaml          (forecast.json and index.html beside the rungs)
python launch/forecast.py fit --table rungs.csv --parameters 2e9 --images 2e8 --json

Under muP the rungs have the target's hyperparameters. `run` given again goes on where it stopped, and with more widths
or seeds adds to what there is. `torchrun --nproc-per-node 8 launch/forecast.py run ...` trains each rung on eight
devices. `fit` exits 0 with a forecast, 1 where it refuses, with the numbers why.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.common import command, run
from launch.processes import importing, kill_tree
from launch.slurm.worker_array import Work, add_array, submit_array
from trainer.errors import ConfigError
from trainer.files import json_text


def main() -> int:
    commands = {"run": run_rungs, "fit": fit}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands, help="each has a --help of its own")
    return commands[parser.parse_args(sys.argv[1:2]).command](sys.argv[2:])


def run_rungs(given: Sequence[str]) -> int:
    parser = command("Train the rungs of a target, or go on with them.", name="run")
    parser.add_argument("--widths", required=True, help="at least three, with commas between")
    parser.add_argument("--steps", required=True, help="durations, at least two, with commas between")
    parser.add_argument("--seeds", type=int, default=3, help="runs per width and duration (default: 3)")
    parser.add_argument("--workers", type=int, default=1, help="rungs side by side on this machine (default: 1)")
    add_array(parser)
    a = parser.parse_args(given)
    with importing():
        from trainer.forecast.rungs import Rungs, Trunk
        from trainer.parallel.mesh import rank
        from trainer.search.trunk_worker import open_folder, train_trunks

    rungs = Rungs.of(a.config, a.overrides, a.widths, a.steps, a.seeds)
    if rank() == 0:
        open_folder(rungs)
        if rungs.target.data.synthetic:
            print("warning: data.shards is synthetic: noise has no law of its own; give data.shards=...")
    worker = [str(Path(__file__).resolve()), "run", "--config", a.config, "--widths", a.widths, "--steps", a.steps]
    worker += ["--seeds", str(a.seeds), *a.overrides]
    if a.array is not None:
        count = f"{len(list(rungs.trunks()))} trunks"
        name, num_workers = f"forecast-{rungs.target.run.name}", rungs.target.data.num_workers
        return submit_array(Work(name, rungs.folder, worker, count, num_workers), a)
    return train_trunks(rungs, Trunk(rungs.widths[-1], 0), worker, a.workers, kill_tree)


def fit(given: Sequence[str]) -> int:
    parser = command("Fit the law of the rungs, and say what the target will reach.", config=False,
                     name="fit")  # fmt: skip
    parser.add_argument("--config", help="the target's, as for `run`: all rungs in its folder are taken")
    parser.add_argument("--table", type=Path, help="runs made elsewhere, as CSV: parameters, images, seed, loss[, lr]")
    parser.add_argument("--parameters", type=float, help="of the target of a table")
    parser.add_argument("--images", type=float, help="that the target of a table sees")
    parser.add_argument("--output", type=Path, help="folder for forecast.json and index.html (default: the rungs')")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    a = parser.parse_args(given)
    if (a.config is None) == (a.table is None):
        raise ConfigError("give --config NAME, whose rungs were trained, or --table FILE.csv")
    if a.table is not None and not all(0 < (each or 0) < math.inf for each in (a.parameters, a.images)):
        raise ConfigError("--table needs the target's --parameters and --images, both positive")
    if a.table is not None and a.overrides:
        raise ConfigError(f"{a.overrides[0]}: a table has no config to change")
    if a.config is not None and (a.parameters is not None or a.images is not None):
        raise ConfigError("--parameters and --images follow from --config: they go with --table")
    with importing():
        from trainer.forecast.report import describe, forecast_table, forecast_target, write_forecast
        from trainer.forecast.rungs import Rungs
        from trainer.forecast.table import read_table

    if a.table is not None:
        size = float(a.parameters or 0), float(a.images or 0)
        forecast, folder = forecast_table(read_table(a.table), *size, a.table.stem), a.output
    else:
        rungs = Rungs.found(str(a.config), a.overrides)
        forecast, folder = forecast_target(rungs), a.output or rungs.folder
    print(json_text(forecast.data(), indent=1) if a.json else describe(forecast))
    if folder is not None:
        path = write_forecast(forecast, folder)
        if not a.json:
            print(f"{path}; the target follows it with run.forecast={path}, and {folder / 'index.html'} shows it")
    return 1 if forecast.refused else 0


if __name__ == "__main__":
    run(main)
