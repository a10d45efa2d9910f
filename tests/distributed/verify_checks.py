"""Run on several processes by test_verify.py: the way of sample.py and evaluate.py to a checkpoint, with the bytes
counted of which a digest is made, and the weights' loading told in place of done."""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

import trainer.build.inference
import trainer.checkpoint.checksums
from launch.common import inference
from trainer.errors import CheckpointError
from trainer.parallel.mesh import World

file_digest = trainer.checkpoint.checksums.file_digest
found: dict[str, Any] = {"bytes": 0, "loaded": "", "refused": ""}


def counted(path: Path) -> str:
    found["bytes"] += path.stat().st_size
    return file_digest(path)


def load(config: object, checkpoint: Path, world: World) -> None:
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, found["bytes"], group=world.control)  # of all ranks at the first load
    found.update(loaded=checkpoint.name, bytes=everyone)


def main() -> None:
    trainer.checkpoint.checksums.file_digest = counted
    trainer.build.inference.build_inference = load  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with inference(Path(sys.argv[1])):
            pass
    except CheckpointError as error:
        found["refused"] = str(error)
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
