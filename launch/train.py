"""Train a config, or resume its run folder: the same command again continues from the newest checkpoint.

torchrun --nproc-per-node 2 launch/train.py --config mmdit_demo_mup.yaml [section.key=value ...]
python launch/train.py --config mmdit_debug_mup.yaml
srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 python launch/train.py --config mmdit_2b_mup.yaml

SIGTERM, SIGUSR1, SIGINT (Ctrl-C), SIGHUP and SIGQUIT to a worker save and end all of them within two steps; a second
Ctrl-C ends at once. torchrun passes signals on if it is told to:
torchrun --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 600 ... launch/train.py ...
(or PET_SIGNALS_TO_HANDLE and PET_SHUTDOWN_TIMEOUT in the environment). `mudit train` starts it so on all GPUs, or on
--gpus N of them.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from launch.common import command, run
from launch.processes import end_with_torchrun, importing
from trainer.config.help import describe_keys
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.config.schema import TrainConfig
from trainer.config.stages import stages_of
from trainer.errors import DeviceMemoryError, PeerError
from trainer.recovery.signals import Signals


class HelpConfig(argparse.Action):
    """Print what the keys of a config mean and exit, as --help does."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: Any, option: str | None = None
    ) -> None:
        print(describe_keys(values))
        parser.exit()


def read_config() -> TrainConfig:
    """The config of the command line. Raises ConfigError."""
    parser = command(__doc__)
    parser.add_argument(
        "--help-config",
        action=HelpConfig,
        nargs="?",
        metavar="SECTION",
        help="explain the config's keys, or a section's",
    )
    arguments = parser.parse_args()
    return load_config(arguments.config, arguments.overrides)


def say_start(config: TrainConfig) -> None:
    """A line before what is slow to import, from rank 0. To a terminal alone: elsewhere a refusal, such as of shards
    that are not there, has to stand by itself."""
    if os.environ.get("RANK", "0") != "0" or not os.isatty(2):
        return
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    print(
        f"{config.run.folder}: {config.model.kind}, {config.train.steps} steps, {processes} "
        f"{'process' if processes == 1 else 'processes'}; starting takes up to a minute",
        file=sys.stderr,
        flush=True,
    )


def foreign_validation(config: TrainConfig, words: Sequence[str]) -> str | None:
    """A warning where the command line gives other training shards, and the config has validation shards of its own."""
    given = {word.partition("=")[0] for word in words}
    if config.data.val_shards is None or not given & {"data.shards", "data.sources"} or "data.val_shards" in given:
        return None
    return (
        f"warning: validation and sample prompts are still of data.val_shards={config.data.val_shards}, which the "
        "config names; data.val_shards=null takes them from the training data that you gave"
    )


def main() -> int:
    end_with_torchrun()
    with Signals(at_once=True) as signals:  # while training the loop hears them
        config = read_config()
        say_start(config)
        return _train(config, signals)


def _train(config: TrainConfig, signals: Signals) -> int:
    # What is slow to import comes only now: --help and a wrong key are answered at once.
    with importing():
        from export.forms import export_note
        from trainer.build.run import build_run, release_memory, stage_of
        from trainer.collectives import from_rank_0
        from trainer.estimate.micro_batch import find_fitting, telling_out_of_memory
        from trainer.loop import train
        from trainer.monitor.records import write_status
        from trainer.parallel.mesh import open_world, world_size
        from trainer.recovery.watchdog import watched_build

    folder = config.run.folder
    # Before the world opens: what is simulated has a world of its own.
    finds = [find_fitting(stage.config, world_size(), folder) for stage in stages_of(config)]
    with open_world(resolve(config, world_size()).shard) as world:
        fittings = [from_rank_0(world, find) for find in finds]
        sizes = [fitting and fitting.size for fitting in fittings]

        def train_stage() -> str:
            stage = from_rank_0(world, lambda: stage_of(config))
            with telling_out_of_memory(stage.config, fittings[stage.number], world.size, folder):
                with watched_build(config.train.watchdog_factor, config.train.watchdog_min_s, signals) as hold:
                    try:
                        job = build_run(config, world, hold, sizes)
                    except ValueError as error:  # a user's mistake; the stages before have trained already
                        if stage.number and world.rank == 0:
                            write_status(folder, "failed", stage.first_step, str(error))
                        raise
                for note in (export_note(stage.config), foreign_validation(config, sys.argv[1:])):
                    if note:
                        job.metrics.say(note)
                with job.lock or contextlib.nullcontext():
                    try:
                        outcome = train(job)
                    finally:
                        job.metrics.close()
            ended = f"{job.plan.stage} has ended" if outcome == "running" else outcome
            job.metrics.say(f"{ended} at step {job.state.step}: {job.folder}")
            return outcome

        try:
            while train_stage() == "running":
                release_memory()
        except (PeerError, DeviceMemoryError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)  # groups that have lost a rank, or are about to, cannot be left in order: NCCL would wait
    return 0


if __name__ == "__main__":
    run(main)
