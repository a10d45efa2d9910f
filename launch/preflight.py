"""Look for the slow node before a job does: rates of every process and pair of nodes, clocks, versions.

srun --nodes 32 --ntasks-per-node 8 --gpus-per-node 8 python launch/preflight.py --config mmdit_18b_mup.yaml
torchrun --nproc-per-node 2 launch/preflight.py --config mmdit_debug_mup.yaml

Every node reduces with two others, so that a bad link and a bad node can be told apart. Exits 1 and names the node
where a rate is below --least of the median, a clock is more than --clock-s off, or versions differ.
"""

import json

import torch.distributed as dist

from data.storage import open_shards, read_rate
from launch.common import command, run
from trainer.config.load import load_config
from trainer.parallel.mesh import open_world
from trainer.parallel.preflight import describe, judge, measure


def main() -> int:
    parser = command(__doc__)
    parser.add_argument(
        "--least",
        type=float,
        default=0.8,
        help="the least share of the median that a rate may have (default: %(default)s)",
    )
    parser.add_argument(
        "--clock-s", type=float, default=1.0, help="the most seconds that two clocks may differ (default: %(default)s)"
    )
    parser.add_argument(
        "--process-nodes", action="store_true", help="take every process for a node of its own (on one machine)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    with open_world(1) as world:
        data = config.data
        read = None if data.synthetic else read_rate(open_shards(data.all_sources()[0].shards), world.rank)
        found = measure(world, read, arguments.process_nodes)
        problems = judge(found, arguments.least, arguments.clock_s)
        if world.rank == 0:
            written = {"passed": not problems, "problems": problems, "processes": [each._asdict() for each in found]}
            print(json.dumps(written, indent=1) if arguments.json else describe(found, problems), flush=True)
        dist.barrier(group=world.control)  # a launcher ends all processes as soon as one exits with 1
    return 1 if problems else 0


if __name__ == "__main__":
    run(main)
