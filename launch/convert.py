"""A checkpoint of one engine as a run folder that the other engine resumes: fsdp2 <-> zero.

torchrun --nproc-per-node 8 launch/convert.py --checkpoint runs/a --output runs/b --engine fsdp2
torchrun --nproc-per-node 8 launch/convert.py --checkpoint runs/b --output runs/c --engine zero --zero-stage 2
torchrun --nproc-per-node 8 launch/train.py --config NAME run.name=c parallel.engine=zero parallel.zero_stage=2

The number of processes is that of the zero side. Both engines are in memory at once. DeepSpeed's files are pickles,
which run code when they are read: convert none but your own. One with files of another user needs --trust-pickles.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from launch.common import add_overwrite, command, keep_files, run
from launch.processes import importing
from trainer.config.load import parse
from trainer.config.resolve import resolve
from trainer.errors import CheckpointError

if TYPE_CHECKING:
    from trainer.parallel.mesh import Ranks


def main() -> int:
    parser = command(__doc__, config=False, overrides=None)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint or a run folder")
    parser.add_argument("--output", type=Path, required=True, help="the new run folder")
    parser.add_argument("--engine", choices=("fsdp2", "zero"), required=True, help="to convert to")
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=2, help="of --engine zero (default: 2)")
    parser.add_argument("--trust-pickles", action="store_true", help="read one of zero that another user may have made")
    add_overwrite(parser)
    arguments = parser.parse_args()
    keep_files(arguments.overwrite, arguments.output, folder=True)
    from trainer.parallel.mesh import open_ranks

    with open_ranks() as ranks:
        write_converted(arguments, ranks)
    return 0


def write_converted(arguments: argparse.Namespace, ranks: "Ranks") -> None:
    """Verify, check and convert. Raises CheckpointError and ConfigError."""
    with importing():
        from trainer.build.convert import convert
        from trainer.checkpoint.compatible import check_pickles, convert_command, engine_of
        from trainer.checkpoint.find import complete_checkpoints, find_checkpoint
        from trainer.checkpoint.meta import read_meta

    checkpoint = find_checkpoint(arguments.checkpoint, ranks.control)
    meta = read_meta(checkpoint)
    written = engine_of(meta)
    check_pickles(meta, checkpoint, arguments.trust_pickles, "--trust-pickles")
    if written["name"] == arguments.engine:
        raise CheckpointError(f"{checkpoint} was written by parallel.engine {arguments.engine} already")
    if written["name"] == "zero" and written["world_size"] != ranks.size:
        raise CheckpointError(
            f"{checkpoint} is of {written['world_size']} processes, this command runs on {ranks.size}: "
            f"{convert_command(meta, {}, checkpoint)} --engine fsdp2"
        )
    if complete_checkpoints(arguments.output / "checkpoints"):
        raise CheckpointError(f"{arguments.output} has checkpoints: give a new folder")
    common = ["parallel.shard=0", "parallel.cpu_offload=false", "parallel.reshard_after_forward=true"]
    common.append("parallel.cuda_graph=false")
    source, target = (
        parse(
            meta["config"],
            f"the config of {checkpoint}",
            [*common, f"parallel.engine={name}", f"parallel.zero_stage={stage}"],
        )
        for name, stage in ((written["name"], written.get("stage", 2)), (arguments.engine, arguments.zero_stage))
    )
    convert(checkpoint, source, target, arguments.output, ranks.world(resolve(target, ranks.size).shard))


if __name__ == "__main__":
    run(main)
