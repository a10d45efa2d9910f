"""Measure a checkpoint by a suite of configs/evaluate/: all ranks make and measure images, results.json is written.

torchrun --nproc-per-node 8 launch/evaluate.py --checkpoint runs/xl --suite imagenet_fid50k reference=FILE network=FILE
python launch/evaluate.py --checkpoint runs/demo --suite demo
python launch/evaluate.py table runs/BASELINE runs/OTHER ...     # side by side

The same command again goes on where it was stopped. Overrides are keys of the suite, or those keys of the checkpoint's
config that say where its encoders lie and how the model runs on the machine.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.redaction import message
from launch.common import Opened, add_overwrite, command, keep_files, open_checkpoint, run
from launch.processes import end_with_torchrun, importing
from trainer.config.resolve import resolve
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.evaluate.suite import SuiteConfig, digest, load_suite, split_overrides
from trainer.files import json_text, lock_folder, write_atomically
from trainer.provenance import commit

if TYPE_CHECKING:
    from trainer.parallel.mesh import World


def main() -> int:
    if sys.argv[1:2] == ["table"]:
        return table(sys.argv[2:])
    parser = command(__doc__, config=False, overrides="key=value")
    parser.epilog = "command within it:\n  {table}  evaluations side by side; it has a --help of its own"
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, a snapshot or a run folder")
    parser.add_argument("--suite", required=True, help="a name under configs/evaluate/, or a path")
    parser.add_argument("--output", type=Path, help="folder; RUN/evaluate/SUITE/step_XXXXXXXX unless given")
    parser.add_argument("--weights", choices=("ema", "live"), default="ema", help="which weights (default: ema)")
    arguments = parser.parse_args()
    end_with_torchrun()
    of_suite, of_config = split_overrides(arguments.overrides)
    name, suite = load_suite(arguments.suite, of_suite)
    from trainer.parallel.mesh import open_ranks

    with open_ranks() as ranks:
        opened = open_checkpoint(Path(os.path.abspath(arguments.checkpoint)), ranks=ranks)
        config = suite.applied(opened.config, of_config)
        folder = arguments.output or default_folder(opened, name, arguments.weights)
        world = ranks.world(resolve(config, ranks.size).shard)
        evaluate(opened, config, name, suite, arguments.weights, folder, world)
    return 0


def default_folder(opened: Opened, suite: str, weights: str) -> Path:
    """The folder for the results of a run's checkpoint; ConfigError where it is in no run folder."""
    if opened.folder.parent.name not in ("checkpoints", "ema"):
        raise ConfigError(
            f"--checkpoint {opened.folder} lies in no run's folder: give --output, a folder for the results"
        )
    step = f"step_{opened.meta['step']:08d}" + ("" if weights == "ema" else "_live")
    return opened.folder.parent.parent / "evaluate" / suite / step


def evaluate(
    opened: Opened, config: TrainConfig, name: str, suite: SuiteConfig, weights: Any, folder: Path, world: "World"
) -> None:
    """Make the images that the folder lacks, measure all images, write results.json."""
    with importing():
        from trainer.build.inference import build_inference
        from trainer.collectives import on_rank_0
        from trainer.evaluate.evaluation import prepare
        from trainer.evaluate.results import claim, describe, machine, make_images, measure_images

    model = build_inference(config, opened.folder, world, weights)
    evaluation = prepare(suite, config.data.resolution, config.label_classes, world.device, world.control)
    encoders = model.encoders.fingerprints()
    protocol = suite.protocol({**evaluation.contents, "vae": encoders["autoencoder"]})
    identity = {
        "suite": name,
        "protocol_hash": digest(protocol),
        "checkpoint": {
            "run": config.run.name,
            "step": opened.meta["step"],
            "weights": weights,
            "ema_decay": config.ema.decays[0] if weights == "ema" else None,
            "table_hash": opened.meta["mup"]["sha256"],
            "files_hash": digest(opened.meta.get("files", {})),
            "text_encoder": encoders.get("text_encoder"),
        },
    }
    lock = on_rank_0(world, lambda: lock_folder(folder, other="another --output"))
    on_rank_0(world, lambda: claim(folder, identity))
    began = time.monotonic()
    made = make_images(evaluation, model.generate, folder)
    making_s = time.monotonic() - began
    figures = measure_images(evaluation, folder)
    if world.rank == 0:
        results = {
            **identity,
            "metrics": {key: score._asdict() for key, score in figures.items()},
            "images": len(evaluation.prompts),
            "protocol": protocol,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit(),
            "machine": machine(evaluation),
            "seconds": {"images_made": made, "making": making_s, "all": time.monotonic() - began},
        }
        write_atomically(folder / "results.json", json_text(results, indent=1) + "\n")
        print(describe(results, folder))
    del lock  # held until here


def table(given: Sequence[str]) -> int:
    """evaluate.py table."""
    from trainer.evaluate import compare_runs

    parser = command(compare_runs.__doc__, config=False, overrides=None, name="table")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the baseline first")
    parser.add_argument("--output", type=Path, help="folder of table.md, .json and .png; runs/table unless given")
    add_overwrite(parser)
    parser.add_argument("--weights", choices=("ema", "live"), default="ema", help="whose figures are compared")
    arguments = parser.parse_args(given)
    if arguments.output is not None:
        keep_files(arguments.overwrite, *(arguments.output / f"table.{kind}" for kind in ("md", "json", "png")))
    folder = arguments.output or Path("runs/table")
    print(message(compare_runs.write_table(arguments.runs, folder, arguments.weights)))
    return 0


if __name__ == "__main__":
    run(main)
