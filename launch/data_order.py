"""What each step will see, read through the same readers of each rank as in training: one JSON line per step.

A line holds the keys of the step's samples, and in a run of several buckets the step's bucket: height and width in
pixels, and the most tokens of a caption. Where the run's folder is there, the ranges of samples that the run has
skipped after a rollback are skipped here too.

python launch/data_order.py --config mmdit_demo_mup.yaml --world-size 4 --from-step 0 --to-step 10
"""

import dataclasses
import json

from launch.common import command, run
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.input.stream import follow
from trainer.input.training_data import TrainingData
from trainer.parallel.mesh import open_world
from trainer.recovery.skipped_ranges import data_step, read_skipped_ranges


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
    # All ranks read in this process: without reader processes, and together within the memory of one rank.
    data = dataclasses.replace(config.data, num_workers=0, prefetch_mib=max(1, config.data.prefetch_mib // size))
    config = config.model_copy(update={"data": data})
    resolved = resolve(config, size)
    skipped_ranges, step = read_skipped_ranges(config.run.folder), first
    with open_world(1) as world:
        source = TrainingData(config, resolved, world)
        readers = [
            follow(source.reader(rank, size).batches, lambda: data_step(step, skipped_ranges)) for rank in range(size)
        ]
        for step in range(first, last):
            # Ranks own contiguous ranges of slots, so this is the order of the global batch.
            batches = [batch for reader in readers for batch in next(reader)]
            keys = [name for batch in batches for name in batch.names if name]
            bucket = batches[0].bucket
            print(json.dumps({"step": step, "keys": keys} | ({"bucket": bucket._asdict()} if bucket else {})))
    return 0


if __name__ == "__main__":
    run(main)
