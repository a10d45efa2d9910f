"""What each step will see, read through the same readers of each rank as in training: one JSON line per step.

A line holds the keys of the step's samples, and in a run of several buckets the step's bucket: height and width in
pixels, and the most tokens of a caption. Where the run's folder is there, the ranges of samples that the run has
skipped after a rollback are skipped here too.

python launch/data_order.py --config mmdit_demo_mup.yaml --world-size 4 --from-step 0 --to-step 10
"""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial

from launch.common import command, run
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.config.schema import TrainConfig
from trainer.config.stages import stages_of
from trainer.input.begin import BeginData, begin_of
from trainer.input.stream import follow
from trainer.input.training_data import TrainingData
from trainer.parallel.mesh import World, open_world
from trainer.recovery.skipped_ranges import SkippedRange, data_step, read_skipped_ranges, skipped_before


def main() -> int:
    parser = command(__doc__)
    parser.add_argument(
        "--world-size", type=int, default=1, help="number of processes of the run that is asked about (default: 1)"
    )
    parser.add_argument("--from-step", type=int, default=0, help="first step that is shown (default: 0)")
    parser.add_argument("--to-step", type=int, required=True, help="first step that is not shown")
    arguments = parser.parse_args()
    first, last, size = arguments.from_step, arguments.to_step, arguments.world_size
    if size < 1 or not 0 <= first <= last:
        parser.error("needs --world-size of at least 1 and 0 <= --from-step <= --to-step")
    config = load_config(arguments.config, arguments.overrides)
    skipped_ranges = read_skipped_ranges(config.run.folder)
    with open_world(1) as world:
        for stage in stages_of(config):
            begin = begin_of(config, stage.number, partial(skipped_before, skipped_ranges))
            steps = range(max(first, stage.first_step), min(last, stage.last_step))
            if stage.number == stage.of - 1:  # what the run would see if it went on
                steps = range(steps.start, last)
            if steps:
                show(stage.config, begin, skipped_ranges, steps, size, world)
    return 0


def show(
    config: TrainConfig,
    begin: BeginData,
    skipped_ranges: Sequence[SkippedRange],
    steps: range,
    size: int,
    world: World,
) -> None:
    """Print the steps of a stage, as `size` processes see them. config: of the stage."""
    # All ranks read in this process: without reader processes, and together within the memory of one rank.
    data = dataclasses.replace(config.data, num_workers=0, prefetch_mib=max(1, config.data.prefetch_mib // size))
    config = config.model_copy(update={"data": data})
    source = TrainingData(config, resolve(config, size), world, begin)
    step = steps.start
    readers = [
        follow(source.reader(rank, size).batches, lambda: data_step(step, skipped_ranges)) for rank in range(size)
    ]
    for step in steps:
        # Ranks own contiguous ranges of slots, so this is the order of the global batch.
        batches = [batch for reader in readers for batch in next(reader)]
        keys = [name for batch in batches for name in batch.names if name]
        bucket = batches[0].bucket
        print(json.dumps({"step": step, "keys": keys} | ({"bucket": bucket._asdict()} if bucket else {})))


if __name__ == "__main__":
    run(main)
