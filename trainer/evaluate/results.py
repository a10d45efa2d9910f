"""The folder of one evaluation: begun once, filled with images by all ranks, its results written in the end."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.errors import DataError
from data.files import parse_json
from data.image_sets import read_images, write_images

from ..files import write_atomically
from .evaluation import Evaluation
from .generate import Generator
from .metrics import Score


def shard(folder: Path, batch: int) -> Path:
    """The tar of a batch's images."""
    return folder / f"images-{batch:06d}.tar"


def claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Begin or go on with an evaluation in a folder; DataError where it holds something else."""
    file = folder / "evaluation.json"
    for leftover in folder.glob(".*.tmp"):  # of a killed process, since the caller holds the folder
        leftover.unlink()
    if not file.is_file():
        if any(folder.glob("*.tar")) or (folder / "results.json").exists():
            raise DataError(f"--output {folder} holds other files: choose another folder")
        write_atomically(file, json.dumps(identity, indent=1) + "\n")
        return
    try:
        held = parse_json(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}): remove it to measure anew, or choose another --output") from None
    if held != identity:
        raise DataError(
            f"--output {folder} holds an evaluation of another checkpoint, or by another protocol: choose another "
            "folder, or remove it"
        )


def make_images(evaluation: Evaluation, generate: Generator, folder: Path) -> int:
    """Make the batches that the folder lacks, shared out over the ranks; returns how many images were made."""
    suite, batches, group = evaluation.suite, evaluation.batches, evaluation.group
    size = dist.get_world_size(group)
    missing: list[Any] = [[batch for batch in range(len(batches)) if not shard(folder, batch).is_file()]]
    dist.broadcast_object_list(missing, src=0, group=group)
    rounds, began = -(-len(missing[0]) // size), time.monotonic()
    for turn, (batch, counts) in enumerate(evaluation.own_batches(missing[0]), 1):
        images = evaluation.make(generate, batch)
        if counts:
            numbers = batches[batch]
            prompts = [evaluation.prompts[i] for i in numbers]
            write_images(shard(folder, batch), numbers, images, prompts, suite.image_format, suite.jpeg_quality)
        if dist.get_rank(group) == 0:
            left_s = (time.monotonic() - began) / turn * (rounds - turn)
            print(f"batch {turn} of {rounds} on each of {size} processes, {left_s:.0f} s left", flush=True)
    dist.barrier(group=group)  # all are written before any is read
    return sum(len(batches[batch]) for batch in missing[0])


def measure_images(evaluation: Evaluation, folder: Path) -> dict[str, Score]:
    """The figures of the images in the folder, on rank 0 (elsewhere {})."""
    return evaluation.measure(lambda batch: read_images(shard(folder, batch), evaluation.batches[batch]))


def machine(evaluation: Evaluation) -> dict[str, Any]:
    """On what the images were made."""
    return {
        "device": torch.cuda.get_device_name() if evaluation.device.type == "cuda" else "cpu",
        "processes": dist.get_world_size(evaluation.group),
        "torch": torch.__version__,
    }


def describe(results: Mapping[str, Any], folder: Path) -> str:
    """results.json for a terminal."""
    of = results["checkpoint"]
    lines = [f"{results['suite']}: {of['run']}, step {of['step']}, {of['weights']} weights, {results['images']} images"]
    for key, score in results["metrics"].items():
        error = "" if score["standard_error"] is None else f" ± {score['standard_error']:.2g}"
        lines.append(f"  {key:28} {score['value']:.4f}{error}")
    return "\n".join([*lines, f"  {folder / 'results.json'}"])
