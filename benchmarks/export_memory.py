"""Peak memory of launch/export.py at full size: a checkpoint of holes, streamed into weights of holes.

    python -m benchmarks.export_memory --config mmdit_18b_mup.yaml --output benchmarks/results/export_memory.json

The checkpoint's files have the true sizes and take no room on disk: their tensors are zeros that were never written.
They are read through as real ones are; what comes out is looked at and left a hole as well.
"""

import argparse
import io
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

from benchmarks.machine import write
from export import write as export_write
from export.weight_files import SafetensorsWriter
from trainer.build.engine import build_mup_table
from trainer.config.load import load_config
from trainer.parallel.dcp import TensorReader


class HoleWriter(SafetensorsWriter):
    """Zeros are what a file that was only made long enough holds already."""

    def write(self, name: str, at: int, values: Tensor) -> None:
        if values.any():
            super().write(name, at, values)


class HoleFile(io.FileIO):
    """Leaves out blocks of zeros."""

    def write(self, data: Any) -> int:
        if np.frombuffer(data, np.uint8).any():
            return super().write(data)
        self.seek(len(data), io.SEEK_CUR)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.truncate(self.tell())
        super().close()


class HoleFiles(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with (HoleFile if mode == "wb" else io.FileIO)(path, mode) as file:
            yield file


def write_holes(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A checkpoint of one rank with fp32 zeros of these shapes, by full name."""
    writer = dcp.FileSystemWriter(folder, sync_files=False)
    writer.fs = HoleFiles()
    # numpy asks the kernel for zeros: pages that are only read are never made.
    tensors = {name: torch.from_numpy(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    dcp.save(tensors, storage_writer=writer, no_dist=True)


def peak_bytes() -> int:
    """The most memory that this process had since the peak was last forgotten."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mmdit_18b_mup.yaml")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    table = build_mup_table(config)
    shapes = {f"model/{name}": tuple(row.shape) for name, row in table.rows.items()}
    sizes = [4 * math.prod(shape) for shape in shapes.values()]
    export_write.SafetensorsWriter = HoleWriter  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_holes(folder / "from", shapes)
        reader = TensorReader(folder / "from")
        reader.read("model/final.bias")  # a first read imports
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, began = peak_bytes(), time.perf_counter()
        to = export_write.layout_of(config, table, "diffusers")
        export_write.write_weights(reader, "model", table, config, to, folder / "to", "w", 5 * 2**30)
        seconds, peak = time.perf_counter() - began, peak_bytes() - before
        files = list((folder / "to").glob("*.safetensors"))
        on_disk = sum(512 * file.stat().st_blocks for file in folder.rglob("*") if file.is_file())
        written = sum(file.stat().st_size for file in files)
    write(arguments.output, {
        "config": arguments.config, "overrides": arguments.overrides, "parameters": sum(sizes) // 4,
        "checkpoint_gib": sum(sizes) / 2**30, "largest_tensor_mib": max(sizes) / 2**20,
        "peak_mib": peak / 2**20, "peak_over_largest_tensor": peak / max(sizes),
        "files": len(files), "files_gib": written / 2**30, "on_disk_mib": on_disk / 2**20, "seconds": round(seconds, 1),
    })  # fmt: skip


if __name__ == "__main__":
    main()
