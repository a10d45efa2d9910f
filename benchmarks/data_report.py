"""The page of `mudit data report` on a million samples: seconds of each part, and the most memory of the process.

    python -m benchmarks.data_report --output benchmarks/results/data_report.json

One tar of 2,000 JPEG files of 512 x 512 pixels lies there under 500 names. Near duplicates are looked for among as many
hashes as there are samples: random ones, copies of one in ten with up to 3 bits changed, and one in a hundred of flat
images, whose hashes are 0 and whose colours are all different.
"""

import argparse
import os
import resource
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import write
from data.config import Bucket, DataConfig
from data.index import open_index
from data.report.duplicates import group
from data.report.of_index import read_index
from data.report.page import Settings, write_report
from data.shard_index import index_path, load_index
from data.write_shards import write_shards
from trainer.config.load import load_config
from trainer.config.resolve import buckets_of

_OF_A_SHARD, _SIDE = 2000, 512


def samples(count: int) -> Any:
    """(key, JPEG, extension, caption) of smooth random pictures with some noise."""
    rng = np.random.default_rng(0)
    for number in range(count):
        grid = Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)).resize((_SIDE, _SIDE))
        noisy = np.asarray(grid, np.int16) + rng.integers(-8, 9, (_SIDE, _SIDE, 1))
        path = Path(f"/dev/shm/mudit-{os.getpid()}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=85)
        yield f"{number:06d}", path.read_bytes(), "jpg", "a picture of " + "colours " * int(rng.integers(1, 60))
        path.unlink()


def hashes_of(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, colours) as the docstring says."""
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 1 << 64, count, np.uint64)
    colours = rng.integers(0, 1 << 24, count).astype(np.uint32)
    copies, flat = count // 10, count // 100
    bits = (np.uint64(1) << rng.integers(0, 64, (copies, 3)).astype(np.uint64)).sum(axis=1, dtype=np.uint64)
    hashes[-copies:] = hashes[:copies] ^ bits
    colours[-copies:] = colours[:copies]
    hashes[copies : copies + flat] = 0
    return hashes, colours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--decoded", type=int, default=20_000)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    seconds: dict[str, float] = {}

    def timed(name: str, since: float) -> float:
        seconds[name] = round(time.perf_counter() - since, 1)
        return time.perf_counter()

    with TemporaryDirectory() as folder:
        [first] = write_shards(samples(_OF_A_SHARD), Path(folder) / "s", _OF_A_SHARD)
        load_index(first)
        for number in range(1, args.samples // _OF_A_SHARD):
            path = first.with_name(f"s-{number:06d}.tar")
            path.hardlink_to(first)
            shutil.copy(index_path(first), index_path(path))
        cfg = DataConfig(shards=folder, index_cache=f"{folder}/index")
        config = load_config("mmdit_2b_mup", ["data.buckets=aspect"])
        buckets: list[Bucket] = buckets_of(config)
        workers = len(os.sched_getaffinity(0))
        began = time.perf_counter()
        index = open_index(cfg)
        began = timed("index packed", began)
        read_index(index, buckets, 1.0, config.train.global_batch_size)
        began = timed("index read", began)
        settings = Settings("mmdit_2b_mup", buckets, config.train.global_batch_size, (256,))
        write_report(Path(folder) / "page.html", cfg, settings, args.decoded, seed=0, workers=workers)
        began = timed(f"whole page, {args.decoded} samples decoded by {workers} processes", began)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        groups = group(*hashes_of(args.samples))
        timed("near duplicates among as many hashes", began)
        copies = args.samples // 10
        found = float((groups[-copies:] == groups[:copies]).mean())
        assert found == 1, f"{found:.4f} of the planted copies were found"
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {"samples": args.samples, "seconds": seconds, "planted_copies_found": found}
    write(args.output, figures | {"peak_mib_page": peak // 1024, "peak_mib_with_all_hashes": after // 1024})


if __name__ == "__main__":
    main()
