"""Measure a checkpoint by a suite of configs/evaluate/: images made and measured on all ranks, results.json.

torchrun --nproc-per-node 8 launch/evaluate.py --checkpoint runs/xl --suite imagenet_fid50k reference=FILE network=FILE
python launch/evaluate.py --checkpoint runs/demo --suite demo
python launch/evaluate.py table runs/BASELINE runs/OTHER ...     # side by side: trainer/evaluate/compare_runs.py

The same command again goes on where it was stopped. Overrides are keys of the suite, and those of the checkpoint's
config that say where its encoders lie and how the model runs on the machine.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.errors import DataError
from data.image_sets import read_images, write_images
from launch.common import end_with_torchrun, run
from trainer.build.inference import Inference, build_inference
from trainer.checkpoint.find import find_checkpoint, read_meta
from trainer.collectives import on_rank_0
from trainer.config.load import parse
from trainer.config.resolve import resolve
from trainer.errors import ConfigError
from trainer.evaluate import compare_runs as evaluate_table
from trainer.evaluate.evaluation import Evaluation, prepare
from trainer.evaluate.suite import digest, load_suite, split_overrides
from trainer.files import lock_folder, write_atomically
from trainer.parallel.mesh import World, init_world, world_size
from trainer.provenance import commit


def main() -> int:
    if sys.argv[1:2] == ["table"]:
        return evaluate_table.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, a snapshot or a run folder")
    parser.add_argument("--suite", required=True, help="a name under configs/evaluate/, or a path")
    parser.add_argument("--output", type=Path, help="folder; RUN/evaluate/SUITE/step_XXXXXXXX unless given")
    parser.add_argument("--weights", choices=("ema", "live"), default="ema")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    end_with_torchrun()
    checkpoint = Path(os.path.abspath(find_checkpoint(arguments.checkpoint)))
    meta = read_meta(checkpoint)
    of_suite, of_config = split_overrides(arguments.overrides)
    name, suite = load_suite(arguments.suite, of_suite)
    # However the run was sharded: here the ranks that there are share one copy of the weights.
    trained = parse(meta["config"], f"the config of {checkpoint}", ["parallel.shard=0"])
    config = suite.applied(trained, of_config)
    step = f"step_{meta['step']:08d}" + ("" if arguments.weights == "ema" else "_live")
    if arguments.output is None and checkpoint.parent.name not in ("checkpoints", "ema"):
        raise ConfigError(f"--checkpoint {checkpoint} lies in no run's folder: give --output, a folder for the results")
    folder = arguments.output or checkpoint.parent.parent / "evaluate" / name / step
    world = init_world(resolve(config, world_size()).shard)
    try:
        model = build_inference(config, checkpoint, world, arguments.weights)
        evaluation = prepare(suite, config.data.resolution, config.label_classes, world.device, world.control)
        encoders = model.frozen.fingerprints()
        protocol = suite.protocol({**evaluation.contents, "vae": encoders["autoencoder"]})
        identity = {
            "suite": name,
            "protocol_hash": digest(protocol),
            "checkpoint": {
                "run": config.run.name,
                "step": meta["step"],
                "weights": arguments.weights,
                "ema_decay": config.ema.decays[0] if arguments.weights == "ema" else None,
                "table_hash": meta["mup"]["sha256"],
                "files_hash": digest(meta.get("files", {})),
                "text_encoder": encoders.get("text_encoder"),
            },
        }
        lock = on_rank_0(world, lambda: lock_folder(folder, other="another --output"))
        on_rank_0(world, lambda: claim(folder, identity))
        began = time.monotonic()
        made = make_images(evaluation, model, folder, world)
        generated_s = time.monotonic() - began
        figures = evaluation.measure(lambda batch: read_images(shard(folder, batch), evaluation.batches[batch]))
        if world.rank == 0:
            results = {
                **identity,
                "metrics": {key: score._asdict() for key, score in figures.items()},
                "images": len(evaluation.prompts),
                "protocol": protocol,
                "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "commit": commit(),
                "machine": {
                    "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
                    "processes": world.size,
                    "torch": torch.__version__,
                },
                "seconds": {"images_made": made, "making": generated_s, "all": time.monotonic() - began},
            }
            write_atomically(folder / "results.json", json.dumps(results, indent=1) + "\n")
            report(results, folder)
        del lock  # held until here
    finally:
        dist.destroy_process_group()
    return 0


def shard(folder: Path, batch: int) -> Path:
    return folder / f"images-{batch:06d}.tar"


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Begin or go on with an evaluation in a folder; DataError where it holds something else."""
    file = folder / "evaluation.json"
    if not file.is_file():
        if any(folder.glob("*.tar")):
            raise DataError(f"--output {folder} holds other files: choose another folder")
        write_atomically(file, json.dumps(identity, indent=1) + "\n")
    elif json.loads(file.read_text()) != identity:
        raise DataError(
            f"--output {folder} holds an evaluation of another checkpoint, or by another protocol: choose another "
            "folder, or remove it"
        )


def make_images(evaluation: Evaluation, model: Inference, folder: Path, world: World) -> int:
    """Make the batches that the folder lacks, shared out over the ranks; returns how many images were made."""
    suite, batches = evaluation.suite, evaluation.batches
    missing: list[Any] = [[batch for batch in range(len(batches)) if not shard(folder, batch).is_file()]]
    dist.broadcast_object_list(missing, src=0, group=world.control)
    rounds, began = -(-len(missing[0]) // world.size), time.monotonic()
    for turn, (batch, counts) in enumerate(evaluation.own_batches(missing[0]), 1):
        images = evaluation.make(model.generate, batch)
        if counts:
            numbers = batches[batch]
            prompts = [evaluation.prompts[i] for i in numbers]
            write_images(shard(folder, batch), numbers, images, prompts, suite.image_format, suite.jpeg_quality)
        if world.rank == 0:
            left_s = (time.monotonic() - began) / turn * (rounds - turn)
            print(f"batch {turn} of {rounds} on each of {world.size} processes, {left_s:.0f} s left", flush=True)
    dist.barrier(group=world.control)  # all are written before any is read
    return sum(len(batches[batch]) for batch in missing[0])


def report(results: dict[str, Any], folder: Path) -> None:
    of = results["checkpoint"]
    print(f"{results['suite']}: {of['run']}, step {of['step']}, {of['weights']} weights, {results['images']} images")
    for key, score in results["metrics"].items():
        error = "" if score["standard_error"] is None else f" ± {score['standard_error']:.2g}"
        print(f"  {key:28} {score['value']:.4f}{error}")
    print(f"  {folder / 'results.json'}")


if __name__ == "__main__":
    run(main)
