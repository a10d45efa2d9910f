"""The GPU's cases of benchmarks.train_step as the estimate sees them: rows that fit, and the time of a step. A MODEL.

    python -m benchmarks.modelled --card h200 --output benchmarks/results/train_step_model_h200.json
    python -m benchmarks.modelled --card h200 --output FILE --case mmdit_2b

It needs no GPU and measures nothing. benchmarks.train_step puts the same figures beside those that it measures.
"""

import argparse
from pathlib import Path

from benchmarks.estimates import modelled_step
from benchmarks.machine import write
from benchmarks.train_step import ON_GPU, OURS, OURS_COMPILED, configured, with_rows
from trainer.estimate.cluster import CARDS, usable_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--card", choices=CARDS, required=True)
    parser.add_argument("--case", choices=ON_GPU, action="append", help="may be given several times")
    arguments = parser.parse_args()
    found = {}
    for name in arguments.case or ON_GPU:
        case = with_rows(ON_GPU[name], (), usable_bytes(CARDS[arguments.card].memory_gb))
        ours = [variant for variant in case.variants if variant in (OURS, OURS_COMPILED)]
        steps = {variant: modelled_step(configured(case, (), variant), arguments.card) for variant in ours}
        found[name] = {"config": case.config, "overrides": case.overrides, "micro_batch": case.rows, "steps": steps}
    write(arguments.output, {"MODEL": arguments.card, "cases": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
