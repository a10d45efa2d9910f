"""Random SIGKILLs of a run, resumed each time, against an uninterrupted run: the logged lines must be equal.

python -m benchmarks.kills --kills 20 --output benchmarks/results/kills.json
"""

import argparse
import random
import tempfile
from pathlib import Path

from benchmarks.machine import write
from tests.distributed.runs import exact, train, train_and_kill

SETTINGS = ("train.steps=60", "train.log_every=2", "train.checkpoint_every=5", "train.validate_every=20")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        whole = exact(train(arguments.processes, Path(scratch) / "whole", *SETTINGS))
        run, kills = 0, 0
        equal = True
        while kills < arguments.kills:
            folder = Path(scratch) / f"run_{run}"
            begun = -1
            for _ in range(min(4, arguments.kills - kills)):  # a few kills in the life of one run
                begun = chance.randint(begun + 1, begun + 12)
                if begun > 50:
                    break
                step = train_and_kill(arguments.processes, folder, begun, chance.uniform(0, 0.5), *SETTINGS)
                table.append({"run": run, "killed_at_step": step})
                kills += 1
                begun = step
            same = exact(train(arguments.processes, folder, *SETTINGS)) == whole
            equal &= same
            print(f"run {run}: {'equal' if same else 'DIFFERENT'} after {kills} kills", flush=True)
            run += 1
    write(arguments.output, {"kills": table, "runs": run, "all_lines_equal": equal})
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
