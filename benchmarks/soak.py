"""Random SIGKILLs in every phase of a run, of the commands that write much and of a search, in pieces that add up.

    python -m benchmarks.soak --minutes 60 --output benchmarks/results/soak.json

Each piece has a seed of its own, kills, starts again, and compares with what was never killed. Pieces are added to the
JSON as they end, so that the soak goes on from day to day; the kills are counted by the moment at which they came.
"""

import argparse
import datetime
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import kills_commands, kills_study, kills_train
from benchmarks.machine import machine
from data.files import temporary_beside
from tests.integration import slurm

Piece = Callable[[int, int, Path], Iterator[dict[str, Any]]]
_STAGES = (
    "data.resolution=16",
    "stages=[{until: 45}, {until: 85, data: {resolution: 32}, train: {global_batch_size: 12}}, "
    "{data: {resolution: 16}, train: {global_batch_size: 8}, optim: {warmup_steps: 5}}]",
)  # whose borders lie between two checkpoints
# What is killed, and how often in one piece.
PIECES: dict[str, tuple[Piece, int]] = {
    "train": (kills_train.kills, 24),
    "muon": (partial(kills_train.kills, more=("optim.kind=muon", "optim.weight_decay=0.1")), 25),
    "stages": (partial(kills_train.kills, more=_STAGES), 25),
    "commands": (kills_commands.kills, 30),
    "study": (kills_study.kills, 8),
    "slurm": (partial(kills_study.kills, on_slurm=True), 4),
}


def soak(name: str, seed: int) -> dict[str, Any]:
    """One piece: kills by moment, and whether all that was compared was equal."""
    piece, count = PIECES[name]
    began, moments, equal = time.monotonic(), Counter[str](), []
    with tempfile.TemporaryDirectory() as scratch:
        for entry in piece(seed, count, Path(scratch)):
            print(f"{name} {seed}: {entry}", flush=True)
            moments.update([entry["moment"]] if "moment" in entry else [])
            equal += [entry["equal"]] if "equal" in entry else []
    return {
        "piece": name,
        "seed": seed,
        "kills": dict(moments),
        "compared": len(equal),
        "equal": sum(equal),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "date": datetime.date.today().isoformat(),
        "cpu": machine()["cpu"],
    }


def add(path: Path, piece: dict[str, Any]) -> dict[str, Any]:
    """The results with one more piece, written at once."""
    pieces = [*(json.loads(path.read_text())["pieces"] if path.exists() else []), piece]
    kills = sum((Counter(each["kills"]) for each in pieces), Counter[str]())
    results = {
        "kills": kills.total(),
        "by_moment": dict(kills.most_common()),
        "compared": sum(each["compared"] for each in pieces),
        "equal": sum(each["equal"] for each in pieces),
        "pieces": pieces,
    }
    with temporary_beside(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="no piece begins later (default: %(default)s)")
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if without := slurm.why_not():
        print(f"without jobs of Slurm: {without}")
    names = [name for name in arguments.pieces if name != "slurm" or not without]
    if not names:
        return 1
    deadline = time.monotonic() + 60 * arguments.minutes
    done = len(json.loads(arguments.output.read_text())["pieces"]) if arguments.output.exists() else 0
    while time.monotonic() < deadline:
        results = add(arguments.output, soak(names[done % len(names)], seed=done))
        done += 1
        print({key: value for key, value in results.items() if key != "pieces"}, flush=True)
        if results["equal"] != results["compared"]:
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
