"""Go on from a checkpoint in a new run folder, with moments, step, data position and EMA, under other schedule keys.

python launch/branch.py --checkpoint runs/a/checkpoints/step_00100000 --output runs/b train.steps=150000
torchrun --nproc-per-node 8 launch/train.py --config runs/b/config.yaml

Each loss is bit for bit that of a run which had these keys from the start, if they would not have changed the steps up
to the checkpoint. With --new-data it goes on with other data from there, such as a set that has grown, whose order
begins anew. A run that shall have nothing but the weights starts with run.init_from.
"""

from pathlib import Path

from launch.common import command, keep_files, run
from launch.processes import importing


def main() -> int:
    parser = command(__doc__, config=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, or a run folder: its newest")
    parser.add_argument("--output", type=Path, required=True, help="the new run folder")
    parser.add_argument("--trust-pickles", action="store_true", help="take one of zero that another user may have made")
    parser.add_argument("--new-data", action="store_true", help="other data from here on: keys of data.* may change")
    arguments = parser.parse_args()
    keep_files(None, arguments.output, folder=True)
    with importing():
        from trainer.build.branch import branch

    source, output = arguments.checkpoint, arguments.output
    for line in branch(source, output, arguments.overrides, arguments.trust_pickles, arguments.new_data):
        print(line)
    print(f"go on: torchrun ... launch/train.py --config {arguments.output}/config.yaml")
    return 0


if __name__ == "__main__":
    run(main)
