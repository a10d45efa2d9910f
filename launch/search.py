"""Tune base hyperparameters on a proxy and give them to the target.

python launch/search.py run --config search/demo.yaml --workers 2      (given again, it goes on where it stopped)
python launch/search.py report --study demo_search
python launch/search.py transfer --study demo_search --to mmdit_demo_mup.yaml --output found.yaml
python launch/search.py check --study demo_search --width 256
python launch/search.py horizon --study demo_search --workers 2        (the best learning rate by duration; goes on too)
python launch/search.py cost --config search/mmdit_0.18b.yaml --to mmdit_18b_mup.yaml

Overrides of `run` and `cost`: section.key=value changes the proxy (train.steps=100), key=value the search (trials=4).
`torchrun --nproc-per-node 8 launch/search.py run ...` trains each trial on eight devices.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data.redaction import message
from launch.common import command, run
from launch.processes import importing, kill_tree
from launch.slurm.worker_array import Work, add_array, submit_array
from launch.study.commands import horizon_of_study, of_study, report_study, transfer_study
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.errors import ConfigError


def main() -> int:
    commands = {"run": run_search, "report": report_study, "transfer": transfer_study, "check": check_study,
                "horizon": horizon_of_study, "cost": show_cost}  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands, help="each has a --help of its own")
    return commands[parser.parse_args(sys.argv[1:2]).command](sys.argv[2:])


def run_search(given: Sequence[str]) -> int:
    parser = command("Run the trials, or go on with them.", overrides="key=value", name="run")
    parser.add_argument("--workers", type=int, default=1, help="trials side by side on this machine (default: 1)")
    add_array(parser)
    arguments = parser.parse_args(given)
    if arguments.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {arguments.workers}")
    with importing():
        from trainer.collectives import from_rank_0
        from trainer.estimate.micro_batch import find_fitting
        from trainer.parallel.mesh import open_world, rank, world_size
        from trainer.search.definition import load_search
        from trainer.search.live_table import Table
        from trainer.search.local_workers import run_workers
        from trainer.search.study import Study
        from trainer.search.worker import Worker

    search = load_search(arguments.config, arguments.overrides)
    if search.proxy().data.synthetic and rank() == 0:
        print("warning: data.shards is synthetic: noise has no best hyperparameters; give data.shards=...")
    worker = [str(Path(__file__).resolve()), "run", "--config", arguments.config, *arguments.overrides]
    if arguments.array is not None:
        folder = Study.open(search).folder  # all trials are in the study before a job starts
        work = Work(f"search-{search.name}", folder, worker, f"{search.trials} trials", search.proxy().data.num_workers)
        return submit_array(work, arguments)
    if arguments.workers > 1:
        if world_size() > 1:
            raise ConfigError("--workers starts processes of its own: use it without torchrun")
        study = Study.open(search)  # a mistake shows here, once, and not in every worker
        return run_workers(study.folder, Table(study), [sys.executable, *worker], arguments.workers, kill_tree)
    find = find_fitting(search.proxy(), world_size(), search.folder)  # before the world opens, as in launch/train.py
    with open_world(resolve(search.proxy(), world_size()).shard) as world:
        fitting = from_rank_0(world, find)
        terminal = sys.stdout  # what training prints goes to the logs of its trial
        Worker(search, world, lambda text: print(text, file=terminal, flush=True), fitting).work()
    if rank() == 0:
        print(Table(Study.open(search)).summary())
    return 0


def check_study(given: Sequence[str]) -> int:
    parser = of_study("Look for the best learning rate again at another width; exits 1 unless it stays.", "check")
    parser.add_argument("--width", type=int, required=True, help="model.width of three runs: at lr / 2, lr and 2 lr")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side on this machine (default: 1)")
    arguments = parser.parse_args(given)
    from trainer.search.check import check_search, judge, write_search
    from trainer.search.study import Study

    study = Study.load(arguments.study)
    search = check_search(study, arguments.width)
    if code := run_search(["--config", str(write_search(search)), "--workers", str(arguments.workers)]):
        return code
    found = judge(study, Study.load(str(search.folder)))
    print(message(str(found)))
    return 0 if found.verdict == "stays" else 1


def show_cost(given: Sequence[str]) -> int:
    parser = command("What the search costs, as a share of a run of the target.", overrides="key=value",
                     name="cost")  # fmt: skip
    parser.add_argument("--to", help="the target's config; the search's own target unless given")
    arguments = parser.parse_args(given)
    from trainer.search.cost import cost_of
    from trainer.search.definition import load_search

    search = load_search(arguments.config, arguments.overrides)
    target = arguments.to or search.target
    if target is None:
        raise ConfigError(f"{arguments.config} names no target: give one with --to")
    print(cost_of(search, search.proxy(), load_config(target)).describe())
    return 0


if __name__ == "__main__":
    run(main)
