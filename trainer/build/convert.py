"""A checkpoint of one engine written anew by another: fsdp2 <-> zero."""

import shutil
from pathlib import Path

import torch

from ..checkpoint.compatible import check_same_engine, check_same_model
from ..checkpoint.meta import read_meta
from ..checkpoint.resume import engine_identity
from ..checkpoint.write import Checkpointer
from ..collectives import on_rank_0
from ..config.keys import plain
from ..config.schema import TrainConfig
from ..ema import EMA
from ..parallel.engine import Engine
from ..parallel.mesh import World
from ..recovery.skipped_ranges import FILE as JUMPS
from ..state import TrainState
from .engine import build_engine, build_mup_table


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
