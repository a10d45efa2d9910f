"""Images from the EMA weights of a checkpoint (or of a run folder's newest one), or of a snapshot in RUN/ema.

python launch/sample.py --checkpoint runs/demo --prompt "a red apple on a teal background" --output apple.png
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.distributed as dist

from launch.common import run
from trainer.build.inference import Inference, build_inference
from trainer.checkpoint.find import find_checkpoint, read_meta
from trainer.config.load import parse
from trainer.config.resolve import resolve
from trainer.evaluate.generate import save_grid
from trainer.parallel.mesh import init_world, rank, world_size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, a snapshot or a run folder")
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--output", type=Path, required=True, help="PNG file; several images make a grid")
    parser.add_argument("--count", type=int, default=1, help="images a prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. sample.guidance=3")
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error("--count must be at least 1")
    if arguments.output.suffix != ".png":
        parser.error(f"--output must end in .png, got {arguments.output}")
    checkpoint = find_checkpoint(arguments.checkpoint)
    with inference(checkpoint, arguments.overrides) as model:
        prompts = [prompt for prompt in arguments.prompt for _ in range(arguments.count)]
        images = model.images(prompts, arguments.seed)
        if rank() == 0:
            save_grid(images, arguments.output)
            print(f"{len(images)} images from the EMA weights of {checkpoint}: {arguments.output}")
    return 0


@contextlib.contextmanager
def inference(checkpoint: Path, overrides: Sequence[str]) -> Iterator[Inference]:
    """The EMA weights of a checkpoint on the processes that there are, while the block runs."""
    # However the run was sharded: here the ranks that there are share one copy of the weights.
    overrides = ["parallel.shard=0", *overrides]
    config = parse(read_meta(checkpoint)["config"], f"the config of {checkpoint}", overrides)
    world = init_world(resolve(config, world_size()).shard)
    try:
        yield build_inference(config, checkpoint, world)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
