"""Tune base hyperparameters on a proxy and give them to the target.

python launch/search.py run --config search/demo.yaml --workers 2      (again: goes on where it stopped)
python launch/search.py report --study demo_search
python launch/search.py transfer --study demo_search --to mmdit_demo_mup.yaml --output found.yaml
python launch/search.py cost --config search/mmdit_0.18b.yaml --to mmdit_18b_mup.yaml

Overrides after `run` and `cost`: section.key=value is the proxy's (train.steps=100), key=value the search's (trials=4).
`torchrun --nproc-per-node 8 launch/search.py run ...` trains each trial on eight devices.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from launch.common import kill_tree, run
from launch.slurm.search_array import submit_array
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.errors import ConfigError
from trainer.parallel.mesh import init_world, rank, world_size
from trainer.search.cost import cost_of
from trainer.search.definition import Search, load_search
from trainer.search.live_table import Table
from trainer.search.page import write_page
from trainer.search.report import make_report
from trainer.search.study import Study
from trainer.search.transfer import write_target
from trainer.search.worker import Worker


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="run | report | transfer | cost")

    running = commands.add_parser("run", help="run the trials, or go on with them")
    running.add_argument("--config", required=True, help="a path, or a name under configs/")
    running.add_argument("--workers", type=int, default=1, help="trials side by side on this machine")
    running.add_argument("--array", type=int, metavar="N", help="submit a Slurm array of N workers instead")
    running.add_argument("--partition", help="of the array's jobs")
    running.add_argument(
        "--time", default="24:00:00", help="of the array's jobs; what they leave goes on after a requeue"
    )
    running.add_argument("--gpus-per-node", type=int, default=1, help="devices that train one trial of the array")
    running.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="more for the array: --sbatch=--account=a"
    )
    running.add_argument("--dry-run", action="store_true", help="write the array's script, and submit nothing")
    running.set_defaults(command=run_search)

    reporting = commands.add_parser("report", help="one page and its pictures in the study's folder")
    reporting.add_argument("--study", required=True, help="the study's folder, or its name under runs/")
    reporting.set_defaults(command=report_study)

    transferring = commands.add_parser("transfer", help="write the target's config with the base hyperparameters found")
    transferring.add_argument("--study", required=True, help="the study's folder, or its name under runs/")
    transferring.add_argument("--to", required=True, help="the target's config")
    transferring.add_argument("--trial", type=int, help="another one than the best")
    transferring.add_argument("--output", required=True, type=Path)
    transferring.set_defaults(command=transfer_study)

    costing = commands.add_parser("cost", help="what the search costs, as a share of a run of the target")
    costing.add_argument("--config", required=True, help="a path, or a name under configs/")
    costing.add_argument("--to", help="the target's config; the search's own target unless given")
    costing.set_defaults(command=show_cost)

    for command in (running, costing):
        command.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    return arguments.command(arguments)


def run_search(arguments: argparse.Namespace) -> int:
    search = load_search(arguments.config, arguments.overrides)
    if arguments.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {arguments.workers}")
    if search.proxy().data.synthetic and rank() == 0:
        print("warning: data.shards is synthetic: noise has no best hyperparameters; give data.shards=...")
    if arguments.array is not None:
        return submit_array(search, arguments)
    if arguments.workers > 1:
        if world_size() > 1:
            raise ConfigError("--workers starts processes of its own: use it without torchrun")
        return run_workers(search, arguments)
    world = init_world(resolve(search.proxy(), world_size()).shard)
    try:
        terminal = sys.stdout  # what training prints goes to the logs of its trial
        Worker(search, world, lambda text: print(text, file=terminal, flush=True)).work()
    finally:
        dist.destroy_process_group()
    if rank() == 0:
        print(Table(Study.open(search)).summary())
    return 0


def run_workers(search: Search, arguments: argparse.Namespace) -> int:
    """Workers of this machine as processes, and a table of what they do; they end with this one."""
    study = Study.open(search)  # a mistake shows here, once, and not in every worker
    logs = study.folder / "logs"
    logs.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "run", "--config", arguments.config, *arguments.overrides]
    workers, expected = [], {0}
    table = Table(study)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        for number in range(arguments.workers):
            with open(logs / f"worker_{number}.log", "a") as log:
                environment = {**os.environ, **_device(number)}
                # In a session of its own a worker does not get the terminal's Ctrl-C, which would not let it save.
                worker = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
                workers.append(worker)
        while any(worker.poll() is None for worker in workers):
            table.show()
            time.sleep(1)
    except KeyboardInterrupt:
        print("asking the workers to save and stop", flush=True)
        expected.add(-signal.SIGTERM)  # of one that was between two trials
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
    finally:
        for worker in workers:
            if worker.poll() is None:
                kill_tree(worker.pid)
    table.show(last=True)
    failed = [number for number, worker in enumerate(workers) if worker.returncode not in expected]
    for number in failed:
        log = logs / f"worker_{number}.log"
        said = log.read_text().splitlines()[-1:]
        print(f"worker {number}: exit code {workers[number].returncode}, {' '.join(said)} ({log})", file=sys.stderr)
    return 1 if failed else 0


def _device(worker: int) -> dict[str, str]:
    """One of this process's GPUs a worker, in turn."""
    count = torch.cuda.device_count()
    if not count:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(device) for device in range(count)]
    return {"CUDA_VISIBLE_DEVICES": devices[worker % len(devices)]}


def report_study(arguments: argparse.Namespace) -> int:
    study = Study.load(arguments.study)
    print(Table(study).summary())
    print(write_page(make_report(study)))
    return 0


def transfer_study(arguments: argparse.Namespace) -> int:
    study = Study.load(arguments.study)
    print("\n".join(write_target(study, arguments.to, arguments.output, arguments.trial)))
    return 0


def show_cost(arguments: argparse.Namespace) -> int:
    search = load_search(arguments.config, arguments.overrides)
    target = arguments.to or search.target
    if target is None:
        raise ConfigError(f"{arguments.config} names no target: give one with --to")
    print(cost_of(search, search.proxy(), load_config(target)).describe())
    return 0


if __name__ == "__main__":
    run(main)
