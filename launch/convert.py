"""A checkpoint of one engine as a run folder that the other engine resumes: fsdp2 <-> zero.

torchrun --nproc-per-node 8 launch/convert.py --checkpoint runs/a --output runs/b --engine fsdp2
torchrun --nproc-per-node 8 launch/convert.py --checkpoint runs/b --output runs/c --engine zero --zero-stage 2
torchrun --nproc-per-node 8 launch/train.py --config NAME run.name=c parallel.engine=zero parallel.zero_stage=2

The number of processes is that of the zero side; both engines are in memory at once. DeepSpeed's files are pickles,
which run code when they are read: convert none but your own.
"""

import argparse
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from launch.common import run
from trainer.build.engine import build_engine, build_mup_table
from trainer.checkpoint.compatible import check_same_engine, check_same_model, convert_command, engine_of
from trainer.checkpoint.find import complete_checkpoints, find_checkpoint, read_meta
from trainer.checkpoint.resume import engine_identity
from trainer.checkpoint.write import Checkpointer
from trainer.collectives import on_rank_0
from trainer.config.keys import plain
from trainer.config.load import parse
from trainer.config.resolve import resolve
from trainer.config.schema import TrainConfig
from trainer.ema import EMA
from trainer.errors import CheckpointError
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import World, init_world, world_size
from trainer.recovery.skipped_ranges import FILE as JUMPS
from trainer.state import TrainState


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint or a run folder")
    parser.add_argument("--output", type=Path, required=True, help="the new run folder")
    parser.add_argument("--engine", choices=("fsdp2", "zero"), required=True)
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=2, help="of --engine zero")
    arguments = parser.parse_args()
    checkpoint = find_checkpoint(arguments.checkpoint)
    meta = read_meta(checkpoint)
    written = engine_of(meta)
    if written["name"] == arguments.engine:
        raise CheckpointError(f"{checkpoint} was written by parallel.engine {arguments.engine} already")
    if written["name"] == "zero" and written["world_size"] != world_size():
        raise CheckpointError(
            f"{checkpoint} is of {written['world_size']} processes, this command runs on {world_size()}: "
            f"{convert_command(meta, {}, checkpoint)} --engine fsdp2"
        )
    if complete_checkpoints(arguments.output / "checkpoints"):
        raise CheckpointError(f"{arguments.output} has checkpoints: give a new folder")
    common = ["parallel.shard=0", "parallel.cpu_offload=false", "parallel.reshard_after_forward=true"]
    source, target = (
        parse(
            meta["config"],
            f"the config of {checkpoint}",
            [*common, f"parallel.engine={name}", f"parallel.zero_stage={stage}"],
        )
        for name, stage in ((written["name"], written.get("stage", 2)), (arguments.engine, arguments.zero_stage))
    )
    world = init_world(resolve(target, world_size()).shard)
    try:
        convert(checkpoint, source, target, arguments.output, world)
    finally:
        dist.destroy_process_group()
    return 0


def convert(checkpoint: Path, source: TrainConfig, target: TrainConfig, output: Path, world: World) -> None:
    """Read the checkpoint into the engine of `source`, copy by name, write from the engine of `target`."""
    meta, table = read_meta(checkpoint), build_mup_table(source)
    check_same_model(meta, table.to_json(), checkpoint, rules=True)
    check_same_engine(meta, engine_identity(source, world), checkpoint)
    old, new = (build_engine(config, table, world) for config in (source, target))
    averages = [EMA(engine.master_shards(), source.ema.decays, source.ema.warmup).tensors() for engine in (old, new)]
    state = TrainState.start(world.device).tensors()
    old.load(checkpoint, {**averages[0], **state})
    copy_state(old, new)
    for key, shard in averages[0].items():
        name = key.partition("/")[2]
        averages[1][key].copy_(new.cut(name, old.whole(name, shard)))
    if world.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", JUMPS):
            if (file := checkpoint.parent.parent / name).is_file():
                shutil.copy(file, output / name)
    meta |= {"config": plain(target), "engine": engine_identity(target, world)}
    writer = Checkpointer(output, new, world.checkpoint, keep_last=1, keep_every=0, asynchronous=False, tell=print)
    writer.save(meta["step"], {**averages[1], **state}, meta, wait=True)
    on_rank_0(world, lambda: print(f"{checkpoint} as {target.parallel.engine}: {output}"))


@torch.no_grad()
def copy_state(old: Engine, new: Engine) -> None:
    """Weights, moments and step counts, one parameter at a time."""
    theirs, ours = old.state(), new.state()
    for name, state in ours.items():
        for key, shard in state.items():
            tensor = theirs[name][key]
            shard.copy_(tensor if key == "step" else new.cut(name, old.whole(name, tensor)))


if __name__ == "__main__":
    run(main)
