"""Images a second from JPEG shards against plain webdataset, precomputed samples against read(), the time of a cold
process to its first batch, and the memory of the index.

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
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from benchmarks.machine import write
from data.buckets import BucketOrder
from data.config import Bucket, DataConfig
from data.index import ImageTextIndex, open_index
from data.order import MAX_CHUNK
from data.precomputed_format import DATASET, EMPTY_CAPTION, LAYOUT, npy
from data.reader import ImageTextReader
from data.shard_index import _cached_path, index_path, load_index
from data.storage import Remote
from data.write_shards import write_shards
from tests.helpers.servers import serve

RESOLUTION = 256
PHOTO = (1500, 2250)
SHARD_SAMPLES, SHARDS = 11_186, 900
BATCH, WORLD = 256, 8
SAMPLE = 10_000_000
TOKENS, MAX_LENGTH, TEXT_WIDTH = 100, 120, 4096
PROCESSES = 32  # that read on a node: 8 ranks with 3 reader processes each


def photo(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG with detail at all scales, about 0.3 byte a pixel."""
    picture = Image.new("RGB", (width, height), "gray")
    for buckets in (4, 16, 64, 256):
        noise = Image.fromarray(rng.integers(0, 256, (buckets, buckets, 3), np.uint8))
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


def precomputed_shard(
    folder: Path, count: int, channels: int, text: bool, tokens: int = TOKENS, max_length: int = MAX_LENGTH
) -> Path:
    """A set of random numbers of the right shapes: latents of 256 px at a downsampling of 8, one caption a sample."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    encoder = {"fingerprint": "none", "width": TEXT_WIDTH, "max_length": max_length} if text else None
    declared = {
        "layout": LAYOUT, "resolution": RESOLUTION, "flips": False, "text_encoder": encoder,
        "autoencoder": {"fingerprint": "none", "channels": channels, "downsample": 8},
    }  # fmt: skip
    (folder / DATASET).write_text(json.dumps(declared))
    (folder / EMPTY_CAPTION).write_bytes(npy(np.zeros((1, TEXT_WIDTH), np.uint16)))
    side = RESOLUTION // 8
    with open(folder / "set.tar", "wb") as file, TarWriter(file, mtime=0) as tar:
        for i in range(count):
            members = {"latents.npy": npy(rng.normal(size=(1, 2, channels, side, side)).astype(np.float16)), "cls": "1"}
            if text:
                members["text.npy"] = npy(rng.integers(0, 2**14, (tokens, TEXT_WIDTH), np.uint16))
                members["json"] = json.dumps({"captions": [f"caption {i}"], "weights": [1], "tokens": [tokens]})
            tar.write({"__key__": f"{i:06d}", **members})
    return folder / "set.tar"


def read_precomputed(index: ImageTextIndex, count: int, text: bool) -> None:
    cfg = DataConfig(shards="unused", num_workers=0, flip=0.0)
    reader = ImageTextReader(index, cfg, 0, 64, 0.0, 0, 1, 64, None if text else 1000)
    for _, [batch] in itertools.islice(reader.batches(0), count // 64):
        assert not batch.holes


def read_plainly(shard: Path, count: int) -> None:
    """read() of the same bytes, those of 64 samples at a time. One sample at a time would be a race in the processor's
    cache: each would overwrite the one before."""
    size = shard.stat().st_size * 64 // count
    with open(shard, "rb", buffering=0) as file:
        while file.read(size):
            pass


def precomputed(folder: Path, repeats: int) -> dict[str, Any]:
    """Interleaved runs on one core from the page cache; medians of the clock's seconds and of the processor's, which do
    not count what other processes take."""
    results: dict[str, Any] = {}
    for name, count, channels, text in (("latents_and_text", 512, 16, True), ("latents", 8192, 4, False)):
        shard = precomputed_shard(folder / name, count, channels, text)
        index = ImageTextIndex([shard])
        size = shard.stat().st_size
        ways = {"ours": partial(read_precomputed, index, count, text), "read": partial(read_plainly, shard, count)}
        clocks = {"wall": time.perf_counter, "cpu": time.process_time}
        seconds: dict[str, dict[str, list[float]]] = {clock: {way: [] for way in ways} for clock in clocks}
        for repeat in range(repeats + 1):
            for way, work in ways.items():
                begin = {clock: now() for clock, now in clocks.items()}
                work()
                for clock, now in clocks.items() if repeat else ():  # the first one fills the page cache
                    seconds[clock][way].append(now() - begin[clock])
        results[name] = {"bytes_a_sample": size // count}
        for clock, of_ways in seconds.items():
            median = {way: statistics.median(times) for way, times in of_ways.items()}
            results[name][clock] = {
                "samples_per_s_a_core": {way: round(count / s) for way, s in median.items()},
                "mb_per_s_a_core": {way: round(size / s / 1e6) for way, s in median.items()},
                "seconds": {way: [round(s, 4) for s in times] for way, times in of_ways.items()},
                "ours_over_read": round(median["read"] / median["ours"], 2),
            }
    return results


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


def index_memory(shards: str, cache: str) -> None:
    """In a cold process: what the index and the order of 64 slots hold, with one bucket and with those of nine
    shapes and
    two lengths of text. What processes of a machine share lies in files: page cache, which is not counted."""
    cfg = DataConfig(shards=shards, buckets="aspect", index_cache=cache)
    shapes = [Bucket(*size, length) for size in cfg.bucket_sizes(16) for length in (256, 64)]
    found: dict[str, float] = {}
    for buckets in (shapes[:1], shapes):
        tracemalloc.start()
        index = open_index(cfg)
        order = BucketOrder(0, index, buckets, 2048, None, 1.0)
        queues = order.queues(order.at(0), range(64))
        into_third_epoch = 2 * len(index) // (MAX_CHUNK * 2048) + 2  # chunks of a slot: then three epochs are held
        for run in itertools.chain(map(next, queues), itertools.islice(queues[0], into_third_epoch)):
            index.rows(run.shard, run.samples)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        found[f"buckets_{len(buckets)}"] = held / len(index)
    print(json.dumps(found))


def cold(what: str, shards: str, cache: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.data", f"--{what}", shards, str(cache)]
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
    results["index_bytes_a_sample"] = cold("index-memory", local, cache)
    results["local"] = [cold("first-batch", local, cache) for _ in range(repeats)]
    with serve(lambda name: real) as server:
        url = f"{server.url}/part-{{000000..{SHARDS - 1:06d}}}.tar"
        first = Remote(f"{server.url}/part-000000.tar")
        load_index(first, cache)
        for i in range(1, SHARDS):  # the same file under other names: its index is the same
            shutil.copy(_cached_path(first, cache), _cached_path(Remote(f"{server.url}/part-{i:06d}.tar"), cache))
        open_index(DataConfig(shards=url, index_cache=str(cache)))
        server.latency_s = 0.05
        results["http_50ms"] = [cold("first-batch", url, cache) for _ in range(repeats)]
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only-precomputed", action="store_true", help="the rows of precomputed samples alone")
    for name in ("--first-batch", "--index-memory"):
        parser.add_argument(name, nargs=2, metavar=("SHARDS", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.first_batch:
        first_batch(*arguments.first_batch)
        return 0
    if arguments.index_memory:
        index_memory(*arguments.index_memory)
        return 0
    if arguments.output is None:
        parser.error("needs --output")
    with tempfile.TemporaryDirectory() as scratch:
        stored = precomputed(Path(scratch), arguments.repeats)
        if arguments.only_precomputed:
            write(arguments.output, {"precomputed": stored})
            return 0
        rates = throughput(Path(scratch), arguments.repeats)
        starts = cold_starts(Path(scratch), arguments.repeats)
    slowest = {name: max(run["first_batch_s"] for run in starts[name]) for name in ("local", "http_50ms")}
    held = starts.pop("index_bytes_a_sample")
    of_node = {buckets: PROCESSES * each for buckets, each in held.items()}
    memory = {
        "bytes_a_sample_a_process": {buckets: round(each, 3) for buckets, each in held.items()},
        f"gib_of_100m_samples_in_{PROCESSES}_processes": {
            buckets: round(each * 100e6 / 2**30, 2) for buckets, each in of_node.items()
        },
    }
    passed = rates["ours_over_webdataset"] >= 2.5 and slowest["local"] <= 2 and slowest["http_50ms"] <= 10
    passed &= stored["latents_and_text"]["cpu"]["ours_over_read"] >= 0.7
    passed &= stored["latents"]["cpu"]["samples_per_s_a_core"]["ours"] >= 20_000
    passed &= max(of_node.values()) * 100e6 <= 2**30
    first = {"slowest_s": slowest, **starts}
    results = {"jpeg": rates, "precomputed": stored, "first_batch_at_10m": first, "index_memory": memory}
    write(arguments.output, {"passed": passed, **results})
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
