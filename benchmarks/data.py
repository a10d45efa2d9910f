"""Images a second from JPEG shards against plain webdataset, and the time of a cold process to its first batch.

python -m benchmarks.data --output benchmarks/results/data.json

The second set has ten million samples: names that lead to one real shard, on disk as links, behind a web server by
its table. Times count from the end of the imports.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from webdataset.compat import WebDataset

from benchmarks.machine import write
from data.config import DataConfig
from data.index import ImageTextIndex, open_index
from data.reader import ImageTextReader
from data.shard_index import _cached_path, index_path, load_index
from data.store import Remote
from data.write import write_shards
from tests.servers import serve

RESOLUTION = 256
PHOTO = (1500, 2250)
SHARD_SAMPLES, SHARDS = 11_186, 900
BATCH, WORLD = 256, 8
SAMPLE = 10_000_000


def photo(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG with detail at all scales, about 0.3 byte a pixel."""
    picture = Image.new("RGB", (width, height), "gray")
    for cells in (4, 16, 64, 256):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        picture = Image.blend(picture, noise.resize((width, height), Image.Resampling.BICUBIC), 0.4)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def ours(shard: Path, count: int) -> int:
    """Read and decode `count` images with our reader; bytes of their files."""
    index = ImageTextIndex([shard])
    cfg = DataConfig(shards="unused", resolution=RESOLUTION, num_workers=0)
    reader = ImageTextReader(index, cfg, 0, 8, 0.0, 0, 1, 8)
    for _, [batch] in itertools.islice(reader.batches(0), count // 8):
        assert not batch.holes
    return int(index.image_size.sum())


def plain_webdataset(shard: Path, count: int) -> None:
    """The same with webdataset: full decode, centre crop, resize with the same filter."""
    samples: Any = WebDataset(str(shard), shardshuffle=False).decode("pil")
    for sample in itertools.islice(samples, count):
        image = sample["jpg"]
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        small = image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        torch.from_numpy(np.array(small).transpose(2, 0, 1).copy())


def throughput(folder: Path, repeats: int, count: int = 32) -> dict[str, Any]:
    """Interleaved runs on one core; medians."""
    rng = np.random.default_rng(0)
    [shard] = write_shards(
        ((f"{i:03d}", photo(rng, *PHOTO), "jpg", "x") for i in range(count)), folder / "photo", count
    )
    seconds: dict[str, list[float]] = {"ours": [], "webdataset": []}
    size = ours(shard, count)
    for _ in range(repeats):
        for name, work in (("ours", ours), ("webdataset", plain_webdataset)):
            begin = time.perf_counter()
            work(shard, count)
            seconds[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "image": f"{PHOTO[0]} x {PHOTO[1]} JPEG -> {RESOLUTION}",
        "bytes_an_image": size // count,
        "images_per_s_a_core": {name: round(count / s, 2) for name, s in median.items()},
        "mb_per_s_a_core": {name: round(size / s / 1e6, 2) for name, s in median.items()},
        "seconds": {name: [round(s, 3) for s in times] for name, times in seconds.items()},
        "ours_over_webdataset": round(median["webdataset"] / median["ours"], 2),
    }


def first_batch(shards: str, cache: str) -> None:
    """In a cold process: the first batch of rank 0 at sample ten million."""
    begin = time.perf_counter()
    cfg = DataConfig(shards=shards, resolution=64, num_workers=0, index_cache=cache)
    index = open_index(cfg)
    opened = time.perf_counter() - begin
    _, batches = next(ImageTextReader(index, cfg, 0, BATCH, 0.1, 0, WORLD, BATCH).batches(SAMPLE // BATCH))
    total = time.perf_counter() - begin
    assert not any(batch.holes for batch in batches)
    print(json.dumps({"samples": len(index), "index_s": round(opened, 3), "first_batch_s": round(total, 3)}))


def cold(shards: str, cache: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.data", "--first-batch", shards, str(cache)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def cold_starts(folder: Path, repeats: int) -> dict[str, Any]:
    """Local disk, and a web server that answers after 50 ms."""
    rng = np.random.default_rng(0)
    files = [photo(rng, 64, 64) for _ in range(50)]
    samples = ((f"{i:05d}", files[i % 50], "jpg", f"caption {i}") for i in range(SHARD_SAMPLES))
    [real] = write_shards(samples, folder / "real" / "part", SHARD_SAMPLES)
    (folder / "set").mkdir()
    for i in range(SHARDS):
        os.link(real, folder / "set" / f"part-{i:06d}.tar")
        os.link(index_path(real), folder / "set" / f"part-{i:06d}.tar.index.parquet")
    results: dict[str, Any] = {}
    local, cache = str(folder / "set"), folder / "index"
    begin = time.perf_counter()
    open_index(DataConfig(shards=local, index_cache=str(cache)))
    results["pack_index_s"] = round(time.perf_counter() - begin, 1)
    results["local"] = [cold(local, cache) for _ in range(repeats)]
    with serve(lambda name: real) as server:
        url = f"{server.url}/part-{{000000..{SHARDS - 1:06d}}}.tar"
        first = Remote(f"{server.url}/part-000000.tar")
        load_index(first, cache)
        for i in range(1, SHARDS):  # the same file under other names: its index is the same
            shutil.copy(_cached_path(first, cache), _cached_path(Remote(f"{server.url}/part-{i:06d}.tar"), cache))
        open_index(DataConfig(shards=url, index_cache=str(cache)))
        server.latency_s = 0.05
        results["http_50ms"] = [cold(url, cache) for _ in range(repeats)]
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--first-batch", nargs=2, metavar=("SHARDS", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.first_batch:
        first_batch(*arguments.first_batch)
        return 0
    if arguments.output is None:
        parser.error("needs --output")
    with tempfile.TemporaryDirectory() as scratch:
        rates = throughput(Path(scratch), arguments.repeats)
        starts = cold_starts(Path(scratch), arguments.repeats)
    slowest = {name: max(run["first_batch_s"] for run in starts[name]) for name in ("local", "http_50ms")}
    passed = rates["ours_over_webdataset"] >= 2.5 and slowest["local"] <= 2 and slowest["http_50ms"] <= 10
    write(arguments.output, {"passed": passed, "jpeg": rates, "first_batch_at_10m": {"slowest_s": slowest, **starts}})
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
